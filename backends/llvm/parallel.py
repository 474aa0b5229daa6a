"""Launching a kernel over its grid: serially, or through the OpenMP runtime that torch has loaded.

For a kernel `kernel.K` this adds `launch.K(ptr buffer..., i64 symbol..., ptr context)` and the outlined body that
`GOMP_parallel` runs on every thread. Threads take chunks of programs from an atomic counter, about `CHUNKS` each, so that a
slow core does not hold up the others. The team always has the full number of threads: libgomp ends the threads that a smaller
team leaves out and would have to start them again.

Small launches stay serial: a parallel region costs some microseconds.
"""

from __future__ import annotations

from llvmlite import ir

from ...ir.core import Operation
from ...ir.expr import Dim, product
from .intrinsics import declare
from .scalars import ScalarEmitter
from .values import I32, I64, PTR, stack_slot

__all__ = ["SERIAL_NANOSECONDS", "emit_launcher", "estimated_nanoseconds"]

SERIAL_NANOSECONDS = 20_000
"""Launches estimated shorter than this run on the calling thread."""

CHUNKS = 8
BYTES_PER_NANOSECOND = 10
DOT_FLOPS_PER_NANOSECOND = 40
FLOPS_PER_NANOSECOND = 8
UNKNOWN_PROGRAM_NANOSECONDS = 500


def estimated_nanoseconds(kernel: Operation) -> Dim:
    """Rough single-thread time of a launch, from the kernel's own figures; may be symbolic."""
    flops, moved = kernel["flops"], kernel["bytes"]
    if isinstance(flops, int) and isinstance(moved, int) and not flops and not moved:
        return product(kernel["grid"]) * UNKNOWN_PROGRAM_NANOSECONDS
    has_dot = any(op.name == "tile.dot" for op in kernel.walk())
    return flops // (DOT_FLOPS_PER_NANOSECOND if has_dot else FLOPS_PER_NANOSECOND) + moved // BYTES_PER_NANOSECOND


def emit_launcher(module: ir.Module, kernel: Operation, function: ir.Function) -> ir.Function:
    """The function that runs all programs of `kernel`, whose code is `function`."""
    symbols = kernel["symbols"]
    buffers = len(kernel.body.args)
    types = [PTR] * buffers + [I64] * len(symbols) + [PTR]
    launcher = ir.Function(module, ir.FunctionType(ir.VoidType(), types), module.get_unique_name(f"launch.{kernel['sym_name']}"))
    launcher.linkage = "internal"
    launcher.attributes.add("nounwind")
    b = ir.IRBuilder(launcher.append_basic_block("entry"))
    scalars = ScalarEmitter(b, _no_opaque)
    sizes = dict(zip(symbols, launcher.args[buffers:]))
    grid = product(kernel["grid"])
    estimate = estimated_nanoseconds(kernel)
    never = (isinstance(grid, int) and grid <= 1) or (isinstance(estimate, int) and estimate < SERIAL_NANOSECONDS)
    with scalars.scope(sizes, "launch"):
        total = scalars.emit(grid)
        serial = b.append_basic_block("serial")
        if never:
            b.branch(serial)
        else:
            _emit_parallel(b, scalars, launcher, function, total, estimate, serial)
        b.position_at_end(serial)
        b.call(function, [*launcher.args[:-1], I64(0), total, launcher.args[-1]])
        b.ret_void()
    return launcher


def _no_opaque(symbol: str) -> ir.Value:
    raise KeyError(f"the size symbol '{symbol}' is not an argument of the launch")


def _emit_parallel(b: ir.IRBuilder, scalars: ScalarEmitter, launcher: ir.Function, function: ir.Function, total: ir.Value,
                   estimate: Dim, serial: ir.Block) -> None:
    module = b.module
    ask, parallel = b.append_basic_block("ask"), b.append_basic_block("parallel")
    worth = b.icmp_signed(">=", scalars.emit(estimate), I64(SERIAL_NANOSECONDS))
    b.cbranch(b.and_(worth, b.icmp_signed(">", total, I64(1))), ask, serial)
    b.position_at_end(ask)
    threads = b.call(declare(module, "omp_get_max_threads", I32, []), [])
    nested = b.call(declare(module, "omp_in_parallel", I32, []), [])
    b.cbranch(b.and_(b.icmp_signed(">", threads, I32(1)), b.icmp_signed("==", nested, I32(0))), parallel, serial)
    b.position_at_end(parallel)
    shared = ir.LiteralStructType([*(a.type for a in launcher.args), I64, I64, I64])  # arguments, counter, chunk, total
    n = len(launcher.args)
    data = stack_slot(b, shared)
    chunk = b.sdiv(total, b.mul(b.sext(threads, I64), I64(CHUNKS)))
    chunk = b.select(b.icmp_signed("<", chunk, I64(1)), I64(1), chunk)
    for i, v in enumerate([*launcher.args, I64(0), chunk, total]):
        b.store(v, b.gep(data, [I32(0), I32(i)], source_etype=shared))
    body = _emit_body(module, launcher.name, function, shared, n)
    gomp = declare(module, "GOMP_parallel", ir.VoidType(), [PTR, PTR, I32, I32])
    b.call(gomp, [body, data, I32(0), I32(0)])
    b.ret_void()


def _emit_body(module: ir.Module, name: str, function: ir.Function, shared: ir.LiteralStructType, n: int) -> ir.Function:
    """What each thread runs: chunks of programs until there are none left."""
    f = ir.Function(module, ir.FunctionType(ir.VoidType(), [PTR]), f"{name}.thread")
    f.linkage = "internal"
    f.attributes.add("nounwind")
    entry, loop, work, done = (f.append_basic_block(x) for x in ("entry", "loop", "work", "done"))
    b = ir.IRBuilder(entry)

    def field(i: int) -> ir.Value:
        return b.gep(f.args[0], [I32(0), I32(i)], source_etype=shared)

    args = [b.load(field(i), typ=shared.elements[i]) for i in range(n)]
    counter = field(n)
    chunk, total = b.load(field(n + 1), typ=I64), b.load(field(n + 2), typ=I64)
    b.branch(loop)
    b.position_at_end(loop)
    begin = b.atomic_rmw("add", counter, chunk, "monotonic")
    b.cbranch(b.icmp_signed("<", begin, total), work, done)
    b.position_at_end(work)
    end = b.add(begin, chunk)
    end = b.select(b.icmp_signed("<", end, total), end, total)
    b.call(function, [*args[:-1], begin, end, args[-1]])
    b.branch(loop)
    ir.IRBuilder(done).ret_void()
    return f
