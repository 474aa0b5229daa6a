"""`loop`: a function of the module run once per slice, each time on what the time before left."""

from __future__ import annotations

from typing import Any

import torch

from ..core import IRError, Operation
from .context import Context, Handler, bind_shape

__all__ = ["HANDLERS"]


def _loop(ctx: Context, op: Operation, xs: list[Any]) -> list[Any]:
    body = ctx.functions.get(op["body"].name)
    if body is None:
        raise IRError(f"there is no function {op['body']} in the module; functions: {', '.join(ctx.functions) or 'none'}")
    n, m = op["carried"], op["sliced"]
    carried, sliced, invariant = xs[:n], xs[n:n + m], xs[n + m:]
    sliced = [x.flip(0) if j in op["reversed_operands"] else x for j, x in enumerate(sliced)]
    stacked: list[list[Any]] = [[] for _ in op.results[n:]]
    for t in range(sliced[0].shape[0]):
        given = [*carried, *(x[t] for x in sliced), *invariant]
        for a, x in zip(body.body.args, given, strict=True):
            bind_shape(a.type.shape, x.shape, ctx.symbols, f"argument {a.index} of @{body['sym_name']}")  # type: ignore[attr-defined]
        made = ctx.run_block(body.body, dict(zip(body.body.args, given, strict=True)))
        carried = made[:n]
        for found, y in zip(stacked, made[n:], strict=True):
            found.append(y)
    for j in op["reversed_results"]:
        stacked[j].reverse()
    empty = (torch.empty(ctx.shape(r.type), dtype=ctx.dtype(r.type)) for r in op.results[n:])
    return [*carried, *(torch.stack(found) if found else e for found, e in zip(stacked, empty, strict=True))]


HANDLERS: dict[str, Handler] = {"loop": _loop}
