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
