"""Texts of LLVM modules against llvmlite's."""

from __future__ import annotations

import re

import pytest
import torch
from aicc.backends.llvm import objects
from aicc.backends.llvm.text import module_text
from aicc.backends.llvm.values import I1, I32, I64, PTR
from llvmlite import ir

F32 = ir.FloatType()
V4 = ir.VectorType(F32, 4)


def _same(module: ir.Module) -> None:
    """Equal but for blanks and quotes around labels, and both are what LLVM reads."""
    module.triple, module.data_layout = "x86_64-unknown-linux-gnu", ""
    ours, theirs = module_text(module), str(module)
    assert ours.endswith("\n")
    assert _words(ours) == _words(theirs)
    assert str(objects.parse_text(ours)) == str(objects.parse_text(theirs))


def _words(text: str) -> list[str]:
    return re.findall(r"[^\s,]+", text.replace('"', ""))


def test_every_kind_of_instruction():
    module = ir.Module("all")
    g = ir.GlobalVariable(module, ir.ArrayType(F32, 4), "constant.0")
    g.initializer, g.linkage, g.global_constant = ir.Constant(g.value_type, [1.0, 2.0, 3.0, 4.0]), "internal", True
    called = ir.Function(module, ir.FunctionType(F32, [F32]), "called")
    f = ir.Function(module, ir.FunctionType(F32, [PTR, I64, F32, V4]), "f")
    f.linkage = "internal"
    f.attributes.add("noinline")
    f.args[0].add_attribute("noalias")
    p, n, x, v = f.args
    entry, loop, done = (f.append_basic_block(name) for name in ("entry", "a loop.1", "done"))
    b = ir.IRBuilder(entry)
    slot = b.alloca(F32)
    slot.type = PTR
    b.branch(loop)
    b.position_at_end(loop)
    i = b.phi(I64)
    i.add_incoming(I64(0), entry)
    at = b.gep(p, [i], inbounds=True, source_etype=F32)
    value = b.load(at, typ=F32, align=4)
    total = b.fadd(value, b.fneg(b.fmul(value, x, flags=("nsz", "contract"))))
    wide = b.insert_element(v, total, I32(0))
    wide = b.shuffle_vector(wide, ir.Constant(V4, ir.Undefined), ir.Constant(ir.VectorType(I32, 4), [0] * 4))
    picked = b.select(b.fcmp_ordered("<", value, x), b.extract_element(wide, I32(1)), b.call(called, [total]))
    kept = b.store(picked, slot, align=4)
    kept.set_metadata("nontemporal", module.add_metadata([I32(1)]))
    first = b.gep(g, [I32(0), I32(0)], source_etype=g.value_type)
    first.type = PTR
    b.store(picked, first)
    following = b.add(i, I64(1), flags=("nsw",))
    i.add_incoming(following, loop)
    more = b.icmp_signed("<", following, n)
    b.store(b.trunc(b.zext(more, I64), I1), at)
    b.atomic_rmw("add", p, I64(1), "monotonic")
    b.cbranch(more, loop, done)
    b.position_at_end(done)
    b.ret(b.load(slot, typ=F32))
    _same(module)


@pytest.mark.parametrize("function,shape", [(lambda x: (x @ x.mT).softmax(-1), (33, 17)), (lambda x: x.half().abs().amax(0), (5, 70)),
                                            (lambda x: x.sort(-1)[1] + x.argmax(-1, keepdim=True), (4, 50))])
def test_kernels(function, shape, monkeypatch):
    true, seen = objects.module_text, []

    def both(module):
        _same(module)
        seen.append(module)
        return true(module)
    monkeypatch.setattr(objects, "module_text", both)
    x = torch.randn(shape)
    compiled = torch.compile(function, backend="aicc", options={"cache": False, "strict": True})
    torch.testing.assert_close(compiled(x), function(x))
    assert seen
