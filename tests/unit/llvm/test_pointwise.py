"""Pointwise kernels: addressing, masks, element types."""

from __future__ import annotations

import pytest
import torch
from aicc.ir import sym
from aicc.ir.types import DTYPES
from kernels import TORCH, buffer, kernel, run, tile

i0, i1, i2, t0, t1, s0, s1 = map(sym, ("i0", "i1", "i2", "t0", "t1", "s0", "s1"))


@pytest.mark.product
@pytest.mark.parametrize("n", [1, 5, 64, 65, 1000])
def test_symbolic_size(n, target):
    def body(k, x, y):
        p, m = k.pid(), ((i0 * 64 + t0, s0),)
        v = k.load(x, i0 * 64 + t0, p, shape=(64,), mask=m)
        k.store(y, k.arith("add", k.arith("mul", v, v), 1.0), i0 * 64 + t0, p, mask=m)
    x, y = torch.randn(n), torch.full((n + 64,), 7.0)
    assert run(kernel([buffer((s0,))] * 2, [(s0 + 63) // 64], body, symbols=["s0"]), [x, y], {"s0": n}, target) == 0
    torch.testing.assert_close(y[:n], x * x + 1)
    assert (y[n:] == 7).all()


@pytest.mark.parametrize("n", [7, 64, 100, 129])
def test_loop_with_peeled_tail(n, target):
    """One program loops over all elements; the mask is needed in the last step alone."""
    def body(k, x, y):
        def step(b, i):
            v = b.load(x, i0 + t0, i, shape=(32,), mask=((i0 + t0, s0),))
            b.store(y, b.arith("neg", v), i0 + t0, i, mask=((i0 + t0, s0),))
            return []
        k.loop(0, s0, 32, [], step, unroll=2)
    x, y = torch.randn(n), torch.full((n + 64,), 7.0)
    assert run(kernel([buffer((s0,))] * 2, [1], body, symbols=["s0"]), [x, y], {"s0": n}, target) == 0
    assert (y[:n] == -x).all() and (y[n:] == 7).all()


@pytest.mark.product
@pytest.mark.parametrize("shape,strides",
                         [((13, 37), (37, 1)), ((13, 37), (1, 13)), ((13, 37), (80, 2)), ((13, 37), (0, 1)),
                          ((13, 37), (1, 0))])
@pytest.mark.parametrize("symbolic", [False, True])
def test_strided_loads(shape, strides, symbolic, target):
    rows, columns = shape
    a, c = (s0, s1) if symbolic else strides
    if symbolic and not strides[0] > 1:
        pytest.skip("the contiguous dimension is static")
    a, c = (s0, strides[1]) if symbolic else strides

    def body(k, x, y):
        p, q = k.pid(0), k.pid(1)
        r, col = i0 * 4 + t0, i1 * 24 + t1
        m = ((r, rows), (col, columns))
        v = k.load(x, r * a + col * c, p, q, shape=(4, 24), mask=m)
        k.store(y, v, r * columns + col, p, q, mask=m)
    storage = torch.randn(rows * max(1, strides[0]) + columns * max(1, strides[1]))
    x = torch.as_strided(storage, shape, strides)
    y = torch.zeros(shape)
    k = kernel([buffer(shape, strides=(a, c)), buffer(shape)], [4, 2], body, symbols=["s0"] if symbolic else [])
    assert run(k, [storage, y], {"s0": strides[0]} if symbolic else {}, target) == 0
    assert torch.equal(x, y)


def test_transposed_and_reversed_stores(target):
    n, m = 20, 36

    def body(k, x, y, z):
        p = k.pid()
        v = k.load(x, i0 * m + t0, p, shape=(m,))
        k.store(y, v, t0 * n + i0, p)
        k.store(z, v, i0 * m + (m - 1) - t0, p)
    x, y, z = torch.randn(n, m), torch.zeros(m, n), torch.zeros(n, m)
    assert run(kernel([buffer((n, m)), buffer((m, n)), buffer((n, m))], [n], body), [x, y, z], target=target) == 0
    assert torch.equal(y, x.t()) and torch.equal(z, x.flip(1))


def test_reversed_load_with_mask(target):
    n = 50

    def body(k, x, y):
        p, m = k.pid(), ((i0 * 16 + t0, n),)
        k.store(y, k.load(x, n - 1 - i0 * 16 - t0, p, shape=(16,), mask=m), i0 * 16 + t0, p, mask=m)
    x, y = torch.randn(n), torch.zeros(n)
    assert run(kernel([buffer((n,))] * 2, [4], body), [x, y], target=target) == 0
    assert torch.equal(y, x.flip(0))


def test_padding_with_low_masks(target):
    n = 40

    def body(k, x, y):
        p = k.pid()
        at = i0 * 16 + t0 - 3
        v = k.load(x, at, p, shape=(16,), mask=((at, n),), mask_low=(at,), other=-1.5)
        k.store(y, v, i0 * 16 + t0, p)
    x, y = torch.randn(n), torch.zeros(64)
    assert run(kernel([buffer((n,)), buffer((64,))], [4], body), [x, y], target=target) == 0
    assert torch.equal(y, torch.nn.functional.pad(x, (3, 21), value=-1.5))


def test_divided_positions(target):
    """A reshape left in the offset: floor divisions and remainders of the position."""
    n = 96

    def body(k, x, y):
        p = k.pid()
        at = i0 * 32 + t0
        v = k.load(x, (at % 12) * 8 + at // 12, p, shape=(32,))
        w = k.load(x, (at // 8) * 8 + (at % 8), p, shape=(32,))
        k.store(y, k.arith("add", v, w), at, p)
    x, y = torch.randn(n), torch.zeros(n)
    assert run(kernel([buffer((n,))] * 2, [3], body), [x, y], target=target) == 0
    assert torch.equal(y, x.view(12, 8).t().reshape(-1) + x)


def test_symbolic_division(target):
    def body(k, x, y):
        p, at = k.pid(), i0 * 16 + t0
        v = k.load(x, (at % s1) * 3 + at // s1, p, shape=(16,), mask=((at, s1 * 3),))
        k.store(y, v, at, p, mask=((at, s1 * 3),))
    x, y = torch.randn(7, 3), torch.zeros(3, 7)
    k = kernel([buffer((s1, 3)), buffer((3, s1))], [(s1 * 3 + 15) // 16], body, symbols=["s1"], bounds={"s1": (2, None)})
    assert run(k, [x, y], {"s1": 7}, target) == 0
    assert torch.equal(y, x.t())


@pytest.mark.product
@pytest.mark.parametrize("dtype", ["f64", "f32", "f16", "bf16", "i64", "i32", "i16", "i8", "u8", "i1"])
def test_element_types(dtype, target):
    n = 77

    def body(k, x, y, z):
        p, m = k.pid(), ((i0 * 32 + t0, n),)
        v = k.load(x, i0 * 32 + t0, p, shape=(32,), mask=m, other=1)
        k.store(y, k.arith("add", v, v), i0 * 32 + t0, p, mask=m)
        k.store(z, k.arith("gt", k.cast(v, DTYPES["f32"]), 0.5), i0 * 32 + t0, p, mask=m)
    t = TORCH[dtype]
    x = torch.randn(n).mul(3).to(t) if dtype != "i1" else torch.rand(n) > 0.5
    y, z = torch.zeros(n + 32, dtype=t), torch.zeros(n, dtype=torch.bool)
    k = kernel([buffer((n,), dtype), buffer((n,), dtype), buffer((n,), "i1")], [3], body)
    assert run(k, [x, y, z], target=target) == 0
    assert torch.equal(y[:n], x + x) and torch.equal(z, x.float() > 0.5) and (y[n:] == 0).all()


def test_row_masks_and_broadcast(target):
    rows, columns = 10, 24

    def body(k, x, bias, scale, y):
        p = k.pid()
        r = i0 * 4 + t0
        v = k.load(x, r * columns + t1, p, shape=(4, columns), mask=((r, rows),))
        b = k.load(bias, t1, shape=(1, columns))
        s = k.load(scale, r, p, shape=(4, 1), mask=((r, rows),), other=5.0)
        k.store(y, k.arith("add", k.arith("mul", v, s), b), r * columns + t1, p, mask=((r, rows),))
    x, bias, scale, y = torch.randn(rows, columns), torch.randn(columns), torch.randn(rows), torch.zeros(rows + 4, columns)
    k = kernel([buffer((rows, columns)), buffer((columns,)), buffer((rows,)), buffer((rows, columns))], [3], body)
    assert run(k, [x, bias, scale, y], target=target) == 0
    torch.testing.assert_close(y[:rows], x * scale[:, None] + bias)
    assert (y[rows:] == 0).all()


@pytest.mark.parametrize("length", [0, 5, 16])
def test_masked_broadcast(length, target):
    """One element for all lanes, with a mask over lanes; never read when no lane is active."""
    def body(k, x, y):
        k.store(y, k.load(x, i0, k.op("tile.index", type=tile((), "i64"), expr=s0 * 1000000000, shape=()), shape=(16,),
                          mask=((t0, s1),), other=2.0), t0)
    x, y = torch.full((1,), 5.0), torch.zeros(16)
    sizes = {"s0": 0 if length else 1, "s1": length}
    assert run(kernel([buffer((1,)), buffer((16,))], [1], body, symbols=["s0", "s1"]), [x, y], sizes, target) == 0
    assert y.tolist() == [5.0] * length + [2.0] * (16 - length)


def test_index_tiles_and_masks(target):
    """Positions as data, and `tile.mask`, provable or not."""
    n = 30

    def body(k, y, z):
        p = k.pid()
        at = i0 * 16 + t0
        pos = k.op("tile.index", p, type=tile((16,), "i32"), expr=at * 3 - 7, shape=(16,))
        mask = k.create("tile.mask", [p], {"mask": ((at, n),), "shape": (16,)}, [tile((16,), "i1")]).result
        always = k.create("tile.mask", [p], {"mask": ((at, 32),), "shape": (16,)}, [tile((16,), "i1")]).result
        k.store(y, k.arith("select", k.arith("and", mask, always), pos, -1), at, p)
        third = k.op("tile.index", p, type=tile((16,), "f32"), expr=at // 3, shape=(16,))
        k.store(z, third, at, p)
    y, z = torch.zeros(32, dtype=torch.int32), torch.zeros(32)
    assert run(kernel([buffer((32,), "i32"), buffer((32,))], [2], body), [y, z], target=target) == 0
    at = torch.arange(32)
    assert torch.equal(y.long(), torch.where(at < n, at * 3 - 7, -1)) and torch.equal(z.long(), at // 3)


def test_min_clamped_rows(target):
    """Offsets clamped by min(), as ragged GEMM rows are."""
    rows, columns = 10, 16

    def body(k, x, y):
        def step(b, i):
            r = i0 + t0
            from aicc.ir.expr import minimum
            v = b.load(x, minimum(r, s0 - 1) * columns + t1, i, shape=(4, columns))
            b.store(y, v, r * columns + t1, i, mask=((r, s0),))
            return []
        k.loop(0, s0, 4, [], step)
    x, y = torch.randn(rows, columns), torch.zeros(rows + 4, columns)
    assert run(kernel([buffer((s0, columns))] * 2, [1], body, symbols=["s0"]), [x, y], {"s0": rows}, target) == 0
    assert torch.equal(y[:rows], x) and (y[rows:] == 0).all()
