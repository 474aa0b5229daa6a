"""What is around a call of compiled code: forward-mode derivatives, transforms of torch.func, modes, and tensors without memory. Right or loud, never a wrong number."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import aicc
import pytest
import torch
from aicc.runtime.no_memory import require_memory
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Function = Callable[..., Any]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh())


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 4)


@pytest.fixture(params=["before", "first inside"])
def compiled(request: pytest.FixtureRequest, model: nn.Module, x: torch.Tensor) -> Function:
    """Compiled code, called outside before or not."""
    made = torch.compile(lambda x: model(x), backend="aicc")
    if request.param == "before":
        with torch.no_grad():
            torch.testing.assert_close(made(x), model(x))
    return made


@pytest.fixture
def program(model: nn.Module, x: torch.Tensor) -> aicc.Program:
    return aicc.compile(model, x)


# -- forward mode


def _tangent(function: Function, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor | None:
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(function(forward_ad.make_dual(x, t.clone()))).tangent
        return None if found is None else found.clone()


@pytest.mark.parametrize("gradients", [False, True])
def test_tangents_are_kept(compiled: Function, model: nn.Module, x: torch.Tensor, gradients: bool) -> None:
    t = torch.randn(5, 4)
    with torch.set_grad_enabled(gradients):
        with pytest.warns(RuntimeWarning, match="forward-mode"):
            got = _tangent(compiled, x, t)
        assert got is not None
        torch.testing.assert_close(got, _tangent(model, x, t))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.testing.assert_close(compiled(x), model(x))  # outside of the level, compiled code
            with forward_ad.dual_level():
                torch.testing.assert_close(compiled(x), model(x))  # and inside, for tensors that are not dual


@torch.no_grad()
def test_tangents_of_what_is_written_to(x: torch.Tensor) -> None:
    def write(x: torch.Tensor) -> torch.Tensor:
        return x.mul_(x) + 1

    t = torch.randn(5, 4)
    compiled = torch.compile(write, backend="aicc")
    a, b = x.clone(), x.clone()
    with pytest.warns(RuntimeWarning, match="forward-mode"):
        got = _tangent(compiled, a, t)
    torch.testing.assert_close(got, _tangent(write, b, t))
    torch.testing.assert_close(a, b)


@torch.no_grad()
def test_tangents_of_parameters(compiled: Function, model: nn.Sequential, x: torch.Tensor) -> None:
    weight = model[0].weight
    t = torch.randn_like(weight)
    with forward_ad.dual_level(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        del model[0].weight
        model[0].weight = forward_ad.make_dual(weight.detach(), t)  # no parameter any more, as functional_call does it
        try:
            got, true = (forward_ad.unpack_dual(f(x)).tangent for f in (compiled, model))
        finally:
            del model[0].weight
            model[0].weight = weight
        assert got is not None
        torch.testing.assert_close(got, true)


def test_a_program_refuses_dual_tensors(program: aicc.Program, model: nn.Module, x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="dual tensor"):
        _tangent(program, x, torch.randn(5, 4))
    with forward_ad.dual_level():
        torch.testing.assert_close(program(x), model(x))


# -- transforms of torch.func


TRANSFORMS: dict[str, Callable[[Function, torch.Tensor], Any]] = {
    "vmap": lambda f, x: torch.vmap(f)(torch.stack([x, x + 1])),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x + 1,)),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones(5, 3)),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("gradients", [False, True])
def test_transforms(compiled: Function, model: nn.Module, x: torch.Tensor, name: str, gradients: bool) -> None:
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(TRANSFORMS[name](compiled, x), TRANSFORMS[name](model, x))


@pytest.mark.parametrize("name", [*TRANSFORMS, "functionalize"])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_program_refuses_transforms(program: aicc.Program, x: torch.Tensor, name: str, gradients: bool) -> None:
    transform = TRANSFORMS.get(name, lambda f, x: torch.func.functionalize(f)(x))
    with torch.set_grad_enabled(gradients):
        program(x)
        with pytest.raises(ValueError, match=r"torch\.func|requires a gradient"):
            transform(program, x)


def test_a_program_refuses_inputs_that_want_a_gradient(program: aicc.Program, model: nn.Module, x: torch.Tensor) -> None:
    program(x)
    x.requires_grad_()
    with pytest.raises(ValueError, match="input 0 requires a gradient"):
        program(x)
    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x))
    with pytest.raises(ValueError, match="input 0 requires a gradient"):
        program(x)


# -- modes


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        return made * 0 + 7 if func is torch.nn.functional.linear else made


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        return made * 0 + 7 if func is torch.ops.aten.addmm.default else made


@pytest.mark.parametrize("mode", [Functions, Operators])
@torch.no_grad()
def test_modes(compiled: Function, model: nn.Module, x: torch.Tensor, mode: type) -> None:
    with mode():
        torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("mode", [Functions, Operators])
@torch.no_grad()
def test_a_program_refuses_modes(program: aicc.Program, model: nn.Module, x: torch.Tensor, mode: type) -> None:
    with mode(), pytest.raises(ValueError, match=f"other modes \\({mode.__name__}\\)"):
        program(x)
    torch.testing.assert_close(program(x), model(x))


@torch.no_grad()
def test_a_program_refuses_another_default_device(program: aicc.Program, x: torch.Tensor) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match="DeviceContext"):
        program(x)


# -- what a program was compiled for


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor, scale: float = 1.0, *, shift: float = 0.0) -> torch.Tensor:
        return super().forward(x) * scale + shift


class Tripled(Doubled):
    def forward(self, x: torch.Tensor, scale: float = 3.0, *, shift: float = 0.0) -> torch.Tensor:
        return nn.Linear.forward(self, x) * scale


@contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _hook(before: bool) -> Iterator[None]:
    register = nn.modules.module.register_module_forward_pre_hook if before else nn.modules.module.register_module_forward_hook
    handle = register(lambda m, args: (args[0] + 1,)) if before else register(lambda m, args, out: out + 1)
    try:
        yield
    finally:
        handle.remove()


CHANGES: dict[str, Callable[[Doubled], Any]] = {
    "class": lambda m: _attribute(m, "__class__", Tripled),
    "forward of the class": lambda m: _attribute(Doubled, "forward", Tripled.forward),
    "default values": lambda m: _attribute(Doubled.forward, "__defaults__", (2.0,)),
    "named default values": lambda m: _attribute(Doubled.forward, "__kwdefaults__", {"shift": 1.0}),
    "hook of all modules": lambda m: _hook(before=False),
    "hook before all modules": lambda m: _hook(before=True),
}


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_a_program_refuses_other_code(name: str) -> None:
    model, x = Doubled(4, 3), torch.randn(2, 4)
    program = aicc.compile(nn.Sequential(model), x)
    expected = model(x)
    torch.testing.assert_close(program(x), expected)
    with CHANGES[name](model):
        assert not torch.equal(model(x), expected)
        with pytest.raises(ValueError, match="since the program was compiled"):
            program(x)
    torch.testing.assert_close(program(x), expected)


@torch.no_grad()
def test_a_program_refuses_other_defaults_of_a_function() -> None:
    def f(x: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
        return x * scale

    x = torch.randn(3)
    program, held = aicc.compile(f, x), aicc.compile(lambda x: f(x) + 1, x)
    torch.testing.assert_close(program(x), x * 2)
    torch.testing.assert_close(held(x), x * 2 + 1)
    f.__defaults__ = (3.0,)
    for p in (program, held):
        with pytest.raises(ValueError, match="other code or default values"):
            p(x)


# -- tensors without memory


def test_arguments_without_memory(x: torch.Tensor) -> None:
    """As FSDP leaves its parameters between calls; native code would read at address zero."""
    compiled = torch.compile(lambda x: x * 2 + 1, backend="aicc")
    torch.testing.assert_close(compiled(x), x * 2 + 1)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="storage was resized to nothing"):
        compiled(x)
    x.untyped_storage().resize_(80)
    x.fill_(2)
    torch.testing.assert_close(compiled(x), x * 2 + 1)


@torch.no_grad()
def test_parameters_without_memory(compiled: Function, model: nn.Sequential, x: torch.Tensor) -> None:
    weight = model[0].weight
    compiled(x)
    kept = weight.detach().clone()
    weight.untyped_storage().resize_(0)
    try:
        with pytest.raises(RuntimeError, match="storage was resized to nothing"):
            compiled(x)
    finally:
        weight.untyped_storage().resize_(48)
        weight.copy_(kept)
    torch.testing.assert_close(compiled(x), model(x))


@torch.no_grad()
def test_empty_tensors_need_no_memory() -> None:
    compiled = torch.compile(lambda x, y: (x * 2, y + 1), backend="aicc", dynamic=False)
    for _ in range(3):
        torch.testing.assert_close(compiled(torch.empty(0, 4), torch.ones(3)), (torch.empty(0, 4), torch.full((3,), 2.0)))
    require_memory([torch.empty(0), torch.ones(2)])
    with pytest.raises(RuntimeError, match="meta device"):
        require_memory([torch.empty(2, device="meta")])
