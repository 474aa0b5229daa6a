"""Trains every model under every plan for 50 steps on 2 and 4 processes of this host, and prints the table of docs/distributed.md.

    python tests/distributed/table.py [--models gpt2,llama] [--plans tp,zero3] [--steps 50] [--cores 32] [--seconds 200]

Each row: the largest relative difference of a loss from one process, of a parameter at the end, whether the bytes that went to torch.distributed
are those of the IR, and seconds. As many rows run at a time as their ranks have cores. One failing row does not end the run; the exit status says
whether all were right.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from distributed.launch import torchrun
from distributed.test_train import EXPERTS, FOUR, TWICE, TWO, WORKER

PLANS: dict[str, tuple[dict[str, Any], int]] = {**{k: (p, 2) for k, p in {**TWO, **FOUR, **EXPERTS}.items()}, **{k: (p, 4) for k, p in TWICE.items()}}


def ranks_of(plan: dict[str, Any]) -> int:
    return int(plan.get("dp", 1) * plan.get("tp", 1) * plan.get("pp", 1) * plan.get("cp", 1))


def row(model: str, plan: dict[str, Any], layers: int, steps: int) -> tuple[bool, str]:
    ranks, began = ranks_of(plan), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result"
        try:
            done = torchrun(ranks, WORKER, model, json.dumps(plan), str(steps), str(layers), str(out))
        except subprocess.TimeoutExpired as e:
            return False, f"failed: not done after {e.timeout:.0f} s"
        if done.returncode != 0:
            lines = [x for x in done.stderr.splitlines() if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception): ", x)]
            crashed = [x.strip() for x in done.stderr.splitlines() if re.search(r"Fatal Python error|what\(\):|exitcode +: -|Signal|^  File .*line", x)]
            raised = [x for x in lines if "closed by peer" not in x and "ChildFailed" not in x] or crashed[:6] or lines or ["no message"]
            return False, f"failed: {' / '.join(dict.fromkeys(x[:200] for x in raised[:6]))}"
        results = [json.loads(Path(f"{out}.{r}.json").read_text()) for r in range(ranks)]
    loss = max(abs(a - b) / abs(b) for r in results for a, b in zip(r["losses"], r["expected"], strict=True))
    worst = max(r["worst"] for r in results)
    same = all({k: v for k, v in r["bytes"].items() if v} == {k: v for k, v in r["said"].items() if v} for r in results)
    return loss < 2e-5 and worst < 2e-4 and same, f"| {ranks} | {loss:.1e} | {worst:.1e} | {'as the IR' if same else 'OTHER'} | " \
                                                 f"{time.perf_counter() - began:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="gpt2,llama,mixtral")
    parser.add_argument("--plans", default=",".join(PLANS))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cores", type=int, default=4, help="rows run side by side while their ranks are no more than this")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no row starts after this many")
    a = parser.parse_args()
    wanted = [(model, name) for name in a.plans.split(",") for model in a.models.split(",")
              if model == "mixtral" or PLANS[name][0].get("ep", 1) == 1]
    began, good, left = time.monotonic(), True, len(wanted)
    running: dict[Future[tuple[bool, str]], tuple[str, str]] = {}
    print("| model | plan | ranks | loss | parameters | bytes | s |\n|---|---|---|---|---|---|---|", flush=True)
    with ThreadPoolExecutor(max_workers=a.cores) as pool:
        while wanted or running:
            busy = sum(ranks_of(PLANS[name][0]) for _, name in running.values())
            if wanted and time.monotonic() - began < a.seconds and (not running or busy + ranks_of(PLANS[wanted[0][1]][0]) <= a.cores):
                model, name = wanted.pop(0)
                plan, layers = PLANS[name]
                running[pool.submit(row, model, plan, layers, a.steps)] = (model, name)
                continue
            if not running:
                break
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                model, name = running.pop(done)
                fine, text = done.result()
                good, left = good and fine, left - 1
                print(f"| {model} | {name} {text}", flush=True)
    if left:
        print(f"{left} rows were not started within {a.seconds:.0f} s", flush=True)
    raise SystemExit(0 if good and not left else 1)


if __name__ == "__main__":
    main()
