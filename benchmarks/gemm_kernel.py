"""GEMM as users get it (`torch.compile` of a linear layer) against this machine's measured multiply-add peak and torch, one thread.

    python -m aicc.benchmarks.gemm_kernel [--shapes 512x512x512 128x3072x768] [--dtype bf16] [--asm] [--rounds 5]

Shapes are rows x output columns x K. The peak is that of a loop of independent multiply-adds on registers: of float32, or for bf16, where the
processor has them, of products on its matrix unit or of pairs. Peak, aicc and torch take turns in
every round; each figure is the median of its best block of calls, in CPU time of this thread, so that other processes disturb them less.
Cores that lower their clock for dense vector code reach the peak only in loops that touch no memory: `sustained` is the same loop with
its operands loaded from the first-level cache, as a GEMM's are. `B GB/s` is how fast the weights are read, as they are stored; for few rows
compare it with `read`, one core's best over 256 MB by plain loads. `--dtype i8` is `torch._int_mm` on a parameter, in integer operations.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import re
import time
from collections.abc import Callable
from statistics import median

from . import contenders  # noqa: F401  # first: it names the caches before torch reads them

import torch  # isort: skip
from aicc.backends.llvm import CompiledObject, host_target
from aicc.backends.llvm.amx import AMX
from aicc.backends.llvm.objects import optimize, parse
from aicc.backends.llvm.target import target_machine
from aicc.compiler.driver import Compilation, watching
from aicc.ir.target import Target
from aicc.runtime.loader import NativeLibrary, load_object
from llvmlite import ir
from torch import nn

from .timing import environment

ROUNDS = 60_000
READ = 256 << 20
CHAINS = 24
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64, "i8": torch.int8}
SHAPES = ("512x512x512", "1024x1024x1024", "2048x2048x2048", "128x768x768", "128x3072x768", "128x768x3072", "256x768x3072", "1x4096x4096",
          "4x4096x4096", "16x4096x4096")


def make_peak(target: Target, loads: bool = False) -> Callable[[], float]:
    """Measures multiply-adds per second, in 1e9 operations (two per multiply-add): on registers, or with a load for every second one."""
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
    for i, phi in enumerate(phis):
        phi.add_incoming(x, entry)
        if loads and i % 2 == 0:
            splat = b.load(b.gep(out, [ir.IntType(64)(i)], source_etype=ir.FloatType()), typ=ir.FloatType(), align=4)
            y = b.shuffle_vector(b.insert_element(ir.Constant(vector, ir.Undefined), splat, ir.IntType(32)(0)), ir.Constant(vector, ir.Undefined),
                                 ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes))
        following.append(b.call(fma, [phi, x, y if loads else x]))
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
    return lambda: 2 * lanes * chains * ROUNDS / best_time(library, "peak", [data.data_ptr()]) / 1e9


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"


def make_bf16_peak(target: Target, loads: bool = False) -> Callable[[], float]:
    """The same of bf16 factors and float32 sums, by the fastest instruction that the target has for them: a matrix unit's, of pairs, or float32's.
    With `loads` both factors of a matrix product come from the first-level cache for every second one, as a block of 2 x 2 reads them."""
    matrices = {"amx-bf16", "amx-tile"} <= set(target.features)
    if not matrices and "avx512bf16" not in target.features:
        return make_peak(target, loads)
    i16, i64, pointer, lanes = ir.IntType(16), ir.IntType(64), ir.PointerType(), target.lanes(32)
    vector: ir.Type = AMX if matrices else ir.VectorType(ir.FloatType(), lanes)
    factor: ir.Type = AMX if matrices else ir.VectorType(_BFloat(), 2 * lanes)
    chains, operations = (4, 2 * 16 * 16 * 32) if matrices else (CHAINS, 4 * lanes)
    shape = [i16(16), i16(64)]
    module = ir.Module("peak")
    f = ir.Function(module, ir.FunctionType(ir.IntType(32), [pointer, pointer]), "peak")
    if matrices:
        read = ir.Function(module, ir.FunctionType(AMX, [i16, i16, pointer, i64]), "llvm.x86.tileloadd64.internal")
        zero = ir.Function(module, ir.FunctionType(AMX, [i16, i16]), "llvm.x86.tilezero.internal")
        write = ir.Function(module, ir.FunctionType(ir.VoidType(), [i16, i16, pointer, i64, AMX]), "llvm.x86.tilestored64.internal")
        multiply = ir.Function(module, ir.FunctionType(AMX, [i16, i16, i16, AMX, AMX, AMX]), "llvm.x86.tdpbf16ps.internal")
    else:
        multiply = ir.Function(module, ir.FunctionType(vector, [vector, factor, factor]), f"llvm.x86.avx512bf16.dpbf16ps.{32 * lanes}")
    entry, loop, done = (f.append_basic_block(n) for n in ("entry", "loop", "done"))
    b = ir.IRBuilder(entry)
    data = b.load(f.args[0], typ=pointer)

    def factors(first: int) -> list[ir.Value]:
        """Two factors, from places of their own."""
        places = [b.gep(data, [i64(1024 * (first + k))], source_etype=ir.IntType(8)) for k in (0, 1)]
        return [b.call(read, [*shape, p, i64(64)]) if matrices else b.load(p, typ=factor, align=4) for p in places]
    fixed = factors(0)
    start = b.call(zero, shape) if matrices else ir.Constant(vector, None)
    b.branch(loop)
    b.position_at_end(loop)
    n = b.phi(i64)
    n.add_incoming(i64(0), entry)
    phis = [b.phi(vector) for _ in range(chains)]
    sides = [factors(0), factors(2)] if loads and matrices else [fixed, fixed]
    following = []
    for i, phi in enumerate(phis):
        x, y = (sides[i // 2 % 2][0], sides[i % 2][1])
        following.append(b.call(multiply, [i16(16), i16(64), i16(64), phi, x, y] if matrices else [phi, x, y]))
        phi.add_incoming(start, entry)
        phi.add_incoming(following[-1], loop)
    more = b.add(n, i64(1))
    n.add_incoming(more, loop)
    rounds = ROUNDS // 8 if matrices else ROUNDS
    b.cbranch(b.icmp_signed("<", more, i64(rounds)), loop, done)
    b.position_at_end(done)
    for i, v in enumerate(following):
        place = b.gep(data, [i64(4096 + 1024 * i)], source_etype=ir.IntType(8))
        if matrices:
            b.call(write, [*shape, place, i64(64), v])
        else:
            b.store(v, place, align=4)
    b.ret(ir.IntType(32)(0))
    parsed, _ = parse(module, target)
    optimize(parsed, target)
    library = load_object(target_machine(target).emit_object(parsed), ["peak"])
    memory = torch.zeros(4096 + 1024 * chains, dtype=torch.uint8)
    return lambda: operations * chains * rounds / best_time(library, "peak", [memory.data_ptr()]) / 1e9


def read_bandwidth(target: Target) -> float:
    """GB/s at which one core sums a buffer that no cache holds, in eight sums of full vectors."""
    vector = ir.VectorType(ir.IntType(32), target.lanes(32))
    module, i64, pointer, step = ir.Module("read"), ir.IntType(64), ir.PointerType(), 8 * target.lanes(32)
    f = ir.Function(module, ir.FunctionType(ir.IntType(32), [pointer, pointer]), "read")
    entry, loop, done = (f.append_basic_block(n) for n in ("entry", "loop", "done"))
    b = ir.IRBuilder(entry)
    data = b.load(f.args[0], typ=pointer)
    b.branch(loop)
    b.position_at_end(loop)
    n, sums = b.phi(i64), [b.phi(vector) for _ in range(8)]
    for k, total in enumerate(sums):
        total.add_incoming(ir.Constant(vector, None), entry)
        at = b.gep(data, [b.add(n, i64(k * target.lanes(32)))], source_etype=ir.IntType(32))
        total.add_incoming(b.xor(total, b.load(at, typ=vector, align=4)), loop)
    more = b.add(n, i64(step))
    n.add_incoming(i64(0), entry)
    n.add_incoming(more, loop)
    b.cbranch(b.icmp_signed("<", more, i64(READ // 4)), loop, done)
    b.position_at_end(done)
    for total in sums:
        b.store(b.xor(b.load(data, typ=vector, align=4), total.incomings[1][0]), data, align=4)
    b.ret(ir.IntType(32)(0))
    parsed, _ = parse(module, target)
    optimize(parsed, target)
    library = load_object(target_machine(target).emit_object(parsed), ["read"])
    buffer = torch.ones(READ // 4, dtype=torch.int32)
    return READ / best_time(library, "read", [buffer.data_ptr()], 5) / 1e9


class _Integers(nn.Module):
    """8-bit weights of 8-bit activations."""

    def __init__(self, k: int, n: int):
        super().__init__()
        self.register_parameter("weight", nn.Parameter(torch.randint(-128, 128, (n, k), dtype=torch.int8), requires_grad=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch._int_mm(x, self.weight.t())


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


def measure(m: int, n: int, k: int, dtype: torch.dtype, peak: Callable[[], float], rounds: int, asm: bool) -> str:
    """One line of the table."""
    torch._dynamo.reset()
    layer: nn.Module
    if dtype is torch.int8:
        layer, x = _Integers(k, n), torch.randint(-128, 128, (m, k), dtype=dtype)
    else:
        layer, x = nn.Linear(k, n, bias=False, dtype=dtype), torch.randn(m, k, dtype=dtype)
    kernels = []
    with torch.no_grad(), watching(compiled=kernels.append):
        compiled = torch.compile(layer, backend="aicc")
        start = time.perf_counter()
        y = compiled(x)
        seconds = time.perf_counter() - start
        truth = x.double() @ layer.get_parameter("weight").double().T
        errors = [(r.double() - truth).abs().max().item() for r in (y, layer(x))]
        best = [0.0, math.inf, math.inf]
        calls = max(3, min(9, int(2e9 / (2 * m * n * k))))
        for _ in range(rounds):
            best[0] = max(best[0], peak())
            for i, f in enumerate((compiled, layer), 1):
                f(x)
                for _ in range(3):
                    times = []
                    for _ in range(calls):
                        start = time.thread_time()
                        f(x)
                        times.append(time.thread_time() - start)
                    best[i] = min(best[i], median(times))
    ours, theirs = (2 * m * n * k / t / 1e9 for t in best[1:])
    gigabytes = n * k * dtype.itemsize / best[1] / 1e9
    line = (f"{f'{m}x{n}x{k}':>15} {best[1] * 1e3:9.3f} ms {ours:8.1f} {100 * ours / best[0]:6.0f} % {theirs:8.1f} {gigabytes:8.1f} {seconds:8.2f} "
            f"{errors[0]:9.1e} {errors[1]:9.1e}")
    if asm:
        loops = re.split(r"^(?=\.LBB.*:)", _asm(kernels[0]), flags=re.M)
        line += "\n" + max(loops, key=lambda text: sum(text.count(i) for i in ("vfmadd", "vdpb", "vpmaddwd", "vpdpb")) + 8 * text.count("tdpbf16"))
    return line


def _asm(compilation: Compilation) -> str:
    return CompiledObject(b"", compilation.llvm_ir, (), {}, {}, compilation.target).asm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--dtype", default="f32", choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--asm", action="store_true", help="print the inner loop")
    options = parser.parse_args()
    torch.set_num_threads(1)
    target = host_target()
    make = make_bf16_peak if options.dtype == "bf16" else make_peak
    peak, from_cache = make(target), make(target, loads=True)
    sustained = max(from_cache() for _ in range(5))
    print(f"{environment()['cpu']}, {target.vector_bits}-bit vectors, multiply-add peak {max(peak() for _ in range(5)):.1f} GFLOP/s, "
          f"sustained {sustained:.1f}, "
          f"read {read_bandwidth(target):.1f} GB/s; {options.dtype}")
    titles = ("aicc", 12), ("GFLOP/s", 8), ("of peak", 8), ("torch", 8), ("B GB/s", 8), ("compile s", 8), ("error", 9), ("torch err", 9)
    print(f"{'shape':>15}", *(f"{title:>{width}}" for title, width in titles), flush=True)
    for shape in options.shapes:
        m, n, k = map(int, shape.split("x"))
        print(measure(m, n, k, DTYPES[options.dtype], peak, options.rounds, options.asm), flush=True)


if __name__ == "__main__":
    main()
