"""How much memory a rank needs for a step, from its compiled programs: before anything runs.

    peak = step_memory(modules, optimizer, micro_batches_alive)      # bytes

Parameters, gradients and optimizer state lie there all along. A program's own need follows from its steps: the arena, outputs, what externs
and collectives give until it is dropped. Between forward and backward lie the saved values, once per micro-batch that is under way (a
pipeline's schedule says how many). Not counted are a library's own buffers (NCCL's, cuDNN's workspaces) and what an allocator rounds up.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...passes.shard.schedules import Schedule
from ...runtime.dtypes import torch_dtype
from ...runtime.executor import CompiledGraph
from .module import ShardedModule
from .optimizer import ShardedOptimizer
from .program import ShardedProgram, local_size

__all__ = ["StepMemory", "alive_micro_batches", "program_memory", "step_memory"]


@dataclass(frozen=True)
class StepMemory:
    """Bytes. kept: values saved between forward and backward, of all micro-batches under way; running: the most that a program needs beside
    what it is given and what stays.
    """

    parameters: int
    gradients: int
    optimizer: int
    kept: int
    running: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.kept + self.running


def program_memory(graph: CompiledGraph) -> tuple[int, int]:
    """(the most bytes that a call holds beside its arguments, bytes of its results). Constant sizes only."""
    manifest = graph.manifest
    sizes = [_bytes(b) for b in manifest["buffers"]]
    later = {i for step in manifest["steps"] if step[0] == "allocate" for i in step[1]}
    later |= {i for step in manifest["steps"] if step[0] == "extern" for i in step[1]["buffers"]}
    live = peak = int(manifest["arena"]) + sum(n for i, n in enumerate(sizes) if i not in later)
    memory_of: dict[int, int] = {}  # the result of a wait is the memory of its collective's result
    holders: Counter[int] = Counter()
    for kind, value in manifest["steps"]:
        if kind == "drop":
            for i in value:
                memory = memory_of.get(i, i)
                holders[memory] -= 1
                live -= sizes[memory] if holders[memory] <= 0 else 0
        elif kind in ("allocate", "extern"):
            ended = kind == "extern" and value["target"] == "aicc_dist.wait.default"
            for i in value if kind == "allocate" else value["buffers"]:
                if ended:
                    started = value["operands"][0]["index"]
                    memory_of[i] = memory_of.get(started, started)
                holders[memory_of.get(i, i)] += 1
                live += 0 if ended else sizes[i]
        peak = max(peak, live)
    results = sum(sizes[r["buffer"]] for r in manifest["results"] if r["kind"] == "buffer")
    return peak, results


def step_memory(modules: Sequence[ShardedModule], optimizer: ShardedOptimizer | None, alive: Sequence[int]) -> StepMemory:
    """alive: for each module, how many micro-batches are between its forward and backward at most."""
    local = [_local(p) for m in modules for p in m.parameters()]
    kept, running = 0, 0
    gradients = 0
    for module, count in zip(modules, alive, strict=True):
        program = module.program
        assert program.forward is not None
        forward, results = program_memory(program.forward)
        kept += results * count
        parts = [g for g in (program.backward, program.backward_inputs, program.backward_weights) if g is not None]
        backward = max(program_memory(g)[0] for g in parts)
        made = sum(program_memory(g)[1] for g in parts)
        running = max(running, forward - results, backward - (made if count == 1 else 0))
        gradients += _gradients(module.program)
    state = 0 if optimizer is None else optimizer.state_bytes()
    return StepMemory(sum(local), gradients, state, kept, running)


def alive_micro_batches(steps: Schedule, stage: int) -> int:
    """The most micro-batches of a stage whose forward has run and whose backward has not finished."""
    live = peak = 0
    for op in steps.ops[steps.rank_of[stage]]:
        if op.stage == stage:
            live += {"F": 1, "BW": -1, "W": -1}.get(op.kind, 0)
            peak = max(peak, live)
    return peak


def _bytes(row: dict[str, Any]) -> int:
    total = torch_dtype(row["dtype"]).itemsize
    for s in row["shape"]:
        total *= int(s)
    return total


def _gradients(program: ShardedProgram) -> int:
    """Bytes of this rank's pieces of the parameters' gradients."""
    total = 0
    for k in program.which("param"):
        a = program.joint.arguments[program.joint.gradients[k]]
        piece = local_size(a.shape, program.layout.gradients[k], program.mesh, program.layout.order)
        total += math.prod(piece) * a.dtype.itemsize
    return total


def _local(p: Any) -> int:
    local: torch.Tensor = p.to_local() if hasattr(p, "to_local") else p
    return local.numel() * local.element_size()
