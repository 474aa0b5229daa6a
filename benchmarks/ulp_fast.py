"""Largest error of the fast float32 functions (`backends/llvm/vecmath_fast.py`), in ulps, and the table of docs/fast-math.md.

    python -m aicc.benchmarks.ulp_fast [--stride 1] [--seconds S] [--json docs/fast-math.json] [--page docs/fast-math.md] [name ...]

Every `--stride`-th of the 2^32 bit patterns, against torch's float64 function. Counted are inputs whose exact result is a normal number below 2^127.5
(for log: normal inputs); what happens elsewhere is said on the page. `--page` writes the table between the page's two marks.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from aicc.backends.llvm.vecmath_fast import FAST, FAST_MAX_ULP
from aicc.benchmarks.elementwise import REFERENCES, compile_elementwise
from aicc.benchmarks.ulp import ulp_error

__all__ = ["counted", "fast_error", "table"]

CHUNK = 1 << 16
BEGIN, END = "<!-- table: benchmarks/ulp_fast.py -->", "<!-- end of table -->"
SMALLEST, LARGEST = 2.0**-126, 2.0**127.5


@cache
def _kernel(name: str) -> Callable[..., torch.Tensor]:
    return compile_elementwise(name, fast=True)


def counted(name: str, x: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Where the bound holds."""
    size = x if name == "log" else exact.abs()
    return (size >= SMALLEST) & (size < (torch.inf if name == "log" else LARGEST))


def fast_error(name: str, x: torch.Tensor) -> tuple[float, float, int]:
    """(largest error in ulps, where it is, inputs with NaN on one side only)."""
    got, exact = _kernel(name)(x), REFERENCES[name](x.double())
    error = torch.where(counted(name, x, exact), ulp_error(got, exact), 0.0)
    top = int(error.argmax())
    return float(error[top]), float(x[top]), int((got.isnan() != exact.isnan()).sum())


def sweep(name: str, stride: int, until: float) -> dict[str, Any]:
    """One row. Strides start at different patterns of each chunk, so that low bits differ."""
    worst, at, nan, inputs = 0.0, 0.0, 0, 0
    steps = torch.arange(CHUNK, dtype=torch.int64) * stride
    for n, first in enumerate(range(-(1 << 31), 1 << 31, CHUNK * stride)):
        if time.time() > until:
            break
        x = (steps + first + (n * 2654435761) % stride).clamp(max=(1 << 31) - 1).to(torch.int32).view(torch.float32)
        error, where, differ = fast_error(name, x)
        worst, at = max((worst, at), (error, where))
        nan, inputs = nan + differ, inputs + CHUNK
    return {"name": name, "inputs": inputs, "worst": worst, "at": at, "nan": nan, "bound": FAST_MAX_ULP[name]}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| function | inputs measured | max ulp | at | bound | NaN on one side only |", "| --- | --- | --- | --- | --- | --- |"]
    lines += [f"| `{r['name']}` | {r['inputs']:,} | {r['worst']:.2f} | {r['at']:.9g} | {r['bound']} | {r['nan']} |" for r in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=sorted(FAST))
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="per function")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [sweep(name, options.stride, time.time() + options.seconds) for name in options.names]
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.page:
        text = options.page.read_text()
        start, rest = text.split(BEGIN)
        options.page.write_text(f"{start}{BEGIN}\n{table(rows)}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
