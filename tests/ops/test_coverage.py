"""docs/operators.md is what its summary says, and the summary agrees with the tables of the frontend."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from aicc.frontend.decompositions import decomposition_table
from aicc.frontend.ops import TABLE

from .core import core_overloads
from .known import KINDS, KNOWN, known
from .reasons import CLASSES, class_of

ROOT = Path(__file__).parents[2]
SUMMARY: dict[str, Any] = json.loads((ROOT / "docs/operators.json").read_text())


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("operator_docs", ROOT / "benchmarks/operator_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_summary_says() -> None:
    assert (ROOT / "docs/operators.md").read_text() == _generator().render(SUMMARY), "run benchmarks/operator_docs.py"


def test_the_summary_is_small() -> None:
    assert (ROOT / "docs/operators.json").stat().st_size < 100_000


def test_externs_without_a_lowering_have_none() -> None:
    """An operator that is always left to ATen has neither a row nor a decomposition; one that declines at times has a row."""
    if SUMMARY["torch"] != torch.__version__.split("+")[0]:
        pytest.skip("measured with another torch")
    decompositions = {str(op) for op in decomposition_table()}
    for e in SUMMARY["externs"]:
        target, reason = e["target"], e["reason"]
        if reason == "":
            assert target not in TABLE, f"{target} has a lowering now: measure again"
        elif reason not in ("called for its effect", "random numbers come from torch's generator"):
            assert target in TABLE, f"{target} is said to decline at times, but has no lowering"
        if reason == "" and target in decompositions:
            assert target.split(".")[1] in _DECLINED, f"{target} is taken apart: why is it left to ATen?"


_DECLINED = ("_embedding_bag_backward", "rrelu_with_noise_backward", "bernoulli", "angle")
"""Operators whose decomposition declines some calls."""


def test_classes() -> None:
    assert {e["class"] for e in SUMMARY["externs"]} <= CLASSES.keys()
    assert all(e["class"] == class_of(e["target"], e["reason"]) for e in SUMMARY["externs"])


def test_core_operators_without_a_way_are_known() -> None:
    """Every core operator has a row or a decomposition, but for those that the summary says are left to ATen."""
    decompositions = decomposition_table()
    without = {str(op).removeprefix("aten.") for op in core_overloads() if str(op) not in TABLE and op not in decompositions}
    said = {r["op"] for r in SUMMARY["core"]["rest"]}
    composite = {"upsample_nearest2d.vec", "_local_scalar_dense.default"}  # taken apart by torch, and read by the importer itself
    assert without - composite <= said
    assert not {r["op"] for r in SUMMARY["core"]["rest"] if r["status"] in ("fails", "no calls") and r["calls"]}


def test_no_sweep_fails() -> None:
    found = {(s["dtype"], s["direction"], s.get("torch", SUMMARY["torch"])): s["failures"] for s in SUMMARY["sweeps"] if s["fail"]}
    assert not found


def test_rows_of_known_differences() -> None:
    assert Counter(kind for _, kind in KNOWN).keys() <= set(KINDS)
    assert known("pinverse", "torch", "complex64") and not known("pinverse", "torch", "float32")
