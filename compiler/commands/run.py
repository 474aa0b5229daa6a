"""`aicc run`: compiles a model, compares it with eager, and says what came of it."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from ..capture import Recorder, call_eager, compile_and_run, prepare
from ..driver import Compilation
from ..dynamo import backend
from ..errors import UserError
from ..model_file import LoadedModel, Script, load
from ..options import Options
from .common import Debug, Dynamic, ModelSpec, Train, console, reports_errors
from .measure import Results, compare, interleaved_medians, results_of, twin
from .places import short_place

__all__ = ["run"]

_STAGES = ("import", "graph", "tensor", "tile", "host", "llvm", "load", "cache")


@reports_errors
def run(
    model: ModelSpec,
    train: Train = False,
    dynamic: Dynamic = None,
    seconds: Annotated[float, typer.Option(help="How long to measure; 0 measures nothing.")] = 2.0,
    cache: Annotated[bool, typer.Option(help="Use the artifact cache; without it the times of all stages show.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Compile MODEL and run it: accuracy, compile time per stage, kernels, memory, speed against eager.

    A model that is in training mode is put into evaluation mode unless --train is given. For training, the loss is the mean square of the
    floating outputs. Errors are against eager in float64, relative to the largest output (or gradient).
    """
    found = load(model)
    options = Options.from_user(options={"strict": True, "cache": cache})
    report = _script_report(found, options) if isinstance(found, Script) else _report(found, options, train, dynamic, seconds)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _show(report)


def _script_report(script: Script, options: Options) -> dict[str, Any]:
    recorder = Recorder(stages=False)
    start = time.perf_counter()
    with recorder.watching():
        compile_and_run(script, options)
    spent = time.perf_counter() - start
    if not recorder.graphs:
        raise UserError(f"'{script.path}' ran, but nothing in it was compiled")
    return {"model": script.name, "train": False, "threads": torch.get_num_threads(), "script_seconds": spent,
            "graphs": _graphs(recorder)}


def _report(found: LoadedModel, options: Options, train: bool, dynamic: bool | None, seconds: float) -> dict[str, Any]:
    prepare(found.model, train)
    ours, plain = twin(found), twin(found)
    call_eager(twin(found), train)  # a fault of the model itself shows before anything is compiled
    eager = results_of(plain.model, plain, train)
    reference, reference_name = _reference(found, train, eager)
    recorder = Recorder(stages=False)
    compiled = torch.compile(ours.model, backend=backend(options), dynamic=dynamic)
    start = time.perf_counter()
    with recorder.watching():
        got = results_of(compiled, ours, train)
    spent = time.perf_counter() - start
    if not recorder.graphs:
        raise UserError(f"nothing in '{found.name}' was compiled: its forward holds no tensor operation that torch captures")
    errors, eager_errors = compare(got, reference), compare(eager, reference)
    report: dict[str, Any] = {
        "model": found.name, "train": train, "threads": torch.get_num_threads(), "compile_seconds": spent,
        "graphs": _graphs(recorder), "reference": reference_name,
        "error": {"absolute": errors.absolute, "relative": errors.relative},
        "eager_error": {"absolute": eager_errors.absolute, "relative": eager_errors.relative},
    }
    if seconds > 0:
        results_of(compiled, ours, train)
        eager_time, time_ = interleaved_medians([lambda: results_of(plain.model, plain, train), lambda: results_of(compiled, ours, train)],
                                                seconds)
        report["milliseconds"] = {"eager": eager_time * 1e3, "aicc": time_ * 1e3, "speedup": eager_time / time_}
    return report


def _reference(found: LoadedModel, train: bool, eager: Results) -> tuple[Results, str]:
    """Eager float64 results; eager as it is where the model does not run in float64."""
    exact = twin(found, torch.float64)
    try:
        return results_of(exact.model, exact, train), "eager float64"
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as e:
        return eager, f"eager (not in float64: {str(e).splitlines()[0][:80]})"


def _graphs(recorder: Recorder) -> list[dict[str, Any]]:
    rows = []
    for g in recorder.graphs:
        c = g.compilation
        if c is None:
            continue
        rows.append({"name": g.title, "seconds": {s: c.seconds[s] for s in _STAGES if s in c.seconds}, "cached": c.cached,
                     "kernels": c.stats.get("kernels", 0), "launches": c.stats.get("launches", 0), "in_loops": c.stats.get("in_loops", []),
                     "packed": c.stats.get("packed", 0),
                     "externs": c.stats.get("externs", []), "memory": _memory(c)})
    return rows


def _memory(c: Compilation) -> dict[str, int]:
    """Bytes. The arena and its lower bound as planned (for symbolic sizes: as last run), and what is packed now."""
    planned = c.stats.get("memory", {})
    seen = c.graph.memory if c.graph is not None else {}
    found = {"arena": seen.get("arena", planned.get("arena_bytes", 0)), "lower_bound": planned.get("lower_bound", 0),
             "unplanned": planned.get("unplanned_bytes", 0), "packed": seen.get("persistent", 0), "outputs": seen.get("outputs", 0)}
    return found


def _show(report: dict[str, Any]) -> None:
    out = console()
    title = f"{report['model']}{' (training step)' if report['train'] else ''}, {report['threads']} threads"
    stages = [s for s in _STAGES if any(s in g["seconds"] for g in report["graphs"])]
    times = Table(title=f"{title}: seconds per stage", title_justify="left")
    times.add_column("graph")
    for s in (*stages, "total"):
        times.add_column(s, justify="right")
    for g in report["graphs"]:
        times.add_row(g["name"], *(f"{g['seconds'].get(s, 0):.3f}" for s in stages), f"{sum(g['seconds'].values()):.3f}")
    out.print(times)
    made = Table(title="What runs", title_justify="left")
    for column in ("graph", "kernels", "launches", "packed once", "extern calls", "arena bytes", "lower bound", "without planning"):
        made.add_column(column, justify="left" if column == "graph" else "right")
    for g in report["graphs"]:
        m = g["memory"]
        launched = " + ".join([str(g["launches"]), *(f"{x['per_trip']} x {x['trips']}" for x in g["in_loops"])])
        made.add_row(g["name"], str(g["kernels"]), launched, str(g["packed"]), str(len(g["externs"])),
                     *(_number(m[k]) for k in ("arena", "lower_bound", "unplanned")))
    out.print(made)
    externs = [(g["name"], e) for g in report["graphs"] for e in g["externs"]]
    if externs:
        table = Table("graph", "extern call", "reason", "from", title="Calls that stay with ATen", title_justify="left")
        for name, e in externs:
            table.add_row(name, e["target"], e["reason"], short_place(e["location"]))
        out.print(table)
    if "script_seconds" in report:
        out.print(f"the script took {report['script_seconds']:.2f} s, compilation included")
        return
    e, plain = report["error"], report["eager_error"]
    out.print(f"compiled in {report['compile_seconds']:.2f} s, capture by torch included")
    out.print(f"max error against {report['reference']}: {e['absolute']:.3g} absolute, {e['relative']:.3g} relative "
              f"(eager itself: {plain['absolute']:.3g}, {plain['relative']:.3g})")
    if e["relative"] > 1e-3 and plain["relative"] > 1e-3:
        out.print("eager differs from itself in float64 as well: the model is random (dropout?) or ill-conditioned, and the comparison says little")
    if "milliseconds" in report:
        ms = report["milliseconds"]
        out.print(f"eager {ms['eager']:.3f} ms, aicc {ms['aicc']:.3f} ms: [bold]{ms['speedup']:.2f} times[/] eager's speed")


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
