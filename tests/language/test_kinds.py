"""Kinds of tensors: complex, subclasses, sparse, nested, quantized, meta; and every element type."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from .harness import EAGER, Row, check

_ELEMENTS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
             torch.bool)


def _complex() -> tuple[Tensor, ...]:
    return (torch.randn(4, 4, dtype=torch.complex64),)


def _of(dtype: torch.dtype) -> Row:
    def make() -> tuple[Tensor, ...]:
        return torch.randint(0, 2 if dtype == torch.bool else 9, (4, 5)).to(dtype), torch.randint(0, 2, (5,)).to(dtype)
    return Row(lambda x, y: (x + y, x * y, x == y, x.sum(), x.amax(0), x.to(torch.float32) / 3, x.flip(0)), make, tolerance=1e-2 if dtype.itemsize == 2 else 1e-5)


class _Named(Tensor):
    """A subclass with a method of its own and no dispatch."""

    def twice(self) -> Tensor:
        return self * 2


class _Logged(Tensor):
    """A subclass that goes through __torch_function__."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


def _two() -> tuple[Tensor, ...]:
    return TwoTensor(torch.randn(3, 4), torch.randn(3, 4)), torch.randn(4)


ROWS: dict[str, Row] = {
    **{f"{str(d).removeprefix('torch.')} elements": _of(d) for d in _ELEMENTS},
    "complex: product and magnitude": Row(lambda z: (z @ z).abs() * 2, _complex, aten=("abs", "mm")),
    "complex: parts": Row(lambda z: (z.real * 2 + z.imag, torch.view_as_real(z) + 1), _complex, aten=("view_as_real",)),
    "complex: made of parts": Row(lambda x, y: torch.complex(x, y) * 2, lambda: (torch.randn(3), torch.randn(3)), aten=("complex", "mul.Tensor")),
    "complex: FFT": Row(lambda x: torch.fft.rfft(x).abs() + 1, lambda: (torch.randn(3, 16),), aten=("_fft_r2c", "abs")),
    "complex: training": Row(lambda z: (z * z.conj()).real.sum() * 2, _complex, train=True, aten=("_conj", "add.Tensor", "mul.Tensor", "view_as_complex", "view_as_real")),
    "complex: complex32": Row(lambda x: (torch.view_as_complex(x * 2), x + 1), lambda: (torch.randn(3, 2, dtype=torch.float16),), how=EAGER,
                              options={"options": {"strict": False}}, warns="could not compile this inference graph",
                              note="falls back to ATen with a warning: aicc has no such element type"),
    "a subclass that wraps two tensors": Row(lambda t, x: (t * 2 + x).sin(), _two),
    "a subclass that wraps two tensors, training": Row(lambda t, x: (t * x).sin(), _two, train=True),
    "a subclass with methods": Row(lambda x: x.twice() + 1, lambda: (torch.randn(3).as_subclass(_Named),)),
    "a subclass with __torch_function__": Row(lambda x: (x * 2).sin(), lambda: (torch.randn(3).as_subclass(_Logged),)),
    "a parameter": Row(lambda p: p * 2, lambda: (nn.Parameter(torch.randn(3)),), train=True),
    "nested, jagged": Row(lambda x: (x * 2).sin(), lambda: (torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=torch.jagged),)),
    "sparse": Row(lambda s, x: torch.sparse.mm(s, x) * 2, lambda: (torch.eye(4).to_sparse(), torch.randn(4, 3)), how="eager", breaks=True),
    "quantized": Row(lambda q: q.dequantize() * 2, lambda: (torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.quint8),), how="eager", breaks=True),
    "int8 product": Row(lambda a, b: torch._int_mm(a, b), lambda: (torch.randint(-9, 9, (32, 16), dtype=torch.int8), torch.randint(-9, 9, (16, 8), dtype=torch.int8))),
    "a sort and a top-k": Row(lambda x: (x.sort(), x.topk(2)), lambda: (torch.randn(4, 6),)),
    "one-hot": Row(lambda i: F.one_hot(i, 6) * 2, lambda: (torch.tensor([1, 5, 0]),), aten=("_assert_async.msg",),
                   newer=("_assert_async.msg",), note="torch before 2.12 traces it without a check of the classes"),
}


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str) -> None:
    check(ROWS[name])
