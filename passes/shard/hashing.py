"""Hashes that are computed once: the planner's caches look the same few facts up millions of times.

Entry point: `hash_once`, a decorator above `@dataclass(frozen=True)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["hash_once"]

T = TypeVar("T")


def hash_once(cls: type[T]) -> type[T]:
    """Keep the hash of every instance of a frozen dataclass. Pickles leave it out: hashes of strings differ between processes."""
    fresh: Callable[[Any], int] = cls.__hash__

    def kept(self: Any) -> int:
        found = self.__dict__.get("_hash")
        if found is None:
            found = fresh(self)
            object.__setattr__(self, "_hash", found)
        return int(found)

    def state(self: Any) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_hash"}

    setattr(cls, "__hash__", kept)  # noqa: B010
    setattr(cls, "__getstate__", state)  # noqa: B010
    return cls
