"""Index maps of reshapes: as few divisions as the sizes allow, and right for any factors."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
from aicc.ir import sym
from aicc.ir.expr import evaluate, product
from aicc.passes.decompose.reshape import exact_quotient, reshape_map

S0, S1, S2 = sym("s0"), sym("s1"), sym("s2")


@pytest.mark.parametrize(("source", "result", "want"), [
    ((S0 * S1, 8), (S0, S1, 8), "d0*s1 + d1, d2"),
    ((S0, S1, 8), (S0 * S1, 8), "(d0 // s1), (d0 % s1), d1"),
    ((S0, S1, 4, 16), (S0, S1, 64), "d0, d1, (d2 // 16), (d2 % 16)"),
    ((S0, S1, 64), (S0, S1, 4, 16), "d0, d1, d2*16 + d3"),
    ((S0, S1 * 4), (S0 * S1, 4), "(d0 // s1), (d0 % s1)*4 + d1"),
    ((S0 * (S1 + 1), 3), (S0, S1 + 1, 3), "d0 + d0*s1 + d1, d2"),
    ((2, 6), (3, 4), "((d0*4 + d1) // 6), ((d0*4 + d1) % 6)"),
    ((5, 2, 6), (5, 3, 4), "d0, ((d1*4 + d2) // 6), ((d1*4 + d2) % 6)"),
    ((1, S0, 1), (S0,), "0, d0, 0"),
    ((S2,), (S0, S1), "d0*s1 + d1"),
])
def test_reshape_map(source: tuple, result: tuple, want: str) -> None:
    assert ", ".join(map(str, reshape_map(source, result))) == want


def _random_shape(rng: random.Random, factors: list[Any]) -> tuple[Any, ...]:
    """The factors, in order, joined into random dimensions; some 1s strewn in."""
    shape: list[Any] = [1]
    for f in factors:
        if rng.random() < 0.5:
            shape.append(f)
        else:
            shape[-1] = shape[-1] * f
        if rng.random() < 0.2:
            shape.append(1)
    return tuple(shape)


@pytest.mark.parametrize("seed", range(200))
def test_reshape_map_random(seed: int) -> None:
    rng = random.Random(seed)
    factors = [rng.choice([2, 3, 4, S0, S1, S2 + 1]) for _ in range(rng.randint(1, 5))]
    source, result = _random_shape(rng, factors), _random_shape(rng, rng.sample(factors, len(factors)) if seed % 2 else factors)
    symbols = {"s0": 2, "s1": 3, "s2": 2}
    size = [int(evaluate(e, symbols)) for e in result]
    env = {**symbols, **{f"d{i}": x for i, x in enumerate(np.indices(size))}}
    index = [np.broadcast_to(evaluate(e, env), size).reshape(-1) for e in reshape_map(source, result)]
    shape = [int(evaluate(e, symbols)) for e in source]
    np.testing.assert_array_equal(np.ravel_multi_index(index, shape), np.arange(math.prod(size)))


def test_exact_quotient() -> None:
    a, b = S0 * 2 + S1 * S0 + 3, S1 * S1 - S0 + 1
    assert exact_quotient(a * b, a) == b and exact_quotient(a * b, b) == a
    assert exact_quotient(a * b + 1, a) is None and exact_quotient(S0 * 6, 4) is None and exact_quotient(S0 * 6, 3) == S0 * 2
    assert exact_quotient(product([S0, S1, 4]), S1 * 2) == S0 * 2 and exact_quotient(12, S0) is None
