"""From values to memory: functions of `tile.launch` on tensors become host functions on buffers.

Before: functions of `tile.launch`, `loop`, `tensor.library`, `tensor.constant`, `tensor.extern`, `tensor.assign` and `return`, in their final
order.
`result_attrs` has one entry per result of the program (or none, for plain tensors):
- {kind = "tensor", strides} takes an operand of `return`, wants these strides (absent: row-major) and memory of its own, but for
  `alias_of_arg`, `same`, `base` and `offset` (see `frontend/importer.py`; without `result_attrs`, returned arguments and values
  returned twice are shared); one that is `hidden` is memory for others' `base` and no result of the program;
- {kind = "int", expr} takes one too (which is ignored when `expr` is given);
- {kind = "none"} and {kind = "view", arg, shape, strides, offset} (a view of an argument, in elements) take none.

After: block arguments are the inputs, the outputs, then one buffer per other extern result; temporaries are `host.alloc`.
`arg_attrs` gains {kind = "output"} and {kind = "extern"} (memory that the executor takes over from an operator's result
without a copy; {kind = "output", extern = true} when that result is returned). `result_attrs` says what the program returns:

    {kind = "buffer", arg = k}     the output buffer k              {kind = "input", arg = k}   argument k itself
    {kind = "same", result = j}    the same tensor as result j      {kind = "view", ...}        as above, of an input or an output, and with
                                                                                                `dtype` if that is another one
    {kind = "item", arg = k}       the value of a 0-d buffer        {kind = "int", expr}, {kind = "none"}

- A returned value is written where it is returned, unless its layout differs, or it is constant, cached or returned in two
  layouts: then `host.copy`.
- `tensor.assign` writes straight into the argument when no later op reads the old contents (the launch itself may, where its
  kernel allows that in place); otherwise it is a copy after the last read. Old contents that are returned or assigned elsewhere
  are saved first.
- The result of a `cached` launch is a `host.persistent`, guarded by all the arguments that it was made from.
- Launches and constants that nobody uses are dropped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..ir.builder import Builder
from ..ir.core import Block, BlockArg, IRError, Operation, Value
from ..ir.expr import Dim
from ..ir.passes import Pass, PassContext, register
from ..ir.types import DTYPES, BufferType, DType, TensorType, contiguous_strides
from .library import WORKSPACE_SLACK, library_shape
from .storage import storage_bytes

__all__ = ["Bufferize"]

_STABLE_KINDS = ("param", "constant", "buffer")
_KNOWN = ("loop", "tile.launch", "tensor.constant", "tensor.extern", "tensor.assign", "tensor.library", "tensor.alias")
_EXTERN_ATTRS = ("target", "args", "kwargs", "result_kinds", "random", "reason", "operand_strides", "defines")


@register
@dataclass(frozen=True)
class Bufferize(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "bufferize"

    def run(self, module: Operation, ctx: PassContext) -> None:
        kernels = {op["sym_name"]: op for op in module.body if op.name == "tile.kernel"}
        functions = {op["sym_name"]: op for op in module.body if op.name == "func"}
        for func in module.body:
            if func.name == "func":
                _Bufferizer(func, kernels, functions, ctx).run()
        module.attributes["level"] = "host"


def same_layout(shape: Sequence[Dim], a: Sequence[Dim], b: Sequence[Dim]) -> bool:
    """True if the strides agree wherever they matter: dimensions of size 1 have no stride worth comparing."""
    return all(x == y for size, x, y in zip(shape, a, b, strict=True) if size != 1)


def _tensor(v: Value) -> TensorType:
    if not isinstance(v.type, TensorType):
        raise IRError(f"bufferize expects tensors, got a value of type {v.type}")
    return v.type


def _buffer_type(t: TensorType) -> BufferType:
    return BufferType(t.shape, t.dtype, t.strides)


class _Bufferizer:
    """One function. `home` is memory that a value is written to directly, `buffer` where each value is."""

    def __init__(self, func: Operation, kernels: dict[str, Operation], functions: dict[str, Operation], ctx: PassContext):
        self.func = func
        self.functions = functions
        self.kernels = kernels
        self.ctx = ctx
        self.old = func.body
        self.inputs = len(self.old.args)
        self.block = Block([_buffer_type(_tensor(a)) for a in self.old.args], [a.name for a in self.old.args])
        self.b = Builder.at_end(self.block)
        self.arg_attrs: list[dict[str, Any]] = list(func["arg_attrs"]) or [{"kind": "input"}] * self.inputs
        self.results: list[dict[str, Any]] = []
        self.home: dict[Value, BlockArg] = {}
        self.bases: dict[tuple[Value, tuple[Dim, ...]], int] = {}  # output buffers that are returned, or views of which are
        self.taken: dict[Value, Value] = {}  # a result -> the operand whose memory it takes over
        self.buffer: dict[Value, Value] = dict(zip(self.old.args, self.block.args, strict=True))
        self.first: list[tuple[Value, Value]] = []  # (target buffer, source buffer) before everything else
        self.saved: dict[Value, Value] = {}
        self.after: dict[Operation, list[tuple[Value, Value]]] = defaultdict(list)  # (target buffer, source value) after an op
        self.persistent = 0
        self.guards: dict[Value, set[int]] = {}
        returned = self._returned_values()
        self.ops = self._live_ops(returned)
        self.position = {op: i for i, op in enumerate(self.ops)}
        self.assigned: dict[Value, Value] = {}  # argument -> its new value; the last assignment counts
        for op in self.ops:
            if op.name == "tensor.assign":
                if not isinstance(op.operands[0], BlockArg):
                    raise IRError("the target of 'tensor.assign' must be an argument of the function")
                self.assigned[op.operands[0]] = op.operands[1]
        self.assigned = {t: v for t, v in self.assigned.items() if t is not v}

    def run(self) -> None:
        self._find_guards()
        self._place_results()
        self._place_assignments()
        self._share_updates()
        for target, source in self.first:
            self._copy(target, source)
        for op in self.ops:
            self.b.location = op.location
            _EMITTERS[op.name](self, op)
            for target, value in self.after[op]:
                self._copy(target, self.buffer[value])
        self.b.create("return")
        self._replace()

    # -- what is alive

    def _entries(self) -> list[tuple[dict[str, Any], Value | None]]:
        """(description, value) per result of the program."""
        operands = list(self.old.terminator.operands)
        attrs = list(self.func["result_attrs"]) or [{}] * len(operands)
        entries: list[tuple[dict[str, Any], Value | None]] = []
        for a in attrs:
            takes = a.get("kind", "tensor") in ("tensor", "int")
            if takes and not operands:
                count = len(self.old.terminator.operands)
                raise IRError(f"'result_attrs' describes more tensors than the {count} operands of 'return'")
            value = operands.pop(0) if takes else None
            entries.append(({"kind": "view", **a["view"]}, None) if "view" in a else (a, value))  # memory of an argument: nothing to compute
        if operands:
            raise IRError(f"'return' has {len(operands)} operands that 'result_attrs' does not describe")
        return entries

    def _returned_values(self) -> list[Value]:
        return [v for a, v in self._entries() if v is not None and not _is_known_int(a) and not _shares(a)]

    def _live_ops(self, returned: list[Value]) -> list[Operation]:
        needed = set(returned)
        kept: list[Operation] = []
        for op in self.old.reversed():
            if op is self.old.terminator:
                continue
            if op.name not in _KNOWN:
                raise IRError(f"bufferize does not know '{op.name}'; it expects {', '.join(_KNOWN)}")
            if op.name in ("loop", "tile.launch", "tensor.constant", "tensor.library", "tensor.alias") and not needed.intersection(op.results):
                continue
            needed.update(op.operands)
            kept.append(op)
        kept.reverse()
        return kept

    def _find_guards(self) -> None:
        """For each value that depends on parameters and constants alone: the arguments that it was made from."""
        for a in self.old.args:
            if self.arg_attrs[a.index].get("kind") in _STABLE_KINDS and a not in self.assigned:
                self.guards[a] = {a.index}
        for op in self.ops:
            if op.name == "tensor.constant":
                self.guards[op.result] = set()
            elif op.name == "tile.launch" and op["cached"]:
                if all(v in self.guards for v in op.operands):
                    made: set[int] = set().union(*(self.guards[v] for v in op.operands))
                    self.guards.update(dict.fromkeys(op.results, made))
                else:
                    self.ctx.remark("declined", f"'{op['kernel']}' is not cached: it reads what changes between calls",
                                    op.location)

    def _is_cached(self, op: Operation) -> bool:
        return op.name == "tile.launch" and all(r in self.guards for r in op.results) and bool(op["cached"])

    # -- results

    def _place_results(self) -> None:
        placed: dict[tuple[Value, tuple[Dim, ...]], int] = {}
        plain = not self.func["result_attrs"]
        views: list[tuple[int, DType]] = []
        viewed: dict[tuple[Value, tuple[Dim, ...]], int] = {}  # output buffers of which only views are returned so far
        for i, (attrs, v) in enumerate(self._entries()):
            kind = attrs.get("kind", "tensor")
            if v is None or _is_known_int(attrs):
                self.results.append(dict(attrs))
                continue
            t = _tensor(v)
            wanted = tuple(attrs.get("strides") or contiguous_strides(t.shape))
            if len(wanted) != t.rank:
                raise IRError(f"result {i} has {len(wanted)} strides for {t}")
            if kind == "int":
                self.results.append({"kind": "item", "arg": self._output(v, wanted).index})
            elif "alias_of_arg" in attrs:
                self.results.append({"kind": "input", "arg": attrs["alias_of_arg"]})
            elif "same" in attrs or (plain and (v, wanted) in placed):
                self.results.append({"kind": "same", "result": attrs.get("same", placed.get((v, wanted)))})
            elif "base" in attrs:
                views.append((i, t.dtype))
                self.results.append({"kind": "view", "arg": attrs["base"], "shape": t.shape, "strides": wanted, "offset": attrs.get("offset", 0)})
            elif v.defining_op is not None and v.defining_op.name == "tensor.alias" and t.layout == wanted:
                source = v.defining_op.operands[0]
                key = (source, tuple(_tensor(source).layout))
                if key not in self.bases:
                    self.bases[key] = viewed[key] = self._output(source, key[1]).index
                self.results.append({"kind": "view", "arg": self.bases[key], "shape": t.shape, "strides": wanted,
                                     "offset": v.defining_op["offset"]})
            elif plain and isinstance(v, BlockArg) and v not in self.assigned and t.layout == wanted:
                self.results.append({"kind": "input", "arg": v.index})
            else:
                placed[v, wanted] = i
                # Two results of one value share no memory, but views of it may have come first.
                arg = viewed.pop((v, wanted), None)
                if arg is None:
                    arg = self._output(v, wanted).index
                    self.bases.setdefault((v, wanted), arg)
                self.results.append({"kind": "buffer", "arg": arg})
        for i, dtype in views:  # the base may come later among the results
            base = self.results[self.results[i]["arg"]]
            if base["kind"] not in ("buffer", "input"):
                raise IRError(f"result {i} is a view of result {self.results[i]['arg']}, which has no memory of its own")
            made = self.block.args[base["arg"]].type
            if isinstance(made, BufferType) and dtype != made.dtype:
                self.results[i]["dtype"] = dtype.name
            self.results[i]["arg"] = base["arg"]
        while self.results and self._is_hidden(len(self.results) - 1):
            self.results.pop()

    def _is_hidden(self, i: int) -> bool:
        attrs = self.func["result_attrs"]
        return i < len(attrs) and bool(attrs[i].get("hidden"))

    def _output(self, v: Value, strides: tuple[Dim, ...]) -> BlockArg:
        """A new output buffer that will hold `v`."""
        t = _tensor(v)
        out = self._argument(t.with_strides(strides), {"kind": "output"}, v.name)
        op = v.defining_op
        if op is None:
            self.first.append((out, self.buffer[v]))
            return out
        direct = op.name in ("loop", "tensor.extern", "tensor.library") or (op.name == "tile.launch" and not self._is_cached(op))
        if direct and v not in self.home and same_layout(t.shape, t.layout, strides):
            self.home[v] = out
            if op.name == "tensor.extern":
                self.arg_attrs[out.index] = {"kind": "output", "extern": True}
        else:
            self.after[op].append((out, v))
        return out

    def _argument(self, t: TensorType, attrs: dict[str, Any], name: str) -> BlockArg:
        self.arg_attrs.append(attrs)
        return self.block.add_arg(_buffer_type(t), name)

    # -- assignments

    def _place_assignments(self) -> None:
        for target, v in self.assigned.items():
            if isinstance(v, BlockArg):
                self._assign(target, v, None)
            elif self._may_write_directly(target, v):
                self.home[v] = self.block.args[target.index]  # type: ignore[attr-defined]
            else:
                self._assign(target, v, v.defining_op)

    def _readers(self, v: Value) -> list[Operation]:
        return [op for op in v.users if op in self.position and op.name != "tensor.assign"]

    def _assign(self, target: Value, v: Value, made: Operation | None) -> None:
        """A copy once `v` exists and nobody reads the old contents any more."""
        t, kept = self.buffer[target], self._readers(target)
        last = max([*kept, *([made] if made else [])], key=self.position.__getitem__, default=None)
        if v in self.assigned:  # an argument whose own contents are about to change
            if v not in self.saved:
                self.saved[v] = self._allocate(_tensor(v))
                self.first.insert(0, (self.saved[v], self.buffer[v]))
            source = self.saved[v]
            self.buffer[source] = source
            v = source
        if last is None:
            self.first.append((t, self.buffer[v]))
        else:
            self.after[last].append((t, v))

    def _may_write_directly(self, target: Value, v: Value) -> bool:
        op = v.defining_op
        if op is None or op.name != "tile.launch" or self._is_cached(op) or v in self.home:
            return False
        t = _tensor(v)
        if not same_layout(t.shape, t.layout, _tensor(target).layout):
            return False
        at = self.position[op]
        if any(self.position[r] > at for r in self._readers(target)):
            return False
        out = len(op.operands) + v.index  # type: ignore[attr-defined]
        pairs = {tuple(p) for p in self.kernels[op["kernel"].name]["inplace"]} if op["kernel"].name in self.kernels else set()
        return all((i, out) in pairs for i, x in enumerate(op.operands) if x is target)

    # -- ops

    def _updates(self, op: Operation) -> list[tuple[Value, Value]]:
        """(operand, result) pairs of a launch whose result starts with the operand's elements."""
        kernel = self.kernels.get(op["kernel"].name) if op.name == "tile.launch" else None
        n = len(op.operands)
        return [(op.operands[i], op.results[j - n]) for i, j in kernel["updates"]] if kernel is not None else []

    def _share_updates(self) -> None:
        """What a launch updates is made where the result goes, if nobody else wants it: then nothing is copied."""
        returned = set(self._returned_values())
        for op in reversed(self.ops):
            for source, result in self._updates(op):
                maker = source.defining_op
                if maker is None or maker.name not in ("tile.launch", "tensor.library") or self._is_cached(maker):
                    continue
                if len(source.uses) != 1 or source in self.home or source in returned or _tensor(source).layout != _tensor(result).layout:
                    continue
                home = self.home.get(result)
                if home is None:
                    self.taken[result] = source
                elif self.arg_attrs[home.index].get("kind") == "output":
                    self.home[source] = home
            self._share_summand(op, returned)

    def _share_summand(self, op: Operation, returned: set[Value]) -> None:
        """What a product is added to is made in the returned sum's memory, if it is there for that alone."""
        if op.name != "tensor.library" or "c" not in op["roles"] or op.result not in self.home:
            return
        source, home = op.operands[op["roles"].index("c")], self.home[op.result]
        maker = source.defining_op
        if maker is None or maker.name not in ("tile.launch", "tensor.library") or self._is_cached(maker) or len(source.uses) != 1:
            return
        same = _tensor(source).dtype == _tensor(op.result).dtype and _tensor(source).layout == _tensor(op.result).layout
        if same and source not in self.home and source not in returned and self.arg_attrs[home.index].get("kind") == "output":  # type: ignore[attr-defined]
            self.home[source] = home

    def _emit_constant(self, op: Operation) -> None:
        self.buffer[op.result] = self.b.op("host.constant", type=_buffer_type(_tensor(op.result)), value=op["value"])

    def _emit_launch(self, op: Operation) -> None:
        cached = self._is_cached(op)
        for r in op.results:
            if r in self.home:
                self.buffer[r] = self.home[r]
            elif r in self.taken:
                self.buffer[r] = self.buffer[self.taken[r]]
            elif cached:
                t = _tensor(r)
                self.buffer[r] = self.b.op("host.persistent", type=_buffer_type(t), id=self.persistent, bytes=storage_bytes(t),
                                           guards=tuple(sorted(self.guards[r])))
                self.persistent += 1
            else:
                self.buffer[r] = self._allocate(_tensor(r))
            self.buffer[r].name = self.buffer[r].name or r.name
        for source, target in self._updates(op):
            if self.buffer[source] is not self.buffer[target]:
                self._copy(self.buffer[target], self.buffer[source])
        attrs = {"kernel": op["kernel"], "outputs": len(op.results), **({"cached": True} if cached else {})}
        self.b.create("host.launch", [self.buffer[v] for v in (*op.operands, *op.results)], attrs)

    def _emit_loop(self, op: Operation) -> None:
        """Its operands as the body's arguments lie in memory; memory planning adds the scratch memory."""
        carried, sliced = op["carried"], op["sliced"]
        body = self.functions[op["body"].name].body.args
        given = []
        for i, v in enumerate(op.operands):
            t, wanted = _tensor(v), body[i].type.layout  # type: ignore[attr-defined]
            if carried <= i < carried + sliced:
                wanted = contiguous_strides(t.shape)
            if not same_layout(t.shape, t.layout, wanted):
                copy = self._allocate(TensorType(t.shape, t.dtype, wanted))
                self._copy(copy, self.buffer[v])
                given.append(copy)
            else:
                given.append(self.buffer[v])
        for r in op.results:
            self.buffer[r] = self.home[r] if r in self.home else self._allocate(_tensor(r))
            self.buffer[r].name = self.buffer[r].name or r.name
        attrs = {k: op[k] for k in ("body", "carried", "sliced", "reversed_operands", "reversed_results")}
        self.b.create("host.loop", [*given, *(self.buffer[r] for r in op.results)],
                      {**attrs, "trips": _tensor(op.operands[carried]).shape[0], "outputs": len(op.results)})

    def _emit_library(self, op: Operation) -> None:
        """The call also gets temporary memory to work in: part of the plan like any other."""
        t = _tensor(op.result)
        self.buffer[op.result] = self.home[op.result] if op.result in self.home else self._allocate(t)
        self.buffer[op.result].name = self.buffer[op.result].name or op.result.name
        shape = library_shape(op, self.ctx.target)
        workspace = self._allocate(TensorType((shape["workspace"] + WORKSPACE_SLACK,), DTYPES["u8"]))
        workspace.name = "workspace"
        buffers = [*(self.buffer[v] for v in op.operands), self.buffer[op.result], workspace]
        attrs = {"library": op["library"], "roles": (*op["roles"], "d", "workspace"), "outputs": 2, "shape": shape, "why": op["why"]}
        self.b.create("host.library", buffers, attrs)

    def _emit_extern(self, op: Operation) -> None:
        for r in op.results:
            self.buffer[r] = self.home[r] if r in self.home else self._argument(_tensor(r), {"kind": "extern"}, r.name)
        attrs = {k: op.attributes[k] for k in _EXTERN_ATTRS if k in op.attributes}
        self.b.create("host.extern", [self.buffer[v] for v in (*op.operands, *op.results)],
                      {**attrs, "inputs": len(op.operands)})

    def _emit_alias(self, op: Operation) -> None:
        attrs = {"offset": op["offset"]} if op["offset"] else {}
        self.buffer[op.result] = self.b.op("host.view", self.buffer[op.operands[0]], type=_buffer_type(_tensor(op.result)), **attrs)

    def _emit_assign(self, op: Operation) -> None:
        """Nothing here: the write is a copy elsewhere, or the launch that makes the value."""

    def _allocate(self, t: TensorType) -> Value:
        return self.b.op("host.alloc", type=_buffer_type(t), bytes=storage_bytes(t))

    def _copy(self, target: Value, source: Value) -> None:
        self.b.create("host.copy", [source, target])

    def _replace(self) -> None:
        for op in self.old:
            op.drop_references()
        region = self.func.region
        region.blocks = [self.block]
        self.block.parent = region
        self.func.attributes["arg_attrs"] = tuple(self.arg_attrs)
        self.func.attributes["result_attrs"] = tuple(self.results)


def _shares(attrs: dict[str, Any]) -> bool:
    """Whether a result needs no memory and no value of its own."""
    return any(k in attrs for k in ("alias_of_arg", "same", "base"))


def _is_known_int(attrs: dict[str, Any]) -> bool:
    return attrs.get("kind") == "int" and attrs.get("expr") is not None


_EMITTERS = {"loop": _Bufferizer._emit_loop, "tensor.constant": _Bufferizer._emit_constant, "tile.launch": _Bufferizer._emit_launch,
             "tensor.extern": _Bufferizer._emit_extern, "tensor.library": _Bufferizer._emit_library, "tensor.assign": _Bufferizer._emit_assign,
             "tensor.alias": _Bufferizer._emit_alias}
