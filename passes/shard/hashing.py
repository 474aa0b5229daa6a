"""Hashes that are computed once: the planner's caches look the same few facts up millions of times.

Entry point: `hash_once`, a decorator above `@dataclass(frozen=True)`.
"""

from __future__ import annotations

from typing import Any, TypeVar

__all__ = ["hash_once"]

C = TypeVar("C", bound=type)


def hash_once(cls: C) -> C:
    """Keep the hash of every instance of a frozen dataclass. Pickles leave it out: string hashes differ between processes."""
    fresh = cls.__hash__

    def kept(self: Any) -> int:
        found = self.__dict__.get("_hash")
        if found is None:
            found = fresh(self)
            object.__setattr__(self, "_hash", found)
        return int(found)

    def state(self: Any) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_hash"}

    cls.__hash__ = kept  # type: ignore[assignment]
    cls.__getstate__ = state  # type: ignore[attr-defined]
    return cls
