"""The networks of the CPU suite (`cpu.py`), in plain torch.nn: random weights, float32, eval mode.

Each function or class is one architecture with its sizes as arguments; the suite's rows give the sizes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BertEncoder", "Llama", "LlamaDecode", "ViT", "add_rms_norm", "gelu_tanh", "plain_attention", "tiny_mlp"]


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


def _rotary_tables(length: int, head: int) -> tuple[Tensor, Tensor]:
    """cos and sin, each `[length, head]`."""
    frequencies = 10000.0 ** (-torch.arange(0, head, 2) / head)
    angles = torch.outer(torch.arange(length).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


class LlamaLayer(nn.Module):
    """Pre-norm, grouped-query attention with rotary positions, SwiGLU."""

    def __init__(self, width: int, heads: int, kv_heads: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head = heads, kv_heads, width // heads
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, kv_heads * self.head, bias=False)
        self.v = nn.Linear(width, kv_heads * self.head, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """x `[b, s, width]`, cache `[b, kv_heads, t, head]` each; the new x, and keys and values of the new tokens."""
        b, s, _ = x.shape
        h = self.norm1(x)
        q = _rotate(self.q(h).view(b, s, self.heads, self.head).transpose(1, 2), cos, sin)
        k = _rotate(self.k(h).view(b, s, self.kv_heads, self.head).transpose(1, 2), cos, sin)
        v = self.v(h).view(b, s, self.kv_heads, self.head).transpose(1, 2)
        keys, values = (k, v) if cache is None else (torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2))
        repeats = self.heads // self.kv_heads
        keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
        attended = F.scaled_dot_product_attention(q, keys, values, is_causal=cache is None)
        x = x + self.o(attended.transpose(1, 2).reshape(b, s, -1))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h)), k, v


class Llama(nn.Module):
    """Tokens `[b, s]` to the logits of the last one, `[b, vocabulary]`."""

    def __init__(self, width: int, layers: int, heads: int, kv_heads: int, hidden: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(LlamaLayer(width, heads, kv_heads, hidden) for _ in range(layers))
        self.norm, self.head = RMSNorm(width), nn.Linear(width, vocabulary, bias=False)
        cos, sin = _rotary_tables(length, width // heads)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        s = tokens.shape[1]
        for layer in self.layers:
            x, _, _ = layer(x, self.cos[:s], self.sin[:s], None)
        return self.head(self.norm(x[:, -1]))


class LlamaDecode(Llama):
    """One token `[b, 1]` on caches `[layers, b, kv_heads, t, head]`: logits, and the token's keys and values of every layer."""

    def forward(self, token: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        x = self.embedding(token)
        t = keys.shape[3]
        new = []
        for i, layer in enumerate(self.layers):
            x, k, v = layer(x, self.cos[t:t + 1], self.sin[t:t + 1], (keys[i], values[i]))
            new += [k, v]
        return self.head(self.norm(x[:, -1])), *new


class EncoderLayer(nn.Module):
    """Packed QKV, GELU; norms after (`pre=False`) or before each half."""

    def __init__(self, width: int, heads: int, hidden: int, pre: bool) -> None:
        super().__init__()
        self.heads, self.pre = heads, pre
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def attention(self, x: Tensor) -> Tensor:
        b, s, d = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, d))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.pre:
            x = x + self.attention(self.norm1(x))
            return x + self.feed_forward(self.norm2(x))
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.feed_forward(x))


class BertEncoder(nn.Module):
    """`[b, s, width]` to the same."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(EncoderLayer(width, heads, 4 * width, pre=False) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ViT(nn.Module):
    """Images `[b, 3, side, side]` to logits `[b, classes]`."""

    def __init__(self, width: int, layers: int, heads: int, patch: int, side: int, classes: int = 1000) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2 + 1, width))
        self.layers = nn.Sequential(*(EncoderLayer(width, heads, 4 * width, pre=True) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.layers(x))[:, 0])


def tiny_mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, width), nn.Softmax(-1))


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The sum and its normalisation: what a pre-norm transformer does between two halves of a layer."""
    total = x + residual
    return total, total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-6) * weight


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU's tanh form, spelled out as older models do."""
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`[heads, s, d]` each; `mask` `[s, s]` is true where a query may see a key."""
    scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v
