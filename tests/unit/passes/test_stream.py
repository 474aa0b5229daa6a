"""Chains of contractions as streams: each program against eager at the tensor and tile levels, with what streams and how many kernels there are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from aicc.compiler.pipelines import pipeline
from aicc.frontend.flex import dense, dense_backward
from aicc.frontend.formulas import flash_attention_backward
from aicc.ir import Operation
from aicc.ir.expr import evaluate, free_symbols
from aicc.ir.interpreter import interpret
from aicc.ir.passes import PassContext, parse_pipeline, run_pipeline
from support.stages import AVX2, CUDA, EXACT_CASTS, OPTIONS, capture, check_levels, compare, copied, lowered
from torch import Tensor

NEVER = float("-inf")


def _normal(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[Tensor]:
    g = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [(torch.randn(s, generator=g) * scale).to(dtype) for s in shapes]


def _qkv(rows: int = 70, length: int | None = None, width: int = 24, *, batch: tuple[int, ...] = (2,), dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = [(*batch, n, width) for n in (rows, length or rows, length or rows)]
    return _normal(*shapes, dtype=dtype)


def _rows(s: Tensor) -> Tensor:
    return torch.arange(s.shape[-2])[:, None]


def _columns(s: Tensor) -> Tensor:
    return torch.arange(s.shape[-1])[None, :]


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) * 0.2


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(_scores(q, k), -1) @ v


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = _scores(q, k)
    return torch.softmax(s.masked_fill(_columns(s) > _rows(s), NEVER), -1) @ v


def anticausal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = _scores(q, k)
    return torch.softmax(s.masked_fill(_columns(s) < _rows(s), NEVER), -1) @ v


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = 20 * torch.tanh(_scores(q, k) / 20)
    return torch.softmax(torch.where((_columns(s) <= _rows(s)) & (_rows(s) - _columns(s) < 37), s, NEVER), -1) @ v


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = _scores(q, k)
    slopes = torch.tensor([0.5, 0.25], dtype=q.dtype)[:, None, None]
    return torch.softmax((s + (_columns(s) - _rows(s)) * slopes).masked_fill(_columns(s) > _rows(s), NEVER), -1) @ v


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    s = _scores(q, k)
    return torch.softmax(torch.where(mask, s, NEVER) if mask.dtype == torch.bool else s + mask, -1) @ v


def dead_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = _scores(q, k)
    return torch.softmax(s.masked_fill(_columns(s) > _rows(s) - 5, NEVER), -1) @ v


def dead_rows_zeroed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = _scores(q, k)
    off = _columns(s) > _rows(s) - 5
    return torch.softmax(s.masked_fill(off, NEVER), -1).masked_fill(off, 0.0) @ v


def dead_rows_summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Without the softmax's own division: eager's sums of exp(-inf + inf) are NaN."""
    s = _scores(q, k)
    s = torch.where(_rows(s) < 20, NEVER, s)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return (e @ v) / (e.sum(-1, keepdim=True) + 1e-6)


def dead_rows_guarded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = _scores(q, k)
    s = torch.where(_rows(s) < 20, NEVER, s)
    e = torch.where(s == NEVER, 0.0, torch.exp(s - s.amax(-1, keepdim=True)))
    return (e @ v) / (e.sum(-1, keepdim=True) + 1e-6)


def sdpa(**options: Any) -> Callable[..., Tensor]:
    return lambda q, k, v, *mask: F.scaled_dot_product_attention(q, k, v, *mask, **options)


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))


def expanded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, d = k.shape
    return causal(q, *(x[:, :, None].expand(b, h, 2, n, d).reshape(b, 2 * h, n, d) for x in (k, v)))


def one_key_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The heads are rows too."""
    s = torch.einsum("bhsd,btd->bhst", q, k)
    return torch.einsum("bhst,btd->bhsd", torch.softmax(torch.where(_columns(s) <= _rows(s), s, NEVER), -1), v)


def dropped(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (torch.softmax(_scores(q, k), -1) * keep * 1.25) @ v


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)) @ v


def retention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.transpose(-1, -2)
    decay = torch.where(_columns(s) <= _rows(s), torch.exp((_columns(s) - _rows(s)) * 0.1), 0.0)
    s = s * decay
    return (s / s.abs().sum(-1, keepdim=True).clamp(min=1)) @ v


def two(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return causal(q, k, v), plain(k, q, v)


def chained(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal(causal(q, k, v), k, v)


def normed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.rms_norm(causal(q, k, v), (v.shape[-1],))


def projected(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    return causal(q, k, v).transpose(1, 2).reshape(q.shape[0], q.shape[2], -1) @ w


def with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    s = _scores(q, k)
    m = s.amax(-1, keepdim=True)
    e = torch.exp(s - m)
    total = e.sum(-1, keepdim=True)
    return (e @ v) / total, m + total.log(), m


def with_probabilities(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = torch.softmax(_scores(q, k), -1)
    return p @ v, p


def over_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(_scores(q, k), -2) @ v


def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(_scores(q, k)) @ v


def shared(q: Tensor, k: Tensor, v: Tensor, w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """Two streams compute the same reductions; one of these is returned as well."""
    s = _scores(q, k)
    m = s.amax(-1, keepdim=True)
    e = torch.exp(s - m)
    total = e.sum(-1, keepdim=True)
    return (e @ v) / total, ((e * x) @ w) / total, m


def gated(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The second product's scale needs the finished first, which comes from the same reductions."""
    p = torch.softmax(_scores(q, k), -1)
    o = p @ v
    return o, (p @ w) * o.sum(-1, keepdim=True)


def circle(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Each stream's input would be made by the other one."""
    e1, e2 = _scores(q, k).exp(), _scores(k, q).exp()
    sum1, sum2 = e1.sum(-1), e2.sum(-1)
    g1, g2 = (x.sum(-1).rsqrt()[..., None, None] for x in (sum1, sum2))
    return (e1 @ (v * g2)) / sum1[..., None], (e2 @ (v * g1)) / sum2[..., None]


def parts_of_columns(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    p = torch.softmax(_scores(q, k), -1)
    return p @ v, p[..., :40] @ w


def parts_of_rows(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    p = torch.softmax(_scores(q, k), -1)
    return p @ v, p[..., :30, :] @ w


def parts_of_result(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    o = plain(q, k, v)
    return o[..., :10, :].exp(), o[..., :5].sin()


def whole_maximum(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum of all rows is wanted, though the product takes some."""
    s = _scores(q, k)
    return torch.softmax(s, -1)[..., :50, :] @ v, s.amax(-1)


def one_of_batch(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s = _scores(q, k)
    return torch.softmax(s, -1)[0] @ v[0], s.amax(-1)


def rolled_out(q: Tensor, k: Tensor) -> Tensor:
    p = torch.softmax(_scores(q, k), -1)
    return p @ p


def two_hops(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = torch.softmax(_scores(q, k), -1)
    return p @ (p @ v)


def by_row_and_column(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A row value read at rows and at columns."""
    s = q @ k.transpose(-1, -2)
    m = (s * s).sum(-1) + 1
    return (s / m[..., None, :] / m[..., :, None]) @ v


def narrow_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Positions that wrap around at 128."""
    s = _scores(q, k)
    i, j = (x.to(torch.int8) for x in (_columns(s), _rows(s)))
    return torch.softmax(torch.where(i <= j, s, NEVER), -1) @ v


def rounded_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What is subtracted is not quite the maximum: sums cannot be rescaled by it."""
    s = _scores(q, k) * 50
    return torch.exp(s - s.amax(-1, keepdim=True).float().double()) @ v


def large_terms(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """exp(s) is too large for 16 bits, its quotient by the sum is not."""
    e = torch.exp(_scores(q, k).float() + 12)
    return (e / e.sum(-1, keepdim=True)).half() @ v


def in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ k.transpose(-1, -2)).float()
    return torch.softmax(s, -1).to(v.dtype) @ v


def spelled_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.transpose(-1, -2)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return (e @ v) / e.sum(-1, keepdim=True)


def extremes(*args: Tensor) -> list[Tensor]:
    """Scores with inf and NaN in some rows."""
    q, k, v = args
    q, k = q.clone(), k.clone()
    q[..., 3, :] = math.nan
    q[..., 5, 0], q[..., 6, 1] = math.inf, -math.inf
    return [q, k, v]


def backward(causal: bool, mask: str = "") -> Callable[..., Any]:
    def f(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *m: Tensor) -> Any:
        return flash_attention_backward(grad, q, k, v, out, lse, 0.0, causal, **({"attn_mask": m[0]} if mask else {}))
    return f


def flex(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return dense(q, k, v, lambda s, *_: 20 * torch.tanh(s / 20), _causal_blocks(), 0.2, {}, (), ())


def flex_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Any:
    def change(s: Tensor, *_: Tensor) -> Tensor:
        return 20 * torch.tanh(s / 20)

    def pull(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, g: Tensor) -> list[Any]:
        return [g * (1 - torch.tanh(s / 20)**2), None, None, None, None]

    return dense_backward(q, k, v, out, lse / math.log(2), grad, None, change, pull, _causal_blocks(), 0.2, {}, (), ())[:3]


def _causal_blocks() -> tuple[Any, ...]:
    """A block mask of which only the mask itself is read."""
    return (None,) * 11 + (lambda b, h, i, j: j <= i,)


def _saved(dtype: torch.dtype = torch.float32, rows: int = 70, length: int | None = None, mask: Tensor | None = None) -> list[Tensor]:
    q, k, v = _qkv(rows, length, dtype=dtype, batch=(1, 2))
    grad, = _normal((1, 2, rows, 24), dtype=dtype)
    s = q.float() @ k.float().mT / 24**0.5
    if mask is not None:
        s = torch.where(mask, s, NEVER) if mask.dtype == torch.bool else s + mask
    lse = s.logsumexp(-1)
    lse = torch.where(lse == NEVER, 0.0, lse)
    return [grad, q, k, v, plain(q, k, v), lse, *([] if mask is None else [mask])]


def of_width_24(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """With the head width known, batch and lengths symbols."""
    def g(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert q.shape[-1] == v.shape[-1] == 24
        return f(q, k, v)
    return g


def _half_full(rows: int, columns: int, dead: int = 0) -> Tensor:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(1)) > 0.5
    mask[:dead] = False
    return mask


BF16, F16 = torch.bfloat16, torch.float16
ONE = ("1 + 1 [max, sum]",)
SUMS = ("1 + 1 []",)
BACKWARD = ("2 + 1 []", "2 + 2 []")
FLEX = ((ONE, 1), (BACKWARD, None))


@dataclass(frozen=True)
class Case:
    """What `function` makes of the inputs, which streams it becomes, and how many kernels there are in all (None: any number)."""

    function: Callable[..., Any]
    inputs: list[Tensor]
    streams: tuple[str, ...] = ONE
    kernels: int | None = 1
    dynamic: bool = False


CASES: dict[str, Case] = {
    "plain": Case(plain, _qkv()),
    "ragged": Case(plain, _qkv(67, 131)),
    "causal": Case(causal, _qkv(200)),
    "causal_bf16": Case(causal, _qkv(200, dtype=BF16)),
    "causal_f16": Case(causal, _qkv(130, dtype=F16)),
    "causal_cross": Case(causal, _qkv(67, 131)),
    "causal_cross_wide": Case(causal, _qkv(131, 67)),
    "anticausal": Case(anticausal, _qkv(150)),
    "anticausal_bf16": Case(anticausal, _qkv(150, dtype=BF16)),
    "window": Case(window, _qkv(200)),
    "window_bf16": Case(window, _qkv(200, dtype=BF16)),
    "alibi": Case(alibi, _qkv(100)),
    "alibi_bf16": Case(alibi, _qkv(100, dtype=BF16)),
    "float_mask": Case(masked, [*_qkv(), torch.where(_half_full(70, 70), 0.5, NEVER)]),
    "bool_mask": Case(masked, [*_qkv(), _half_full(70, 70)]),
    "bool_mask_dead_rows": Case(masked, [*_qkv(), _half_full(70, 70, dead=9)]),
    "dead_rows": Case(dead_rows, _qkv()),
    "dead_rows_bf16": Case(dead_rows, _qkv(dtype=BF16)),
    "dead_rows_zeroed": Case(dead_rows_zeroed, _qkv()),
    "dead_rows_summed": Case(dead_rows_summed, _qkv()),
    "dead_rows_guarded": Case(dead_rows_guarded, _qkv()),
    "sdpa": Case(sdpa(), _qkv(batch=(2, 2))),
    "sdpa_causal_bf16": Case(sdpa(is_causal=True), _qkv(140, dtype=BF16, batch=(2, 2))),
    "sdpa_causal_f16": Case(sdpa(is_causal=True, scale=0.3), _qkv(140, dtype=F16, batch=(2, 2))),
    "sdpa_float_mask": Case(sdpa(), [*_qkv(batch=(2, 2)), _normal((70, 70))[0]]),
    "sdpa_bool_mask_dead_rows": Case(sdpa(), [*_qkv(batch=(2, 2)), _half_full(70, 70, dead=9)]),
    "sdpa_gqa": Case(sdpa(is_causal=True, enable_gqa=True), [*_normal((1, 4, 70, 24)), *_normal((1, 2, 70, 24), (1, 2, 70, 24))]),
    "repeated": Case(repeated, [*_normal((1, 4, 70, 24)), *_normal((1, 2, 70, 24), (1, 2, 70, 24))], kernels=None),
    "expanded": Case(expanded, [*_normal((1, 4, 70, 24)), *_normal((1, 2, 70, 24), (1, 2, 70, 24))], kernels=None),
    "one_key_head": Case(one_key_head, _normal((2, 3, 70, 24), (2, 70, 24), (2, 70, 24))),
    "width_64": Case(causal, _qkv(width=64, batch=(1,))),
    "width_80": Case(causal, _qkv(width=80, batch=(1,), dtype=BF16)),
    "dropout": Case(dropped, [*_qkv(), _half_full(70, 70)]),
    "extremes": Case(plain, extremes(*_qkv())),
    "extremes_causal": Case(causal, extremes(*_qkv(100))),
    "linear": Case(linear, _qkv(), SUMS),
    "linear_bf16": Case(linear, _qkv(dtype=BF16), SUMS),
    "retention": Case(retention, _qkv(100), ("1 + 1 [sum]",)),
    "sigmoid": Case(sigmoid, _qkv(), SUMS),
    "two": Case(two, _qkv(), ONE * 2, 2),
    "chained": Case(chained, _qkv(), ONE * 2, 2),
    "normed": Case(normed, _qkv(), ONE, 2),
    "projected": Case(projected, [*_qkv(batch=(1, 2)), *_normal((48, 33))], ONE, 2),
    "with_lse": Case(with_lse, _qkv(), ONE, 1),
    "in_float32": Case(in_float32, _qkv(dtype=BF16)),
    "spelled_out_bf16": Case(spelled_out, _qkv(200, dtype=BF16)),
    "spelled_out_f16": Case(spelled_out, _qkv(200, dtype=F16)),
    "dynamic": Case(of_width_24(causal), _qkv(100), dynamic=True),
    "dynamic_window_bf16": Case(of_width_24(window), _qkv(140, dtype=BF16), dynamic=True),
    "dynamic_cross": Case(of_width_24(plain), _qkv(67, 90), dynamic=True),
    "shared": Case(shared, [*_qkv(), *_normal((2, 70, 40), (70, 70))], ONE * 2, 2),
    "gated": Case(gated, [*_qkv(), *_normal((2, 70, 40))], ONE * 2, None),
    "circle": Case(circle, _qkv(), ("1 + 1 [sum]",), None),
    # The division leaves the sum, and what is left is too large for 16 bits: these weights stay in float32 (`wide_weights.py`).
    "large_terms_f16": Case(large_terms, _qkv(dtype=F16), ("1 + 1 [sum]",)),
    "large_terms_batched_f16": Case(large_terms, _qkv(dtype=F16, batch=(1, 2)), ("1 + 1 [sum]",)),
    "narrow_positions": Case(narrow_positions, _qkv(140)),
    "parts_of_columns": Case(parts_of_columns, [*_qkv(), *_normal((2, 40, 24))], (*SUMS, *ONE), None),
    "parts_of_rows": Case(parts_of_rows, [*_qkv(), *_normal((2, 70, 24))], ONE * 2, None),
    "parts_of_result": Case(parts_of_result, _qkv(), ONE, None),
    # What does not stream must be right all the same.
    "with_probabilities": Case(with_probabilities, _qkv(), (), None),
    "over_rows": Case(over_rows, _qkv(), (), None),
    "one_row": Case(plain, _qkv(1, 70), ("1 + 1 [max, sum]",), None),
    "wide": Case(plain, _qkv(20, 20, 300, batch=(1,)), (), None),
    "whole_maximum": Case(whole_maximum, _qkv(), (), None),
    "one_of_batch": Case(one_of_batch, _qkv(), (), None),
    "rolled_out": Case(rolled_out, _qkv()[:2], (), None),
    "by_row_and_column": Case(by_row_and_column, _qkv(), (), None),
    "rounded_maximum": Case(rounded_maximum, [x.double() for x in _qkv(150)], (), None),
    "backward": Case(backward(False), _saved(), BACKWARD, None),
    "backward_causal": Case(backward(True), _saved(rows=140), BACKWARD, None),
    "backward_causal_bf16": Case(backward(True), _saved(BF16, 140), BACKWARD, None),
    "flex": Case(flex, _qkv(200, batch=(1, 2)), *FLEX[0]),
    "flex_backward": Case(flex_backward, _saved(rows=140), *FLEX[1]),
    "backward_cross": Case(backward(False), _saved(rows=67, length=90), BACKWARD, None),
    "backward_bool_mask": Case(backward(False, "bool"), _saved(mask=_half_full(70, 70, dead=5)), BACKWARD, None),
    "backward_float_mask": Case(backward(False, "float"), _saved(mask=_normal((70, 70))[0]), BACKWARD, None),
}


def fused_of(module: Operation) -> list[Operation]:
    return [op for op in module.walk() if op.name == "tensor.fused"]


def streams_of(module: Operation) -> list[str]:
    """Of each stream "firsts + seconds [reductions]"."""
    found = [op["why"].removeprefix("streams ") for op in fused_of(module) if op["why"]]
    return [f"{w.split(' contractions')[0]} [{w.split('[')[1].split(']')[0]}]" for w in found]


@pytest.mark.parametrize("name", CASES)
def test_stream(name: str) -> None:
    case = CASES[name]
    program = capture(case.function, case.inputs, dynamic=case.dynamic)
    module = lowered(program, CUDA, "tensor")
    assert sorted(streams_of(module)) == sorted(case.streams)
    if case.kernels is not None:
        kernels = [op["kernel"] for op in fused_of(module) if op["kernel"] != "copy"]  # of a result of batch 1, to its shape
        assert len(kernels) == case.kernels, kernels
    check_levels(program, CUDA)


@pytest.mark.parametrize("attention", [causal, sdpa(is_causal=True)], ids=["plain", "sdpa"])
def test_gradients_in_the_same_graph(attention: Callable[..., Tensor]) -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        out, pull = torch.func.vjp(attention, q, k, v)
        return out, *pull(grad)

    check_levels(capture(f, [*_qkv(batch=(1, 2)), *_normal((1, 2, 70, 24))]), CUDA)


def test_a_symbol_is_no_size() -> None:
    """The kernel for one length serves others, multiples of the tile or not."""
    module = lowered(capture(of_width_24(causal), _qkv(100), dynamic=True), CUDA, "tile")
    for n in (17, 64, 131):
        program = capture(causal, _qkv(n))
        compare(interpret(module, [copied(x) for x in program.inputs], check=True), program, f"length {n}")


def _steps(function: Callable[..., Tensor], n: int) -> list[int]:
    """Steps that each block of rows takes along the stream."""
    module = lowered(capture(function, _qkv(n, batch=(64,) if n > 400 else (2,))), CUDA, "tile")
    kernel, = (op for op in module.body if op.name == "tile.kernel")
    loops = [op for op in kernel.walk() if op.name == "tile.for"]
    return [sum(len(range(*(evaluate(op[end], {"i0": p}) for end in ("lower", "upper")), op["step"])) for op in loops)
            for p in range(kernel["grid"][-1])]


def test_masked_tiles_are_skipped() -> None:
    """Tiles are 64 rows by 32 columns here; the last rows come first."""
    assert _steps(plain, 200) == [7, 7, 7, 7]
    assert _steps(causal, 200) == [7, 6, 4, 2]
    assert _steps(anticausal, 200) == [1, 3, 5, 7]
    # A row sees 37 columns, a block of 64 rows therefore 100: 4 or 5 tiles of 32 at most.
    assert max(_steps(window, 512)) <= 5 and len(_steps(window, 512)) == 8


def test_masked_tiles_are_skipped_on_cpus() -> None:
    """The loop over the stream ends where the block of rows does; without a mask it ends where the stream does."""
    bounds = []
    for function in (plain, causal, window):
        module = lowered(capture(function, _qkv(300, batch=(1,), width=32)), AVX2, "tile")
        kernels = [k for k in module.body if k.name == "tile.kernel" and k["sym_name"] == "stream"]
        loops = [op for k in kernels for op in k.walk() if op.name == "tile.for"]
        assert loops
        bounds.append({s for op in loops for end in ("lower", "upper") for s in free_symbols(op[end])})
    everything, ended, banded = bounds
    assert ended - everything and banded - everything


def test_a_batch_of_one_does_not_hide_the_mask() -> None:
    """Repeated keys of one batch are read without the batch's dimension, which so is one of the rows': of size one, it leaves a row's position what it is."""
    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.view(1, 300, 2, 32).transpose(1, 2).repeat_interleave(2, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q.view(1, 300, 4, 32).transpose(1, 2), k, v, is_causal=True)
    module = lowered(capture(grouped, _normal((1, 300, 128), (1, 300, 64), (1, 300, 64))), AVX2, "tile")
    kernel = next(k for k in module.body if k.name == "tile.kernel" and k["sym_name"].startswith("stream"))
    blocks = [op for op in kernel.body.ops if op.name == "tile.for" and any(x.name == "tile.dot" for x in op.walk())]
    assert blocks and all(free_symbols(op["upper"]) for op in blocks)


def test_exact_casts_leave_weights_rounded_and_stored() -> None:
    """Rounded as eager rounds them, weights that are too large before their division do not stream."""
    program = capture(large_terms, _qkv(dtype=F16))
    assert streams_of(lowered(program, CUDA, "tensor", EXACT_CASTS)) == []


def test_remarks_say_why_not() -> None:
    module = capture(with_probabilities, _qkv()).module()
    ctx = PassContext(CUDA)
    for stage in ("graph", "tensor"):
        run_pipeline(module, parse_pipeline(pipeline(stage, CUDA, OPTIONS)), ctx)
    assert any(r.pass_name == "stream" and "needed in memory" in r.message for r in ctx.remarks)
