"""Launching a kernel over its grid: serially, or by several threads.

For a kernel `kernel.K` this adds `launch.K(ptr buffer..., i64 symbol..., ptr context)` and the outlined body that
OpenMP's `GOMP_parallel` runs on every thread of torch's pool, or the runtime's `aicc_parallel` (`runtime/pool.py`) on every thread that comes.
Threads take chunks of programs from an atomic counter, about `CHUNKS` each, so that a slow core does not hold up the others. A team always has
the full number of threads: both end the threads that a smaller team leaves out and would have to start them again.

Small launches stay serial: a parallel region costs some microseconds. Several that do not depend on each other may share one
(`emit_side_by_side`): threads take their pieces, runs of a launch's programs, from a counter, the longest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llvmlite import ir

from ...ir.core import Operation
from ...ir.expr import Dim, product
from ...ir.launch_cost import SERIAL_NANOSECONDS, estimated_nanoseconds
from .intrinsics import declare
from .scalars import ScalarEmitter
from .values import I32, I64, PTR, stack_slot

__all__ = ["OPENMP", "OWN", "Piece", "emit_launcher", "emit_side_by_side"]

OWN, OPENMP = "aicc_parallel", "GOMP_parallel"
"""Functions that run a region, `(body, its data, threads, 0)`: the runtime's, and OpenMP's."""
CHUNKS = 8
PIECE_NANOSECONDS = 2_000
"""Least time of a piece of a small launch."""


def emit_launcher(module: ir.Module, kernel: Operation, function: ir.Function, region: str = OPENMP) -> ir.Function:
    """The function that runs all programs of `kernel`, whose code is `function`; `region` names what runs it on several threads."""
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
            _emit_parallel(b, scalars, launcher, function, total, estimate, serial, region)
        b.position_at_end(serial)
        b.call(function, [*launcher.args[:-1], I64(0), total, launcher.args[-1]])
        b.ret_void()
    return launcher


def _no_opaque(symbol: str) -> ir.Value:
    raise KeyError(f"the size symbol '{symbol}' is not an argument of the launch")


def _emit_parallel(b: ir.IRBuilder, scalars: ScalarEmitter, launcher: ir.Function, function: ir.Function, total: ir.Value,
                   estimate: Dim, serial: ir.Block, region: str) -> None:
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
    b.call(declare(module, region, ir.VoidType(), [PTR, PTR, I32, I32]), [body, data, threads, I32(0)])
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


@dataclass(frozen=True)
class Piece:
    """A launch or loop among several side by side: `function(table, symbols, first program, end, error word)`.

    `programs` and `nanoseconds` are its size (a loop is one program); `inside`: its own launches are long enough to be split.
    """

    function: ir.Function
    programs: int
    nanoseconds: int
    inside: bool = False


def emit_side_by_side(b: ir.IRBuilder, pieces: Sequence[Piece], table: ir.Value, symbols: ir.Value, context: ir.Value, region: str = OPENMP) -> None:
    """Runs all pieces, by all threads; one after the other where there is one thread, or where this is inside a parallel region.

    Loops whose launches are long leave more threads idle than there are loops: with more than two threads each, they run one by one.
    """
    module = b.module
    threads = b.call(declare(module, "omp_get_max_threads", I32, []), [])
    nested = b.call(declare(module, "omp_in_parallel", I32, []), [])
    worth = b.and_(b.icmp_signed(">", threads, I32(1)), b.icmp_signed("==", nested, I32(0)))
    loops = sum(p.inside for p in pieces)
    if loops:
        worth = b.and_(worth, b.icmp_signed("<=", threads, I32(2 * loops)))
    together, apart, after = (b.append_basic_block(name) for name in ("together", "apart", "after"))
    b.cbranch(worth, together, apart)
    b.position_at_end(apart)
    for p in pieces:
        b.call(p.function, [table, symbols, I64(0), I64(p.programs), context])
    b.branch(after)
    b.position_at_end(together)
    shared = ir.LiteralStructType([PTR, PTR, PTR, I64])  # table, symbols, error word, counter
    data = stack_slot(b, shared)
    for i, v in enumerate([table, symbols, context, I64(0)]):
        b.store(v, b.gep(data, [I32(0), I32(i)], source_etype=shared))
    body = _emit_pieces(module, f"{pieces[0].function.name}.thread", _runs(pieces), shared)
    b.call(declare(module, region, ir.VoidType(), [PTR, PTR, I32, I32]), [body, data, threads, I32(0)])
    b.branch(after)
    b.position_at_end(after)


def _runs(pieces: Sequence[Piece]) -> list[tuple[Piece, int, int]]:
    """(piece, first program, end), the longest first: none longer than an eighth of all, if its programs allow that."""
    most = max(PIECE_NANOSECONDS, sum(p.nanoseconds for p in pieces if p.programs > 1) // CHUNKS)
    runs: list[tuple[int, int, Piece, int, int]] = []
    for i, p in enumerate(pieces):
        count = max(1, min(p.programs, -(-p.nanoseconds // most)))
        for k in range(count):
            first, end = k * p.programs // count, (k + 1) * p.programs // count
            runs.append((-(p.nanoseconds // count), i, p, first, end))
    runs.sort(key=lambda r: (r[0], r[1], r[3]))
    return [(p, first, end) for _, _, p, first, end in runs]


def _emit_pieces(module: ir.Module, name: str, runs: Sequence[tuple[Piece, int, int]], shared: ir.LiteralStructType) -> ir.Function:
    """What each thread does: runs, by their number in the list, until there are none left."""
    f = ir.Function(module, ir.FunctionType(ir.VoidType(), [PTR]), name)
    f.linkage = "internal"
    f.attributes.add("nounwind")
    entry, take, done = (f.append_basic_block(x) for x in ("entry", "take", "done"))
    b = ir.IRBuilder(entry)
    table, symbols, context = (b.load(b.gep(f.args[0], [I32(0), I32(i)], source_etype=shared), typ=PTR) for i in range(3))
    counter = b.gep(f.args[0], [I32(0), I32(3)], source_etype=shared)
    b.branch(take)
    b.position_at_end(take)
    switch = b.switch(b.atomic_rmw("add", counter, I64(1), "monotonic"), done)
    for i, (piece, first, end) in enumerate(runs):
        block = f.append_basic_block(f"run{i}")
        switch.add_case(I64(i), block)
        b.position_at_end(block)
        b.call(piece.function, [table, symbols, I64(first), I64(end), context])
        b.branch(take)
    ir.IRBuilder(done).ret_void()
    return f
