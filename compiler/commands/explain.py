"""`aicc explain`: what became of each op, what was declined and why, where torch parted the program, and what it compiled again."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.table import Table

from ...ir.core import Operation
from ...runtime.cuda_graph import CudaGraph
from ...runtime.cuda_profile import Profile
from ..capture import GraphRecord, Recorder, call_eager, call_model, prepare
from ..dynamo import backend
from ..errors import UserError
from ..frames import CaptureLog
from ..launches import Launches, launches
from ..model_file import Script, load
from ..options import Options
from .common import Debug, Dynamic, ModelSpec, Train, console, reports_errors
from .places import short_place

__all__ = ["explain"]

TIMED = 6
"""Calls that --time measures; the first does not count."""
_BOOKKEEPING = ("module", "func", "return", "tile.kernel", "tile.return", "yield", "tensor.yield")


@reports_errors
def explain(
    model: ModelSpec,
    train: Train = False,
    dynamic: Dynamic = None,
    every_remark: Annotated[bool, typer.Option("--all", help="Remarks on what was done as well as on what was declined; every guard.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    time: Annotated[bool, typer.Option("--time", help="On a GPU: the time of every kernel, library call, copy and ATen call.")] = False,
    debug: Debug = False,
) -> None:
    """Explain what MODEL compiles to, and why: ops, fused groups, kernels, ATen calls with the Python line, what was declined; graph breaks
    and guards; and what a second call, and a call with each of the file's `more_inputs`, makes torch compile again."""
    found = load(model)
    options = Options.from_user(options={"strict": True, "cache": False})
    recorder, log = Recorder(), CaptureLog()
    calls: list[dict[str, Any]] = []
    with recorder.watching(), log.watching():
        if isinstance(found, Script):
            found.run()
        else:
            prepare(found.model, train)
            call_eager(found, train)  # a fault of the model itself shows before anything is compiled
            compiled = torch.compile(found.model, backend=backend(options), dynamic=dynamic, options=log.options)
            given = (found.args, found.kwargs)
            further = [(f"more_inputs[{i}]", call) for i, call in enumerate(found.more)]
            for what, (args, kwargs) in [("example inputs", given), ("the same again", given), *further]:
                before = len(recorder.graphs)
                call_model(compiled, dataclasses.replace(found, args=args, kwargs=kwargs), train)
                calls.append({"call": what, "arguments": _shapes(args, kwargs), "compiled": [g.title for g in recorder.graphs[before:]]})
            if time:
                _measure(recorder, lambda: call_model(compiled, found, train))
    if not recorder.graphs:
        raise UserError(f"'{model}' ran, but nothing in it was compiled")
    report = {"model": model, "capture": _capture(log, calls),
              "graphs": [_graph(g, every_remark) for g in recorder.graphs if g.compilation is not None]}
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _show(report, every_remark)


def _measure(recorder: Recorder, call: Callable[[], Any]) -> None:
    """Has every graph on a GPU take its steps' times in TIMED calls. UserError if there is none."""
    graphs = [c.graph for g in recorder.graphs if (c := g.compilation) is not None and isinstance(c.graph, CudaGraph)]
    if not graphs:
        raise UserError("--time measures what runs on a GPU, and nothing of this model does")
    for graph in graphs:
        graph.profile = Profile()
    for _ in range(TIMED):
        call()


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    return ", ".join(f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" if isinstance(x, torch.Tensor) else repr(x)[:20] for x in leaves)


def _capture(log: CaptureLog, calls: list[dict[str, Any]]) -> dict[str, Any]:
    again = {"recompiled_on_second_call": len(calls[1]["compiled"])} if calls else {}
    return {"frames": [dataclasses.asdict(f) for f in log.frames], "guards": sum(f.guards for f in log.frames),
            "guard_list": [f"{kind} {name}".strip() for kind, name in dict.fromkeys(log.guards)], "calls": calls, **again,
            "graph_breaks": [dataclasses.asdict(b) for b in log.breaks],
            "recompilations": [{"function": f.function, "place": f.place, "changed": f.recompiled} for f in log.recompilations]}


def _graph(record: GraphRecord, every_remark: bool) -> dict[str, Any]:
    c = record.compilation
    assert c is not None
    kernels = [op for op in record.stages["host"].body if op.name == "tile.kernel"]
    counts = launches(record.stages["host"])
    groups = {k["sym_name"]: k for k in kernels}
    return {
        "name": record.title,
        "graph_ops": _count(record.stages["graph"]),
        "structured_ops": _count(record.stages["tensor"]),
        "kernels": [{"name": n, **counts.get(n, Launches()).to_json(), "per_call": _per_call(n, counts), "ops": _count(k), "origin": _origins(k),
                     **c.stats.get("resources", {}).get(n, {})} for n, k in groups.items()],
        "externs": [{**e, "location": short_place(e["location"])} for e in c.stats.get("externs", [])],
        "times": c.graph.profile.table(40) if isinstance(c.graph, CudaGraph) and c.graph.profile is not None else [],
        "remarks": [{"pass": r.pass_name, "kind": r.kind, "message": r.message, "location": short_place(str(r.location)) if r.location.file else ""}
                    for r in c.remarks if every_remark or r.kind == "declined"],
    }


def _per_call(kernel: str, counts: dict[str, Launches]) -> str:
    return str(counts[kernel]) if kernel in counts else "only when a parameter has changed"


def _count(op: Operation) -> dict[str, int]:
    found = Counter(o.name for o in op.walk() if o.name not in _BOOKKEEPING)
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _origins(kernel: Operation) -> list[str]:
    """The Python lines that a kernel computes, in order."""
    places = dict.fromkeys(short_place(str(o.location)) for o in kernel.walk() if o.location.file)
    return list(places)


def _show(report: dict[str, Any], everything: bool) -> None:
    out = console()
    capture = report["capture"]
    out.print(f"[bold]{escape(report['model'])}[/]: {len(report['graphs'])} compiled graphs; torch captured {len(capture['frames'])} frames behind "
              f"{capture['guards']} guards")
    _show_rows(out, "frames", ("frame", "function", "at", "ops", "guards"),
               [(f["id"], f["function"], f["place"], str(f["ops"]), str(f["guards"])) for f in capture["frames"]])
    if everything:
        _show_rows(out, "kinds of guards", ("checked before captured code is used again",), [(g,) for g in capture["guard_list"]])
    _show_rows(out, "graph breaks", ("at", "line", "because"),
               [(b["place"], b["line"], b["reason"]) for b in capture["graph_breaks"]])
    _show_rows(out, "calls", ("call", "with", "compiled"),
               [(c["call"], c["arguments"], ", ".join(c["compiled"]) or "nothing") for c in capture["calls"]])
    _show_rows(out, "recompilations", ("function", "at", "what changed"), [tuple(r.values()) for r in capture["recompilations"]])
    for g in report["graphs"]:
        out.print(f"\n[bold]{g['name']}[/]")
        out.print(f"  {sum(g['graph_ops'].values())} graph ops: {_names(g['graph_ops'])}")
        out.print(f"  {sum(g['structured_ops'].values())} ops after fusion: {_names(g['structured_ops'])}")
        on_gpu = any("registers" in k for k in g["kernels"])
        resources = ("registers", "spilled", "shared", "per multiprocessor") if on_gpu else ()
        table = Table("kernel", "launches", "ops", *resources, "from", title=f"{len(g['kernels'])} kernels", title_justify="left")
        for k in g["kernels"]:
            places = k["origin"]
            more = f" and {len(places) - 3} more" if len(places) > 3 else ""
            held = _resources(k) if on_gpu else ()
            table.add_row(k["name"], k["per_call"], str(sum(k["ops"].values())), *held, escape("\n".join(places[:3]) + more))
        out.print(table)
        for line in g["times"]:
            out.print(escape(line))
        _show_rows(out, "calls that stay with ATen", ("call", "reason", "from"), [(e["target"], e["reason"], e["location"]) for e in g["externs"]])
        _show_rows(out, "remarks", ("pass", "kind", "what", "where"), [tuple(r.values()) for r in g["remarks"]])


def _resources(kernel: dict[str, Any]) -> tuple[str, ...]:
    """Of a kernel on a GPU: registers per thread, bytes spilled per thread, bytes of shared memory, programs at once and why not more."""
    if "registers" not in kernel:
        return ("", "", "", "")
    held = f"{kernel['programs']} x {kernel['warps']} warps, {kernel['occupancy']:.0%} ({kernel['limit']})"
    return (str(kernel["registers"]), str(kernel["spills"]), str(kernel["shared"]), held)


def _show_rows(out: Any, title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    if not rows:
        out.print(f"  no {title}")
        return
    table = Table(*columns, title=f"{len(rows)} {title}", title_justify="left")
    for row, times in Counter(rows).items():
        table.add_row(*(escape(x) for x in row[:-1]), escape(row[-1]) + (f" ({times} times)" if times > 1 else ""))
    out.print(table)


def _names(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} x{c}" if c > 1 else n for n, c in list(counts.items())[:12]) + (", ..." if len(counts) > 12 else "")
