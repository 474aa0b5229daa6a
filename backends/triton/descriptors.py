"""Tensor maps: matrices in memory that a kernel reads by whole tiles through Hopper's bulk copy engine (TMA).

A `TensorMap` in `KernelSource.descriptors` is a kernel parameter after buffers, size symbols and `err`, of the type `triton_type`. When the
kernel is launched, the native host function encodes it (`cuTensorMapEncodeTiled`) for the address that the buffer has in this call. Triton
passes each as a block of 128 bytes, followed by the sizes and the strides of its dimensions, which no code of ours reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["TensorMap", "descriptor_row"]

_DATA_TYPES = {"f16": 6, "f32": 7, "bf16": 9}
"""CUtensorMapDataType."""
_TRITON = {"f16": "fp16", "f32": "fp32", "bf16": "bf16"}
ALIGNMENT = 16
"""Addresses and strides must be multiples of this many bytes."""


@dataclass(frozen=True)
class TensorMap:
    """Argument number `buffer` seen as rows x columns elements, rows `stride` elements apart, read by tiles of `block`. What lies outside
    reads as 0. `layout` is Gluon's name for the tile's layout in shared memory ("": Triton chooses)."""

    name: str
    buffer: int
    dtype: str
    rows: int
    columns: int
    stride: int
    block: tuple[int, int]
    layout: str = ""

    @property
    def triton_type(self) -> str:
        inner = f"{_TRITON[self.dtype]}[{self.block[0]}, {self.block[1]}]"
        return f"tensordesc<{inner},{self.layout}>" if self.layout else f"tensordesc<{inner}>"


def descriptor_row(made: TensorMap, meta: Mapping[str, Any]) -> dict[str, Any]:
    """What the host encodes, as JSON data (`native.py` says how); `meta` is what Triton chose: swizzle, bytes of an element, box."""
    size = meta["elem_size"]
    box = list(meta["block_size"])
    return {"buffer": made.buffer, "type": _DATA_TYPES[made.dtype], "sizes": [made.columns, made.rows], "strides": [made.stride * size],
            "box": box[::-1], "swizzle": meta["swizzle"], "numbers": [made.rows, made.columns, made.stride, 1]}
