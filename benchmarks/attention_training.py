"""One training step of attention on the CPU (forward and backward) against eager and Inductor: `python benchmarks/attention_training.py`.

Batch 1, 8 heads, 1024 positions, width 64, float32. Prints milliseconds, the median of interleaved rounds.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

NEVER = float("-inf")


def _positions(s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(s.shape[-2])[:, None], torch.arange(s.shape[-1])[None]


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Plain PyTorch, causal."""
    s = q @ k.mT / 8
    i, j = _positions(s)
    return torch.where(j <= i, s, NEVER).softmax(-1) @ v


def full(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Plain PyTorch, no mask."""
    return (q @ k.mT / 8).softmax(-1) @ v


def window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Soft cap, window of 256."""
    s = q @ k.mT / 8
    i, j = _positions(s)
    return torch.where((j <= i) & (i - j < 256), 30 * torch.tanh(s / 30), NEVER).softmax(-1) @ v


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """By name, causal."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def main(names: list[str]) -> None:
    """Prints one line per case. names: which cases; none means all."""
    torch.set_num_threads(1)
    inputs = [torch.randn(1, 8, 1024, 64, requires_grad=True) for _ in range(3)]
    grad = torch.randn(1, 8, 1024, 64)
    for f in (causal, full, window, sdpa):
        if names and f.__name__ not in names:
            continue
        made: dict[str, Callable[..., torch.Tensor]] = {"eager": f}
        for peer in ("inductor", "aicc"):
            torch._dynamo.reset()
            made[peer] = torch.compile(f, backend=peer)
            torch.autograd.grad(made[peer](*inputs), inputs, grad)
        times: dict[str, list[tuple[float, float]]] = {n: [] for n in made}
        for _ in range(7):
            for name, g in made.items():
                start = time.perf_counter()
                out = g(*inputs)
                middle = time.perf_counter()
                torch.autograd.grad(out, inputs, grad)
                times[name].append((middle - start, time.perf_counter() - middle))
        text = [f"{n} {1e3 * statistics.median(a for a, _ in t):.1f} + {1e3 * statistics.median(b for _, b in t):.1f}" for n, t in times.items()]
        print(f"{f.__name__:8s} forward + backward, ms: {'   '.join(text)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
