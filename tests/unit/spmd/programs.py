"""Small graph-level modules to partition, written in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from aicc.compiler.distributed.joint import Joint, export_model, make_joint

Tensor = torch.Tensor


class Tiny(torch.nn.Module):
    """Embedding, norm, attention with fused q, k, v, an MLP: what a block of a language model has."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(32, 16)
        self.norm, self.middle, self.last = (torch.nn.LayerNorm(16) for _ in range(3))
        self.qkv, self.proj = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)
        self.up, self.down = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)
        self.head = torch.nn.Linear(16, 32, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        b, s, w = x.shape
        q, k, v = (t.view(b, s, 4, 4).transpose(1, 2) for t in self.qkv(self.norm(x)).split(w, 2))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, s, w))
        return self.head(self.last(x + self.down(torch.nn.functional.gelu(self.up(self.middle(x))))))


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def tiny_joint() -> Joint:
    """Forward and backward of `Tiny` on a batch of 4 sequences of 8."""
    ids = torch.zeros(4, 8, dtype=torch.long)
    return make_joint(export_model(Tiny(), (ids,), {}, loss=cross_entropy, targets=(ids,)))


class Function(torch.nn.Module):
    """A function of one parameter and one input as a model whose loss weighs every element differently."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]):
        super().__init__()
        self.function, self.weight = function, torch.nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(x, self.weight)
        return (y * torch.linspace(0.5, 1.5, y.numel()).reshape(y.shape)).sum()


def function_joint(function: Callable[[Tensor, Tensor], Tensor], x: tuple[int, ...], w: tuple[int, ...]) -> Joint:
    """Value and gradient of `function(x, w)`."""
    return make_joint(export_model(Function(function, w), (torch.zeros(x),), {}))
