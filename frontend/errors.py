"""What the frontend raises."""

from __future__ import annotations

__all__ = ["Unsupported", "UnsupportedError"]


class Unsupported(Exception):
    """A table row declines this use of its op; the op becomes a `graph.extern` with the message as its reason."""


class UnsupportedError(Exception):
    """The graph cannot be imported at all. The message names the node and the line of Python it came from."""
