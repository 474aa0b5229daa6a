"""tile.dot kernels: register-tiled GEMM with epilogues, ragged in M, N and K."""

from __future__ import annotations

import re

import pytest
import torch
from aicc.backends.llvm import compile_module, host_target
from aicc.ir import TileType, sym
from aicc.ir.expr import ceildiv, minimum
from aicc.ir.types import DTYPES
from kernels import TORCH, buffer, kernel, module_of, run

i0, i1, i2, t0, t1 = map(sym, ("i0", "i1", "i2", "t0", "t1"))
MR, NR = 12, 32


def gemm(m, n, k, dtype="f32", kb=1, epilogue=True, mr=MR, nr=NR, acc="f32"):
    """C = relu(A @ B + bias): a program per 12 x 32 tile."""
    def body(b, a_buf, b_buf, bias, c_buf):
        p, q = b.pid(0), b.pid(1)
        row, col = i1 * mr + t0, i2 * nr + t1

        def step(s, i, carried):
            a_mask = ((i0 + t1, k),) if kb > 1 else ()
            b_mask = ((i0 + t0, k),) if kb > 1 else ()
            a = s.load(a_buf, minimum(row, m - 1) * k + i0 + t1, i, p, q, shape=(mr, kb), mask=a_mask)
            bt = s.load(b_buf, (i0 + t0) * n + col, i, p, q, shape=(kb, nr), mask=(*b_mask, (col, n)))
            return [s.op("tile.dot", a, bt, carried, type=TileType((mr, nr), DTYPES[acc]))]

        total, = b.loop(0, k, kb, [b.full(0, (mr, nr), acc)], step, unroll=4)
        if epilogue:
            v = b.load(bias, i0 * nr + t1, q, shape=(1, nr), mask=((i0 * nr + t1, n),))
            total = b.arith("max", b.arith("add", total, v), 0.0)
        out = b.cast(total, DTYPES[c_buf.type.dtype.name])
        row, col = i0 * mr + t0, i1 * nr + t1
        b.store(c_buf, out, row * n + col, p, q, mask=((row, m), (col, n)))
    symbols = sorted({s for d in (m, n, k) if not isinstance(d, int) for s in [str(d)]})
    return kernel([buffer((m, k), dtype), buffer((k, n), dtype), buffer((n,), acc),
                   buffer((m, n), dtype if dtype != "i8" else "i32")],
                  [ceildiv(m, mr), ceildiv(n, nr)], body, symbols=symbols, flops=2 * m * n * k)


@pytest.mark.product
@pytest.mark.parametrize("m,n,k", [(12, 32, 8), (24, 64, 33), (13, 35, 7), (1, 1, 1), (37, 100, 50)])
@pytest.mark.parametrize("kb", [1, 4])
@pytest.mark.parametrize("symbolic", [False, True])
def test_gemm(m, n, k, kb, symbolic, target):
    a, b, bias, c = torch.randn(m, k), torch.randn(k, n), torch.randn(n), torch.full((m + 1, n), 9.0)
    sizes = {"s0": m, "s1": n, "s2": k}
    dims = [sym(s) for s in sizes] if symbolic else [m, n, k]
    assert run(gemm(*dims, kb=kb), [a, b, bias, c], sizes if symbolic else {}, target) == 0
    torch.testing.assert_close(c[:m], (a @ b + bias).relu(), rtol=1e-5, atol=1e-5)
    assert (c[m:] == 9).all()


@pytest.mark.product
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("kb", [1, 8])
def test_half_inputs(dtype, kb, target):
    m, n, k = 25, 70, 41
    a, b, bias = torch.randn(m, k).to(TORCH[dtype]), torch.randn(k, n).to(TORCH[dtype]), torch.randn(n)
    c = torch.zeros(m, n, dtype=TORCH[dtype])
    assert run(gemm(m, n, k, dtype, kb=kb), [a, b, bias, c], target=target) == 0
    want = (a.double() @ b.double() + bias.double()).relu()
    torch.testing.assert_close(c.double(), want, rtol=2e-2 if dtype == "bf16" else 2e-3, atol=1e-3)


def test_f64_and_integers(target):
    m, n, k = 14, 33, 20
    a, b, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((m, k), (k, n), (n,)))
    c = torch.zeros(m, n, dtype=torch.float64)
    assert run(gemm(m, n, k, "f64", acc="f64"), [a, b, bias, c], target=target) == 0
    torch.testing.assert_close(c, (a @ b + bias).relu())
    x, y = torch.randint(-128, 127, (m, k), dtype=torch.int8), torch.randint(-128, 127, (k, n), dtype=torch.int8)
    z = torch.zeros(m, n, dtype=torch.int32)
    assert run(gemm(m, n, k, "i8", kb=4, acc="i32", epilogue=False), [x, y, torch.zeros(n, dtype=torch.int32), z],
               target=target) == 0
    assert torch.equal(z, (x.int() @ y.int()))


@pytest.mark.skipif("avx512f" not in host_target().features, reason="the microkernel is that of AVX-512")
def test_microkernel_stays_in_registers():
    """Per K step of the full tile: 24 multiply-adds, nothing spilled or moved through the stack."""
    asm = compile_module(module_of(gemm(1200, 3200, 512, epilogue=False)), host_target()).asm
    loops = re.split(r"^\.LBB.*:", asm, flags=re.M)
    inner = max(loops, key=lambda text: text.count("vfmadd"))
    assert inner.count("vfmadd231ps") == 4 * MR * NR // 16
    assert "(%rsp)" not in inner and "vmovaps" not in inner
