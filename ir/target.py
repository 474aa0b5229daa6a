"""What a target can do, as plain facts: passes choose tiles by them, backends choose instructions."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass

__all__ = ["GENERIC_CPU", "Target"]


@dataclass(frozen=True)
class Target:
    """A CPU or GPU to compile for. Sizes in bytes, `vector_bits` of the widest usable SIMD register."""

    kind: str = "cpu"                     # 'cpu' or 'cuda'
    name: str = "generic"                 # LLVM CPU name, or 'sm_90'
    triple: str = ""                      # LLVM target triple
    features: tuple[str, ...] = ()        # LLVM feature names that are on, sorted
    vector_bits: int = 128
    vector_registers: int = 16
    l1: int = 32 * 1024
    l2: int = 512 * 1024
    l3: int = 4 * 1024 * 1024
    capability: int = 0                   # CUDA compute capability, 90 for 9.0
    multiprocessors: int = 0

    @property
    def is_gpu(self) -> bool:
        return self.kind == "cuda"

    def lanes(self, bits: int) -> int:
        """Elements of `bits` bits in one vector register."""
        return self.vector_bits // bits

    @property
    def multiplies_and_adds(self) -> bool:
        """A multiply-add that is rounded once is an instruction."""
        return self.is_gpu or not {"fma", "avx512f", "neon", "sve"}.isdisjoint(self.features)

    @property
    def digest(self) -> str:
        """Part of cache keys."""
        return hashlib.sha256(repr(sorted(asdict(self).items())).encode()).hexdigest()[:16]


GENERIC_CPU = Target()
