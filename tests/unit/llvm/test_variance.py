"""A variance is as near to float64 as eager's, which adds in float64: at most twice its distance, split in parts or not, whatever the mean."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("offset", [0.0, 5.0])
@pytest.mark.parametrize("shape,dims", [((8192, 64), (0,)), ((4096, 512), (0,)), ((512, 1000), (1,)), ((64, 32, 257), (0, 2)), ((3, 1 << 18), (0, 1))])
def test_distance_to_float64(shape: tuple[int, ...], dims: tuple[int, ...], offset: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape) + offset
    compiled = torch.compile(lambda x: (x.var(dims), x.std(dims, correction=0)), backend="aicc", options={"strict": True, "cache": False})
    torch._dynamo.reset()
    with torch.no_grad():
        made = compiled(x)
    wide = x.double()
    for found, eager, true in ((made[0], x.var(dims), wide.var(dims)), (made[1], x.std(dims, correction=0), wide.std(dims, correction=0))):
        # eager may be lucky: half a unit in the last place is allowed anyhow
        allowed = max((eager.double() - true).abs().max().item(), 2.0**-24 * true.abs().max().item())
        assert (found.double() - true).abs().max().item() <= 2 * allowed
