"""The host function of a GPU program, as machine code: what `runtime/cuda.py` loads and calls once per call of a graph.

    host = emit_native(program, kernels)      # kernels: rows with threads, shared memory, parameters (see `program_json`)
    host.object_code, host.llvm_ir

Each function of the program becomes

    i32 NAME(ptr table, ptr symbols, ptr stream, ptr plans)

It evaluates grid sizes and offsets from the symbol values, fills the parameter cells on its own stack (so it may run in several threads at
once) and calls the driver in order: `cuLaunchKernel`, `cuMemcpyDtoDAsync_v2`, `cublasLtMatmul`. These names are imported; what only the
process knows (handles of kernels, addresses of constants) is read from the exported global `STATE`, an array of 64-bit words:

    [address of the word for failed checks, context, kernels in the program's order..., constants...]

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
from dataclasses import dataclass
from typing import Any

from llvmlite import binding, ir

from ...ir.core import IRError
from ...ir.expr import Dim, product, sym
from ..llvm.compile import optimize, parse
from ..llvm.scalars import ScalarEmitter
from ..llvm.target import make_target, target_machine
from ..llvm.values import I1, I32, I64, PTR, stack_slot
from .host import Copy, Launch, MatMul, Place, Program, Step

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
    "cuMemcpyDtoDAsync_v2": [I64, I64, I64, PTR],
    "cublasLtMatmul": [*[PTR] * 14, I64, PTR],
    "cublasLtMatmulDescSetAttribute": [PTR, I32, PTR, I64],
}
Cell = tuple[bool, int, Dim] | str
"""What a parameter cell holds: an address (constant or not, slot, offset), a size symbol, ERRORS or SCRATCH."""
ERRORS, SCRATCH = "%errors", "%null"


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
    code = target_machine(target).emit_object(parsed)
    return NativeHost(code, text, tuple(program.functions), tuple(sorted(emitter.imported)))


class _Emitter:
    """One module."""

    def __init__(self, module: ir.Module, state: ir.GlobalVariable, program: Program, kernels: Mapping[str, Mapping[str, Any]]):
        self.module, self.state, self.program, self.kernels = module, state, program, kernels
        self.numbers = {name: i for i, name in enumerate(kernels)}
        self.imported: dict[str, ir.Function] = {}

    def imports(self, name: str) -> ir.Function:
        if name not in self.imported:
            self.imported[name] = ir.Function(self.module, ir.FunctionType(I32, _IMPORTS[name]), name)
        return self.imported[name]

    def copier(self) -> ir.Function:
        name = "llvm.memcpy.p0.p0.i64"
        return self.module.globals.get(name) or ir.Function(self.module, ir.FunctionType(ir.VoidType(), [PTR, PTR, I64, I1]), name)

    def function(self, name: str) -> None:
        f = ir.Function(self.module, ir.FunctionType(I32, [PTR] * 4), name)
        f.attributes.add("nounwind")
        program = self.program
        _Function(self, f, program.functions[name], program.symbols[name], program.inputs[name]).emit()


class _Function:
    """One native function."""

    def __init__(self, owner: _Emitter, f: ir.Function, steps: Sequence[Step], symbols: Sequence[str],
                 inputs: Sequence[int]):
        self.owner, self.f, self.steps, self.symbols, self.inputs = owner, f, steps, symbols, inputs
        self.b = ir.IRBuilder(f.append_basic_block("entry"))
        self.scalars = ScalarEmitter(self.b, _unknown_symbol)
        self.cells = {cell: i for i, cell in enumerate(dict.fromkeys(c for s in steps if isinstance(s, Launch) for c in self._cells(s)))}
        self.early: list[tuple[ir.Value, ir.Block]] = []  # codes with which the function leaves before, and after, its context is current
        self.late: list[tuple[ir.Value, ir.Block]] = []
        self.products = 0

    def emit(self) -> None:
        b, f = self.b, self.f
        launches = [s for s in self.steps if isinstance(s, Launch)]
        self.frame = stack_slot(b, ir.ArrayType(I64, max(1, len(self.cells))), 16)
        self.params = stack_slot(b, ir.ArrayType(PTR, max([1, *(self._row(s)["parameters"] for s in launches)])), 16)
        self.scratch = stack_slot(b, ir.ArrayType(I64, DESCRIPTOR_BYTES // 8 + 1), 16)
        self.done, self.restore = ir.Block(f, "done"), ir.Block(f, "restore")
        if any(self._row(s)["checks"] for s in launches):
            self._take_error()
        self._check_alignment()
        self.context = self._state(CONTEXT, PTR)
        self.before = self._enter()
        values = {s: self._load(f.args[1], i, I64) for i, s in enumerate(self.symbols)}
        with self.scalars.scope(values, "steps"):
            for cell, i in self.cells.items():
                b.store(self._value(cell), self._at(self.frame, i, I64))
            for at, step in enumerate(self.steps):
                if isinstance(step, Launch):
                    self._launch(at, step)
                elif isinstance(step, Copy):
                    self._copy(at, step)
                else:
                    self._product(at, step)
            self._leave(I32(0))
        self._finish()

    # -- before and after

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
        b = self.b
        bits: ir.Value | None = None
        for slot in self.inputs:
            address = self._load(self.f.args[0], slot, I64)
            bits = address if bits is None else b.or_(bits, address)
        if bits is not None:
            odd = b.icmp_signed("!=", b.and_(bits, I64(15)), I64(0))
            self._if(odd, lambda: self._leave(I32(MISALIGNED), early=True))

    def _enter(self) -> ir.Value:
        """Makes the library's context current; the thread's own."""
        b = self.b
        at = len(self.steps)
        self._call("cuCtxGetCurrent", [self.scratch], at, early=True)
        before = b.load(self.scratch, typ=PTR)
        other = b.icmp_unsigned("!=", b.ptrtoint(before, I64), b.ptrtoint(self.context, I64))
        self._if(other, lambda: self._call("cuCtxSetCurrent", [self.context], at, early=True))
        return before

    def _finish(self) -> None:
        b = self.b
        back = ir.Block(self.f, "back")
        self.f.blocks += [self.restore, back, self.done]
        b.position_at_end(self.restore)
        code = b.phi(I32)
        for value, block in self.late:
            code.add_incoming(value, block)
        before, context = b.ptrtoint(self.before, I64), b.ptrtoint(self.context, I64)
        other = b.and_(b.icmp_unsigned("!=", before, context), b.icmp_unsigned("!=", before, I64(0)))
        b.cbranch(other, back, self.done)
        b.position_at_end(back)
        b.call(self.owner.imports("cuCtxSetCurrent"), [self.before])
        b.branch(self.done)
        b.position_at_end(self.done)
        result = b.phi(I32)
        for value, block in [*self.early, (code, self.restore), (code, back)]:
            result.add_incoming(value, block)
        b.ret(result)

    def _leave(self, code: ir.Value, early: bool = False) -> None:
        (self.early if early else self.late).append((code, self.b.block))
        self.b.branch(self.done if early else self.restore)

    def _call(self, name: str, args: Sequence[ir.Value], step: int, early: bool = False) -> None:
        """Calls a library, and leaves with the step's code if that fails."""
        b = self.b
        result = b.call(self.owner.imports(name), args)
        self._if(b.icmp_signed("!=", result, I32(0)), lambda: self._leave(b.or_(result, I32((step + 1) << STEP_BITS)), early))

    def _if(self, condition: ir.Value, then: Callable[[], None]) -> None:
        b = self.b
        inside, after = self.f.append_basic_block(), self.f.append_basic_block()
        b.cbranch(condition, inside, after)
        b.position_at_end(inside)
        then()
        if not b.block.is_terminated:
            b.branch(after)
        b.position_at_end(after)

    # -- values

    def _at(self, base: ir.Value, i: int, type_: ir.Type) -> ir.Value:
        return self.b.gep(base, [I64(i)], source_etype=type_)

    def _load(self, base: ir.Value, i: int, type_: ir.Type) -> ir.Value:
        return self.b.load(self._at(base, i, type_), typ=type_)

    def _state(self, i: int, type_: ir.Type) -> ir.Value:
        state = self.b.bitcast(self.owner.state, PTR)
        return self._load(state, i, type_)

    def _value(self, cell: Cell) -> ir.Value:
        """What a parameter cell holds, an i64."""
        if cell == ERRORS:
            return self._state(ERROR_WORD, I64)
        if cell == SCRATCH:
            return I64(0)
        if isinstance(cell, str):
            return self.scalars.emit(sym(cell))
        constant, slot, offset = cell
        return self._address(Place(slot, offset, constant))

    def _address(self, place: Place) -> ir.Value:
        if place.constant:
            base = self._state(FIRST_KERNEL + len(self.owner.kernels) + place.slot, I64)
        else:
            base = self._load(self.f.args[0], place.slot, I64)
        return base if isinstance(place.offset, int) and not place.offset else self.b.add(base, self.scalars.emit(place.offset))

    def _pointer(self, place: Place) -> ir.Value:
        return self.b.inttoptr(self._address(place), PTR)

    def _rounded_up(self, place: Place) -> ir.Value:
        """The first multiple of WORKSPACE_ALIGNMENT from a place on."""
        up = self.b.add(self._address(place), I64(WORKSPACE_ALIGNMENT - 1))
        return self.b.inttoptr(self.b.and_(up, I64(-WORKSPACE_ALIGNMENT)), PTR)

    # -- steps

    def _row(self, step: Launch) -> Mapping[str, Any]:
        return self.owner.kernels[step.kernel]

    def _cells(self, step: Launch) -> list[Cell]:
        """A kernel's parameters: its buffers, its size symbols, the word for failed checks, and null pointers for Triton's scratch memory."""
        row = self._row(step)
        cells: list[Cell] = [(p.constant, p.slot, p.offset) for p in step.buffers]
        cells += [*row["symbols"], *([ERRORS] if row["checks"] else [])]
        cells += [SCRATCH] * (row["parameters"] - len(cells))
        if len(cells) != row["parameters"]:
            raise IRError(f"kernel '{step.kernel}' takes {row['parameters']} parameters, not {len(cells)}")
        return cells

    def _launch(self, at: int, step: Launch) -> None:
        b, row = self.b, self._row(step)
        extent = product(self.owner.program.kernels[step.kernel]["grid"])
        if isinstance(extent, int) and extent > MAX_GRID:
            raise IRError(f"kernel '{step.kernel}' would need {extent} programs; the largest grid has {MAX_GRID}")

        def launch() -> None:
            for i, cell in enumerate(self._cells(step)):
                b.store(self._at(self.frame, self.cells[cell], I64), self._at(self.params, i, PTR))
            function = self._state(FIRST_KERNEL + self.owner.numbers[step.kernel], PTR)
            one = I32(1)
            self._call("cuLaunchKernel", [function, b.trunc(size, I32), one, one, I32(row["threads"]), one, one, I32(row["shared"]),
                                          self.f.args[2], self.params, NULL], at)

        if extent == 0:
            return
        size = self.scalars.emit(extent)
        if isinstance(extent, int):
            launch()
            return
        self._if(b.icmp_signed(">", size, I64(MAX_GRID)), lambda: self._leave(I32((at + 1) << STEP_BITS | TOO_LARGE)))
        self._if(b.icmp_signed(">", size, I64(0)), launch)

    def _copy(self, at: int, step: Copy) -> None:
        size = self.scalars.emit(step.bytes)

        def copy() -> None:
            addresses = self._address(step.target), self._address(step.source)
            self._call("cuMemcpyDtoDAsync_v2", [*addresses, size, self.f.args[2]], at)
        if isinstance(step.bytes, int):
            if step.bytes:
                copy()
        else:
            self._if(self.b.icmp_signed(">", size, I64(0)), copy)

    def _product(self, at: int, step: MatMul) -> None:
        b = self.b
        plan = self._load(self.f.args[3], self.products, PTR)
        self.products += 1

        def call() -> None:
            p = {name: self._load(plan, i, I64 if name == "workspace_bytes" else PTR) for i, name in enumerate(PLAN)}
            descriptor = p["descriptor"]
            if step.bias is not None:
                descriptor = self._at(self.scratch, 1, I64)
                b.call(self.owner.copier(), [descriptor, p["descriptor"], I64(DESCRIPTOR_BYTES), I1(0)])
                b.store(self._address(step.bias), self.scratch)
                self._call("cublasLtMatmulDescSetAttribute", [descriptor, I32(BIAS_POINTER), self.scratch, I64(8)], at)
            left, right, d = (self._pointer(x) for x in (step.a, step.b, step.d))
            c = d if step.c is None else self._pointer(step.c)
            workspace = NULL if step.workspace is None else self._rounded_up(step.workspace)
            # The transposed product: cuBLASLt's first operand is our second (see `runtime/cublaslt.py`).
            self._call("cublasLtMatmul", [p["handle"], descriptor, p["alpha"], right, p["a"], left, p["b"], p["beta"], c, p["c"], d, p["d"],
                                          p["algorithm"], workspace, p["workspace_bytes"], self.f.args[2]], at)
        self._if(b.icmp_unsigned("!=", b.ptrtoint(plan, I64), I64(0)), call)


def _unknown_symbol(symbol: str) -> ir.Value:
    raise IRError(f"the size symbol '{symbol}' is not among the function's")
