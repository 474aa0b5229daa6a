"""Views and aliases: of inputs, of outputs, and between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .harness import EAGER, Row, check


def _x() -> tuple[Tensor, ...]:
    return (torch.randn(4, 6),)


def _same_twice() -> tuple[Tensor, ...]:
    x = torch.randn(4, 4)
    return x, x


def _overlapping() -> tuple[Tensor, ...]:
    base = torch.randn(5, 4)
    return base[:4], base[1:]


def _view_and_base() -> tuple[Tensor, ...]:
    base = torch.randn(5, 4)
    return base, base.t()


def _through_views(x: Tensor) -> Tensor:
    y = x.view(2, 2, 6).transpose(0, 2).reshape(3, 8)
    return y.unflatten(1, (2, 4)).movedim(0, -1).flatten().unfold(0, 4, 3).diagonal(0, 0, 1) * 2


ROWS: dict[str, Row] = {
    "an input returned": Row(lambda x: (x, x + 1), _x),
    "only an input returned": Row(lambda x: x, _x, how=EAGER, note="there is nothing to compile"),
    "views of an input": Row(lambda x: (x.t(), x[1:], x.view(-1), x * 2), _x),
    "one value twice": Row(lambda x: (lambda y: (y, y))(x + 1), _x),
    "a value and its views": Row(lambda x: (lambda y: (y, y.view(-1), y[:, 1:]))(x * 2), _x),
    "views of a value, without it": Row(lambda x: (lambda y: (y.t(), y[0]))(x * 2), _x),
    "an expanded value": Row(lambda x: x.sum(1, keepdim=True).expand(4, 6), _x),
    "detached": Row(lambda x: (x.detach(), x.exp()), _x),
    "a chain of views": Row(_through_views, _x),
    "split, chunk, unbind": Row(lambda x: (*x.split(2), *x.chunk(3, 1), *x.unbind(0)), _x),
    "as_strided": Row(lambda x: x.as_strided((3, 4), (2, 1), 1) + 1, _x),
    "narrow and select": Row(lambda x: x.narrow(1, 2, 3).select(0, 1) * 3, _x),
    "one input twice": Row(lambda x, y: x * 2 + y, _same_twice),
    "overlapping inputs": Row(lambda x, y: x * 2 + y, _overlapping),
    "an input and its transpose": Row(lambda x, y: x @ y, _view_and_base),
    "gradients through views": Row(lambda x: (x.t()[1:3].reshape(-1).view(2, 4) ** 2, x[:, ::2]), _x, train=True),
    "numbers, None and text among results": Row(lambda x: (x + 1, 3, None, x.shape[0], "text"), _x),
    "nested results": Row(lambda x: {"a": [x + 1, (x * 2,)], "b": x.sum()}, _x),
    "nested inputs": Row(lambda d: d["a"][0] + d["b"], lambda: ({"a": [torch.randn(3)], "b": torch.randn(3)},)),
    "bit casts": Row(lambda x: x.view(torch.int32) + 1, _x, aten=("view.dtype",)),
}


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str) -> None:
    check(ROWS[name])


def test_an_output_view_is_alive() -> None:
    """Writing to one of two outputs that share memory shows in the other."""
    f: Any = torch.compile(lambda x: (lambda y: (y, y[0]))(x * 2), backend="aicc")
    a, b = f(torch.ones(3, 2))
    a.fill_(5)
    assert b.tolist() == [5, 5]
