"""`aicc.compile`: a program for fixed inputs, called without Dynamo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import aicc
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytestmark = pytest.mark.skipif(not hasattr(torch._dynamo, "aot_compile") and not hasattr(torch._dynamo.config, "enable_aot_compile"),
                                reason="this torch has no ahead-of-time compilation")


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.LayerNorm(24), nn.Linear(24, 8), nn.Softmax(-1)).eval()


def test_is_what_eager_gives() -> None:
    m, x = model(), torch.randn(5, 16)
    program = aicc.compile(m, x, options={"cache": False})
    for _ in range(3):
        x = torch.randn(5, 16)
        y = program(x)
        torch.testing.assert_close(y, m(x))
        assert not y.requires_grad


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).relu()
        return x


def test_a_class_and_a_method() -> None:
    m, x = Residual(), torch.randn(5, 16)
    for function in (m, m.forward):
        torch.testing.assert_close(aicc.compile(function, x, options={"cache": False})(x), m(x))


def test_does_not_enter_dynamo() -> None:
    """Guards are what would notice that the module is another one."""
    m, x = model(), torch.randn(5, 16)
    program = aicc.compile(m, x, options={"cache": False})
    with torch.compiler.set_stance("fail_on_recompile"):
        torch._dynamo.reset()  # forgets all that Dynamo has compiled
        torch.testing.assert_close(program(x), m(x))


def test_parameters_are_read_in_each_call() -> None:
    m, x = model(), torch.randn(5, 16)
    program = aicc.compile(m, x, options={"cache": False})
    program(x)
    with torch.no_grad():
        m[0].weight.mul_(2)  # type: ignore[operator, union-attr]
        m[3].weight = nn.Parameter(torch.randn(8, 24))
    torch.testing.assert_close(program(x), m(x))


OTHERS = {
    "another shape": lambda: torch.randn(6, 16),
    "other strides": lambda: torch.randn(16, 5).t(),
    "another type": lambda: torch.randn(5, 16, dtype=torch.float64),
    "a number": lambda: 3.0,
}


@pytest.mark.parametrize("name", OTHERS)
def test_inputs_unlike_the_examples(name: str) -> None:
    program = aicc.compile(model(), torch.randn(5, 16), options={"cache": False})
    with pytest.raises(ValueError, match="compiled for"):
        program(OTHERS[name]())


def test_how_many_inputs() -> None:
    program = aicc.compile(model(), torch.randn(5, 16), options={"cache": False})
    with pytest.raises(ValueError, match="compiled for inputs"):
        program(torch.randn(5, 16), torch.randn(5, 16))


def test_nested_inputs_results_and_numbers() -> None:
    def f(pair: tuple[Tensor, dict[str, Tensor]], scale: float, *, bias: Tensor) -> dict[str, Any]:
        x, more = pair
        return {"sum": x * scale + bias, "both": [x + more["y"], more["y"].relu()], "scale": scale}

    args = ((torch.randn(4), {"y": torch.randn(4)}), 0.5)
    bias = torch.randn(4)
    program = aicc.compile(f, *args, bias=bias, options={"cache": False})
    got, expected = program(*args, bias=bias), f(*args, bias=bias)
    torch.testing.assert_close(got["sum"], expected["sum"])
    torch.testing.assert_close(got["both"], expected["both"])
    assert got["scale"] == 0.5
    with pytest.raises(ValueError, match=r"input 2 is 2\.0"):
        program(args[0], 2.0, bias=bias)


def test_inputs_that_are_written_to() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        x.add_(y)
        return x * 2

    x, y = torch.zeros(8), torch.ones(8)
    program = aicc.compile(f, x.clone(), y, options={"cache": False})
    for k in (1, 2):
        torch.testing.assert_close(program(x, y), torch.full((8,), 2.0 * k))
        torch.testing.assert_close(x, torch.full((8,), float(k)))


def test_buffers_that_are_written_to() -> None:
    m = nn.BatchNorm1d(4)
    other = nn.BatchNorm1d(4)
    x = torch.randn(16, 4)
    program = aicc.compile(m, x, options={"cache": False})
    for _ in range(2):
        torch.testing.assert_close(program(x), other(x))
    torch.testing.assert_close(m.running_mean, other.running_mean)


def test_hooks_are_part_of_the_model() -> None:
    m, x = nn.Linear(4, 4), torch.randn(2, 4)
    m.register_forward_hook(lambda module, inputs, out: out + 1)
    program = aicc.compile(m, x, options={"cache": False})
    torch.testing.assert_close(program(x), F.linear(x, m.weight, m.bias) + 1)


def test_what_dynamo_cannot_capture() -> None:
    def f(x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x

    with pytest.raises(Exception, match="data-dependent|Data-dependent"):
        aicc.compile(f, torch.randn(3))


class Holder:
    """No module, but it has some."""

    def __init__(self, net: nn.Module):
        self.nets = [net]

    def call(self, x: Tensor) -> Tensor:
        return self.nets[0](x)  # type: ignore[no-any-return]


def test_variables_and_objects_of_functions() -> None:
    net, scale, x = nn.Sequential(nn.Linear(8, 8), nn.Dropout()).eval(), 2.0, torch.randn(4, 8)

    def scaled(x: Tensor) -> Tensor:
        return x * scale
    programs = [aicc.compile(Holder(net).call, x), aicc.compile(scaled, x)]
    for program in programs:
        program(x)
    net.train()
    scale = 3.0
    for program in programs:
        with pytest.raises(ValueError, match="since the program was compiled"):
            program(x)


def test_a_variable_that_is_not_a_number_stays_the_same() -> None:
    fill, x = float("nan"), torch.randn(4)

    def filled(x: Tensor) -> Tensor:
        return x.masked_fill(x > 0, fill)
    program = aicc.compile(filled, x)
    torch.testing.assert_close(program(x), filled(x), equal_nan=True)


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.scales, self.named = nn.LayerNorm(8), [1.0, 2.0], {"by": 3, "more": [4, (5,)]}

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * self.scales[1] + self.named["by"]


def _forward(m: Listed) -> None:
    m.norm.forward = lambda x: x + 1  # type: ignore[method-assign, assignment]


def _eps(m: Listed) -> None:
    m.norm.eps = 1.0


def _in_list(m: Listed) -> None:
    m.scales[1] = 3.0


def _type_in_list(m: Listed) -> None:
    m.scales[1] = 2


def _longer_list(m: Listed) -> None:
    m.scales.insert(0, 0.0)


def _other_list(m: Listed) -> None:
    m.scales = [1.0, 5.0]


def _in_dict(m: Listed) -> None:
    m.named["by"] = 4


def _deep(m: Listed) -> None:
    m.named["more"][0] = 7  # type: ignore[index]


@pytest.mark.parametrize("change", [_forward, _eps, _in_list, _type_in_list, _longer_list, _other_list, _in_dict, _deep])
def test_settings_of_layers_and_what_lies_in_lists(change: Callable[[Listed], None]) -> None:
    m, x = Listed(), torch.randn(4, 8)
    program = aicc.compile(m, x)
    m.remark = "a new attribute is no method"
    for _ in range(2):
        torch.testing.assert_close(program(x), m(x).detach())
    change(m)
    with pytest.raises(ValueError, match="since the program was compiled"):
        program(x)


def test_a_list_in_a_closure() -> None:
    scales, x = [2.0], torch.randn(4)

    def scaled(x: Tensor) -> Tensor:
        return x * scales[0]
    program = aicc.compile(scaled, x)
    torch.testing.assert_close(program(x), x * 2)
    scales[0] = 3.0
    with pytest.raises(ValueError, match="'scales' of the function has got other values"):
        program(x)


@pytest.mark.parametrize("before, after", [(torch.sin, torch.cos), (lambda x: x + 1, lambda x: x + 2)], ids=["torch", "python"])
def test_functions_that_layers_hold(before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
    class Activated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.activation = before

        def forward(self, x: Tensor) -> Tensor:
            return self.activation(x)
    m, x = Activated(), torch.randn(4)
    program = aicc.compile(m, x)
    torch.testing.assert_close(program(x), before(x))
    m.activation = after
    with pytest.raises(ValueError, match="got another 'activation' since the program was compiled"):
        program(x)
