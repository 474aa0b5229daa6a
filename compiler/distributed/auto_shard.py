"""`aicc.auto_shard`: a plan for a model on a mesh, and the model on that plan.

    plan = aicc.auto_shard(model, {"input_ids": ids, "labels": ids}, mesh=aicc.Mesh.parse("2"), optimizer=torch.optim.AdamW)
    sharded = plan.compile(model)                 # under torchrun; parameters are sharded DTensors
    for batch in data:
        loss = sharded.step(**batch)              # forward, backward, optimizer

`auto_shard` needs no process group and no weights: the model may be on meta. It searches (passes/shard) unless it is given a plan: a
`Plan`, or the path of a plan file. `plan.validate(model, inputs)` runs the sharded program on virtual ranks and compares it with the
whole one; see `validation.py`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils import _pytree as pytree

from ...ir.sharding import Mesh, Placement
from ...passes import shard as planner
from ...passes.shard import Plan
from ...passes.spmd.traffic import traffic
from ..errors import UserError
from ..options import Options
from .joint import Exported, Joint, export_model, flatten_inputs, make_joint
from .layouts import DATA, STAGE, check_supported, layout_of, mesh_of, read_plan
from .memory import StepMemory, alive_micro_batches, step_memory
from .module import ShardedModule, portable, shard_model, take_back
from .optimizer import OptimizerRule, ShardedOptimizer, rule_of
from .pipeline import Pipeline, build_pipeline
from .program import Layout, ShardedProgram, build_program
from .ranks import agree, check_world

__all__ = ["ShardedTraining", "ShardingPlan", "auto_shard"]


@dataclass(frozen=True)
class ShardingPlan:
    """A plan for one model and one batch size. `plan`: degrees and choices (editable, `to_toml`); `mesh`: the named axes it makes."""

    plan: Plan
    mesh: Mesh
    exported: Exported
    batch: int | None  # rows of one micro-batch, of all data ranks together
    micro_batches: int
    rule: OptimizerRule | None
    structure: str
    device: str = "cpu"
    overrides: Mapping[str, Mapping[str, Placement]] | None = None

    def to_toml(self) -> str:
        """The plan's file; `auto_shard(..., plan=path)` reads it back."""
        return self.plan.to_toml()

    def joint(self) -> Joint:
        """Forward and backward in one graph."""
        return make_joint(self.exported, device=self.device, whole=self.plan.rings)

    def layout(self, joint: Joint) -> Layout:
        """Where every argument, gradient and output of the joint graph lies."""
        return layout_of(joint, self.plan, self.mesh, batch=self.batch, overrides=self.overrides)

    def program(self, rank: int = 0) -> ShardedProgram:
        """What `rank` would run, not compiled: for looking at its IR and its collectives."""
        joint = self.joint()
        return build_program(joint, self.layout(joint), self.mesh, rank, {}, Options.from_user(), compiled=False)

    def compile(self, model: torch.nn.Module, options: Mapping[str, Any] | None = None, *,
                init: Callable[[str, torch.Tensor], None] | None = None) -> ShardedTraining:
        """Shards the model and compiles this rank's program. Needs an initialised process group of as many ranks as the plan.

        `init(name, local tensor)` fills parameters and buffers of a model on meta. UserError, the same on every rank, when the plan
        does not fit the world or the model.
        """
        check_world(self.mesh, self.plan)
        if _structure(model) != self.structure:
            raise UserError("this plan was made for another model: the names or shapes of its parameters differ")
        agree("the plan and the model", f"{self.plan.label} {self.structure}")
        if (self.device == "cuda") != (dist.get_backend() == "nccl"):
            raise UserError(f"the plan was made for {self.device}, the process group is {dist.get_backend()}: give auto_shard device=, or "
                            f"initialise the process group with {'nccl' if self.device == 'cuda' else 'gloo'}")
        device_mesh = init_device_mesh(self.device, self.mesh.shape, mesh_dim_names=self.mesh.names)
        settings = Options.from_user(None, options)
        pipeline = None
        if self.plan.pp > 1:
            pipeline, order, mesh, groups, rank = build_pipeline(model, self.exported, self.plan, self.batch or 1, self.micro_batches,
                                                                 device_mesh, settings, init, self.overrides)
            modules = pipeline.modules
        else:
            joint, mesh, rank = self.joint(), self.mesh, dist.get_rank()
            groups = {name: device_mesh.get_group(name).group_name for name in mesh.names}
            layout = self.layout(joint)
            program = build_program(joint, layout, mesh, rank, groups, settings)
            skeleton = shard_model(model, joint.arguments, layout.arguments, mesh, layout.order, device_mesh, init)
            modules, order = [ShardedModule(skeleton, program, device_mesh)], program.order
        optimizer = None if self.rule is None else ShardedOptimizer(modules, self.rule, self.plan, settings, groups, rank)
        lines = [*order, *(optimizer.order if optimizer is not None else ())]
        stage = device_mesh.get_local_rank(STAGE)
        agree("the order of collectives", hashlib.sha256("\n".join(lines).encode()).hexdigest(), among=str(stage))
        place = mesh.coordinates(rank)
        return ShardedTraining(modules, optimizer, pipeline, self.micro_batches, (place[DATA], self.plan.dp), self.batch, lines)


@dataclass
class ShardedTraining:
    """A compiled, sharded model and its optimizer. collectives: what this rank runs, in order (per micro-batch; then the update)."""

    modules: list[ShardedModule]
    optimizer: ShardedOptimizer | None
    pipeline: Pipeline | None
    micro_batches: int
    data: tuple[int, int]
    batch: int | None
    collectives: list[str]

    @property
    def module(self) -> ShardedModule:
        """This rank's (first) part of the model."""
        return self.modules[0]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The loss of one micro-batch, with a graph for `backward()`. UserError under pipeline parallelism: use `step`."""
        if self.pipeline is not None:
            raise UserError("a pipeline has no forward pass of its own: call step()")
        return self.module(*args, **kwargs)

    def step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One training step on a global batch (of which this rank takes its rows): loss, gradients, update.

        Gives the loss, of the parameters before the update: the mean over the micro-batches.
        """
        if self.optimizer is None:
            raise UserError("auto_shard was given no optimizer: pass optimizer=torch.optim.AdamW or the like")
        loss = self.loss_and_gradients(*args, **kwargs)
        self.optimizer.step()
        return loss

    def loss_and_gradients(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`step` without the update: gradients are in the parameters' `.grad`, as DTensors."""
        leaves, _, positions = flatten_inputs(args, kwargs)
        device = self.module.device_mesh.device_type
        rows = [self._rows(leaves[i]).to(device) for i in positions]
        if self.pipeline is not None:
            return self.pipeline.run(rows)
        for p in self.module.parameters():
            p.grad = None
        total = None
        self.module.folds = True
        try:
            for k in range(self.micro_batches):
                mine = [self._micro(x, k) for x in rows]
                loss = self.module.run_flat(mine)
                (loss / self.micro_batches).backward()
                total = loss.detach() if total is None else total + loss.detach()
        finally:
            self.module.folds = False
        assert total is not None
        return total / self.micro_batches

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        """This data rank's rows of an input of the global batch; other inputs, and inputs that are this rank's rows already, as they are."""
        index, ranks = self.data
        whole = None if self.batch is None else self.batch * self.micro_batches
        if whole is None or x.dim() == 0 or x.shape[0] != whole or ranks == 1:
            return x
        return x.chunk(ranks)[index].contiguous()

    def _micro(self, x: torch.Tensor, k: int) -> torch.Tensor:
        rows = None if self.batch is None else self.batch // self.data[1]
        if rows is None or x.dim() == 0 or self.micro_batches == 1 or x.shape[0] != rows * self.micro_batches:
            return x
        return x[k * rows:(k + 1) * rows]

    def memory(self) -> StepMemory:
        """Bytes that this rank needs at the most, as its programs say."""
        if self.pipeline is None:
            return step_memory(self.modules, self.optimizer, [1])
        return step_memory(self.modules, self.optimizer, [alive_micro_batches(self.pipeline.steps, s) for s in self.pipeline.stages])

    def traffic(self) -> Counter[tuple[str, str]]:
        """Bytes that one `step` hands to collectives on this rank, by (kind, mesh axis), as the IR says. Activations that a pipeline sends
        are not collectives.
        """
        total: Counter[tuple[str, str]] = Counter()
        for module in self.modules:
            for part in module.program.parts:
                total.update({k: n * self.micro_batches for k, n in traffic(part).items()})
        for module_of_update in self.optimizer.updates() if self.optimizer is not None else ():
            total.update(traffic(module_of_update))
        return total

    def state_dict(self) -> dict[str, Any]:
        """Model and optimizer state of this rank as DTensors, for torch.distributed.checkpoint: give it to `save`, or to `load` and the result
        to `load_state_dict`. Tensors that are cut part by part (fused projections) come gathered.
        """
        return {kind: {k: portable(v) for k, v in state.items()} for kind, state in self._state().items()}

    def load_state_dict(self, given: Mapping[str, Any]) -> None:
        """Takes over what was loaded into the result of `state_dict`, under this or another plan."""
        mine = self._state()
        for kind, state in mine.items():
            for name, x in state.items():
                take_back(x, given[kind][name])
        if self.optimizer is not None:
            self.optimizer.take_state(mine["optimizer"])
            self.optimizer.steps = int(given["optimizer"]["steps"])

    def _state(self) -> dict[str, dict[str, Any]]:
        model = {k: v for module in self.modules for k, v in module.state_dict().items()}
        return {"model": model, **({} if self.optimizer is None else {"optimizer": self.optimizer.state_dict()})}


def auto_shard(model: torch.nn.Module, inputs: Mapping[str, Any] | Sequence[Any], *, mesh: planner.Mesh | str | int,
               loss_fn: Callable[..., torch.Tensor] | None = None, targets: Sequence[torch.Tensor] = (), optimizer: Any = None,
               plan: Plan | str | Path | None = None, hardware: str = "cpu-box",
               placements: Mapping[str, Mapping[str, Placement]] | None = None, device: str | None = None) -> ShardingPlan:
    """Finds (or takes) a plan for training `model` on `mesh`.

    inputs: example inputs of the model, of the size of the global batch (positional as a tuple, by name as a mapping); only shapes count.
    loss_fn(output, *targets) gives the loss; without it the model's output has one (`.loss`). optimizer: a torch optimizer, its class, or
    a function from parameters to one. plan: a `Plan` or the path of a plan file; None searches with the cost model of `hardware`.
    placements: parameter name -> {axis: placement}, instead of what the plan gives. device: 'cpu' or 'cuda', where the ranks compute
    (default: what the process group's backend says; before there is one, 'cuda' where there is a GPU).

    UserError for what does not fit, naming both numbers.
    """
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
    wanted = mesh if isinstance(mesh, planner.Mesh) else planner.Mesh.parse(str(mesh))
    leaves, _, positions = flatten_inputs(args, kwargs)
    first = next((leaves[i] for i in positions if leaves[i].dim()), None)
    batch = None if first is None else int(first.shape[0])
    chosen = read_plan(plan) if plan is not None else _search(model, wanted, hardware, first, batch)
    if chosen.devices != wanted.size:
        raise UserError(f"the plan {chosen.label} takes {chosen.devices} devices (dp * tp * cp * pp), the mesh {wanted} has {wanted.size}")
    check_supported(chosen)
    rows = chosen.dp * chosen.micro_batch
    if batch is not None and batch % rows:
        raise UserError(f"a batch of {batch} is no multiple of dp {chosen.dp} * micro_batch {chosen.micro_batch}")
    micro_batches = 1 if batch is None else batch // rows

    def micro(x: Any) -> Any:
        return x[:rows] if isinstance(x, torch.Tensor) and x.dim() and x.shape[0] == batch else x
    args, kwargs = pytree.tree_map(micro, (args, kwargs))
    where = device or ("cuda" if (dist.get_backend() == "nccl" if dist.is_initialized() else torch.cuda.is_available()) else "cpu")
    exported = export_model(model, args, kwargs, loss=loss_fn, targets=[micro(t) for t in targets], device=where,
                            expert_parallel=chosen.ep > 1)
    rule = None if optimizer is None else rule_of(optimizer)
    return ShardingPlan(chosen, mesh_of(chosen), exported, None if batch is None else rows, micro_batches, rule, _structure(model), where, placements)


def _search(model: torch.nn.Module, mesh: planner.Mesh, hardware: str, first: torch.Tensor | None, batch: int | None) -> Plan:
    """The planner's choice for a transformers model; pure data parallelism for others."""
    config = getattr(model, "config", None)
    if config is None or batch is None or first is None or first.dim() < 2:
        return Plan(dp=mesh.size)
    try:
        sizes = planner.from_transformers(config, seq=int(first.shape[1]))
    except ValueError:
        return Plan(dp=mesh.size)
    cluster = planner.load_cluster(hardware, mesh=mesh)
    space = planner.Space().pin(cp=1, pp=1, ep=1) if hasattr(planner.Space, "pin") else planner.Space()
    found = planner.search(planner.Problem(sizes, cluster, global_batch=batch, space=space)).plan
    return replace(found, offload=False)


def _structure(model: torch.nn.Module) -> str:
    """Names, shapes and dtypes of the parameters, as a short hash."""
    text = "\n".join(f"{n} {tuple(p.shape)} {p.dtype}" for n, p in model.named_parameters())
    return hashlib.sha256(text.encode()).hexdigest()[:16]
