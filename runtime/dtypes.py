"""Names of element types, as manifests have them, to torch's."""

from __future__ import annotations

import torch

from .artifact import ArtifactError

__all__ = ["TORCH_DTYPES", "torch_dtype"]

TORCH_DTYPES: dict[str, torch.dtype] = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16,
    "f8e4m3fn": torch.float8_e4m3fn, "f8e5m2": torch.float8_e5m2,
    "i64": torch.int64, "i32": torch.int32, "i16": torch.int16, "i8": torch.int8,
    "u8": torch.uint8, "u16": torch.uint16, "u32": torch.uint32, "u64": torch.uint64,
    "i1": torch.bool, "c64": torch.complex64, "c128": torch.complex128, "index": torch.int64,
}


def torch_dtype(name: str) -> torch.dtype:
    """ArtifactError if there is no such element type."""
    try:
        return TORCH_DTYPES[name]
    except (KeyError, TypeError):
        raise ArtifactError(f"unknown element type {name!r} in a manifest") from None
