"""Every model of the zoo, forward and one training step, through `torch.compile`, against float64.

The yardstick is eager float32's own error: with float64 eager as the truth, the compiled model may be at most
`HEADROOM` times as far from it as eager float32 is, plus the model's small floor. An error is the largest absolute
difference over the largest absolute value of the true tensor.

`AICC_TEST_BACKEND` names another backend ("aot_eager", "inductor"), to tell a fault of aicc from one of these tests.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from .reference import Float64Everywhere, double, true_output
from .zoo import MODELS, Inputs, ModelCase

BACKEND = os.environ.get("AICC_TEST_BACKEND", "aicc")
HEADROOM = 4.0
# A gradient that is zero in exact arithmetic (the bias of an attention key) is rounding noise whose size follows the
# model's other gradients, so no gradient is measured on a finer scale than this fraction of the model's largest one.
GRADIENT_SCALE = 1e-3


@dataclass(frozen=True)
class Step:
    """What one forward (and backward) leaves behind: output, loss, gradients by parameter, buffers by name."""

    output: Tensor
    loss: Tensor
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]


def _inference(case: ModelCase, attention: str, inputs: Inputs, compiled: bool) -> Tensor:
    model = case.model(attention)
    with torch.no_grad():
        return _compile(model)(*inputs) if compiled else model(*inputs)


def _training_step(case: ModelCase, model: nn.Module, inputs: Inputs, compiled: bool) -> Step:
    model.train()
    output = (_compile(model) if compiled else model)(*inputs)
    loss = case.loss(output, inputs)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Step(output.detach(), loss.detach(), gradients, dict(model.named_buffers()))


def _true_training_step(case: ModelCase, inputs: Inputs) -> Step:
    model = MODELS[case.truth or case.name].model().double()
    with Float64Everywhere():
        return _training_step(case, model, double(inputs), compiled=False)


def _compile(model: nn.Module, dynamic: bool | None = None) -> Any:
    return torch.compile(model, backend=BACKEND, fullgraph=False, dynamic=dynamic)


def _layout(tensor: Tensor) -> list[int]:
    """The strides that mean something: those of dimensions longer than 1."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def _check(what: str, actual: Tensor, eager: Tensor, truth: Tensor, floor: float, scale: float | None = None) -> str | None:
    """None, or a line that says how far `actual` is from `truth`. `scale` defaults to the largest value of `truth`."""
    assert truth.dtype == torch.float64 or not truth.is_floating_point(), what
    if (actual.shape, actual.dtype) != (eager.shape, eager.dtype):
        return f"{what}: {actual.dtype}{list(actual.shape)} instead of {eager.dtype}{list(eager.shape)}"
    if what == "output" and _layout(actual) != _layout(eager):
        return f"{what}: strides {actual.stride()} instead of {eager.stride()}"
    scale = scale or max(truth.abs().max().item(), torch.finfo(torch.float32).tiny)
    error = (actual.double() - truth).abs().max().item() / scale
    own = (eager.double() - truth).abs().max().item() / scale
    if error <= HEADROOM * own + floor:  # false for NaN
        return None
    return f"{what}: error {error:.2e}, eager's own {own:.2e}, floor {floor:.0e}"


def _check_step(case: ModelCase, actual: Step, eager: Step, truth: Step) -> list[str]:
    """The lines of every output, loss, gradient and buffer that is too far off."""
    found = [
        _check("output", actual.output, eager.output, truth.output, case.forward_floor),
        _check("loss", actual.loss, eager.loss, truth.loss, case.forward_floor),
    ]
    largest = max(g.abs().max().item() for g in truth.gradients.values() if g is not None)
    for name, true in truth.gradients.items():
        mine, theirs = actual.gradients[name], eager.gradients[name]
        if mine is None or theirs is None or true is None:
            if not (mine is None and theirs is None and true is None):
                found.append(f"gradient of {name}: missing on one side only")
            continue
        scale = max(true.abs().max().item(), GRADIENT_SCALE * largest)
        found.append(_check(f"gradient of {name}", mine, theirs, true, case.gradient_floor, scale))
    for name, true in truth.buffers.items():
        found.append(_check(f"buffer {name}", actual.buffers[name], eager.buffers[name], true, case.forward_floor))
    return [line for line in found if line is not None]


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Strict aicc, no compiled code from other tests, and nn.LSTM traced instead of left to eager."""
    monkeypatch.setenv("AICC_STRICT", "1")
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(allow_rnn=True):
        yield
    torch._dynamo.reset()


def _assert_compiled() -> None:
    assert counters["stats"]["unique_graphs"] > 0, "no graph reached the backend"


def _forward_parameters() -> list[Any]:
    rows = []
    for case in MODELS.values():
        if case.full_size:
            continue
        for attention in case.attention or ("sdpa",):
            slow = case.slow or attention == "eager"
            label = f"{case.name}-{attention}" if case.attention else case.name
            rows.append(pytest.param(case, attention, id=label, marks=[pytest.mark.slow] if slow else []))
    return rows


def _training_parameters() -> list[Any]:
    return [
        pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.slow_training else [])
        for case in MODELS.values()
        if not case.full_size
    ]


@pytest.mark.parametrize(("case", "attention"), _forward_parameters())
def test_forward(case: ModelCase, attention: str) -> None:
    inputs = case.example_inputs()
    actual = _inference(case, attention, inputs, compiled=True)
    _assert_compiled()
    eager = _inference(case, attention, inputs, compiled=False)
    truth = true_output(case, inputs, attention)
    assert _check("output", actual, eager, truth, case.forward_floor) is None


@pytest.mark.parametrize("case", _training_parameters())
def test_training_step(case: ModelCase) -> None:
    inputs = case.example_inputs()
    actual = _training_step(case, case.model(), inputs, compiled=True)
    _assert_compiled()
    eager = _training_step(case, case.model(), inputs, compiled=False)
    found = _check_step(case, actual, eager, _true_training_step(case, inputs))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        pytest.param("gpt2", ((2, 64), (3, 41)), marks=pytest.mark.slow),
        pytest.param("llama", ((2, 64), (3, 41)), marks=pytest.mark.slow),
        pytest.param("bert", ((3, 48), (2, 37)), marks=pytest.mark.slow),
        pytest.param("resnet18", ((2, 64), (3, 96)), marks=pytest.mark.slow),
        pytest.param("unet", ((2, 32), (3, 24)), marks=pytest.mark.slow),
    ],
)
def test_forward_dynamic(name: str, sizes: tuple[tuple[int, int], ...]) -> None:
    """With `dynamic=True` one compilation serves every batch and size."""
    case = MODELS[name]
    model, reference = case.model(), case.model().double()
    compiled = _compile(model, dynamic=True)
    graphs = []
    for batch, size in sizes:
        inputs = case.example_inputs(batch, size)
        with torch.no_grad():
            actual, eager = compiled(*inputs), model(*inputs)
            with Float64Everywhere():
                truth = reference(*double(inputs))
        assert _check("output", actual, eager, truth, case.forward_floor) is None, (batch, size)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs == graphs[:1] * len(sizes), "recompiled for another size"
