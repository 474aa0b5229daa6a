"""Element types as Triton names them."""

from __future__ import annotations

from ...ir.core import IRError
from ...ir.types import DType

__all__ = ["pointer", "tl_type"]

_NAMES = {
    "f64": ("float64", "fp64"),
    "f32": ("float32", "fp32"),
    "f16": ("float16", "fp16"),
    "bf16": ("bfloat16", "bf16"),
    "f8e4m3fn": ("float8e4nv", "fp8e4nv"),
    "f8e5m2": ("float8e5", "fp8e5"),
    "i64": ("int64", "i64"),
    "i32": ("int32", "i32"),
    "i16": ("int16", "i16"),
    "i8": ("int8", "i8"),
    "u8": ("uint8", "u8"),
    "u16": ("uint16", "u16"),
    "u32": ("uint32", "u32"),
    "u64": ("uint64", "u64"),
    "i1": ("int1", "i1"),
}


def _name(dtype: DType, which: int) -> str:
    if dtype.name not in _NAMES:
        raise IRError(f"element type {dtype} does not exist in Triton")
    return _NAMES[dtype.name][which]


def tl_type(dtype: DType) -> str:
    """`tl.float32` and so on; IRError for complex types. The type of `index` depends on the kernel (see `printer.py`)."""
    return f"tl.{_name(dtype, 0)}"


def pointer(dtype: DType) -> str:
    """The type of a pointer to `dtype` in a signature, `*fp32`."""
    return f"*{_name(dtype, 1)}"
