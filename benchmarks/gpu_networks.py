"""The models of the GPU suite (`gpu_models.py`): random weights, sizes as in the suite's rows.

Each is written as users write it, in plain torch.nn. What differs from the CPU suite's (`networks.py`): decoding writes its token into caches of
fixed length, at a position that is data; norms compute in float32; and there is a loss to train by.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .networks import BertEncoder

__all__ = ["Bert", "Gpt", "Inception", "Llama", "LlamaDecode", "LlamaDecodeFunctional", "ResNet50", "Towers", "TwoEncoders", "mlp"]


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * self.weight


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

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, s, _ = x.shape
        q = _rotate(self.q(x).view(b, s, self.heads, self.head).transpose(1, 2), cos, sin)
        k = _rotate(self.k(x).view(b, s, self.kv_heads, self.head).transpose(1, 2), cos, sin)
        return q, k, self.v(x).view(b, s, self.kv_heads, self.head).transpose(1, 2)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        b, s, _ = x.shape
        x = x + self.o(attended.transpose(1, 2).reshape(b, s, -1))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x), cos, sin)
        return self.finish(x, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


class Llama(nn.Module):
    """Tokens `[b, s]` to the logits of the last one, `[b, vocabulary]`."""

    def __init__(self, width: int, layers: int, heads: int, kv_heads: int, hidden: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(LlamaLayer(width, heads, kv_heads, hidden) for _ in range(layers))
        self.norm, self.head = RMSNorm(width), nn.Linear(width, vocabulary, bias=False)
        frequencies = 10000.0 ** (-torch.arange(0, width // heads, 2) / (width // heads))
        angles = torch.outer(torch.arange(length).float(), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        with torch.no_grad():
            for p in self.parameters():
                if p.dim() == 2:
                    p.normal_(std=width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        s = tokens.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[:s], self.sin[:s])
        return self.head(self.norm(x[:, -1]))


class LlamaDecode(Llama):
    """One token `[b, 1]` at `position` `[1]`: its logits. Its keys and values are written into caches `[layers, 2, b, kv_heads, t, head]`."""

    def forward(self, token: Tensor, position: Tensor, cache: list[Tensor]) -> Tensor:
        x, seen = self._begin(token, position, cache[0])
        cos, sin = self.cos[position], self.sin[position]
        for layer, keys, values in zip(self.layers, cache[::2], cache[1::2], strict=True):
            q, k, v = layer.qkv(layer.norm1(x), cos, sin)
            keys.index_copy_(2, position, k)
            values.index_copy_(2, position, v)
            x = layer.finish(x, F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, enable_gqa=True))
        return self.head(self.norm(x[:, -1]))

    def _begin(self, token: Tensor, position: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The token's embedding, and which places of the caches it may see, `[1, 1, 1, t]`."""
        return self.embedding(token), (torch.arange(keys.shape[2], device=keys.device) <= position)[None, None, None]


class LlamaDecodeFunctional(LlamaDecode):
    """The same with caches that are left as they are: new ones are results."""

    def forward(self, token: Tensor, position: Tensor, cache: list[Tensor]) -> tuple[Tensor, ...]:  # type: ignore[override]
        x, seen = self._begin(token, position, cache[0])
        cos, sin = self.cos[position], self.sin[position]
        new = []
        for layer, keys, values in zip(self.layers, cache[::2], cache[1::2], strict=True):
            q, k, v = layer.qkv(layer.norm1(x), cos, sin)
            keys, values = keys.index_copy(2, position, k), values.index_copy(2, position, v)
            new += [keys, values]
            x = layer.finish(x, F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, enable_gqa=True))
        return self.head(self.norm(x[:, -1])), *new


class Bert(nn.Module):
    """Tokens `[b, s]` to hidden states `[b, s, width]`; as BERT-base, without a mask."""

    def __init__(self, width: int = 768, layers: int = 12, heads: int = 12, vocabulary: int = 30522, length: int = 512) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.norm = nn.LayerNorm(width)
        self.encoder = BertEncoder(width, layers, heads)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.encoder(self.norm(self.words(tokens) + self.positions.weight[:tokens.shape[1]]))


class GptLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, s, d = x.shape
        q, k, v = (t.view(b, s, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).split(d, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """Tokens and labels `[b, s]` to the mean cross-entropy; the head is tied to the embedding."""

    def __init__(self, width: int, layers: int, heads: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.layers = nn.Sequential(*(GptLayer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        with torch.no_grad():
            self.words.weight.mul_(0.02)
            self.positions.weight.mul_(0.02)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.norm(self.layers(self.words(tokens) + self.positions.weight[:tokens.shape[1]]))
        return F.cross_entropy((x @ self.words.weight.t()).flatten(0, 1).float(), labels.flatten())


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)) if (
            stride != 1 or inputs != 4 * width) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        return F.relu(self.bn3(self.conv3(h)) + self.shortcut(x))


class ResNet50(nn.Module):
    """Images `[b, 3, side, side]` to logits `[b, classes]`."""

    def __init__(self, classes: int = 1000, blocks: tuple[int, ...] = (3, 4, 6, 3)) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        inputs, layers = 64, []
        for i, count in enumerate(blocks):
            for j in range(count):
                layers.append(Bottleneck(inputs, 64 << i, 2 if i and not j else 1))
                inputs = 256 << i
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn(self.stem(x))), 3, 2, 1)
        return self.head(self.layers(x).mean((2, 3)))


def mlp(*widths: int) -> nn.Module:
    """Linear layers with ReLU in between."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class InceptionBlock(nn.Module):
    """Four branches side by side, concatenated along the channels (Szegedy et al. 2014, with batch norm)."""

    def __init__(self, channels: int, one: int, three: tuple[int, int], five: tuple[int, int], pooled: int) -> None:
        super().__init__()

        def unit(inputs: int, outputs: int, size: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
        self.branches = nn.ModuleList([
            unit(channels, one, 1),
            nn.Sequential(unit(channels, three[0], 1), unit(three[0], three[1], 3)),
            nn.Sequential(unit(channels, five[0], 1), unit(five[0], five[1], 5)),
            nn.Sequential(nn.MaxPool2d(3, 1, 1), unit(channels, pooled, 1)),
        ])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Inception(nn.Module):
    """Three of GoogLeNet's blocks (3a, 3b, and 3b again): `[b, 192, h, w]` to `[b, 480, h, w]`."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(InceptionBlock(192, 64, (96, 128), (16, 32), 32), InceptionBlock(256, 128, (128, 192), (32, 96), 64),
                                    InceptionBlock(480, 128, (128, 192), (32, 96), 64))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(x)
        return y


class Towers(nn.Module):
    """Towers of their own widths over one input, whose results are added: `[b, width]` to `[b, width]`."""

    def __init__(self, towers: int, width: int, depth: int) -> None:
        super().__init__()
        inner = [width * (1 + i % 3) for i in range(towers)]
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, n), nn.GELU(), *[m for _ in range(depth - 2) for m in (nn.Linear(n, n), nn.LayerNorm(n), nn.GELU())],
                          nn.Linear(n, width)) for n in inner)

    def forward(self, x: Tensor) -> Tensor:
        y = self.towers[0](x)
        for tower in self.towers[1:]:
            y = y + tower(x)
        return y


class TwoEncoders(nn.Module):
    """A picture's and a text's encoder (twelve layers each, as in CLIP) and how well their means fit: `[b, 197, 768]`, `[b, 77, 512]` to `[b]`."""

    def __init__(self) -> None:
        super().__init__()
        self.picture, self.text = BertEncoder(768, 12, 12), BertEncoder(512, 12, 8)
        self.project = nn.Linear(768, 512)

    def forward(self, picture: Tensor, text: Tensor) -> Tensor:
        a, b = self.project(self.picture(picture).mean(1)), self.text(text).mean(1)
        return F.cosine_similarity(a.float(), b.float(), -1)
