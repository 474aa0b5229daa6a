"""Winograd's F(2, 3): which convolutions it takes, and that results are as near to float64 as those of direct sums."""

from __future__ import annotations

import pytest
import torch
from aicc.compiler.driver import Compilation, watching
from torch import nn


def compiled(layer: nn.Module, x: torch.Tensor, **options: object) -> tuple[torch.Tensor, list[str]]:
    """The result, and the messages of the pass."""
    torch._dynamo.reset()
    seen: list[Compilation] = []
    with torch.no_grad(), watching(compiled=seen.append):
        y = torch.compile(layer, backend="aicc", options={"cache": False, **options})(x)
    return y, [r.message for r in seen[0].remarks if r.pass_name == "winograd"]


def error(y: torch.Tensor, layer: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        truth = layer.double()(x.double())
        layer.float()
    return ((y.double() - truth).abs().max() / truth.abs().max()).item()


@pytest.mark.parametrize("size,padding,stride,kernel", [
    ((8, 9), 1, 1, 3), ((5, 12), 0, 1, 3), ((9, 10), 1, (2, 1), 3), ((6, 11), (0, 1), 1, (1, 3)), ((7, 8), (2, 1), 1, (5, 3)), ((4, 10), (1, 2), 1, 3),
    ((8, 9), (1, 2), 1, (3, 5)),  # along the columns
])
def test_shapes(size: tuple[int, int], padding: int, stride: int, kernel: int) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(34, 37, kernel, stride, padding), nn.ReLU()).eval()
    x = torch.randn(2, 34, *size)
    y, messages = compiled(layer, x)
    assert len(messages) == 1, messages
    assert error(y, layer, x) < 1e-6


def test_rounds_no_worse_than_direct_sums() -> None:
    """Over several seeds, on average: single results differ either way."""
    ratio = []
    for seed in range(3):
        torch.manual_seed(seed)
        layer, x = nn.Conv2d(96, 40, 3, padding=1), torch.randn(1, 96, 10, 10)
        (y, taken), (direct, none) = compiled(layer, x), compiled(layer, x, winograd=False)
        assert taken and not none
        ratio.append(error(y, layer, x) / error(direct, layer, x))
    assert sum(ratio) / len(ratio) < 2


@pytest.mark.parametrize("layer", [
    nn.Conv2d(34, 40, 3, 2, 1),             # a stride along the row
    nn.Conv2d(34, 40, 5, padding=2),        # five taps
    nn.Conv2d(16, 40, 3, padding=1),        # few channels
    nn.Conv2d(40, 40, 3, padding=1, groups=40),
    nn.Conv2d(34, 40, 3, padding=2, dilation=2),
    nn.Conv2d(34, 40, 3, padding=1).double(),
    nn.Conv2d(34, 40, 3, padding=0),        # on 3 x 5 elements a quarter of the products and more would be wasted
], ids=["stride", "taps", "channels", "depthwise", "dilation", "double", "narrow"])
def test_declined(layer: nn.Module) -> None:
    size = (3, 5) if layer.padding == (0, 0) else (9, 10)
    x = torch.randn(1, layer.in_channels, *size, dtype=layer.weight.dtype)  # type: ignore[arg-type]
    y, messages = compiled(layer, x)
    assert not messages
    torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-5)


def test_follows_the_parameter() -> None:
    """Transformed taps are made anew when the parameter has changed."""
    layer, x = nn.Conv2d(34, 40, 3, padding=1), torch.randn(1, 34, 10, 10)
    f = torch.compile(layer, backend="aicc")
    with torch.no_grad():
        f(x)
        layer.weight.mul_(-2)
        layer.bias.zero_()  # type: ignore[union-attr]
        torch.testing.assert_close(f(x), layer(x), rtol=1e-4, atol=1e-4)
