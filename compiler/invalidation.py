"""Telling compiled code that parameters were written to behind torch's back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..runtime.packing import forget_packed

__all__ = ["invalidate"]


def invalidate(what: torch.nn.Module | torch.Tensor | Iterable[torch.Tensor] | Callable[..., Any] | None = None) -> int:
    """Forgets packed copies of parameters; the next call of the compiled code packs them anew. How many graphs that concerns.

    `what` is a module (compiled or not), a tensor or several; a compiled function or None stands for all graphs of the process.
    Needed after writes to a few elements of a parameter of more than 64 KiB that torch does not count, such as through numpy, raw pointers
    or `p.data`. In-place operations, optimizers, `load_state_dict`, writes to whole rows and to smaller parameters are seen without it.
    TypeError for anything else.
    """
    if isinstance(what, torch.nn.Module):
        return forget_packed([*what.parameters(), *what.buffers()])
    if isinstance(what, torch.Tensor):
        return forget_packed([what])
    if what is None or callable(what):
        return forget_packed()
    tensors = list(what)
    if not all(isinstance(t, torch.Tensor) for t in tensors):
        raise TypeError("invalidate takes a module, a compiled function, tensors or nothing")
    return forget_packed(tensors)
