"""The host function of a GPU program, as machine code: what `runtime/cuda.py` loads and calls once per call of a graph.

    host = emit_native(program, kernels)      # kernels: rows with threads, shared memory, parameters (see `program_json`)
    host.object_code, host.llvm_ir

Each function of the program becomes

    i32 NAME(ptr table, ptr symbols, ptr stream, ptr plans, ptr side, i32 first, i32 end)

It evaluates addresses and grid sizes from the symbol values into cells on its own stack (so it may run in several threads at once) and runs
the steps from `first` up to `end`, which is no more than there are (a profiler asks for one at a time). The calls are `cuLaunchKernel`
(or `cuLaunchKernelEx`, where kernels may begin before the step in front of them has ended: they wait for it themselves),
`cuMemcpyDtoDAsync_v2`, `cublasLtMatmul` and, between streams, `cuEventRecord` and `cuStreamWaitEvent`. The order is data: a loop walks a
table of steps, so that thousands of launches compile as fast as one. The functions called are imported; what only the process knows (handles
of kernels, addresses of constants) is read from the exported global `STATE`, an array of 64-bit words:

    [address of the word for failed checks, context, kernels in the program's order..., constants...]

`side` is the address of two words, a stream and an event of this call alone, for programs with steps on a second stream (`host.wait`); 0: everything
goes to the one stream. Whatever the result, `stream` waits for the other one in the end.

A tensor map (`descriptors.py`) is encoded at the start of the call, on the function's stack, for the address that its buffer has then.

`plans` has one word per matrix product of the function: the address of a record with the fields `PLAN` (see `runtime/cublaslt.py`), or 0
where the product has no elements.

The result is 0, or
    1 .. 4094                  a check in a kernel of an earlier call failed (the word is cleared now);
    MISALIGNED                 an input does not start at a multiple of 16 bytes: nothing was launched;
    (step + 1) << 12 | result  step number `step` failed with this result of the driver, or with TOO_LARGE: its grid is too large;
                               a step after the last one stands for the calls that make the context current.
The context of the library is made current for the call; the thread gets its own back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llvmlite import binding, ir

from ...ir.core import IRError
from ...ir.expr import Dim, product, sym
from ..llvm.objects import emit_object, optimize, parse
from ..llvm.scalars import ScalarEmitter
from ..llvm.target import make_target
from ..llvm.values import I1, I32, I64, PTR, stack_slot
from .host import Copy, Launch, MatMul, Place, Program, Step, Wait

__all__ = ["MISALIGNED", "PLAN", "STATE", "TOO_LARGE", "NativeHost", "emit_native"]

STATE = "aicc_state"
MISALIGNED = TOO_LARGE = 4095
MAX_GRID = (1 << 31) - 1
STEP_BITS = 12
ERROR_WORD, CONTEXT, FIRST_KERNEL = 0, 1, 2
PLAN = ("handle", "descriptor", "a", "b", "c", "d", "algorithm", "alpha", "beta", "workspace_bytes")
DESCRIPTOR_BYTES = 1024
"""Room for cuBLASLt's own description of a product: it is copied to set the address of the bias in it."""
BIAS_POINTER = 8  # CUBLASLT_MATMUL_DESC_BIAS_POINTER
WORKSPACE_ALIGNMENT = 256
"""cuBLASLt refuses temporary memory that does not start at a multiple; `passes/library.py` asks for as much more."""
NULL = ir.Constant(PTR, None)

_IMPORTS = {
    "cuCtxGetCurrent": [PTR],
    "cuCtxSetCurrent": [PTR],
    "cuLaunchKernel": [PTR, *[I32] * 7, PTR, PTR, PTR],
    "cuLaunchKernelEx": [PTR, PTR, PTR, PTR],
    "cuMemcpyDtoDAsync_v2": [I64, I64, I64, PTR],
    "cuEventRecord": [PTR, PTR],
    "cuStreamWaitEvent": [PTR, PTR, I32],
    "cuTensorMapEncodeTiled": [PTR, I32, I32, PTR, PTR, PTR, PTR, PTR, I32, I32, I32, I32],
    "cublasLtMatmul": [*[PTR] * 14, I64, PTR],
    "cublasLtMatmulDescSetAttribute": [PTR, I32, PTR, I64],
}


@dataclass(frozen=True)
class Map:
    """A tensor map of the matrix at `place`: CUtensorMap, 128 bytes. `step` is the first launch that reads it."""

    place: Place
    type: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int
    step: int = field(compare=False, default=0)


Cell = Place | Dim | Map
"""A 64-bit word of the frame (16 words for a map): an address, or a number."""
MAP_WORDS = 16
MAP_ALIGNMENT = 8
"""In words: CUtensorMap wants 64 bytes."""
PROMOTION = 2  # CU_TENSOR_MAP_L2_PROMOTION_L2_128B
ERRORS = Place(-1, 0, constant=True)
"""Stands for the address of the word for failed checks."""
CONFIG_WORDS, STREAM_WORD, ATTRIBUTES_WORD, COUNT_WORD = 7, 4, 5, 6
"""CUlaunchConfig in 64-bit words: sizes of the grid and of a block and shared bytes (32 bits each), the stream, attributes, their number."""
ATTRIBUTE_WORDS = 9
PROGRAMMATIC = (6, 1)  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, allowed
LAUNCH, COPY, PRODUCT, WAIT = range(4)
STREAM = 1 << 8
"""Added to the kind of a step that runs on the second stream."""
ROW = 8
"""32-bit words of a row of the table of steps, the kind and:
    LAUNCH   kernel, threads, shared bytes, parameters, the first of them in the list of parameter cells, cell of the grid's size,
             1 if it may begin before the step in front of it has ended
    COPY     cells of target, source and bytes
    PRODUCT  cells of a, b, c, d, bias (or -1) and temporary memory, number of the plan
    WAIT     nothing: the stream waits for the other one
"""


@dataclass(frozen=True)
class NativeHost:
    """Machine code for any processor of this kind. `imports` are the functions that it calls."""

    object_code: bytes
    llvm_ir: str
    functions: tuple[str, ...]
    imports: tuple[str, ...]


def emit_native(program: Program, kernels: Mapping[str, Mapping[str, Any]]) -> NativeHost:
    """IRError if a kernel does not fit its launch, or its grid is too large whatever the sizes are."""
    target = make_target(binding.get_process_triple())
    module = ir.Module("aicc_host")
    state = ir.GlobalVariable(module, ir.ArrayType(I64, FIRST_KERNEL + len(kernels) + len(program.constants)), STATE)
    state.initializer, state.align = ir.Constant(state.value_type, None), 64
    emitter = _Emitter(module, state, program, kernels)
    for name in program.functions:
        emitter.function(name)
    parsed, text = parse(module, target)
    optimize(parsed, target)
    code = emit_object(parsed, target)
    return NativeHost(code, text, tuple(program.functions), tuple(sorted(emitter.imported)))


class _Emitter:
    """One module."""

    def __init__(self, module: ir.Module, state: ir.GlobalVariable, program: Program, kernels: Mapping[str, Mapping[str, Any]]):
        self.module, self.state, self.program, self.kernels = module, state, program, kernels
        self.numbers = {name: FIRST_KERNEL + i for i, name in enumerate(kernels)}
        self.imported: dict[str, ir.Function] = {}

    def imports(self, name: str) -> ir.Function:
        if name not in self.imported:
            self.imported[name] = ir.Function(self.module, ir.FunctionType(I32, _IMPORTS[name]), name)
        return self.imported[name]

    def copier(self) -> ir.Function:
        name = "llvm.memcpy.p0.p0.i64"
        return self.module.globals.get(name) or ir.Function(self.module, ir.FunctionType(ir.VoidType(), [PTR, PTR, I64, I1]), name)

    def table(self, name: str, type_: ir.IntType, numbers: Sequence[int]) -> ir.GlobalVariable:
        """Constant numbers."""
        t = ir.ArrayType(type_, max(1, len(numbers)))
        made = ir.GlobalVariable(self.module, t, name)
        made.linkage, made.global_constant, made.align = "internal", True, 16
        made.initializer = ir.Constant(t, list(numbers) or [0])
        return made

    def function(self, name: str) -> None:
        f = ir.Function(self.module, ir.FunctionType(I32, [PTR] * 5 + [I32] * 2), name)
        f.attributes.add("nounwind")
        program = self.program
        _Function(self, f, program.functions[name], program.symbols[name], program.inputs[name]).emit()


class _Function:
    """One native function."""

    def __init__(self, owner: _Emitter, f: ir.Function, steps: Sequence[Step], symbols: Sequence[str], inputs: Sequence[int]):
        self.owner, self.f, self.steps, self.symbols, self.inputs = owner, f, steps, symbols, inputs
        self.b = ir.IRBuilder(f.append_basic_block("entry"))
        self.scalars = ScalarEmitter(self.b, _unknown_symbol)
        self.cells: dict[Cell, int] = {}
        self.words = 0  # of the frame
        self.parameters: list[int] = []  # cells of the parameters of all launches
        self.rows: list[int] = []
        self.products = 0
        self.before_step: list[Step | None] = [None, None]
        for step in steps:
            row = self._row(step)
            self.rows += row + [0] * (ROW - len(row))
        self.early: list[tuple[ir.Value, ir.Block]] = []  # codes with which the function leaves before, and after, its context is current
        self.late: list[tuple[ir.Value, ir.Block]] = []

    # -- the table of steps

    def _cell(self, c: Cell) -> int:
        key = Place(c.slot, c.offset, c.constant) if isinstance(c, Place) else c
        if key not in self.cells:
            if isinstance(key, Map):
                self.words += -self.words % MAP_ALIGNMENT
            self.cells[key] = self.words
            self.words += MAP_WORDS if isinstance(key, Map) else 1
        return self.cells[key]

    def _described(self, step: Launch, row: Mapping[str, Any]) -> list[Cell]:
        """The parameters that describe tensor maps: each with its sizes and strides."""
        made: list[Cell] = []
        for d in row.get("descriptors", ()):
            place = step.buffers[d["buffer"]]
            self._cell(place)
            made += [Map(Place(place.slot, place.offset, place.constant), d["type"], tuple(d["sizes"]), tuple(d["strides"]), tuple(d["box"]),
                         d["swizzle"], self.steps.index(step)), *d["numbers"]]
        return made

    def _row(self, step: Step) -> list[int]:
        if isinstance(step, Wait):
            self.before_step[step.stream] = step
            return [WAIT + STREAM * step.stream]
        kind, *words = self._words(step)
        self.before_step[step.stream] = step
        return [kind + STREAM * step.stream, *words]

    def _words(self, step: Launch | Copy | MatMul) -> list[int]:
        if isinstance(step, Copy):
            return [COPY, self._cell(step.target), self._cell(step.source), self._cell(step.bytes)]
        if isinstance(step, Launch):
            return self._launch_row(step)
        bias = -1 if step.bias is None else self._cell(step.bias)
        operands = [self._cell(p) for p in (step.a, step.b, step.c or step.d, step.d)]
        self.products += 1
        return [PRODUCT, *operands, bias, self._cell(step.workspace), self.products - 1]

    def _launch_row(self, step: Launch) -> list[int]:
        """Parameters are the buffers, the size symbols, the word for failed checks, tensor maps, and null pointers for Triton's scratch memory."""
        row = self.owner.kernels[step.kernel]
        extent = row.get("programs") or product(self.owner.program.kernels[step.kernel]["grid"])
        if isinstance(extent, int) and extent > MAX_GRID:
            raise IRError(f"kernel '{step.kernel}' would need {extent} programs; the largest grid has {MAX_GRID}")
        cells: list[Cell] = [*step.buffers, *(sym(s) for s in row["symbols"]), *([ERRORS] if row["checks"] else []), *self._described(step, row)]
        cells += [0] * (row["parameters"] - len(cells))
        if len(cells) != row["parameters"]:
            raise IRError(f"kernel '{step.kernel}' takes {row['parameters']} parameters, not {len(cells)}")
        first = len(self.parameters)
        self.parameters += [self._cell(c) for c in cells]
        number, early = self.owner.numbers[step.kernel], self._may_begin(step, row)
        return [LAUNCH, number, row["threads"], row["shared"], len(cells), first, self._cell(extent), early]

    def _may_begin(self, step: Launch, row: Mapping[str, Any]) -> int:
        """Whether a launch may be programmatic: not the first of its stream after a wait for the other one; and where it reads weights before it
        waits, only behind one of our kernels, whose wait says that whatever wrote them has ended."""
        before = self.before_step[step.stream]
        return int(bool(row.get("dependent")) and (isinstance(before, Launch) if row.get("early") else not isinstance(before, Wait)))

    # -- the function

    def emit(self) -> None:
        b, f, owner = self.b, self.f, self.owner
        launches = [s for s in self.steps if isinstance(s, Launch)]
        rows = [owner.kernels[s.kernel] for s in launches]
        self.frame = stack_slot(b, ir.ArrayType(I64, max(1, self.words)), 8 * MAP_ALIGNMENT)
        self.params = stack_slot(b, ir.ArrayType(PTR, max([1, *(r["parameters"] for r in rows)])), 16)
        self.scratch = stack_slot(b, ir.ArrayType(I64, DESCRIPTOR_BYTES // 8 + 1), 16)
        self.programmatic = any(r.get("dependent") for r in rows)
        if self.programmatic:
            self._prepare_config()
        self.two = any(isinstance(s, Wait) for s in self.steps)
        self.streams = stack_slot(b, ir.ArrayType(PTR, 2), 16)
        b.store(f.args[2], self._at(self.streams, 0, PTR))
        self.done, self.restore = ir.Block(f, "done"), ir.Block(f, "restore")
        self.table = owner.table(f"{f.name}.steps", I32, self.rows)
        self.lists = owner.table(f"{f.name}.parameters", I32, self.parameters)
        if any(r["checks"] for r in rows):
            self._take_error()
        self._check_alignment()
        if self.two:
            b.store(f.args[2], self._at(self.streams, 1, PTR))
            self._if(self._has_side(), self._take_side)
        self.context = self._state(CONTEXT, PTR)
        self.before = self._enter()
        values = {s: self._load(f.args[1], i, I64) for i, s in enumerate(self.symbols)}
        with self.scalars.scope(values, "cells"):
            self._fill()
            self._loop(b.sub(f.args[6], f.args[5]), lambda i: self._step(b.add(f.args[5], i)))
            self._leave(I32(0))
        self._finish()

    def _prepare_config(self) -> None:
        """What all launches have in common."""
        b = self.b
        self.config = stack_slot(b, ir.ArrayType(I64, CONFIG_WORDS), 16)
        attribute = stack_slot(b, ir.ArrayType(I64, ATTRIBUTE_WORDS), 16)
        for i, word in enumerate(PROGRAMMATIC):
            b.store(I64(word), self._at(attribute, i, I64))
        for i in (1, 2, 4, 5):  # y and z of grid and block
            b.store(I32(1), self._at(self.config, i, I32))
        b.store(attribute, self._at(self.config, ATTRIBUTES_WORD, PTR))

    def _take_error(self) -> None:
        """Leaves with the word that kernels of earlier calls wrote to, if it is not 0."""
        b = self.b
        word = self._state(ERROR_WORD, PTR)
        code = b.load(word, typ=I32)

        def leave() -> None:
            b.store(I32(0), word)
            self._leave(code, early=True)
        self._if(b.icmp_signed("!=", code, I32(0)), leave)

    def _check_alignment(self) -> None:
        if not self.inputs:
            return
        b, slots = self.b, self.owner.table(f"{self.f.name}.inputs", I32, self.inputs)
        b.store(I64(0), self.scratch)

        def look(i: ir.Value) -> None:
            address = self._load(self.f.args[0], self._load(slots, i, I32), I64)
            b.store(b.or_(b.load(self.scratch, typ=I64), address), self.scratch)
        self._loop(len(self.inputs), look)
        odd = b.icmp_signed("!=", b.and_(b.load(self.scratch, typ=I64), I64(15)), I64(0))
        self._if(odd, lambda: self._leave(I32(MISALIGNED), early=True))

    def _enter(self) -> ir.Value:
        """Makes the library's context current; the thread's own."""
        b, last = self.b, I32(len(self.steps))
        self._call("cuCtxGetCurrent", [self.scratch], last, early=True)
        before = b.load(self.scratch, typ=PTR)
        other = b.icmp_unsigned("!=", b.ptrtoint(before, I64), b.ptrtoint(self.context, I64))
        self._if(other, lambda: self._call("cuCtxSetCurrent", [self.context], last, early=True))
        return before

    def _finish(self) -> None:
        """Block `restore` gives the thread its own context back, if it had one, and `done` returns."""
        b = self.b
        back = ir.Block(self.f, "back")
        self.f.blocks += [self.restore, back, self.done]
        b.position_at_end(self.restore)
        code = b.phi(I32)
        for value, block in self.late:
            code.add_incoming(value, block)
        if self.two:
            self._if(b.and_(b.icmp_signed("!=", code, I32(0)), self._has_side()), self._join)
        before, context = b.ptrtoint(self.before, I64), b.ptrtoint(self.context, I64)
        other = b.and_(b.icmp_unsigned("!=", before, context), b.icmp_unsigned("!=", before, I64(0)))
        last = b.block
        b.cbranch(other, back, self.done)
        b.position_at_end(back)
        b.call(self.owner.imports("cuCtxSetCurrent"), [self.before])
        b.branch(self.done)
        b.position_at_end(self.done)
        result = b.phi(I32)
        for value, block in [*self.early, (code, last), (code, back)]:
            result.add_incoming(value, block)
        b.ret(result)

    def _has_side(self) -> ir.Value:
        return self.b.icmp_unsigned("!=", self.b.ptrtoint(self.f.args[4], I64), I64(0))

    def _take_side(self) -> None:
        self.b.store(self._load(self.f.args[4], 0, PTR), self._at(self.streams, 1, PTR))

    def _join(self) -> None:
        """After a failure: the caller's stream waits for the other one, so that memory which the call used is free when the caller thinks so."""
        event = self._load(self.f.args[4], 1, PTR)
        self.b.call(self.owner.imports("cuEventRecord"), [event, self._load(self.streams, 1, PTR)])
        self.b.call(self.owner.imports("cuStreamWaitEvent"), [self.f.args[2], event, I32(0)])

    # -- control

    def _leave(self, code: ir.Value, early: bool = False) -> None:
        (self.early if early else self.late).append((code, self.b.block))
        self.b.branch(self.done if early else self.restore)

    def _call(self, name: str, args: Sequence[ir.Value], step: ir.Value, early: bool = False) -> None:
        """Calls a library, and leaves with the step's code if that fails."""
        result = self.b.call(self.owner.imports(name), args)
        self._if(self.b.icmp_signed("!=", result, I32(0)), lambda: self._leave(self._code(step, result), early))

    def _code(self, step: ir.Value, result: ir.Value) -> ir.Value:
        return self.b.or_(result, self.b.shl(self.b.add(step, I32(1)), I32(STEP_BITS)))

    def _if(self, condition: ir.Value, then: Callable[[], None]) -> None:
        b = self.b
        inside, after = self.f.append_basic_block(), self.f.append_basic_block()
        b.cbranch(condition, inside, after)
        b.position_at_end(inside)
        then()
        if not b.block.is_terminated:
            b.branch(after)
        b.position_at_end(after)

    def _loop(self, count: int | ir.Value, body: Callable[[ir.Value], None]) -> None:
        """for i in range(count): body(i), an i32."""
        b, end = self.b, count if isinstance(count, ir.Value) else I32(count)
        before = b.block
        head, inside, after = (self.f.append_basic_block(n) for n in ("head", "inside", "after"))
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(I32)
        i.add_incoming(I32(0), before)
        b.cbranch(b.icmp_signed("<", i, end), inside, after)
        b.position_at_end(inside)
        body(i)
        i.add_incoming(b.add(i, I32(1)), b.block)
        b.branch(head)
        b.position_at_end(after)

    # -- values

    def _at(self, base: ir.Value, i: int | ir.Value, type_: ir.Type) -> ir.Value:
        if isinstance(i, ir.Value) and i.type == I32:
            i = self.b.sext(i, I64)
        start = self.b.bitcast(base, PTR) if isinstance(base, ir.GlobalVariable) else base
        return self.b.gep(start, [I64(i) if isinstance(i, int) else i], source_etype=type_)

    def _load(self, base: ir.Value, i: int | ir.Value, type_: ir.Type) -> ir.Value:
        return self.b.load(self._at(base, i, type_), typ=type_)

    def _state(self, i: int | ir.Value, type_: ir.Type) -> ir.Value:
        return self._load(self.owner.state, i, type_)

    def _fill(self) -> None:
        """Fills the frame: addresses at constant offsets by a loop over a table, the rest one by one."""
        b, owner = self.b, self.owner
        constants = FIRST_KERNEL + len(owner.kernels)
        plain = [(i, c) for c, i in self.cells.items() if isinstance(c, Place) and isinstance(c.offset, int)]
        rows: list[int] = []  # cell, and slot of the table (or -1 - word of the state)
        for i, place in plain:
            word = ERROR_WORD if place == ERRORS else constants + place.slot
            rows += [i, -1 - word if place.constant else place.slot]
        where = owner.table(f"{self.f.name}.cells", I32, rows)
        offsets = owner.table(f"{self.f.name}.offsets", I64, [int(p.offset) for _, p in plain])  # type: ignore[arg-type]
        state = b.bitcast(owner.state, PTR)

        def fill(i: ir.Value) -> None:
            at = b.mul(i, I32(2))
            slot = self._load(where, b.add(at, I32(1)), I32)
            own = b.icmp_signed("<", slot, I32(0))
            base = b.select(own, state, self.f.args[0])
            index = b.select(own, b.sub(I32(-1), slot), slot)
            address = b.add(self._load(base, index, I64), self._load(offsets, i, I64))
            b.store(address, self._at(self.frame, self._load(where, at, I32), I64))
        self._loop(len(plain), fill)
        for c, i in self.cells.items():
            if isinstance(c, Place) and not isinstance(c.offset, int):
                base = self._state(constants + c.slot, I64) if c.constant else self._load(self.f.args[0], c.slot, I64)
                b.store(b.add(base, self.scalars.emit(c.offset)), self._at(self.frame, i, I64))
            elif not isinstance(c, Place | Map):
                b.store(self.scalars.emit(c), self._at(self.frame, i, I64))
        for c, i in self.cells.items():
            if isinstance(c, Map):
                self._encode(c, i)

    def _encode(self, c: Map, cell: int) -> None:
        """Writes a tensor map to the frame."""
        name = f"{self.f.name}.map{cell}"
        sizes, strides = (self.owner.table(f"{name}.{what}", I64, n) for what, n in (("sizes", c.sizes), ("strides", c.strides)))
        box, ones = (self.owner.table(f"{name}.{what}", I32, n) for what, n in (("box", c.box), ("ones", [1] * len(c.box))))
        start = [self._at(t, 0, I32) for t in (sizes, strides, box, ones)]
        matrix = [I32(c.type), I32(len(c.sizes)), self._pointer(I32(self.cells[c.place])), *start]
        self._call("cuTensorMapEncodeTiled", [self._at(self.frame, cell, I64), *matrix, I32(0), I32(c.swizzle), I32(PROMOTION), I32(0)],
                   I32(c.step))

    def _value(self, cell: ir.Value) -> ir.Value:
        """What a cell holds, an i64."""
        return self._load(self.frame, cell, I64)

    def _pointer(self, cell: ir.Value) -> ir.Value:
        return self._load(self.frame, cell, PTR)

    # -- steps

    def _step(self, step: ir.Value) -> None:
        """One row of the table: the kinds that the program has, by comparison."""
        b = self.b
        row = self._at(self.table, b.mul(step, I32(ROW)), I32)
        number = b.load(row, typ=I32)
        kind, self.side = b.and_(number, I32(STREAM - 1)), b.lshr(number, I32(8))
        self.stream = self._load(self.streams, self.side, PTR) if self.two else self.f.args[2]
        kinds = {r % STREAM for r in self.rows[::ROW]}
        for which, emit in ((LAUNCH, self._launch), (COPY, self._copy), (PRODUCT, self._product), (WAIT, self._wait)):
            if which in kinds:
                words = [self._load(row, i, I32) for i in range(1, ROW)]
                self._if(b.icmp_signed("==", kind, I32(which)), lambda emit=emit, words=words: emit(step, words))  # type: ignore[misc]

    def _launch(self, step: ir.Value, words: Sequence[ir.Value]) -> None:
        b = self.b
        kernel, threads, shared, count, first, extent, early = words
        size = self._value(extent)
        self._if(b.icmp_signed(">", size, I64(MAX_GRID)), lambda: self._leave(self._code(step, I32(TOO_LARGE))))

        def parameter(i: ir.Value) -> None:
            cell = self._load(self.lists, b.add(first, i), I32)
            b.store(self._at(self.frame, cell, I64), self._at(self.params, i, PTR))

        def launch() -> None:
            self._loop(count, parameter)
            one = I32(1)
            if self.programmatic:
                for i, value in ((0, b.trunc(size, I32)), (3, threads), (6, shared), (2 * COUNT_WORD, early)):
                    b.store(value, self._at(self.config, i, I32))
                b.store(self.stream, self._at(self.config, STREAM_WORD, PTR))
                self._call("cuLaunchKernelEx", [self.config, self._state(kernel, PTR), self.params, NULL], step)
                return
            self._call("cuLaunchKernel", [self._state(kernel, PTR), b.trunc(size, I32), one, one, threads, one, one, shared, self.stream,
                                          self.params, NULL], step)
        self._if(b.icmp_signed(">", size, I64(0)), launch)

    def _wait(self, step: ir.Value, words: Sequence[ir.Value]) -> None:
        def wait() -> None:
            event, other = self._load(self.f.args[4], 1, PTR), self._load(self.streams, self.b.sub(I32(1), self.side), PTR)
            self._call("cuEventRecord", [event, other], step)
            self._call("cuStreamWaitEvent", [self.stream, event, I32(0)], step)
        self._if(self._has_side(), wait)

    def _copy(self, step: ir.Value, words: Sequence[ir.Value]) -> None:
        target, source, size = (self._value(w) for w in words[:3])
        self._if(self.b.icmp_signed(">", size, I64(0)),
                 lambda: self._call("cuMemcpyDtoDAsync_v2", [target, source, size, self.stream], step))

    def _product(self, step: ir.Value, words: Sequence[ir.Value]) -> None:
        """The transposed product: cuBLASLt's first operand is our second (see `runtime/cublaslt.py`)."""
        b = self.b
        left, right, c, d, bias, workspace, number = words
        plan = self._load(self.f.args[3], number, PTR)

        def call() -> None:
            p = {name: self._load(plan, i, I64 if name == "workspace_bytes" else PTR) for i, name in enumerate(PLAN)}
            descriptor = self._at(self.scratch, 1, I64)
            b.call(self.owner.copier(), [descriptor, p["descriptor"], I64(DESCRIPTOR_BYTES), I1(0)])

            def set_bias() -> None:
                b.store(self._value(bias), self.scratch)
                self._call("cublasLtMatmulDescSetAttribute", [descriptor, I32(BIAS_POINTER), self.scratch, I64(8)], step)
            self._if(b.icmp_signed(">=", bias, I32(0)), set_bias)
            up = b.and_(b.add(self._value(workspace), I64(WORKSPACE_ALIGNMENT - 1)), I64(-WORKSPACE_ALIGNMENT))
            self._call("cublasLtMatmul", [p["handle"], descriptor, p["alpha"], self._pointer(right), p["a"], self._pointer(left), p["b"],
                                          p["beta"], self._pointer(c), p["c"], self._pointer(d), p["d"], p["algorithm"],
                                          b.inttoptr(up, PTR), p["workspace_bytes"], self.stream], step)
        self._if(b.icmp_unsigned("!=", b.ptrtoint(plan, I64), I64(0)), call)


def _unknown_symbol(symbol: str) -> ir.Value:
    raise IRError(f"the size symbol '{symbol}' is not among the function's")
