"""Copies that move dimensions: tiles turned in registers, and the order in which programs walk memory."""

from __future__ import annotations

import pytest
import torch
from support.stages import AVX2, AVX512, GENERIC, capture, check_levels, lowered


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(256, 272), (130, 77), (64, 4000)])
def test_transposes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randint(0, 99, shape).to(dtype)
    for f in (lambda x: x.t().contiguous(), lambda x: x.t().logical_not() if dtype == torch.bool else x.t() * 2):
        torch._dynamo.reset()
        assert torch.equal(torch.compile(f, backend="aicc", options={"strict": True})(x), f(x))


@pytest.mark.parametrize("target", [GENERIC, AVX2], ids=["generic", "avx2"])
def test_levels(target) -> None:  # type: ignore[no-untyped-def]
    check_levels(capture(lambda x, y: x.t() + y, (torch.randn(96, 130), torch.randn(130, 96))), target)
    check_levels(capture(lambda x: x.transpose(1, 2).contiguous(), (torch.randn(3, 20, 5, 64),)), target)
    check_levels(capture(lambda x: x.permute(0, 2, 3, 1).contiguous(), (torch.randn(2, 32, 9, 11),)), target)


def test_programs_follow_what_they_read() -> None:
    """Heads that move past positions: the grid's fastest axis is that of neighbours in the operand, the heads."""
    module = lowered(capture(lambda x: x.transpose(1, 2).contiguous(), (torch.randn(3, 512, 16, 64),)), AVX2, "tile")
    kernel, = [op for op in module.body if op.name == "tile.kernel"]
    assert kernel["grid"] == (3, 512, 16, 1) or kernel["grid"] == (3, 512, 16)


@pytest.mark.parametrize("rows,columns", [(96, 80), (130, 72), (16, 64), (50, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_weight(rows: int, columns: int, dtype: torch.dtype) -> None:
    """Ragged panels and steps too."""
    torch.manual_seed(rows)
    layer, x = torch.nn.Linear(columns, rows).to(dtype), torch.randn(40, columns, dtype=dtype)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend="aicc", options={"cache": False})(x), layer(x))


def test_a_weight_is_packed_by_turning_tiles() -> None:
    """Panels of 16 columns are as narrow as a line: what is read along the weight's rows is turned in registers, 16 by 16."""
    graph = capture(lambda x, w: x @ w.t(), (torch.randn(40, 80), torch.randn(96, 80)))
    module = lowered(graph, AVX2, "tile")
    packing, _ = [op for op in module.body if op.name == "tile.kernel"]
    assert [op["shape"] for op in packing.walk() if op.name == "tile.load"] == [(16, 16)]
    check_levels(graph, AVX2)
    check_levels(capture(lambda x, w: x @ w.t(), (torch.randn(40, 70), torch.randn(50, 70))), AVX2)


def test_a_program_packs_as_many_columns_as_it_can_foresee() -> None:
    """Panels of 512-bit vectors are several lines wide: a program turns 16 rows of the weight, along all of K, not those of the whole panel."""
    module = lowered(capture(lambda x, w: x @ w.t(), (torch.randn(160, 80), torch.randn(256, 80))), AVX512, "tile")
    packing, product = [op for op in module.body if op.name == "tile.kernel"]
    panels, width = packing.body.args[-1].type.shape[0], packing.body.args[-1].type.shape[-1]
    assert width > 16 and packing["grid"] == (panels, width // 16, 5)
    assert product["flops"] == 2 * 160 * 256 * 80
