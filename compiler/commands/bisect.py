"""`aicc bisect`: which pass, which op, which kernel makes a model go wrong."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import triton
import typer
from rich.markup import escape
from rich.table import Table

from ..bisect import Finding, Report, bisect_graph, capture, replay, write_repro
from ..bisect.search import Backend
from ..bisect.triton import simulated_backend
from ..errors import UserError
from ..model_file import Script, load
from ..options import Options
from .common import Debug, Dynamic, Train, console, reports_errors
from .opt import parse_target
from .places import short_place

__all__ = ["bisect"]


@reports_errors
def bisect(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="model.py, model.py:attribute or package.module:attribute",
                                                show_default=False)] = None,
    train: Train = False,
    dynamic: Dynamic = None,
    graph: Annotated[int | None, typer.Option(metavar="N", help="Only this graph (they are numbered from 0).", show_default=False)] = None,
    target: Annotated[str, typer.Option(help="cpu (this machine), or cuda:90 and so on, whose kernels then run in Triton's interpreter.")] = "cpu",
    seconds: Annotated[float, typer.Option(help="How long to make the failing module smaller.")] = 60.0,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where to write what shows the fault again.")] = Path("aicc-repro"),
    again: Annotated[Path | None, typer.Option("--replay", metavar="DIR", help="Run such a folder again instead.", show_default=False)] = None,
    debug: Debug = False,
) -> None:
    """Compare MODEL at every stage with the stage before, in float64 and in its own types, and name the first pass, op or kernel that is wrong.

    Ends with exit code 0 when all differences are legal rounding, 1 when a stage is wrong; the smallest module that shows it is then in DIR.
    """
    backend = _backend(target)
    if again is not None:
        verdict = replay(again, backend)
        typer.echo(f"{again}: " + ("right now" if verdict is None else f"still wrong ({verdict.kind}): {verdict.text}"))
        raise typer.Exit(0 if verdict is None else 1)
    if model is None:
        raise UserError("no MODEL given; or use --replay DIR for a folder that aicc bisect wrote")
    found = load(model)
    if isinstance(found, Script):
        raise UserError(f"'{model}' calls torch.compile itself; aicc bisect needs `model` and `example_inputs` (see `aicc run --help`)")
    graphs = capture(found, train=train, dynamic=dynamic)
    if graph is not None and not 0 <= graph < len(graphs):
        raise UserError(f"there is no graph {graph}: torch makes {len(graphs)} of this model ({', '.join(g.title for g in graphs)})")
    out, progress = console(), console(stderr=True)
    options = Options.from_user(options={"strict": True, "cache": False})
    for one in graphs if graph is None else [graphs[graph]]:
        with progress.status(one.title) as status:
            report = bisect_graph(one, options, target=None if target == "cpu" else parse_target(target), seconds=seconds, backend=backend,
                                  tell=lambda text, title=one.title, status=status: status.update(escape(f"{title}: {text}")))  # type: ignore[misc]
        _show(report, out)
        if report.finding is not None:
            _show_finding(report.finding, output, out)
            raise typer.Exit(1)
    out.print("legal rounding only: every stage means what the stage before means")


def _backend(target: str) -> Backend:
    """The code generator of a target. Starts the process anew with Triton's interpreter where that is needed."""
    if not target.startswith("cuda"):
        return Backend()
    if not triton.knobs.runtime.interpret and not os.environ.get("TRITON_INTERPRET"):
        os.environ["TRITON_INTERPRET"] = "1"  # triton reads it while it is imported
        os.execv(sys.executable, [sys.executable, "-m", "aicc", *sys.argv[1:]])
    return simulated_backend()


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.2g}"


def _show(report: Report, out: object) -> None:
    table = Table(title=report.graph, title_justify="left")
    for column in ("stage", "after"):
        table.add_column(column)
    for column in ("moved in float64", "error in own types"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    unchanged = 0
    for row in report.rows:
        if row.verdict == "unchanged":
            unchanged += 1
            continue
        table.add_row(row.stage, escape(row.name), _number(row.moved), _number(row.error), row.verdict)
    out.print(table)  # type: ignore[attr-defined]
    if unchanged:
        out.print(f"{unchanged} passes changed nothing")  # type: ignore[attr-defined]
    for note in dict.fromkeys(report.notes):
        out.print(escape(f"note: {note}"))  # type: ignore[attr-defined]


_FRAME = ("module", "func", "return", "tile.kernel", "tile.yield", "tensor.yield")
_MEANING = {"bug": "computes something else", "unstable": "has the right algebra, but rounds far more than eager", "crash": "fails"}


def _show_finding(f: Finding, folder: Path, out: object) -> None:
    what = {"import": "the importer", "program": "the compiled program (host code and runtime)"}.get(f.name)
    what = what or (f"the {f.name} code of kernel @{f.verdict.kernel}" if f.stage == "backend" else f"pass '{f.name}' (stage {f.stage})")
    lines = [f"[bold red]{what} {_MEANING[f.verdict.kind]}[/]", f"  {escape(f.verdict.text)}"]
    if f.op:
        lines.append(f"  first op: {escape(f.op)}")
    if f.location.file:
        lines.append(f"  from {escape(short_place(str(f.location)))}")
    commands = write_repro(f, folder)
    if f.reduced is not None:
        ops = sum(1 for o in f.reduced.module.walk() if o.name not in _FRAME)
        size = f"{ops} op" if ops == 1 else f"{ops} ops"
        lines.append(f"  the smallest module that shows it has {size} ({f.reduced.tried} candidates tried); to see it again:")
    lines += [f"    {escape(c)}" for c in commands]
    for line in lines:
        out.print(line, soft_wrap=True)  # type: ignore[attr-defined]
