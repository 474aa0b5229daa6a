"""docs/numerics.md is what docs/numerics.json says, and the bounds of the vector math hold for what was measured."""

from __future__ import annotations

import json

from aicc.backends.llvm.vecmath import MAX_ULP, UNARY
from aicc.benchmarks import ulp, ulp_docs

DATA = json.loads(ulp_docs.DATA.read_text())


def test_the_page_is_what_was_measured() -> None:
    assert ulp_docs.PAGE.read_text() == ulp_docs.render(DATA), "run benchmarks/ulp_docs.py"


def test_every_function_is_on_the_page() -> None:
    page = ulp_docs.PAGE.read_text()
    assert all(f"`{name}`" in page for name in UNARY) and {r["name"] for r in DATA["rows"]} <= set(UNARY)


def test_the_bounds_hold() -> None:
    for r in DATA["rows"]:
        if r["name"] not in (*ulp.NO_BOUND, *ulp.MASKS):
            assert r["worst"] <= MAX_ULP.get(r["name"], 0.5), r
            assert r["exact"] is None or abs(r["exact"] - r["worst"]) < 0.01, f"the float64 reference is not exact enough there: {r}"


def test_a_measurement_goes_on_where_it_stopped() -> None:
    """One piece of `neg` is missing, and measured; what was found before stays, also of a function that is not asked for."""
    width = (1 << 32) // ulp.PIECES
    before = [{"name": "neg", "inputs": (1 << 32) - width, "worst": 0.25, "at": 3.0, "missing": [5], "bound": 0.5},
              {"name": "erf", "inputs": 0, "worst": 0.0, "at": 0.0, "missing": list(range(ulp.PIECES))}]
    rows = {r["name"]: r for r in ulp.sweep_all(["neg"], 1, 100, frozenset(), before)}
    assert (rows["neg"]["inputs"], rows["neg"]["missing"], rows["neg"]["worst"], rows["neg"]["at"]) == (1 << 32, [], 0.25, 3.0)
    assert rows["neg"]["eager_inputs"] == width // ulp.EAGER_EVERY
    assert (rows["erf"]["inputs"], len(rows["erf"]["missing"])) == (0, ulp.PIECES)
