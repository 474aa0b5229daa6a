"""`aicc bisect` names planted faults, reduces them, and takes rounding for what it is."""

from __future__ import annotations

import linecache
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from aicc.compiler.bisect import Finding, Report, bisect_graph, capture, replay, write_repro
from aicc.compiler.bisect.evaluate import function_of
from aicc.compiler.cli import app
from aicc.compiler.commands.opt import parse_target
from aicc.compiler.model_file import LoadedModel
from aicc.compiler.options import Options
from aicc.passes.canonicalize import Canonicalize
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))

from planted import PLANTED, Planted, r
from planted_kernels import PLANTED_KERNELS, plant_a_wrong_order, products
from planted_later import PLANTED_LATER

ALL = PLANTED | PLANTED_LATER | PLANTED_KERNELS

OPTIONS = Options(strict=True, cache=False)


def bisect(model: Any, inputs: tuple[Any, ...], target: str = "cpu", train: bool = False, **how: Any) -> list[Report]:
    given = tuple(x.clone().requires_grad_(train and x.is_floating_point()) for x in inputs)
    graphs = capture(LoadedModel("model", model, given, {}), train=train, **how)
    return [bisect_graph(g, OPTIONS, target=None if target == "cpu" else parse_target(target), seconds=30) for g in graphs]


def bisect_planted(case: Planted) -> list[Report]:
    return bisect(case.program, case.inputs, case.target, case.train)


def only_finding(reports: list[Report]) -> Finding:
    (finding,) = [report.finding for report in reports if report.finding is not None]
    return finding


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "turn-streams")) for name in ALL])
def test_a_planted_fault_is_named(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = ALL[name]
    with monkeypatch.context() as m:
        case.plant(m)
        finding = only_finding(bisect_planted(case))
        assert finding.name == case.where, (finding.name, finding.verdict)
        assert finding.verdict.kind == "bug", finding.verdict
        assert finding.op
        assert finding.location.file == case.file, finding.location
        line = linecache.getline(finding.location.file, finding.location.line)
        assert case.line in line, (line, finding.op)
        if finding.reduced is not None:
            ops = [op for op in function_of(finding.reduced.module).body if op.name != "return"]
            assert len(ops) <= case.most_ops, finding.reduced.module
        commands = write_repro(finding, tmp_path / "repro")
        assert commands[0] == f"aicc bisect --replay {tmp_path / 'repro'}"
        again = replay(tmp_path / "repro")
        assert again is not None and again.kind == "bug", "the repro does not show the fault again"
    assert replay(tmp_path / "repro") is None, "without the fault, the repro is right"


def test_nothing_is_found_in_the_same_programs_without_faults() -> None:
    for case in PLANTED.values():
        for report in bisect_planted(case):
            assert report.finding is None, (case.where, report.finding)


_QUIET = [pytest.param(name, marks=[pytest.mark.slow] * ("stream" in name)) for name, case in (PLANTED_LATER | PLANTED_KERNELS).items()
          if case.target == "cpu"]


@pytest.mark.parametrize("name", _QUIET)
def test_loops_and_streams_without_faults_are_right(name: str) -> None:
    for report in bisect_planted(ALL[name]):
        assert report.finding is None, report.finding


def block(dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.LayerNorm(32), torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 32), torch.nn.Softmax(-1)).to(dtype)


@pytest.mark.parametrize("train", [False, True])
def test_bfloat16_is_legal_rounding(train: bool) -> None:
    reports = bisect(block(torch.bfloat16), (r(8, 32).bfloat16(),), train=train)
    assert len(reports) == 1 + train
    for report in reports:
        assert report.finding is None
        errors = [row.error for row in report.rows if row.error is not None]
        assert max(errors) > 1e-3, "the rounding of bfloat16 is there to be judged"
        assert all(row.moved is None or row.moved < 1e-12 for row in report.rows)


def test_an_unstable_rewrite_is_not_called_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    """(x + 1e6) - 1e6 is the same algebra, and loses six digits."""
    true = Canonicalize.run

    def wrong(self: Canonicalize, module: Any, ctx: Any) -> None:
        true(self, module, ctx)
        for op in [o for o in module.walk() if o.name == "graph.tanh"]:
            from_ = op.operands[0]
            make = type(op).create
            big = make("graph.full", (), {"value": 1e6}, [from_.type], location=op.location)
            up = make("graph.add", [from_, big.result], {}, [from_.type], location=op.location)
            down = make("graph.sub", [up.result, big.result], {}, [from_.type], location=op.location)
            for new in (big, up, down):
                op.parent.insert_before(op, new)
            op.set_operand(0, down.result)
    monkeypatch.setattr(Canonicalize, "run", wrong)
    finding = only_finding(bisect(lambda x: torch.tanh(x * 2), (r(40),)))
    assert (finding.name, finding.verdict.kind) == ("canonicalize", "unstable")


def test_a_pass_that_raises_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, module: Any, ctx: Any) -> None:
        if any(op.name == "graph.tanh" for op in module.walk()):
            raise ZeroDivisionError("no such luck")
    monkeypatch.setattr(Canonicalize, "run", broken)
    finding = only_finding(bisect(lambda x: (x * 2).tanh().exp() + x.sin(), (r(9),)))
    assert (finding.name, finding.verdict.kind) == ("canonicalize", "crash")
    assert "ZeroDivisionError" in finding.verdict.text and "tanh" in finding.op


def test_an_order_that_breaks_the_flow_of_data_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_a_wrong_order(monkeypatch)
    finding = only_finding(bisect(lambda x, y: products(products(x, y), y), (r(24, 24), r(24, 24))))
    assert (finding.name, finding.verdict.kind) == ("schedule", "crash"), finding.verdict


def test_dynamic_sizes_and_operators_of_aten() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        values, _ = torch.mode(x * 2, dim=-1)
        return values.cumsum(-1) / x.shape[0]
    (report,) = bisect(program, (r(5, 9),), dynamic=True)
    assert report.finding is None and len(report.rows) > 10


def test_random_numbers_are_drawn_alike_at_every_stage() -> None:
    (report,) = bisect(lambda x: torch.nn.functional.dropout(x, 0.5, training=True) * 2, (r(30),))
    assert report.finding is None
    assert any("random" in note for note in report.notes)


MODEL = """
import torch
def model(x):
    torch._dynamo.graph_break() if {breaks} else None
    return torch.relu(x + 1) * 2
example_inputs = (torch.linspace(-3, 3, 20),)
"""


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, run = tmp_path / "m.py", CliRunner().invoke
    file.write_text(MODEL.format(breaks=False))
    right = run(app, ["bisect", str(file)])
    assert right.exit_code == 0 and "legal rounding only" in right.stdout, right.output
    assert "there is no graph 3: torch makes 1 of this model" in run(app, ["bisect", str(file), "--graph", "3"]).output
    PLANTED["decompose"].plant(monkeypatch)
    wrong = run(app, ["bisect", str(file), "-o", str(tmp_path / "found")])
    assert wrong.exit_code == 1, wrong.output
    assert "pass 'decompose' (stage tensor) computes something else" in wrong.stdout and "graph.relu" in wrong.stdout
    assert f"{file}:5" in wrong.stdout.replace("\n", "")
    assert sorted(p.name for p in (tmp_path / "found").iterdir()) == ["inputs.pt", "repro.json", "repro.mlir"]
    again = run(app, ["bisect", "--replay", str(tmp_path / "found")])
    assert again.exit_code == 1 and "still wrong (bug)" in again.stdout
    shown = run(app, ["opt", str(tmp_path / "found" / "repro.mlir"), "--passes", "decompose"])
    assert shown.exit_code == 0 and "arith.max" in shown.stdout
    assert run(app, ["bisect", "--replay", str(tmp_path)]).exit_code == 2
    assert run(app, ["bisect"]).exit_code == 2


TRITON = """
import sys
sys.path.insert(0, {folder!r})
import torch
from aicc.backends.triton import arith
from aicc.compiler.bisect import bisect_graph, capture
from aicc.compiler.bisect.triton import simulated_backend
from aicc.compiler.commands.opt import parse_target
from aicc.compiler.model_file import LoadedModel
from aicc.compiler.options import Options

def program(x):
    y = x * 2
    return torch.minimum(y, x + 1).exp()

arith.TABLE["min"] = arith.TABLE["max"]
(graph,) = capture(LoadedModel("m", program, (torch.randn(40),), {{}}))
finding = bisect_graph(graph, Options(cache=False), target=parse_target("cuda:90"), backend=simulated_backend()).finding
print(finding.name, finding.verdict.kind, finding.op)
"""


def test_a_fault_of_the_triton_printer_is_named() -> None:
    done = subprocess.run([sys.executable, "-c", TRITON.format(folder=str(Path(__file__).parent))], capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("triton bug") and "arith.min" in done.stdout
