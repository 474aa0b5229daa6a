"""Random modules at the tensor level through passes in random order, down to kernels and native code; every step by the reference interpreter.

All values are exact (see `support/random_ir.py`), so that each step must give the same numbers.
"""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from aicc.backends.llvm import host_target
from aicc.compiler.bisect.checks import KernelCheck, ProgramCheck
from aicc.compiler.bisect.evaluate import run_module
from aicc.ir import Operation, equivalent
from aicc.ir.parser import parse_module
from aicc.ir.passes import PassContext, parse_pipeline, run_pipeline
from aicc.ir.printer import print_with_resources
from aicc.ir.verifier import verify
from hypothesis import given
from hypothesis import strategies as st
from support.fuzzing import attempt, scaled
from support.random_ir import random_tensor_module
from support.stages import TARGETS

TENSOR_PASSES = ("absorb-views", "canonicalize", "cse", "dce", "inline", "sink-reshapes", "layout", "pack", "fold-constants")
HOST = "schedule,bufferize,plan-memory"


def check_same(want: list[torch.Tensor], module: Operation, arguments: list[Any], what: str) -> None:
    got = run_module(module, arguments, check=True)
    assert len(got) == len(want)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.dtype == w.dtype and torch.equal(g, w), f"after {what}, result {i}:\n{g}\n{w}\n{module}"


def walk(seed: int, ops: int, dynamic: bool, *, native: bool) -> None:
    module, arguments = random_tensor_module(seed, ops, dynamic=dynamic)
    shapes = [list(a.shape) if isinstance(a, torch.Tensor) else a for a in arguments]
    attempt(f"seed {seed}, {ops} ops, dynamic {dynamic}, native {native}, arguments {shapes}\n{module}", lambda: check_passes(module, arguments, seed, native))


def check_passes(module: Operation, arguments: list[Any], seed: int, native: bool) -> None:
    rng = Random(seed)
    verify(module)
    want = run_module(module, arguments)
    target = host_target() if native else TARGETS[rng.choice(sorted(TARGETS))]
    ctx = PassContext(target)
    names = [rng.choice(TENSOR_PASSES) for _ in range(rng.randint(0, 6))]
    # fuse and tile take programs without dead ops and reductions of size 1
    for name in (*names, "canonicalize", "dce", rng.choice(["fuse", "fuse{max-members=1}"]), "tile", *rng.choice([[], ["cse", "dce"]])):
        before = str(module)
        try:
            run_pipeline(module, parse_pipeline(name), ctx)
            check_same(want, module, arguments, name)
        except Exception as e:
            e.add_note(f"in {name} for {target.name}, after {names}; before it:\n{before}")
            raise
    text, resources = print_with_resources(module)
    assert equivalent(parse_module(text, resources=resources), module)
    if native:
        for check in (KernelCheck(target), ProgramCheck(parse_pipeline(HOST), target)):
            verdict = check(module, arguments)
            assert verdict is None, f"{verdict}\n{module}"


@scaled(15)
@given(st.integers(0, 1 << 40), st.integers(1, 8), st.booleans())
def test_passes_in_random_order(seed: int, ops: int, dynamic: bool) -> None:
    walk(seed, ops, dynamic, native=False)


@scaled(4)
@given(st.integers(0, 1 << 40), st.integers(1, 6), st.booleans())
def test_native_code(seed: int, ops: int, dynamic: bool) -> None:
    walk(seed, ops, dynamic, native=True)
