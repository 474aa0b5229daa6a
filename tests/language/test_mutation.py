"""In-place operations: on inputs, on views of them, on buffers and parameters, on what the function made itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from .harness import EAGER, Row, check


def _x() -> tuple[Tensor, ...]:
    return (torch.randn(4, 6),)


def _halve_in_place(x: Tensor) -> Tensor:
    y = x * 3
    x.mul_(0.5)
    return y + x


def _write_a_part(x: Tensor, y: Tensor) -> Tensor:
    x[1:3].add_(y)
    x[:, 0] = 7
    return x.sum(0)


def _write_after_a_view(x: Tensor) -> Tensor:
    v = x.t()
    x.add_(1)
    return v * 2


def _write_through_a_view(x: Tensor) -> Tensor:
    x.view(-1)[::3].zero_()
    return x + 1


def _write_an_intermediate(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x + 1
    v = y[1:]
    y.mul_(2)
    return v, y


def _swap(x: Tensor, y: Tensor) -> None:
    old = x.clone()
    x.copy_(y)
    y.copy_(old)


def _overlapping() -> tuple[Tensor, ...]:
    base = torch.randn(5, 4)
    return base[:4], base[1:]


def _same_twice() -> tuple[Tensor, ...]:
    x = torch.randn(4, 4)
    return x, x


def _into(y: Tensor, x: Tensor) -> Tensor:
    torch.add(x, 1, out=y)
    return y * 2


def _index_write(x: Tensor, i: Tensor) -> Tensor:
    x[i] = 0
    x[x > 1] = 5
    return x * 2


class _Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(6))
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.mean.lerp_(x.detach().mean(0), 0.1)
        return (x - self.mean) * self.weight


def _batch_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5), nn.BatchNorm1d(5))


ROWS: dict[str, Row] = {
    "an input": Row(_halve_in_place, _x),
    "a transposed input": Row(_halve_in_place, lambda: (torch.randn(4, 6).t(),)),
    "a slice of a larger tensor": Row(_halve_in_place, lambda: (torch.randn(8, 9)[::2, 1:7],)),
    "an expanded input, read only": Row(lambda x: x.clone().mul_(2), lambda: (torch.randn(4, 1).expand(4, 6),)),
    "a part of an input": Row(_write_a_part, lambda: (torch.randn(5, 3), torch.randn(2, 3))),
    "an input that has a view": Row(_write_after_a_view, _x),
    "an input through a view": Row(_write_through_a_view, _x),
    "an intermediate that has a view": Row(_write_an_intermediate, _x),
    "two inputs, no output": Row(_swap, lambda: (torch.randn(4, 6), torch.randn(4, 6))),
    "overlapping inputs": Row(lambda x, y: (x.mul_(2), y + 1)[1], _overlapping),
    "one input twice": Row(lambda x, y: (x.mul_(2), y + 1)[1], _same_twice),
    "integers": Row(lambda x: x.add_(1).remainder(3), lambda: (torch.randint(0, 9, (7,)),)),
    "by index and by mask": Row(_index_write, lambda: (torch.randn(7), torch.tensor([1, 4]))),
    "index_add_": Row(lambda x, i: x.index_add_(0, i, torch.ones(3, 2)), lambda: (torch.randn(4, 2), torch.tensor([3, 0, 3]))),
    "scatter_": Row(lambda x, i: x.scatter_(1, i, 3.0) + 1, lambda: (torch.randn(3, 4), torch.tensor([[0, 2], [1, 1], [3, 0]]))),
    "out=": Row(_into, lambda: (torch.zeros(4, 6), torch.randn(4, 6))),
    "out= that is resized": Row(_into, lambda: (torch.zeros(0), torch.randn(4, 6)), breaks=True, note="Dynamo parts the function there"),
    "a 0-d tensor": Row(lambda x: x.add_(1) * 2, lambda: (torch.randn(()),)),
    "an intermediate, training": Row(lambda x: x.sin().mul_(2).add_(x).relu_(), _x, train=True),
    "buffers": Row(_Counter(), _x),
    "buffers, training": Row(_Counter(), _x, train=True),
    "batch norm, training": Row(_batch_norm(), lambda: (torch.randn(6, 3, 8, 8),), train=True, tolerance=1e-3),
    "batch norm, evaluation": Row(_batch_norm().eval(), lambda: (torch.randn(6, 3, 8, 8),)),
    "batch norm with a cumulative mean": Row(nn.BatchNorm1d(6, momentum=None), _x, train=True, how=EAGER, breaks=True,
                                             note="torch reads its counter from data; compiled under capture_scalar_outputs"),
    "dtype and shape kept by copy_": Row(lambda x, y: x.copy_(y), lambda: (torch.randn(3, 2), torch.randint(0, 5, (2,)))),
}


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str) -> None:
    check(ROWS[name], calls=3)


def test_version_counters_move() -> None:
    """What saved a tensor before a compiled function wrote to it learns of the write, as in eager."""
    f = torch.compile(lambda x: x.add_(1), backend="aicc")
    x = torch.randn(3)
    before = x._version
    f(x)
    assert x._version > before
    w = torch.randn(3, requires_grad=True)
    saved = w * x
    f(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()
