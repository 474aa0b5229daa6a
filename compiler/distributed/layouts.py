"""From a plan to placements: which axis cuts what.

The mesh of a plan is (pp, dp, cp, tp), outermost first; without context parallelism it has no `cp`. Parameters lie on `tp` as the graph
suggests (`passes/spmd/seeds.py`), inputs are cut along their first dimension over `dp` and along the second, the sequence, over `cp`
(for attention, heads are exchanged for the sequence and back, DeepSpeed-Ulysses, Jacobs et al. 2023; or keys and values go round, ring
attention, Liu et al. 2023: the plan's `context`). The ZeRO stage says what else `dp`
cuts: 1 the optimizer's state, 2 gradients too, 3 parameters too. Expert parallelism cuts stacked expert weights over `dp`: tokens then
travel, not weights. ZeRO cuts the first dimension that comes out even and that `tp` leaves alone; a tensor without one is replicated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...ir.sharding import Mesh, Placement, shard
from ...passes.shard.plan import Plan, load_plan
from ...passes.shard.tables import ConfigError
from ...passes.spmd import Policy, tensor_seeds
from ..errors import UserError
from .joint import Argument, Joint
from .program import Layout

__all__ = ["CONTEXT", "DATA", "STAGE", "TENSOR", "check_supported", "layout_of", "mesh_of", "read_plan", "stage_mesh", "state_placement",
           "zero_placement"]

STAGE, DATA, CONTEXT, TENSOR = "pp", "dp", "cp", "tp"


def mesh_of(plan: Plan) -> Mesh:
    """The mesh that the plan's degrees make."""
    return Mesh(((STAGE, plan.pp), *stage_mesh(plan).axes))


def stage_mesh(plan: Plan) -> Mesh:
    """The mesh of the ranks that hold the same part of the model."""
    return Mesh(((DATA, plan.dp), *([(CONTEXT, plan.cp)] if plan.cp > 1 else []), (TENSOR, plan.tp)))


def check_supported(plan: Plan) -> None:
    """UserError for what plans can say and no rank can run yet."""
    if plan.ep > 1 and plan.ep != plan.dp:
        raise UserError(f"expert groups run over the data ranks: ep must be 1 or dp = {plan.dp}, the plan has ep = {plan.ep}")


def read_plan(plan: Plan | str | Path) -> Plan:
    """A plan, or the plan of a file. UserError for what cannot be read, with file, line and key."""
    if isinstance(plan, Plan):
        return plan
    try:
        return load_plan(plan)
    except ConfigError as e:
        raise UserError(str(e)) from e


def zero_placement(shape: Sequence[int], ranks: int, tensor: Placement | None) -> Placement | None:
    """How ZeRO cuts a tensor of (whole) `shape` over `ranks` ranks; None if no dimension comes out even."""
    if ranks == 1:
        return None
    return next((shard(d) for d, size in enumerate(shape) if size % ranks == 0 and size > 0
                 and not (tensor is not None and tensor.kind == "shard" and tensor.dim == d)), None)


def state_placement(argument: Argument, placement: Mapping[str, Placement], plan: Plan) -> dict[str, Placement]:
    """Where a parameter's optimizer state lies (for ZeRO 2 and up its gradient too)."""
    if plan.zero == 0 or DATA in placement:
        return dict(placement)
    cut = zero_placement(argument.shape, plan.dp, placement.get(TENSOR))
    return dict(placement) if cut is None else {**placement, DATA: cut}


def _has_sequence(a: Argument, plan: Plan) -> bool:
    return plan.cp > 1 and len(a.shape) > 1 and a.shape[1] % plan.cp == 0


def _is_expert(a: Argument, ranks: int) -> bool:
    """Stacked expert weights: [experts, out, in]."""
    return len(a.shape) == 3 and a.shape[0] % ranks == 0


def layout_of(joint: Joint, plan: Plan, mesh: Mesh, *, batch: int | None,
              overrides: Mapping[str, Mapping[str, Placement]] | None = None) -> Layout:
    """The placements of a joint module under `plan`. batch: the size of the inputs' first dimension that `dp` cuts (None: inputs whole).

    overrides: placements given by the user, by parameter name. UserError if the batch does not come out even.
    """
    if batch is not None and batch % plan.dp:
        raise UserError(f"a batch of {batch} does not come out even over dp = {plan.dp} ranks")
    seeds = tensor_seeds(joint.module, plan.tp, joint.outputs) if plan.tp > 1 else {}
    placements: list[dict[str, Placement]] = []
    pinned: set[int] = set()
    for i, a in enumerate(joint.arguments):
        placement: dict[str, Placement] = {}
        if overrides is not None and a.name in overrides:
            placement = dict(overrides[a.name])
        elif a.kind == "input":
            if batch is not None and a.shape and a.shape[0] == batch:
                placement |= {DATA: shard(0)} if plan.dp > 1 else {}
                placement |= {CONTEXT: shard(1)} if _has_sequence(a, plan) else {}
        elif a.kind == "param":
            if i in seeds:
                placement[TENSOR] = seeds[i]
            if plan.ep > 1 and _is_expert(a, plan.ep):
                placement[DATA] = shard(0)
                pinned.add(i)
            elif plan.zero == 3 and plan.dp > 1:
                placement = state_placement(a, placement, plan)
        placements.append(placement)
    gradients = []
    for i in joint.gradients:
        a = joint.arguments[i]
        gradients.append(state_placement(a, placements[i], plan) if plan.zero >= 2 and a.kind == "param" else dict(placements[i]))
    outputs: list[Mapping[str, Placement] | None] = []
    returned = next(op for op in joint.module.body if op.name == "func").body.terminator.operands
    for v in returned[:joint.outputs]:
        shape = v.type.shape  # type: ignore[attr-defined]
        cut = batch is not None and plan.dp > 1 and len(shape) > 0 and shape[0] == batch
        outputs.append({DATA: shard(0)} if cut else {})
    context = [Policy(CONTEXT, "data", sequence=True, ring=plan.rings)] if plan.cp > 1 else []
    policies = (Policy(TENSOR, "tensor", sequence=plan.sp, rows=plan.dp == 1), Policy(DATA, "data", pinned=frozenset(pinned)), *context)
    return Layout(policies, tuple(placements), tuple(gradients), tuple(outputs), plan.recompute)
