"""Random PyTorch programs that write into their arguments and buffers, through torch.compile, against eager.

Compared: results, arguments and buffers afterwards, and which of them share memory; twice, for a second call packs nothing anew.
What torch's own capture gets wrong (its backend "aot_eager" differs from eager in the same way: a 0-d float64 argument that is written to
keeps its old value, in torch 2.13) is not held against aicc.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from aicc.compiler.dynamo import backend
from aicc.compiler.options import Options
from hypothesis import given
from support.fuzzing import attempt, scaled
from support.random_effects import EffectProgram, effect_programs, random_effects
from support.stages import Program, compare

SLACK = {torch.float64: 20_000, torch.float32: 20_000, torch.float16: 100, torch.bfloat16: 30}
"""Roundings allowed; see tests/unit/passes/test_random_programs.py."""


def check(p: EffectProgram, dynamic: bool) -> None:
    try:
        check_with(backend(Options(strict=True, cache=False)), p, dynamic)
    except Exception:
        try:
            check_with("aot_eager", p, dynamic)
        except Exception:
            return  # captured wrongly
        raise


def check_with(compiler: Any, p: EffectProgram, dynamic: bool) -> None:
    model, wide = p.module(), p.module(torch.float64)
    values, shared = p.outcome(model, model, p.arguments())
    exact, _ = p.outcome(wide, wide, p.arguments(torch.float64))
    known = Program("", {}, (), {}, tuple(values), tuple(exact))
    torch._dynamo.reset()
    ours = p.module()
    compiled = torch.compile(ours, backend=compiler, dynamic=dynamic)
    for call in ("first", "second"):
        with torch.no_grad():
            for mine, original in zip(ours.buffers(), p.buffers, strict=True):
                mine.copy_(original)
        got, got_shared = p.outcome(compiled, ours, p.arguments())
        compare(got, known, f"{call} call", SLACK[p.dtype])
        assert got_shared == shared, f"{call} call: results {got_shared} share memory, in eager {shared}"


@scaled(3)
@given(effect_programs())
def test_static_sizes(p: EffectProgram) -> None:
    attempt(p, lambda: check(p, False))


@scaled(3)
@given(effect_programs())
def test_symbolic_sizes(p: EffectProgram) -> None:
    attempt(p, lambda: check(p, True))


@pytest.mark.parametrize("seed", range(3))
def test_the_generator_makes_the_same_program_again(seed: int) -> None:
    a, b = random_effects(seed, 9), random_effects(seed, 9)
    assert a.source == b.source and all(torch.equal(x, y) for x, y in zip(a.inputs, b.inputs, strict=True))
