"""What follows a stream's product joins its kernel."""

from __future__ import annotations

import pytest
import torch
from aicc.ir import Operation

from ...gpu.cases import SM90, capture


@pytest.mark.parametrize("batch", [1, 2])
def test_a_view_to_a_batch_of_one_leaves_no_copy(batch: int) -> None:
    kernels: list[str] = []

    def run(module: Operation, gm: torch.fx.GraphModule, args: list[object]) -> object:
        kernels.extend(op["sym_name"] for op in module.body if op.name == "tile.kernel")
        return gm.forward(*args)

    inputs = [torch.randn(batch, 4, 256, 64).bfloat16() for _ in range(3)]
    capture(lambda q, k, v: (q @ k.transpose(-1, -2) / 8).softmax(-1) @ v, inputs, run, target=SM90)
    assert kernels == ["stream"]
