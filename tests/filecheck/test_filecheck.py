"""Runs every `*.mlir` file of this folder: `// RUN: aicc opt %s --passes "..."` lines say what to do, `// CHECK` lines what must be printed.

In this process, without subprocesses: the RUN line is read as `aicc opt` would read it. Options: `--passes`, `--target` (generic, avx2, avx512 or cuda),
`--remarks` (appends what the passes said, one per line) and `--check-prefix`. A file may hold several modules, divided by lines of `// -----`.
"""

from __future__ import annotations

import contextlib
import io
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from aicc import passes  # noqa: F401  (registers them)
from aicc.ir import IRError
from aicc.ir.core import equivalent
from aicc.ir.parser import parse_module
from aicc.ir.passes import PassContext, parse_pipeline, run_pipeline
from aicc.ir.printer import print_with_resources
from aicc.ir.verifier import verify
from filecheck.finput import FInput
from filecheck.matcher import Matcher
from filecheck.options import Options
from filecheck.parser import Parser, pattern_for_opts
from support.stages import TARGETS

FOLDER = Path(__file__).parent
FILES = sorted(FOLDER.glob("**/*.mlir"))


@dataclass(frozen=True)
class Run:
    passes: str = ""
    target: str = "generic"
    remarks: bool = False
    prefix: str = "CHECK"


def runs_of(text: str) -> list[Run]:
    """The RUN lines of a file."""
    found = []
    for line in text.splitlines():
        if not line.startswith("// RUN:"):
            continue
        words = shlex.split(line.removeprefix("// RUN:"))
        assert words[:3] == ["aicc", "opt", "%s"], f"a RUN line starts with 'aicc opt %s': {line}"
        options: dict[str, str] = {}
        rest = iter(words[3:])
        for w in rest:
            if w == "--remarks":
                options["remarks"] = "1"
            else:
                assert w in ("--passes", "--target", "--check-prefix"), f"unknown option {w}"
                options[w.removeprefix("--").replace("check-prefix", "prefix")] = next(rest)
        found.append(Run(**{**options, "remarks": "remarks" in options}))  # type: ignore[arg-type]
    return found


def output_of(text: str, run: Run) -> str:
    """What `aicc opt` prints: each module after the passes; an error's message where there is one."""
    printed = []
    for part in text.split("// -----\n"):
        ctx = PassContext(TARGETS[run.target])
        try:
            module = parse_module(part)
            verify(module)
            run_pipeline(module, parse_pipeline(run.passes), ctx)
        except IRError as e:
            printed.append(f"error: {e}\n")
            continue
        out, resources = print_with_resources(module, locations=False)
        assert equivalent(parse_module(out, resources=resources), module), "the result does not survive printing and parsing"
        printed.append(out)
        if run.remarks:
            printed.append("".join(f"{r.pass_name}: {r.kind}: {r.message}\n" for r in ctx.remarks))
    return "".join(printed)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_file(path: Path) -> None:
    text = path.read_text()
    runs = runs_of(text)
    assert runs, "the file has no RUN line"
    for run in runs:
        output = output_of(text, run)
        options = Options(str(path), check_prefixes=[run.prefix])
        log = io.StringIO()
        with contextlib.redirect_stderr(log), contextlib.redirect_stdout(log):
            code = Matcher(options, FInput("output", output), Parser(options, io.StringIO(text), *pattern_for_opts(options))).run()
        assert code == 0, f"{log.getvalue()}\n--- output of --passes \"{run.passes}\"\n{output}"


def test_the_collector_can_fail() -> None:
    options = Options("none")
    with contextlib.redirect_stderr(io.StringIO()):
        code = Matcher(options, FInput("output", "module {"), Parser(options, io.StringIO("// CHECK: func\n"), *pattern_for_opts(options))).run()
    assert code != 0
    assert runs_of('// RUN: aicc opt %s --passes "cse,dce" --target cuda --remarks') == [Run("cse,dce", "cuda", True)]
