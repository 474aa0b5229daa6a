"""Forward-mode derivatives, which compiled code knows nothing of: who calls it with a dual tensor gets torch's own operators, and a warning.

A dual tensor (`torch.autograd.forward_ad`) is a plain one to Dynamo, to AOTAutograd and to native code, and its tangent would be lost without a word.
Tangents live only while a dual level is entered, and what Dynamo captured outside of one is not used inside one: `guard_level` asks for the guard
of torch that compares the level, one attribute in C++, so that nothing needs to be asked behind it.
Inside, `keep_tangents` looks at every argument.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.source import GlobalStateSource
from torch._guards import TracingContext
from torch.autograd import forward_ad

__all__ = ["any_tangent", "entered", "guard_level", "keep_tangents"]


def entered() -> bool:
    """Whether tensors may have tangents now."""
    return forward_ad._current_level >= 0


def any_tangent(values: Iterable[Any]) -> bool:
    """Whether any of these is a dual tensor of the present level."""
    return any(isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in values)


def guard_level() -> None:
    """What Dynamo captures now is for the present level alone."""
    context, kind = TracingContext.try_get(), getattr(GuardBuilder, "DUAL_LEVEL", None)
    if context is not None and kind is not None:
        context.guards_context.dynamo_guards.add(GlobalStateSource().make_guard(kind))


def keep_tangents(eager: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled` for calls without tangents, and `eager`, which does the same by torch's operators, for those with one."""
    warned = False

    def call(*args: Any) -> Any:
        nonlocal warned
        if not any_tangent(args):
            return compiled(*args)
        if not warned:
            warned = True
            warnings.warn("aicc knows no forward-mode derivatives: this graph runs through ATen while its inputs are dual tensors "
                          "(torch.autograd.forward_ad); torch.func.jvp inside of what is compiled is compiled with its derivative",
                          RuntimeWarning, stacklevel=2)
        return eager(*args)

    return call
