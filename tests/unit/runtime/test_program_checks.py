"""`aicc.compile`: what has changed since a program was compiled is right or refused, never silently wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aicc
import numpy as np
import pytest
import torch
from aicc.compiler.errors import UserError
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

pytestmark = pytest.mark.skipif(not hasattr(torch._dynamo, "aot_compile") and not hasattr(torch._dynamo.config, "enable_aot_compile"),
                                reason="this torch has no ahead-of-time compilation")
OPTIONS = {"cache": False}


class Scaled(nn.Module):
    """With a setting of its own, and of a class that pickle could not find again once it is shadowed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.layers = nn.Sequential(nn.ReLU(), nn.Dropout(0.5))
        self.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.linear(x)) * self.scale


def _set(name: str, value: Callable[[], Any]) -> Callable[[Scaled], Any]:
    return lambda m: setattr(m, name, value())


CHANGES: dict[str, tuple[Callable[[Scaled], Any], str]] = {
    "train": (lambda m: m.train(), "train"),
    "train of one layer": (lambda m: m.layers[1].train(), "train"),
    "a setting": (_set("scale", lambda: 3.0), "'scale'"),
    "a setting gone": (lambda m: delattr(m, "scale"), "'scale'"),
    "a layer": (lambda m: m.layers.__setitem__(0, nn.GELU()), "layers"),
    "a layer more": (lambda m: m.layers.append(nn.Tanh()), "layers"),
    "a hook": (lambda m: m.linear.register_forward_hook(lambda module, inputs, out: out + 1), "hooks"),
    "a hook before": (lambda m: m.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,)), "hooks"),
    "types": (lambda m: m.double(), "float64"),
    "a shape": (lambda m: setattr(m.linear, "weight", nn.Parameter(torch.randn(2, 8))), "parameter"),
    "strides": (lambda m: setattr(m.linear.weight, "data", m.linear.weight.data.t()), "strides"),
    "no bias": (lambda m: setattr(m.linear, "bias", None), "parameter"),
    "a subclass": (lambda m: setattr(m.linear, "weight", nn.Parameter(TwoTensor(torch.ones(8, 8), torch.ones(8, 8)))), "TwoTensor"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("called", [False, True])
def test_a_model_that_changes(name: str, called: bool) -> None:
    change, message = CHANGES[name]
    m, x = Scaled().eval(), torch.randn(4, 8)
    program = aicc.compile(m, x, options=OPTIONS)
    if called:
        torch.testing.assert_close(program(x), m(x))
    change(m)
    with pytest.raises(ValueError, match=message):
        program(x)


def test_the_model_of_a_method_and_of_a_closure() -> None:
    m, x = Scaled().eval(), torch.randn(4, 8)
    programs = [aicc.compile(m.forward, x, options=OPTIONS), aicc.compile(lambda y: m(y) + 1, x, options=OPTIONS)]
    m.train()
    for program in programs:
        with pytest.raises(ValueError, match="train"):
            program(x)


def test_what_may_change() -> None:
    m, x = Scaled().eval(), torch.randn(4, 8)
    program = aicc.compile(m, x, options=OPTIONS)
    program(x)
    m.requires_grad_(False)
    torch.testing.assert_close(program(x), m(x))
    m.load_state_dict({k: torch.randn_like(v) for k, v in m.state_dict().items()}, assign=True)
    torch.testing.assert_close(program(x), m(x))
    m.linear.weight.data = torch.randn(8, 8)
    torch.testing.assert_close(program(x), m(x))
    m.train()
    with pytest.raises(ValueError, match="train"):
        program(x)
    m.eval()
    torch.testing.assert_close(program(x), m(x))


def test_classes_of_functions() -> None:
    """torch's guards would have to be saved, which it refuses for these."""
    class Local(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    x = torch.randn(3)
    torch.testing.assert_close(aicc.compile(Local(), x, options=OPTIONS)(x), x + 1)


@dataclass(frozen=True)
class Call:
    """A function, its examples, other arguments for it, and what the message about them says (empty: they are right)."""

    function: Callable[..., Any]
    examples: tuple[Any, ...]
    args: tuple[Any, ...]
    message: str = ""


_X = torch.randn(4, 8)
_COMPLEX = torch.randn(4, 8, dtype=torch.complex64)
CALLS = {
    "one tensor twice, then two": Call(lambda a, b: a - 2 * b, (_X, _X), (_X, torch.randn(4, 8))),
    "views of one, then two": Call(lambda a, b: a[0] - 2 * b, (_X, _X[1]), (torch.randn(4, 8), torch.randn(8))),
    "whole for a float": Call(lambda a, s: a * s, (torch.arange(4), 2), (torch.arange(4), 2.0), r"2\.0 \(float\)"),
    "true for one": Call(lambda a, s: a * s, (torch.tensor([True]), 1), (torch.tensor([True]), True), r"True \(bool\)"),
    "zeros of other signs": Call(lambda a, s: a * s, (_X, 0.0), (_X, -0.0), r"-0\.0"),
    "not a number": Call(lambda a, s: a * s, (_X, math.nan), (_X, float("nan"))),
    "another number of no dimensions": Call(lambda a, s: a * s, (_X, torch.tensor(2.0)), (_X, torch.tensor(3.0))),
    "negated view": Call(lambda a: a + 1, (torch.empty_strided((4, 8), (16, 2)),), (_COMPLEX.conj().imag,), "negated"),
    "conjugated view": Call(lambda a: a + 1, (_COMPLEX,), (_COMPLEX.conj(),)),
    "a subclass": Call(lambda a: a + 1, (_X,), (TwoTensor(_X, _X),), "TwoTensor"),
    "a sparse tensor": Call(lambda a: a + 1, (_X,), (_X.to_sparse(),), "sparse"),
    "a parameter": Call(lambda a: a + 1, (_X,), (nn.Parameter(_X),), "requires a gradient"),
    "a tensor that requires a gradient": Call(lambda a: a + 1, (_X,), (_X.clone().requires_grad_(),), "requires a gradient"),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("called", [False, True])
def test_other_arguments(name: str, called: bool) -> None:
    call = CALLS[name]
    program = aicc.compile(call.function, *call.examples, options=OPTIONS)
    if called:
        torch.testing.assert_close(program(*call.examples), call.function(*call.examples), equal_nan=True)
    if call.message:
        with pytest.raises(ValueError, match=call.message):
            program(*call.args)
    else:
        torch.testing.assert_close(program(*call.args), call.function(*call.args), equal_nan=True)


def test_a_parameter_where_no_gradient_is_recorded() -> None:
    program = aicc.compile(lambda a: a + 1, _X, options=OPTIONS)
    with torch.no_grad():
        torch.testing.assert_close(program(nn.Parameter(_X)), _X + 1)


def test_the_order_of_keywords() -> None:
    def f(a: Tensor, *, b: Tensor, c: Tensor) -> Tensor:
        return a * b - c

    a, b, c = torch.randn(3, 4)
    program = aicc.compile(f, a, b=b, c=c, options=OPTIONS)
    torch.testing.assert_close(program(a, c=c, b=b), f(a, b=b, c=c))


class Config:
    scale = 2.0


@pytest.mark.parametrize("value", [np.ones(4, dtype="f4"), Config(), _X.to_sparse(), TwoTensor(_X, _X)], ids=["array", "object", "sparse", "subclass"])
def test_examples_that_no_call_could_be_compared_with(value: Any) -> None:
    with pytest.raises(UserError, match="input 1 is"):
        aicc.compile(lambda a, b: a + 1, _X, value, options=OPTIONS)


def test_an_example_that_is_a_parameter() -> None:
    m = nn.Linear(8, 8)

    def f(a: Tensor) -> Tensor:
        return m(a) - m.weight

    program = aicc.compile(f, m.weight, options=OPTIONS)
    x = torch.randn(8, 8)
    torch.testing.assert_close(program(x), f(x))


def test_inputs_that_are_written_to_and_read_as_others() -> None:
    def f(a: Tensor, b: Tensor) -> Tensor:
        a.add_(1)
        return a + b

    program = aicc.compile(f, torch.zeros(4), torch.zeros(4), options=OPTIONS)
    base = torch.zeros(8)
    torch.testing.assert_close(program(base[:4], base[4:]), torch.ones(4))  # parts of one that do not meet
    torch.testing.assert_close(base, torch.tensor([1.0] * 4 + [0.0] * 4))
    for args in ((base[:4], base[:4]), (base[:4], base[1:5])):
        with pytest.raises(ValueError, match="shares memory"):
            program(*args)
    torch.testing.assert_close(base, torch.tensor([1.0] * 4 + [0.0] * 4))


def test_autocast_and_the_default_type() -> None:
    m, x = nn.Linear(8, 8), torch.randn(4, 8)
    plain = aicc.compile(m, x, options=OPTIONS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = aicc.compile(m, x, options=OPTIONS)
        assert cast(x).dtype == torch.bfloat16
        with pytest.raises(ValueError, match="autocast to torch.bfloat16"):
            plain(x)
    with pytest.raises(ValueError, match="no autocast"):
        cast(x)
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(ValueError, match="default type torch.float64"):
            plain(x)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(plain(x), m(x))


def test_inside_of_a_compiled_function() -> None:
    m, x = nn.Linear(8, 8), torch.randn(4, 8)
    program = aicc.compile(m, x, options=OPTIONS)
    torch.testing.assert_close(torch.compile(lambda a: program(a * 2) + 1, backend="aicc")(x), m(x * 2) + 1)


def test_inference_mode() -> None:
    m, x = nn.Linear(8, 8), torch.randn(4, 8)
    program = aicc.compile(m, x, options=OPTIONS)
    with torch.inference_mode():
        made = torch.randn(4, 8)
        torch.testing.assert_close(program(made), m(made))
        inside = aicc.compile(m, x, options=OPTIONS)
    torch.testing.assert_close(program(made), m(made.clone()))
    torch.testing.assert_close(inside(x), m(x))
