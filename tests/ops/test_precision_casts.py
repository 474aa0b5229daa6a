"""`options={"emulate_precision_casts": True}`: fused groups of 16-bit floats round where eager does, bit for bit.

Each chain becomes one kernel; without the option it computes in float32 and rounds once, which `test_without_the_option` shows to differ.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from aicc.compiler.driver import watching

Function = Callable[..., torch.Tensor]
TYPES = [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]

CHAINS: dict[str, Function] = {
    "polynomial": lambda x, y: ((x * 1.1 + y) * x - y * 0.3) * x + 0.7,
    "quotients": lambda x, y: (x / (y.abs() + 1)) / (x.abs() + 0.1) - y,
    "logsumexp": lambda x, y: torch.logsumexp((x * 1.1 + y) * 4, -1) * 1.1,
    "logsumexp of columns": lambda x, y: torch.logsumexp((x * 1.1 + y) * 4, 0) * 1.1,
    "residual": lambda x, y: x + (y * 0.5 + x) * 0.1 + y,
    "clamped": lambda x, y: (x * 3).clamp(-2, 2) - (y * 3).relu() * 0.9,
    "roots": lambda x, y: (x * x + y * y + 1e-3).sqrt() * (x.abs() + 1).rsqrt(),
    "exponentials": lambda x, y: (x * 0.7).exp() / ((y * 0.7).exp() + (x * 0.7).exp()),
    "gate": lambda x, y: F.silu(x * 1.3) * (y + 0.2),
    "trigonometry": lambda x, y: (x.sin() * y.cos() + y.sin() * x.cos()) * 0.9,
    "numbers": lambda x, y: ((x + 0.7) - y * 0.7 - 0.3) * 1.3 + torch.add(x, y, alpha=0.3) + (0.3 - x),
    "powers": lambda x, y: (x.abs() + 0.1) ** 0.7 + (y.abs() + 0.1) ** -1.3,
    "remainders": lambda x, y: torch.remainder(x * 3, 0.7) + torch.fmod(y * 3, 0.3),
    "comparisons": lambda x, y: torch.where(x * 1.1 < 0.7, x, y) + (y > 0.3).to(x.dtype),
    "lerp": lambda x, y: torch.lerp(x * 1.1, y * 0.9, 0.3) + x,
    "addcmul": lambda x, y: torch.addcmul(x * 1.1, x, y, value=0.3) + y,
    "where": lambda x, y: torch.where(x > y, x * 1.1 - y, y * 1.1 - x) * 0.7,
    "long": lambda x, y: _long(x, y),
}
NEARLY: dict[str, Function] = {
    "gelu": lambda x, y: F.gelu(x * 0.7 + y * 0.3) * y,
    "tanh gelu": lambda x, y: F.gelu(x * 0.7 + y * 0.3, approximate="tanh") * y,
    "maximum": lambda x, y: (x * 1.1 + y).amax(-1),
    "sum of a product": lambda x, y: ((x * y + x) * 0.1).sum(-1),
    "mean": lambda x, y: (x * 1.1 - y * 0.9).mean(-1) * 1.1,
    "softmax": lambda x, y: torch.softmax(x * 1.1 + y, -1) * y,
    "layer norm": lambda x, y: F.layer_norm(x * 1.1 + y, (x.shape[-1],)) * 1.1 + x,
    "rms norm by hand": lambda x, y: x * torch.rsqrt((x.float() * x.float()).mean(-1, keepdim=True) + 1e-6).to(x.dtype) * y,
}


def _long(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    for i in range(5):
        x = (x * 0.9 + y * 0.3) - (x * y) * (0.01 * (i + 1))
    return x


def _inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """No vector is left half full in eager, whose scalar code rounds `rsqrt` and others differently."""
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(37, 64, generator=g).to(dtype) for _ in range(2))  # type: ignore[return-value]


def _run(f: Function, arguments: tuple[torch.Tensor, ...], emulate: bool) -> tuple[torch.Tensor, int]:
    """The result, and how many kernels there are."""
    kernels: list[int] = []
    torch._dynamo.reset()
    with watching(compiled=lambda c: kernels.append(c.stats["kernels"])):
        got = torch.compile(f, backend="aicc", options={"emulate_precision_casts": emulate}, dynamic=False)(*arguments)
    return got, sum(kernels)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", CHAINS)
def test_chains_are_eagers_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    arguments = _inputs(dtype)
    got, kernels = _run(CHAINS[name], arguments, True)
    assert kernels == 1, "not fused: the test would show nothing"
    want = CHAINS[name](*arguments)
    assert torch.equal(got.view(torch.int16), want.view(torch.int16)), f"{int((got != want).sum())} of {want.numel()} differ"


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", NEARLY)
def test_nearly(name: str, dtype: torch.dtype) -> None:
    """Sums are accumulated in float32 in another order than eager's, and 1 + erf(x) cancels: one in a hundred results may round the other
    way, by one place."""
    arguments = _inputs(dtype)
    got, want = _run(NEARLY[name], arguments, True)[0], NEARLY[name](*arguments)
    different = got != want
    assert int(different.sum()) <= want.numel() / 100, f"{int(different.sum())} of {want.numel()} differ"
    assert bool(((got.float() - want.float()).abs() <= 2 * torch.finfo(dtype).eps * want.float().abs())[different].all())


def test_without_the_option() -> None:
    """The default keeps float32 inside of a group, and is nearer to the exact result."""
    arguments = _inputs(torch.bfloat16)
    got, _ = _run(_long, arguments, False)
    eager, exact = _long(*arguments), _long(*[a.double() for a in arguments])
    assert not torch.equal(got, eager)
    assert (got.double() - exact).abs().mean() < 0.5 * (eager.double() - exact).abs().mean()


def test_attention_rounds_no_scores() -> None:
    """Eager computes attention of three dimensions in float32 throughout: with scores of 100, rounded ones would be off by 0.25 in the exponent."""
    g = torch.Generator().manual_seed(1)
    q, k, v, grad = ((torch.randn(4, n, 8, generator=g) * 5).bfloat16() for n in (3, 6, 6, 3))

    def gradients(f: Function, dtype: torch.dtype) -> list[torch.Tensor]:
        given = [x.detach().clone().to(dtype).requires_grad_() for x in (q, k, v)]
        f(*given).backward(grad.to(dtype))
        return [x.grad.double() for x in given]  # type: ignore[union-attr]

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    torch._dynamo.reset()
    compiled = torch.compile(plain, backend="aicc", options={"emulate_precision_casts": True})
    for ours, eager, exact in zip(gradients(compiled, torch.bfloat16), gradients(plain, torch.bfloat16), gradients(plain, torch.float64), strict=True):
        assert (ours - exact).abs().max() <= 1.5 * (eager - exact).abs().max()
