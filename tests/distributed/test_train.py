"""Training on several ranks gives the losses of one process, and moves the bytes that the IR says."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .launch import ROOT, torchrun

WORKER = Path(__file__).parent / "worker.py"


def start(folder: Path, *runs: tuple[str, dict[str, Any], int, int]) -> subprocess.CompletedProcess[str]:
    """Trains one (model, plan, steps, layers) after the other in the same processes; rank r of run i writes `folder`/i.r.json."""
    (count,) = {ranks(plan) for _, plan, _, _ in runs}
    return torchrun(count, WORKER, *[str(x) for i, (model, plan, steps, layers) in enumerate(runs) for x in (model, json.dumps(plan), steps, layers, folder / str(i))],
                    timeout=300 + 100 * len(runs))


def ranks(plan: dict[str, Any]) -> int:
    return plan.get("dp", 1) * plan.get("tp", 1) * plan.get("pp", 1) * plan.get("cp", 1)


def compared(done: subprocess.CompletedProcess[str], out: Path, plan: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """The results of all ranks, which agree with each other and with one process."""
    files = [Path(f"{out}.{r}.json") for r in range(ranks(plan))]
    assert all(f.exists() for f in files), done.stderr[-3000:]
    results = [json.loads(f.read_text()) for f in files]
    for result in results:
        assert result["losses"] == pytest.approx(result["expected"], rel=2e-5)
        assert result["worst"] < 2e-4
        assert {k: v for k, v in result["bytes"].items() if v} == {k: v for k, v in result["said"].items() if v}
        assert len(result["losses"]) == steps and result["moved"] > 20 * 2e-4  # it does train
    assert all(r["losses"] == pytest.approx(results[0]["losses"], rel=1e-6) for r in results)
    assert done.returncode == 0, done.stderr[-3000:]
    return results


def train_all(folder: Path, model: str, plans: dict[str, dict[str, Any]], layers: int = 2) -> list[list[dict[str, Any]]]:
    """Runs plans for as many ranks one after the other in the same processes; whichever of them differ from one process are named."""
    done = start(folder, *[(model, plan, 50, layers) for plan in plans.values()])
    found, failures = [], {}
    for i, (name, plan) in enumerate(plans.items()):
        try:
            found.append(compared(done, folder / str(i), plan, 50))
        except AssertionError as e:
            failures[name] = str(e)
    assert not failures, "\n".join(f"{name}: {what}" for name, what in failures.items())
    return found


SHORT = {
    "tp+sp": ("llama", {"tp": 2, "sp": True, "micro_batch": 8}, 3, 1),
    "zero3": ("gpt2", {"dp": 2, "zero": 3, "micro_batch": 4}, 3, 1),
    "cp ring": ("llama", {"cp": 2, "context": "ring", "micro_batch": 2}, 3, 1),
}
"""One after the other in the same two processes: half of a run is starting them."""


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("short")
    done = start(folder, *SHORT.values())
    return lambda name: compared(done, folder / str(list(SHORT).index(name)), SHORT[name][1], SHORT[name][2])


def test_tensor_parallel_with_sequence(short: Callable[[str], list[dict[str, Any]]]) -> None:
    results = short("tp+sp")
    assert results[0]["bytes"]["reduce_scatter"] > 0
    assert results[0]["held"] < 0.55 * results[0]["all"]


def test_zero_3(short: Callable[[str], list[dict[str, Any]]]) -> None:
    results = short("zero3")
    assert results[0]["held"] < 0.55 * results[0]["all"]


def test_ring_attention(short: Callable[[str], list[dict[str, Any]]]) -> None:
    """Keys and values of the layer go round forward, and backward with their gradients: two messages forward, two and two and two backward."""
    results = short("cp ring")
    block = 2 * 32 * 16 * 4 // 2  # bytes of one rank's keys: micro-batch, width, sequence, float32
    assert results[0]["bytes"]["shift"] == 4 * 8 * block
    assert results[0]["bytes"].get("all_to_all", 0) < block  # of labels, which are shifted by one


TWO = {
    "dp": {"dp": 2, "micro_batch": 4}, "accumulated": {"dp": 2, "micro_batch": 1},
    "tp": {"tp": 2, "micro_batch": 8}, "tp+sp": {"tp": 2, "sp": True, "micro_batch": 8},
    "zero1": {"dp": 2, "zero": 1, "micro_batch": 4}, "zero2": {"dp": 2, "zero": 2, "micro_batch": 4}, "zero3": {"dp": 2, "zero": 3, "micro_batch": 4},
    "pp": {"pp": 2, "micro_batch": 2, "schedule": "1f1b"}, "zb-h1": {"pp": 2, "micro_batch": 2, "schedule": "zb-h1"},
    "cp": {"cp": 2, "micro_batch": 1}, "cp ring": {"cp": 2, "context": "ring", "micro_batch": 2}, "tp+sp recompute": {"tp": 2, "sp": True, "micro_batch": 8, "recompute": "full"},
    "zero2 recompute offload": {"dp": 2, "zero": 2, "micro_batch": 4, "recompute": "selective", "offload": True},
}
FOUR = {
    "tp4": {"tp": 4, "micro_batch": 8}, "dp2 tp2+sp zero3": {"dp": 2, "tp": 2, "sp": True, "zero": 3, "micro_batch": 4},
    "dp4 zero2": {"dp": 4, "zero": 2, "micro_batch": 2}, "pp2 dp2 zero1": {"pp": 2, "dp": 2, "zero": 1, "micro_batch": 1, "schedule": "1f1b"},
    "dp2 cp2 ring zero1": {"dp": 2, "cp": 2, "context": "ring", "zero": 1, "micro_batch": 2},
    "pp2 tp2": {"pp": 2, "tp": 2, "micro_batch": 2, "schedule": "1f1b"},
}
EXPERTS = {"ep2": {"dp": 2, "ep": 2, "micro_batch": 4}, "dp2 tp2 ep2 zero2": {"dp": 2, "tp": 2, "ep": 2, "zero": 2, "micro_batch": 4},
           "ep4 zero1": {"dp": 4, "ep": 4, "zero": 1, "micro_batch": 2}}
TWICE = {"interleaved": {"pp": 2, "micro_batch": 2, "schedule": "interleaved", "interleave": 2}, "zb-v": {"pp": 2, "micro_batch": 2, "schedule": "zb-v"},
         "dualpipe-v": {"pp": 2, "micro_batch": 2, "schedule": "dualpipe-v"}}
"""Two parts of the model per rank."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("plans", [TWO, FOUR], ids=["two", "four"])
@pytest.mark.parametrize("model", ["gpt2", "llama", "mixtral"])
def test_ranks(tmp_path: Path, model: str, plans: dict[str, dict[str, Any]]) -> None:
    train_all(tmp_path, model, plans)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("model", ["gpt2", "llama", "mixtral"])
def test_two_parts_per_rank(tmp_path: Path, model: str) -> None:
    train_all(tmp_path, model, TWICE, layers=4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [2, 4])
def test_experts(tmp_path: Path, count: int) -> None:
    for results in train_all(tmp_path, "mixtral", {name: plan for name, plan in EXPERTS.items() if ranks(plan) == count}):
        assert results[0]["bytes"]["all_to_all"] > 0


@pytest.mark.slow
def test_example() -> None:
    done = torchrun(2, ROOT / "examples" / "train_sharded.py")
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0] - 1.5
