"""Trains every model under every plan for 50 steps on 2 and 4 processes of this host, and prints the table of docs/distributed.md.

    python tests/distributed/table.py [--models gpt2,llama] [--plans tp,zero3] [--steps 50]

Each row: the largest relative difference of a loss from one process, of a parameter at the end, whether the bytes that went to torch.distributed
are those of the IR, and seconds. One failing row does not end the run; the exit status says whether all were right.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from distributed.launch import torchrun
from distributed.test_train import EXPERTS, FOUR, TWICE, TWO, WORKER

PLANS: dict[str, tuple[dict[str, Any], int]] = {**{k: (p, 2) for k, p in {**TWO, **FOUR, **EXPERTS}.items()}, **{k: (p, 4) for k, p in TWICE.items()}}


def row(model: str, plan: dict[str, Any], layers: int, steps: int, folder: Path) -> tuple[bool, str]:
    ranks = plan.get("dp", 1) * plan.get("tp", 1) * plan.get("pp", 1) * plan.get("cp", 1)
    out = folder / "result"
    began = time.perf_counter()
    try:
        done = torchrun(ranks, WORKER, model, json.dumps(plan), str(steps), str(layers), str(out))
    except subprocess.TimeoutExpired as e:
        return False, f"failed: not done after {e.timeout:.0f} s"
    if done.returncode != 0:
        return False, f"failed: {(done.stderr.strip().splitlines() or ['no message'])[-1][:120]}"
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
    a = parser.parse_args()
    good = True
    print("| model | plan | ranks | loss | parameters | bytes | s |\n|---|---|---|---|---|---|---|", flush=True)
    for name in a.plans.split(","):
        plan, layers = PLANS[name]
        for model in a.models.split(","):
            if plan.get("ep", 1) > 1 and model != "mixtral":
                continue
            with tempfile.TemporaryDirectory() as folder:
                fine, text = row(model, plan, layers, a.steps, Path(folder))
            good &= fine
            print(f"| {model} | {name} {text}", flush=True)
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
