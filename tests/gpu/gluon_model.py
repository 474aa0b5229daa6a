"""What the Gluon text of `backends/triton/warp_groups.py`, `early_weights.py` and `few_rows.py` means, on CPU tensors: each partition is a thread.

    run_gluon(source, buffers)            # a KernelSource, flat tensors
    run_gluon(source, buffers, {1})       # the kernel in front writes all but buffer 1, and ends while this one waits for it
    interpret(module, args, handlers={"tile.launch": launcher(source_of, taken)})     # those of a module's kernels that `source_of` gives a text

The model is hostile where the hardware may be. A tile that the copy engine is asked for is overwritten at once; an asynchronous product reads its
operands as late as it is allowed to, when a group waits for it. So a barrier that is missing, or waits for the wrong phase, gives wrong
numbers; one that is never passed is an error after a while. Layouts are not modelled: the compiler checks them.

It also looks for races, which it finds in whatever order the threads happen to run, for it does not look at times. Each copy into a tile and each
product that reads one is an event. A thread knows of the events that happened before what it does: its own products once it has waited for them, and
what barriers tell it of what others knew when they arrived, and of the copies that they count. A tile may be read by who knows of the copy that filled
it, and filled by who knows of that copy and of all products that have read it since. (compute-sanitizer's racecheck does not see such reads and
writes: NOTES.md.)
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from aicc.backends.triton.printer import KernelSource
from aicc.ir import Operation
from aicc.ir.interpreter.memory import Memory, extent
from aicc.ir.interpreter.tile import HANDLERS
from torch import Tensor

__all__ = ["launcher", "run_gluon"]

PATIENCE = 20.0
"""Seconds after which a barrier counts as never passed."""
BYTES = {torch.bfloat16: 2, torch.float16: 2}


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes have come. `known`: what was known when the last one ended."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = self.pending = self.bytes = self.phase = self.told = self.known = 0

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def update(self, arrivals: int, bytes_: int, known: int) -> None:
        with self.changed:
            self.pending -= arrivals
            self.bytes += bytes_
            self.told |= known
            assert self.pending >= 0, "more arrivals than the barrier was made for"
            if self.pending == 0 and self.bytes == 0:
                self.pending, self.phase = self.count, self.phase + 1
                self.known, self.told = self.told, 0
                self.changed.notify_all()

    def wait(self, parity: int) -> int:
        """What is known behind it."""
        with self.changed:
            if not self.changed.wait_for(lambda: (self.phase & 1) != int(parity), PATIENCE):
                raise RuntimeError("a barrier is never passed")
            return self.known


class Rows:
    """An array of tiles, or of barriers."""

    def __init__(self, items: list[Any]):
        self.items = items

    def index(self, i: Any) -> Any:
        return self.items[int(i)]


@dataclass
class History:
    """Of a tile: the copy that filled it, and the products that have read it since, as sets of events (bits)."""

    filled: int = 0
    read: int = 0


class Tile:
    """A tile in shared memory, perhaps seen transposed."""

    def __init__(self, memory: Tensor, turned: bool = False, history: History | None = None):
        self.memory, self.turned, self.history = memory, turned, history or History()

    def permute(self, order: tuple[int, int]) -> Tile:
        assert order == (1, 0)
        return Tile(self.memory, not self.turned, self.history)

    def slice(self, start: int, length: int, dim: int = 0) -> Tile:
        return Tile(self.memory.narrow(dim, start, length), self.turned, self.history)

    def store(self, value: Tensor) -> None:
        self.memory.copy_(value)

    def load(self, layout: Any) -> Tensor:
        return self.memory.clone()

    def read(self) -> Tensor:
        return (self.memory.T if self.turned else self.memory).double()


class Gate:
    """Whether the kernel in front has ended."""

    def __init__(self, open_: bool):
        self.open = open_


class Matrix:
    """What a tensor map describes."""

    def __init__(self, memory: Tensor, made: Any, made_by: Gate):
        self.made_by = made_by
        flat = torch.zeros(made.rows * made.stride, dtype=memory.dtype)
        flat[:memory.numel()] = memory[:flat.numel()]
        self.values, self.block = flat.view(made.rows, made.stride)[:, :made.columns], made.block
        self.dtype, self.layout = memory.dtype, made.layout

    def tile(self, row: int, column: int) -> Tensor:
        out = torch.zeros(self.block, dtype=self.dtype)
        assert row >= 0 and column >= 0
        if not self.made_by.open:
            return torch.full(self.block, math.nan, dtype=self.dtype)
        part = self.values[row:row + self.block[0], column:column + self.block[1]]
        out[:part.shape[0], :part.shape[1]] = part
        return out


class Pending:
    """A product that has been started; `finish` reads the operands."""

    def __init__(self, finish: Callable[[], Tensor], event: int):
        self.finish, self.event, self.value = finish, event, None

    def done(self) -> Tensor:
        if self.value is None:
            self.value = self.finish()
        return self.value


class Pointer:
    def __init__(self, memory: Tensor, at: Any = 0):
        self.memory, self.at = memory, at

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, self.at + more)


class Partition(threading.local):
    """What a thread has started and not waited for, and the events that it knows of."""

    def __init__(self) -> None:
        self.started: list[Pending] = []
        self.known = 0

    def learn(self, events: int) -> None:
        self.known |= events


def run_gluon(source: KernelSource, buffers: Sequence[Tensor], settled: Collection[int] | None = None) -> None:
    """Runs the persistent programs one after the other; outputs are written to `buffers`."""
    for program in range(source.programs):
        gate = Gate(settled is None)
        maps = [Matrix(buffers[m.buffer], m, Gate(True) if settled is None or m.buffer in settled else gate) for m in source.descriptors]
        scope = _language(program, source.programs, gate)
        text = source.text[source.text.index("@gluon.jit"):]
        exec(compile(text, source.name, "exec"), scope)
        scope[source.name](*[Pointer(b) for b in buffers], *maps)


def launcher(source_of: Callable[[Operation], KernelSource | str], taken: list[KernelSource],
             settled: Callable[[Operation], Collection[int]] | None = None) -> Callable[..., list[Tensor]]:
    """How the interpreter is to launch a kernel: as the text that `source_of` makes of it, which is added to `taken`, or where that is the reason why
    there is none, as tile IR. settled: the buffers of a kernel that the one in front does not write."""
    def launch(ctx: Any, op: Operation, xs: list[Tensor]) -> list[Tensor]:
        kernel = ctx.kernels[op["kernel"].name]
        source = source_of(kernel)
        if isinstance(source, str):
            return HANDLERS["tile.launch"](ctx, op, xs)
        taken.append(source)
        types = [v.type for v in (*op.operands, *op.results)]
        layouts = [(ctx.shape(t), ctx.dims(t.layout)) for t in types]
        memories = [Memory.holding(x, strides) for x, (_, strides) in zip(xs, layouts, strict=False)]
        memories += [Memory.fresh(extent(*layouts[i]), ctx.dtype(types[i])) for i in range(len(xs), len(types))]
        run_gluon(source, [m.flat for m in memories], None if settled is None else settled(kernel))
        return [m.tensor(*layout) for m, layout in zip(memories[len(xs):], layouts[len(xs):], strict=True)]

    return launch


def _language(program: int, programs: int, gate: Gate) -> dict[str, Any]:
    """The names that a kernel's text uses."""
    own = Partition()
    failures: list[BaseException] = []
    numbers = itertools.count()

    def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
        assert gate.open, "memory is read before the kernel in front has ended"
        at = torch.as_tensor(pointer.at)
        if mask is None:
            return pointer.memory[at.long()]
        at, mask = torch.broadcast_tensors(at, mask)
        return torch.where(mask, pointer.memory[torch.where(mask, at, 0).long()], other)

    def store(pointer: Pointer, value: Tensor, mask: Any = None) -> None:
        assert gate.open, "memory is written before the kernel in front has ended"
        at, value, mask = torch.broadcast_tensors(torch.as_tensor(pointer.at), value, torch.as_tensor(True if mask is None else mask))
        pointer.memory[at[mask].long()] = value[mask]

    def allocate(dtype: Any, shape: Sequence[int], layout: Any) -> Any:
        if layout == "barrier":
            made = [Barrier() for _ in range(shape[0])]
            return Rows(made) if len(shape) == 2 else made[0]
        if layout is None:
            return Tile(torch.full(tuple(shape), math.nan, dtype=dtype))
        return Rows([Tile(torch.full(tuple(shape[1:]), math.nan, dtype=dtype)) for _ in range(shape[0])])

    def tma_load(matrix: Matrix, place: Sequence[Any], barrier: Barrier, tile: Tile) -> None:
        event, history = 1 << next(numbers), tile.history
        assert not (history.filled | history.read) & ~own.known, "a tile is overwritten that may still be read, or be under way"
        history.filled, history.read = event, 0
        tile.memory.copy_(matrix.tile(*map(int, place)))
        barrier.update(0, -tile.memory.numel() * BYTES[matrix.dtype], event)

    def mma(a: Any, b: Tile, acc: Any, use_acc: bool = True, is_async: bool = False) -> Pending:
        assert is_async and (not isinstance(acc, Pending) or acc in own.started), "the accumulator has not been waited for"
        event = 1 << next(numbers)
        for tile in (a, b):
            if isinstance(tile, Tile):
                assert tile.history.filled & own.known, "a tile is read that may not have come"
                tile.history.read |= event

        def product() -> Tensor:
            before = (acc.done() if isinstance(acc, Pending) else acc).double() if use_acc else 0
            return (before + (a.read() if isinstance(a, Tile) else a.double()) @ b.read()).float()
        made = Pending(product, event)
        own.started.append(made)
        return made

    def mma_wait(outstanding: int, deps: Sequence[Pending | Tensor]) -> Any:
        while len(own.started) > outstanding:
            ended = own.started.pop(0)
            ended.done()
            own.learn(ended.event)
        # What is still under way can only be added to by another product.
        ready = tuple(dep.done() if isinstance(dep, Pending) and dep not in own.started else dep for dep in deps)
        return ready if len(ready) > 1 else ready[0]

    def specialise(parts: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], warps: Sequence[int], registers: Sequence[int]) -> None:
        def body(f: Callable[..., None], args: tuple[Any, ...]) -> None:
            try:
                f(*args)
                assert not own.started, "a product is not waited for"
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=body, args=part, daemon=True) for part in parts]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        if failures:
            raise failures[0]

    def number(x: Any) -> Tensor:
        return torch.as_tensor(x)

    turns = {number: threading.Semaphore(0) for number in ("8", "9")}
    told = dict.fromkeys(turns, 0)

    def assembly(text: str, constraints: str, args: Sequence[Tensor], **_: Any) -> Tensor:
        if text.startswith("bar."):  # a named barrier of two groups, one of which only arrives
            what, number = text.partition(",")[0].split(" ")
            if what == "bar.arrive":
                told[number] = own.known
                turns[number].release()
            elif not turns[number].acquire(timeout=PATIENCE):
                raise RuntimeError("a turn is never given")
            own.learn(told[number])
            return args[0]
        if text.startswith("griddepcontrol."):
            assert "memory" in constraints, "reads may be moved across"
            gate.open = gate.open or "wait" in text
            return args[0]
        if text.startswith("mov."):
            return args[0]
        return {"tanh": torch.tanh, "ex2": torch.exp2, "lg2": torch.log2}[text.partition(".")[0]](args[0])

    gl = SimpleNamespace(
        program_id=lambda axis: torch.tensor(program, dtype=torch.int32), num_programs=lambda axis: programs, constexpr=lambda x: x,
        NVMMADistributedLayout=lambda *a: None, DotOperandLayout=lambda *a: None, BlockedLayout=lambda *a: None, SwizzledSharedLayout=lambda *a: None, SliceLayout=lambda *a: None,
        arange=lambda a, b, layout: torch.arange(a, b, dtype=torch.int32), zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        full=lambda shape, value, dtype, layout: torch.full(shape, float(value)).to(dtype), cast=lambda x, dtype: number(x).to(dtype),
        where=lambda c, a, b: torch.where(number(c), number(a), number(b)), exp2=torch.exp2, abs=torch.abs, floor=torch.floor, ceil=torch.ceil, div_rn=torch.div, sqrt_rn=torch.sqrt,
        maximum=lambda a, b, propagate_nan=None: torch.maximum(number(a), number(b)),
        minimum=lambda a, b, propagate_nan=None: torch.minimum(number(a), number(b)),
        sum=lambda x, axis, keep_dims: x.sum(axis, keepdim=keep_dims), reduce=lambda x, axis, f, keep_dims: REDUCE[f.__name__](x, axis),
        convert_layout=lambda x, layout: x, load=load, store=store, allocate_shared_memory=allocate, warp_specialize=specialise,
        inline_asm_elementwise=assembly, static_range=range, bfloat16=torch.bfloat16, float16=torch.float16, int32=torch.int32, int64=torch.int64, float32=torch.float32)
    tl = SimpleNamespace(float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16, int32=torch.int32, int64=torch.int64, int1=torch.bool,
                         PropagateNan=SimpleNamespace(ALL=None))
    mbarrier = SimpleNamespace(MBarrierLayout=lambda: "barrier", init=lambda b, count: b.init(count), wait=lambda b, phase: own.learn(b.wait(phase)),
                               expect=lambda b, n: b.update(1, n, own.known), arrive=lambda b, count: b.update(count, 0, own.known))
    return {"gluon": SimpleNamespace(jit=lambda f: f), "gl": gl, "tl": tl, "mbarrier": mbarrier, "tma_load": tma_load, "warpgroup_mma": mma,
            "warpgroup_mma_wait": mma_wait, "fence_async_shared": lambda: None}


REDUCE: dict[str, Callable[[Tensor, int], Tensor]] = {
    "max_nan32": lambda x, axis: x.amax(axis, keepdim=True), "min_nan32": lambda x, axis: x.amin(axis, keepdim=True)}
