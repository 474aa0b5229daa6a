"""Divisions that would trap: by zero, and of the most negative number by -1 (found untested by `make mutation`)."""

from __future__ import annotations

import pytest
import torch
from aicc.ir import sym
from aicc.ir.target import Target
from kernels import TORCH, buffer, kernel, run

LEAST = {"i8": -128, "i32": -(1 << 31), "i64": -(1 << 63)}
EXPECTED = {
    # most negative / -1 wraps to itself; its remainder is 0. By zero: any value, but no trap.
    "truncdiv": lambda least: least, "floordiv": lambda least: least, "rem": lambda least: 0, "mod": lambda least: 0,
}


@pytest.mark.parametrize("dtype", LEAST)
@pytest.mark.parametrize("name", EXPECTED)
def test_the_most_negative_number(name: str, dtype: str, target: Target) -> None:
    least, n = LEAST[dtype], 16
    x = torch.tensor([least, 7, least, -7] * (n // 4), dtype=TORCH[dtype])
    y = torch.tensor([-1, 0, 0, 2] * (n // 4), dtype=TORCH[dtype])
    out = torch.full((n,), 55, dtype=TORCH[dtype])

    def body(k, a, c, r):  # type: ignore[no-untyped-def]
        v, w = (k.load(p, sym("t0"), shape=[n]) for p in (a, c))
        k.store(r, k.arith(name, v, w), sym("t0"))
    assert run(kernel([buffer([n], dtype)] * 3, [1], body), [x, y, out], target=target) == 0
    assert out[::4].tolist() == [EXPECTED[name](least)] * (n // 4)
    small = {"truncdiv": -3, "floordiv": -4, "rem": -1, "mod": 1}[name]
    assert out[3::4].tolist() == [small] * (n // 4)
