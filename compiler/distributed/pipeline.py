"""Pipelines: every part of the model is a compiled, sharded module; torch.distributed.pipelining runs the schedule.

Rank layout: the mesh is (pp, dp, cp, tp); the ranks of one pp coordinate hold the same parts. Which parts those are, and the order of their
operations, is what `passes/shard/schedules.py` says and the simulator has simulated: torch's runtime runs that list, with sends and
receives that it adds. Schedules that part the gradients of inputs and of weights (zero bubble) run the two halves of a part's compiled
backward pass. All parts are given the model's inputs (tokens and labels are small), activations go from part to
part. A parameter that several parts hold (tied embeddings) has its gradient summed over them after the schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import _Action, _PipelineScheduleRuntime
from torch.distributed.tensor import DTensor

from ...ir.sharding import Mesh
from ...passes.shard.plan import Plan
from ...passes.shard.schedules import SCHEDULES, Schedule, build_schedule, schedule_problem
from ...runtime.dtypes import torch_dtype
from ..errors import UserError
from ..options import Options
from .joint import Exported, make_joint
from .layouts import STAGE, layout_of, stage_mesh
from .module import ShardedModule, shard_model
from .program import build_program
from .stages import StagePart, block_count, cut_stages, even_counts

__all__ = ["Pipeline", "build_pipeline"]

_TORCHS: dict[str, Callable[..., Any]] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B}
"""Those that torch has in the same order, under public names."""
_KINDS = {"F": "F", "BW": "B", "B": "I", "W": "W"}


class _Stage(PipelineStage):
    """torch's stage, which opens connections with both neighbours before the first step: not with itself, where a rank has two parts in a row (gloo
    has no connection from a rank to itself).
    """

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]


class _StageModule(torch.nn.Module):
    """What PipelineStage calls: activations by position, the model's inputs by name."""

    def __init__(self, module: ShardedModule, part: StagePart):
        super().__init__()
        self._inner, self.part = [module], part

    def parameters(self, recurse: bool = True) -> Any:
        return self._inner[0].parameters(recurse)

    def forward(self, *activations: torch.Tensor, **inputs: torch.Tensor) -> Any:
        return self._inner[0].run_flat([*(inputs[f"input_{i}"] for i in self.part.inputs), *activations])


@dataclass
class Pipeline:
    """This rank's parts and the schedule that runs them."""

    modules: list[ShardedModule]
    schedule: Any
    micro_batches: int
    last: bool
    last_rank: int
    group: dist.ProcessGroup
    tied: list[tuple[str, tuple[int, ...], torch.dtype, list[int]]]  # name, local shape, dtype, parts
    steps: Schedule
    stages: list[int]  # of this rank

    def run(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Forward and backward of one global step; gives the mean loss on every rank. inputs: this data rank's rows of each input."""
        for module in self.modules:
            module.folds = True
            for p in module.parameters():
                p.grad = None
        losses: list[torch.Tensor] = []
        named = {f"input_{i}": x for i, x in enumerate(inputs)}
        marks = torch.zeros(self.micro_batches, device=inputs[0].device)
        self.schedule.step(target=marks if self.last else None, losses=losses if self.last else None, return_outputs=False, **named)
        self._share_tied()
        loss = torch.stack([x.detach() for x in losses]).mean() if self.last else torch.zeros((), device=inputs[0].device)
        dist.broadcast(loss, self.last_rank, group=self.group)
        return loss

    def _share_tied(self) -> None:
        for name, shape, dtype, _ in self.tied:
            held = [p for m in self.modules for n, p in m.named_parameters() if n == name]
            if held:
                locals_ = [p.grad.to_local() for p in held if isinstance(p.grad, DTensor)]
                total = torch.stack(locals_).sum(0)
            else:
                total = torch.zeros(shape, dtype=dtype, device="cuda" if dist.get_backend() == "nccl" else "cpu")
            dist.all_reduce(total, group=self.group)
            for p in held:
                if isinstance(p.grad, DTensor):
                    p.grad.to_local().copy_(total)


def build_pipeline(model: torch.nn.Module, exported: Exported, plan: Plan, batch: int, micro_batches: int, device_mesh: DeviceMesh,
                   options: Options, init: Any, overrides: Mapping[str, Any] | None) -> tuple[Pipeline, list[str], Mesh, Mapping[str, str], int]:
    """The parts of this rank, compiled. exported: the forward graph of one micro-batch (of all data ranks together: `batch` rows).

    Gives the pipeline, its collectives in order, the mesh of one stage, its groups, and this rank's place in that mesh.
    """
    problem = schedule_problem(plan.schedule, plan.pp, micro_batches, plan.interleave)
    if problem:
        raise UserError(problem)
    if SCHEDULES[plan.schedule].copies > 1:
        raise UserError(f"the schedule '{plan.schedule}' keeps two copies of the parameters and can be planned but not run; "
                        "dualpipe-v runs the same order on one copy")
    steps = build_schedule(plan.schedule, plan.pp, micro_batches, plan.interleave)
    halves = SCHEDULES[plan.schedule].splits_backward
    parts = cut_stages(exported, plan.split or even_counts(block_count(exported), plan.parts))
    device = device_mesh.device_type
    mesh = stage_mesh(plan)
    sub_mesh = device_mesh[mesh.names]
    groups = {name: sub_mesh.get_group(name).group_name for name in mesh.names}
    place = dist.get_rank() % mesh.ranks
    here = device_mesh.get_local_rank(STAGE)
    group = device_mesh.get_group(STAGE)
    modules, stages, order = [], [], []
    torch_device = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
    for p, part in enumerate(parts):
        if steps.rank_of[p] != here:
            continue
        count = len(part.exported.arguments)
        joint = make_joint(part.exported, differentiable_inputs=range(count - part.received, count), device=device, whole=plan.rings)
        layout = layout_of(joint, plan, mesh, batch=batch, overrides=overrides)
        program = build_program(joint, layout, mesh, place, groups, options, halves=halves)
        skeleton = shard_model(model, joint.arguments, layout.arguments, mesh, layout.order, sub_mesh, init, rank=place, only=True)
        module = ShardedModule(skeleton, program, sub_mesh, place)
        modules.append(module)
        order += [f"part {p} {line}" for line in program.order]
        forward = next(op for op in program.cut.forward.body if op.name == "func")
        taken = _examples([a.type for a in forward.body.args][count - part.received:count], torch_device)
        given = _examples([v.type for v in forward.body.terminator.operands[:joint.outputs]], torch_device)
        stages.append(_Stage(_StageModule(module, part), p, len(parts), torch_device, input_args=taken, output_args=given, group=group,
                                    dw_builder=module.take_deferred if halves else None))
    ranks = dist.get_process_group_ranks(group)
    last = steps.rank_of[len(parts) - 1]
    pipeline = Pipeline(modules, _schedule(steps, stages), micro_batches, last == here, ranks[last], group, _tied(parts, modules), steps,
                        [p for p in range(len(parts)) if steps.rank_of[p] == here])
    return pipeline, order, mesh, groups, place


def _schedule(steps: Schedule, stages: Sequence[Any]) -> Any:
    """What runs the operations of `steps`, for the stages of this rank."""
    def loss(output: Any, mark: Any) -> Any:
        return output
    made = _TORCHS.get(steps.name)
    if made is not None:
        return made(list(stages) if steps.name == "interleaved" else stages[0], steps.micro_batches, loss_fn=loss)
    runtime = _PipelineScheduleRuntime(list(stages), steps.micro_batches, loss_fn=loss)
    runtime._prepare_schedule_with_comms({r: [_Action.from_str(f"{op.stage}{_KINDS[op.kind]}{op.micro_batch}") for op in ops]
                                          for r, ops in enumerate(steps.ops)})
    return runtime


def _examples(types: Sequence[Any], device: torch.device) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty(t.shape, dtype=torch_dtype(t.dtype.name), device=device, requires_grad=t.dtype.is_float) for t in types)


def _tied(parts: Sequence[StagePart], modules: Sequence[ShardedModule]) -> list[tuple[str, tuple[int, ...], torch.dtype, list[int]]]:
    """Parameters that several parts hold, with the local shape of their gradient (asked of whoever holds them)."""
    held: dict[str, list[int]] = {}
    for p, part in enumerate(parts):
        for a in part.exported.arguments:
            if a.kind == "param":
                held.setdefault(a.name, []).append(p)
    shared = {name: where for name, where in held.items() if len(where) > 1}
    mine: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for module in modules:
        func = next(op for op in module.program.cut.backward.body if op.name == "func")
        for i, v in zip(module.program.joint.gradients, func.body.terminator.operands, strict=True):
            a = module.program.joint.arguments[i]
            if a.name in shared:
                mine[a.name] = (tuple(v.type.shape), a.dtype)  # type: ignore[attr-defined]
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, mine)
    shapes = {name: row for rows in said for name, row in rows.items()}
    for rows in said:
        for name, row in rows.items():
            if shapes[name] != row:
                raise UserError(f"the parts that share '{name}' cut it differently; give its placement in placements=")
    return [(name, *shapes[name], where) for name, where in sorted(shared.items())]
