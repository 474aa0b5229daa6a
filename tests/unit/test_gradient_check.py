"""The check of gradients in `benchmarks/gradients.py`: it finds what is wrong, and inputs away from kinks."""

from __future__ import annotations

import torch
from aicc.benchmarks.gradients import MARGIN, compare, margin, without_kinks
from torch import Tensor, nn


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(8 * 16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().sum()


def gradients(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    model(*inputs).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def one_wrong(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    found = gradients(model, inputs)
    found[2].view(-1)[5] *= 1 + 1e-4
    return found


def test_a_kink_is_seen() -> None:
    layer = nn.Sequential(nn.ReLU())
    assert margin(layer, (torch.tensor([[0.5, -2e-7]]),)) < MARGIN < margin(layer, (torch.tensor([[0.5, -2.0]]),))
    pool = nn.Sequential(nn.MaxPool2d(2, 2))
    assert margin(pool, (torch.tensor([[[[1.0, 1.0], [0.0, 0.5]]]]),)) == 0
    assert margin(pool, (torch.tensor([[[[1.0, 0.75], [0.0, 0.5]]]]),)) == 0.25


def test_finds_a_wrong_element() -> None:
    model = Loss()
    inputs = without_kinks(model, lambda: (torch.randn(2, 3, 9, 9),))
    assert margin(model, inputs) >= MARGIN
    assert compare(model, inputs, gradients).worst <= 1
    found = compare(model, inputs, one_wrong)
    assert found.worst > 2 and found.where == "layers.4.weight"
