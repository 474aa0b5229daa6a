"""Kernels in several LLVM modules, compiled by several threads."""

from __future__ import annotations

import re
import threading

import pytest
import torch
from aicc.backends.llvm import compile_module, host, host_target
from aicc.backends.llvm.objects import MOST_THREADS, Objects, addresses_as_written, usable_threads
from aicc.ir import Builder, IRError, SymbolRef, make_func, make_module, sym
from aicc.runtime.artifact import members
from kernels import buffer, call, kernel
from llvmlite import binding, ir

t0 = sym("t0")
COUNT = 6


def _scale(number: int):
    """y = (number + 2) * x over 64 elements."""
    def body(k, x, y):
        k.store(y, k.arith("mul", k.load(x, t0, shape=(64,)), float(number + 2)), t0)
    return kernel([buffer((64,))] * 2, [1], body, name=f"scale{number}")


def _chain(beside: bool = False):
    """y[n] = (n + 2) * x[n], each by a kernel of its own."""
    module, top = make_module("host")
    for n in range(COUNT):
        top.append(_scale(n))
    _, body = make_func(top, "main", [buffer((64,))] * (2 * COUNT), symbols={})
    b = Builder.at_end(body)
    for n in range(COUNT):
        b.create("host.launch", [body.args[n], body.args[COUNT + n]], {"kernel": SymbolRef(f"scale{n}"), "outputs": 1, **({"beside": 1} if beside else {})})
    b.create("return")
    return module


@pytest.fixture
def small_parts(monkeypatch):
    """A module per kernel."""
    monkeypatch.setattr(host, "PART", 1)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_kernels_in_modules_of_their_own(small_parts, threads, beside):
    compiled = compile_module(_chain(beside), host_target(), threads=threads)
    assert len(members(compiled.object_code)) == len(compiled.modules) == COUNT  # the first is with the host functions
    xs, ys = torch.randn(COUNT, 64), torch.zeros(COUNT, 64)
    assert call(compiled, "main_0", [row.data_ptr() for row in (*xs, *ys)], []) == 0
    assert torch.equal(ys, xs * torch.arange(2, COUNT + 2)[:, None])
    assert len(re.findall(r"^kernel\.scale\d+:", compiled.asm, flags=re.M)) == COUNT


def test_the_number_of_threads_does_not_show(small_parts):
    codes = {compile_module(_chain(), host_target(), threads=n).object_code for n in (1, 2, 4)}
    assert len(codes) == 1


def test_small_programs_are_one_object():
    compiled = compile_module(_chain(), host_target())
    assert compiled.object_code[:4] == b"\x7fELF" and len(compiled.modules) == 1


def test_only_what_pieces_call_is_visible(small_parts):
    """Of a kernel with its launcher as the only caller, LLVM knows that it runs one program."""
    alone, beside = (compile_module(_chain(b), host_target()).llvm_ir for b in (False, True))
    assert len(re.findall(r'define internal void @"?kernel\.scale', alone)) == COUNT
    assert len(re.findall(r'define internal void @"?kernel\.scale', beside)) == 1


def test_many_threads_of_python_compile_at_once(small_parts):
    want, made = compile_module(_chain(), host_target(), threads=1).object_code, []
    threads = [threading.Thread(target=lambda: made.append(compile_module(_chain(), host_target(), threads=2).object_code)) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert made == [want] * 4


def test_a_module_that_llvm_rejects_leaves_no_thread():
    module = ir.Module("odd")
    f = ir.Function(module, ir.FunctionType(ir.IntType(32), []), "f")
    ir.IRBuilder(f.append_basic_block("entry")).ret(ir.IntType(64)(1))
    with pytest.raises(IRError, match="LLVM rejects the generated code of 'odd'"), Objects(host_target(), 2) as objects:
        objects.add(module)
    assert not [t for t in threading.enumerate() if t.name.startswith("aicc-llvm")]


def test_strength_reduction_is_off_until_the_last_has_ended(monkeypatch):
    told = []
    monkeypatch.setattr(binding, "set_option", lambda name, option: told.append(option))
    with addresses_as_written():
        with addresses_as_written():
            pass
        assert told == ["-disable-lsr=true"]
    assert told == ["-disable-lsr=true", "-disable-lsr=false"]


def test_usable_threads():
    assert usable_threads(0) == usable_threads(1) == 1
    assert 1 <= usable_threads() <= MOST_THREADS


def test_modules_that_end_with_metadata(small_parts, monkeypatch):
    """Their last line must not run into the next module's first."""
    monkeypatch.setattr(host, "add_half_conversions", lambda module, target: module.add_metadata([ir.IntType(32)(1)]))
    assert len(compile_module(_chain(), host_target()).modules) == COUNT


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_to_the_collector(fails):
    """It would free contexts in front of their modules: a program with a loop, whose emitter is part of a cycle, ended the process."""
    module = ir.Module("m")
    ir.IRBuilder(ir.Function(module, ir.FunctionType(ir.VoidType(), []), "f").append_basic_block("entry")).ret_void()
    jobs = []
    try:
        with Objects(host_target(), 2) as objects:
            objects.add(module)
            jobs += [job for job, _ in objects._jobs]
            if fails:
                raise KeyboardInterrupt
            assert len(objects.finish()) == 1
    except KeyboardInterrupt:
        assert fails
    (job,) = jobs
    assert job.parsed.closed and job.builder.closed and job.passes.closed and job.machine.closed
