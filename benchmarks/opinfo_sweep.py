"""Every operator of PyTorch's OpInfo database through aicc, compared with eager: a table, and the failures as JSON.

    python benchmarks/opinfo_sweep.py --dtype float32 [--backward] [--shard 0/2] [--samples 2] [--only softmax,sum] --json out.json
    python benchmarks/opinfo_sweep.py --core --json core.json      # the core ATen operators one by one: which are native?

Operators run in a worker process that is started anew when one of them kills it. The statuses are those of
`tests/ops/harness.py`; the native rate is the share of the operators that pass with no ATen call in their graphs.
`operator_docs.py` makes docs/operators.md from the JSON files.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
os.environ["AICC_STRICT"] = "1"
os.environ["AICC_CACHE"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--dynamic", action="store_true", help="symbolic sizes")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th operator from the i-th on")
    parser.add_argument("--core", action="store_true", help="the core ATen operator set instead (tests/ops/core.py)")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=60, help="time limit for each compilation")
    parser.add_argument("--only", default="", help="labels of operators, separated by commas")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options)
    rows = core(options) if options.core else sweep(options)
    if not options.core:
        report(rows, options)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0


# -- the worker: reads labels, writes outcomes as lines of JSON -----------------------------------------------------------


def work(options: argparse.Namespace) -> int:
    import dataclasses
    import warnings

    warnings.simplefilter("ignore")
    from ops.harness import DTYPES, check, every_op, find, label

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what operators print does not belong to the answers
    print(json.dumps([label(op) for op in every_op()]), file=out, flush=True)
    for line in sys.stdin:
        outcome = check(find(line.strip()), DTYPES[options.dtype], samples=options.samples, backward=options.backward,
                        seconds=options.seconds, dynamic=options.dynamic)
        print(json.dumps(dataclasses.asdict(outcome)), file=out, flush=True)
    return 0


class Worker:
    """A worker process; `ask` gives None when it has died or does not answer."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, *sys.argv, "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True, bufsize=1)
        self.labels: list[str] = json.loads(self.process.stdout.readline())  # type: ignore[union-attr]

    def ask(self, label: str, seconds: float) -> dict[str, Any] | None:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(label, file=self.process.stdin, flush=True)
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if ready else ""
        return json.loads(line) if line else None

    def end(self) -> int | None:
        code = self.process.poll()
        self.process.kill()
        self.process.wait()
        return code


def sweep(options: argparse.Namespace) -> list[dict[str, Any]]:
    worker = Worker()
    first, step = (int(x) for x in options.shard.split("/"))
    wanted = options.only.split(",") if options.only else worker.labels[first::step]
    rows: list[dict[str, Any]] = []
    for i, label in enumerate(wanted):
        start = time.perf_counter()
        row = worker.ask(label, 4 * options.seconds * options.samples)
        if row is None:
            code = worker.end()
            time.sleep(0.1)
            row = {"op": label, "dtype": options.dtype, "status": "hang" if code is None else "crash", "externs": [], "reasons": [],
                   "detail": f"the process {'does not answer' if code is None else f'died with {code}'}", "samples": 1, "graphs": 0, "kernels": 0}
            worker = Worker()
        row["backward"] = options.backward
        row["seconds"] = round(time.perf_counter() - start, 2)
        rows.append(row)
        if row["status"] not in ("pass", "eager", "nograph", "known"):
            print(f"[{i + 1}/{len(wanted)}] {label}: {row['status']}\n  {row['detail']}", flush=True)
    worker.end()
    return rows


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    counts = Counter(r["status"] for r in rows)
    passed = [r for r in rows if r["status"] == "pass"]
    native = [r for r in passed if not r["externs"]]
    externs = Counter(e for r in passed for e in set(r["externs"]))
    print(f"\n{options.dtype}{' backward' if options.backward else ''}, {options.samples} sample(s), {len(rows)} operators, "
          f"{sum(r['seconds'] for r in rows):.0f} s")
    for status in ("pass", "nograph", "known", "wrong", "crash", "hang", "declined", "torch", "eager"):
        print(f"  {status:9} {counts[status]:4}")
    print(f"  native    {len(native):4} of {len(passed)} that pass ({100 * len(native) / max(1, len(passed)):.0f} %)")
    print("  externs   " + ", ".join(f"{name.removeprefix('aten.')} {n}" for name, n in externs.most_common(60)))


def core(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per core operator; prints the rate and what is not native, by class."""
    import dataclasses
    import warnings

    warnings.simplefilter("ignore")
    from ops.core import collect, measure

    wanted = options.only.split(",") if options.only else []
    calls = {op: found for op, found in collect().items() if not wanted or op._schema.name.removeprefix("aten::") in wanted}
    rows = list(measure(calls))
    native = sum(r.status == "native" for r in rows)
    print(f"{len(rows)} core operators, {sum(r.calls for r in rows)} calls: {native} native ({100 * native / max(1, len(rows)):.1f} %)")
    for status, n in Counter(r.status for r in rows if r.status != "native").most_common():
        print(f"  {n:4} {status}: " + ", ".join(f"{r.op} {r.native}/{r.calls}" for r in rows if r.status == status))
    for r in rows:
        for failure in r.failures:
            print(f"  {r.op}: {failure}")
    return [{**dataclasses.asdict(r), "status": r.status} for r in rows]


if __name__ == "__main__":
    sys.exit(main())
