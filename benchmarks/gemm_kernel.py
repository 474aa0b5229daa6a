"""The GEMM microkernel of the LLVM backend against this machine's measured multiply-add peak, one thread, float32.

    python -m aicc.benchmarks.gemm_kernel [--sizes 512 1024] [--features avx2,fma,...] [--asm]

The kernel is the one that tiling makes: a register tile of MR x NR, operand B packed in panels of NR columns, a program per
block of rows and panel. The peak is measured by a loop of independent multiply-adds on registers, in the same run.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import time

import torch
from aicc.backends.llvm import compile_module, host_target
from aicc.backends.llvm.compile import optimize, parse
from aicc.backends.llvm.target import target_machine
from aicc.ir import Block, BufferType, Builder, Operation, Region, SymbolRef, TileType, make_func, make_module, sym
from aicc.ir.expr import ceildiv, minimum
from aicc.ir.target import Target
from aicc.ir.types import DTYPES, index
from aicc.runtime.loader import NativeLibrary, load_object
from llvmlite import ir

F32 = DTYPES["f32"]
ROUNDS = 200_000
CHAINS = 24


def peak_gflops(target: Target) -> float:
    """Multiply-adds per second on registers, in 1e9 operations (two per multiply-add)."""
    lanes = target.lanes(32)
    chains = CHAINS if target.vector_registers >= 32 else 12
    vector = ir.VectorType(ir.FloatType(), lanes)
    module = ir.Module("peak")
    pointer = ir.PointerType()
    f = ir.Function(module, ir.FunctionType(ir.IntType(32), [pointer, pointer]), "peak")
    fma = ir.Function(module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{lanes}f32")
    entry, loop, done = (f.append_basic_block(n) for n in ("entry", "loop", "done"))
    b = ir.IRBuilder(entry)
    out = b.load(f.args[0], typ=pointer)
    x = b.load(out, typ=vector, align=4)
    b.branch(loop)
    b.position_at_end(loop)
    n = b.phi(ir.IntType(64))
    n.add_incoming(ir.IntType(64)(0), entry)
    phis = [b.phi(vector) for _ in range(chains)]
    following = []
    for phi in phis:
        phi.add_incoming(x, entry)
        following.append(b.call(fma, [phi, x, x]))
        phi.add_incoming(following[-1], loop)
    more = b.add(n, ir.IntType(64)(1))
    n.add_incoming(more, loop)
    b.cbranch(b.icmp_signed("<", more, ir.IntType(64)(ROUNDS)), loop, done)
    b.position_at_end(done)
    total = following[0]
    for v in following[1:]:
        total = b.fadd(total, v)
    b.store(total, out, align=4)
    b.ret(ir.IntType(32)(0))
    parsed, _ = parse(module, target)
    optimize(parsed, target)
    library = load_object(target_machine(target).emit_object(parsed), ["peak"])
    data = torch.zeros(64)
    seconds = best_time(library, "peak", [data.data_ptr()])
    return 2 * lanes * chains * ROUNDS / seconds / 1e9


def gemm_kernel(size: int, rows: int, columns: int, block_rows: int, packed: bool = True) -> Operation:
    """C = A @ B for square matrices; B in panels [size / columns][size][columns], or row-major when not packed."""
    i0, i1, t0, t1 = map(sym, ("i0", "i1", "t0", "t1"))
    acc_type = TileType((rows, columns), F32)
    block = Block([BufferType((size * size,), F32)] * 3)
    a, w, c = block.args
    b = Builder.at_end(block)
    p, q = (b.op("tile.program_id", type=index, axis=n) for n in (0, 1))
    tile_body = Block([index])
    t = Builder.at_end(tile_body)
    at = tile_body.args[0]
    zero = t.op("tile.full", t.constant(0.0, F32), type=acc_type)
    k_body = Block([index, acc_type])
    k = Builder.at_end(k_body)
    left = k.op("tile.load", a, k_body.args[0], at, type=TileType((rows, 1), F32), shape=(rows, 1),
                offset=minimum(i1 + t0, size - 1) * size + i0)
    panel = (i1 * size + i0) * columns + t1 if packed else i0 * size + i1 * columns + t1
    right = k.op("tile.load", w, k_body.args[0], q, type=TileType((1, columns), F32), shape=(1, columns), offset=panel)
    k.create("tile.yield", [k.op("tile.dot", left, right, k_body.args[1], type=acc_type)])
    made = t.create("tile.for", [zero], {"lower": 0, "upper": size, "step": 1, "unroll": 4}, [acc_type], [Region([k_body])])
    t.create("tile.store", [c, made.result, at, q],
             {"offset": (i0 + t0) * size + i1 * columns + t1, "mask": ((i0 + t0, size),)})
    t.create("tile.yield")
    b.create("tile.for", [p],
             {"lower": i0 * block_rows, "upper": minimum(size, i0 * block_rows + block_rows), "step": rows, "indices": 1},
             (), [Region([tile_body])])
    b.create("tile.yield")
    return Operation.create("tile.kernel", (),
                            {"sym_name": "gemm", "grid": (ceildiv(size, block_rows), size // columns), "outputs": 1,
                                                "flops": 2 * size**3}, (), [Region([block])])


def best_time(library: NativeLibrary, name: str, pointers: list[int], repeats: int = 7) -> float:
    """Seconds of the fastest call."""
    table = (ctypes.c_void_p * len(pointers))(*pointers)
    symbols = (ctypes.c_int64 * 1)()
    function = library.function(name)
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        function(ctypes.addressof(table), ctypes.addressof(symbols))
        times.append(time.thread_time() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--features", default="", help="LLVM feature names, comma-separated, instead of the host's")
    parser.add_argument("--tile", type=int, nargs=2, default=None, help="rows and columns of the register tile")
    parser.add_argument("--unpacked", action="store_true", help="read B row-major")
    parser.add_argument("--asm", action="store_true", help="print the inner loop")
    options = parser.parse_args()
    torch.set_num_threads(1)
    target = host_target(options.features.split(",") if options.features else None)
    lanes = target.lanes(32)
    rows, columns = options.tile or ((12, 2 * lanes) if target.vector_registers >= 32 else (6, 2 * lanes))
    peak = peak_gflops(target)
    print(f"{target.vector_bits}-bit vectors, tile {rows}x{columns}, multiply-add peak {peak:.1f} GFLOP/s")
    for size in options.sizes:
        module, top = make_module("host")
        kernel = gemm_kernel(size, rows, columns, 240 // rows * rows, not options.unpacked)
        top.append(kernel)
        _, body = make_func(top, "main", [arg.type for arg in kernel.body.args])
        b = Builder.at_end(body)
        b.create("host.launch", list(body.args), {"kernel": SymbolRef("gemm"), "outputs": 1})
        b.create("return")
        start = time.perf_counter()
        compiled = compile_module(module, target)
        compile_seconds = time.perf_counter() - start
        x, y, z = torch.randn(size, size), torch.randn(size, size), torch.zeros(size, size)
        panels = y if options.unpacked else y.view(size, size // columns, columns).permute(1, 0, 2).contiguous()
        library = load_object(compiled.object_code, compiled.symbols)
        seconds = best_time(library, "main_0", [v.data_ptr() for v in (x, panels, z)])
        error = (z - x @ y).abs().max().item()
        reference = min(_timed(lambda x=x, y=y: x @ y) for _ in range(7))
        gflops = 2 * size**3 / seconds / 1e9
        theirs = 2 * size**3 / reference / 1e9
        print(f"{size:5}: {gflops:7.1f} GFLOP/s, {100 * gflops / peak:3.0f} % of peak (torch {theirs:.1f}); "
              f"compiled in {1e3 * compile_seconds:.0f} ms; largest error {error:.1e}")
        if options.asm:
            loops = re.split(r"^(?=\.LBB.*:)", compiled.asm, flags=re.M)
            print(max(loops, key=lambda text: text.count("vfmadd")))


def _timed(f) -> float:  # type: ignore[no-untyped-def]
    start = time.thread_time()
    f()
    return time.thread_time() - start


if __name__ == "__main__":
    main()
