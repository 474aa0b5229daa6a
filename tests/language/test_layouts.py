"""Inputs of any layout, with no elements, with no dimensions, and inputs that are no tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .harness import EAGER, Row, check


def _mixed(x: Tensor) -> tuple[Tensor, ...]:
    return torch.relu(x) + 1, x.softmax(-1), x.sum(0), (x @ x.transpose(-1, -2)).tanh(), x.contiguous(), x.clone()


def _layout(make: Callable[[], Tensor]) -> Row:
    return Row(_mixed, lambda: (make(),))


_NETWORK = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1))


def _network(weights: torch.memory_format, images: torch.memory_format, *, train: bool = False) -> Row:
    network = copy.deepcopy(_NETWORK).train(train).to(memory_format=weights)
    return Row(network, lambda: (torch.randn(2, 3, 8, 8).to(memory_format=images),), train=train, tolerance=1e-4)


def _empty(f: Callable[..., Any], *shapes: tuple[int, ...], **more: Any) -> Row:
    return Row(f, lambda: tuple(torch.randn(s) for s in shapes), **more)


_PLAIN, _LAST = torch.contiguous_format, torch.channels_last

ROWS: dict[str, Row] = {
    "transposed": _layout(lambda: torch.randn(6, 5, 4).transpose(0, 2)),
    "every second element": _layout(lambda: torch.randn(4, 10, 12)[:, ::2, ::3]),
    "expanded": _layout(lambda: torch.randn(1, 5, 1).expand(4, 5, 6)),
    "expanded whole": _layout(lambda: torch.randn(()).expand(4, 5, 6)),
    "with an offset": _layout(lambda: torch.randn(8, 5, 6)[3:7]),
    "overlapping windows": _layout(lambda: torch.randn(40).as_strided((4, 5, 6), (5, 3, 1))),
    "strides of its own": _layout(lambda: torch.randn(400).as_strided((4, 5, 6), (70, 13, 2))),
    "flipped": _layout(lambda: torch.randn(4, 5, 6).flip(1)),
    "channels-last images": _network(_PLAIN, _LAST),
    "channels-last weights": _network(_LAST, _PLAIN),
    "channels-last both": _network(_LAST, _LAST),
    "channels-last, training": _network(_LAST, _LAST, train=True),
    "channels-last 3d": Row(lambda x: F.relu(x) + x.mean((2, 3, 4), keepdim=True), lambda: (torch.randn(2, 3, 4, 4, 4).to(memory_format=torch.channels_last_3d),)),
    "no elements: pointwise": _empty(lambda x: (x * 2 + 1).exp(), (0, 5)),
    "no elements: sums": _empty(lambda x: (x.sum(0), x.sum(), x.prod(0)), (0, 5)),
    "no elements: means": _empty(lambda x: (x.mean(), x.mean(0)), (0, 5)),
    "no elements: reductions to nothing": _empty(lambda x: (x.sum(1), x.amax(1), x.softmax(1)), (0, 5)),
    "no elements: softmax over nothing": _empty(lambda x: x.softmax(1), (5, 0)),
    "no elements: matmul without rows": _empty(lambda x, y: torch.relu(x @ y), (0, 5), (5, 3)),
    "no elements: matmul without a sum": _empty(lambda x, y: x @ y + 1, (4, 0), (0, 3)),
    "no elements: linear": _empty(lambda x, w, b: F.linear(x, w, b), (0, 5), (3, 5), (3,)),
    "no elements: batched matmul": _empty(lambda x, y: x @ y, (0, 4, 5), (0, 5, 3)),
    "no elements: cat": _empty(lambda x, y: torch.cat([x, y, x]), (0, 5), (3, 5)),
    "no elements: layer norm": _empty(lambda x: F.layer_norm(x, (5,)), (0, 5)),
    "no elements: conv": _empty(lambda x, w: F.conv2d(x, w), (0, 3, 8, 8), (4, 3, 3, 3)),
    "no elements: attention": _empty(lambda q: F.scaled_dot_product_attention(q, q, q), (0, 2, 4, 8)),
    "no elements: slices and views": _empty(lambda x: (x[2:].reshape(-1), x.t(), x[:, 1:] + 1), (2, 5)),
    "no elements: broadcast": _empty(lambda x, y: x + y, (0, 5), (1, 5)),
    "no elements: embedding": Row(lambda i, w: F.embedding(i, w) * 2, lambda: (torch.zeros(0, 3, dtype=torch.int64), torch.randn(5, 4))),
    "no elements: training": _empty(lambda x, w: (x @ w).relu(), (0, 5), (5, 3), train=True),
    "0-d: pointwise": _empty(lambda x: (x * 2, x.exp(), -x), ()),
    "0-d: reductions": _empty(lambda x: (x.sum(), x.mean(), x.amax(), x.softmax(0)), ()),
    "0-d: with a vector": _empty(lambda x, y: (x + y, y / x), (), (5,)),
    "0-d: promotion": Row(lambda x, y: (x + y, x * 2.5, x / 2), lambda: (torch.tensor(3), torch.randn(5))),
    "0-d: a double does not promote a vector": Row(lambda x, y: x * y, lambda: (torch.tensor(3.0, dtype=torch.float64), torch.randn(5))),
    "0-d: as an index": Row(lambda i, y: y[i] * 2, lambda: (torch.tensor(2), torch.randn(5, 3)), how=EAGER, breaks=True,
                         note="the number is read from data; compiled under capture_scalar_outputs"),
    "0-d: results": _empty(lambda x: (x.sum(), x.argmax(), (x > 0).all()), (4, 5)),
    "0-d: views": _empty(lambda x: (x.view(1), x.expand(3), x[None]), ()),
    "0-d: training": _empty(lambda x, y: (x * y).sin(), (), (5,), train=True),
    "a Python int": Row(lambda x, n: x * n + n, lambda: (torch.randn(4), 3)),
    "a Python float": Row(lambda x, s: x * s + s**2, lambda: (torch.randn(4), 0.5)),
    "a Python bool": Row(lambda x, up: x.exp() if up else -x, lambda: (torch.randn(4), True)),
    "a Python complex number": Row(lambda x, z: x.sin() * z.real, lambda: (torch.randn(4), 2 + 1j)),
    "None and text": Row(lambda x, a, s: x.exp() if a is None and s == "exp" else x, lambda: (torch.randn(4), None, "exp")),
    "a list and a dict of tensors": Row(lambda xs, d: [x * 2 for x in xs] + [d["a"] + d["b"]],
                                        lambda: ([torch.randn(3), torch.randn(2)], {"a": torch.randn(3), "b": torch.randn(3)})),
    "a numpy array": Row(lambda x, a: x + torch.as_tensor(a), lambda: (torch.randn(3), torch.arange(3.0).numpy())),
    "numpy inside": Row(lambda x: torch.from_numpy(x.numpy() * 2) + 1, lambda: (torch.randn(3),)),
}


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str) -> None:
    check(ROWS[name])


def test_a_number_that_changes() -> None:
    """An int becomes a symbol, a float a tensor: neither compiles for every value."""
    seen: list[Any] = []
    from aicc.compiler.driver import watching
    with watching(compiled=seen.append):
        f = torch.compile(lambda x, s: x * s + 1, backend="aicc")
        x = torch.randn(4)
        for s in (2, 3, 5, 7, 11, 0.5, 0.25, 1.5, 3.5, -1.0):
            torch.testing.assert_close(f(x, s), x * s + 1)
    assert len(seen) <= 4
