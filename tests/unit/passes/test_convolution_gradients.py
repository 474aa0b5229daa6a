"""Gradients of convolutions and of max pooling against float64, and what their code looks like."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from aicc.compiler import dynamo
from aicc.compiler.driver import Compilation, watching
from aicc.compiler.dynamo import arg_kinds
from torch import nn

LAYERS = {
    "3x3": (nn.Conv2d(32, 48, 3, 1, 1), (2, 32, 9, 10)),
    "dilated": (nn.Conv2d(32, 48, 3, 1, 2, dilation=2), (2, 32, 9, 9)),
    "strided": (nn.Conv2d(32, 48, 3, 2, 1), (2, 32, 15, 14)),
    "strided 1x1": (nn.Conv2d(32, 48, 1, 2), (2, 32, 15, 14)),
    "strided rows": (nn.Conv2d(32, 32, (3, 5), (2, 1), 0), (2, 32, 12, 11)),
    "stride 3": (nn.Conv2d(32, 48, 3, 3, 1), (2, 32, 15, 14)),
    "image": (nn.Conv2d(3, 64, 7, 2, 3), (2, 3, 33, 34)),
    "odd channels": (nn.Conv2d(19, 21, 3, 1, 1), (2, 19, 9, 9)),
    "groups": (nn.Conv2d(32, 64, 3, 1, 1, groups=4), (2, 32, 9, 9)),
    "depthwise": (nn.Conv2d(32, 32, 3, 2, 1, groups=32), (2, 32, 9, 9)),
    "transposed": (nn.ConvTranspose2d(32, 48, 4, 2, 1), (2, 32, 9, 9)),
    "one dimension": (nn.Conv1d(32, 48, 3, 1, 1), (2, 32, 30)),
    "max pool": (nn.Sequential(nn.Conv2d(32, 32, 1), nn.MaxPool2d(3, 2, 1)), (2, 32, 12, 13)),
    "max pool, cropped": (nn.Sequential(nn.Conv2d(32, 32, 1), nn.MaxPool2d(2)), (2, 32, 13, 12)),
    "max pool, ceil": (nn.Sequential(nn.Conv2d(32, 32, 1), nn.MaxPool2d(3, 2, 1, ceil_mode=True)), (2, 32, 12, 13)),
    "max pool, stride 1": (nn.Sequential(nn.Conv2d(32, 32, 1), nn.MaxPool2d(3, 1, 1)), (2, 32, 7, 8)),
    "max pool of volumes": (nn.Sequential(nn.MaxPool3d(2)), (2, 4, 6, 6, 6)),
    "chain": (nn.Sequential(nn.Conv2d(32, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.Softplus(), nn.Conv2d(64, 32, 3, 1, 1), nn.Softplus()), (4, 32, 9, 11)),
}


def gradients(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad is not None
    return [x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


REPEATED = ("3x3", "strided rows", "strided 1x1", "stride 3", "odd channels", "max pool, cropped", "max pool, stride 1")
"""What others show too: strides, padding, odd sizes and both kinds of windows."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in REPEATED)) for n in LAYERS])
def test_gradients(name: str) -> None:
    layer, shape = LAYERS[name]
    torch.manual_seed(0)
    x = torch.randn(shape)
    truth = gradients(copy.deepcopy(layer).double(), x.double())
    torch._dynamo.reset()
    module = copy.deepcopy(layer)
    given = x.clone().requires_grad_()
    torch.compile(module, backend="aicc", options={"cache": False})(given).square().sum().backward()
    assert given.grad is not None
    scale = max(t.abs().max().item() for t in truth)
    for t, g in zip(truth, [given.grad, *(p.grad for p in module.parameters() if p.grad is not None)], strict=True):
        assert g.stride() == torch.empty_like(t).stride() and g.shape == t.shape
        assert (g.double() - t).abs().max().item() <= 2e-5 * max(t.abs().max().item(), 1e-3 * scale), name


def training(layer: nn.Module, x: torch.Tensor, **options: Any) -> list[Compilation]:
    """The forward and the backward graph."""
    torch._dynamo.reset()
    seen: list[Compilation] = []
    with watching(compiled=seen.append):
        torch.compile(layer, backend="aicc", options={"cache": False, **options})(x).square().sum().backward()
    return seen


def test_layouts_of_what_is_saved_beside_effects() -> None:
    """Checks of linear algebra are effects: the forward graph has a result for their order in front of the others. The convolution's activation has
    another layout than eager's, and lies where, one place off, the matrix would."""
    layer = nn.Sequential(nn.Conv2d(32, 64, 3, 1, 1), nn.Softplus(), nn.Conv2d(64, 32, 3, 1, 1))

    def function(x: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.linalg.lu_factor(a)[0], layer(x) * torch.linalg.inv(a[:, :3]).sum()

    torch.manual_seed(0)
    given = [torch.randn(2, 32, 12, 12, requires_grad=True), torch.randn(3, 5, requires_grad=True)]
    wanted = torch.autograd.grad([y.sum() for y in function(*given)], given)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aicc", options={"cache": False, "strict": True})
    for got, want in zip(torch.autograd.grad([y.sum() for y in compiled(*given)], given), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("train", [True, False])
def test_parameters_beside_effects(train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the arguments token (checks are no effects before torch 2.13), weight, bias, input and matrix, two are parameters: the matrix, one place behind,
    is none."""
    seen: list[list[str]] = []

    def kinds(role: str, count: int) -> list[str]:
        seen.append(arg_kinds(role, count))
        return seen[-1]

    monkeypatch.setattr(dynamo, "arg_kinds", kinds)
    layer = nn.Linear(4, 4)
    with torch.set_grad_enabled(train):
        torch.compile(lambda x, a: layer(x) @ torch.linalg.inv(a), backend="aicc", options={"cache": False})(torch.randn(3, 4), torch.randn(4, 4))
    assert seen[0][-4:] == ["param", "param", "input", "input"] and "param" not in seen[0][:-4]


def test_saved_activations_keep_their_layout() -> None:
    """Channels innermost on both sides: the only copy is the user's result."""
    layer = nn.Sequential(nn.Conv2d(32, 64, 3, 1, 1), nn.Softplus(), nn.Conv2d(64, 32, 3, 1, 1))
    forward, backward = training(layer, torch.randn(2, 32, 12, 12))
    assert forward.graph is not None and backward.graph is not None
    saved = [b["strides"] for b in forward.graph.manifest["buffers"] if b["shape"] == [2, 64, 12, 12]]
    taken = [i["strides"] for i in backward.graph.manifest["inputs"] if i["shape"] == [2, 64, 12, 12]]
    assert saved and saved == taken and all(s[1] == 1 for s in saved)


def test_windows_are_not_spread() -> None:
    """The packed input of a weight's gradient is as large as the input, not nine times that."""
    channels = 192  # panels of 16, 32, 48 and 64 columns divide it
    _, backward = training(nn.Sequential(nn.Conv2d(channels, 64, 3, 1, 1)), torch.randn(2, channels, 12, 12))
    messages = [r.message for r in backward.remarks if r.pass_name == "pack"]
    assert any("for all taps" in m for m in messages), messages
    planned = backward.stats["memory"]
    assert max(v for v in planned.values() if isinstance(v, int)) < 9 * 2 * channels * 14 * 14 * 4


@pytest.mark.parametrize("positions", [24, 48])
def test_heads_are_no_windows(positions: int) -> None:
    """A projection of merged heads reads their batch and head in one dimension, as a weight's gradient reads taps and positions."""
    def project(p: torch.Tensor, v: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.bmm(p, v).view(2, 4, positions, 32).transpose(1, 2).reshape(2 * positions, 128) @ w

    torch.manual_seed(0)
    inputs = torch.randn(8, positions, positions), torch.randn(8, positions, 32), torch.randn(128, 128)
    seen: list[Compilation] = []
    torch._dynamo.reset()
    with watching(compiled=seen.append), torch.no_grad():
        got = torch.compile(project, backend="aicc", options={"cache": False, "strict": True, "verify": True})(*inputs)
    torch.testing.assert_close(got, project(*inputs), rtol=1e-4, atol=1e-3)
    messages = [r.message for r in seen[0].remarks if r.pass_name == "pack"]
    assert not any("taps" in m or "positions" in m for m in messages), messages


def test_data_gradients_take_winograd_where_the_budget_allows() -> None:
    layer = nn.Sequential(nn.Conv2d(64, 64, 3, 1, 1), nn.Softplus(), nn.Conv2d(64, 64, 3, 1, 1))
    _, backward = training(layer, torch.randn(4, 64, 28, 28), winograd_budget=8.0)
    assert any("outputs of 3 taps" in r.message for r in backward.remarks if r.pass_name == "winograd")


def test_neither_direction_takes_it_by_default() -> None:
    """Sums over all positions, as in gradients of norms, do not average out what Winograd rounds alike at each."""
    layer = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.SiLU(), nn.Conv2d(64, 64, 3, padding=1))
    messages = [r.message for made in training(layer, torch.randn(4, 64, 28, 28)) for r in made.remarks if r.pass_name == "winograd"]
    assert messages and all("stay products" in m for m in messages)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_max_pool_chooses_as_eager(dtype: torch.dtype) -> None:
    """Places too, with ties, padding and rows of the lowest value."""
    x = torch.randint(0, 3, (2, 5, 9, 8)).to(dtype)
    x[0, 0], x[1, 1, :4] = float("-inf"), float("-inf")
    layer = nn.MaxPool2d(3, 2, 1, return_indices=True)
    torch._dynamo.reset()
    for got, want in zip(torch.compile(layer, backend="aicc", options={"cache": False})(x), layer(x), strict=True):
        assert torch.equal(got, want)
