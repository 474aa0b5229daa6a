"""Products with a vector as reductions, which normalise it as they read it: against eager, and which kernels there are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.stages import CUDA, capture, check_levels, lowered
from torch import Tensor


def _inputs(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(s, generator=g).to(dtype) * (0.1 if len(s) == 2 and s[0] > 1 else 1) for s in shapes]


def rms(x: Tensor, g: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * g


def block(x: Tensor, g: Tensor, q: Tensor, k: Tensor, up: Tensor, gate: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    """What a decoder's token goes through beside attention."""
    h = rms(x, g)
    return h @ q.t(), h @ k.t(), x + (F.silu(h @ gate.t()) * (h @ up.t())) @ down.t()


def read_twice(x: Tensor, g: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The normalised vector is a result as well: its kernel stays."""
    h = rms(x, g)
    return h, h @ w.t()


def layer_norm(x: Tensor, g: Tensor, w: Tensor) -> Tensor:
    """The mean is subtracted: no factor of the vector."""
    return F.layer_norm(x, g.shape, g) @ w.t()


def scaled(x: Tensor, g: Tensor, w: Tensor) -> Tensor:
    """Two factors of one sum."""
    s = x.square().sum(-1, keepdim=True)
    return (x * s.sqrt() * g * torch.exp(-0.01 * s)) @ w.t()


def three_tokens(x: Tensor, g: Tensor, w: Tensor) -> Tensor:
    return rms(x, g) @ w.t()


LAYER = ((1, 1, 320), (320,), (200, 320), (64, 320), (300, 320), (300, 320), (320, 300))
ONE = ((1, 320), (320,), (300, 320))
CASES: dict[str, tuple[Callable[..., object], list[Tensor], list[str]]] = {
    "block": (block, _inputs(*LAYER), ["rsqrt", "rsqrt", "rsqrt_sigmoid", ""]),
    "block_bf16": (block, _inputs(*LAYER, dtype=torch.bfloat16), ["rsqrt", "rsqrt", "rsqrt_sigmoid", ""]),
    "read_twice": (read_twice, _inputs(*ONE), ["rsqrt", ""]),
    "scaled": (scaled, _inputs(*ONE), ["exp"]),
    "three_tokens": (three_tokens, _inputs((3, 320), (320,), (300, 320)), ["rsqrt", ""]),
}


@pytest.mark.parametrize("name", CASES)
def test_norms(name: str) -> None:
    function, inputs, kernels = CASES[name]
    program = capture(function, inputs)
    made = [op["kernel"] for func in lowered(program, CUDA, "tensor").body for op in func.body if op.name == "tensor.fused" and op["kernel"] != "copy"]
    assert len(made) == len(kernels), made
    assert all(word in kernel for word, kernel in zip(kernels, made, strict=True)), made
    check_levels(program, CUDA)


def test_a_mean_is_no_factor() -> None:
    program = capture(layer_norm, _inputs(*ONE))
    assert len([op for func in lowered(program, CUDA, "tensor").body for op in func.body if op.name == "tensor.fused"]) == 2
    check_levels(program, CUDA)


def test_many_rows_read_the_finished_vector() -> None:
    """The norm's weight would be read once more for each of them."""
    program = capture(three_tokens, _inputs((1, 2048), (2048,), (16000, 2048), dtype=torch.bfloat16))
    made = [op["kernel"] for func in lowered(program, CUDA, "tensor").body for op in func.body if op.name == "tensor.fused"]
    assert len(made) == 2 and "rsqrt" in made[0] and "rsqrt" not in made[1]
