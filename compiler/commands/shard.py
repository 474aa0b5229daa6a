"""`aicc shard`: the best placement of a model on a mesh, explained. What it does is in `compiler/planning/sharding.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..distributed.plan_check import check_plan
from ..errors import UserError
from ..planning import sharding
from .common import Debug, reports_errors
from .planning import Budget, Dtype, Hardware, MeshShape, Seq

__all__ = ["shard"]

Names = Annotated[list[str] | None, typer.Option("--why", metavar="OP", help="Explain one op: layer.7.mlp.down, embedding, head.")]
Pins = Annotated[list[str] | None, typer.Option("--why-not", metavar="PINS", help="What the best plan with tp=4 would cost, and why.")]


@reports_errors
def shard(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="model.py, package.module:attribute, or a config.json", show_default=False)] = "",
    mesh: MeshShape = "",
    hardware: Hardware = "h100-sxm",
    train: Annotated[bool, typer.Option("--train/--infer", help="Plan training steps, or forward passes (prefill and decode).")] = True,
    global_batch: Annotated[int, typer.Option(help="Sequences per step (--infer: at a time). Default: 8 per device.", show_default=False)] = 0,
    seq: Seq = 0,
    dtype: Dtype = "",
    memory_limit: Annotated[float, typer.Option(help="GB per device to stay under. Default: what the device has.", show_default=False)] = 0,
    fix: Annotated[list[str] | None, typer.Option(metavar="PINS", help="Pin choices and search the rest: tp=8,zero=1.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Take this plan file instead of searching.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page that shows the plan.")] = None,
    why: Names = None,
    why_not: Pins = None,
    diff: Annotated[tuple[Path, Path] | None, typer.Option(help="Compare two plan files.")] = None,
    pareto: Annotated[bool, typer.Option("--pareto", help="Step time against memory: the plans that nothing beats in both.")] = False,
    submeshes: Annotated[bool, typer.Option("--submeshes", help="Also plan a pipeline of unequal sub-meshes (not run).")] = False,
    by_hand: Annotated[bool, typer.Option("--by-hand/--no-by-hand", help="Compare with DDP, FSDP and Megatron-style plans.")] = True,
    imbalance: Annotated[float, typer.Option(help="Tokens of the busiest expert rank over the mean.")] = 1.0,
    offload: Annotated[bool, typer.Option("--offload", help="Also try keeping optimizer state in host memory.")] = False,
    prompt: Annotated[int, typer.Option(help="--infer: tokens of a prompt. Default: half of the sequence.", show_default=False)] = 0,
    validate: Annotated[bool, typer.Option("--validate", help="Run the plan's step on virtual ranks here, against the whole model's.")] = False,
    budget: Budget = 300.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Decide how MODEL runs on a mesh: data, tensor, sequence, context, pipeline and expert parallelism, ZeRO, micro-batches,
    recomputation and schedule together, under a memory bound per device. Needs no device and no weights.
    """
    if diff:
        return sharding.show_diff(*diff)
    if not model:
        raise UserError("which model? Give a Python file, package.module:attribute, or a checkpoint's config.json")
    if validate:
        raise typer.Exit(0 if check_plan(model, mesh, plan) else 1)
    request = sharding.Request(
        model=model, mesh=mesh, hardware=hardware, global_batch=global_batch, seq=seq, dtype=dtype, memory_limit=memory_limit,
        fix=tuple(fix or ()), imbalance=imbalance, offload=offload, budget=budget, prompt=prompt)
    if not train:
        return sharding.plan_inference(request, output, as_json)
    sharding.plan_training(request, sharding.Wishes(plan, output, html, tuple(why or ()), tuple(why_not or ()), pareto, by_hand, as_json, submeshes))
