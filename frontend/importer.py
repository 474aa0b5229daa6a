"""FX graphs of functional ATen operators, as AOTAutograd makes them, to a module at the graph level.

    module = import_graph(gm, arg_kinds=["param", "input"])

Conventions of the function that comes out:
- Block arguments are the tensor placeholders, in order; their types carry strides. `arg_attrs[i]` has the FX `name`, the
  `kind`, the `position` among all placeholders (what the caller passes), and the `device` when it is not the CPU. An argument with
  `number = true` is passed as a Python number that is no size (a float, or an int that may be negative).
- `symbol_args` has one entry {position, expr} per other placeholder: `expr` is the size that is passed there (a bare symbol is
  thereby defined), or none when nothing is read from it. `symbol_sources` says where the remaining symbols are read off tensor
  arguments: symbol -> [block argument, dimension], or [block argument, dimension, "stride"].
- `result_attrs` has one entry per FX output: {kind = "tensor", strides} (strides absent: row-major), {kind = "int", expr} or
  {kind = "none"}; an "int" without `expr` is the number in a 0-d tensor. `return` has an operand for each tensor and each int (a
  0-d i64), none for a "none". A tensor result is in memory of its own, unless it has one of: `alias_of_arg` = k, it is that block
  argument itself, after the assignments; `view` = {arg, offset, shape, strides}, it is memory of that block argument, `offset`
  elements on (its value is for the interpreter); `same` = j, it is result j itself; `base` = j and `offset`, it is a view of result j
  (perhaps with another element type), that many of its own elements on. With `alias_results`, the last entries may be
  {kind = "tensor", hidden = true}: memory that several results are views of though the program does not return it.
- Values keep their FX names. Every op has the location of its node.

A `scan` of torch is a `loop` of a private function, which follows the function in the module; its arguments have no attributes.
A node whose row declines becomes a `graph.extern`. UnsupportedError means that the graph as a whole cannot be imported.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from ..ir.attributes import Dense, SymbolRef
from ..ir.builder import Builder, make_func, make_module
from ..ir.core import BlockArg, Operation, OpResult, Value
from ..ir.expr import Expr, free_symbols
from ..ir.types import TensorType
from .context import Context, SymScalar
from .dtypes import from_torch
from .errors import Unsupported, UnsupportedError
from .extern import lower_extern
from .location import location_of
from .ops import COMPLEX, TABLE
from .scan import body_of, import_body, is_scan
from .symbols import SymbolTable

__all__ = ["externs", "import_graph"]

_TENSOR_OF = {torch.SymInt: torch.int64, torch.SymFloat: torch.float64, torch.SymBool: torch.bool}
_SYMBOLIC = tuple(_TENSOR_OF)
_NO_EFFECT = {"aten._assert_tensor_metadata.default", "aten.sym_constrain_range.default", "aten.sym_constrain_range_for_size.default"}
"""Checks that hold whenever the guards of the graph hold and sizes are in their ranges, which the executor sees to."""
_OTHER_VALUES = {"aten._conj.default", "aten._neg_view.default"}
"""Views for torch, which notes on the tensor that its memory holds other values; here they are computed."""
_READS_NUMBER = {"aten._local_scalar_dense.default", "aten.item.default"}


def import_graph(gm: fx.GraphModule, *, name: str = "main", arg_kinds: Sequence[str] | None = None, alias_results: bool = False) -> Operation:
    """A module with one function `name` that computes what `gm` does.

    `arg_kinds` gives 'param', 'buffer', 'input' or 'constant' for each placeholder of `gm` (default: all 'input'). `alias_results`: results
    that are views of one intermediate value share its memory as they do in eager, also when the value itself is not returned.
    Nodes need `meta["val"]` (fake tensors). Raises UnsupportedError, naming the node, if the graph cannot be imported.
    """
    module, block = make_module("graph")
    return _Importer(gm, block, name, arg_kinds, alias_results).run(module)


class _Importer:
    def __init__(self, gm: fx.GraphModule, block: Any, name: str, arg_kinds: Sequence[str] | None, alias_results: bool):
        self.gm = gm
        self.block = block
        self.symbols = SymbolTable()
        self.func, self.body = make_func(block, name, ())
        self.c = Context(Builder.at_end(self.body), self.symbols)
        self.env: dict[fx.Node, Any] = {}
        self.assigned: dict[Any, BlockArg] = {}  # copy_ node -> the argument that it writes
        self.arg_kinds = arg_kinds
        self.alias_results = alias_results

    def run(self, module: Operation) -> Operation:
        self.fill()
        return module

    def fill(self) -> Operation:
        """Imports the graph into the function, and gives it."""
        self._placeholders()
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                continue
            try:
                self._node(node)
            except Unsupported as e:
                raise UnsupportedError(f"{node.format_node() or node.name}: {e}\n  at {location_of(node)}") from e
        self._symbols()
        return self.func

    # -- arguments

    def _placeholders(self) -> None:
        nodes = [n for n in self.gm.graph.nodes if n.op == "placeholder"]
        kinds = self.arg_kinds or ["input"] * len(nodes)
        if len(kinds) != len(nodes):
            raise ValueError(f"arg_kinds has {len(kinds)} entries for {len(nodes)} placeholders")
        arg_attrs: list[dict[str, Any]] = []
        symbol_args: list[dict[str, Any]] = []
        for position, node in enumerate(nodes):
            val = node.meta.get("val")
            try:
                if isinstance(val, torch.Tensor) and not _is_token(node):
                    self._tensor_argument(node, val)
                    where = {} if val.device.type == "cpu" else {"device": str(val.device)}
                    arg_attrs.append({"name": node.name, "kind": kinds[position], "position": position, **where})
                    continue
                expr = self._number(val) if isinstance(val, (int, *_SYMBOLIC)) else None
                if isinstance(expr, SymScalar):
                    self._number_argument(node, expr)
                    arg_attrs.append({"name": node.name, "kind": "input", "position": position, "number": True})
                    continue
                if expr is None and node.users and val is not None and not _is_token(node):
                    raise Unsupported(f"an argument of type {type(val).__name__}")
                self.env[node] = expr
                symbol_args.append({"position": position, "expr": expr})
            except Unsupported as e:
                raise UnsupportedError(f"argument '{node.name}': {e}") from e
        self.func.attributes["arg_attrs"] = tuple(arg_attrs)
        if symbol_args:
            self.func.attributes["symbol_args"] = tuple(symbol_args)
        self._sources()

    def _number_argument(self, node: fx.Node, number: SymScalar) -> None:
        """A Python number that is no size: a 0-d tensor, which the executor makes."""
        self.env[node] = number
        dtype = from_torch(_TENSOR_OF[type(number.value)])
        self.c.numbers[str(number.value.node.expr)] = self.body.add_arg(TensorType((), dtype), node.name)

    def _tensor_argument(self, node: fx.Node, val: torch.Tensor) -> None:
        if val.layout != torch.strided or val.is_quantized:
            raise Unsupported(f"a tensor of layout {val.layout}")
        if val.is_neg() and not val.is_complex():  # the executor sees to complex ones
            raise Unsupported("a tensor whose memory holds the negative of its values")
        t = self.c.type_of(val).with_strides(self.c.dims(val.stride()))
        self.env[node] = self.body.add_arg(t, node.name)

    def _sources(self) -> None:
        """Finds where each symbol of the arguments is read off; those passed alone as an argument need nothing."""
        passed = {str(a["expr"]) for a in self.func["symbol_args"] if isinstance(a["expr"], Expr)}
        sources: dict[str, tuple[Any, ...]] = {}
        for arg in self.body.args:
            assert isinstance(arg.type, TensorType)
            for kind, sizes in ((), arg.type.shape), (("stride",), arg.type.layout):
                for i, e in enumerate(sizes):
                    text = str(e)
                    if isinstance(e, Expr) and text not in passed and free_symbols(e) == {text}:
                        sources.setdefault(text, (arg.index, i, *kind))
        used = {s for arg in self.body.args for e in (*arg.type.shape, *arg.type.layout) for s in free_symbols(e)}  # type: ignore[attr-defined]
        used |= {s for a in self.func["symbol_args"] if a["expr"] is not None for s in free_symbols(a["expr"])}
        lost = used - passed - sources.keys()
        if lost:
            raise UnsupportedError(f"the sizes {', '.join(sorted(lost))} cannot be read off any argument")
        if sources:
            self.func.attributes["symbol_sources"] = sources
        self.c.defined = used

    def _symbols(self) -> None:
        ranges = self.symbols.ranges()
        unknown = ranges.keys() - self.c.defined
        if unknown:
            raise UnsupportedError(f"the sizes {', '.join(sorted(unknown))} are not defined by any argument")
        if ranges:
            self.func.attributes["symbols"] = ranges

    # -- nodes

    def _node(self, node: fx.Node) -> None:
        self.c.node, self.c.val = node, node.meta.get("val")
        self.c.b.location = location_of(node)
        if node.op == "output":
            self._output(node)
        elif node.op == "get_attr":
            self.env[node] = None if all(is_scan(user) for user in node.users) else self._constant(node)
        elif is_scan(node):
            self.env[node] = self._scan(node)
        elif node.op != "call_function":
            raise Unsupported(f"'{node.op}' nodes")
        elif node.target is operator.getitem:
            self.env[node] = self.env[node.args[0]][node.args[1]]  # type: ignore[index]
        elif str(node.target) in _NO_EFFECT or (str(node.target) == "aten._assert_scalar.default" and self._is_assured(node.args[0])):
            self.env[node] = None
        elif node.target is torch.ops.higher_order.with_effects:
            self.env[node] = self._ordered(node)
        elif isinstance(self.c.val, (*_SYMBOLIC, int, float)) and str(node.target) not in _READS_NUMBER:
            self.env[node] = self._number(self.c.val)
        elif isinstance(self.c.val, (list, tuple)) and all(isinstance(v, (*_SYMBOLIC, int, float)) for v in self.c.val):
            self.env[node] = tuple(self._number(v) for v in self.c.val)
        else:
            self.env[node] = self._operator(node)
        value = self.env.get(node)
        if isinstance(value, OpResult):
            value.name = value.name or node.name

    def _is_assured(self, condition: Any) -> bool:
        """Whether a condition that the program asserts follows from guards and the ranges of symbols (or is none that can be computed)."""
        val = condition.meta.get("val") if isinstance(condition, fx.Node) else None
        if not isinstance(val, torch.SymBool):
            return True
        ranges, expr = self.symbols.bounds, val.node.expr
        read = [s for s in expr.free_symbols if s.name.startswith(("u", "zuf"))]
        if not read:
            return True
        if any(s.name not in ranges for s in expr.free_symbols):
            return False
        known = {s: ValueRanges(ranges[s.name][0], int_oo if ranges[s.name][1] is None else ranges[s.name][1]) for s in expr.free_symbols}
        found = bound_sympy(expr, known)
        return bool(found.is_singleton() and found.lower == sympy.true)

    def _number(self, val: Any) -> Any:
        """A Python number, a size, or (for what is no polynomial of sizes) a symbolic scalar."""
        if not isinstance(val, _SYMBOLIC):
            return val
        if isinstance(val, torch.SymInt):
            try:
                return self.c.dim(val)
            except Unsupported:
                return SymScalar(val)
        return SymScalar(val)

    def _argument(self, a: Any) -> Any:
        if isinstance(a, fx.Node):
            return self.env[a]
        if isinstance(a, (list, tuple)):
            return [self._argument(x) for x in a]
        if isinstance(a, _SYMBOLIC):
            return self._number(a)
        return a

    def _operator(self, node: fx.Node) -> Any:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload):
            raise Unsupported(f"the operator {target}")
        if str(target) == "aten.copy_.default":
            return self._assign(node)
        if target._schema.is_mutable:
            raise Unsupported(f"'{target}' changes its arguments")
        if str(target) in _READS_NUMBER and isinstance(self._number(self.c.val), SymScalar):
            return self._read_number(node)
        row = TABLE.get(str(target))
        last = self.body.last
        if row is None:
            reason = f"no lowering for '{target}'"
        elif str(target) not in COMPLEX and _has_complex(node):
            reason = "complex numbers"
        else:
            try:
                args, kwargs = _bind(target, self._argument(node.args), {k: self._argument(v) for k, v in node.kwargs.items()})
                return self._checked(row(self.c, *args, **kwargs))
            except Unsupported as e:
                reason = str(e)
            self._erase_after(last)
        made = lower_extern(self.c, node, self.env, reason)
        return self._number(self.c.val) if str(target) in _READS_NUMBER else made

    def _read_number(self, node: fx.Node) -> Value:
        """The number in a tensor of one element, where it is no size: it stays a 0-d tensor (i64, f64 or i1)."""
        x = self._argument(node.args[0])
        value = self.c.reshape(self.c.cast(x, from_torch(_TENSOR_OF[type(self.c.val)])), ())
        self.c.numbers[str(self.c.val.node.expr)] = value
        return value

    def _ordered(self, node: fx.Node) -> Any:
        """with_effects(token, operator, ...): an operator called for its effect. Externs stay in order, so that the token is only handed on."""
        token, target, *args = node.args
        if not isinstance(target, torch._ops.OpOverload):
            raise Unsupported(f"the operator {target} with effects")
        _, *returned = self.c.val
        self.c.val = tuple(returned) if len(target._schema.returns) != 1 else returned[0]
        if any(isinstance(r, torch.Tensor) for r in returned) or target._schema.is_mutable:
            raise Unsupported(f"'{target}', which has effects and results")
        made = lower_extern(self.c, node, self.env, "called for its effect", call=(target, tuple(args)))
        return (self.env[token], *(made if isinstance(made, tuple) else (made,)))  # type: ignore[index]

    def _scan(self, node: fx.Node) -> tuple[Any, ...]:
        """scan(body, init, xs, additional inputs): a loop along dimension 0 of every one of xs."""
        _, init, xs, more = node.args
        carried, sliced, rest = ([self._argument(a) for a in given] for given in (init, xs, more))  # type: ignore[union-attr]
        invariant = [v for v in rest if isinstance(v, Value)]  # sizes are known in the body by name
        if not sliced or not all(isinstance(v, Value) for v in (*carried, *sliced)) or any(isinstance(v, SymScalar) for v in rest):
            raise Unsupported("a scan over nothing, or of numbers")
        location = self.c.b.location
        name = f"{self.func['sym_name']}_step{sum(op.name == 'func' for op in self.block) - 1}"
        body = import_body(body_of(self.gm, node), self.block, name, carried, lambda gm, block, name: _Importer(gm, block, name, None, False).fill())
        unknown = set(body["symbols"]) - self.c.defined
        if unknown:
            raise Unsupported(f"a scan whose body needs the sizes {', '.join(sorted(unknown))}, which are not defined outside")
        whole, rows = [v.type for v in (*carried, *invariant)], [v.type for v in sliced]
        given = [(t.shape, t.dtype) for t in whole]
        given[len(carried):len(carried)] = [(t.shape[1:], t.dtype) for t in rows]
        if given != [(a.type.shape, a.type.dtype) for a in body.body.args]:  # type: ignore[attr-defined]
            raise Unsupported("a scan whose body takes other types than it is given")
        body.attributes["arg_attrs"] = ({"kind": "input"},) * (len(carried) + len(sliced)) + ({"kind": "param"},) * len(invariant)
        self.c.b.location = location
        trips, returned = sliced[0].type.shape[0], [v.type for v in body.body.terminator.operands]
        types = [TensorType(t.shape, t.dtype) for t in returned[:len(carried)]]  # type: ignore[attr-defined]
        types += [TensorType((trips, *t.shape), t.dtype) for t in returned[len(carried):]]  # type: ignore[attr-defined]
        made = self.c.b.create("loop", [*carried, *sliced, *invariant],
                               {"body": SymbolRef(name), "carried": len(carried), "sliced": len(sliced)}, types)
        return tuple(made.results)

    def _checked(self, made: Any) -> Any:
        """What a row gave, with the shapes that torch derived; Unsupported when it is not what torch says the node gives."""
        val = self.c.val
        if isinstance(val, (list, tuple)):
            if len(made) != len(val):
                raise Unsupported(f"the lowering gives {len(made)} results for {len(val)}")
            return tuple(self._as(m, v) for m, v in zip(made, val, strict=True))
        return self._as(made, val)

    def _as(self, made: Any, val: Any) -> Any:
        if made is None or not isinstance(val, torch.Tensor):
            return made
        want, have = self.c.type_of(val), made.type
        if have.dtype != want.dtype or have.rank != want.rank or any(
                isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(have.shape, want.shape, strict=True)):
            raise Unsupported(f"the lowering gives {have} where torch gives {want}")
        fresh = {s for e in want.shape for s in free_symbols(e)} - self.c.defined
        if fresh:
            raise Unsupported(f"the size {', '.join(sorted(fresh))} is read off the operator's result")
        return made if have.shape == want.shape else self.c.reshape(made, want.shape)

    def _erase_after(self, last: Operation | None) -> None:
        op = self.body.last
        while op is not None and op is not last:
            before = op.prev
            op.erase()
            op = before

    def _assign(self, node: fx.Node) -> Value:
        target, source = (self.env[a] for a in node.args[:2])  # type: ignore[index]
        if not isinstance(target, BlockArg) or not isinstance(source, Value):
            raise Unsupported("copy_ onto something that is no argument of the graph")
        if node.args[0].meta["val"].is_conj():  # type: ignore[union-attr]
            raise Unsupported("copy_ onto a tensor whose memory holds the conjugate of its values")
        assert isinstance(target.type, TensorType)
        value = self.c.expand(self.c.cast(source, target.type.dtype), target.type.shape)
        self.c.b.create("graph.assign", [target, value])
        self.assigned[node] = target
        return value

    def _constant(self, node: fx.Node) -> Any:
        owner: Any = self.gm
        for part in str(node.target).split("."):
            owner = getattr(owner, part)
        if not isinstance(owner, torch.Tensor) or isinstance(owner, FakeTensor):
            raise Unsupported(f"the attribute '{node.target}' of type {type(owner).__name__}")
        self.c.val = owner if self.c.val is None else self.c.val
        dtype, shape = from_torch(owner.dtype), tuple(owner.shape)
        with unset_fake_temporarily(), torch.no_grad():  # a real tensor, while AOTAutograd traces with fake ones
            if owner.numel() == 1 and dtype.kind != "complex":
                return self.c.full(shape, owner.item(), dtype)
            raw = owner.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if owner.numel() else b""
        return self.c.b.op("graph.constant", type=TensorType(shape, dtype), value=Dense(dtype, shape, raw))

    # -- results

    def _output(self, node: fx.Node) -> None:
        given, self.c.closed = node.args[0], True
        asked = tuple(given) if isinstance(given, (list, tuple)) else (given,)
        returned = (*asked, *(_hidden_bases(asked) if self.alias_results else ()))
        values: list[Value] = []
        attrs: list[dict[str, Any]] = []
        for r in returned:
            value = self._argument(r)
            if value is None:
                attrs.append({"kind": "none"})
            elif isinstance(value, SymScalar) or (isinstance(value, Value) and isinstance(r.meta.get("val"), _SYMBOLIC)):
                values.append(self.c.number(value) if isinstance(value, SymScalar) else value)
                attrs.append({"kind": "int"})
            elif isinstance(value, Value):
                values.append(value)
                memory = self._result_memory(len(attrs), returned, value) or self._view_of_argument(r, value)
                attrs.append({"kind": "tensor", **self._result_strides(r, value), **memory})
                if len(attrs) > len(asked):
                    attrs[-1]["hidden"] = True
            elif isinstance(value, (int, Expr)) and not isinstance(value, bool):
                values.append(self.c.scalar(value, from_torch(torch.int64)))
                attrs.append({"kind": "int", "expr": value})
            else:
                raise Unsupported(f"a result of type {type(value).__name__}")
        self.func.attributes["result_attrs"] = tuple(attrs)
        self.c.b.create("return", values)

    def _view_of_argument(self, r: Any, value: Value) -> dict[str, Any]:
        """Where the result lies in the memory of an argument, if it is a view in a graph with symbolic sizes.

        AOTAutograd makes such results anew from the offset of what the graph returns when the view has symbolic arguments (the argument may itself
        begin inside of its memory), and by replaying the view otherwise: then a copy will do.
        """
        val = r.meta.get("val")
        if isinstance(value, BlockArg) or not isinstance(val, torch.Tensor) or not (self.symbols.ranges() or self.c.numbers):
            return {}
        for node, arg in self.env.items():
            if node.op != "placeholder":
                break
            base = node.meta.get("val")
            if isinstance(arg, BlockArg) and isinstance(base, torch.Tensor) and base.dtype == val.dtype and (
                    base.untyped_storage()._cdata == val.untyped_storage()._cdata
                    and (base.is_conj(), base.is_neg()) == (val.is_conj(), val.is_neg())):
                return {} if arg in self.assigned.values() else self._view(arg, val, base)
        return {}

    def _view(self, arg: BlockArg, val: torch.Tensor, base: torch.Tensor) -> dict[str, Any]:
        """`val`, which lies in the memory of `base`, as a view of `arg`."""
        offset = self.c.dim(val.storage_offset()) - self.c.dim(base.storage_offset())
        return {"view": {"arg": arg.index, "offset": offset, "shape": self.c.dims(val.shape), "strides": self.c.dims(val.stride())}}

    def _result_strides(self, r: Any, value: Value) -> dict[str, Any]:
        val = r.meta.get("val") if isinstance(r, fx.Node) else None
        if not isinstance(val, torch.Tensor):
            return {}
        assert isinstance(value.type, TensorType)
        strides = value.type.with_strides(self.c.dims(val.stride())).strides
        return {} if strides is None else {"strides": strides}


    def _result_memory(self, i: int, returned: Sequence[Any], value: Value) -> dict[str, Any]:
        """Whose memory result `i` shares, as eager has it: two results that are one value by chance do not share."""
        r = returned[i]
        if r in self.assigned:
            return {"alias_of_arg": self.assigned[r].index}
        if not isinstance(r, fx.Node) or not isinstance(r.meta.get("val"), torch.Tensor):
            return {}
        if r in returned[:i]:
            return {"same": returned.index(r)}
        root = _storage_root(r)
        if root.op == "placeholder":
            if not isinstance(value, BlockArg) or value in self.assigned.values() or not self._same_strides(r, value):
                return {}
            return {"alias_of_arg": value.index}
        arg = next((a for copy, a in self.assigned.items() if root in (copy, copy.args[1])), None)
        if arg is not None and (self.symbols.ranges() or self.c.numbers) and self._same_strides(root, arg):
            return self._view(arg, r.meta["val"], root.meta["val"])  # as in `_view_of_argument`: the argument has these contents in the end
        base = next((b for b in returned if isinstance(b, fx.Node) and _storage_root(b) is root and _covers(b, root)), None)
        if base is None or base is r:
            return {}
        val, whole = r.meta["val"], base.meta["val"]
        start = whole.storage_offset() * whole.element_size()
        if val.dtype != whole.dtype and not statically_known_true(start % val.element_size() == 0):
            return {}
        try:
            offset = self.c.dim(val.storage_offset() - start // val.element_size())
        except Unsupported:
            return {}
        return {"base": returned.index(base), "offset": offset}

    def _same_strides(self, r: fx.Node, value: BlockArg) -> bool:
        assert isinstance(value.type, TensorType)
        return value.type.layout == self.c.dims(r.meta["val"].stride())


def _storage_root(node: fx.Node) -> fx.Node:
    """The node that makes the memory that `node` is a view of; `node` itself when it is no view."""
    while node.op == "call_function":
        made = node.args[0] if node.target is operator.getitem else node
        if not isinstance(made, fx.Node) or not isinstance(made.target, torch._ops.OpOverload) or not made.target.is_view or (
                str(made.target) in _OTHER_VALUES):
            return node
        node = made.args[0]  # type: ignore[assignment]
    return node


def _hidden_bases(returned: Sequence[Any]) -> list[fx.Node]:
    """The values that are not returned, and that two or more results are views of, none of which has all the memory."""
    views: dict[fx.Node, set[fx.Node]] = {}
    for r in returned:
        if isinstance(r, fx.Node) and isinstance(r.meta.get("val"), torch.Tensor):
            views.setdefault(_storage_root(r), set()).add(r)
    return [root for root, found in views.items()
            if len(found) > 1 and root.op == "call_function" and not any(_covers(r, root) for r in found)
            and isinstance(root.meta.get("val"), torch.Tensor)]


def _covers(node: fx.Node, root: fx.Node) -> bool:
    """Whether `node` has all the memory of its root, so that every other view of the root is a view of it."""
    if node is root:
        return True
    val, whole = node.meta["val"], root.meta.get("val")
    if not isinstance(whole, torch.Tensor) or val.dtype != whole.dtype or not statically_known_true(val.numel() == whole.numel()):
        return False
    symbolic = any(isinstance(n, torch.SymInt) for n in (*val.shape, *val.stride()))
    return _is_row_major(val) if symbolic else _is_dense(val)


def _is_row_major(val: torch.Tensor) -> bool:
    """Whether the strides are known to be those of a row-major tensor, whatever the sizes; adds no guard."""
    step: Any = 1
    for size, stride in zip(reversed(val.shape), reversed(val.stride())):
        if not statically_known_true(size == 1) and not statically_known_true(stride == step):
            return False
        step = step * size
    return True


def _is_dense(val: torch.Tensor) -> bool:
    """Whether a tensor of constant sizes has no gaps and no element twice."""
    step = 1
    for stride, size in sorted(zip(val.stride(), val.shape, strict=True)):
        if size != 1:
            if stride != step:
                return False
            step *= size
    return True


def _has_complex(node: fx.Node) -> bool:
    """Whether complex numbers go into the node or come out."""
    def found(x: Any) -> bool:
        if isinstance(x, fx.Node):
            return found(x.meta.get("val"))
        if isinstance(x, (list, tuple)):
            return any(map(found, x))
        return isinstance(x, complex) or (isinstance(x, torch.Tensor) and x.is_complex())
    return found(node) or found(node.args) or found(tuple(node.kwargs.values()))


def _is_token(node: fx.Node) -> bool:
    """True for the arguments that order effects: fake tensors while tracing, None when the graph runs."""
    return any(user.target is torch.ops.higher_order.with_effects and user.args[0] is node for user in node.users)


def _bind(target: torch._ops.OpOverload, args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments with the schema's defaults filled in: all positional ones, then the keyword-only ones."""
    positional: list[Any] = list(args)
    named: dict[str, Any] = {}
    for i, a in enumerate(target._schema.arguments):
        if a.kwarg_only:
            named[a.name] = kwargs.get(a.name, a.default_value)
        elif i >= len(args):
            positional.append(kwargs.get(a.name, a.default_value))
    return positional, named


def externs(module: Operation) -> Iterator[Operation]:
    """The operators of `module` that are not compiled."""
    return (op for op in module.walk() if op.name == "graph.extern")


