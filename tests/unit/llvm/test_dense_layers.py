"""Linear layers and convolutions through the whole compiler, for processors with and without vector extensions, against float64.

Shapes are ragged in every dimension, and long enough along K to be cut into blocks.
"""

from __future__ import annotations

import pytest
import torch
from aicc.backends.llvm import host_target
from aicc.compiler.driver import watching
from torch import nn
from torch.nn import functional as F

HOST = frozenset(host_target().features)
FEATURES = {"host": HOST, "avx2": HOST & {"avx", "avx2", "fma", "sse4.2", "popcnt", "bmi", "bmi2", "f16c"}, "generic": frozenset()}


@pytest.fixture(params=FEATURES)
def features(request: pytest.FixtureRequest) -> list[str]:
    if request.param == "avx2" and "avx2" not in HOST:
        pytest.skip("this processor has no AVX2")
    return sorted(FEATURES[request.param])


def check(f, args: tuple[torch.Tensor, ...], truth: torch.Tensor, features: list[str]) -> str:  # type: ignore[no-untyped-def]
    """Compares a first and a second call (whose result lies in used memory) with the truth; returns the code before optimisation."""
    torch._dynamo.reset()
    seen = []  # type: ignore[var-annotated]
    with torch.no_grad(), watching(compiled=seen.append):
        compiled = torch.compile(f, backend="aicc", options={"features": features})
        for _ in range(2):
            result = compiled(*args)
            torch.testing.assert_close(result.double(), truth, rtol=1e-5, atol=2e-6 * truth.abs().max().item())
            result.fill_(float("nan"))
            del result
    return seen[0].llvm_ir


@pytest.mark.product
@pytest.mark.parametrize("m,n,k", [(250, 130, 1500), (5, 70, 2001), (1, 500, 1700), (241, 257, 1025), (128, 96, 3072)])
def test_linear(m: int, n: int, k: int, features: list[str]) -> None:
    torch.manual_seed(m)
    layer, x, y = nn.Linear(k, n), torch.randn(m, k), torch.randn(m, n)
    truth = (x.double() @ layer.weight.double().T + layer.bias.double()).relu() + y.double()
    check(lambda x, y: layer(x).relu() + y, (x, y), truth, features)


def test_batched(features: list[str]) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 33, 1601), torch.randn(2, 1601, 45)
    check(torch.bmm, (x, y), x.double() @ y.double(), features)


@pytest.mark.product
@pytest.mark.parametrize("channels,out,size,kernel,stride", [(300, 70, 7, 3, 1), (1601, 33, 5, 1, 1), (40, 48, 9, 5, 2),
                                                                (3, 32, 56, 3, 2), (3, 24, 28, 5, 1), (9, 40, 12, 1, 1)])
def test_convolution(channels: int, out: int, size: int, kernel: int, stride: int, features: list[str]) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(channels, out, kernel, stride, kernel // 2), torch.randn(2, channels, size, size)
    truth = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), stride, kernel // 2)
    check(layer, (x,), truth, features)


@pytest.mark.product
@pytest.mark.parametrize("after_pointwise", [False, True])
@pytest.mark.parametrize("channels,multiplier,kernel,stride,padding,dilation", [(37, 1, 3, 1, 1, 1), (32, 1, 3, 2, 1, 1), (20, 2, 5, 1, 2, 1), (48, 1, 3, 1, 2, 2)])
def test_depthwise(channels: int, multiplier: int, kernel: int, stride: int, padding: int, dilation: int, after_pointwise: bool, features: list[str]) -> None:
    torch.manual_seed(0)
    depthwise = nn.Conv2d(channels, channels * multiplier, kernel, stride, padding, dilation, groups=channels)
    net = nn.Sequential(nn.Conv2d(8, channels, 1), nn.ReLU6(), depthwise, nn.ReLU6(), nn.Conv2d(channels * multiplier, 12, 1)) if after_pointwise else depthwise
    x = torch.randn(2, 8 if after_pointwise else channels, 13, 11)
    truth = net.double()(x.double()).detach()
    net.float()
    check(net, (x,), truth, features)


@pytest.mark.parametrize("k,dynamic", [(384, False), (520, False), (1030, True)])
def test_sums_begin_anew(k: int, dynamic: bool) -> None:
    """Products of a little more than 256 steps are summed in equal parts: a chain of 384 made a vision transformer 2.7 times as far from float64 as
    eager. The distance grows with the root of the longest chain, here less than three quarters of all. As many steps as come in a call, too."""
    torch.manual_seed(0)
    a, b = torch.randn(127, k), torch.randn(k, 128)
    truth, chain = a.double() @ b.double(), torch.zeros(127, 128)
    for i in range(k):
        chain = (chain.double() + a[:, i:i + 1].double() * b[i:i + 1].double()).float()  # a chain of multiply-adds
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(torch.mm, backend="aicc", dynamic=dynamic, options={"cache": False})(a, b)
    assert (found - truth).square().mean().sqrt() < 0.85 * (chain - truth).square().mean().sqrt()
