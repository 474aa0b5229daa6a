"""Operator calls within programs: where their results start."""

from __future__ import annotations

import ctypes

import pytest
import torch
from aicc.runtime.extern_call import TensorSpec
from aicc.runtime.segments import ALIGNMENT, Segments


@torch.library.custom_op("aicc_test::odd", mutates_args=())
def odd(x: torch.Tensor) -> torch.Tensor:
    """Twice x, in memory that does not start at a multiple of 16 bytes."""
    return torch.cat([x.new_zeros(1), 2 * x])[1:]


@pytest.mark.parametrize("aligned", [False, True])
def test_results_of_operators_start_where_kernels_expect_them(aligned: bool) -> None:
    layout = {"dtype": "f32", "shape": [5], "strides": [1]}
    row = {"target": "aicc_test.odd.default", "args": [{"operand": 0}], "kwargs": {}, "operand_strides": [None], "result_kinds": ["tensor"],
           "results": [layout], "defines": [], "operands": [{"space": "input", "index": 0, "offset": 0, **layout}], "buffers": [0]}
    segments = Segments([["extern", row]], lambda name: pytest.fail(name), [], {}, [layout], [TensorSpec(layout, {})], aligned=aligned)
    x, buffers = torch.arange(5.0), [None]
    table = (ctypes.c_uint64 * 3)()
    segments.run([x], buffers, None, None, table, ctypes.addressof(table), [], (ctypes.c_int64 * 1)())
    (got,) = buffers
    assert got is not None and torch.equal(got, 2 * x) and table[1] == got.data_ptr()
    assert (got.data_ptr() % ALIGNMENT == 0) == aligned
