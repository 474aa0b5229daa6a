"""Host functions: slots, constants, views, persistent buffers, copies, segments; parallel launches; cross compilation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from aicc.backends.llvm import Step, compile_module, host_target, make_target
from aicc.ir import Builder, Dense, IRError, SymbolRef, make_func, make_module, sym
from aicc.ir.expr import ceildiv
from aicc.ir.launch_cost import estimated_nanoseconds
from aicc.ir.types import DTYPES
from kernels import buffer, call, kernel, module_of, run

i0, t0, s0 = sym("i0"), sym("t0"), sym("s0")


def scale_kernel(name="scale", factor=2.0, **attrs):
    """y = factor * x over s0 elements."""
    def body(k, x, y):
        p, m = k.pid(), ((i0 * 64 + t0, s0),)
        v = k.load(x, i0 * 64 + t0, p, shape=(64,), mask=m)
        k.store(y, k.arith("mul", v, factor), i0 * 64 + t0, p, mask=m)
    return kernel([buffer((s0,))] * 2, [ceildiv(s0, 64)], body, symbols=["s0"], name=name, bytes=s0 * 8, **attrs)


def add_kernel(name="add"):
    def body(k, x, y, z):
        p, m = k.pid(), ((i0 * 64 + t0, s0),)
        v, w = (k.load(b, i0 * 64 + t0, p, shape=(64,), mask=m) for b in (x, y))
        k.store(z, k.arith("add", v, w), i0 * 64 + t0, p, mask=m)
    return kernel([buffer((s0,))] * 3, [ceildiv(s0, 64)], body, symbols=["s0"], name=name)


class Host:
    """A module with the two kernels and a function under construction."""

    def __init__(self, args):
        self.module, top = make_module("host")
        for k in (scale_kernel(), add_kernel()):
            top.append(k)
        _, self.body = make_func(top, "main", args, symbols={"s1": (0, None), "s0": (0, None)})
        self.b = Builder.at_end(self.body)

    def launch(self, name, *buffers, outputs=1, **attrs):
        self.b.create("host.launch", buffers, {"kernel": SymbolRef(name), "outputs": outputs, **attrs})

    def compile(self, target=None):
        self.b.create("return")
        return compile_module(self.module, target or host_target())


def test_slots_constants_and_views():
    h = Host([buffer((s0,)), buffer((s0,))])
    x, y = h.body.args
    t = buffer((s0,))
    a = h.b.op("host.slot", type=t, offset=0, bytes=s0 * 4)
    c = h.b.op("host.slot", type=t, offset=s0 * 4 + 64, bytes=s0 * 4 + 4)
    view = h.b.op("host.view", c, type=t, offset=1)
    data = np.arange(100, dtype=np.float32)
    const = h.b.op("host.constant", type=buffer((100,)), value=Dense.from_numpy(data, DTYPES["f32"]))
    h.launch("scale", x, a)
    h.launch("add", a, const, view)
    h.launch("scale", view, y)
    compiled = h.compile()
    assert compiled.symbols == ("main_0",) and compiled.programs["main"].steps == (Step("call", "main_0"),)
    n = 90
    xs, ys, arena = torch.randn(n), torch.zeros(n), torch.zeros(1000)
    assert call(compiled, "main_0", [v.data_ptr() for v in (xs, ys, arena)], [0, n]) == 0
    torch.testing.assert_close(ys, (2 * xs + torch.arange(n)) * 2)


def test_segments_and_persistent_buffers():
    """Extern calls split the program; cached launches are packing functions."""
    t = buffer((s0,))
    h = Host([t, t, t, t])
    x, weight, y, z = h.body.args
    packed = h.b.op("host.persistent", type=t, id=1, bytes=s0 * 4, guards=(1,))
    first = h.b.op("host.persistent", type=t, id=0, bytes=s0 * 4, guards=(1,))
    h.launch("scale", weight, first, cached=True)
    h.launch("scale", first, packed, cached=True)
    h.launch("add", x, packed, y)
    h.b.create("host.extern", [y, z], {"target": "aten.sin.default", "args": (), "inputs": 1})
    h.b.create("host.extern", [y, z], {"target": "aten.sin.default", "args": (), "inputs": 1})
    h.launch("add", z, packed, y)
    compiled = h.compile()
    program = compiled.programs["main"]
    assert program.steps == (Step("call", "main_0"), Step("extern", number=0), Step("extern", number=1), Step("call", "main_1"))
    assert program.packs == {0: "main_pack_0", 1: "main_pack_1"}
    assert set(compiled.symbols) == {"main_0", "main_1", "main_pack_0", "main_pack_1"}
    n = 50
    xs, w, ys, zs, p0, p1, arena = (torch.randn(n) for _ in range(7))
    table = [v.data_ptr() for v in (xs, w, ys, zs, p0, p1, arena)]
    for name in ("main_pack_0", "main_pack_1", "main_0"):
        assert call(compiled, name, table, [0, n]) == 0
    torch.testing.assert_close(ys, xs + 4 * w)
    assert call(compiled, "main_1", table, [0, n]) == 0
    torch.testing.assert_close(ys, zs + 4 * w)


@pytest.mark.parametrize("source,target",
                         [(None, None), ((1, s0), None), (None, (1, s0)), ((s0 * 2, 2), None), ((1, s0), (1, s0))])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "i64", "i1", "c64"])
def test_copies(source, target, dtype):
    shape = (s0, s0)
    types = [buffer(shape, dtype, source), buffer(shape, dtype, target)]
    h = Host(types)
    h.b.create("host.copy", list(h.body.args))
    compiled = h.compile()
    n = 37
    t = {"c64": torch.complex64, "f32": torch.float32, "bf16": torch.bfloat16, "i64": torch.int64, "i1": torch.bool}[dtype]
    storage = (torch.randn(2 * n * n) * 9).to(t)
    out = torch.zeros(2 * n * n, dtype=t)

    def strides(s):
        return (n, 1) if s is None else tuple(x if isinstance(x, int) else n if x == s0 else 2 * n for x in s)
    assert call(compiled, "main_0", [storage.data_ptr(), out.data_ptr()], [0, n]) == 0
    assert torch.equal(out.as_strided((n, n), strides(target)), storage.as_strided((n, n), strides(source)))


@pytest.mark.parametrize("n", [1 << 20, 3000 * 64 + 1, 8])
def test_parallel_launch_covers_every_program_once(n):
    """Enough work for the parallel path, and too little; results as from one thread."""
    k = scale_kernel()
    assert estimated_nanoseconds(scale_kernel()) != 0
    compiled = compile_module(module_of(k, {"s0": n}), host_target())
    assert "aicc_launch" in compiled.llvm_ir
    x = torch.randn(n)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = torch.zeros(n)
            assert call(compiled, "main_0", [x.data_ptr(), y.data_ptr()], [n]) == 0
            assert torch.equal(y, x * 2)
    finally:
        torch.set_num_threads(before)


def test_parallel_atomics():
    n = 1 << 18

    def body(k, ix, y):
        p = k.pid()
        at = k.load(ix, i0 * 64 + t0, p, shape=(64,))
        k.store(y, k.full(1.0, (64,)), i0, at, atomic="add")
    ix, y = torch.randint(0, 7, (n,)), torch.zeros(7)
    k = kernel([buffer((n,), "i64"), buffer((7,))], [n // 64], body, bytes=n * 100)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert run(k, [ix, y]) == 0
    finally:
        torch.set_num_threads(before)
    assert torch.equal(y, torch.bincount(ix, minlength=7).float())


def test_small_constant_launches_have_no_parallel_code():
    def body(k, x, y):
        k.store(y, k.load(x, t0, shape=(16,)), t0)
    compiled = compile_module(module_of(kernel([buffer((16,))] * 2, [1], body)), host_target())
    assert "aicc_launch" not in compiled.llvm_ir and "aicc_region" not in compiled.llvm_ir


@pytest.mark.parametrize("threads", [1, 2])
def test_error_of_a_piece_beside_others(threads):
    """Pieces write to error words of their own; the call gives it."""
    def gather(k, x, ix, y):
        p = k.pid()
        at = k.load(ix, i0 * 64 + t0, p, shape=(64,))
        k.store(y, k.load(x, i0, at, shape=(64,), mask=((i0, 100),), mask_low=(i0,), check=True), i0 * 64 + t0, p)
    module, top = make_module("host")
    n = 64 * 64
    types = [buffer((100,)), buffer((n,), "i64"), buffer((n,))]
    for name in ("first", "second"):
        top.append(kernel(types, [64], gather, name=name, bytes=n * 200))
    _, body = make_func(top, "main", [*types, *types[1:]])
    b = Builder.at_end(body)
    x, i, y, j, z = body.args
    b.create("host.launch", [x, i, y], {"kernel": SymbolRef("first"), "outputs": 1, "beside": 1})
    b.create("host.launch", [x, j, z], {"kernel": SymbolRef("second"), "outputs": 1, "beside": 1})
    b.create("return")
    compiled = compile_module(module, host_target())
    assert "aicc_launch" in compiled.llvm_ir
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, i = torch.randn(100), torch.arange(n) % 100
        for wrong in (-1, 5, n - 1):
            j, y, z = i.clone(), torch.zeros(n), torch.zeros(n)
            if wrong >= 0:
                j[wrong] = 100
            code = call(compiled, "main_0", [v.data_ptr() for v in (x, i, y, j, z)])
            assert (code != 0) == (wrong >= 0)
            assert torch.equal(y, x[i])
    finally:
        torch.set_num_threads(before)


def test_empty_grid():
    x, y = torch.randn(4), torch.zeros(4)
    assert run(scale_kernel(), [x, y], {"s0": 0}) == 0
    assert (y == 0).all()


def test_inplace_kernel_is_not_noalias():
    compiled = compile_module(module_of(scale_kernel(inplace=((0, 1),)), {"s0": 100}), host_target())
    signature = next(line for line in compiled.llvm_ir.splitlines() if line.startswith("define") and "kernel.scale" in line)
    assert "noalias" not in signature
    x = torch.randn(100)
    want = x * 2
    assert call(compiled, "main_0", [x.data_ptr(), x.data_ptr()], [100]) == 0
    assert torch.equal(x, want)


@pytest.mark.parametrize("triple,features",
                         [("aarch64-unknown-linux-gnu", ("neon", "fp-armv8")), ("x86_64-unknown-linux-gnu", ("sse2",)),
                                             ("x86_64-unknown-linux-gnu", ("sse2", "avx", "avx2", "fma", "f16c"))])
def test_cross_compilation(triple, features):
    target = make_target(triple, features=features)
    compiled = compile_module(module_of(scale_kernel(), {"s0": 1}), target)
    assert compiled.object_code[:4] == b"\x7fELF"
    machine = int.from_bytes(compiled.object_code[18:20], "little")
    assert machine == (183 if triple.startswith("aarch64") else 62)


def test_unknown_kernel_and_unplanned_memory_are_errors():
    h = Host([buffer((s0,)), buffer((s0,))])
    h.launch("nothing", *h.body.args)
    with pytest.raises(IRError, match="unknown kernel '@nothing'"):
        h.compile()
    h = Host([buffer((s0,))])
    a = h.b.op("host.alloc", type=buffer((s0,)), bytes=s0 * 4)
    h.launch("scale", h.body.args[0], a)
    with pytest.raises(IRError, match="memory planning"):
        h.compile()
