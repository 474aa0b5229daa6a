"""What kernels in Gluon share whose warps but a loader's are one group: the head of their text, and ops on tiles that the group has whole."""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.core import Operation
from .group_ops import GroupOps

__all__ = ["GRID_CONTROL", "HEADER", "OneGroup"]

HEADER = """import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name in Triton 3.9, and before
"""
GRID_CONTROL = '"griddepcontrol.{}; mov.b32 $0, $1;", "=r,r,~{{memory}}", [0], dtype=gl.int32, is_pure=False, pack=1'
"""The operands of an inline assembly that waits for the kernel in front, or lets the next one begin."""


class OneGroup(GroupOps):
    """Prints single ops of a kernel. `divisible`: of each buffer, whether its address is a multiple of 16 in every launch."""

    program = "gl.program_id(0)"

    def __init__(self, kernel: Operation, divisible: Sequence[bool]):
        super().__init__(kernel)
        self.divisible = divisible

    def _local(self, shape: Sequence[int]) -> tuple[int, ...]:
        """One group of warps has all rows."""
        return tuple(shape)
