"""Short ways to build graph and dist ops on local shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...ir.builder import Builder
from ...ir.core import Value
from ...ir.sharding import Placement
from ...ir.types import DTYPES, DType, TensorType

__all__ = ["LocalBuilder", "sizes_of", "tensor_type"]

I1, I64 = DTYPES["i1"], DTYPES["i64"]


def tensor_type(v: Value) -> TensorType:
    assert isinstance(v.type, TensorType)
    return v.type


def sizes_of(v: Value) -> tuple[int, ...]:
    """The shape of a tensor value; all sizes are constants in modules that can be partitioned."""
    shape = tensor_type(v).shape
    assert all(isinstance(s, int) for s in shape)
    return shape  # type: ignore[return-value]


def scaled(t: TensorType, dim: int, factor: int, divisor: int = 1) -> TensorType:
    """`t` with dimension `dim` times factor / divisor, row-major."""
    shape = list(t.shape)
    shape[dim] = shape[dim] * factor // divisor  # type: ignore[operator]
    return TensorType(tuple(shape), t.dtype)


@dataclass(frozen=True)
class LocalBuilder:
    """Builds for one mesh axis."""

    b: Builder
    axis: str
    ranks: int

    # -- graph ops

    def full(self, shape: Sequence[int], value: Any, dtype: DType) -> Value:
        return self.b.op("graph.full", type=TensorType(tuple(shape), dtype), value=value)

    def ew(self, name: str, *xs: Value, dtype: DType | None = None) -> Value:
        """`graph.<name>` of operands that broadcast; comparisons give i1."""
        typed = xs[1:] if name == "select" else xs
        rank = max(tensor_type(v).rank for v in xs)
        shape = [1] * rank
        for v in xs:
            for i, size in enumerate(tensor_type(v).shape, rank - tensor_type(v).rank):
                shape[i] = size if shape[i] == 1 else shape[i]  # type: ignore[assignment]
        return self.b.op(f"graph.{name}", *xs, type=TensorType(tuple(shape), dtype or tensor_type(typed[0]).dtype))

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        t = tensor_type(x)
        return x if t.shape == tuple(shape) else self.b.op("graph.reshape", x, type=TensorType(tuple(shape), t.dtype))

    def permute(self, x: Value, perm: Sequence[int]) -> Value:
        t = tensor_type(x)
        if list(perm) == list(range(t.rank)):
            return x
        return self.b.op("graph.permute", x, type=TensorType(tuple(t.shape[p] for p in perm), t.dtype), perm=tuple(perm))

    def slice(self, x: Value, dim: int, start: int, size: int) -> Value:
        t = tensor_type(x)
        starts = tuple(start if i == dim else 0 for i in range(t.rank))
        shape = tuple(size if i == dim else s for i, s in enumerate(t.shape))
        return self.b.op("graph.slice", x, type=TensorType(shape, t.dtype), starts=starts, steps=(1,) * t.rank)

    def reduce(self, name: str, x: Value, dim: int) -> Value:
        t = tensor_type(x)
        shape = tuple(1 if i == dim else s for i, s in enumerate(t.shape))
        return self.b.op(f"graph.{name}", x, type=TensorType(shape, t.dtype), dims=(dim,), keepdim=True)

    # -- dist ops

    def coordinate(self) -> Value:
        return self.b.op("dist.coordinate", type=TensorType((), I64), axis=self.axis, ranks=self.ranks)

    def shard(self, x: Value, to: Placement, shift: int = 0) -> Value:
        extra = {**({"parts": to.parts} if to.parts > 1 else {}), **({"shift": shift} if shift else {})}
        return self.b.op("dist.shard", x, type=scaled(tensor_type(x), to.dim, 1, self.ranks), axis=self.axis, ranks=self.ranks,
                         dim=to.dim, **extra)

    def all_reduce(self, x: Value, kind: str = "sum") -> Value:
        t = tensor_type(x)
        return self.b.op("dist.all_reduce", x, type=TensorType(t.shape, t.dtype), axis=self.axis, ranks=self.ranks, kind=kind)

    def all_gather(self, x: Value, at: Placement) -> Value:
        extra = {"parts": at.parts} if at.parts > 1 else {}
        return self.b.op("dist.all_gather", x, type=scaled(tensor_type(x), at.dim, self.ranks), axis=self.axis, ranks=self.ranks,
                         dim=at.dim, **extra)

    def reduce_scatter(self, x: Value, to: Placement, kind: str = "sum") -> Value:
        extra = {"parts": to.parts} if to.parts > 1 else {}
        return self.b.op("dist.reduce_scatter", x, type=scaled(tensor_type(x), to.dim, 1, self.ranks), axis=self.axis,
                         ranks=self.ranks, dim=to.dim, kind=kind, **extra)

    def shift(self, x: Value) -> Value:
        """What the rank before has."""
        t = tensor_type(x)
        return self.b.op("dist.shift", x, type=TensorType(t.shape, t.dtype), axis=self.axis, ranks=self.ranks)

    def all_to_all(self, x: Value, split: int, concat: int) -> Value:
        t = scaled(scaled(tensor_type(x), split, 1, self.ranks), concat, self.ranks)
        return self.b.op("dist.all_to_all", x, type=t, axis=self.axis, ranks=self.ranks, split=split, concat=concat)
