"""CPU targets: finding out what the host can do, and LLVM target machines."""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from llvmlite import binding

from ...ir.target import Target

__all__ = ["host_features", "host_target", "make_target", "new_target_machine", "target_machine"]

_VECTOR_BITS = (("avx512f", 512, 32), ("avx2", 256, 16), ("sve", 128, 32), ("neon", 128, 32))
"""Feature -> (widest register in bits, number of registers); the first that is present counts."""


def host_target(features: Iterable[str] | None = None) -> Target:
    """The machine that this process runs on. `features` replaces the detected LLVM feature names."""
    found = features if features is not None else [n for n, on in binding.get_host_cpu_features().items() if on]
    if not _matrix_unit_allowed():
        found = [f for f in found if not f.startswith("amx")]
    name = binding.get_host_cpu_name() if features is None else _generic_name(binding.get_process_triple())
    return make_target(binding.get_process_triple(), name, found, _host_caches())


def host_features() -> frozenset[str]:
    """Every feature name that LLVM knows for this kind of processor, present or not."""
    return frozenset(binding.get_host_cpu_features())


def make_target(triple: str, name: str = "", features: Iterable[str] = (),
                caches: tuple[int, int, int] | None = None) -> Target:
    """A CPU by LLVM triple, CPU name and feature names; for cross compilation."""
    on = tuple(sorted(set(features)))
    bits, registers = next(((b, n) for f, b, n in _VECTOR_BITS if f in on), (128, 32 if triple.startswith("aarch64") else 16))
    l1, l2, l3 = caches or (32 << 10, 1 << 20, 16 << 20)
    return Target(kind="cpu", name=name or _generic_name(triple), triple=triple, features=on, vector_bits=bits,
                  vector_registers=registers, l1=l1, l2=l2, l3=l3)


@lru_cache
def _matrix_unit_allowed() -> bool:
    """Asks the system for AMX's registers, which a Linux process has to before it uses them (arch_prctl ARCH_REQ_XCOMP_PERM, XTILEDATA)."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return False
    return ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0


def _generic_name(triple: str) -> str:
    return "x86-64" if triple.startswith("x86_64") else "generic"


def _host_caches() -> tuple[int, int, int] | None:
    """Data cache sizes of the first core, in bytes; None where the system does not tell."""
    sizes: dict[int, int] = {}
    for entry in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind, level, size = ((entry / n).read_text().strip() for n in ("type", "level", "size"))
        except OSError:
            continue
        match = re.fullmatch(r"(\d+)([KMG]?)", size)
        if kind != "Instruction" and match:
            sizes[int(level)] = int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]
    if not {1, 2} <= sizes.keys():
        return None
    return sizes[1], sizes[2], sizes.get(3, sizes[2])


@lru_cache
def _initialize() -> None:
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    binding.initialize_native_asmparser()


@lru_cache(maxsize=8)
def target_machine(target: Target, opt: int = 3) -> binding.TargetMachine:
    """An LLVM target machine that emits position-independent code for `target`. One thread at a time may use it."""
    return new_target_machine(target, opt)


def new_target_machine(target: Target, opt: int = 3) -> binding.TargetMachine:
    """`target_machine` that nobody else has."""
    _initialize()
    on = set(target.features)
    named = target.name == binding.get_host_cpu_name()
    off = [f for f in binding.get_host_cpu_features() if f not in on] if named else []  # which the CPU's name would imply
    features = ",".join([f"+{f}" for f in target.features] + [f"-{f}" for f in off])
    found = binding.Target.from_triple(target.triple or binding.get_process_triple())
    name = "" if target.name == "generic" else target.name
    return found.create_target_machine(cpu=name, features=features, opt=opt, reloc="pic", codemodel="default")
