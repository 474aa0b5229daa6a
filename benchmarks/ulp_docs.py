"""Errors of the float32 functions as a page: what `ulp.py --all --json` measured, kept as docs/numerics.json, and docs/numerics.md made from it.

    python benchmarks/ulp_docs.py ulp.json [more.json ...]     # new measurements: those of the functions in them replace older ones
    python benchmarks/ulp_docs.py                              # the page again
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from aicc.backends.llvm.vecmath import UNARY
from aicc.benchmarks.ulp import MASKS, NO_BOUND

DOCS = Path(__file__).resolve().parents[1] / "docs"
DATA, PAGE = DOCS / "numerics.json", DOCS / "numerics.md"
WHOLE = 1 << 32

__all__ = ["render"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", nargs="*", type=Path)
    options = parser.parse_args()
    data = json.loads(DATA.read_text()) if DATA.exists() else {"rows": []}
    rows = {r["name"]: r for r in data["rows"]}
    for path in options.measured:
        found = json.loads(path.read_text())
        data["machine"] = found["machine"]
        rows |= {r["name"]: _short(r) for r in found["rows"] if r["inputs"] >= rows.get(r["name"], {"inputs": 1})["inputs"]}
    data["rows"] = [rows[name] for name in sorted(rows)]
    lines = ",\n  ".join(json.dumps(r) for r in data["rows"])
    DATA.write_text(f'{{"machine": {json.dumps(data["machine"])},\n "rows": [\n  {lines}\n ]}}\n')
    PAGE.write_text(render(data))
    return 0


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """Without the time, with numbers as short as they are meant, and no NaN, which is no JSON."""
    kept = {k: v for k, v in row.items() if k not in ("seconds", "missing")}
    return kept | {k: None if math.isnan(row[k]) else round(row[k], 4) for k in ("worst", "eager", "exact")}


def render(data: dict[str, Any]) -> str:
    """docs/numerics.md."""
    machine, rows = data["machine"], data["rows"]
    partly = [r for r in rows if r["inputs"] < WHOLE]
    lines = [
        "# Numerics", "",
        "Float32 functions are polynomial code of our own (`backends/llvm/vecmath.py`), the same on every processor and in every lane.",
        "This table is made by `benchmarks/ulp_docs.py` from what `benchmarks/ulp.py --all` measured "
        + ("on **all 2^32 inputs** of every function below" if not partly else "on the inputs given in the last column (all: 2^32)")
        + f" ({machine['processor']},",
        f"torch {machine['torch']}): the largest error in units of the last place of the correctly rounded result, against the float64 function;",
        "the input where it is; the same error once more against mpmath with 60 digits; the bound that the tests hold us to (`MAX_ULP`); on how",
        "many inputs we are NaN, infinite or a zero of the other sign where the rounded exact result is not; and eager's own float32 function on",
        "every 16th block of inputs. 0.5 is correct rounding. A dash: no such number.", "",
        "| function | max ulp | at | by mpmath | bound | differs in kind | eager's max ulp | eager differs in kind |" + " inputs |" * bool(partly),
        "|" + " --- |" * (9 if partly else 8)]
    for r in rows:
        mask = r["name"] in MASKS
        cells = [f"`{r['name']}`", "-" if mask else f"{r['worst']:.3f}", "-" if mask or not r["worst"] else f"{r['at']:.9g}",
                 "-" if r["exact"] is None else f"{r['exact']:.3f}", "-" if mask or r["name"] in NO_BOUND else r["bound"],
                 r["nan"] + r["infinity"] + r["zero"], "-" if mask else _number(r["eager"]), r["eager_kind"]]
        cells += [f"{r['inputs'] / WHOLE:.1%}"] * bool(partly)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    missing = sorted(set(UNARY) - {r["name"] for r in rows})
    if missing:
        lines += ["", f"Not measured on all inputs yet (the tests sample them): {', '.join(f'`{name}`' for name in missing)}."]
    return "\n".join([*lines, "", *PROSE]) + "\n"


def _number(x: float) -> str:
    return f"{x:.3f}" if x < 100 else f"{x:.3g}"


PROSE = """Eager's large errors are places where its vector code gives up precision; ours are listed with their place so that anybody can look.
`lgamma` and `digamma` are the C library's and a series in float64, rounded once: their error in ulps near their roots is that of float64
(and, for `digamma` near its poles, that of the float64 reference).

bfloat16 and float16 are computed in float32 and rounded once at the end of a fused kernel (or where eager rounds, with
`options={"emulate_precision_casts": True}`), float64 functions are the C library's, one call per lane. On GPUs, functions are libdevice's. Special
values of every operator are compared with eager in `tests/ops/test_special_values.py`.

Where eager has NaN or gives up and the exact result exists, aicc has the exact result: `fmod` and `remainder` whose quotient overflows,
`gelu` of infinity, denormal numbers in `log1p` and `erf`. `tests/ops/test_special_values.py` has these rows in its table `EAGER`.
The other way round: on CPUs, where rows outgrow the caches, the mean of a row with an infinity, computed together with its variance,
may be NaN where eager's is infinite (the variance is NaN in both, so that what a norm makes of the row is, too).""".split("\n")


if __name__ == "__main__":
    sys.exit(main())
