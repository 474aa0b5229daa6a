"""Attention large enough for the Hopper schedule (`backends/triton/warp_groups.py`), and products that take a ring of tiles (`few_rows.py`), for real
GPUs: `gpu_check.py` and `sanitize.sh` run these beside `cases.CASES`, whose inputs are too small for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from .cases import Case

__all__ = ["HOPPER_CASES", "SMALL_CASES"]

HEADS, LENGTH, WIDTH = 32, 512, 128
"""128 programs: enough for three quarters of a Hopper GPU's multiprocessors; work enough to skip by data."""
FEW_HEADS, FEW = 4, 3
"""Heads of the small cases, and the multiprocessors that they are compiled for: sixteen programs in six rounds, for checkers that take a thousand
times as long."""


def _scores(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, and the positions of their rows and columns."""
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return s, torch.arange(s.shape[-2], device=s.device)[:, None], torch.arange(s.shape[-1], device=s.device)[None, :]


def _full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _scores(q, k)[0].softmax(-1) @ v


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, i, j = _scores(q, k)
    return s.masked_fill(j > i, -math.inf).softmax(-1) @ v


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _causal(q, k.repeat_interleave(4, 1), v.repeat_interleave(4, 1))


def _alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, i, j = _scores(q, k)
    slopes = torch.exp2(-1.0 - torch.arange(s.shape[1], device=s.device) / 4)[:, None, None]
    return (s + slopes * (j - i)).masked_fill(j > i, -math.inf).softmax(-1).to(v.dtype) @ v


def _window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, i, j = _scores(q, k)
    return (30 * torch.tanh(s / 30)).masked_fill((j > i) | (i - j >= 200), -math.inf).softmax(-1) @ v


def _documents(q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
    s, i, j = _scores(q, k)
    return s.masked_fill((j > i) | (document[:, None, :, None] != document[:, None, None, :]), -math.inf).softmax(-1) @ v


def _flex() -> Callable[..., Tensor]:
    document = (torch.arange(LENGTH) // 150).cuda()
    mask = create_block_mask(lambda b, h, i, j: (document[i] == document[j]) & (j <= i), None, None, LENGTH, LENGTH, device="cuda")
    return lambda q, k, v: flex_attention(q, k, v, block_mask=mask)


def _heads(group: int = 1, dtype: torch.dtype = torch.bfloat16, width: int = WIDTH, grad: bool = False, documents: bool = False,
           heads: int = HEADS) -> Callable[..., Any]:
    def make(g: torch.Generator) -> tuple[Tensor, ...]:
        made = tuple(torch.randn(1, n, LENGTH, width, generator=g).to(dtype).requires_grad_(grad) for n in (heads, heads // group, heads // group))
        cuts = torch.randperm(LENGTH - 1, generator=g)[:3].add(1).sort().values
        return (*made, torch.searchsorted(cuts, torch.arange(LENGTH), right=True)[None]) if documents else made

    return make


def _plain(f: Callable[..., Any]) -> Callable[[], Callable[..., Any]]:
    return lambda: f


def _cases(heads: int) -> dict[str, Case]:
    # Compared with float64; a result is a mean of values of size 1, rounded to 8 bits, and weights are rounded too.
    given = partial(_heads, heads=heads)
    return {
        "hopper_full": Case(_plain(_full), given(), tolerance=2e-2, wide=True),  # small results: eager is 0.02 from float64
        "hopper_causal": Case(_plain(_causal), given(), tolerance=1.6e-2, wide=True),
        "hopper_causal_64": Case(_plain(_causal), given(width=64), tolerance=1.6e-2, wide=True),
        "hopper_grouped_f16": Case(_plain(_grouped), given(4, torch.float16), tolerance=4e-3, wide=True),
        "hopper_alibi": Case(_plain(_alibi), given(), tolerance=1.6e-2, wide=True),
        "hopper_window": Case(_plain(_window), given(), tolerance=1.6e-2, wide=True),
        "hopper_documents": Case(_plain(_documents), given(documents=True), tolerance=1.6e-2, wide=True),
        "hopper_documents_training": Case(_plain(_documents), given(grad=True, documents=True), backward=True, tolerance=3e-2, wide=True),
        "hopper_flex": Case(_flex, given(), tolerance=1.6e-2, wide=True),
        "hopper_flex_training": Case(_flex, given(grad=True), backward=True, tolerance=3e-2, wide=True),
    }


RING_K, RING_N = 8192, 128
"""The shortest sums that take the ring, and a weight's rows: four programs, as for a GPU of four multiprocessors."""


def _rows(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Callable[..., Any]:
    """Factors of RING_K and what is added, all of size 1 in the result."""
    return lambda g: tuple((torch.randn(s, generator=g) * (RING_K**-0.25 if RING_K in s else 1)).to(dtype) for s in shapes)


def _ring_cases() -> dict[str, Case]:
    """By weights of rows along K and along N, with and without something added, of all rows of a tile and of some."""
    ring = partial(Case, tolerance=6e-3, wide=True, multiprocessors=RING_N // 32)
    return {
        "ring": ring(_plain(F.linear), _rows((16, RING_K), (RING_N, RING_K))),
        "ring_gelu": ring(_plain(lambda x, w, b: F.gelu(F.linear(x, w, b))), _rows((16, RING_K), (RING_N, RING_K), (RING_N,))),
        "ring_residual": ring(_plain(lambda x, w, r: F.linear(x, w) * 2 + r), _rows((10, RING_K), (RING_N, RING_K), (10, RING_N))),
        "ring_columns_f16": ring(_plain(torch.mm), _rows((16, RING_K), (RING_K, RING_N), dtype=torch.float16), tolerance=2e-3),
    }


HOPPER_CASES = _cases(HEADS)
SMALL_CASES = {name.replace("hopper", "small"): replace(case, multiprocessors=FEW) for name, case in _cases(FEW_HEADS).items()} | _ring_cases()
"""The same for compute-sanitizer: few programs, several of them to a multiprocessor. And products by a ring of tiles, of four programs."""
