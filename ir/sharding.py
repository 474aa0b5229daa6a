"""Meshes and placements: how a tensor lies on a mesh of ranks.

A sharding gives one `Placement` per mesh axis. Along an axis of n ranks a tensor is
- replicated: every rank holds it;
- sharded along `dim`: rank r holds the r-th of n equal pieces. With `parts` = p the dimension is first cut into p equal parts,
  and each rank holds its piece of every part, one after the other (a fused q, k, v weight has p = 3);
- partial: every rank holds a term, and the tensor is their `sum` (or `max`, `min`).

Where several axes shard one dimension, the axis that comes first in `Mesh.order` cuts first. As an attribute a placement is
"replicate", {shard = dim}, {shard = dim, parts = p} or {partial = "sum"}; a sharding is a dictionary from axis names to placements.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .core import IRError

__all__ = ["REPLICATE", "Mesh", "Placement", "partial", "placement_from_attribute", "shard"]


@dataclass(frozen=True)
class Placement:
    """See the module docstring. kind: 'replicate', 'shard' (dim, parts) or 'partial' (op)."""

    kind: str
    dim: int = 0
    parts: int = 1
    op: str = ""

    @property
    def attribute(self) -> Any:
        if self.kind == "shard":
            return {"shard": self.dim, **({"parts": self.parts} if self.parts > 1 else {})}
        return {"partial": self.op} if self.kind == "partial" else "replicate"

    def __str__(self) -> str:
        if self.kind == "shard":
            return f"S({self.dim})" if self.parts == 1 else f"S({self.dim}, parts={self.parts})"
        return "R" if self.kind == "replicate" else f"P({self.op})"


REPLICATE = Placement("replicate")


def shard(dim: int, parts: int = 1) -> Placement:
    """Cut along `dim`."""
    return Placement("shard", dim, parts)


def partial(op: str = "sum") -> Placement:
    """A term of a sum, or one of the values whose maximum or minimum is meant."""
    return Placement("partial", op=op)


def placement_from_attribute(value: Any) -> Placement:
    """The inverse of `Placement.attribute`. IRError for anything else."""
    if value == "replicate":
        return REPLICATE
    if isinstance(value, Mapping) and set(value) <= {"shard", "parts"} and isinstance(value.get("shard"), int):
        return shard(value["shard"], value.get("parts", 1))
    if isinstance(value, Mapping) and set(value) == {"partial"} and value["partial"] in ("sum", "max", "min"):
        return partial(value["partial"])
    raise IRError(f"{value!r} is no placement; expected \"replicate\", {{shard = dim}} or {{partial = \"sum\"}}")


@dataclass(frozen=True)
class Mesh:
    """Named axes, outermost first, as in torch's DeviceMesh: rank = row-major position."""

    axes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        if len(set(names)) != len(names):
            raise IRError(f"a mesh with two axes of one name: {', '.join(names)}")
        for name, size in self.axes:
            if not isinstance(size, int) or size < 1:
                raise IRError(f"mesh axis '{name}' must have at least one rank, got {size}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(size for _, size in self.axes)

    @property
    def ranks(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total

    def size(self, axis: str) -> int:
        """Ranks along `axis`; IRError if there is no such axis."""
        for name, size in self.axes:
            if name == axis:
                return size
        raise IRError(f"the mesh has no axis '{axis}'; it has {', '.join(self.names) or 'none'}")

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where `rank` is along each axis."""
        found: dict[str, int] = {}
        for name, size in reversed(self.axes):
            rank, found[name] = divmod(rank, size)
        return {name: found[name] for name in self.names}

    def rank(self, coordinates: Mapping[str, int]) -> int:
        at = 0
        for name, size in self.axes:
            at = at * size + coordinates[name]
        return at

    def groups(self, axis: str) -> list[tuple[int, ...]]:
        """The groups of ranks that differ in `axis` alone, each in the order of that axis."""
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.ranks):
            at = self.coordinates(rank)
            found.setdefault(tuple(v for k, v in at.items() if k != axis), []).append(rank)
        return [tuple(g) for g in found.values()]

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(self.axes)


def local_shape(shape: Sequence[Any], placement: Placement, ranks: int) -> tuple[Any, ...]:
    """The shape of one rank's piece. IRError if the dimension is no multiple of ranks * parts."""
    if placement.kind != "shard":
        return tuple(shape)
    size = shape[placement.dim]
    if not isinstance(size, int) or size % (ranks * placement.parts):
        raise IRError(f"dimension {placement.dim} of size {size} cannot be cut into {ranks * placement.parts} equal pieces")
    return (*shape[:placement.dim], size // ranks, *shape[placement.dim + 1:])
