"""torch.dtype <-> element types."""

from __future__ import annotations

import torch

from ..ir.types import DTYPES, DType
from .errors import Unsupported

__all__ = ["FROM_TORCH", "TO_TORCH", "from_torch"]

_NAMES = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16,
    "f8e4m3fn": torch.float8_e4m3fn, "f8e5m2": torch.float8_e5m2,
    "i64": torch.int64, "i32": torch.int32, "i16": torch.int16, "i8": torch.int8,
    "u8": torch.uint8, "u16": torch.uint16, "u32": torch.uint32, "u64": torch.uint64,
    "i1": torch.bool, "c64": torch.complex64, "c128": torch.complex128,
}
FROM_TORCH: dict[torch.dtype, DType] = {t: DTYPES[n] for n, t in _NAMES.items()}
TO_TORCH: dict[DType, torch.dtype] = {d: t for t, d in FROM_TORCH.items()}


def from_torch(dtype: torch.dtype) -> DType:
    """The element type of `dtype`; Unsupported when aicc has none (quantised and sub-byte types)."""
    try:
        return FROM_TORCH[dtype]
    except KeyError:
        raise Unsupported(f"element type {dtype}") from None
