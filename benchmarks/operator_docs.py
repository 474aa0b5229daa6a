"""Operator coverage as a page: what `opinfo_sweep.py` measured, kept as a small summary, and docs/operators.md made from it.

    python benchmarks/operator_docs.py --core core.json DIR/*.json                # new measurements: summary and page
    python benchmarks/operator_docs.py --torch 2.11.0 DIR/*.json                  # sweeps made elsewhere, with another torch: their counts alone
    python benchmarks/operator_docs.py                                                    # the page again, from the summary

The summary (docs/operators.json) has the counts of each sweep, one row per operator that is left to ATen, and one per core operator that
is not compiled; nothing on the page is written by hand but its prose.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
SUMMARY, PAGE = ROOT / "docs/operators.json", ROOT / "docs/operators.md"
FAILURES = ("wrong", "crash", "hang", "declined", "torch")
SAME_FOR = 4  # list at most so many operators of OpInfo beside an extern

__all__ = ["render", "summarise"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="*", type=Path, help="what opinfo_sweep.py --json wrote")
    parser.add_argument("--torch", default="", help="the version that the sweeps were made with, if it is not the one here")
    parser.add_argument("--core", type=Path, help="what opinfo_sweep.py --core --json wrote")
    options = parser.parse_args()
    summary = json.loads(SUMMARY.read_text()) if SUMMARY.exists() else {}
    if options.sweeps or options.core:
        core = json.loads(options.core.read_text()) if options.core else None
        summary = summarise([json.loads(p.read_text()) for p in options.sweeps], core, summary, options.torch)
        SUMMARY.write_text(_compact(summary))
    PAGE.write_text(render(summary))
    return 0


# -- the summary ---------------------------------------------------------------------------------------------------------


def summarise(sweeps: Sequence[list[dict[str, Any]]], core: list[dict[str, Any]] | None, before: dict[str, Any],
              elsewhere: str = "") -> dict[str, Any]:
    """The summary of these measurements. A sweep that is not among them keeps its counts from the summary `before`; the operators left to
    ATen are those of the sweeps given, unless they were made with another torch (`elsewhere`: its version)."""
    import torch
    from ops.reasons import class_of
    here = torch.__version__.split("+")[0]
    rows = {(s["dtype"], s["direction"], s.get("torch", here)): s for s in before.get("sweeps", ())}
    externs: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for e in before.get("externs", ()) if sweeps == [] or elsewhere else ():
        externs[e["target"]][e["reason"]] |= set(e["ops"])
    for sweep in sweeps:
        counts = Counter(r["status"] for r in sweep)
        passed = [r for r in sweep if r["status"] == "pass"]
        dtype, direction = sweep[0]["dtype"], "backward" if sweep[0].get("backward") else "forward"
        version = elsewhere or here
        rows[dtype, direction, version] = {
            "dtype": dtype, "direction": direction, "torch": version, "samples": max(r["samples"] for r in sweep), "operators": len(sweep),
            "pass": len(passed), "nograph": counts["nograph"], "known": counts["known"], "eager": counts["eager"],
            "fail": sum(counts[f] for f in FAILURES), "native": sum(not r["externs"] for r in passed),
            "cases": sum(r["samples"] for r in sweep if r["status"] in ("pass", "nograph")),
            "failures": sorted(f"{r['op']}: {r['status']}" for r in sweep if r["status"] in FAILURES),
            "known_rows": sorted({f"{r['op']}: {r['detail']}" for r in sweep if r["status"] == "known"})}
        for r in passed if not elsewhere else ():
            for target, reason in zip(r["externs"], r["reasons"], strict=True):
                externs[target]["" if reason.startswith("no lowering") else reason].add(r["op"])
    made: dict[str, Any] = {"torch": here, "sweeps": [rows[k] for k in sorted(rows)]}
    made["externs"] = [{"target": t, "class": class_of(t, reason), "reason": reason, "ops": sorted(ops)[:SAME_FOR], "count": len(ops)}
                       for t, found in sorted(externs.items()) for reason, ops in sorted(found.items())]
    made["core"] = before.get("core") if core is None else {
        "total": len(core), "native": sum(r["status"] == "native" for r in core), "calls": sum(r["calls"] for r in core),
        "rest": [{"op": r["op"], "status": class_of(f"aten.{r['op']}", "") if r["status"] == "no calls" else r["status"],
                  "calls": r["calls"], "native": r["native"], "complex": r["complex_calls"],
                  "reasons": sorted({why for _, why in r["reasons"]})} for r in core if r["status"] != "native"]}
    return made


def _compact(summary: dict[str, Any]) -> str:
    """JSON with one row of each list on a line, so that differences can be read."""
    parts = []
    for key, value in summary.items():
        if isinstance(value, list):
            rows = ",\n  ".join(json.dumps(v, ensure_ascii=False) for v in value)
            parts.append(f'"{key}": [\n  {rows}\n ]')
        else:
            parts.append(f'"{key}": {json.dumps(value, ensure_ascii=False)}')
    return "{" + ",\n ".join(parts) + "}\n"


# -- the page --------------------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    return [f"| {' | '.join(head)} |", f"|{'|'.join(' --- ' for _ in head)}|",
            *(f"| {' | '.join(str(x).replace('|', chr(92) + '|') for x in row)} |" for row in rows)]


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def render(summary: dict[str, Any]) -> str:
    """docs/operators.md."""
    from ops.reasons import CLASSES
    lines = ["# Operators", "",
             "Every operator of PyTorch's OpInfo database is compiled with `torch.compile(backend=\"aicc\")` and compared with eager under the",
             f"tolerances that OpInfo itself has for it (torch {summary['torch']}, CPU, or the torch in the table).",
             "This page is made by `benchmarks/operator_docs.py` from what `benchmarks/opinfo_sweep.py` measured.", "", "## Results", "",
             "*pass*: every sample agrees. *no graph*: agrees too, but torch handed nothing to the compiler. *known*: differs, for the reason",
             "below. *not in eager*: the operator has no such type or gradient on a CPU, or eager itself fails. *native*: of those that pass, the",
             "share whose graphs have no call to ATen left.", ""]
    lines += _table(("element type", "direction", "torch", "samples each", "pass", "no graph", "known", "fail", "not in eager", "native"), [
        (s["dtype"], s["direction"], s.get("torch", summary["torch"]), s["samples"], s["pass"], s["nograph"], s["known"], s["fail"], s["eager"],
         f"{s['native']} ({_share(s['native'], s['pass'])})") for s in summary["sweeps"]])
    known = sorted({row for s in summary["sweeps"] for row in s["known_rows"]})
    lines += ["", "Known differences (`tests/ops/known.py`):", "", *(f"- `{k.split(': ', 1)[0]}`: {k.split(': ', 1)[1]}" for k in known)]
    failures = sorted({f"{f} ({s['dtype']} {s['direction']}, torch {s.get('torch', summary['torch'])})"
                       for s in summary["sweeps"] for f in s["failures"]})
    if failures:
        lines += ["", "Failures:", "", *(f"- {f}" for f in failures)]
    core = summary.get("core")
    if core:
        inside = core["total"] - sum(r["status"] in ("sorting", "linear algebra", "FFT", "random") for r in core["rest"])
        lines += ["", "## The core operator set", "",
                  f"Of the {core['total']} functional tensor operators that torch tags as core ATen, {core['native']} compile with no call to",
                  f"ATen ({_share(core['native'], core['total'])}). Each was compiled on its own for the calls that eager dispatches while it runs",
                  f"OpInfo's samples, {core['calls']} in all. Calls with complex numbers are not counted: they stay with ATen. Of the",
                  f"{inside} that are neither sorting, linear algebra, FFT nor random, {core['native']} are native",
                  f"({_share(core['native'], inside)}). The others:", ""]
    lines += _table(("operator", "why", "native calls"), [
            (f"`{r['op']}`", r["status"], f"{r['native']} of {r['calls']}" if r["calls"] else "only complex calls") for r in core["rest"]])
    lines += ["", "## Left to ATen", "", "An operator that is left to ATen runs as one call between compiled kernels. The classes:", "",
              *(f"- {name}: {text}" for name, text in CLASSES.items()), ""]
    lines += _table(("operator", "class", "when", "met in"), [
        (f"`{e['target'].removeprefix('aten.')}`", e["class"], e["reason"] or "always",
         ", ".join(e["ops"]) + (f" and {e['count'] - len(e['ops'])} more" if e["count"] > len(e["ops"]) else ""))
        for e in summary["externs"]])
    lines += ["", *ERRORS]
    return "\n".join(lines) + "\n"


ERRORS = """## Data that eager refuses

An index out of range in `gather`, `index_select`, `embedding`, indexing, `take`, `put`, `scatter`, `index_add`, `index_copy`, `index_fill` and
their kin makes the call fail; memory outside of the tensor is neither read nor written. The error is `OutOfRange`, which is an IndexError and
a RuntimeError, since eager raises the one or the other by operator. An integer divided by zero, and a `masked_scatter` with too short a source,
raise RuntimeError on CPUs (on GPUs nothing is checked, as in eager). The error comes at the end of the call: what the graph does
to its arguments in place may have been done. `tests/ops/test_bad_data.py` has the cases.

`max_pool` with indices names the first NaN of a window, where ATen names the last. `fmax`, `fmin` and `relu` may give a zero of the other sign.
`tests/ops/test_special_values.py` compares every unary and binary operator on NaN, infinities, zeros, denormal numbers and overflowing integers, and
lists where eager itself is wrong.

## Rounding

Chains of operators on bfloat16 and float16 are computed in float32 and rounded once, at the end of the fused kernel, so that they are nearer to the
exact result than eager is. `options={"emulate_precision_casts": True}` rounds where eager does.""".split("\n")


if __name__ == "__main__":
    sys.exit(main())
