"""Trains every model under every plan for 50 steps on 2 and 4 processes of this host, and prints the table of docs/distributed.md.

    python tests/distributed/table.py [--models gpt2,llama] [--plans tp,zero3] [--steps 50] [--cores 32] [--seconds 200] [--results rows.json]

Each row: the largest relative difference of a loss from one process, of a parameter at the end, whether the bytes that went to torch.distributed
are those of the IR, and seconds. As many rows run at a time as their ranks have cores. One failing row does not end the run; the exit status says
whether all were right. With `--results` every row is written as it ends, and rows that are right there are not run again: a run that was cut off
goes on. A row whose processes end in anything but success is a failure even if its numbers are right, and is described by `death.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from distributed.death import describe
from distributed.launch import torchrun
from distributed.test_train import EXPERTS, FOUR, TWICE, TWO, WORKER

PLANS: dict[str, tuple[dict[str, Any], int]] = {**{k: (p, 2) for k, p in {**TWO, **FOUR, **EXPERTS}.items()}, **{k: (p, 4) for k, p in TWICE.items()}}


def ranks_of(plan: dict[str, Any]) -> int:
    return int(plan.get("dp", 1) * plan.get("tp", 1) * plan.get("pp", 1) * plan.get("cp", 1))


def row(model: str, plan: dict[str, Any], layers: int, steps: int, logs: Path | None) -> dict[str, Any]:
    """What came of one row: 'right' and 'text', the row's end as printed."""
    ranks, began = ranks_of(plan), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result"
        try:
            done = torchrun(ranks, WORKER, model, json.dumps(plan), str(steps), str(layers), str(out))
        except subprocess.TimeoutExpired as e:
            return {"right": False, "text": f"failed: not done after {e.timeout:.0f} s"}
        written = [json.loads(p.read_text()) for p in (Path(f"{out}.{r}.json") for r in range(ranks)) if p.exists()]
        if done.returncode != 0 and logs is not None:
            logs.mkdir(parents=True, exist_ok=True)
            (logs / f"{model}-{'-'.join(f'{k}{v}' for k, v in plan.items())}.txt").write_text(done.stderr)
    numbers = _compare(written) if len(written) == ranks else {}
    text = f"| {ranks} | {numbers['loss']:.1e} | {numbers['worst']:.1e} | {'as the IR' if numbers['same'] else 'OTHER'} |" if numbers else "|"
    found = {"right": bool(numbers) and numbers["loss"] < 2e-5 and numbers["worst"] < 2e-4 and numbers["same"] and done.returncode == 0,
             "text": f"{text} {time.perf_counter() - began:.0f} |", **numbers}
    if done.returncode != 0:
        found["died"] = describe(done.stderr)
        found["text"] += f" failed: {found['died']}"
    return found


def _compare(results: list[dict[str, Any]]) -> dict[str, Any]:
    loss = max(abs(a - b) / abs(b) for r in results for a, b in zip(r["losses"], r["expected"], strict=True))
    same = all({k: v for k, v in r["bytes"].items() if v} == {k: v for k, v in r["said"].items() if v} for r in results)
    return {"loss": loss, "worst": max(r["worst"] for r in results), "same": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="gpt2,llama,mixtral")
    parser.add_argument("--plans", default=",".join(PLANS))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cores", type=int, default=4, help="rows run side by side while their ranks are no more than this")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no row starts after this many")
    parser.add_argument("--results", type=Path, help="JSON of rows, read first and written after each row")
    parser.add_argument("--first", default="", help="rows to run before all others: model/plan,model/plan")
    parser.add_argument("--logs", type=Path, help="a folder for what failing rows wrote to stderr")
    a = parser.parse_args()
    wanted = [(model, name) for name in a.plans.split(",") for model in a.models.split(",")
              if model == "mixtral" or PLANS[name][0].get("ep", 1) == 1]
    kept: dict[str, Any] = json.loads(a.results.read_text()) if a.results and a.results.exists() else {}
    for model, name in wanted:
        if kept.get(f"{model}/{name}", {}).get("right"):
            print(f"| {model} | {name} {kept[f'{model}/{name}']['text']} (kept)", flush=True)
    wanted = [(m, n) for m, n in wanted if not kept.get(f"{m}/{n}", {}).get("right")]
    first = a.first.split(",")
    wanted.sort(key=lambda x: (f"{x[0]}/{x[1]}" not in first, f"{x[0]}/{x[1]}" in kept))  # what was never run before what failed
    began, good, left = time.monotonic(), True, len(wanted)
    running: dict[Future[dict[str, Any]], tuple[str, str]] = {}
    where = f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    print("| model | plan | ranks | loss | parameters | bytes | s |\n|---|---|---|---|---|---|---|", flush=True)
    with ThreadPoolExecutor(max_workers=a.cores) as pool:
        while wanted or running:
            busy = sum(ranks_of(PLANS[name][0]) for _, name in running.values())
            if wanted and time.monotonic() - began < a.seconds and (not running or busy + ranks_of(PLANS[wanted[0][1]][0]) <= a.cores):
                model, name = wanted.pop(0)
                plan, layers = PLANS[name]
                running[pool.submit(row, model, plan, layers, a.steps, a.logs)] = (model, name)
                continue
            if not running:
                break
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                model, name = running.pop(done)
                found = {**done.result(), "steps": a.steps, "where": where}
                good, left = good and found["right"], left - 1
                print(f"| {model} | {name} {found['text']}", flush=True)
                kept[f"{model}/{name}"] = found
                if a.results:
                    a.results.write_text(json.dumps(kept, indent=1, sort_keys=True))
    if left:
        print(f"{left} rows were not started within {a.seconds:.0f} s", flush=True)
    raise SystemExit(0 if good and not left else 1)


if __name__ == "__main__":
    main()
