"""Operator calls within programs: where their results start."""

from __future__ import annotations

import ctypes

import pytest
import torch
from aicc.runtime.extern_call import ALIGNMENT, TensorSpec
from aicc.runtime.segments import Segments


@torch.library.custom_op("aicc_test::odd", mutates_args=())
def odd(x: torch.Tensor) -> torch.Tensor:
    """Twice x, in memory that does not start at a multiple of 16 bytes."""
    return torch.cat([x.new_zeros(1), 2 * x])[1:]


@torch.library.custom_op("aicc_test::odd_rows", mutates_args=())
def odd_rows(x: torch.Tensor) -> torch.Tensor:
    """Three rows that are the same memory, which does not start at a multiple of 16 bytes."""
    return torch.cat([x.new_zeros(1), 2 * x])[1:].expand(3, -1)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(("target", "shape", "strides"), [("odd", [5], [1]), ("odd_rows", [3, 5], [0, 1])], ids=["a vector", "one row, expanded"])
def test_results_of_operators_start_where_kernels_expect_them(target: str, shape: list[int], strides: list[int], aligned: bool) -> None:
    given, layout = {"dtype": "f32", "shape": [5], "strides": [1]}, {"dtype": "f32", "shape": shape, "strides": strides}
    row = {"target": f"aicc_test.{target}.default", "args": [{"operand": 0}], "kwargs": {}, "operand_strides": [None], "result_kinds": ["tensor"],
           "results": [layout], "defines": [], "operands": [{"space": "input", "index": 0, "offset": 0, **given}], "buffers": [0]}
    segments = Segments([["extern", row]], lambda name: pytest.fail(name), [], {}, [given], [TensorSpec(layout, {})], aligned=aligned)
    x, buffers = torch.arange(5.0), [None]
    table = (ctypes.c_uint64 * 3)()
    segments.run([x], buffers, None, None, table, ctypes.addressof(table), [], (ctypes.c_int64 * 1)())
    (got,) = buffers
    assert got is not None and torch.equal(got, (2 * x).expand(shape)) and table[1] == got.data_ptr() and list(got.stride()) == strides
    assert (got.data_ptr() % ALIGNMENT == 0) == aligned
