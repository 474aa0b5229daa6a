"""Random PyTorch programs, differential: eager against the graph, tensor and tile levels (interpreted) and the native code.

`--hypothesis-profile=all` runs four times as many examples, `long` thousands. A failure prints the program as Python source.
"""

from __future__ import annotations

import torch
from aicc.compiler.driver import compile_graph
from aicc.compiler.options import Options
from hypothesis import given
from support.fuzzing import attempt, scaled
from support.random_programs import RandomProgram, random_programs
from support.stages import TARGETS, Program, capture, check_levels, compare, copied

LOOSE = 20_000
"""Roundings allowed: chains of steps amplify errors, while a wrong element is wrong by its own magnitude."""


def captured(p: RandomProgram, *, dynamic: bool = False) -> Program:
    return capture(p.fn, p.inputs, dynamic=dynamic, slack=LOOSE)


@scaled(20)
@given(random_programs())
def test_levels(p: RandomProgram) -> None:
    def check() -> None:
        program = captured(p)
        for target in TARGETS.values():
            check_levels(program, target, levels=["tile"], slack=LOOSE)
    attempt(p, check)


@scaled(7)
@given(random_programs())
def test_levels_with_symbolic_sizes(p: RandomProgram) -> None:
    def check() -> None:
        program = captured(p, dynamic=True)
        for name in ("avx2", "cuda"):
            check_levels(program, TARGETS[name], levels=["tensor", "tile"], slack=LOOSE)
    attempt(p, check)


@scaled(4)
@given(random_programs())
def test_native_code(p: RandomProgram) -> None:
    attempt(p, lambda: native(captured(p)))


@scaled(3)
@given(random_programs())
def test_native_code_with_symbolic_sizes(p: RandomProgram) -> None:
    attempt(p, lambda: native(captured(p, dynamic=True)))


def native(program: Program) -> None:
    """Compiles for this machine, runs twice (the second time nothing is packed anew), compares; inputs stay as they were."""
    compiled = compile_graph(program.module(), Options(cache=False, strict=True)).graph
    assert compiled is not None
    args = [copied(x) for x in program.inputs]
    try:
        for _ in range(2):
            compare([r for r in compiled(*args) if isinstance(r, torch.Tensor)], program, "native", slack=LOOSE)
        assert all(torch.equal(a, x) for a, x in zip(args, program.inputs, strict=True))
    except Exception as e:
        e.add_note(f"in native code; the graph is\n{program.text}")
        raise
