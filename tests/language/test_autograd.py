"""What torch's autograd lets a user write: functions of their own, hooks, checkpoints, higher derivatives, torch.func."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from .harness import Row, check, close


def _x() -> tuple[Tensor, ...]:
    return (torch.randn(4, 6),)


def _xw() -> tuple[Tensor, ...]:
    return torch.randn(4, 8), torch.randn(8, 8)


class _Doubled(torch.autograd.Function):
    """Its gradient is twice what it should be: a compiler that differentiated the forward itself would be found out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.scale = scale
        return x.sin() * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, = ctx.saved_tensors
        return grad * x.cos() * 2 * ctx.scale, None


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _tensor_hook(x: Tensor) -> Tensor:
    y = x * 2
    y.register_hook(lambda g: g * 3)
    return y.sin()


class _Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.inner.register_forward_hook(lambda module, args, out: out * 2)
        self.inner.register_forward_pre_hook(lambda module, args: (args[0] + 1,))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).tanh()


class _BackwardHooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.inner.register_full_backward_hook(lambda module, given, out: tuple(g * 2 if g is not None else None for g in given))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).tanh()


class _GradHooked(nn.Module):
    """A hook on a parameter, set before compilation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))
        self.weight.register_hook(_thrice)

    def __deepcopy__(self, memo: Any) -> _GradHooked:
        made = _GradHooked()
        made.load_state_dict(self.state_dict())
        return made

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).sin()


def _thrice(g: Tensor) -> Tensor:
    return g * 3


def _checkpointed(x: Tensor, w: Tensor, *, reentrant: bool = False) -> Tensor:
    return checkpoint(lambda x, w: torch.sin(x @ w).cos() @ w, x, w, use_reentrant=reentrant)


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op == torch.ops.aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE


def _selective(x: Tensor, w: Tensor) -> Tensor:
    context = functools.partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(lambda x, w: torch.sin(x @ w).cos() @ w, x, w, use_reentrant=False, context_fn=context)


def _inner_gradient(x: Tensor) -> Tensor:
    y = x.detach().requires_grad_()
    g, = torch.autograd.grad((y**3).sum(), y)
    return g + x


ROWS: dict[str, Row] = {
    "a Function of one's own": Row(lambda x: _Doubled.apply(x, 1.5) * 2, _x, train=True),
    "a Function with setup_context": Row(lambda x: _Straight.apply(x * 3), _x, train=True),
    "a tensor hook": Row(_tensor_hook, _x, train=True),
    "a hook on a parameter": Row(_GradHooked(), _x, train=True),
    "forward hooks of a module": Row(_Hooked(), _x, train=True),
    "backward hooks of a module": Row(_BackwardHooked(), _x, train=True, breaks=True, note="Dynamo parts the function at the module"),
    "checkpoint": Row(_checkpointed, _xw, train=True),
    "checkpoint, reentrant": Row(functools.partial(_checkpointed, reentrant=True), _xw, train=True),
    "selective checkpoint": Row(_selective, _xw, train=True),
    "autograd.grad inside": Row(_inner_gradient, _x, breaks=True, note="in one graph under trace_autograd_ops; torch.func.grad always"),
    "torch.func.grad": Row(lambda x: torch.func.grad(lambda y: (y**3).sum())(x), _x),
    "torch.func.vjp": Row(lambda x: torch.func.vjp(torch.sin, x)[1](x), _x),
    "torch.func.jvp": Row(lambda x: torch.func.jvp(lambda y: y.sin() * y, (x,), (x * 2,)), _x),
    "torch.func.vmap": Row(lambda x: torch.func.vmap(lambda r: (r * r).sum() + r)(x), _x),
    "vmap of grad": Row(lambda x: torch.func.vmap(torch.func.grad(lambda r: (r**3).sum()))(x), _x),
    "jacrev and jacfwd": Row(lambda x: (torch.func.jacrev(torch.sin)(x), torch.func.jacfwd(torch.cos)(x)), lambda: (torch.randn(3),)),
    "hessian": Row(torch.func.hessian(lambda y: (y**3).sum() * y[0]), lambda: (torch.randn(3),)),
    "functional_call": Row(lambda w, b, x: torch.func.functional_call(_LINEAR, {"weight": w, "bias": b}, (x,)),
                           lambda: (torch.randn(5, 6), torch.randn(5), torch.randn(4, 6)), train=True),
    "some outputs without gradients": Row(lambda x: (x * 2, x.detach() + 1, x.argmax()), _x, train=True),
    "integers among the inputs": Row(lambda w, i: w[i] * 2, lambda: (torch.randn(5, 3), torch.tensor([0, 0, 4])), train=True),
    "no_grad results": Row(lambda x: x.max(1), _x, train=True),
}
_LINEAR = nn.Linear(6, 5)


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str) -> None:
    check(ROWS[name])


def test_backward_twice() -> None:
    """retain_graph, and gradients that accumulate."""
    x = torch.randn(4, requires_grad=True)
    y = torch.compile(lambda x: x.sin() * 2, backend="aicc")(x).sum()
    y.backward(retain_graph=True)
    y.backward()
    torch.testing.assert_close(x.grad, 4 * x.detach().cos())


def test_freed_buffers_are_an_error_as_in_eager() -> None:
    x = torch.randn(4, requires_grad=True)
    y = torch.compile(lambda x: x.sin() * 2, backend="aicc")(x).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


def test_double_backward_says_what_is_wrong() -> None:
    """torch does not differentiate a compiled backward pass: an error that says so, never a wrong number."""
    x = torch.randn(4, requires_grad=True)
    f = torch.compile(lambda x: (x**3).sum(), backend="aicc")
    g, = torch.autograd.grad(f(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        g.sum().backward()


def test_second_derivatives_inside_one_function() -> None:
    """What works instead: the gradient of the gradient within what is compiled."""
    def f(x: Tensor) -> Tensor:
        return torch.func.grad(lambda y: torch.func.grad(lambda z: (z**3).sum())(y).sum())(x)

    x = torch.randn(4)
    torch.testing.assert_close(torch.compile(f, backend="aicc")(x), 6 * x)


def test_saved_tensor_hooks_around() -> None:
    """pack and unpack hooks see what the compiled forward saves."""
    seen: list[torch.Size] = []

    def pack(t: Tensor) -> Tensor:
        seen.append(t.shape)
        return t * 1

    f = torch.compile(lambda x, w: (x @ w).sin(), backend="aicc")
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = f(x, w)
    y.sum().backward()
    assert seen
    a, b = x.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    (a @ b).sin().sum().backward()
    close((x.grad, w.grad), (a.grad, b.grad))


def test_accumulate_grad_hooks() -> None:
    """post_accumulate_grad hooks, as optimizers in the backward pass use them."""
    model = nn.Linear(4, 3)
    stepped: list[int] = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: stepped.append(p.numel()))
    torch.compile(model, backend="aicc")(torch.randn(2, 4)).sum().backward()
    assert sorted(stepped) == [3, 12]


