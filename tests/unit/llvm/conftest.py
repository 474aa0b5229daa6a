"""Targets that the tests compile for: what the host has, and smaller instruction sets that it also runs."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest
from aicc.backends.llvm import host_target
from aicc.ir.target import Target

sys.path.insert(0, str(Path(__file__).parent))

FEATURE_SETS = {
    "host": None,
    "avx2": ("avx", "avx2", "bmi", "bmi2", "cmov", "cx8", "f16c", "fma", "fxsr", "lzcnt", "mmx", "popcnt", "sse", "sse2",
             "sse3", "sse4.1",
             "sse4.2", "ssse3"),
    "baseline": ("cmov", "cx8", "fxsr", "mmx", "sse", "sse2"),
}


@pytest.fixture(params=sorted(FEATURE_SETS))
def target(request: pytest.FixtureRequest) -> Target:
    features = FEATURE_SETS[request.param]
    if features is None:
        return host_target()
    if platform.machine() != "x86_64":
        pytest.skip("x86 feature sets")
    if not set(features) <= set(host_target().features):
        pytest.skip(f"the host does not have {request.param}")
    return host_target(features)
