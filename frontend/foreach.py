"""`torch._foreach_*`, which optimizers are made of: each is the plain operator on every tensor of its lists.

ATen runs one kernel over all tensors per operator, and every operator goes through memory. As plain operators they fuse: one kernel per parameter
does its whole update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["foreach_table"]

aten = torch.ops.aten

_SAME = (
    "abs", "acos", "asin", "atan", "ceil", "cos", "cosh", "erf", "erfc", "exp", "expm1", "floor", "frac", "lgamma", "log", "log10", "log1p",
    "log2", "neg", "reciprocal", "round", "rsqrt", "sigmoid", "sign", "sin", "sinh", "sqrt", "tan", "tanh", "trunc", "add", "sub", "mul", "div",
    "addcmul", "addcdiv", "lerp", "pow", "clamp_min", "clamp_max", "maximum", "minimum", "norm", "zero",
)
_OTHER: dict[str, Callable[..., Any]] = {
    "norm": lambda x, order=2, dtype=None: aten.linalg_vector_norm(x, order, dtype=dtype),
    "zero": lambda x: aten.zeros_like(x),
    "addcmul": lambda x, a, b, value=1: aten.addcmul(x, a, b, value=value),
    "addcdiv": lambda x, a, b, value=1: aten.addcdiv(x, a, b, value=value),
    "maximum": lambda x, y: aten.maximum(x, y) if isinstance(y, torch.Tensor) else aten.clamp_min(x, y),
    "minimum": lambda x, y: aten.minimum(x, y) if isinstance(y, torch.Tensor) else aten.clamp_max(x, y),
}
"""Operators whose plain form is called otherwise."""


def foreach_table() -> dict[Any, Callable[..., Any]]:
    """Functional overload of a foreach operator -> decomposition into a list of plain operators."""
    table: dict[Any, Callable[..., Any]] = {}
    for name in _SAME:
        packet = getattr(aten, f"_foreach_{name}")
        for overload in packet.overloads():
            op = getattr(packet, overload)
            # A list of scalars in a tensor would have to be read while compiling.
            if not op._schema.is_mutable and "out" not in overload and not (name.startswith("addc") and overload == "Tensor"):
                table[op] = _each(op, _OTHER.get(name) or getattr(aten, name))
    return table


def _each(op: Any, plain: Callable[..., Any]) -> Callable[..., Any]:
    """Calls `plain` once per tensor: arguments that are lists in the schema of `op` give one element each, others are the same for all."""
    listed = {a.name for a in op._schema.arguments if "List[" in str(a.type)}
    names = [a.name for a in op._schema.arguments if not a.kwarg_only]

    def run(*args: Any, **kwargs: Any) -> list[Any]:
        given = dict(zip(names, args, strict=False))
        count = next(len(v) for k, v in {**given, **kwargs}.items() if k in listed)

        def at(k: str, v: Any, i: int) -> Any:
            return v[i] if k in listed else v

        return [plain(*(at(k, v, i) for k, v in given.items()), **{k: at(k, v, i) for k, v in kwargs.items()}) for i in range(count)]

    return run
