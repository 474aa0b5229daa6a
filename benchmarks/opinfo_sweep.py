"""Every operator of PyTorch's OpInfo database through aicc, compared with eager: a table, and the outcomes as JSON.

    python benchmarks/opinfo_sweep.py --everything --samples 4 --jobs 16 --limit 500 --out DIR     # all types; goes on where it stopped
    python benchmarks/opinfo_sweep.py --everything --sweeps float32-backward,bool-forward --limit 500 --out DIR                   # some, likewise
    python benchmarks/opinfo_sweep.py --dtype float32 [--backward] [--shard 0/2] [--samples 2] [--only softmax,sum] --json out.json
    python benchmarks/opinfo_sweep.py --core --json core.json      # the core ATen operators one by one: which are native?

Operators run in worker processes; one that is killed by an operator is started anew. The statuses are those of `tests/ops/harness.py`; the
native rate is the share of the operators that pass with no ATen call in their graphs. DIR gets a file of outcomes per type and direction, from
which `operator_docs.py` makes docs/operators.md; when the limit (in seconds) has passed, what was not run is run by the next call with the same DIR.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import select
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
os.environ["AICC_STRICT"] = "1"
os.environ["AICC_CACHE"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")

TYPES = ("float32", "bfloat16", "float16", "float64", "int64", "bool", "complex64")
SWEEPS = tuple((t, backward) for t in TYPES for backward in (False, True) if not (backward and t in ("int64", "bool")))
FINE = ("pass", "eager", "nograph", "known")
RESTART = 150  # operators that one process compiles, at most: what torch keeps for each adds up


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--everything", action="store_true", help="every type, forward and backward")
    parser.add_argument("--sweeps", default=",".join(map(_name, *zip(*SWEEPS, strict=True))),
                        help="types and directions of --everything, in this order, like float32-backward")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--dynamic", action="store_true", help="symbolic sizes")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th operator from the i-th on")
    parser.add_argument("--core", action="store_true", help="the core ATen operator set instead (tests/ops/core.py)")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=60, help="time limit for each compilation")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds for all of it: later, no operator is begun")
    parser.add_argument("--jobs", type=int, default=1, help="worker processes")
    parser.add_argument("--only", default="", help="labels of operators, separated by commas")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path, help="the folder of --everything")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options)
    if options.everything:
        if options.out is None:
            parser.error("--everything needs --out DIR")
        if unknown := set(options.sweeps.split(",")) - {_name(*s) for s in SWEEPS}:
            parser.error(f"no such sweep: {', '.join(sorted(unknown))}")
        return everything(options)
    rows = core(options) if options.core else sweep(options)
    if not options.core:
        report(rows, options)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0


# -- the worker: reads tasks, writes outcomes, both as lines of JSON -------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One operator at one type in one direction."""

    op: str
    dtype: str
    backward: bool


def work(options: argparse.Namespace) -> int:
    import dataclasses
    import warnings

    warnings.simplefilter("ignore")
    from ops.harness import DTYPES, check, every_op, find, label

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what operators print does not belong to the answers
    print(json.dumps([label(op) for op in every_op()]), file=out, flush=True)
    for line in sys.stdin:
        task = Task(**json.loads(line))
        outcome = check(find(task.op), DTYPES[task.dtype], samples=options.samples, backward=task.backward, seconds=options.seconds,
                        dynamic=options.dynamic)
        print(json.dumps(dataclasses.asdict(outcome)), file=out, flush=True)
    return 0


class Worker:
    """A worker process; `ask` gives None when it has died or does not answer."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, *sys.argv, "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True, bufsize=1)
        first = self.process.stdout.readline()  # type: ignore[union-attr]
        if not first:
            raise RuntimeError(f"the worker does not start; see: {' '.join([sys.executable, *sys.argv, '--worker'])}")
        self.labels: list[str] = json.loads(first)
        self.asked = 0

    def ask(self, task: Task, seconds: float) -> dict[str, Any] | None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.asked += 1
        print(json.dumps(task.__dict__), file=self.process.stdin, flush=True)
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if ready else ""
        return json.loads(line) if line else None

    def end(self) -> int | None:
        code = self.process.poll()
        self.process.kill()
        self.process.wait()
        return code


def run_tasks(tasks: Iterable[Task], worker: Worker, options: argparse.Namespace, until: float, done: Callable[[dict[str, Any]], None]) -> None:
    """Hands every task to one of `options.jobs` workers (`worker` is the first) until the time is over, and each row to `done`."""
    waiting = iter(list(tasks))
    lock = threading.Lock()

    def serve(mine: Worker | None) -> None:
        while True:
            with lock:
                task = next(waiting, None) if time.time() < until else None
            if task is None:
                break
            if mine is None:
                mine = Worker()
            start = time.perf_counter()
            row = mine.ask(task, 4 * options.seconds * options.samples)
            if row is None:
                time.sleep(0.1)
                code = mine.end()
                row = {"op": task.op, "dtype": task.dtype, "status": "hang" if code is None else "crash", "externs": [], "reasons": [],
                       "detail": f"the process {'does not answer' if code is None else f'died with {code}'}", "samples": 1, "graphs": 0, "kernels": 0}
                mine = None
            elif mine.asked >= RESTART:
                mine.end()
                mine = None
            row |= {"backward": task.backward, "asked": options.samples, "seconds": round(time.perf_counter() - start, 2)}
            with lock:
                done(row)
        if mine is not None:
            mine.end()

    threads = [threading.Thread(target=serve, args=(worker if i == 0 else None,)) for i in range(options.jobs)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


def sweep(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One type in one direction."""
    until = time.time() + options.limit
    worker = Worker()
    first, step = (int(x) for x in options.shard.split("/"))
    wanted = options.only.split(",") if options.only else worker.labels[first::step]
    rows: list[dict[str, Any]] = []

    def done(row: dict[str, Any]) -> None:
        rows.append(row)
        _tell(row)

    run_tasks((Task(op, options.dtype, options.backward) for op in wanted), worker, options, until, done)
    return sorted(rows, key=lambda r: wanted.index(r["op"]))


def _tell(row: dict[str, Any]) -> None:
    if row["status"] not in FINE:
        print(f"{row['op']} {row['dtype']}{' backward' if row['backward'] else ''}: {row['status']}\n  {row['detail']}", flush=True)


# -- every type and direction ----------------------------------------------------------------------------------------------


def everything(options: argparse.Namespace) -> int:
    """Runs what is not yet in `options.out`; prints failures as they come, and the table. 1 if something failed."""
    until = time.time() + options.limit
    options.out.mkdir(parents=True, exist_ok=True)
    worker = Worker()
    rows: dict[Task, dict[str, Any]] = {}
    for path in sorted(options.out.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if row["asked"] == options.samples:
                rows[Task(row["op"], row["dtype"], row["backward"])] = row
    first, step = (int(x) for x in options.shard.split("/"))
    wanted = options.only.split(",") if options.only else worker.labels[first::step]
    named = {_name(*s): s for s in SWEEPS}
    sweeps = [named[name] for name in options.sweeps.split(",")]
    tasks = [Task(op, dtype, backward) for dtype, backward in sweeps for op in wanted]

    def done(row: dict[str, Any]) -> None:
        rows[Task(row["op"], row["dtype"], row["backward"])] = row
        with (options.out / f"{_name(row['dtype'], row['backward'])}.jsonl").open("a") as file:
            print(json.dumps(row), file=file)
        _tell(row)

    run_tasks((t for t in tasks if t not in rows), worker, options, until, done)
    print(f"\n| type, direction | samples each | pass | no graph | known | fail | not in eager | native, of pass | not run |\n|{' --- |' * 9}")
    failed = 0
    for dtype, backward in sweeps:
        mine = [rows[t] for op in wanted if (t := Task(op, dtype, backward)) in rows]
        if not mine:
            continue
        (options.out / f"{_name(dtype, backward)}.json").write_text(json.dumps(mine, indent=0))
        counts = Counter(r["status"] for r in mine)
        native = sum(r["status"] == "pass" and not r["externs"] for r in mine)
        bad = len(mine) - sum(counts[s] for s in FINE)
        failed += bad
        cells = (_name(dtype, backward), options.samples, counts["pass"], counts["nograph"], counts["known"], bad, counts["eager"],
                 f"{native} ({100 * native / max(1, counts['pass']):.1f} %)", len(wanted) - len(mine))
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    print(f"{sum(r['samples'] for r in rows.values())} samples, {sum(r['seconds'] for r in rows.values()):.0f} s of worker time")
    return int(failed > 0)


def _name(dtype: str, backward: bool) -> str:
    return f"{dtype}-{'backward' if backward else 'forward'}"


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
