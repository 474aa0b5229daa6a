"""`graph.extern` and `tensor.extern`: an ATen operator called as it is.

`target` is "namespace.name.overload". In `args` and `kwargs`, the dictionaries below stand for what no attribute can hold;
all else (numbers, strings, none, tuples) is itself. `frontend/extern.py` makes them:
  {operand = i}  tensor operand i             {expr = e}  the size `e`, an int         {complex = [re, im]}  a complex number
  {dtype = "f32"}  a torch dtype, by our name or as "torch.qint8"                     {device = "cpu"}  a torch device
  {layout = "torch.strided"}, {memory_format = "torch.channels_last"}                  the torch constant of that name
`operand_strides` has the strides (in elements) that each operand has in eager, or none for row-major.
`result_kinds` has one entry per value that the operator returns: a 'tensor' and an 'int' (as a 0-d i64) are results of
the op, 'none' is not. `defines` maps each new size symbol to [result, dimension] where it is read off; dimension -1 is the
value of an 'int', -2 the elements of operand 0 before the result, a view of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..core import IRError, Operation
from ..expr import Expr
from ..types import TensorType, dtype
from .context import Context

__all__ = ["extern"]

_DECODERS: dict[str, Callable[[Context, Any, Sequence[Any]], Any]] = {
    "operand": lambda ctx, v, xs: xs[v],
    "expr": lambda ctx, v, xs: ctx.dim(v),
    "dtype": lambda ctx, v, xs: _constant(v) if v.startswith("torch.") else ctx.numerics.dtype(dtype(v)),
    "device": lambda ctx, v, xs: torch.device("cpu"),  # the interpreter computes on the CPU whatever the target
    "memory_format": lambda ctx, v, xs: _constant(v),
    "layout": lambda ctx, v, xs: _constant(v),
    "complex": lambda ctx, v, xs: complex(*v),
}


def _constant(name: str) -> Any:
    """The constant of torch called `name`, with or without the prefix 'torch.'."""
    return getattr(torch, name.removeprefix("torch."))


def _decode(ctx: Context, value: Any, operands: Sequence[Any]) -> Any:
    if isinstance(value, Expr):
        return ctx.dim(value)
    if isinstance(value, tuple):
        return [_decode(ctx, v, operands) for v in value]
    if isinstance(value, Mapping):
        if len(value) != 1 or next(iter(value)) not in _DECODERS:
            raise IRError(f"an extern argument {dict(value)} is none of {{{'}, {'.join(_DECODERS)}}}")
        (kind, inner), = value.items()
        return _DECODERS[kind](ctx, inner, operands)
    return value


def _operator(target: str) -> Any:
    """torch.ops.<namespace>.<name>.<overload>; IRError if torch has no such operator."""
    found: Any = torch.ops
    for part in target.split("."):
        found = getattr(found, part, None)
        if found is None:
            raise IRError(f"torch has no operator '{target}' (no '{part}')")
    return found


def _laid_out(ctx: Context, op: Operation, operands: list[Any]) -> list[Any]:
    """The operands in the layout that they have in eager: some operators look at it."""
    given = op.attributes.get("operand_strides") or (None,) * len(operands)
    return [x.contiguous() if s is None else torch.empty_strided(x.shape, ctx.dims(s), dtype=x.dtype).copy_(x)
            for x, s in zip(operands, given, strict=True)]


def extern(ctx: Context, op: Operation, operands: list[Any]) -> list[Any]:
    """Calls the operator. When running in another precision, floats of its results are converted to it."""
    operands = _laid_out(ctx, op, operands)
    args = _decode(ctx, op["args"], operands)
    kwargs = {k: _decode(ctx, v, operands) for k, v in op["kwargs"].items()}
    out = _operator(op["target"])(*args, **kwargs)
    values = list(out) if isinstance(out, (tuple, list)) else [] if out is None else [out]
    kinds = op["result_kinds"] or tuple("tensor" if isinstance(v, torch.Tensor) else "none" for v in values)
    results = [v if kind == "tensor" else torch.tensor(v) for v, kind in zip(values, kinds) if kind != "none"]
    for symbol, (i, d) in op.attributes.get("defines", {}).items():
        if d == -2:
            ctx.symbols[symbol] = results[i].storage_offset() - operands[0].storage_offset()
        else:
            ctx.symbols[symbol] = int(results[i]) if d == -1 else results[i].shape[d]
    if ctx.numerics.precision is not None and len(results) == len(op.results):
        results = [ctx.to_type(v, r.type) if isinstance(r.type, TensorType) else v for v, r in zip(results, op.results)]
    return results
