"""What `aicc sim` does: published runs against predictions, and one plan looked at from all sides.

    show_validation(None, as_json=False)
    run_plan(RunRequest(Path("plan.toml")))
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from ...passes.shard.calibrate import CONSTANTS
from ...passes.shard.cluster import Cluster, Mesh, load_cluster
from ...passes.shard.gantt import LEGEND, gantt_text
from ...passes.shard.model import ModelConfig
from ...passes.shard.plan import Plan, plan_problems
from ...passes.shard.plan_file import load_plan_file
from ...passes.shard.published import PUBLISHED, Row, held_out_errors, validate
from ...passes.shard.reliability import Elastic, Failures, RunReport, elastic_plan, run_with_failures, with_stragglers
from ...passes.shard.step import StepReport, pipeline_run, predict_step
from ...passes.shard.tables import ConfigError
from ..commands.output import console
from .sharding import Request, problem_of

__all__ = ["RunRequest", "run_plan", "scaling_curve", "show_validation"]


def show_validation(path: Path | None, as_json: bool) -> None:
    """Print predicted against published for every row, and the constants."""
    rows = validate(path or PUBLISHED)
    middle, worst = held_out_errors(rows)
    cluster = rows[0].case.cluster
    constants = {c.name: (c.read(cluster), "fitted" if c.fitted else "given", c.meaning) for c in CONSTANTS}
    if as_json:
        print(json.dumps({"rows": [_row(r) for r in rows], "held_out": {"median": middle, "worst": worst},
                          "constants": {n: {"value": v, "origin": o, "meaning": m} for n, (v, o, m) in constants.items()}}, indent=1))
        return
    table = Table(title=f"Published runs against the simulator ({path or 'shipped figures'})", title_justify="left")
    for name, justify in (("row", "left"), ("", "left"), ("published", "right"), ("predicted", "right"), ("error", "right"), ("plan", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        unit = {"tflops": "TFLOP/s", "s": "s", "ms": "ms"}[row.case.unit]
        free = f" (open: {', '.join(n for n, _ in row.case.free)})" if row.case.free else ""
        table.add_row(row.case.name, "fitted" if row.case.fitted else "held out", f"{row.case.published:g} {unit}", f"{row.predicted:.4g} {unit}",
                      f"{row.error:+.1%}", escape(row.plan.label + free))
    console().print(table)
    held = sum(not r.case.fitted for r in rows)
    console().print(f"held out: {held} of {len(rows)} rows, median |error| {middle:.1%}, worst {worst:.1%}")
    facts = Table(title=f"Constants of {cluster.name}", title_justify="left")
    for name in ("constant", "value", "", "meaning"):
        facts.add_column(name)
    for name, (value, origin, meaning) in constants.items():
        facts.add_row(name, f"{value:g}", origin, meaning)
    console().print(facts)


def _row(row: Row) -> dict[str, Any]:
    return {"row": row.case.name, "fitted": row.case.fitted, "unit": row.case.unit, "published": row.case.published,
            "predicted": row.predicted, "error": row.error, "plan": row.plan.label}


@dataclass(frozen=True)
class RunRequest:
    """What to simulate; see the options of `aicc sim run`."""

    plan: Path
    mesh: str = ""
    hardware: str = ""
    global_batch: int = 0
    gantt: bool = True
    scale: str = "off"
    jitter: float = 0.0
    straggler: float = 1.0
    mtbf_days: float = 0.0
    checkpoint_s: float = 30.0
    restart_s: float = 300.0
    interval_s: float = 0.0
    days: float = 30.0
    lose: int = 0
    as_json: bool = False


def run_plan(request: RunRequest) -> None:
    """Simulate the plan of a file. Raises ConfigError when the file does not say for what, or the plan cannot run there."""
    found = load_plan_file(request.plan)
    target, plan = found.target, found.plan
    if target is None or (found.model is None and not target.source):
        raise ConfigError(f"{request.plan}: does not say what it is for (tables [target] and [model]): "
                          f"`aicc shard MODEL --plan {request.plan} -o FILE` writes them")
    hardware, mesh = request.hardware or target.hardware, request.mesh or target.mesh
    cluster, batch, software = load_cluster(hardware, mesh=Mesh.parse(mesh)), request.global_batch or target.global_batch, target.software
    # A model that is known by its ops alone is traced again from its file.
    model = found.model or problem_of(Request(target.source, mesh, hardware, batch))[0].config
    for name, value, low in (("--jitter", request.jitter, 0), ("--straggler", request.straggler, 1), ("--mtbf", request.mtbf_days, 0),
                             ("--checkpoint", request.checkpoint_s, 0), ("--restart", request.restart_s, 0), ("--days", request.days, 1e-3),
                             ("--interval", request.interval_s, 0), ("--lose", request.lose, 0)):
        if value < low:
            raise ConfigError(f"{name} = {value:g}: must be at least {low:g}")
    problems = plan_problems(plan, model, cluster, batch)
    if problems:
        raise ConfigError(f"{request.plan}: " + "; ".join(problems))
    report = predict_step(model, plan, cluster, batch, software)
    slow = with_stragglers(model, plan, cluster, batch, request.jitter, request.straggler, software) if (
        request.jitter or request.straggler > 1) else None
    failures = Failures(request.mtbf_days * 86400, request.checkpoint_s, request.restart_s, request.interval_s)
    life = run_with_failures((slow or report).seconds, cluster.size, failures, request.days) if request.mtbf_days else None
    curve = scaling_curve(model, plan, cluster, batch, software, _sizes(request.scale))
    elastic = _elastic(model, plan, cluster, batch, request.lose)
    if request.as_json:
        print(json.dumps({"step_s": report.seconds, "tokens_per_s": report.tokens_per_second, "mfu": report.mfu, "hfu": report.hfu,
                          "peak_memory_bytes": report.peak_memory, "breakdown_s": report.breakdown(), "fits": report.fits,
                          "straggler_step_s": slow.seconds if slow else None, "run": vars(life) if life else None,
                          "elastic": _elastic_json(elastic), "scaling": curve}, indent=1))
        return
    _show_step(report)
    if request.gantt:
        _show_gantt(model, plan, cluster, batch, software)
    if slow is not None:
        console().print(f"with stragglers (jitter {request.jitter:g}, slowest {request.straggler:g} x): step {slow.seconds:.4g} s "
                        f"({slow.seconds / report.seconds - 1:+.1%}), MFU {slow.mfu:.1%}")
    if life is not None:
        _show_life(life, cluster, failures)
    if elastic is not None:
        _show_elastic(elastic, report, cluster, request.lose)
    _show_curve(curve)


def _sizes(text: str) -> tuple[int, ...]:
    if text in ("off", ""):
        return ()
    parts = text.split(",")
    for part in parts:
        if not part.strip().isdigit() or int(part) < 1:
            raise ConfigError(f"--scale: '{part}' is not a number of devices; write 32,64,128 or off")
    return tuple(int(p) for p in parts)


def scaling_curve(model: ModelConfig, plan: Plan, cluster: Cluster, batch: int, software: str, sizes: tuple[int, ...]) -> list[dict[str, float]]:
    """The plan with more or fewer data-parallel ranks: the batch in proportion (weak scaling), and, as `fixed_*`, the batch as it is
    (strong scaling; 0 where it does not divide). Sizes that are no multiple of one replica, or no whole nodes, are left out. `linearity`
    is tokens/s per device over that of the smallest size.
    """
    rows: list[dict[str, float]] = []
    replica = plan.devices // plan.dp
    for devices in sizes:
        if devices % replica or devices % cluster.node_size or len(cluster.groups) > 1:
            continue
        dp = devices // replica
        wide, share = replace(plan, dp=dp), batch // plan.dp * dp
        there = cluster.with_nodes(devices // cluster.node_size)
        if share == 0 or plan_problems(wide, model, there, share):
            continue
        r = predict_step(model, wide, there, share, software, exact=False)
        per_device = r.tokens_per_second / devices
        strong = None if plan_problems(wide, model, there, batch) else predict_step(model, wide, there, batch, software, exact=False)
        rows.append({"devices": devices, "global_batch": share, "step_s": r.seconds, "tokens_per_s": r.tokens_per_second, "mfu": r.mfu,
                     "peak_memory_bytes": r.peak_memory, "linearity": per_device / (rows[0]["tokens_per_s"] / rows[0]["devices"]) if rows else 1.0,
                     "fixed_step_s": strong.seconds if strong else 0.0, "fixed_mfu": strong.mfu if strong else 0.0})
    return rows


def _elastic(model: ModelConfig, plan: Plan, cluster: Cluster, batch: int, lose: int) -> Elastic | None:
    if not lose:
        return None
    if lose >= cluster.nodes:
        raise ConfigError(f"--lose {lose}: the mesh has {cluster.nodes} nodes")
    found = elastic_plan(model, plan, cluster, batch, cluster.nodes - lose)
    if found is None:
        raise ConfigError(f"--lose {lose}: no pipeline of tp {plan.tp} and cp {plan.cp} fits on {cluster.nodes - lose} nodes")
    return found


def _elastic_json(elastic: Elastic | None) -> dict[str, Any] | None:
    if elastic is None:
        return None
    return {"step_s": elastic.seconds, "idle_nodes": elastic.idle_nodes,
            "pipelines": [{"nodes": t.nodes, "pp": t.plan.pp, "micro_batches": n} for t, n in elastic.pipelines]}


def _show_step(report: StepReport) -> None:
    out = console()
    out.print(f"[bold]{escape(report.plan.label)}[/]")
    out.print(f"step {report.seconds:.4g} s, {report.tokens_per_second:,.0f} tokens/s, MFU {report.mfu:.1%}, HFU {report.hfu:.1%}, "
              f"peak memory {report.peak_memory / 1e9:.1f} of {max(report.capacity) / 1e9:.1f} GB"
              + ("" if report.fits else " [bold red]does not fit[/]"))
    out.print("  " + ", ".join(f"{n} {s:.3g} s ({s / report.seconds:.1%})" for n, s in report.breakdown().items() if s > 0))


def _show_gantt(model: ModelConfig, plan: Plan, cluster: Cluster, batch: int, software: str) -> None:
    if plan.pp == 1:
        console().print("no pipeline: one stage, nothing to draw")
        return
    schedule, run = pipeline_run(model, plan, cluster, batch, software, most=4 * plan.pp)
    total = plan.micro_batches(batch)
    more = f", the first {schedule.micro_batches} of {total} micro-batches" if schedule.micro_batches < total else ""
    console().print(f"pipeline ({plan.schedule}{more}): {run.seconds:.4g} s, bubble {run.bubble:.1%}")
    console().print(escape(gantt_text(run, schedule)))
    console().print(LEGEND)


def _show_life(life: RunReport, cluster: Cluster, failures: Failures) -> None:
    console().print(f"{life.seconds / 86400:g} days on {cluster.size} devices: {life.failures} failures (one every "
                    f"{failures.mtbf_s / cluster.size / 3600:.2f} h), goodput {life.goodput:.1%}; a checkpoint every "
                    f"{life.interval_s:.0f} s of work; lost work {life.lost / life.seconds:.1%}, checkpoints "
                    f"{life.checkpointing / life.seconds:.1%}, restarts {life.down / life.seconds:.1%}; {life.steps:,.0f} steps")


def _show_elastic(elastic: Elastic, report: StepReport, cluster: Cluster, lose: int) -> None:
    groups: dict[tuple[int, int, int], int] = {}
    for template, n in elastic.pipelines:
        key = (template.nodes, template.plan.pp, n)
        groups[key] = groups.get(key, 0) + 1
    left = cluster.nodes - lose
    console().print(f"without {lose} of {cluster.nodes} nodes: {len(elastic.pipelines)} pipelines on {left - elastic.idle_nodes} of {left} nodes, "
                    f"pipelines {elastic.seconds:.4g} s a step ({elastic.seconds / report.pipeline:.2f} x; the nodes alone would give "
                    f"{cluster.nodes / left:.2f} x)")
    for (nodes, pp, n), times in sorted(groups.items()):
        console().print(f"  {times} x {nodes} nodes, pp {pp}, {n} micro-batches each")


def _show_curve(curve: list[dict[str, float]]) -> None:
    if not curve:
        return
    table = Table("devices", "global batch", "step", "tokens/s", "MFU", "memory", "linearity", "same batch: step", "MFU", title_justify="left",
                  title="Scaling of this plan: more data-parallel ranks, with the batch in proportion, and with the batch as it is")
    for row in curve:
        fixed = ("", "") if row["fixed_mfu"] == 0 else (f"{row['fixed_step_s']:.4g} s", f"{row['fixed_mfu']:.1%}")
        table.add_row(f"{row['devices']:.0f}", f"{row['global_batch']:.0f}", f"{row['step_s']:.4g} s", f"{row['tokens_per_s']:,.0f}",
                      f"{row['mfu']:.1%}", f"{row['peak_memory_bytes'] / 1e9:.1f} GB", f"{row['linearity']:.1%}", *fixed)
    console().print(table)
