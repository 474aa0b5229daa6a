"""How many programs of a kernel a multiprocessor holds at once, and what stops it holding more.

Limits are those of the CUDA C++ programming guide (table of technical specifications): 64 Ki registers, given out to warps in units of 256, and at
most as many warps and blocks as below.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Occupancy", "occupancy"]

REGISTERS, UNIT = 65536, 256
WARPS = {80: 64, 86: 48, 87: 48, 89: 48, 90: 64, 100: 64, 103: 64, 120: 48, 121: 48}
BLOCKS = {80: 32, 86: 16, 87: 16, 89: 24, 90: 32, 100: 32, 103: 32, 120: 24, 121: 24}
SHARED = {80: 164, 86: 100, 87: 164, 89: 100, 90: 228, 100: 228, 103: 228, 120: 100, 121: 100}
"""KiB of shared memory of a multiprocessor."""
RESERVED = 1024
"""Bytes of shared memory that the driver takes of each block."""


@dataclass(frozen=True)
class Occupancy:
    """Programs per multiprocessor, the share of its warps that they are, and the limit that is reached first."""

    programs: int
    share: float
    limit: str


def occupancy(capability: int, warps: int, registers: int, shared: int) -> Occupancy:
    """`registers` per thread, `shared` bytes per program. Unknown capabilities count as the newest that is not newer."""
    known = max((c for c in WARPS if c <= capability), default=min(WARPS))
    per_warp = -(-max(1, registers) * 32 // UNIT) * UNIT
    limits = {
        "warps": WARPS[known] // warps,
        "registers": REGISTERS // per_warp // warps,
        "shared memory": SHARED[known] * 1024 // (shared + RESERVED),
        "blocks": BLOCKS[known],
    }
    limit = min(limits, key=lambda name: limits[name])
    return Occupancy(limits[limit], limits[limit] * warps / WARPS[known], limit)
