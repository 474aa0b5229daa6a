"""`aicc run`, `explain` and `env`: what they report, and refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from aicc.compiler.commands.measure import Errors, compare, interleaved_medians
from aicc.compiler.commands.places import short_place

from .conftest import Aicc, refused

Write = Callable[..., Path]


@pytest.mark.parametrize("train", [False, True])
def test_run_reports(aicc: Aicc, mlp: Path, train: bool) -> None:
    result = aicc("run", mlp, "--json", "--seconds", "0.05", *(["--train"] if train else []))
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert [g["name"] for g in report["graphs"]] == (["graph0_forward", "graph1_backward"] if train else ["graph0_inference"])
    for g in report["graphs"]:
        assert set(g["seconds"]) == {"import", "graph", "tensor", "tile", "host", "llvm", "load"} and g["kernels"] >= 1
        assert g["memory"]["arena"] >= g["memory"]["lower_bound"] and g["externs"] == []
    assert report["reference"] == "eager float64"
    assert report["error"]["relative"] < 1e-5
    assert report["milliseconds"]["aicc"] > 0


def test_run_prints_tables(aicc: Aicc, mlp: Path) -> None:
    result = aicc("run", mlp, "--seconds", "0.05")
    assert result.exit_code == 0, result.stderr
    for word in ("graph0_inference", "llvm", "launches", "arena bytes", "lower bound", "max error against eager float64", "times eager's speed"):
        assert word in result.stdout


def test_run_names_what_stays_with_aten(aicc: Aicc, write: Write) -> None:
    path = write("import torch\ndef model(x):\n    return torch.linalg.qr(x)[1] + 1\nexample_inputs = torch.eye(4) + 1\n")
    report = json.loads(aicc("run", path, "--json", "--seconds", "0").stdout)
    (extern,) = report["graphs"][0]["externs"]
    assert "linalg_qr" in extern["target"] and extern["reason"] and "model.py:3" in extern["location"]
    assert "model.py:3" in aicc("explain", path).stdout


def test_run_does_not_touch_the_given_model(aicc: Aicc, write: Write) -> None:
    """Running statistics move in training; each contender has a copy, or the comparison would be of different models."""
    path = write("import torch\nmodel = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))\nexample_inputs = torch.randn(8, 4)\n")
    report = json.loads(aicc("run", path, "--json", "--train", "--seconds", "0.05").stdout)
    assert report["error"]["relative"] < 1e-4


def test_explain(aicc: Aicc, mlp: Path) -> None:
    report = json.loads(aicc("explain", mlp, "--json", "--all").stdout)
    (graph,) = report["graphs"]
    assert graph["graph_ops"]["graph.gelu"] == 1
    assert report["capture"]["recompiled_on_second_call"] == 0 and report["capture"]["guards"] > 0
    assert sum(k["launches"] for k in graph["kernels"]) >= 1
    assert any(r["kind"] == "done" for r in graph["remarks"])
    plain = json.loads(aicc("explain", mlp, "--json").stdout)
    assert all(r["kind"] == "declined" for r in plain["graphs"][0]["remarks"])


def test_env(aicc: Aicc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = json.loads(aicc("env", "--json").stdout)
    assert facts["torch"]["found"] == torch.__version__
    assert "GEMM tiles" in facts["features"]["enables"]
    monkeypatch.setenv("AICC_FEATURES", "avx2,fma")
    assert "8-lane" in json.loads(aicc("env", "--json").stdout)["features"]["enables"]
    monkeypatch.setenv("AICC_STRICT", "perhaps")
    refused(aicc("env"), "AICC_STRICT must be 0 or 1")


def test_refusals(aicc: Aicc, write: Write) -> None:
    refused(aicc("run", write("def model(:\n", "bad.py")), "bad.py:1:11")
    refused(aicc("run", write("inputs = 1\n", "empty.py")), "it has inputs")
    refused(aicc("run", write("import torch\nmodel = torch.nn.Linear(3, 3)\ninputs = torch.ones(1, 4)\n", "shapes.py")), "shapes")
    refused(aicc("run", write("import torch\nmodel = lambda x: x + 1\ninputs = torch.ones(4)\n", "fn.py"), "--train"), "--train")


def test_compare() -> None:
    nan, inf = math.nan, math.inf

    def error(got: list[float], want: list[float]) -> Errors:
        return compare(([torch.tensor(got)], []), ([torch.tensor(want)], []))

    assert error([1.0, 2.5], [1.0, 2.0]) == Errors(0.5, 0.25)
    assert error([nan], [nan]).absolute == error([inf], [inf]).absolute == 0
    assert error([nan], [1.0]).absolute == error([inf], [1.0]).absolute == error([-inf], [inf]).absolute == inf
    assert error([1e-9], [0.0]).relative == pytest.approx(1e-9)
    with pytest.raises(ValueError, match="shapes"):
        error([1.0, 1.0], [1.0])


def test_gradients_that_are_zero_are_measured_against_the_others() -> None:
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert compare(([], [zero + 1e-8, one]), ([], [zero + 1e-18, one])).relative == pytest.approx(1e-8)


def test_interleaved_medians_take_turns() -> None:
    calls: list[str] = []
    medians = interleaved_medians([lambda: calls.append("a"), lambda: calls.append("b")], seconds=0, most=5)
    assert calls == ["a", "b"] * 3 and len(medians) == 2


def test_short_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert short_place("/x/lib/python3.11/site-packages/pkg/a.py:3 (m)") == "pkg/a.py:3 (m)"
    assert short_place(f"{tmp_path}/a.py:3") == "a.py:3"
