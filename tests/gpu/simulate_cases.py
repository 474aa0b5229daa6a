"""Runs cases in Triton's interpreter: each line of the input names one, each line of the output is {"errors": [...], "launches": n} or
{"failure": text} as JSON after `RESULT `.

A process of its own, as the interpreter must be chosen before triton is imported; names are those of cases, case@n (with the n-th candidate of each
tile) or model:NAME:

    echo softmax | TRITON_INTERPRET=1 python -m aicc.tests.gpu.simulate_cases
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from aicc.backends.triton.simulate import SimulatedLibrary
from aicc.compiler.manifest import build_manifest
from aicc.runtime.executor import CompiledGraph

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu.cases import CASES, capture, clone_all, error, tensors


def simulate_case(function: Any, inputs: Sequence[Any], dynamic: bool = False, backward: bool = False,
                  tile: int | None = None) -> dict[str, Any]:
    errors: list[float] = []
    launches = 0

    def run(module: Any, gm: torch.fx.GraphModule, args: list[Any]) -> list[Any]:
        nonlocal launches
        eager = list(gm.forward(*clone_all(args)))
        library = SimulatedLibrary(module)
        graph = CompiledGraph(build_manifest(module), library=library)
        got = graph(*clone_all(args))
        launches += library.launches
        errors.extend(error(a, b) for a, b in zip(tensors(got), tensors(eager), strict=True))
        if any(a.dtype != b.dtype for a, b in zip(tensors(got), tensors(eager), strict=True)):
            raise TypeError("results of the wrong type")
        return eager

    capture(function, inputs, run, dynamic=dynamic, backward=backward, until="host", tile=tile)
    return {"errors": errors, "launches": launches}


def simulate(name: str) -> dict[str, Any]:
    try:
        if name.startswith("model:"):
            from aicc.tests.models.zoo import MODELS

            return simulate_case(*MODELS[name.removeprefix("model:")].build())
        case, _, tile = CASES[name.partition("@")[0]], *name.partition("@")[1:]
        return simulate_case(*case.build(), case.dynamic, case.backward, int(tile) if tile else None)
    except Exception:
        return {"failure": traceback.format_exc()}


def main() -> None:
    for line in sys.stdin:
        print("RESULT " + json.dumps(simulate(line.strip())), flush=True)


if __name__ == "__main__":
    main()
