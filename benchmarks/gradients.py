"""How far gradients are from those in double precision, in units of eager's own distance.

    inputs = without_kinks(model, make_inputs)
    found = compare(model, inputs, gradients)      # found.worst <= 2: as near as eager is

A gradient jumps where the input of a ReLU changes its sign, or where two elements of a pooled window are equally large: of the two million inputs of
ResNet-18's ReLUs some lie within rounding of zero, so that eager itself is 6 % of a gradient's largest value away from float64, and another order of
additions is just as far in another tensor. So `without_kinks` draws inputs until none lies within MARGIN of such a place.
Eager's distance of a tensor is the largest of DRAWS runs on inputs that are moved by about one rounding: one run is near by chance.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["DRAWS", "MARGIN", "Comparison", "compare", "margin", "without_kinks"]

Inputs = tuple[Tensor, ...]
DRAWS = 3
MARGIN = 4e-6
"""Of values of about one: eight times the rounding that reaches the ReLUs of ResNet-18."""
ROUNDING = 1e-6
"""Of a tensor's largest gradient: a distance that is never too large, the rounding of eight float32 operations."""


@dataclass(frozen=True)
class Comparison:
    """`error`: the largest distance from float64 over the largest gradient, of any tensor; `worst`: the largest distance over eager's, and where."""

    error: float
    worst: float
    where: str


def margin(model: nn.Module, inputs: Inputs) -> float:
    """How near to a kink the model comes on these inputs, in double precision: the least |x| of a ReLU, the least gap of a pooled window."""
    model = copy.deepcopy(model).double().train()
    found = [float("inf")]

    def relu(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        found.append(given[0].abs().min().item())

    def pool(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        x = nn.functional.pad(given[0], [module.padding] * 4, value=float("-inf"))  # type: ignore[list-item]
        first, second = x.unfold(2, module.kernel_size, module.stride).unfold(3, module.kernel_size, module.stride) \
            .flatten(-2).topk(2).values.unbind(-1)  # type: ignore[arg-type]
        gaps = (first - second)[first > 0]  # at zero a ReLU before it gives no gradient anyway
        found.append(gaps.min().item() if gaps.numel() else float("inf"))

    for m in model.modules():
        if isinstance(m, (nn.ReLU, nn.MaxPool2d)):
            m.register_forward_pre_hook(relu if isinstance(m, nn.ReLU) else pool)
    with torch.no_grad():
        model(*_double(inputs))
    return min(found)


def without_kinks(model: nn.Module, make: Callable[[], Inputs], most: int = 100) -> Inputs:
    """Inputs at which no gradient jumps, drawn anew with seeds 0, 1, ...; RuntimeError after `most`."""
    for seed in range(most):
        torch.manual_seed(seed)
        inputs = make()
        if margin(model, inputs) >= MARGIN:
            return inputs
    raise RuntimeError(f"each of {most} inputs comes within {MARGIN} of a kink: make them smaller")


def compare(model: nn.Module, inputs: Inputs, gradients: Callable[[nn.Module, Inputs], list[Tensor]]) -> Comparison:
    """Gradients as `gradients` computes them for a copy of the model, compared with eager's and with those in float64."""
    truth = _eager(copy.deepcopy(model).double(), _double(inputs))
    eager = []
    for draw in range(DRAWS):
        torch.manual_seed(draw)
        moved = tuple(x * (1 + 6e-8 * torch.randn_like(x)) if draw and x.is_floating_point() else x for x in inputs)
        eager.append(_distances(_eager(copy.deepcopy(model), moved), truth))
    found = _distances(gradients(copy.deepcopy(model), inputs), truth)
    ratios = [mine / max(ROUNDING / 2, *theirs) for mine, theirs in zip(found, zip(*eager, strict=True), strict=True)]
    worst = max(range(len(ratios)), key=ratios.__getitem__)
    return Comparison(max(found), ratios[worst], [n for n, p in model.named_parameters() if p.requires_grad][worst])


def _eager(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    model.train()
    model(*inputs).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def _double(inputs: Inputs) -> Inputs:
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


def _distances(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    """The largest difference over the largest value, per tensor."""
    return [((a.double() - t).abs().max() / t.abs().max().clamp_min(1e-30)).item() for a, t in zip(found, truth, strict=True)]
