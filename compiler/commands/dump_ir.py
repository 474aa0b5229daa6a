"""`aicc dump-ir`: the text of every level of what a model compiles to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ... import passes  # noqa: F401  (importing passes registers them)
from ...backends.llvm import CompiledObject
from ...ir.core import Operation
from ...ir.passes import parse_pipeline
from ...ir.printer import print_op, save
from ..capture import GraphRecord, Recorder, compile_and_run
from ..driver import cpu_target
from ..errors import UserError
from ..model_file import load
from ..options import Options
from ..pipelines import STAGES, pipeline
from .common import Debug, Dynamic, ModelSpec, Train, reports_errors
from .pass_names import checked_pass

__all__ = ["dump_ir"]

_NATIVE = {"llvm": "ll", "asm": "s"}
_STAGES = (*STAGES, *_NATIVE, "all")


@reports_errors
def dump_ir(
    model: ModelSpec,
    stage: Annotated[str, typer.Option(help=f"One of {', '.join(_STAGES)}.")] = "all",
    after: Annotated[str | None, typer.Option(metavar="PASS", help="The module after each run of this pass instead.", show_default=False)] = None,
    train: Train = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="DIR", help="One file per graph and stage.", show_default=False)] = None,
    dynamic: Dynamic = None,
    locations: Annotated[bool, typer.Option(help="Print the Python location of each op.")] = True,
    debug: Debug = False,
) -> None:
    """Print the IR of MODEL at every stage, as text that `aicc opt` reads.

    Constants above 1 KiB print as a hash; with -o their bytes are in the folder FILE.resources beside the file.
    """
    if stage not in _STAGES:
        raise UserError(f"unknown stage '{stage}'; one of {', '.join(_STAGES)}")
    options = Options.from_user(options={"strict": True, "cache": False})
    if after is not None:
        _check_in_pipeline(checked_pass(after), options)
    recorder = Recorder(stages=after is None, after=(after,) if after is not None else ())
    with recorder.watching():
        compile_and_run(load(model), options, train=train, dynamic=dynamic)
    if not recorder.graphs:
        raise UserError(f"'{model}' ran, but nothing in it was compiled")
    wanted = [s for s in (*STAGES, *_NATIVE) if stage in (s, "all")]
    if output is not None:
        _make_folder(output)
    for graph in recorder.graphs:
        for title, suffix, content in _sections(graph, wanted, after is not None):
            if output is not None:
                path = output / f"{graph.title}.{title.replace(' ', '_')}.{suffix}"
                _write(content, path, locations)
                typer.echo(path)
            else:
                typer.echo(f"{'//' if suffix == 'aicc' else ';' if suffix == 'll' else '#'} ===== {graph.title}: {title}")
                typer.echo(content if isinstance(content, str) else print_op(content, locations=locations))


def _sections(graph: GraphRecord, wanted: list[str], after: bool) -> list[tuple[str, str, Operation | str]]:
    """(title, file suffix, content) in order."""
    if after:
        return [(f"{stage} {i} after {p.partition('{')[0]}", "aicc", m) for i, (stage, p, m) in enumerate(graph.after)]
    rows: list[tuple[str, str, Operation | str]] = [(s, "aicc", graph.stages[s]) for s in wanted if s in graph.stages]
    c = graph.compilation
    if c is None:
        return rows
    if "llvm" in wanted:
        rows.append(("llvm", "ll", c.llvm_ir))
    if "asm" in wanted:
        rows.append(("asm", "s", CompiledObject(b"", c.llvm_ir, (), {}, {}, c.target).asm))
    return rows


def _check_in_pipeline(name: str, options: Options) -> None:
    target = cpu_target(options)
    used = {p.name for s in STAGES for p in parse_pipeline(pipeline(s, target, options))}
    if name not in used:
        raise UserError(f"pass '{name}' is not in the pipeline of {target.kind}; it has {', '.join(sorted(used))}")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"'{path}' is a file; -o needs a folder") from None


def _write(content: Operation | str, path: Path, locations: bool) -> None:
    if isinstance(content, str):
        path.write_text(content)
    else:
        save(content, path, locations=locations)
