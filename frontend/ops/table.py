"""The type of a table row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Lower", "merge"]

Lower = Callable[..., Any]
"""`lower(c, *args, **kwargs)`: see `frontend/context.py`. Gives a Value, or a tuple for an operator with several results
(None for a result that is never a tensor). Raises Unsupported to decline."""


def merge(*families: Mapping[str, Lower]) -> dict[str, Lower]:
    """One table from the families. ValueError if two give a row for the same operator."""
    table: dict[str, Lower] = {}
    for family in families:
        twice = table.keys() & family.keys()
        if twice:
            raise ValueError(f"operators with two rows: {', '.join(sorted(twice))}")
        table.update(family)
    return table
