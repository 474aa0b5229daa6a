"""Modes of torch: autocast, gradients off and on, inference mode, default types and devices."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .harness import EAGER, Row, check


def _x() -> tuple[Tensor, ...]:
    return (torch.randn(4, 6),)


def _autocast_inside(x: Tensor, w: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = x @ w
        with torch.autocast("cpu", enabled=False):
            h = h.float() @ w
        return F.layer_norm(h @ w, (6,))


def _no_grad_inside(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.abs().sum()
    return x * scale


def _grad_inside(x: Tensor) -> Tensor:
    with torch.enable_grad():
        return x * 2


def _set_grad_enabled(x: Tensor) -> tuple[Tensor, Tensor]:
    torch.set_grad_enabled(False)
    y = x * 2
    torch.set_grad_enabled(True)
    return y, x * 3


@torch.no_grad()
def _decorated(x: Tensor) -> Tensor:
    return x * 2


def _inference_inside(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return (x * 2).sum(0)


def _default_dtype(x: Tensor) -> Tensor:
    return x + torch.ones(6) * torch.arange(6) / 3


def _device_context(x: Tensor) -> Tensor:
    with torch.device("cpu"):
        return x + torch.ones(6)


def _default_f64() -> Any:
    class Scope:
        def __enter__(self) -> None:
            torch.set_default_dtype(torch.float64)

        def __exit__(self, *_: object) -> None:
            torch.set_default_dtype(torch.float32)
    return Scope()


def _autocast() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


_MLP = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))

ROWS: dict[str, Row] = {
    "autocast around": Row(_MLP, _x, around=_autocast, tolerance=2e-2),
    "autocast around, training": Row(_MLP, _x, around=_autocast, train=True, tolerance=4e-2),
    "autocast inside": Row(_autocast_inside, lambda: (torch.randn(4, 6), torch.randn(6, 6)), tolerance=2e-1),
    "no_grad around": Row(lambda x: x * 2, _x, around=torch.no_grad),
    "no_grad inside": Row(_no_grad_inside, _x, train=True),
    "no_grad as a decorator": Row(lambda x: _decorated(x) * x, _x, train=True),
    "enable_grad inside": Row(_grad_inside, _x, train=True),
    "enable_grad inside no_grad": Row(_grad_inside, _x, around=torch.no_grad),
    "set_grad_enabled": Row(_set_grad_enabled, _x, train=True),
    "inference_mode around": Row(_MLP, _x, around=torch.inference_mode, note="parameters made in inference mode are packed in every call"),
    "inference_mode inside": Row(_inference_inside, _x),
    "a default dtype": Row(_default_dtype, lambda: (torch.randn(6, dtype=torch.float64),), around=_default_f64),
    "a device context": Row(_device_context, _x, how=EAGER, breaks=True, note="Dynamo does not capture it"),
    "is_grad_enabled": Row(lambda x: x * 2 if torch.is_grad_enabled() else x * 3, _x),
    "detach": Row(lambda x: x * x.detach(), _x, train=True),
    "requires_grad in the code": Row(lambda x: x * 2 if x.requires_grad else x * 3, _x, train=True),
}


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str) -> None:
    check(ROWS[name])


def test_grad_mode_is_part_of_what_is_compiled() -> None:
    """One function under no_grad and with gradients: both right, whatever comes first."""
    w = torch.randn(3, requires_grad=True)
    f = torch.compile(lambda x: (x * w).sum(), backend="aicc")
    x = torch.randn(3)
    with torch.no_grad():
        assert not f(x).requires_grad
    f(x).backward()
    torch.testing.assert_close(w.grad, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with torch.inference_mode():
            torch.testing.assert_close(f(x), (x * w).sum())


def test_guards_may_be_left_out() -> None:
    """docs/calls.md: torch's filter reaches Dynamo, and packed weights are still noticed to change."""
    layer, x = nn.Linear(32, 32), torch.randn(4, 32)
    seen: list[int] = []

    def drop_all(entries: Any) -> list[bool]:
        seen.append(len(entries))
        return [False] * len(entries)

    f = torch.compile(layer, backend="aicc", options={"guard_filter_fn": drop_all})
    with torch.no_grad():
        torch.testing.assert_close(f(x), layer(x))
        layer.weight.mul_(2)
        torch.testing.assert_close(f(x), layer(x))
    assert seen
    assert seen[0] > 0
