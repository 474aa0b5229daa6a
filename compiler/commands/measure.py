"""Comparing and timing: accuracy against eager in float64, interleaved medians."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..capture import call_model, float_outputs
from ..model_file import LoadedModel

__all__ = ["Errors", "Results", "compare", "interleaved_medians", "results_of", "twin"]


@dataclass(frozen=True)
class Errors:
    """Against a reference: the largest absolute error, and that error over the largest value of its group (outputs, or gradients)."""

    absolute: float
    relative: float


def twin(found: LoadedModel, dtype: torch.dtype | None = None) -> LoadedModel:
    """A copy of the model with weights and arguments of its own, floating ones converted to `dtype`."""
    def convert(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        made = x.detach().clone()
        if dtype is not None and made.is_floating_point():
            made = made.to(dtype)
        return made.requires_grad_(x.requires_grad) if made.is_floating_point() else made

    model = found.model
    if isinstance(model, torch.nn.Module):
        model = copy.deepcopy(model)
        if dtype is not None:
            model = model.to(dtype)
    args, kwargs = pytree.tree_map(convert, (found.args, found.kwargs))
    return LoadedModel(found.name, model, args, kwargs)


Results = tuple[list[torch.Tensor], list[torch.Tensor]]
"""The floating outputs, and the gradients."""


def results_of(model: Callable[..., Any], found: LoadedModel, train: bool) -> Results:
    """The results of one call of `model`; gradients, after training, are those of the parameters and arguments that `found` holds."""
    torch.manual_seed(0)
    out = call_model(model, found, train)
    if not train:
        return float_outputs(out), []
    parameters = list(found.model.parameters()) if isinstance(found.model, torch.nn.Module) else []
    leaves = [t for t in pytree.tree_leaves((found.args, found.kwargs)) if isinstance(t, torch.Tensor)]
    gradients = [t.grad for t in (*parameters, *leaves) if t.grad is not None]
    for t in (*parameters, *leaves):
        t.grad = None
    return [t.detach() for t in float_outputs(out)], gradients


def compare(results: Results, reference: Results) -> Errors:
    """Errors of `results`. ValueError when they differ in number or shape; a NaN where the reference has none is infinitely wrong.

    The scale is that of the whole group: a gradient that is zero in exact arithmetic has only rounding errors, of any relative size.
    """
    groups = [_compare_group(got, want) for got, want in zip(results, reference, strict=True)]
    return Errors(max(e.absolute for e in groups), max(e.relative for e in groups))


def _compare_group(results: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> Errors:
    if [t.shape for t in results] != [t.shape for t in reference]:
        raise ValueError(f"the results have shapes {[tuple(t.shape) for t in results]}, the reference {[tuple(t.shape) for t in reference]}")
    largest = scale = 0.0
    for got, want in zip(results, reference, strict=True):
        if not want.numel():
            continue
        wide = want.double()
        difference = torch.where(got.double() == wide, 0.0, (got.double() - wide).abs())  # equal infinities differ by nothing
        difference = torch.where(wide.isnan() & got.isnan(), 0.0, difference).nan_to_num(nan=float("inf"), posinf=float("inf"))
        finite = wide[wide.isfinite()]
        largest = max(largest, difference.max().item())
        scale = max(scale, finite.abs().max().item() if finite.numel() else 0.0)
    return Errors(largest, largest / scale if scale else largest)


def interleaved_medians(contenders: Sequence[Callable[[], Any]], seconds: float = 2.0, most: int = 200) -> list[float]:
    """Median seconds per call of each, called in turns so that a change of the machine's load meets all alike."""
    times: list[list[float]] = [[] for _ in contenders]
    end = time.perf_counter() + seconds
    while len(times[0]) < 3 or (time.perf_counter() < end and len(times[0]) < most):
        for call, seen in zip(contenders, times, strict=True):
            start = time.perf_counter()
            call()
            seen.append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]
