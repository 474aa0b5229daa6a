"""Validation of a plan in one process: `validate_plan(plan, model)` and `planted_faults(plan, model)`.

The training step (loss, gradients, updated parameters) of the plan runs on virtual ranks in float64 and is compared with the whole
model's. Nothing is compiled, no process group is needed, and any number of ranks will do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...ir.sharding import Mesh, Placement
from ...passes.spmd import Partitioned, Policy, disassemble, partition
from ...passes.spmd.faults import plant
from ...passes.spmd.validate import Difference, Report, validate
from .auto_shard import ShardingPlan
from .joint import Joint, model_tensors
from .layouts import DATA, TENSOR, state_placement
from .optimizer import update_module
from .program import Layout, partition_joint

__all__ = ["FaultReport", "PlanReport", "planted_faults", "validate_plan"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class PlanReport:
    """step: forward and backward; updates: the optimizer, per parameter."""

    step: Report
    updates: tuple[Report, ...]

    @property
    def ok(self) -> bool:
        return self.step.ok and all(u.ok for u in self.updates)

    @property
    def first(self) -> Difference | None:
        return next((r.first for r in (self.step, *self.updates) if r.first is not None), None)

    def __str__(self) -> str:
        compared = self.step.compared + sum(u.compared for u in self.updates)
        worst = max([self.step.worst, *(u.worst for u in self.updates)])
        if self.ok:
            return f"the sharded step equals the whole one: {compared} values compared in float64, largest relative difference {worst:.1e}"
        return f"the sharded step differs first at\n{self.first}"


@dataclass(frozen=True)
class _Subject:
    joint: Joint
    layout: Layout
    mesh: Mesh
    partitioned: Partitioned
    inputs: list[Tensor]
    placements: list[Any]
    results: list[Any]


def _subject(plan: ShardingPlan, model: torch.nn.Module, inputs: Sequence[Tensor], seed: int) -> _Subject:
    joint = plan.joint()
    layout = plan.layout(joint)
    tensors = model_tensors(model)
    generator = torch.Generator().manual_seed(seed)
    values: list[Tensor] = []
    given = iter(inputs)
    for a in joint.arguments:
        if a.kind == "input":
            values.append(next(given))
        else:
            values.append(joint.constants[a.name] if a.kind == "constant" else tensors[a.name].detach())
        if values[-1].is_meta:
            values[-1] = torch.randn(a.shape, generator=generator, dtype=torch.float64) * 0.05
    func = next(op for op in joint.module.body if op.name == "func")
    tangents = [torch.ones(tuple(func.body.args[len(joint.arguments) + k].type.shape), dtype=torch.float64)  # type: ignore[attr-defined]
                for k in range(len(joint.tangents))]
    outputs: list[Any] = [{} if o is None else o for o in layout.outputs]
    return _Subject(joint, layout, plan.mesh, partition_joint(joint, layout, plan.mesh), [*values, *tangents],
                    [*layout.arguments, *(outputs[i] for i in joint.tangents)], [*outputs, *layout.gradients])


def _check(s: _Subject, partitioned: Partitioned, pieces: Any = None) -> Report:
    return validate(s.joint.module, partitioned, s.mesh, s.layout.order, s.placements, s.inputs, pieces=pieces, results=s.results)


def validate_plan(plan: ShardingPlan, model: torch.nn.Module, inputs: Sequence[Tensor], *, seed: int = 0) -> PlanReport:
    """See the module docstring. inputs: the model's tensor inputs, whole, in order (targets of the loss last)."""
    subject = _subject(plan, model, inputs, seed)
    step = _check(subject, subject.partitioned)
    return PlanReport(step, tuple(_updates(plan, subject, seed)) if step.ok and plan.rule is not None else ())


def _updates(plan: ShardingPlan, s: _Subject, seed: int) -> Iterator[Report]:
    """One report per different update program."""
    assert plan.rule is not None
    generator = torch.Generator().manual_seed(seed)
    seen = set()
    for i, gradient in zip(s.joint.gradients, s.layout.gradients, strict=True):
        a, placement = s.joint.arguments[i], s.layout.arguments[i]
        state = state_placement(a, placement, plan.plan)
        key = (a.shape, a.dtype, str(placement), str(gradient), str(state))
        if a.kind != "param" or key in seen:
            continue
        seen.add(key)
        module, count = update_module(plan.rule, a.shape, a.dtype, "cpu")
        arguments: list[dict[str, Placement]] = [dict(placement), dict(gradient), *(state for _ in plan.rule.states), *({} for _ in range(count))]
        done = partition(module, s.mesh, (Policy(TENSOR), Policy(DATA)), arguments, [])
        values = [torch.randn(a.shape, generator=generator, dtype=torch.float64) for _ in range(2)]
        values += [torch.rand(a.shape, generator=generator, dtype=torch.float64) for _ in plan.rule.states]
        values += [torch.tensor(v, dtype=torch.float64) for v in plan.rule.numbers(3, plan.rule.lr)]
        yield validate(module, done, s.mesh, (TENSOR, DATA), arguments, values)


@dataclass(frozen=True)
class FaultReport:
    """planted and caught, by kind of fault; missed: what was done where, and not noticed."""

    planted: Counter[str]
    caught: Counter[str]
    missed: tuple[str, ...]

    def __str__(self) -> str:
        rows = [f"{kind}: {self.caught[kind]} of {n} caught" for kind, n in self.planted.items()]
        total, found = sum(self.planted.values()), sum(self.caught.values())
        return "\n".join([*rows, f"all: {found} of {total} caught ({100 * found / max(1, total):.0f} %)", *(f"missed: {m}" for m in self.missed)])


def planted_faults(plan: ShardingPlan, model: torch.nn.Module, inputs: Sequence[Tensor], *, seed: int = 0, results_only: bool = True) -> FaultReport:
    """Plants one fault at a time and validates each wrong program. With `results_only`, a fault counts as caught by the loss and the
    gradients alone, as if the values in between could not be seen.
    """
    s = _subject(plan, model, inputs, seed)
    planted: Counter[str] = Counter()
    caught: Counter[str] = Counter()
    missed = []
    for fault in plant(s.partitioned):
        subject = replace(fault.partitioned, origin={}) if results_only else fault.partitioned
        planted[fault.kind] += 1
        if _check(s, subject).ok:
            missed.append(f"{fault.kind}: {fault.where}")
        else:
            caught[fault.kind] += 1
    for name, pieces in _shifted(s):
        kind = "micro-batch off by one"
        planted[kind] += 1
        if _check(s, replace(s.partitioned, origin={}) if results_only else s.partitioned, pieces).ok:
            missed.append(f"{kind}: {name}")
        else:
            caught[kind] += 1
    return FaultReport(planted, caught, tuple(missed))


def _shifted(s: _Subject) -> Iterator[tuple[str, list[list[Tensor]]]]:
    """Each cut input in turn: every rank takes its neighbour's part of it, and the right part of all others."""
    right = [disassemble(x, s.mesh, dict(p), s.layout.order) for x, p in zip(s.inputs, s.placements, strict=True)]
    for i, a in enumerate(s.joint.arguments):
        axis = next((k for k, p in s.placements[i].items() if p.kind == "shard"), None)
        if a.kind != "input" or axis is None:
            continue
        moved = []
        for rank in range(s.mesh.ranks):
            at = s.mesh.coordinates(rank)
            at[axis] = (at[axis] + 1) % s.mesh.size(axis)
            moved.append(right[i][s.mesh.rank(at)])
        yield a.name, [*right[:i], moved, *right[i + 1:]]
