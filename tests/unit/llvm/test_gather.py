"""Gathers, scatters, checked indices and atomics."""

from __future__ import annotations

import pytest
import torch
from aicc.backends.llvm import compile_module
from aicc.ir import sym
from kernels import buffer, kernel, run

i0, i1, t0, t1, s0 = map(sym, ("i0", "i1", "t0", "t1", "s0"))


@pytest.mark.product
@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16", "i64", "u8"])
@pytest.mark.parametrize("index_type", ["i64", "i32"])
def test_gather_elements(dtype, index_type, target):
    from kernels import TORCH
    n = 37

    def body(k, x, ix, y):
        p, m = k.pid(), ((i0 * 16 + t0, n),)
        at = k.load(ix, i0 * 16 + t0, p, shape=(16,), mask=m)
        v = k.load(x, i0 * 2 + 1, at, shape=(16,), mask=((i0, 50),), mask_low=(i0,), check=True)
        k.store(y, v, i0 * 16 + t0, p, mask=m)
    x = torch.randn(101).mul(20).to(TORCH[dtype])
    ix = torch.randint(0, 50, (n,), dtype=TORCH[index_type])
    y = torch.zeros(n, dtype=TORCH[dtype])
    k = kernel([buffer((101,), dtype), buffer((n,), index_type), buffer((n,), dtype)], [3], body)
    assert run(k, [x, ix, y], target=target) == 0
    assert torch.equal(y, x[ix.long() * 2 + 1])


def test_embedding_rows(target):
    """The index varies by row: contiguous loads from gathered rows."""
    rows, width = 8, 40

    def body(k, table, ix, y):
        at = k.load(ix, t0, shape=(rows, 1))
        v = k.load(table, i0 * width + t1, at, shape=(rows, width), mask=((i0, s0),), mask_low=(i0,), check=True)
        k.store(y, v, t0 * width + t1)
    table, ix, y = torch.randn(100, width), torch.randint(0, 100, (rows,)), torch.zeros(rows, width)
    k = kernel([buffer((s0, width)), buffer((rows,), "i64"), buffer((rows, width))], [1], body, symbols=["s0"])
    assert run(k, [table, ix, y], {"s0": 100}, target) == 0
    assert torch.equal(y, table[ix])


@pytest.mark.parametrize("bad", [-1, 100, 1 << 40])
def test_out_of_range_index_is_reported(bad, target):
    def body(k, x, ix, y):
        at = k.load(ix, t0, shape=(16,))
        k.store(y, k.load(x, i0, at, shape=(16,), mask=((i0, 100),), mask_low=(i0,), check=True, other=-3.0), t0)
    x, ix, y = torch.randn(100), torch.randint(0, 100, (16,)), torch.zeros(16)
    ix[11] = bad
    k = kernel([buffer((100,)), buffer((16,), "i64"), buffer((16,))], [1], body)
    from kernels import module_of
    code = run(k, [x, ix, y], target=target)
    assert code != 0 and "index out of range" in compile_module(module_of(k.clone()), target).errors[code]
    keep = torch.arange(16) != 11
    assert torch.equal(y[keep], x[ix[keep]]) and y[11] == -3


def test_scalar_index_operand(target):
    """A loaded scalar moves a contiguous load."""
    def body(k, x, start, y):
        at = k.load(start, 0)
        k.store(y, k.load(x, i0 + t0, at, shape=(20,)), t0)
    x, y = torch.randn(100), torch.zeros(20)
    k = kernel([buffer((100,)), buffer((1,), "i64"), buffer((20,))], [1], body)
    assert run(k, [x, torch.tensor([33]), y], target=target) == 0
    assert torch.equal(y, x[33:53])


@pytest.mark.product
@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16", "i64", "i32"])
@pytest.mark.parametrize("kind", ["add", "max", "min"])
def test_atomic_scatter(dtype, kind, target):
    from kernels import TORCH
    n = 70

    def body(k, v, ix, y):
        p, m = k.pid(), ((i0 * 16 + t0, n),)
        at = k.load(ix, i0 * 16 + t0, p, shape=(16,), mask=m)
        value = k.load(v, i0 * 16 + t0, p, shape=(16,), mask=m)
        k.store(y, value, i0, at, p, mask=((i1 * 16 + t0, n),), atomic=kind)
    v = torch.randint(-9, 9, (n,)).to(TORCH[dtype])
    ix = torch.randint(0, 10, (n,))
    y = torch.zeros(10, dtype=TORCH[dtype])
    want = y.clone().scatter_reduce(0, ix, v, {"add": "sum", "max": "amax", "min": "amin"}[kind])
    k = kernel([buffer((n,), dtype), buffer((n,), "i64"), buffer((10,), dtype)], [5], body)
    assert run(k, [v, ix, y], target=target) == 0
    assert torch.equal(y, want)


def test_scatter_by_index(target):
    n = 40

    def body(k, v, ix, y):
        at = k.load(ix, t0, shape=(n,))
        k.store(y, k.load(v, t0, shape=(n,)), i0, at)
    v, ix, y = torch.randn(n), torch.randperm(n), torch.zeros(n)
    assert run(kernel([buffer((n,)), buffer((n,), "i64"), buffer((n,))], [1], body), [v, ix, y], target=target) == 0
    assert torch.equal(y[ix], v)


@pytest.mark.product
@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16", "i64", "u8", "i1"])
@pytest.mark.parametrize("index_type", ["i64", "i32"])
def test_numbers_that_lie_in_memory(dtype, index_type, target):
    """Each row of numbers picks from a row of its own. One out of bounds leaves its neighbours what they are."""
    from kernels import TORCH
    rows, n = 3, 32

    def body(k, x, ix, y):
        p = k.pid()
        at = k.load(ix, i0 * n + t1, p, shape=(1, n))
        k.store(y, k.load(x, i0 * 50 + i1, p, at, shape=(1, n), mask=((i1, 50),), mask_low=(i1,), check=True), i0 * n + t1, p)
    x = (torch.rand(rows, 50) * 9 - 4).to(TORCH[dtype])
    ix, y = torch.randint(0, 50, (rows, n), dtype=TORCH[index_type]), torch.ones(rows, n, dtype=TORCH[dtype])
    k = kernel([buffer((rows, 50), dtype), buffer((rows, n), index_type), buffer((rows, n), dtype)], [rows], body)
    assert run(k.clone(), [x, ix, y], target=target) == 0
    assert torch.equal(y, x.gather(1, ix.long()))
    for bad in (-1, 50, 1 << 30):
        ix[1, 13], before = bad, ix[1, 13].item()
        assert run(k.clone(), [x, ix, y], target=target) != 0
        ix[1, 13] = before
        want = x.gather(1, ix.long())
        want[1, 13] = 0
        assert torch.equal(y, want)


def test_numbers_are_read_from_memory(target):
    """Where gathers are no quick instruction. Numbers that the kernel writes, too, are those that were read before."""
    def body(k, x, ix, y):
        at = k.load(ix, t1, shape=(1, 16))
        k.store(y, k.load(x, i0, at, shape=(1, 16), mask=((i0, 50),), mask_low=(i0,), check=True), t1)

    def moved(k, x, ix, y):
        at = k.load(ix, t1, shape=(1, 16))
        k.store(ix, at, 15 - t1)
        body(k, x, ix, y)
        k.store(y, k.load(x, i0, at, shape=(1, 16), mask=((i0, 50),), mask_low=(i0,), check=True), t1)
    buffers = [buffer((50,)), buffer((16,), "i64"), buffer((16,))]
    from kernels import module_of
    text = compile_module(module_of(kernel(buffers, [1], body)), target).llvm_ir
    assert ("load volatile" in text) == ("avx2" not in target.features or "sse4a" in target.features)
    k = kernel(buffers, [1], moved)
    assert "load volatile" not in compile_module(module_of(k.clone()), target).llvm_ir
    x, ix, y = torch.randn(50), torch.randint(0, 50, (16,)), torch.zeros(16)
    want = x[ix]
    assert run(k, [x, ix, y], target=target) == 0
    assert torch.equal(y, want)
