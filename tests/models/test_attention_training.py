"""Attention in training: gradients against float64, what streams, and memory that grows with the length and not with its square."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from aicc.compiler.dynamo import backend, partition
from aicc.compiler.options import Options
from aicc.ir import Operation
from support.stages import AVX2, CUDA
from support.training import kernels_of, streams_of, training_graphs
from torch import Tensor, nn

NEVER = float("-inf")
FORWARD = ["1 + 1 [max, sum]"]
BACKWARD = ["2 + 1 []", "2 + 2 []"]
CLOSED = ["2 + 2 []", "2 + 2 [sum]"]
"""With inputs of 32 bits: the stream of dQ, the second one, multiplies dS and P by the keys, and sums the rows of dS."""


def _positions(s: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(s.shape[-2], device=s.device)[:, None], torch.arange(s.shape[-1], device=s.device)[None]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / 8).softmax(-1) @ v


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT / 8
    i, j = _positions(s)
    return torch.where(j <= i, s, NEVER).softmax(-1) @ v


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = 30 * torch.tanh(q @ k.mT / 240)
    i, j = _positions(s)
    return torch.where((j <= i) & (i - j < 100), s, NEVER).softmax(-1) @ v


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT / 8
    i, j = _positions(s)
    slopes = torch.exp2(-torch.arange(1, q.shape[1] + 1, device=q.device)).to(q.dtype)[:, None, None]
    return (s + slopes * (j - i)).masked_fill(j > i, NEVER).softmax(-1) @ v


def documents(q: Tensor, k: Tensor, v: Tensor, d: Tensor) -> Tensor:
    return torch.where(d[:, None] == d[None], q @ k.mT / 8, NEVER).softmax(-1) @ v


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))


def sdpa(**options: Any) -> Callable[..., Tensor]:
    return lambda q, k, v, *mask: F.scaled_dot_product_attention(q, k, v, *mask, **options)


def _qkv(s: int = 300, heads: int = 2, keys: int | None = None, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(s)
    return [torch.randn(batch, h, s, 64, generator=g).to(dtype) for h in (heads, keys or heads, keys or heads)]


def _bool_mask(s: int) -> Tensor:
    """Half of the scores, and nothing for the first rows."""
    mask = torch.rand(s, s, generator=torch.Generator().manual_seed(1)) > 0.5
    mask[:9] = False
    return mask


CASES: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "plain": (plain, _qkv()),
    "causal": (causal, _qkv(batch=2)),
    "window": (window, _qkv()),
    "alibi": (alibi, _qkv()),
    "documents": (documents, [*_qkv(), torch.arange(300) // 70]),
    "grouped": (grouped, _qkv(heads=4, keys=2)),
    "sdpa": (sdpa(is_causal=True), _qkv()),
    "sdpa_grouped": (sdpa(is_causal=True, enable_gqa=True), _qkv(heads=4, keys=2)),
    "sdpa_bool_mask": (sdpa(), [*_qkv(), _bool_mask(300)]),
    "sdpa_float_mask": (sdpa(scale=0.3), [*_qkv(), torch.where(_bool_mask(300), 0.5, NEVER)]),
}
FAST = {"causal", "sdpa_bool_mask"}


def _gradients(f: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor, seed: int = 0) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point() and (x.dim() == 4 or x.shape == inputs[0].shape)) for x in inputs]
    torch.manual_seed(seed)
    out = f(*leaves)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


def _exact(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def check_gradients(f: Callable[..., Tensor], inputs: list[Tensor], compiled: Callable[..., Tensor], tolerance: float) -> None:
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(7))
    got = _gradients(compiled, inputs, grad)
    want = _gradients(f, [_exact(x) for x in inputs], grad.to(inputs[0].dtype).double())
    assert len(got) == len(want) == 4
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_gradients(name: str) -> None:
    f, inputs = CASES[name]
    torch._dynamo.reset()
    check_gradients(f, inputs, torch.compile(f, backend="aicc"), 4e-6)


@pytest.mark.parametrize("make", [lambda x: (5 * x[..., :8]).clamp(max=1), lambda x: x.cummax(-1).values], ids=["large", "alike"])
def test_rows_with_one_large_weight_are_no_further_from_the_truth_than_eagers(make: Callable[[Tensor], Tensor]) -> None:
    """Scores to several hundreds: an error of the log-sum-exp is one of all weights of its row (dV was 2.3 times as far as eager's). Values that have a
    common part: an error of the sum in the softmax's gradient moves dQ by a whole key."""
    g = torch.Generator().manual_seed(3)
    inputs = [make(torch.randn(1, 32, 65, 100, generator=g))] * 3
    grad = torch.randint(-8, 9, inputs[0].shape, generator=g) / 8
    torch._dynamo.reset()
    f = sdpa()
    got, eager = (_gradients(h, inputs, grad)[1:] for h in (torch.compile(f, backend="aicc"), lambda q, k, v: (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v))
    true = _gradients(f, [x.double() for x in inputs], grad.double())[1:]
    for a, b, c in zip(got, eager, true, strict=True):
        assert (a - c).square().mean() <= 1.5**2 * (b - c).square().mean()
    errors = [(x[0] - true[0]).sum(-1).square().mean() for x in (got, eager)]  # of dQ along what the keys have in common
    assert errors[0] <= errors[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "symbolic"])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_three_dimensions_of_16_bits_are_as_near_the_truth_as_eager(dtype: torch.dtype, dynamic: bool, causal: bool) -> None:
    """Eager's kernels take four dimensions; three it computes in float32 (dQ and dK were 20 times as far from the truth as its). Some rows have one
    weight of nearly 1."""
    g = torch.Generator().manual_seed(3)
    inputs = [torch.randn(5, 65, 64, generator=g).to(dtype)] * 3
    grad = torch.randn(5, 65, 64, generator=g).to(dtype)
    f = sdpa(is_causal=causal)
    torch._dynamo.reset()
    got, eager = (_gradients(h, inputs, grad) for h in (torch.compile(f, backend="aicc", dynamic=dynamic), f))
    true = _gradients(f, [x.double() for x in inputs], grad.double())
    for a, b, c in zip(got, eager, true, strict=True):
        assert (a - c).square().mean() <= 3**2 * (b - c).square().mean()


@pytest.mark.parametrize(("shape", "dynamic"), [((5, 65, 64), False), ((5, 65, 64), True)])
def test_scores_of_three_dimensions_are_kept_in_float32_and_not_saved(shape: tuple[int, ...], dynamic: bool) -> None:
    """With three dimensions, as in eager."""
    seen: list[torch.fx.GraphModule] = []

    def split(*args: Any, **kwargs: Any) -> Any:
        found = partition(*args, **kwargs)
        seen.extend(found)
        return found

    inputs = [torch.randn(shape).bfloat16().requires_grad_() for _ in range(3)]
    torch._dynamo.reset()
    with patch("aicc.compiler.dynamo.partition", split):
        torch.compile(sdpa(), backend="aicc", dynamic=dynamic)(*inputs).sum().backward()
    for graph in seen:
        scores = [n.meta["val"].dtype for n in graph.graph.nodes if n.target is torch.ops.aten.bmm.default and n.args[0].meta["val"].dtype == torch.float32]
        assert scores == [torch.float32]
    saved = [n.meta["val"] for n in seen[0].graph.output_node().all_input_nodes if isinstance(n.meta["val"], Tensor)]
    assert all(x.dtype == torch.bfloat16 or x.dim() == len(shape) - 1 for x in saved)


@pytest.mark.slow
def test_gradients_in_bfloat16() -> None:
    torch._dynamo.reset()
    check_gradients(causal, _qkv(dtype=torch.bfloat16), torch.compile(causal, backend="aicc"), 2e-2)


@pytest.mark.slow
def test_dynamic_lengths_share_a_kernel() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(window, backend="aicc")
    for s in (300, 417):
        inputs = _qkv(s)
        for x in inputs:
            torch._dynamo.mark_dynamic(x, 2)

        def marked(*xs: Tensor) -> Tensor:
            for x in xs:
                torch._dynamo.mark_dynamic(x, 2)
            return compiled(*xs)

        check_gradients(window, inputs, marked, 4e-6)


def test_dropout_draws_the_same_numbers_backward() -> None:
    """With the identity for v the result is the dropped weights: they give the mask, and with it the exact gradients."""
    s = 256
    f = sdpa(dropout_p=0.25, is_causal=True)
    q, k, _ = _qkv(s)
    v = torch.randn(1, 2, s, s, generator=torch.Generator().manual_seed(3))
    torch._dynamo.reset()
    compiled = torch.compile(f, backend="aicc")
    seen = _gradients(compiled, [q, k, torch.eye(s).expand(1, 2, s, s).contiguous()], torch.ones(1, 2, s, s), seed=5)[0]
    kept = (seen != 0).double()
    alive = torch.ones(s, s, dtype=torch.bool).tril()
    assert 0.7 < kept[..., alive].mean() < 0.8

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (torch.where(alive, q @ k.mT / 8, NEVER).softmax(-1) * kept / 0.75) @ v

    grad = torch.randn(1, 2, s, s, generator=torch.Generator().manual_seed(4))
    got, want = _gradients(compiled, [q, k, v], grad, seed=5), _gradients(exact, [q.double(), k.double(), v.double()], grad.double())
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).abs().max() <= 4e-6 * b.abs().max()


def test_fallback_random_draws_eagers_numbers() -> None:
    q, k, v = _qkv(64)
    f = sdpa(dropout_p=0.5)
    torch._dynamo.reset()
    compiled = torch.compile(f, backend=backend(Options(fallback_random=True, strict=True)))
    for a, b in zip(*(_gradients(g, [q, k, v], torch.ones(1, 2, 64, 64)) for g in (compiled, f)), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


# -- what is made of it ------------------------------------------------------------------------------------------------------------

def _largest(module: Operation) -> int:
    """Elements of the largest buffer of a host program, arguments and results included."""
    types = [v.type for op in module.walk() for v in (*op.results, *(a for r in op.regions for block in r.blocks for a in block.args))]
    return max(math.prod(t.shape) for t in types if hasattr(t, "shape") and hasattr(t, "dtype") and "Buffer" in type(t).__name__)


@pytest.mark.parametrize("target", [AVX2, CUDA], ids=["avx2", "cuda"])
@pytest.mark.parametrize("name", ["causal", pytest.param("alibi", marks=pytest.mark.slow), pytest.param("window", marks=pytest.mark.slow), "dropout"])
def test_neither_scores_nor_weights_are_stored(name: str, target: Any) -> None:
    """The forward pass is one stream, the backward two and a sum over rows; memory doubles with the length."""
    f = sdpa(dropout_p=0.1, is_causal=True) if name == "dropout" else CASES[name][0]
    arenas = []
    for s in (1024, 2048):
        inputs = [torch.randn(1, 16, s, 64).to(torch.bfloat16 if target is CUDA else torch.float32).requires_grad_() for _ in range(3)]
        graphs = training_graphs(f, inputs, target)
        assert max(map(_largest, graphs.values())) <= 16 * s * 64
        arenas.append(sum(next(op for op in m.body if op.name == "func")["stats"].get("arena_bytes", 0) for m in graphs.values()))
    assert arenas[1] <= 2.1 * arenas[0] + 4096


def test_kernels_are_counted() -> None:
    inputs = [torch.randn(1, 16, 1024, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    graphs = training_graphs(causal, inputs, CUDA, "tensor")
    assert streams_of(graphs["forward"]) == FORWARD and len(kernels_of(graphs["forward"])) == 1
    assert streams_of(graphs["backward"]) == BACKWARD and len(kernels_of(graphs["backward"])) == 3


def test_on_cpus_a_backward_pass_streams_for_what_its_mask_hides() -> None:
    """Scores of 4 MB a head stay in the outer cache: without a mask, products of their own are as good."""
    def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(~mask, -math.inf).softmax(-1) @ v

    inputs = [torch.randn(1, 2, 512, 64, requires_grad=True) for _ in range(3)]
    for f, more, expected in ((causal, [], CLOSED), (masked, [torch.ones(512, 512, dtype=torch.bool)], CLOSED),
                              (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, [], [])):
        assert streams_of(training_graphs(f, [*inputs, *more], AVX2, "tensor")["backward"]) == expected


@pytest.mark.parametrize("target", [AVX2, CUDA], ids=["avx2", "cuda"])
def test_what_is_returned_is_saved(target: Any) -> None:
    """Where the weights are a result, or a bias is trained, nothing is gained by computing them twice."""
    def with_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = (q @ k.mT).softmax(-1)
        return (p @ v).sum() + p.square().sum()

    def with_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return ((q @ k.mT) + bias).softmax(-1) @ v

    inputs = [torch.randn(1, 2, 256, 64, requires_grad=True) for _ in range(3)]
    graphs = training_graphs(with_weights, inputs, target, "tensor")
    assert not streams_of(graphs["forward"]) and not streams_of(graphs["backward"])
    graphs = training_graphs(with_bias, [*inputs, torch.randn(2, 256, 256, requires_grad=True)], target, "tensor")
    assert not streams_of(graphs["backward"])


@pytest.mark.slow
def test_multi_head_attention_module() -> None:
    torch.manual_seed(0)
    m = nn.MultiheadAttention(128, 2, batch_first=True)
    x = torch.randn(1, 300, 128, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: m(x, x, x, need_weights=False)[0], backend="aicc")
    compiled(x).square().sum().backward()
    got = [x.grad, *(p.grad for p in m.parameters())]
    x.grad, exact = None, nn.MultiheadAttention(128, 2, batch_first=True).double()
    exact.load_state_dict(m.state_dict())
    y = x.detach().double().requires_grad_()
    exact(y, y, y, need_weights=False)[0].square().sum().backward()
    for a, b in zip(got, [y.grad, *(p.grad for p in exact.parameters())], strict=True):
        assert (a.double() - b).abs().max() <= 1e-5 * b.abs().max()
