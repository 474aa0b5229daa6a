"""What `aicc shard` does: from the user's words to a planner's problem, and from a plan to what is printed and written.

    problem, model = problem_of(Request("model.py", mesh="2x8", hardware="h100-sxm", global_batch=512))
    plan_training(request, Wishes(output=Path("plan.toml")))
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from ...passes.shard.cluster import Cluster, Mesh, load_cluster
from ...passes.shard.collectives import axis_group
from ...passes.shard.explain import by_hand, diff, why_not
from ...passes.shard.explain_op import why_op
from ...passes.shard.inference import InferenceProblem
from ...passes.shard.inference import plan_inference as search_inference
from ...passes.shard.intra_op import IntraProblem, IntraResult, solve
from ...passes.shard.op_graph import OpGraph
from ...passes.shard.page import plan_page
from ...passes.shard.plan import Plan, plan_problems
from ...passes.shard.plan_file import PlanFile, Target, load_plan_file
from ...passes.shard.planner import Problem, SearchResult, pareto, search
from ...passes.shard.space import Space, parse_pins
from ...passes.shard.step import StepReport, predict_step
from ...passes.shard.submesh import SubmeshPlan, search_submeshes
from ...passes.shard.tables import ConfigError
from ...passes.shard.traced import cut_words
from ..commands.output import console
from .plan_model import PlannedModel, load_for_planning

__all__ = ["Request", "Wishes", "plan_inference", "plan_training", "problem_of", "show_diff"]


@dataclass(frozen=True)
class Request:
    """What to plan, in the user's words; zeros and empty strings mean the default."""

    model: str
    mesh: str = ""
    hardware: str = "h100-sxm"
    global_batch: int = 0
    seq: int = 0
    dtype: str = ""
    memory_limit: float = 0.0
    fix: tuple[str, ...] = ()
    imbalance: float = 1.0
    offload: bool = False
    budget: float = 300.0
    prompt: int = 0


@dataclass(frozen=True)
class Wishes:
    """What to print and write besides the plan."""

    plan: Path | None = None
    output: Path | None = None
    html: Path | None = None
    why: tuple[str, ...] = ()
    why_not: tuple[str, ...] = ()
    pareto: bool = False
    by_hand: bool = True
    as_json: bool = False
    submeshes: bool = False


def cluster_of(request: Request) -> Cluster:
    """The cluster. Raises ConfigError that names the option or the file's line."""
    mesh = None
    if request.mesh:
        try:
            mesh = Mesh.parse(request.mesh)
        except ConfigError as e:
            raise ConfigError(f"--mesh: {e}") from None
    try:
        return load_cluster(request.hardware, mesh=mesh)
    except ConfigError as e:
        option = next((f"--{word}: " for word in ("hardware", "mesh") if str(e).startswith(f"{word} ")), "")
        raise ConfigError(f"{option}{e}") from None


def problem_of(request: Request) -> tuple[Problem, PlannedModel]:
    """The planner's problem and the model. Raises ConfigError or UserError."""
    cluster = cluster_of(request)
    dtype = request.dtype or next(d for d in ("bf16", "fp16", "fp32") if d in cluster.device.peak_flops)
    cluster.device.flops(dtype)  # complains about a type that the device does not have
    for name, value, low in (("--global-batch", request.global_batch, 0), ("--seq", request.seq, 0), ("--memory-limit", request.memory_limit, 0),
                             ("--imbalance", request.imbalance, 1), ("--budget", request.budget, 0)):
        if value < low:
            raise ConfigError(f"{name} = {value:g}: must be at least {low}")
    model = load_for_planning(request.model, cluster, request.seq or None, dtype)
    config = model.config
    if config.moe is not None and request.imbalance != 1.0:
        config = replace(config, moe=replace(config.moe, imbalance=request.imbalance))
    space = Space(offload=request.offload)
    if config.custom is not None:
        space = replace(space, recompute=("none", "full"), max_context=1)
        if config.seq == 1:
            space = space.pin(sp=False)
    space = space.pin(**{k: v for text in request.fix for k, v in parse_pins(text).items()})
    return Problem(config, cluster, request.global_batch or 8 * cluster.size, space=space, budget_s=request.budget,
                   memory_limit=request.memory_limit * 1e9 or None), model


def plan_training(request: Request, wishes: Wishes) -> None:
    """Search (or take the given plan), and print and write what is asked for."""
    problem, model = problem_of(request)
    result = search(problem) if wishes.plan is None else None
    report = result.best if result is not None else _given(problem, wishes.plan)
    hand = by_hand(problem) if wishes.by_hand and not (wishes.why or wishes.why_not) else {}
    written = PlanFile(report.plan, Target(request.hardware, request.mesh or f"{problem.cluster.nodes}x{problem.cluster.node_size}",
                                           problem.global_batch, source=request.model), problem.config)
    if wishes.output is not None:
        _write(wishes.output, written.plan.to_json() if wishes.output.suffix == ".json" else written.to_toml())
    if wishes.html is not None:
        _write(wishes.html, plan_page(problem, report, result, hand))
    front = pareto(problem) if wishes.pareto else ()
    if wishes.as_json:
        print(json.dumps(_as_json(problem, report, result, hand, front), indent=1))
    else:
        for remark in model.remarks:
            console().print(f"[yellow]note:[/] {escape(remark)}")
        if not (wishes.why or wishes.why_not):
            _show(problem, report, result)
            _show_by_hand(hand, report)
            _show_intra(problem, model, report.plan)
        for text in wishes.why:
            console().print(escape(why_op(problem, report, text)))
        for text in wishes.why_not:
            console().print(escape(why_not(problem, result or _as_result(report), parse_pins(text))))
        _show_front(front)
        if wishes.submeshes:
            _show_submeshes(search_submeshes(problem), report)
    for path in (wishes.output, wishes.html):
        if path is not None and not wishes.as_json:
            console().print(f"written: {path}")


def plan_inference(request: Request, output: Path | None, as_json: bool) -> None:
    """Plans for forward passes: the best for the first token, for further ones, for whole requests, and for throughput."""
    problem, _ = problem_of(request)
    total = problem.config.seq
    prompt = request.prompt or max(1, total // 2)
    if not 0 < prompt < total:
        raise ConfigError(f"--prompt = {prompt}: must be at least 1 and less than the sequence of {total}")
    pins = {k: v for k, v in problem.space.pins if k in ("dp", "tp", "pp", "ep")}
    if problem.config.custom is not None:
        raise ConfigError(f"{request.model}: plans for inference need a transformer with a transformers configuration (there is a cache to size)")
    found = search_inference(InferenceProblem(problem.config, problem.cluster, problem.global_batch, prompt, total - prompt,
                                              problem.memory_limit, tuple(pins.items())))
    rows = {"first token (prefill)": found.first_token, "each token (decode)": found.token, "whole requests": found.request,
            "throughput": found.throughput}
    if output is not None:
        target = Target(request.hardware, request.mesh or f"{problem.cluster.nodes}x{problem.cluster.node_size}", problem.global_batch,
                        source=request.model)
        _write(output, PlanFile(found.request.plan, target, problem.config).to_toml())
    if as_json:
        print(json.dumps({name: {**asdict(r), "peak_memory_bytes": r.peak_memory} for name, r in rows.items()}, indent=1))
        return
    console().print(f"[bold]{escape(problem.config.name)}[/]: {problem.config.params() / 1e9:.2f} billion parameters, {problem.cluster.size} x "
                    f"{problem.cluster.device.name}; {problem.global_batch} sequences at a time, prompts of {prompt}, {total - prompt} tokens out; "
                    f"{found.considered} plans")
    table = Table("best for", "plan", "first token", "per token", "request", "tokens/s", "weights", "KV cache", "memory", title_justify="left",
                  title="Inference: prefill and decode apart")
    for name, r in rows.items():
        degrees = f"dp{r.plan.dp} tp{r.plan.tp} pp{r.plan.pp}" + (f" ep{r.plan.ep}" if r.plan.ep > 1 else "")
        table.add_row(name, degrees, f"{r.first_token_s * 1e3:.1f} ms", f"{r.token_s * 1e3:.2f} ms", f"{r.request_s:.2f} s",
                      f"{r.tokens_per_second:,.0f}", f"{r.weights / 1e9:.1f} GB",
                      f"{r.cache / 1e9:.1f} GB", f"{r.peak_memory / 1e9:.1f} of {r.capacity / 1e9:.1f} GB")
    console().print(table)
    if output is not None:
        console().print(f"written: {output} (the plan for whole requests)")


def _given(problem: Problem, path: Path | None) -> StepReport:
    assert path is not None
    found = load_plan_file(path)
    if found.model is not None and found.model.name != problem.config.name:
        raise ConfigError(f"{path}: the plan was made for the model '{found.model.name}', this one is '{problem.config.name}'")
    problems = plan_problems(found.plan, problem.config, problem.cluster, problem.global_batch)
    if problems:
        raise ConfigError(f"{path}: " + "; ".join(problems))
    return predict_step(problem.config, found.plan, problem.cluster, problem.global_batch, problem.software)


def _as_result(report: StepReport) -> SearchResult:
    return SearchResult(report, (), 0.0, report.seconds, False, 0, 0, 0.0)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _summary(report: StepReport) -> dict[str, Any]:
    return {"label": report.plan.label, "step_s": report.seconds, "tokens_per_s": report.tokens_per_second, "mfu": report.mfu,
            "hfu": report.hfu, "peak_memory_bytes": report.peak_memory, "exposed_comm_s": report.exposed_comm, "bubble_s": report.bubble,
            "breakdown_s": report.breakdown(), "plan": asdict(report.plan), "fits": report.fits}


def _as_json(problem: Problem, report: StepReport, result: SearchResult | None, hand: dict[str, StepReport | None],
             front: tuple[StepReport, ...]) -> dict[str, Any]:
    table = {"model": asdict(problem.config), "devices": problem.cluster.size, "hardware": problem.cluster.name,
             "global_batch": problem.global_batch, "best": _summary(report)}
    if result is not None:
        table["search"] = {"lower_bound_s": result.lower_bound, "gap": result.gap, "proved": result.proved, "considered": result.considered,
                           "simulated": result.simulated, "seconds": result.seconds}
        table["alternatives"] = [_summary(r) for r in result.alternatives]
    table["by_hand"] = {name: None if r is None else _summary(r) for name, r in hand.items()}
    table["pareto"] = [_summary(r) for r in front]
    return table


def _show(problem: Problem, report: StepReport, result: SearchResult | None) -> None:
    config, cluster, plan, out = problem.config, problem.cluster, report.plan, console()
    kinds = " + ".join(f"{g.nodes} x {cluster.node_size} {g.device.name}" for g in cluster.groups)
    out.print(f"[bold]{escape(config.name)}[/]: {config.params() / 1e9:.2f} billion parameters ({config.active_params() / 1e9:.2f} active), "
              f"{config.layers} layers, sequence {config.seq}, {config.dtype}; {kinds}; global batch {problem.global_batch}")
    table = Table(title="Plan", title_justify="left")
    columns = [("dp", plan.dp), ("tp", plan.tp), ("sp", "on" if plan.sp else "off"), ("cp", plan.cp), ("pp", plan.pp), ("ep", plan.ep),
               ("zero", plan.zero), ("micro-batch", plan.micro_batch), ("micro-batches", plan.micro_batches(problem.global_batch)),
               ("schedule", plan.schedule + (f" x{plan.interleave}" if plan.interleave > 1 else "") if plan.pp > 1 else "-"),
               ("recompute", plan.recompute), ("layers per part", _split(plan)), ("offload", "on" if plan.offload else "off")]
    for name, _ in columns:
        table.add_column(name)
    table.add_row(*(str(v) for _, v in columns))
    out.print(table)
    numbers = Table(title="Prediction", title_justify="left")
    cells = [("step", f"{report.seconds:.4g} s"), ("tokens/s", f"{report.tokens_per_second:,.0f}"), ("MFU", f"{report.mfu:.1%}"),
             ("HFU", f"{report.hfu:.1%}"), ("peak memory", f"{report.peak_memory / 1e9:.1f} of {max(report.capacity) / 1e9:.1f} GB"),
             ("exposed communication", f"{report.exposed_comm + report.gradient_reduce + report.parameter_gather:.4g} s"),
             ("bubble", f"{report.bubble / report.seconds:.1%}")]
    if result is not None:
        cells.append(("lower bound", f"{result.lower_bound:.4g} s (gap {result.gap:.1%})"))
    for name, _ in cells:
        numbers.add_column(name)
    numbers.add_row(*(v for _, v in cells))
    out.print(numbers)
    out.print("step: " + ", ".join(f"{n} {s:.3g} s ({s / report.seconds:.1%})" for n, s in report.breakdown().items() if s > 0))
    fullest = max(report.memory, key=lambda m: m.total)
    out.print("memory of the fullest device: " + ", ".join(f"{f.name} {getattr(fullest, f.name) / 1e9:.2f} GB" for f in fields(fullest)))
    if not report.fits:
        out.print("[bold red]This plan does not fit in memory.[/]")
    if result is None:
        return
    state = "no plan of the space is faster under the cost model" if result.proved else (
        f"stopped by the budget: a plan of {result.open_bound:.4g} s is not ruled out")
    out.print(f"searched {result.considered} combinations, simulated {result.simulated}, {result.seconds:.1f} s: {state}; "
              "the lower bound ignores bubbles, exposed reductions and memory")
    for r in result.alternatives[:4]:
        out.print(f"  next: {r.plan.label}: {r.seconds / report.seconds - 1:+.1%}, {r.peak_memory / 1e9:.1f} GB")


def _split(plan: Plan) -> str:
    """Runs of equal counts: `8x4 7x2` for eight parts... of four layers, two of seven."""
    runs: list[list[int]] = []
    for n in plan.split:
        if runs and runs[-1][0] == n:
            runs[-1][1] += 1
        else:
            runs.append([n, 1])
    return " ".join(f"{n}" if times == 1 else f"{n}(x{times})" for n, times in runs[:6]) + (" ..." if len(runs) > 6 else "") or "even"


def _show_by_hand(hand: dict[str, StepReport | None], report: StepReport) -> None:
    if not hand:
        return
    table = Table("by hand", "plan", "step", "tokens/s", "MFU", "memory", "against this plan",
                  title="What one would set up by hand (micro-batch and recomputation at their best)", title_justify="left")
    for name, r in {**hand, "this plan": report}.items():
        if r is None:
            table.add_row(name, "does not fit or does not divide", *[""] * 5)
        else:
            table.add_row(name, r.plan.label, f"{r.seconds:.4g} s", f"{r.tokens_per_second:,.0f}", f"{r.mfu:.1%}",
                          f"{r.peak_memory / 1e9:.1f} GB", f"{r.seconds / report.seconds:.2f} x the time")
    console().print(table)


def _show_intra(problem: Problem, model: PlannedModel, plan: Plan) -> None:
    """The integer program's answer for every kind of block, at the plan's tensor degree (or a node's, where the plan has none)."""
    if model.captured is None:
        return
    ways = plan.tp if plan.tp > 1 else max((d for d in (2, 4, 8) if d <= problem.cluster.node_size), default=1)
    if ways == 1:
        return
    table = Table(
        "block", "times", "ops", "variables", "residual", "seconds", "exchanges", "LP bound", "gap", "weights cut",
        title=f"Ops inside a block over tp {ways} (integer program, batch {model.captured.batch}, forward and backward)", title_justify="left")
    for kind in model.captured.blocks:
        if not kind.graph.nodes or kind.kind in ("embedding", "head"):
            continue
        r = solve(IntraProblem(kind.graph, problem.cluster.device, axis_group(problem.cluster, 1, ways), dtype=problem.config.dtype))
        where = "whole" if r.residual == "R" else f"cut along dim {r.residual}"
        table.add_row(kind.kind, str(kind.count), str(len(kind.graph.nodes)), str(r.variables), where, f"{r.seconds * 1e3:.3f} ms",
                      str(len(r.conversions)), f"{r.bound * 1e3:.3f} ms", f"{max(0.0, 1 - r.bound / r.seconds):.1%}", escape(_cuts(kind.graph, r)))
    console().print(table)


def _cuts(graph: OpGraph, result: IntraResult) -> str:
    """`q_proj columns, o_proj rows, ...`: the matrices by the loop that is cut."""
    words = []
    for node, choice in zip(graph.nodes, result.choices, strict=True):
        if node.kind in ("gemm", "convolution") and any(o.parameter for o in node.operands):
            words.append(f"{node.path.rsplit('.', 1)[-1]} {cut_words(node, choice.strategy.loop)}")
    return ", ".join(dict.fromkeys(words))


def _show_front(front: tuple[StepReport, ...]) -> None:
    if not front:
        return
    table = Table("step", "memory", "MFU", "plan", title="Time against memory", title_justify="left")
    for r in front:
        table.add_row(f"{r.seconds:.4g} s", f"{r.peak_memory / 1e9:.1f} GB", f"{r.mfu:.1%}", r.plan.label)
    console().print(table)


def _show_submeshes(found: SubmeshPlan, report: StepReport) -> None:
    table = Table("devices", "device", "degrees", "blocks", "recompute", "", "micro-batch", "memory", title_justify="left",
                  title=f"Stages with sub-meshes of their own: {found.micro_batches} micro-batches of {found.rows}, 1F1B")
    for row in found.table():
        table.add_row(*row)
    console().print(table)
    console().print(f"step {found.seconds:.4g} s ({found.seconds / report.seconds - 1:+.1%} against the plan with equal stages)"
                    + (f", {found.idle} devices idle" if found.idle else "") + "; planned only: what runs has equal stages")


def show_diff(a: Path, b: Path) -> None:
    """Print what differs between two plan files: fields, and predicted time and memory where the files say for what."""
    first, second = load_plan_file(a), load_plan_file(b)
    if first.target is None or first.model is None:
        lines = [f"  {f.name}: {getattr(first.plan, f.name)} -> {getattr(second.plan, f.name)}" for f in fields(Plan)
                 if getattr(first.plan, f.name) != getattr(second.plan, f.name)]
        console().print("\n".join(lines) or "  the plans are equal")
        console().print(f"  {a} does not say which mesh and model it is for, so nothing is predicted")
        return
    reports = []
    for path, found in ((a, first), (b, second)):
        target, model = found.target or first.target, found.model or first.model
        cluster = target.cluster()
        problems = plan_problems(found.plan, model, cluster, target.global_batch)
        if problems:
            raise ConfigError(f"{path}: " + "; ".join(problems))
        reports.append(predict_step(model, found.plan, cluster, target.global_batch, target.software))
    console().print(f"{a} -> {b}\n" + escape(diff(*reports)))
