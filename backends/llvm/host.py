"""Host functions -> native functions with the ABI

    i32 NAME_n(ptr table, ptr symbols)

`table` holds one pointer per function argument (inputs, outputs and whatever else bufferisation added, in order), then the
persistent buffers by id, then the base of the arena. `symbols` holds the i64 values of the function's size symbols, in the
order of its `symbols` attribute. The result is 0, or an error word of the compiled object.

ATen calls split the program: each maximal run of launches and copies between them is one segment, NAME_0, NAME_1, ...
`cached` launches are taken out into NAME_pack_ID, one function per persistent buffer, for the executor to call
when a guard of it changes. The body of a loop is an internal function of the same kind (`loops.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from llvmlite import ir

from ...ir.core import IRError, Operation, Value
from ...ir.expr import Dim, as_int, product, sym
from ...ir.launch_cost import SERIAL_NANOSECONDS, estimated_nanoseconds
from ...ir.target import Target
from ...ir.types import BufferType, element_type
from .copies import copy_kernel
from .half import add_half_conversions
from .kernel import emit_kernel
from .loops import LoopSite, emit_loop
from .parallel import Piece, emit_call, emit_launcher, emit_side_by_side, shareable
from .scalars import ScalarEmitter, at_block
from .scratch import ErrorTable
from .values import I32, I64, PTR, memory_type

__all__ = ["HostProgram", "ModuleEmitter", "Step"]


@dataclass(frozen=True)
class Step:
    """One step of a program: kind "call" runs the native function `name`, "extern" the function's host.extern `number`."""

    kind: str
    name: str = ""
    number: int = 0


@dataclass(frozen=True)
class HostProgram:
    """What the executor walks: the steps in order, and the packing function of each persistent buffer."""

    name: str
    steps: tuple[Step, ...]
    packs: dict[int, str]


PART = 800
"""Instructions of kernels in one LLVM module, after which another one begins: about 40 ms of LLVM, of which 3 are the module's own."""


class ModuleEmitter:
    """Emits the functions of one module; kernels are emitted when first launched.

    `ready` is given LLVM modules with kernels as soon as they are complete; `finish` gives the last, which has the host functions, the
    constants and the first kernels.
    """

    def __init__(self, module: Operation, target: Target, ready: Callable[[ir.Module], None], name: str = "aicc"):
        self.target = target
        self.ready = ready
        self.source = {op["sym_name"]: op for op in module.body if op.name == "tile.kernel"}
        self.functions = {op["sym_name"]: op for op in module.body if op.name == "func"}
        self.steps: dict[str, ir.Function] = {}
        self.llvm = ir.Module(name)
        self.part = self.llvm
        self.parts = 0
        self.errors = ErrorTable()
        # Others call only the launcher of a kernel, so that LLVM knows all its calls; but the pieces of launches side by side call it by itself.
        beside = {op["kernel"].name for f in self.functions.values() for op in f.body if op.name == "host.launch" and op.attributes.get("beside")}
        self.called = {_key(self.source[n]) for n in beside if n in self.source}
        self.launchers: dict[tuple[str, frozenset[int]], tuple[Operation, ir.Function]] = {}
        self.same: dict[str, tuple[ir.Function, ir.Function]] = {}
        self.functions_of: dict[str, ir.Function] = {}
        self.copies: dict[tuple[BufferType, BufferType], str] = {}
        self.exported: list[str] = []
        self.constants: dict[Operation, ir.GlobalVariable] = {}

    def launcher(self, name: str, nontemporal: frozenset[int] = frozenset()) -> tuple[Operation, ir.Function]:
        """The kernel and the function that launches it, writing these of its buffers past the caches. IRError if the module has no such kernel."""
        if (name, nontemporal) not in self.launchers:
            kernel = self.source.get(name)
            if kernel is None:
                known = ", ".join(sorted(self.source)) or "none"
                raise IRError(f"'host.launch' of unknown kernel '@{name}'; the module has {known}")
            key = _key(kernel, nontemporal)
            if key not in self.same:
                self.same[key] = self._emit(kernel, nontemporal, key in self.called)
            self.launchers[name, nontemporal] = kernel, self.same[key][0]
            if not nontemporal:
                self.functions_of[name] = self.same[key][1]
        return self.launchers[name, nontemporal]

    def _emit(self, kernel: Operation, nontemporal: frozenset[int], called: bool) -> tuple[ir.Function, ir.Function]:
        """The launcher and the function of a kernel, as the module of the host functions knows them."""
        part = self.part
        function = emit_kernel(part, kernel, self.target, self.errors, nontemporal)
        launcher = emit_launcher(part, kernel, function)
        if part is not self.llvm:
            launcher = self._known(launcher, kernel)
            function = self._known(function, kernel) if called else function
        if sum(len(block.instructions) for f in part.functions for block in f.blocks) >= PART:
            self._close()
            self.parts += 1
            self.part = ir.Module(f"{self.llvm.name}.{self.parts}")
        return launcher, function

    def _known(self, f: ir.Function, kernel: Operation) -> ir.Function:
        """A function of another module, declared in that of the host functions."""
        f.linkage = ""
        return ir.Function(self.llvm, f.ftype, f.name)

    def _close(self) -> None:
        if self.part is not self.llvm and self.part.functions:
            add_half_conversions(self.part, self.target)
            self.ready(self.part)

    def finish(self) -> ir.Module:
        """The last module, which nothing can be added to any more."""
        self._close()
        add_half_conversions(self.llvm, self.target)
        return self.llvm

    def programs(self, name: str) -> ir.Function:
        """The function that runs some of the programs of a kernel on the calling thread."""
        self.launcher(name)
        return self.functions_of[name]

    def splits(self, name: str) -> bool:
        """Some launch of function `name` is long enough to be shared among threads by itself."""
        return any(shareable(self.source[op["kernel"].name]) != 0 for op in self.functions[name].body if op.name == "host.launch")

    def copier(self, source: BufferType, target: BufferType) -> str:
        """The name of a kernel that copies between buffers of these types."""
        key = (source, target)
        if key not in self.copies:
            name = f"copy{len(self.copies)}"
            while name in self.source:
                name += "_"
            self.copies[key] = name
            self.source[name] = copy_kernel(name, source, target)
        return self.copies[key]

    def copied(self, op: Operation) -> str:
        """The name of the kernel of a `host.copy`."""
        source, target = (v.type for v in op.operands)
        assert isinstance(source, BufferType) and isinstance(target, BufferType)
        return self.copier(source, target)

    def host(self, func: Operation, stepwise: bool = False) -> HostProgram:
        """Emits one host function; `stepwise`: each launch, copy or loop is a segment of its own (for a profiler)."""
        name = func["sym_name"]
        steps: list[Step] = []
        packs: dict[int, list[Operation]] = {}
        run: list[Operation] = []
        segments = externs = 0

        def flush() -> None:
            nonlocal segments
            if run:
                steps.append(Step("call", self._function(func, f"{name}_{segments}", run)))
                segments += 1
                run.clear()

        for op in func.body:
            if op.name == "host.extern":
                flush()
                steps.append(Step("extern", number=externs))
                externs += 1
            elif op.name == "host.launch" and op["cached"]:
                packs.setdefault(_packed_id(op), []).append(op)
            elif op.name in _NATIVE:
                run.append(op)
                if stepwise:
                    flush()
            elif op.name not in _BUFFERS and op.name != "return":
                raise NotImplementedError(f"'{op.name}' has no lowering to LLVM at the host level")
        flush()
        return HostProgram(name, tuple(steps), {i: self._function(func, f"{name}_pack_{i}", ops) for i, ops in packs.items()})

    def step(self, name: str) -> tuple[Operation, ir.Function]:
        """The private function `name`, which a loop calls, and its native code. IRError if it is not all native."""
        func = self.functions.get(name)
        if func is None:
            raise IRError(f"'host.loop' of unknown function '@{name}'; the module has {', '.join(self.functions)}")
        if name not in self.steps:
            ops = [op for op in func.body if op.name not in _BUFFERS and op.name != "return"]
            odd = next((op for op in ops if op.name not in _NATIVE or op.attributes.get("cached")), None)
            if odd is not None:
                raise IRError(f"'{odd.name}' cannot be in the body of a loop ('@{name}')")
            self.steps[name] = self._steps(func, name, ops)
        return func, self.steps[name]

    def _steps(self, func: Operation, name: str, ops: Sequence[Operation]) -> ir.Function:
        """A run of steps: `name(table, symbols, context)`."""
        f = ir.Function(self.llvm, ir.FunctionType(ir.VoidType(), [PTR, PTR, PTR]), name)
        f.linkage = "internal"
        f.attributes.add("nounwind")
        _Segment(self, func, f).emit(ops)
        return f

    def _function(self, func: Operation, name: str, ops: Sequence[Operation]) -> str:
        steps = self._steps(func, f"{name}.steps", ops)
        f = ir.Function(self.llvm, ir.FunctionType(I32, [PTR, PTR]), name)
        f.attributes.add("nounwind")
        self.exported.append(name)
        _Segment(self, func, f).call(steps, self._shareable(ops))
        return name

    def _shareable(self, ops: Sequence[Operation]) -> Dim:
        """Nanoseconds of steps that threads may share."""
        total: Dim = 0
        for op in ops:
            if op.name == "host.loop":
                total = total + op["trips"] * self._shareable(self.functions[op["body"].name].body.ops)
            elif op.name == "host.launch" and op.attributes.get("beside"):
                total = total + estimated_nanoseconds(self.source[op["kernel"].name])
            elif op.name == "host.launch":
                total = total + shareable(self.source[op["kernel"].name])
            elif op.name == "host.copy":
                total = total + shareable(self.source[self.copied(op)])
        return total

    def constant(self, op: Operation) -> ir.GlobalVariable:
        """Constant data as a global, 64-byte aligned."""
        if op not in self.constants:
            data = op["value"].data
            g = ir.GlobalVariable(self.llvm, ir.ArrayType(ir.IntType(8), len(data)), f"constant.{len(self.constants)}")
            g.linkage, g.global_constant, g.align = "internal", True, 64
            g.initializer = ir.Constant(g.value_type, bytearray(data))
            self.constants[op] = g
        return self.constants[op]


LONG = 1 << 40
"""Nanoseconds that a loop counts as: loops are begun before all else."""
_NAMES_ONLY = ("sym_name", "provenance")


def _key(kernel: Operation, nontemporal: frozenset[int] = frozenset()) -> str:
    """What two launches share that run the same code."""
    return f"{sorted(nontemporal)} {_structure(kernel)}"


def _structure(kernel: Operation) -> str:
    """A text that two kernels share if they differ in nothing but names and where they come from."""
    numbers: dict[Value, int] = {}
    parts: list[str] = []
    for op in kernel.walk():
        attrs = {k: v for k, v in op.attributes.items() if op is not kernel or k not in _NAMES_ONLY}
        types = [str(r.type) for r in op.results]
        parts.append(f"{op.name} {[numbers[v] for v in op.operands]} {sorted(attrs.items())} {types}")
        new = [a for region in op.regions for block in region.blocks for a in block.args]
        for v in (*op.results, *new):
            numbers[v] = len(numbers)
        parts.append(f"{[str(a.type) for a in new]} {sum(len(block) for region in op.regions for block in region.blocks)}")
        if op.name == "tile.load" and op["check"]:
            parts.append(str(op.location))  # which the error message names
    return "\n".join(parts)


def _packed_id(op: Operation) -> int:
    outputs = op.operands[len(op.operands) - op["outputs"]:]
    for v in outputs:
        made = v.defining_op
        if made is not None and made.name == "host.persistent":
            return int(made["id"])
    raise IRError("a cached 'host.launch' must write a 'host.persistent'")


class _Segment:
    """One native function: a run of launches."""

    def __init__(self, owner: ModuleEmitter, func: Operation, f: ir.Function):
        self.owner = owner
        self.func = func
        self.f = f
        self.b = ir.IRBuilder(f.append_basic_block("entry"))
        self.scalars = ScalarEmitter(self.b, _unknown_symbol)
        self.pointers: dict[Value, ir.Value] = {}
        self.table: dict[int, ir.Value] = {}
        ids = [int(op["id"]) for op in func.body if op.name == "host.persistent"]
        self.persistents = max(ids, default=-1) + 1

    def _read_sizes(self) -> None:
        b, symbols = self.b, self.f.args[1]
        self.sizes = {s: b.load(b.gep(symbols, [I64(i)], source_etype=I64), typ=I64) for i, s in enumerate(self.func["symbols"])}

    def call(self, steps: ir.Function, work: Dim) -> None:
        """The exported function: `steps` on one thread or several."""
        self._read_sizes()
        with self.scalars.scope(self.sizes, "call"):
            never = isinstance(work, int) and work < SERIAL_NANOSECONDS
            table, symbols = self.f.args
            emit_call(self.b, steps, table, symbols, None if never else self.scalars.emit(work))

    def emit(self, ops: Sequence[Operation]) -> None:
        context = self.f.args[2]
        self._read_sizes()
        with self.scalars.scope(self.sizes, "segment"):
            for number, members in groupby(ops, key=lambda op: op.attributes.get("beside", 0)):
                if number:
                    self._side_by_side(list(members), context)
                else:
                    for op in members:
                        self._step(op, context)
            self.b.ret_void()

    def _step(self, op: Operation, context: ir.Value) -> None:
        if op.name == "host.loop":
            emit_loop(LoopSite(self.owner, self.b, self.scalars, self.sizes, self.pointer, context), op)
        else:
            self._launch(op, context)

    def _side_by_side(self, ops: list[Operation], context: ir.Value) -> None:
        """One shared launch for all, whose pieces are functions of the table, the symbols, the first and last program, and the context."""
        pieces = []
        for i, op in enumerate(ops):
            f = ir.Function(self.f.module, ir.FunctionType(ir.VoidType(), [PTR, PTR, I64, I64, PTR]), f"{self.f.name}.beside{op['beside']}.{i}")
            f.linkage = "internal"
            f.attributes.add("nounwind")
            pieces.append(_Segment(self.owner, self.func, f).piece(op))
        emit_side_by_side(self.b, pieces, self.f.args[0], self.f.args[1], context)

    def piece(self, op: Operation) -> Piece:
        """Emits the function as one launch, or the programs of it that it is told, or a loop."""
        b, f = self.b, self.f
        self._read_sizes()
        with self.scalars.scope(self.sizes, "piece"):
            if op.name == "host.loop":
                emit_loop(LoopSite(self.owner, b, self.scalars, self.sizes, self.pointer, f.args[4]), op)
                made = Piece(f, 1, LONG, inside=self.owner.splits(op["body"].name))
            else:
                kernel, _ = self.owner.launcher(op["kernel"].name)
                sizes = [self.scalars.emit(_size(s, self.sizes, op["kernel"].name)) for s in kernel["symbols"]]
                b.call(self.owner.programs(op["kernel"].name), [*(self.pointer(v) for v in op.operands), *sizes, *f.args[2:]])
                made = Piece(f, as_int(product(kernel["grid"])), as_int(estimated_nanoseconds(kernel)))
            b.ret_void()
        return made

    def _launch(self, op: Operation, context: ir.Value) -> None:
        if op.name == "host.copy":
            name = self.owner.copied(op)
        else:
            name = op["kernel"].name
        nontemporal = frozenset(op["nontemporal"])
        kernel, launcher = self.owner.launcher(name, nontemporal)
        if len(kernel.body.args) != len(op.operands):
            raise IRError(f"kernel '@{name}' takes {len(kernel.body.args)} buffers, but is launched on {len(op.operands)}")
        sizes = [self.scalars.emit(_size(s, self.sizes, name)) for s in kernel["symbols"]]
        args = [*(self.pointer(v) for v in op.operands), *sizes, context]
        excess = op["excess"]
        if isinstance(excess, int):
            self.b.call(launcher, args)
            return
        large = self.b.icmp_signed(">=", self.scalars.emit(excess), I64(0))
        ordinary = self.owner.launcher(name)[1]
        with self.b.if_else(large) as (then, otherwise):
            with then:
                self.b.call(launcher, args)
            with otherwise:
                self.b.call(ordinary, args)

    def pointer(self, v: Value) -> ir.Value:
        """The address of a buffer."""
        if v not in self.pointers:
            self.pointers[v] = self._pointer(v)
        return self.pointers[v]

    def _slot(self, n: int) -> ir.Value:
        """Entry n of the table, read before everything else."""
        if n not in self.table:
            with at_block(self.b, self.scalars.scopes[0].hoist):
                self.table[n] = self.b.load(self.b.gep(self.f.args[0], [I64(n)], source_etype=PTR), typ=PTR)
        return self.table[n]

    def _pointer(self, v: Value) -> ir.Value:
        op = v.defining_op
        args = len(self.func.body.args)
        if op is None:
            return self._slot(v.index)  # type: ignore[attr-defined]
        if op.name == "host.persistent":
            return self._slot(args + op["id"])
        if op.name == "host.slot":
            return self.scalars.address(self._slot(args + self.persistents), ir.IntType(8), op["offset"])
        if op.name == "host.view":
            source = op.operands[0]
            element = memory_type(element_type(source.type))
            return self.scalars.address(self.pointer(source), element, op["offset"])
        if op.name == "host.constant":
            return self.owner.constant(op)
        raise IRError(f"'{op.name}' gives no address: memory planning must come before code generation")


def _size(symbol: str, sizes: dict[str, ir.Value], kernel: str) -> Dim:
    if symbol not in sizes:
        known = ", ".join(sizes) or "none"
        raise IRError(f"kernel '@{kernel}' needs the size symbol '{symbol}', which is not among the function's: {known}")
    return sym(symbol)


def _unknown_symbol(symbol: str) -> ir.Value:
    raise IRError(f"the size symbol '{symbol}' is not among the function's")


_NATIVE = ("host.launch", "host.copy", "host.loop")
_BUFFERS = ("host.slot", "host.persistent", "host.constant", "host.view", "host.alloc")
