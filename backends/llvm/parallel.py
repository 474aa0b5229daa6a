"""One call of a host function by several threads, and its launches: each serially, or shared by them.

An exported function whose launches are worth several threads runs its steps in a region (`runtime/team.py`): `aicc_region` calls them with a team.
`context`, the last argument of all functions here, points to the error word (i32) and the number of threads (i32); with more than one it is a team,
which `aicc_launch` takes. For a kernel `kernel.K` there is `launch.K(ptr buffer..., i64 symbol..., ptr context)` and the outlined body that every
thread runs: it takes chunks of programs from an atomic counter, about `CHUNKS` each, so that a slow core does not hold up the others.

Small launches stay serial: the other threads have to hear of a launch, and to fetch its data. Several that do not depend on each other may be one
(`emit_side_by_side`): threads take their pieces, runs of a launch's programs, from a counter, the longest first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from llvmlite import ir

from ...ir.core import Operation
from ...ir.expr import Dim, product
from ...ir.launch_cost import SERIAL_NANOSECONDS, estimated_nanoseconds
from .intrinsics import declare
from .scalars import ScalarEmitter
from .values import I32, I64, PTR, stack_slot

__all__ = ["Piece", "emit_call", "emit_launcher", "emit_side_by_side", "shareable"]

CONTEXT = ir.LiteralStructType([I32, I32])
"""The error word and the number of threads."""
MEMORY = ir.ArrayType(I64, 3)
"""What calls of a function remember of its threads (`runtime/team.py`)."""
CHUNKS = 8
CHUNK_NANOSECONDS = 1_000
"""Least time of a chunk."""
PIECE_NANOSECONDS = 2_000
"""Least time of a piece of a small launch."""


def _field(b: ir.IRBuilder, context: ir.Value, n: int) -> ir.Value:
    return b.gep(context, [I32(0), I32(n)], source_etype=CONTEXT)


def _serial_context(b: ir.IRBuilder) -> ir.Value:
    """A context of one thread, without an error yet."""
    context = stack_slot(b, CONTEXT)
    b.store(ir.Constant(CONTEXT, [0, 1]), context)
    return context


def emit_call(b: ir.IRBuilder, steps: ir.Function, table: ir.Value, symbols: ir.Value, work: ir.Value | None) -> None:
    """Runs `steps(table, symbols, context)` and returns the error word: in a region if `work`, the nanoseconds of what threads can share, is worth
    one, several threads are allowed, and this is not in a region of somebody else's."""
    module = b.module
    if work is not None:
        ask, together, alone = (b.append_basic_block(name) for name in ("ask", "together", "alone"))
        b.cbranch(b.icmp_signed(">=", work, I64(SERIAL_NANOSECONDS)), ask, alone)
        b.position_at_end(ask)
        threads = b.call(declare(module, "omp_get_max_threads", I32, []), [])
        nested = b.call(declare(module, "omp_in_parallel", I32, []), [])
        b.cbranch(b.and_(b.icmp_signed(">", threads, I32(1)), b.icmp_signed("==", nested, I32(0))), together, alone)
        b.position_at_end(together)
        memory = ir.GlobalVariable(module, MEMORY, module.get_unique_name(f"memory.{steps.name}"))
        memory.linkage, memory.initializer = "internal", ir.Constant(MEMORY, None)
        b.ret(b.call(declare(module, "aicc_region", I32, [PTR, PTR, PTR, I32, PTR]), [steps, table, symbols, threads, memory]))
        b.position_at_end(alone)
    context = _serial_context(b)
    b.call(steps, [table, symbols, context])
    b.ret(b.load(context, typ=I32))


def shareable(kernel: Operation) -> Dim:
    """Nanoseconds of a launch that several threads may share; 0 of one that is always serial."""
    estimate = estimated_nanoseconds(kernel)
    grid = product(kernel["grid"])
    never = (isinstance(grid, int) and grid <= 1) or (isinstance(estimate, int) and estimate < SERIAL_NANOSECONDS)
    return 0 if never else estimate


def emit_launcher(module: ir.Module, kernel: Operation, function: ir.Function) -> ir.Function:
    """The function that runs all programs of `kernel`, whose code is `function`."""
    symbols = kernel["symbols"]
    buffers = len(kernel.body.args)
    types = [PTR] * buffers + [I64] * len(symbols) + [PTR]
    launcher = ir.Function(module, ir.FunctionType(ir.VoidType(), types), f"launch{function.name.removeprefix('kernel')}")
    launcher.linkage = "internal"
    launcher.attributes.add("nounwind")
    b = ir.IRBuilder(launcher.append_basic_block("entry"))
    scalars = ScalarEmitter(b, _no_opaque)
    sizes = dict(zip(symbols, launcher.args[buffers:]))
    grid = product(kernel["grid"])
    estimate = shareable(kernel)
    with scalars.scope(sizes, "launch"):
        total = scalars.emit(grid)
        serial = b.append_basic_block("serial")
        if estimate == 0:
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
    module, context = b.module, launcher.args[-1]
    parallel = b.append_basic_block("parallel")
    nanoseconds = scalars.emit(estimate)
    threads = b.load(_field(b, context, 1), typ=I32)
    worth = b.and_(b.icmp_signed(">=", nanoseconds, I64(SERIAL_NANOSECONDS)), b.icmp_signed(">", threads, I32(1)))
    b.cbranch(b.and_(worth, b.icmp_signed(">", total, I64(1))), parallel, serial)
    b.position_at_end(parallel)
    shared = ir.LiteralStructType([*(a.type for a in launcher.args), I64, I64, I64, PTR])  # arguments, chunk, total, threads, counters
    data = stack_slot(b, shared)
    count = b.sext(threads, I64)
    counters = b.alloca(I64, size=count)
    counters.type = PTR
    most = b.sdiv(nanoseconds, I64(CHUNK_NANOSECONDS))
    chunks = b.mul(count, I64(CHUNKS))
    chunk = b.sdiv(total, b.select(b.icmp_signed("<", chunks, most), chunks, most))
    chunk = b.select(b.icmp_signed("<", chunk, I64(1)), I64(1), chunk)
    for i, v in enumerate([*launcher.args, chunk, total, count, counters]):
        b.store(v, b.gep(data, [I32(0), I32(i)], source_etype=shared))
    with _counted(b, count) as t:
        b.store(_share(b, t, total, count), b.gep(counters, [t], source_etype=I64))
    _emit_launch(b, context, _emit_body(module, launcher.name, function, shared), data)
    b.ret_void()


def _share(b: ir.IRBuilder, thread: ir.Value, total: ir.Value, threads: ir.Value) -> ir.Value:
    """The first program of a thread's share."""
    return b.sdiv(b.mul(total, thread), threads)


@contextmanager
def _counted(b: ir.IRBuilder, count: ir.Value) -> Iterator[ir.Value]:
    """A loop over 0 <= i < count, at least once; the builder is after it then."""
    before = b.block
    loop, after = b.append_basic_block("each"), b.append_basic_block("after")
    b.branch(loop)
    b.position_at_end(loop)
    i = b.phi(I64)
    i.add_incoming(I64(0), before)
    yield i
    following = b.add(i, I64(1))
    i.add_incoming(following, b.block)
    b.cbranch(b.icmp_signed("<", following, count), loop, after)
    b.position_at_end(after)


def _emit_launch(b: ir.IRBuilder, context: ir.Value, body: ir.Function, data: ir.Value) -> None:
    b.call(declare(b.module, "aicc_launch", ir.VoidType(), [PTR, PTR, PTR]), [context, body, data])


def _emit_body(module: ir.Module, name: str, function: ir.Function, shared: ir.LiteralStructType) -> ir.Function:
    """What each thread runs: chunks of the programs of its own share until there are none left, then of the others'."""
    f = ir.Function(module, ir.FunctionType(ir.VoidType(), [PTR, I32]), f"{name}.thread")
    f.linkage = "internal"
    f.attributes.add("nounwind")
    b = ir.IRBuilder(f.append_basic_block("entry"))
    fields = [b.gep(f.args[0], [I32(0), I32(i)], source_etype=shared) for i in range(len(shared.elements))]
    *args, chunk, total, threads, counters = (b.load(field, typ=t) for field, t in zip(fields, shared.elements, strict=True))
    me = b.sext(f.args[1], I64)
    with _counted(b, threads) as k:
        whose = b.srem(b.add(me, k), threads)
        counter = b.gep(counters, [whose], source_etype=I64)
        last = _share(b, b.add(whose, I64(1)), total, threads)
        take, work, none = (b.append_basic_block(x) for x in ("take", "work", "none"))
        b.branch(take)
        b.position_at_end(take)
        begin = b.atomic_rmw("add", counter, chunk, "monotonic")
        b.cbranch(b.icmp_signed("<", begin, last), work, none)
        b.position_at_end(work)
        end = b.add(begin, chunk)
        end = b.select(b.icmp_signed("<", end, last), end, last)
        b.call(function, [*args[:-1], begin, end, args[-1]])
        b.branch(take)
        b.position_at_end(none)
    b.ret_void()
    return f


@dataclass(frozen=True)
class Piece:
    """A launch or loop among several side by side: `function(table, symbols, first program, end, context)`.

    `programs` and `nanoseconds` are its size (a loop is one program); `inside`: its own launches are long enough to be split.
    """

    function: ir.Function
    programs: int
    nanoseconds: int
    inside: bool = False


def emit_side_by_side(b: ir.IRBuilder, pieces: Sequence[Piece], table: ir.Value, symbols: ir.Value, context: ir.Value) -> None:
    """Runs all pieces, by all threads; one after the other where there is one thread.

    Loops whose launches are long leave more threads idle than there are loops: with more than two threads each, they run one by one.
    """
    module = b.module
    threads = b.load(_field(b, context, 1), typ=I32)
    worth = b.icmp_signed(">", threads, I32(1))
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
    shared = ir.LiteralStructType([PTR, PTR, PTR, I64])  # table, symbols, context, counter
    data = stack_slot(b, shared)
    for i, v in enumerate([table, symbols, context, I64(0)]):
        b.store(v, b.gep(data, [I32(0), I32(i)], source_etype=shared))
    body = _emit_pieces(module, f"{pieces[0].function.name}.thread", _runs(pieces), shared)
    _emit_launch(b, context, body, data)
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
    """What each thread does: runs, by their number in the list, until there are none left. What they launch themselves is serial."""
    f = ir.Function(module, ir.FunctionType(ir.VoidType(), [PTR, I32]), name)
    f.linkage = "internal"
    f.attributes.add("nounwind")
    entry, take, done, failed, end = (f.append_basic_block(x) for x in ("entry", "take", "done", "failed", "end"))
    b = ir.IRBuilder(entry)
    own = _serial_context(b)
    table, symbols, context = (b.load(b.gep(f.args[0], [I32(0), I32(i)], source_etype=shared), typ=PTR) for i in range(3))
    counter = b.gep(f.args[0], [I32(0), I32(3)], source_etype=shared)
    b.branch(take)
    b.position_at_end(take)
    switch = b.switch(b.atomic_rmw("add", counter, I64(1), "monotonic"), done)
    for i, (piece, first, end_) in enumerate(runs):
        block = f.append_basic_block(f"run{i}")
        switch.add_case(I64(i), block)
        b.position_at_end(block)
        b.call(piece.function, [table, symbols, I64(first), I64(end_), own])
        b.branch(take)
    b.position_at_end(done)
    error = b.load(own, typ=I32)
    b.cbranch(b.icmp_signed("!=", error, I32(0)), failed, end)
    b.position_at_end(failed)
    b.store(error, context)
    b.branch(end)
    ir.IRBuilder(end).ret_void()
    return f
