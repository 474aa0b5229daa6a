"""Python locations as people want to read them."""

from __future__ import annotations

import os
import re

__all__ = ["short_place"]

_INSTALLED = re.compile(r".*[/\\](?:site|dist)-packages[/\\]")


def short_place(place: str) -> str:
    """`/long/way/site-packages/pkg/file.py:3 (module)` as `pkg/file.py:3 (module)`; files below the current folder relative to it."""
    return _INSTALLED.sub("", place.removeprefix(os.getcwd() + os.sep))
