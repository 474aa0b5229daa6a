"""Where an FX node comes from: the line of the user's Python, and the path of the nn.Module."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import torch.fx as fx

from ..ir.core import UNKNOWN, Location

__all__ = ["location_of"]

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_INDEX = re.compile(r"\[['\"]?([^'\"\]]+)['\"]?\]")


def location_of(node: fx.Node) -> Location:
    """The location of `node`. Backward nodes carry the trace and the module of the forward op they differentiate."""
    meta = node.meta
    file, line = _innermost(meta.get("stack_trace") or "")
    stack = meta.get("nn_module_stack") or meta.get("fwd_nn_module_stack") or {}
    module = _module_path(stack)
    return Location(file, line, module) if file or module else UNKNOWN


def _rank(file: str) -> int:
    """How little a frame says about the model: 0 for the model's own code, more for library code around it."""
    if "/torch/" in file and "site-packages" in file:
        return 2
    if "site-packages" in file and "/models/" not in file:
        return 1
    return 0


@lru_cache(maxsize=4096)
def _innermost(trace: str) -> tuple[str, int]:
    frames = [(m.group(1), int(m.group(2))) for m in _FRAME.finditer(trace)]
    if not frames:
        return "", 0
    best = min(_rank(file) for file, _ in frames)
    return next(f for f in reversed(frames) if _rank(f[0]) == best)


def _module_path(stack: dict[str, Any]) -> str:
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]
    return _clean_path(path if isinstance(path, str) else "")


@lru_cache(maxsize=4096)
def _clean_path(path: str) -> str:
    """`L['self']._modules['layers']._modules['0'].mlp` -> `layers.0.mlp`."""
    for prefix in ("L['self']", 'L["self"]', "L__self__"):
        if path.startswith(prefix):
            path = path[len(prefix):]
            break
    path = _INDEX.sub(r".\1", path.replace("._modules", ""))
    return path.strip("._")
