"""Random numbers: repeatable, with the right statistics, the same in forward and backward; and eager's own under `fallback_random`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from aicc.compiler.driver import watching
from aicc.frontend.random import random_decompositions, share_seeds
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
from torch.utils.checkpoint import checkpoint

from .harness import Row, check

N = 40_000
_FALLBACK = {"options": {"fallback_random": True}}


def _x() -> tuple[Tensor, ...]:
    return (torch.randn(50, 40),)


_DRAWS: dict[str, Callable[[Tensor], Any]] = {
    "rand": lambda x: torch.rand(50, 40) + x,
    "rand_like": lambda x: torch.rand_like(x),
    "randn": lambda x: torch.randn(50, 40) + x,
    "randn_like": lambda x: torch.randn_like(x),
    "randint": lambda x: torch.randint(3, 17, (50, 40)) + x,
    "randint_like": lambda x: torch.randint_like(x, 9),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "bernoulli_": lambda x: x.clone().bernoulli_(0.3),
    "uniform_": lambda x: torch.empty_like(x).uniform_(-1, 2),
    "normal_": lambda x: torch.empty_like(x).normal_(1, 2),
    "normal": lambda x: torch.normal(x, 0.5),
    "normal of tensors": lambda x: torch.normal(x, x.abs()),
    "exponential_": lambda x: torch.empty_like(x).exponential_(2),
    "geometric_": lambda x: torch.empty_like(x).geometric_(0.3),
    "cauchy_": lambda x: torch.empty_like(x).cauchy_(),
    "log_normal_": lambda x: torch.empty_like(x).log_normal_(),
    "dropout": lambda x: F.dropout(x, 0.3),
    "dropout2d": lambda x: F.dropout2d(x.view(5, 10, 8, 5), 0.3),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.3, training=True),
    "attention with dropout": lambda x: F.scaled_dot_product_attention(x.view(1, 5, 10, 40), x.view(1, 5, 10, 40), x.view(1, 5, 10, 40), dropout_p=0.2),
    "gumbel_softmax": lambda x: F.gumbel_softmax(x),
}
_ATEN = {"multinomial": (lambda x: torch.multinomial(x.abs() + 0.1, 3), "multinomial"), "randperm": (lambda x: torch.randperm(40) + x, "randperm"),
         "poisson": (lambda x: torch.poisson(x.abs()), "poisson")}

_EAGERS = {"rand": ("rand",), "rand_like": ("rand_like",), "randn": ("randn",), "randn_like": ("randn_like",), "randint": ("randint.low",),
           "bernoulli": ("bernoulli",), "uniform_": ("uniform",), "normal_": ("normal_functional",), "exponential_": ("exponential",),
           "dropout": ("bernoulli.p",), "multinomial": ("multinomial",)}
ROWS: dict[str, Row] = {
    f"eager's numbers: {n}": Row(_DRAWS.get(n) or _ATEN[n][0], _x, aten=ops, options=_FALLBACK, note="with `fallback_random`") for n, ops in _EAGERS.items()
}


@pytest.mark.parametrize("name", ROWS)
def test_eagers_own_numbers(name: str) -> None:
    """With fallback_random the same seed gives eager's numbers, bit for bit."""
    check(ROWS[name])


def _compiled(f: Callable[..., Any], **more: Any) -> Callable[..., Any]:
    return torch.compile(f, backend="aicc", **more)


@pytest.mark.parametrize("name", [*_DRAWS, *_ATEN])
def test_repeatable(name: str) -> None:
    """manual_seed repeats; without it each call draws anew; eager's shape, type and strides; one seed from the generator."""
    f = _DRAWS.get(name) or _ATEN[name][0]
    x, = _x()
    seen: list[Any] = []
    with watching(compiled=seen.append):
        g = _compiled(f)
        torch.manual_seed(1)
        first, second = g(x), g(x)
        torch.manual_seed(1)
        again = g(x)
    want = f(x)
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert (first.dtype, first.shape, first.stride()) == (want.dtype, want.shape, want.stride())
    externs = [e["target"] for c in seen for e in c.stats["externs"]]
    assert externs == (["aten.randint.low"] if name in _DRAWS else [f"aten.{name}.default"])


# -- statistics

def _ks(sample: np.ndarray, cdf: Callable[[np.ndarray], np.ndarray]) -> float:
    """Kolmogorov and Smirnov's distance, times sqrt(n): above 1.95 once in a thousand."""
    x = np.sort(sample.astype(np.float64))
    n = len(x)
    below = cdf(x)
    return float(np.sqrt(n) * max(np.max(np.arange(1, n + 1) / n - below), np.max(below - np.arange(n) / n)))


def _phi(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + torch.erf(torch.from_numpy(x / math.sqrt(2))).numpy())


_CONTINUOUS: dict[str, tuple[Callable[[], Tensor], Callable[[np.ndarray], np.ndarray]]] = {
    "uniform f32": (lambda: torch.rand(N), lambda x: x),
    "uniform f64": (lambda: torch.rand(N, dtype=torch.float64), lambda x: x),
    "uniform_": (lambda: torch.empty(N).uniform_(-2, 4), lambda x: (x + 2) / 6),
    "normal f32": (lambda: torch.randn(N), _phi),
    "normal f64": (lambda: torch.randn(N, dtype=torch.float64), _phi),
    "normal_": (lambda: torch.empty(N).normal_(3, 2), lambda x: _phi((x - 3) / 2)),
    "exponential": (lambda: torch.empty(N).exponential_(2), lambda x: 1 - np.exp(-2 * x)),
    "cauchy": (lambda: torch.empty(N).cauchy_(1, 2), lambda x: 0.5 + np.arctan((x - 1) / 2) / np.pi),
    "log-normal": (lambda: torch.empty(N).log_normal_(0.5, 1.5), lambda x: _phi((np.log(x) - 0.5) / 1.5)),
}


@pytest.mark.parametrize("name", _CONTINUOUS)
def test_distribution(name: str) -> None:
    draw, cdf = _CONTINUOUS[name]
    torch.manual_seed(1234)
    sample = _compiled(draw)().numpy()
    assert np.isfinite(sample).all()
    assert _ks(sample, cdf) < 1.95


_DISCRETE: dict[str, tuple[Callable[[], Tensor], dict[int, float]]] = {
    "randint": (lambda: torch.randint(3, 13, (N,)), dict.fromkeys(range(3, 13), 0.1)),
    "randint, int8": (lambda: torch.randint(-5, 5, (N,), dtype=torch.int8), dict.fromkeys(range(-5, 5), 0.1)),
    "randint, wide": (lambda: torch.randint(0, 10 * 2**40, (N,)) // 2**40, dict.fromkeys(range(10), 0.1)),
    "bernoulli": (lambda: torch.full((N,), 0.3).bernoulli(), {0: 0.7, 1: 0.3}),
    "dropout": (lambda: F.dropout(torch.ones(N), 0.75), {0: 0.75, 4: 0.25}),
    "geometric": (lambda: torch.empty(N).geometric_(0.5).clamp(max=6), {**{i: 0.5**i for i in range(1, 6)}, 6: 0.5**5}),
    "random_": (lambda: torch.empty(N, dtype=torch.int32).random_(0, 8), dict.fromkeys(range(8), 0.125)),
}


@pytest.mark.parametrize("name", _DISCRETE)
def test_frequencies(name: str) -> None:
    """Pearson's chi-square, normalised: above 3.3 about once in a thousand."""
    draw, probability = _DISCRETE[name]
    torch.manual_seed(99)
    values, counts = _compiled(draw)().unique(return_counts=True)
    found = dict(zip(values.long().tolist(), counts.tolist(), strict=True))
    assert found.keys() == probability.keys()
    chi2 = sum((found[v] - N * p) ** 2 / (N * p) for v, p in probability.items())
    freedom = len(probability) - 1
    assert (chi2 - freedom) / math.sqrt(2 * freedom) < 3.3


def test_streams_and_calls_are_independent() -> None:
    """Tensors of one graph, elements beside each other, and calls: no correlation beyond 4 / sqrt(n)."""
    torch.manual_seed(5)
    f = _compiled(lambda: (torch.randn(N), torch.randn(N), torch.rand(N)))
    (a, b, c), (d, _, _) = f(), f()
    pairs = [(a, b), (a, c), (b, c), (a, d), (a[1:], a[:-1]), (c[4:], c[:-4])]
    for p, q in pairs:
        correlation = torch.corrcoef(torch.stack([p, q]))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(N)


def test_low_precision_stays_below_one() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        u = _compiled(lambda dtype=dtype: torch.rand(N, dtype=dtype))().float()
        assert u.max() < 1 and u.min() >= 0 and abs(u.mean() - 0.5) < 0.01


def test_known_answers() -> None:
    """Philox 4x32-10 of the Random123 distribution's test vectors: counter 0, key 0 gives 6627e8d5 e169c58d bc57ac4c 9b00dbd8."""
    from aicc.ir import DTYPES, TensorType
    from aicc.ir.builder import Builder, make_func, make_module
    from aicc.ir.interpreter import interpret
    from aicc.passes.decompose import Decompose

    module, block = make_module("graph")
    func, body = make_func(block, "main", [TensorType((), DTYPES["i64"])])
    b = Builder.at_end(body)
    values = [b.op("graph.random_bits", body.args[0], type=TensorType((3,), DTYPES["u64"]), stream=0, pair=pair) for pair in (0, 1)]
    b.create("return", values)
    func.attributes["result_attrs"] = tuple({"kind": "tensor"} for _ in values)
    want = [0xE169C58D_6627E8D5, 0x9B00DBD8_BC57AC4C]
    for lowered in (False, True):
        if lowered:
            from aicc.backends.llvm import host_target
            from aicc.ir.passes import PassContext
            Decompose().run(module, PassContext(host_target()))
        low, high = interpret(module, [torch.tensor(0)])
        assert [int(low.numpy()[0]), int(high.numpy()[0])] == want
    seed = torch.tensor(-7)
    pairs = [int(x.numpy()[k]) for k in (0, 1) for x in interpret(module, [seed])]
    words = torch.ops.aicc.random_integers(seed, [8], 0, 1 << 32, 0)  # four of 32 bits to a counter
    assert [half for x in pairs for half in (x & 0xFFFFFFFF, x >> 32)] == words.tolist()


def _through_aten(gm: torch.fx.GraphModule, inputs: Any) -> Any:
    def run(g: torch.fx.GraphModule, _: Any) -> Any:
        share_seeds(g)
        return make_boxed_func(g.forward)
    return aot_module_simplified(gm, inputs, fw_compiler=run, decompositions=random_decompositions())


def test_compiled_and_aten_draw_the_same() -> None:
    """A graph that falls back to ATen has the numbers of the compiled one."""
    def f(x: Tensor) -> tuple[Tensor, ...]:
        return (torch.rand(1000), torch.randn(1000), torch.randn(1000, dtype=torch.float64), torch.rand(1000, dtype=torch.float64),
                F.dropout(x, 0.4), torch.randint(0, 100, (1000,)), torch.randint(0, 1 << 40, (1000,)), torch.rand(1000, dtype=torch.bfloat16),
                torch.rand_like(x.t()))

    x = torch.randn(30, 50)
    results = []
    for backend in ("aicc", _through_aten):
        torch._dynamo.reset()
        torch.manual_seed(3)
        results.append(torch.compile(f, backend=backend)(x))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# -- forward and backward

class _Net(nn.Module):
    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.weight = nn.Parameter(torch.randn(16, 16))

    def block(self, x: Tensor) -> Tensor:
        return F.dropout(torch.tanh(x @ self.weight), 0.5) + torch.rand_like(x)

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute:
            return checkpoint(self.block, x, use_reentrant=False)
        return self.block(x)


@pytest.mark.parametrize("recompute", [False, True])
def test_backward_uses_the_mask_of_the_forward(recompute: bool) -> None:
    """Where the output is 0 its gradient is 0, recomputed or saved; and both give the same."""
    x = torch.ones(400, requires_grad=True)
    f = _compiled(lambda x: checkpoint(lambda x: F.dropout(x.exp().log(), 0.5), x, use_reentrant=False) if recompute else F.dropout(x, 0.5))
    y = f(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach())
    assert 100 < int((y == 0).sum()) < 300


def test_checkpointing_changes_nothing() -> None:
    grads = []
    x = torch.randn(8, 16)
    for recompute in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        net = _Net(recompute)
        torch.manual_seed(11)
        _compiled(net)(x).square().sum().backward()
        grads.append(net.weight.grad)
    torch.testing.assert_close(*grads)


def test_fallback_with_checkpoint_follows_the_generator() -> None:
    """ATen's masks, drawn again in the backward pass: eager's, and the generator ends where eager's does."""
    results = []
    x = torch.randn(8, 16)
    for compile_ in (False, True):
        torch.manual_seed(0)
        net = _Net(True)
        call = _compiled(net, **_FALLBACK) if compile_ else net
        torch.manual_seed(11)
        y = call(x)
        y.square().sum().backward()
        results.append((y.detach(), net.weight.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_dropout_off() -> None:
    for f in (lambda x: F.dropout(x, 0.3, training=False), lambda x: F.dropout(x, 0.0), lambda x: F.dropout(x, 1.0)):
        torch._dynamo.reset()
        x = torch.randn(10)
        torch.testing.assert_close(_compiled(f)(x), f(x))


def test_symbolic_sizes_draw_the_same_stream() -> None:
    """Element i has the same number whatever the size."""
    f = _compiled(lambda x: torch.rand_like(x), dynamic=True)
    drawn = []
    for n in (7, 50, 3):
        torch.manual_seed(2)
        drawn.append(f(torch.empty(n)))
    assert torch.equal(drawn[0], drawn[1][:7]) and torch.equal(drawn[2], drawn[1][:3])


def test_branches_and_loops_draw() -> None:
    from torch._higher_order_ops.while_loop import while_loop
    f = _compiled(lambda x: while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, x + torch.rand_like(x)), (torch.tensor(0), x))[1])
    torch.manual_seed(0)
    a = f(torch.zeros(1000))
    torch.manual_seed(0)
    b = f(torch.zeros(1000))
    assert torch.equal(a, b) and abs(a.mean() - 1.5) < 0.1 and abs(a.var() - 0.25) < 0.05


def test_a_generator_that_is_given_stays_with_torch() -> None:
    """Dynamo does not capture generators: eager's numbers."""
    def f(x: Tensor, g: torch.Generator) -> Tensor:
        return x * 2 + torch.rand(5, generator=g)

    x = torch.randn(5)
    results = [h(x, torch.Generator().manual_seed(4)) for h in (f, _compiled(f))]
    torch.testing.assert_close(*results)
