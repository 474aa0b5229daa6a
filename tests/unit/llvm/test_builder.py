"""No instruction twice in a block."""

from __future__ import annotations

import pytest
from aicc.backends.llvm.builder import Builder
from aicc.backends.llvm.values import I64, PTR, splat
from llvmlite import ir

F32 = ir.FloatType()


@pytest.fixture
def f():
    return ir.Function(ir.Module("m"), ir.FunctionType(ir.VoidType(), [I64, I64, F32, PTR]), "f")


def test_equal_instructions_are_one(f):
    b = Builder(f.append_basic_block("entry"))
    x, y, z, p = f.args
    assert b.add(x, I64(3)) is b.add(x, I64(3))
    assert b.icmp_signed("<", x, y) is b.icmp_signed("<", x, y)
    assert b.gep(p, [I64(2)], source_etype=F32) is b.gep(p, [I64(2)], source_etype=F32)
    assert splat(b, z, 8) is splat(b, z, 8)
    assert b.zext(b.icmp_signed("<", x, y), I64) is b.zext(b.icmp_signed("<", x, y), I64)
    assert len(b.block.instructions) == 6


def test_what_differs_is_made(f):
    b = Builder(f.append_basic_block("entry"))
    x, y, _, p = f.args
    made = [b.add(x, I64(3)), b.add(x, I64(4)), b.add(x, ir.Constant(I64, 3), flags=("nsw",)), b.sub(x, I64(3)), b.icmp_signed("<", x, y), b.icmp_signed(">", x, y),
            b.icmp_unsigned("<", x, y), b.icmp_signed("<", y, x), b.gep(p, [I64(2)], source_etype=F32), b.gep(p, [I64(2)], source_etype=I64)]
    assert len(set(map(id, made))) == len(made) == len(b.block.instructions)


def test_each_block_has_its_own(f):
    entry, other = f.append_basic_block("entry"), f.append_basic_block("other")
    b = Builder(entry)
    first = b.mul(f.args[0], f.args[1])
    b.position_at_end(other)
    second = b.mul(f.args[0], f.args[1])
    b.position_at_end(entry)
    assert first is not second and b.mul(f.args[0], f.args[1]) is first


def test_loads_and_calls_are_made_each_time(f):
    """Memory may have changed in between."""
    b = Builder(f.append_basic_block("entry"))
    assert b.load(f.args[3], typ=F32) is not b.load(f.args[3], typ=F32)
