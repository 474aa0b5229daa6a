"""`aicc explain`: ops, kernels and ATen calls with their lines; frames, guards, graph breaks and recompilations with what changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from .conftest import refused

Aicc = Callable[..., Result]
Write = Callable[..., Path]

MODEL = """import torch
def model(x, n):
    y = torch.relu(x * n)
    if y.sum() > 3:
        y = y + 1
    print("half way")
    return torch.linalg.qr(y.sin())[1].softmax(-1)
example_inputs = (torch.ones(5, 4), 2)
more_inputs = [(torch.ones(6, 4), 2), (torch.ones(7, 4), 2), (torch.ones(7, 4), 3), (torch.ones(7, 4).double(), 3)]
"""


@pytest.fixture(scope="module")
def report(aicc: Aicc, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    model = tmp_path_factory.mktemp("explain") / "model.py"
    model.write_text(MODEL)
    result = aicc("explain", model, "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout[result.stdout.index("{"):])  # the model prints as well
    return found


def test_graphs(report: dict[str, Any]) -> None:
    first, _, last = report["graphs"][:3]
    assert first["graph_ops"]["graph.relu"] == 1 and first["structured_ops"]["tensor.fused"] >= 1
    (kernel,) = first["kernels"]
    assert kernel["launches"] == 1 and any(place.endswith("model.py:3") for place in kernel["origin"])
    (extern,) = last["externs"]
    assert "linalg_qr" in extern["target"] and "no lowering" in extern["reason"] and extern["location"].endswith("model.py:7")


def test_breaks_have_their_lines(report: dict[str, Any]) -> None:
    first, second = report["capture"]["graph_breaks"]
    assert first["place"].endswith("model.py:4") and first["line"] == "if y.sum() > 3:" and "branch on the value" in first["reason"]
    assert second["place"].endswith("model.py:6") and "print" in second["line"] and "print" in second["reason"]


def test_frames_and_guards(report: dict[str, Any]) -> None:
    frames = report["capture"]["frames"]
    assert [f["function"] for f in frames[:3]] == ["model", "model, from line 4 on", "model, from line 6 on"]
    assert all(f["guards"] > 0 for f in frames) and report["capture"]["guards"] == sum(f["guards"] for f in frames)
    assert any(g.startswith("TENSOR_MATCH") and "x" in g for g in report["capture"]["guard_list"])


def test_recompilations_say_what_changed(report: dict[str, Any]) -> None:
    """A size, then nothing (it is a symbol by now), then a number, then a type."""
    calls = {c["call"]: c["compiled"] for c in report["capture"]["calls"]}
    assert len(calls["example inputs"]) == 3 and calls["the same again"] == [] and calls["more_inputs[1]"] == []
    assert len(calls["more_inputs[0]"]) == 3 and len(calls["more_inputs[2]"]) == 1 and len(calls["more_inputs[3]"]) == 3
    changed = [r["changed"] for r in report["capture"]["recompilations"] if r["function"] == "model"]
    assert "size mismatch at index 0. expected 5, actual 6" in changed[0]
    assert "n == 2" in changed[1]
    assert "dtype mismatch. expected Float, actual Double" in changed[2]


def test_tables(aicc: Aicc, write: Write) -> None:
    text = aicc("explain", write(MODEL), "--all").stdout
    for part in ("2 graph breaks", "recompilations", "expected 5, actual 6", "TENSOR_MATCH", "calls that stay with ATen", "kernels", "remarks"):
        assert part in text


def test_training_and_control_flow(aicc: Aicc, write: Write) -> None:
    path = write("""import torch
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    def forward(self, x):
        return torch.cond(x.sum() > 0, self.a, self.b, (x,)) * 2
def get_inputs():
    return [torch.ones(3, 4)]
""")
    names = [g["name"] for g in json.loads(aicc("explain", path, "--train", "--json").stdout)["graphs"]]
    assert any("forward_true_graph" in n for n in names) and any("backward" in n for n in names)


def test_more_inputs_must_be_a_list(aicc: Aicc, write: Write) -> None:
    refused(aicc("explain", write("import torch\nmodel = torch.nn.ReLU()\ninputs = torch.ones(2)\nmore_inputs = 3\n")), "more_inputs", "list")


def test_times_are_those_of_a_gpu(aicc: Aicc, write: Write) -> None:
    refused(aicc("explain", write("import torch\nmodel = torch.nn.ReLU()\ninputs = torch.ones(2)\n"), "--time"), "--time", "GPU")


def test_launches_in_loops_are_counted_per_trip(aicc: Aicc, write: Write) -> None:
    """Five trips over an outer loop, three over the loop inside it; one kernel before the loops."""
    path = write("""import torch
from torch._higher_order_ops.scan import scan
def model(h, x):
    def inner(c, v):
        return torch.tanh(c + v), v * 2
    def outer(c, v):
        last, ys = scan(inner, c, v)
        return last, ys.sum(0)
    last, ys = scan(outer, h, x.exp().cumsum(-1))
    return last, ys
example_inputs = (torch.ones(4), torch.ones(5, 3, 4))
""")
    (graph,) = json.loads(aicc("explain", path, "--json").stdout)["graphs"]
    kernels = graph["kernels"]
    assert {loop["trips"] for k in kernels for loop in k["in_loops"]} == {5, 15}
    assert sum(k["launches"] for k in kernels) >= 1
    text = aicc("explain", path).stdout
    assert "1 per trip x 15 trips" in text and "per trip x 5 trips" in text
    ran = json.loads(aicc("run", path, "--json").stdout)["graphs"][0]
    assert {loop["trips"] for loop in ran["in_loops"]} == {5, 15} and ran["launches"] == sum(k["launches"] for k in kernels)
