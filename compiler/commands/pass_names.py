"""Pass names as users type them."""

from __future__ import annotations

import difflib

from ... import passes  # noqa: F401  (importing passes registers them)
from ...ir.core import IRError
from ...ir.passes import Pass, parse_pipeline, registered_passes
from ..errors import UserError

__all__ = ["checked_pass", "checked_pipeline"]


def checked_pass(name: str) -> str:
    """`name` if a pass is called so; UserError with the nearest names otherwise."""
    known = registered_passes()
    if name not in known:
        near = difflib.get_close_matches(name, known, 3)
        raise UserError(f"unknown pass '{name}'; " + (f"did you mean {' or '.join(near)}?" if near else f"known passes: {', '.join(known)}"))
    return name


def checked_pipeline(text: str) -> list[Pass]:
    """The passes of a textual pipeline; UserError with the nearest names for one that cannot be read."""
    try:
        return parse_pipeline(text)
    except IRError as e:
        raise UserError(str(e)) from e
