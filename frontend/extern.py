"""`graph.extern`: an ATen (or custom) operator called as it is, because no table row takes it.

Encoding of `args` (a tuple, positional) and `kwargs` (a dictionary), as the executor decodes them:

    None, bool, int, float, str     themselves
    list or tuple                   a tuple of encodings (decoded as a list)
    {operand = i}                   tensor operand i of the op
    {expr = e}                      a size expression, evaluated to a Python int
    {number = i}                    the Python number that the 0-d operand i holds
    {dtype = "f32"}                 torch.dtype, by aicc's name; "torch.qint8" for one that aicc has no name for
    {device = "cuda:0"}             torch.device
    {layout = "torch.strided"}      torch.layout
    {memory_format = "torch.contiguous_format"}
    {complex = [re, im]}            a Python complex number

`target` is `namespace.op.overload` under torch.ops. `operand_strides` has one entry per operand: the strides, in elements, that
the operand has in eager, or none for row-major; the executor hands over memory laid out so. Result types carry the strides
that the operator's own results have. `result_kinds` has one entry per element that the operator returns (one for a single
value): 'tensor' and 'int' (a 0-d i64) are SSA results, in order; 'none' is not (it is None, or nobody reads it). It is empty
for an operator called for its effect. `defines` maps each unbacked symbol (u0, ...) to [result, dimension] where its value is
read off: the index of the SSA result, and dimension -1 for the value of an 'int', -2 for the place of a view in its operand: the
elements of operand 0 before it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..ir.attributes import Attribute
from ..ir.core import Value
from ..ir.expr import Dim, Expr, free_symbols
from ..ir.types import DTYPES, TensorType
from .context import Context, SymScalar
from .dtypes import FROM_TORCH
from .errors import Unsupported

__all__ = ["lower_extern", "make_extern"]


class _Encoder:
    """Collects operands, with the strides that they have in eager, while it encodes arguments."""

    def __init__(self, c: Context, env: Mapping[fx.Node, Any]):
        self.c = c
        self.env = env
        self.operands: list[Value] = []
        self.strides: list[tuple[Dim, ...] | None] = []

    def encode(self, x: Any) -> Attribute:
        if isinstance(x, fx.Node):
            value = self.env[x]
            if isinstance(value, Value) and not isinstance(x.meta.get("val"), torch.Tensor):
                return self._number(value)
            return self._operand(value, x) if isinstance(value, Value) else self.encode(value)
        if isinstance(x, SymScalar):
            return self._number(self.c.number(x))
        if x is None or isinstance(x, (bool, int, float, str)):
            return x
        if isinstance(x, Expr):
            return {"expr": x}
        if isinstance(x, (list, tuple)):
            return tuple(self.encode(y) for y in x)
        for kind, encode in _ENCODINGS:
            if isinstance(x, kind):
                return encode(x)
        raise Unsupported(f"an argument of type {type(x).__name__} for an operator that is not compiled")

    def _number(self, value: Value) -> Attribute:
        self.operands.append(value)
        self.strides.append(None)
        return {"number": len(self.operands) - 1}

    def _operand(self, value: Value, node: fx.Node) -> Attribute:
        fake = node.meta.get("val")
        assert isinstance(value.type, TensorType)
        strides = self.c.dims(fake.stride()) if isinstance(fake, torch.Tensor) else None
        self.operands.append(value)
        self.strides.append(None if strides is None else value.type.with_strides(strides).strides)
        return {"operand": len(self.operands) - 1}


_ENCODINGS: tuple[tuple[type, Callable[[Any], Attribute]], ...] = (
    (torch.dtype, lambda x: {"dtype": FROM_TORCH[x].name if x in FROM_TORCH else str(x)}),
    (torch.device, lambda x: {"device": str(x)}),
    (torch.layout, lambda x: {"layout": str(x)}),
    (torch.memory_format, lambda x: {"memory_format": str(x)}),
    (complex, lambda x: {"complex": (x.real, x.imag)}),
)


def lower_extern(c: Context, node: fx.Node, env: Mapping[fx.Node, Any], reason: str, *,
                 call: tuple[Any, tuple[Any, ...]] | None = None) -> Any:
    """The node as a `graph.extern`; gives its value, or a tuple when the operator returns several. `env`: values of nodes.

    `call` names the operator and its positional arguments where they are not the node's own.
    """
    target, arguments = call or (node.target, node.args)
    encoder = _Encoder(c, env)
    args, kwargs = encoder.encode(arguments), {k: encoder.encode(v) for k, v in node.kwargs.items()}
    several = isinstance(c.val, (list, tuple))
    returned = tuple(c.val) if several else () if c.val is None else (c.val,)
    types: list[TensorType] = []
    kinds: list[str] = []
    read = {user.args[1] for user in node.users if user.target is operator.getitem and user.users} if several else {0}
    for i, r in enumerate(returned):
        if i not in read:
            kinds.append("none")
        elif isinstance(r, torch.Tensor):
            t = c.type_of(r).with_strides(c.dims(r.stride()))
            types.append(replace(t, dtype=DTYPES["i64"]) if i and str(target) in _COUNTING else t)
            kinds.append("tensor")
        elif r is None:
            kinds.append("none")
        elif isinstance(r, (int, torch.SymInt)) and not isinstance(r, bool):
            types.append(TensorType((), DTYPES["i64"]))
            kinds.append("int")
        else:
            raise Unsupported(f"a result of type {type(r).__name__} from an operator that is not compiled")
    random = torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
    given = [r for r, k in zip(returned, kinds, strict=True) if k != "none"]
    values = make_extern(c, str(target), encoder.operands, args, kwargs, types, kinds, strides=tuple(encoder.strides),
                         random=random, reason=reason, defines=_defined(c, given, _viewed(node, target)))
    results = iter(values)
    made = tuple(None if k == "none" else next(results) for k in kinds)
    return made if several else made[0] if made else None


_COUNTING = ("aten._unique2.default", "aten.unique_consecutive.default", "aten.unique_dim.default")
"""Operators whose results but the first are int64, though torch 2.11's tracing gives the element type of the first."""


def make_extern(c: Context, target: str, operands: list[Value], args: tuple[Any, ...], kwargs: dict[str, Any],
                types: list[TensorType], kinds: list[str], *, strides: tuple[Any, ...] = (), random: bool = False,
                reason: str = "", defines: dict[str, Any] | None = None) -> list[Value]:
    """A `graph.extern` from encoded arguments."""
    attrs: dict[str, Any] = {"target": target, "args": args, "result_kinds": tuple(kinds)}
    if kwargs:
        attrs["kwargs"] = kwargs
    if any(s is not None for s in strides):
        attrs["operand_strides"] = strides
    if random:
        attrs["random"] = True
    if reason:
        attrs["reason"] = reason
    if defines:
        attrs["defines"] = defines
    return list(c.b.create("graph.extern", operands, attrs, types).results)


def _viewed(node: fx.Node, target: Any) -> bool:
    """Whether the results are views of the first argument, which begins where its memory does: then offsets in it are theirs in the memory."""
    first = node.args[0].meta.get("val") if node.args and isinstance(node.args[0], fx.Node) else None
    return isinstance(target, torch._ops.OpOverload) and target.is_view and isinstance(first, torch.Tensor) and (
        statically_known_true(first.storage_offset() == 0))


def _defined(c: Context, returned: Sequence[Any], views: bool) -> dict[str, Any]:
    """The unbacked symbols that first appear in these results, which may be views. Unsupported if one is not a size or value of its own."""
    found: dict[str, Any] = {}
    wanted: set[str] = set()
    for i, r in enumerate(returned):
        sizes = enumerate(c.dims(r.shape)) if isinstance(r, torch.Tensor) else [(-1, c.dim(r))] if r is not None else []
        for axis, e in sizes:
            fresh = {s for s in free_symbols(e) if s.startswith("u")} - c.defined
            wanted |= fresh
            if fresh and str(e) in fresh:
                found.setdefault(str(e), (i, axis))
        if views and isinstance(r, torch.Tensor) and isinstance(offset := r.storage_offset(), torch.SymInt):
            fresh = {str(offset.node.expr)} - c.defined
            if any(str(s) in fresh and str(s).startswith("u") for s in offset.node.expr.free_symbols):  # one symbol, and nothing else
                found.setdefault(str(c.dim(offset)), (i, -2))
    if wanted - found.keys():
        raise Unsupported(f"the sizes {', '.join(sorted(wanted - found.keys()))} cannot be read off the results")
    c.defined |= found.keys()
    return found
