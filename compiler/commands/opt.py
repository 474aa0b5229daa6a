"""`aicc opt`: IR text in, passes, IR text out."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from ...backends.llvm import host_target
from ...ir.core import Operation, equivalent
from ...ir.parser import ParseError, load, parse_module
from ...ir.passes import Pass, PassContext, registered_passes, run_pipeline
from ...ir.printer import print_op, print_with_resources, save
from ...ir.target import GENERIC_CPU, Target
from ...ir.verifier import VerificationError, verify
from ..errors import UserError
from .common import Debug, reports_errors
from .pass_names import checked_pipeline

__all__ = ["opt", "parse_target"]


@reports_errors
def opt(
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="IR text; - for standard input.", show_default=False)] = None,
    pipeline: Annotated[str, typer.Option("--passes", metavar="PIPELINE", help="Such as \"canonicalize,cse,fuse{max-bytes=4096}\".")] = "",
    verify_roundtrip: Annotated[bool, typer.Option(help="Check at every step that the printed text parses back to the same IR.")] = False,
    print_after_each: Annotated[bool, typer.Option(help="Print the module after each pass, to standard error.")] = False,
    target: Annotated[str, typer.Option(help="cpu (this machine), generic, cpu:FEATURE,FEATURE... or cuda:90.")] = "cpu",
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write here, large constants beside it.",
                                                show_default=False)] = None,
    locations: Annotated[bool, typer.Option(help="Print the Python location of each op.")] = False,
    remarks: Annotated[bool, typer.Option(help="Print what the passes did and declined, to standard error.")] = False,
    list_passes: Annotated[bool, typer.Option("--list-passes", help="Name every pass with its options, and stop.")] = False,
    debug: Debug = False,
) -> None:
    """Read IR from FILE, run passes over it, print the result. The module is verified after reading and after each pass."""
    if list_passes:
        typer.echo(_pass_list(), nl=False)
        return
    if file is None:
        raise UserError("no FILE given; use - to read standard input (`aicc dump-ir` makes such files)")
    steps = checked_pipeline(pipeline)
    ctx = PassContext(parse_target(target))
    module = _read(file)
    if verify_roundtrip:
        _check_roundtrip(module, f"reading {file}")

    def after_each(p: Pass, m: Operation) -> None:
        if verify_roundtrip:
            _check_roundtrip(m, f"pass '{p.name}'")
        if print_after_each:
            typer.echo(f"// ===== after {p}\n{print_op(m, locations=locations)}", err=True)

    run_pipeline(module, steps, ctx, after_each=after_each)
    if remarks:
        for r in ctx.remarks:
            typer.echo(f"{r.pass_name}: {r.kind}: {r.message}" + (f" at {r.location}" if r.location.file else ""), err=True)
    if output is not None:
        save(module, output, locations=locations)
    else:
        typer.echo(print_op(module, locations=locations), nl=False)


def parse_target(text: str) -> Target:
    """The target that an option names. UserError for what names none."""
    if text == "generic":
        return GENERIC_CPU
    if text in ("cpu", "host"):
        return host_target()
    kind, _, rest = text.partition(":")
    if kind == "cpu" and rest:
        return host_target([f.strip() for f in rest.split(",") if f.strip()])
    if kind == "cuda" and re.fullmatch(r"\d{2,3}", rest):
        return Target(kind="cuda", name=f"sm_{rest}", capability=int(rest), multiprocessors=132 if rest == "90" else 108)
    raise UserError(f"unknown target '{text}'; use cpu, generic, cpu:avx2,fma or cuda:90")


def _read(file: Path) -> Operation:
    if str(file) == "-":
        module = parse_module(sys.stdin.read(), filename="<stdin>")
    else:
        try:
            module = load(file)
        except IsADirectoryError:
            raise UserError(f"'{file}' is a folder") from None
        except OSError as e:
            raise UserError(f"'{file}' cannot be read: {e.strerror or e}") from e
    try:
        verify(module)
    except VerificationError as e:
        raise UserError(f"{file} holds invalid IR: {e}") from e
    return module


def _check_roundtrip(module: Operation, when: str) -> None:
    text, resources = print_with_resources(module)
    try:
        again = parse_module(text, filename=f"<printed after {when}>", resources=resources)
    except ParseError as e:
        raise AssertionError(f"after {when} the printed IR does not parse: {e}") from e
    if not equivalent(module, again, locations=True):
        raise AssertionError(f"after {when} the printed IR parses to something else")


def _pass_list() -> str:
    lines = []
    for name, cls in registered_passes().items():
        fields = " ".join(f"{f.name.replace('_', '-')}={str(f.default).lower() if isinstance(f.default, bool) else f.default}"
                          for f in dataclasses.fields(cls))
        first = (cls.__doc__ or "").strip().splitlines()[0]
        if first.startswith("See the module docstring"):
            first = (sys.modules[cls.__module__].__doc__ or "").strip().splitlines()[0]
        lines.append(f"{name}{'{' + fields + '}' if fields else ''}\n    {first}\n")
    return "".join(lines)
