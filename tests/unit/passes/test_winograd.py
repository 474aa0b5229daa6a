"""Winograd's F(2, 3) and F(4, 3) in one and two dimensions: which convolutions they take, and how near to float64 the results are."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from aicc.backends.llvm import host_target
from aicc.compiler.driver import Compilation, watching
from aicc.ir.expr import evaluate, sym
from aicc.passes.winograd_forms import Sparse, form, noise
from torch import nn

LANES = host_target(None).lanes(32)


def compiled(layer: nn.Module, x: torch.Tensor, **options: object) -> tuple[torch.Tensor, list[str]]:
    """The result, and the messages of the pass."""
    torch._dynamo.reset()
    seen: list[Compilation] = []
    with torch.no_grad(), watching(compiled=seen.append):
        y = torch.compile(layer, backend="aicc", options={"cache": False, **options})(x)
    return y, [r.message for r in seen[0].remarks if r.pass_name == "winograd"]


def dense(s: Sparse, columns: int) -> np.ndarray:
    """The matrix, by the expressions that code is made from."""
    made = np.zeros((len(s.table), columns))
    for (r, row), k in product(enumerate(s.table), range(s.reads)):
        made[r, evaluate(s.column(k, sym("d0")), {"d0": r})] += row[k]
    return made


@pytest.mark.parametrize("outputs", [2, 4])
def test_forms_are_exact(outputs: int) -> None:
    """y = A ((G g) * (B x)) is the sum over three taps, in double precision."""
    f, random = form(outputs), np.random.default_rng(0)
    x, g = random.standard_normal(f.products), random.standard_normal(3)
    y = dense(f.results, f.products) @ ((np.array(f.taps) @ g) * (dense(f.inputs, f.products) @ x))
    np.testing.assert_allclose(y, np.convolve(x, g[::-1], "valid"), rtol=0, atol=1e-13)
    assert all(float(np.float32(v)) == v for s in (f.inputs, f.results) for row in s.table for v in row), "factors are rounded"


def error(y: torch.Tensor, layer: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        truth = layer.double()(x.double())
        layer.float()
    return ((y.double() - truth).abs().max() / truth.abs().max()).item()


@pytest.mark.product
@pytest.mark.parametrize("budget", [1.2, 2.0, 9.0])
@pytest.mark.parametrize("size,padding,stride,kernel", [
    ((8, 9), 1, 1, 3), ((5, 12), 0, 1, 3), ((9, 10), 1, (2, 1), 3), ((6, 11), (0, 1), 1, (1, 3)), ((7, 8), (2, 1), 1, (5, 3)), ((4, 10), (1, 2), 1, 3),
    ((8, 9), (1, 2), 1, (3, 5)),  # along the columns
])
def test_shapes(size: tuple[int, int], padding: int, stride: int, kernel: int, budget: float) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(34, 37, kernel, stride, padding), nn.ReLU()).eval()
    x = torch.randn(2, 34, *size)
    y, messages = compiled(layer, x, winograd_budget=budget)
    assert len(messages) == 1 and ("outputs" in messages[0] or budget < max(2, noise((2,), LANES))), messages
    assert error(y, layer, x) < (1e-6 if budget < 2 else 2e-6)  # the wider forms are farther, by up to their budget


@pytest.mark.parametrize("budget", [0.9, 2.0, 3.0])
def test_stays_in_its_budget(budget: float) -> None:
    """On average over seeds, against eager's own distance from float64; where no form is in it, sums are direct."""
    found, forms = [], set()
    for seed in range(3):
        torch.manual_seed(seed)
        layer, x = nn.Conv2d(128, 128, 3, padding=1), torch.randn(1, 128, 28, 28).relu()
        y, messages = compiled(layer, x, winograd_budget=budget)
        forms.add(messages[0].partition(" outputs")[0])
        with torch.no_grad():
            found.append(rms(y, layer, x) / rms(layer(x), layer, x))
    (sizes,) = forms
    if "stay products" in sizes:
        assert LANES >= 16 and budget < 1
        return
    mean, expected = sum(found) / len(found), noise((int(sizes[0]), int(sizes[-1])), LANES)
    assert expected <= budget and mean <= budget
    assert mean <= expected * 1.15, "the table is out of date"


def rms(y: torch.Tensor, layer: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        truth = layer.double()(x.double())
        layer.float()
    return (y.double() - truth).square().mean().sqrt().item()


def test_what_does_not_pay_stays_direct() -> None:
    """One tile of two by two outputs: more taps would be read from memory, to be used once."""
    _, messages = compiled(nn.Conv2d(256, 256, 3, padding=1), torch.randn(1, 256, 2, 2))
    assert len(messages) == 1 and "stay products" in messages[0], messages


def test_a_budget_below_every_form_leaves_products() -> None:
    layer, x = nn.Conv2d(128, 128, 3, padding=1), torch.randn(1, 128, 28, 28)
    assert "outputs" in compiled(layer, x, winograd_budget=3.0)[1][0]
    assert "stay products" in compiled(layer, x, winograd_budget=0.1)[1][0]


@pytest.mark.parametrize("layer", [
    nn.Conv2d(34, 40, 3, 2, 1),             # a stride along the row
    nn.Conv2d(34, 40, 5, padding=2),        # five taps
    nn.Conv2d(16, 40, 3, padding=1),        # few channels
    nn.Conv2d(40, 40, 3, padding=1, groups=40),
    nn.Conv2d(34, 40, 3, padding=2, dilation=2),
    nn.Conv2d(34, 40, 3, padding=1).double(),
], ids=["stride", "taps", "channels", "depthwise", "dilation", "double"])
def test_declined(layer: nn.Module) -> None:
    x = torch.randn(1, layer.in_channels, 9, 10, dtype=layer.weight.dtype)  # type: ignore[arg-type]
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
