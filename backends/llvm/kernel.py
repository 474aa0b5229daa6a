"""`tile.kernel` -> an LLVM function that runs a range of the grid's programs.

    void NAME(ptr buffer..., i64 symbol..., i64 begin, i64 end, ptr context)

Programs are numbered row-major over the grid, the last axis fastest. `context` points to an i32 that is zero until a checked
access fails. Masks that hold for all but the programs at the edge are tested as a whole: the ops that need them exist twice,
without and with them (but not the loops around which they stand, such as the K loop of a GEMM). Loops whose masks fail only in
the last, partial step have it peeled off.
"""

from __future__ import annotations

import itertools
from typing import Any

from llvmlite import ir

from ...ir.core import IRError, Operation, Value
from ...ir.expr import Dim, substitute, sym
from ...ir.opdef import Trait
from ...ir.target import Target
from ...ir.types import BufferType, DType, ScalarType, element_type
from . import amx, arith
from .builder import Builder
from .convert import emit_cast
from .dot import multiplies_pairs
from .intrinsics import call, suffix
from .layout import Layouts, kernel_lanes
from .nontemporal import Nontemporal
from .scalars import ScalarEmitter
from .scratch import ErrorTable, Scratch
from .symbolic import Facts, Loop, Resolver
from .tile_ops import LOWERINGS, elementwise
from .values import I1, I32, I64, PTR, Tile, with_widths

__all__ = ["ErrorTable", "KernelEmitter", "emit_kernel"]

Conditions = dict[tuple[tuple[Dim, Dim], tuple[int, ...]], Dim]
"""(mask, tile shape) -> an expression over the program's coordinates that is >= 0 where the mask holds all over."""


class KernelEmitter:
    """Emits one kernel. `env` maps SSA values to what holds them: LLVM scalars, tiles, buffer pointers."""

    def __init__(self, module: ir.Module, kernel: Operation, target: Target, errors: ErrorTable, nontemporal: frozenset[int] = frozenset()):
        self.module = module
        self.kernel = kernel
        self.features: arith.Features = frozenset(target.features)
        self.errors = errors
        self.vector_bytes = target.lanes(8)
        self.lanes = kernel_lanes(kernel, target)
        self.layouts = Layouts(kernel, self.lanes)
        self.resolver = Resolver(kernel)
        self.env: dict[Value, Any] = {}
        self.instances: dict[str, Dim] = {}
        self.scratch = Scratch(self)
        self.matrix_dots = amx.matrix_dots(self)
        # Beside products that take subnormal numbers as zeros, so may the rounding.
        self.rounds_bf16 = "avx512bf16" in self.features and (
            bool(self.matrix_dots) or any(multiplies_pairs(self.features, op) for op in kernel.walk()))
        self.conditions: Conditions = {}
        self.versioned = False  # inside a run that exists twice
        self.cold = False       # in code for edges: not worth more versions or unrolling
        self.copy = 0           # which copy of an unrolled loop body this is
        self.nontemporal = Nontemporal(self, nontemporal)
        self._codes: dict[Operation, int] = {}

    # -- the function

    def run(self) -> ir.Function:
        kernel = self.kernel
        symbols = kernel["symbols"]
        args = kernel.body.args
        past = "".join(f".{n}" for n in sorted(arg.index for arg in self.nontemporal.buffers))
        f = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [PTR] * len(args) + [I64] * (len(symbols) + 2) + [PTR]),
                        f"kernel.{kernel['sym_name']}{'.nontemporal' * bool(past)}{past}")
        f.linkage = "internal"
        f.attributes.add("nounwind")
        f.attributes.add("noinline")
        shared = {n for pair in kernel["inplace"] for n in pair}
        for arg, value in zip(args, f.args):
            self.env[arg] = value
            if arg.index not in shared:
                value.add_attribute("noalias")
        size_values = dict(zip(symbols, f.args[len(args):]))
        # What does not fit the registers lies on the stack: a vector across two cache lines takes several times as long to come back.
        if self.vector_bytes > 16:  # what the calling convention keeps
            f.attributes.alignstack = self.vector_bytes
        begin, end, self.context = f.args[-3:]
        self.entry = f.append_basic_block("entry")
        start = f.append_basic_block("start")
        self.b = Builder(self.entry)
        self.b.branch(start)
        self.b.position_at_end(start)
        self.scalars = ScalarEmitter(self.b, self._opaque)
        bounds = {s: (lo, hi) for s, (lo, hi) in kernel["bounds"].items()}
        self.facts = Facts(bounds, self.resolver.programs)
        with self.scalars.scope(size_values, "kernel"):
            self._programs(begin, end)
        self.scratch.free()
        self.nontemporal.fence()
        self.b.ret_void()
        return f

    @property
    def facts(self) -> Facts:
        return self._facts

    @facts.setter
    def facts(self, value: Facts) -> None:
        self._facts = value
        self.scalars.facts = value

    def _programs(self, begin: ir.Value, end: ir.Value) -> None:
        """The loop over programs: coordinates are divided out once and then counted up."""
        b = self.b
        grid = [self.scalars.emit(g) for g in self.kernel["grid"]]
        at: list[ir.Value] = []
        rest = begin
        for size in reversed(grid[1:]):
            at.insert(0, b.urem(rest, size))
            rest = b.udiv(rest, size)
        if grid:
            at.insert(0, rest)
        before = b.block
        header, done = b.append_basic_block("program"), b.append_basic_block("done")
        b.cbranch(b.icmp_signed("<", begin, end), header, done)
        b.position_at_end(header)
        number = b.phi(I64)
        number.add_incoming(begin, before)
        coordinates = [b.phi(I64) for _ in at]
        for phi, first in zip(coordinates, at):
            phi.add_incoming(first, before)
        with self.scalars.scope({f"%p{n}": v for n, v in enumerate(coordinates)}, "program"):
            self.conditions = self._program_conditions(self.kernel, self.facts)
            self._block(self.kernel)
            following = self._next_coordinates(coordinates, grid)
            one_more = b.add(number, I64(1), flags=("nsw",))
            number.add_incoming(one_more, b.block)
            for phi, v in zip(coordinates, following):
                phi.add_incoming(v, b.block)
            b.cbranch(b.icmp_signed("<", one_more, end), header, done)
        b.position_at_end(done)

    def _next_coordinates(self, at: list[ir.Value], grid: list[ir.Value]) -> list[ir.Value]:
        b = self.b
        result: list[ir.Value] = []
        carry: ir.Value | None = None
        for axis in range(len(at) - 1, -1, -1):
            raised = b.add(at[axis], I64(1), flags=("nsw",))
            value = raised if carry is None else b.select(carry, raised, at[axis])
            if axis > 0:
                wrapped = b.icmp_signed(">=", value, grid[axis])
                value = b.select(wrapped, I64(0), value)
                carry = wrapped
            result.insert(0, value)
        return result

    def _program_conditions(self, parent: Operation, facts: Facts) -> Conditions:
        """(mask, tile shape) -> an expression over the coordinates that is >= 0 where the mask holds for the whole program."""
        found: Conditions = {}
        for op in parent.body:
            if op in self.resolver.loops:
                found |= self._program_conditions(op, self._in_full_steps(op, facts))
            elif op in self.resolver.accesses:
                access = self.resolver.accesses[op]
                for pair in access.conditions:
                    if facts.proves(pair, access.shape):
                        continue
                    gap = facts.program_gap(pair, access.shape)
                    if gap is not None and not isinstance(gap, int):
                        found[pair, access.shape] = gap
        return found

    def _in_full_steps(self, op: Operation, facts: Facts) -> Facts:
        """Inside a loop, its last partial step left out if that is peeled off."""
        loop = self.resolver.loops[op]
        return facts.inside(loop.symbol, loop.lower,
                            loop.last if loop.divisible or self._is_inlined(op) else loop.upper - loop.step)

    def _is_inlined(self, op: Operation) -> bool:
        """Loops of so few rounds that no loop is left after unrolling."""
        trips = self.resolver.loops[op].trips
        return trips is not None and trips <= max(1, op["unroll"])

    # -- blocks and loops

    def _block(self, parent: Operation) -> list[Any]:
        """Emits the ops of a body, runs of ops whose masks hold in most programs twice; gives the values that it yields."""
        ops = list(parent.body)
        if ops[-1].name != "tile.yield":
            raise IRError(f"the body of '{parent.name}' does not end with 'tile.yield'")
        at = 0
        while at < len(ops) - 1:
            end = self._run_end(ops, at)
            if end > at:
                self._versions(ops[at:end])
            else:
                self._op(ops[at])
            at = max(end, at + 1)
        return [self.value(v) for v in ops[-1].operands]

    def _needs(self, op: Operation) -> Conditions:
        """The program conditions under which `op` needs no masks."""
        if self.cold or self.versioned:
            return {}
        found: Conditions = {}
        for inner in op.walk():
            access = self.resolver.accesses.get(inner)
            if access is not None:
                keys = [(p, access.shape) for p in access.conditions]
                found |= {key: self.conditions[key] for key in keys if key in self.conditions}
        return found

    def _run_end(self, ops: list[Operation], start: int) -> int:
        """The end of the run of ops to version together that starts at `start`; `start` itself if none does."""
        end = start
        for n in range(start, len(ops) - 1):
            op = ops[n]
            needs = self._needs(op)
            loops = [x for x in op.walk() if x in self.resolver.loops]
            if loops and not all(self._needs(x) for x in loops):
                break  # a loop without masks: once is enough, and the masks around it are dealt with inside
            if needs:
                end = n + 1
            elif end == start:
                break
        return end

    def _versions(self, run: list[Operation]) -> None:
        """A run of ops without the masks that hold for this whole program, and with them otherwise."""
        b = self.b
        conditions: Conditions = {}
        for op in run:
            conditions |= self._needs(op)
        holds = None
        for gap in dict.fromkeys(conditions.values()):
            this = b.icmp_signed(">=", self.scalars.emit(gap), I64(0))
            holds = this if holds is None else b.and_(holds, this)
        inner, edge, done = (b.append_basic_block(n) for n in ("inner", "edge", "next"))
        b.cbranch(holds, inner, edge)
        general = self.facts
        outside = self._used_outside(run)
        self.versioned = True
        ends: list[tuple[ir.Block, list[Any]]] = []
        for block, facts, cold in ((inner, general.assuming(frozenset(conditions)), False), (edge, general, True)):
            b.position_at_end(block)
            self.facts, self.cold = facts, cold
            for op in run:
                self._op(op)
            outside = [v for v in outside if v in self.env]  # the others are expressions
            ends.append((b.block, [self.env[v] for v in outside]))
            b.branch(done)
        self.facts, self.cold, self.versioned = general, False, False
        b.position_at_end(done)
        (from_x, xs), (from_y, ys) = ends
        merged = [x if x is y else _merge(b, x, from_x, y, from_y) for x, y in zip(_flatten(xs), _flatten(ys))]
        self.env.update(zip(outside, _unflatten(xs, merged)))

    def _used_outside(self, run: list[Operation]) -> list[Value]:
        """Results of the run that later ops use and that are held in registers."""
        members = set(run)

        def inside(user: Operation | None) -> bool:
            while user is not None and user not in members:
                user = user.parent_op
            return user is not None
        return [r for op in run for r in op.results
                if not isinstance(r.type, BufferType) and any(not inside(u) for u in r.users)]

    def _op(self, op: Operation) -> None:
        if op.has_trait(Trait.Elementwise):
            elementwise(self, op)
        elif op.name == "tile.for":
            self._for(op)
        elif op.name in LOWERINGS:
            LOWERINGS[op.name](self, op)
        else:
            raise NotImplementedError(f"'{op.name}' has no lowering to LLVM")

    def _for(self, op: Operation) -> None:
        loop = self.resolver.loops[op]
        in_tiles = amx.carried_in_tiles(op, self.matrix_dots) if self.matrix_dots else []
        values = [self.value(v) for v in op.operands[op["indices"]:]]
        values = [amx.enter(self, v, x) if t else x for v, x, t in itertools.zip_longest(op.operands[op["indices"]:], values, in_tiles)]
        outer = self.facts
        if self._is_inlined(op):
            for n in range(loop.trips or 0):
                value = loop.lower + n * loop.step
                self.facts = outer.inside(loop.symbol, value, value)
                self.instances[loop.symbol] = self.instantiate(value)
                values = self.iterate(op, values)
                del self.instances[loop.symbol]
        elif (run := self.nontemporal.unaligned_run(op)) is not None:
            self.nontemporal.emit_run(op, run)
        else:
            values = self.emit_loop(op, loop, values)
        self.facts = outer
        for result, v in zip(op.results, values):
            self.env[result] = amx.leave(self, result, v) if isinstance(v, amx.AmxTile) else v

    def emit_loop(self, op: Operation, loop: Loop, values: list[Any]) -> list[Any]:
        """A loop that stays one: unrolled, its partial step peeled off. Gives the values after it."""
        unroll = 1 if self.cold else max(1, op["unroll"])
        outer = self.facts
        lower, upper, step = self.instantiate(loop.lower), self.instantiate(loop.upper), loop.step
        peel = not loop.divisible and self._needs_peel(op, loop, outer)
        last = loop.upper - step if peel else loop.last
        whole = outer.inside(loop.symbol, loop.lower, last)
        bound = upper - step + 1 if peel else upper
        at: Dim | ir.Value = lower
        if unroll > 1:
            at, values = self.steps(op, loop, whole, at, bound - (unroll - 1) * step, unroll, values)
        if unroll == 1 or loop.trips is None or loop.trips % unroll:
            at, values = self.steps(op, loop, whole, at, bound, 1, values)
        if peel:
            facts = outer.in_tail(loop.symbol).inside(loop.symbol, loop.lower, loop.last)
            values = self._tail(op, loop, facts, at, upper, values)
        return values

    def iterate(self, op: Operation, carried: list[Any]) -> list[Any]:
        for arg, v in zip(op.body.args[1:], carried):
            self.env[arg] = v
        return self._canonical(op, self._block(op))

    def _canonical(self, op: Operation, values: list[Any]) -> list[Any]:
        """Loop-carried tiles in their standard layout."""
        return [with_widths(self.b, v, self.layouts.widths(r)) if isinstance(v, Tile) and not isinstance(v, amx.AmxTile) else v
                for v, r in zip(values, op.results)]

    def steps(self, op: Operation, loop: Loop, facts: Facts, start: Dim | ir.Value, bound: Dim, copies: int,
              values: list[Any]) -> tuple[ir.Value, list[Any]]:
        """A loop while the variable is below `bound`, `copies` steps per round. Gives the variable and the values after it."""
        b = self.b
        first = start if isinstance(start, ir.Value) else self.scalars.emit(start)
        limit = self.scalars.emit(bound)
        values = self._canonical(op, values)
        flat = _flatten(values)
        before = b.block
        header, done = b.append_basic_block("loop"), b.append_basic_block("loop.end")
        b.cbranch(b.icmp_signed("<", first, limit), header, done)
        b.position_at_end(header)
        variable = b.phi(I64)
        variable.add_incoming(first, before)
        phis = [b.phi(v.type) for v in flat]
        for phi, v in zip(phis, flat):
            phi.add_incoming(v, before)
        outer = self.facts
        self.facts = facts
        with self.scalars.scope({loop.symbol: variable}, "loop"):
            carried = _unflatten(values, phis)
            around = self.copy
            for n in range(copies):
                self.copy = n
                if n:
                    self.instances[loop.symbol] = sym(loop.symbol) + n * loop.step
                carried = self.iterate(op, carried)
                self.instances.pop(loop.symbol, None)
            self.copy = around
            following = b.add(variable, I64(loop.step * copies), flags=("nsw",))
            latch = b.block
            b.cbranch(b.icmp_signed("<", following, limit), header, done)
        self.facts = outer
        after = _flatten(carried)
        variable.add_incoming(following, latch)
        for phi, v in zip(phis, after):
            phi.add_incoming(v, latch)
        b.position_at_end(done)
        at_end = _merge(b, first, before, following, latch)
        return at_end, _unflatten(values, [_merge(b, x, before, y, latch) for x, y in zip(flat, after)])

    def _tail(self, op: Operation, loop: Loop, facts: Facts, at: ir.Value, upper: Dim, values: list[Any]) -> list[Any]:
        """The last, partial step, if there is one."""
        b = self.b
        limit = self.scalars.emit(upper)
        values = self._canonical(op, values)
        before = b.block
        body, done = b.append_basic_block("tail"), b.append_basic_block("tail.end")
        b.cbranch(b.icmp_signed("<", at, limit), body, done)
        b.position_at_end(body)
        outer, cold = self.facts, self.cold
        self.facts, self.cold = facts, True
        with self.scalars.scope({loop.symbol: at}, "tail"):
            after = self.iterate(op, values)
            latch = b.block
            b.branch(done)
        self.facts, self.cold = outer, cold
        b.position_at_end(done)
        return _unflatten(values, [_merge(b, x, before, y, latch) for x, y in zip(_flatten(values), _flatten(after))])

    def _needs_peel(self, op: Operation, loop: Loop, facts: Facts) -> bool:
        """True if some mask in the loop holds in its full steps but not in a partial one."""
        full = facts.inside(loop.symbol, loop.lower, loop.upper - loop.step)
        partial = facts.in_tail(loop.symbol).inside(loop.symbol, loop.lower, loop.last)
        return self._differs(op, full, partial)

    def _differs(self, parent: Operation, full: Facts, partial: Facts) -> bool:
        for op in parent.body:
            if op in self.resolver.loops:
                if self._differs(op, self._in_full_steps(op, full), self._in_full_steps(op, partial)):
                    return True
            elif op in self.resolver.accesses:
                access = self.resolver.accesses[op]
                if any(full.proves(p, access.shape) and not partial.proves(p, access.shape) for p in access.conditions):
                    return True
        return False

    # -- values

    def value(self, v: Value) -> Any:
        """What holds `v`; symbolic index values become instructions here."""
        if v in self.env:
            return self.env[v]
        if v in self.resolver.exprs and isinstance(v.type, ScalarType):
            return self.scalars.emit(self.instantiate(self.resolver.exprs[v]))
        raise IRError(f"a value of type {v.type} is used before it is computed")

    def tile(self, v: Value) -> Tile:
        """`v` as a tile; a scalar counts as one element."""
        held = self.value(v)
        return held if isinstance(held, Tile) else Tile((1,), element_type(v.type), (1,), [[held]])

    def layout(self, v: Value) -> tuple[int, ...]:
        return self.layouts.widths(v)

    def instantiate(self, e: Dim) -> Dim:
        """`e` for the current copies of unrolled loop bodies."""
        return substitute(e, self.instances) if self.instances else e

    def widen_index(self, v: ir.Value, dtype: DType) -> ir.Value:
        """An integer chunk as i64."""
        return emit_cast(self.b, v, dtype.name, "i64")

    def _opaque(self, symbol: str) -> ir.Value:
        name, _, row = symbol.partition("@")
        v = self.resolver.values[name]
        held = self.env[v]
        dtype = element_type(v.type)
        return self.widen_index(held.rows[int(row)][0] if row else held, dtype)

    def report(self, op: Operation, mask: ir.Value) -> None:
        """Sets the error word unless every lane of `mask` holds."""
        b = self.b
        if op not in self._codes:
            what = f"RuntimeError: {op['message']}" if op.name == "tile.require" else "index out of range"
            self._codes[op] = self.errors.code(f"{what} in kernel '{self.kernel['sym_name']}' ({op.location})")
        if isinstance(mask.type, ir.VectorType):
            mask = call(b, f"llvm.vector.reduce.and.{suffix(mask.type)}", I1, [mask])
        b.store(I32(self._codes[op]), b.select(mask, self.scratch.sink(), self.context))


def _flatten(values: list[Any]) -> list[ir.Value]:
    return [x for v in values for x in (v.values if isinstance(v, Tile) else [v])]


def _unflatten(like: list[Any], flat: list[ir.Value]) -> list[Any]:
    result: list[Any] = []
    at = 0
    for v in like:
        n = len(v.values) if isinstance(v, Tile) else 1
        result.append(v.with_values(flat[at:at + n]) if isinstance(v, Tile) else flat[at])
        at += n
    return result


def _merge(b: ir.IRBuilder, x: ir.Value, from_x: ir.Block, y: ir.Value, from_y: ir.Block) -> ir.Value:
    phi = b.phi(x.type)
    phi.add_incoming(x, from_x)
    phi.add_incoming(y, from_y)
    return phi


def emit_kernel(module: ir.Module, kernel: Operation, target: Target, errors: ErrorTable, nontemporal: frozenset[int] = frozenset()) -> ir.Function:
    """Adds the function of `kernel` to `module`; it writes the buffers of these numbers past the caches. NotImplementedError names an op or
    type that has no lowering."""
    return KernelEmitter(module, kernel, target, errors, nontemporal).run()


