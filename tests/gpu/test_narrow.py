"""Which 64-bit values a kernel computes in 32 bits."""

from __future__ import annotations

import pytest
from aicc.backends.triton.printer import print_kernel
from aicc.ir.parser import parse_module

KERNEL = """module {{ tile.kernel @k {{grid = [2], symbols = [], outputs = 1}} {{
  ^(%y: buffer<128xi64>):
    %p = tile.program_id() {{axis = 0}} : index
    %i = tile.index(%p) {{expr = i0*64 + t0, shape = [64]}} : tile<64xi64>
    %c = arith.constant() {{value = {constant}}} : i64
    %v = arith.{op}(%i, %c) : tile<64xi64>
    tile.store(%y, %v, %p) {{offset = i0*64 + t0}}
    tile.yield()
}} }}"""


def line(op: str, constant: int) -> str:
    """The line that computes %v, where %i is in [0, 127]."""
    module = parse_module(KERNEL.format(op=op, constant=constant))
    text = print_kernel(next(o for o in module.walk() if o.name == "tile.kernel")).text
    return next(x for x in text.splitlines() if x.strip().startswith("v = "))


@pytest.mark.parametrize(("op", "constant"), [
    ("add", 1000), ("sub", 1 << 29), ("mul", 1 << 22), ("mul", -(1 << 22)), ("min", -5), ("add", (1 << 30) - 1 - 127 - 1),
])
def test_small_values_are_narrow(op: str, constant: int) -> None:
    assert "int64" not in line(op, constant)


@pytest.mark.parametrize(("op", "constant"), [
    ("add", 1 << 30), ("add", (1 << 30) - 1), ("add", 1 << 31), ("sub", -(1 << 30)), ("sub", (1 << 30) - 1 + 127), ("mul", 1 << 24), ("mul", -(1 << 24)),
    ("mul", 1 << 40), ("max", 1 << 33), ("floordiv", 3), ("mod", 3),
])
def test_what_may_leave_32_bits_is_wide(op: str, constant: int) -> None:
    assert "i.to(tl.int64)" in line(op, constant)
