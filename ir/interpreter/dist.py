"""Reference semantics of the dist dialect: on the values of all ranks of a group at once.

`run_group(op, xs)` takes one tensor per rank, in the order of the axis, and gives one per rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch

from ..core import IRError, Operation

Tensor = torch.Tensor

__all__ = ["COMBINE", "gather_pieces", "piece", "run_group"]

COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}


def piece(x: Tensor, rank: int, ranks: int, dim: int, parts: int) -> Tensor:
    """Rank `rank`'s piece of `x` along `dim`."""
    return torch.cat([p.chunk(ranks, dim)[rank] for p in x.chunk(parts, dim)], dim)


def gather_pieces(xs: Sequence[Tensor], dim: int, parts: int) -> Tensor:
    """The inverse of `piece`: the whole tensor from every rank's piece."""
    cut = [x.chunk(parts, dim) for x in xs]
    return torch.cat([c[p] for p in range(parts) for c in cut], dim)


def _all_reduce(op: Operation, xs: Sequence[Tensor]) -> list[Tensor]:
    total = reduce(COMBINE[op["kind"]], xs)
    return [total] * len(xs)


def _all_gather(op: Operation, xs: Sequence[Tensor]) -> list[Tensor]:
    whole = gather_pieces(xs, op["dim"], op["parts"])
    return [whole] * len(xs)


def _reduce_scatter(op: Operation, xs: Sequence[Tensor]) -> list[Tensor]:
    total = reduce(COMBINE[op["kind"]], xs)
    return [piece(total, r, len(xs), op["dim"], op["parts"]) for r in range(len(xs))]


def _all_to_all(op: Operation, xs: Sequence[Tensor]) -> list[Tensor]:
    cut = [x.chunk(len(xs), op["split"]) for x in xs]
    return [torch.cat([c[r] for c in cut], op["concat"]) for r in range(len(xs))]


def _shard(op: Operation, xs: Sequence[Tensor]) -> list[Tensor]:
    return [piece(x, (r - op["shift"]) % len(xs), len(xs), op["dim"], op["parts"]) for r, x in enumerate(xs)]


def _shift(op: Operation, xs: Sequence[Tensor]) -> list[Tensor]:
    return [xs[r - 1] for r in range(len(xs))]


_GROUP: dict[str, Callable[[Operation, Sequence[Tensor]], list[Tensor]]] = {
    "dist.all_reduce": _all_reduce, "dist.all_gather": _all_gather, "dist.reduce_scatter": _reduce_scatter,
    "dist.all_to_all": _all_to_all, "dist.shard": _shard, "dist.shift": _shift, "dist.wait": lambda op, xs: list(xs),
}


def run_group(op: Operation, xs: Sequence[Tensor]) -> list[Tensor]:
    """What each rank of a group gets, from what each gives. `xs` is empty for `dist.coordinate`'s caller: see `virtual.py`."""
    handler = _GROUP.get(op.name)
    if handler is None:
        raise IRError(f"'{op.name}' has no meaning among ranks")
    return handler(op, xs)
