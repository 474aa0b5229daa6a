"""Floats of 8 bits on CPUs: every pattern to wider types, and random, tied, tiny and huge numbers from them, bit for bit as torch."""

from __future__ import annotations

import pytest
import torch

TORCH = tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2])
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def patterns(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(dtype)


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    torch._dynamo.reset()
    return torch.compile(lambda v: v.to(dtype), backend="aicc", fullgraph=True)(x)


@pytest.mark.parametrize("to", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.bool], ids=str)
@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_every_pattern(dtype: torch.dtype, to: torch.dtype) -> None:
    x = patterns(dtype)
    x = x if to.is_floating_point or to == torch.bool else x[x.float().isfinite()]
    torch.testing.assert_close(cast(x, to), x.to(to), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("source", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.bool], ids=str)
@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_rounding(dtype: torch.dtype, source: torch.dtype) -> None:
    exact = patterns(dtype).float()
    exact = exact[exact.isfinite()].sort()[0]
    ties = (exact[1:] + exact[:-1]) / 2
    torch.manual_seed(0)
    wide = torch.randn(20000) * torch.exp2(torch.randint(-24, 12, (20000,)).float())
    bits = torch.randint(-2**31, 2**31, (20000,), dtype=torch.int32).view(torch.float32)
    x = torch.cat([exact, ties, wide, bits, torch.tensor([float("inf"), -float("inf"), float("nan"), 464.0, 464.5, 61440.0])])
    if not source.is_floating_point:
        x = x.nan_to_num(0, 0, 0).clamp(-1000, 1000)
    x = x.to(source)
    if dtype == torch.float8_e4m3fn and TORCH < (2, 13):
        x = x[(x.double().abs() <= 448) | x.double().isnan()]  # what is larger was NaN then
    got, want = cast(x, dtype).view(torch.uint8), x.to(dtype).view(torch.uint8)
    nan = (got & 127 > 126) & (want & 127 > 126) if dtype == torch.float8_e4m3fn else (got & 127 > 124) & (want & 127 > 124)
    assert torch.equal(got[~nan], want[~nan])
