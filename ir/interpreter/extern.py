"""`graph.extern` and `tensor.extern`: an ATen operator called as it is.

`target` is "namespace.name.overload". In `args` and `kwargs`, the dictionaries below stand for what no attribute can hold;
all else (numbers, strings, none, tuples) is itself, with size expressions evaluated:
  {operand = i}  tensor operand i           {expr = e}       the size `e`, an int
  {dtype = "f32"}  a torch dtype            {device = "cpu"}  a torch device
  {memory_format = "channels_last"}, {layout = "strided"}     the torch constant of that name
`result_kinds` has one entry per result of the operator: only those of kind 'tensor' are results of the op.
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
    "dtype": lambda ctx, v, xs: ctx.numerics.dtype(dtype(v) if isinstance(v, str) else v),
    "device": lambda ctx, v, xs: torch.device("cpu"),  # the interpreter computes on the CPU whatever the target
    "memory_format": lambda ctx, v, xs: getattr(torch, v),
    "layout": lambda ctx, v, xs: getattr(torch, v),
}


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


def extern(ctx: Context, op: Operation, operands: list[Any]) -> list[Any]:
    """Calls the operator; its tensor results, converted to the declared element types when running in another precision."""
    args = _decode(ctx, op["args"], operands)
    kwargs = {k: _decode(ctx, v, operands) for k, v in op["kwargs"].items()}
    out = _operator(op["target"])(*args, **kwargs)
    values = list(out) if isinstance(out, (tuple, list)) else [out]
    kinds = op["result_kinds"] or tuple("tensor" if isinstance(v, torch.Tensor) else "none" for v in values)
    tensors = [v for v, kind in zip(values, kinds) if kind == "tensor"]
    if ctx.numerics.precision is not None and len(tensors) == len(op.results):
        tensors = [ctx.to_type(v, r.type) if isinstance(r.type, TensorType) else v for v, r in zip(tensors, op.results)]
    return tensors
