"""The Triton backend under bisect, without a GPU: kernels as text in Triton's interpreter.

    os.environ["TRITON_INTERPRET"] = "1"          # before anything imports triton
    report = bisect_graph(captured, options, target=target, backend=simulated_backend())
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton

from ...backends.triton.compile import default_cache
from ...backends.triton.printer import print_kernel
from ...backends.triton.simulate import SimulatedLibrary, run_kernel
from ...ir import Target
from ...ir.core import Operation
from ...ir.expr import evaluate
from ...runtime.executor import CompiledGraph
from ..errors import UserError
from ..manifest import build_manifest
from .kernels import Launcher
from .memory import poisoned_run
from .search import Backend

__all__ = ["simulated_backend"]


class _TritonLaunch(Launcher):
    """Semantics of `tile.launch` by the printed Triton text."""

    def call(self, kernel: Operation, types: Sequence[Any], flat: Sequence[torch.Tensor], symbols: Mapping[str, int]) -> None:
        source = print_kernel(kernel)
        programs = math.prod(int(evaluate(g, symbols)) for g in kernel["grid"])
        run_kernel(source, programs, flat, [symbols[s] for s in source.symbols], default_cache())


def _program(module: Operation, arguments: Sequence[Any], target: Target) -> tuple[list[Any], list[Any]]:
    return poisoned_run(lambda arenas: CompiledGraph(build_manifest(module), library=SimulatedLibrary(module), arenas=arenas), arguments)


def simulated_backend() -> Backend:
    """UserError unless Triton's interpreter is on."""
    if not triton.knobs.runtime.interpret:
        raise UserError("a CUDA target is bisected in Triton's interpreter: set TRITON_INTERPRET=1")
    return Backend("triton", _TritonLaunch(), _program)
