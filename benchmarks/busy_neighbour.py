"""Two threads on two cores, one of which another process keeps busy.

    python -m aicc.benchmarks.busy_neighbour [--cases softmax-2048,bert-b1] [--peers inductor] [--seconds 1] [--rounds 3] [--json FILE]

A fair scheduler leaves half of the busy core, so that one and a half cores do the work of two: 4/3 of the time alone. `slower` is the time beside
the neighbour over that; work that is cut in two halves takes 1.5 (the half on the busy core takes twice its time), and more where threads wait
actively for each other. At most `LIMIT` is asked for; where aicc is above it in any case the exit code is 1.
Per contender and case: the best round's median alone, and the median round's beside the neighbour, which is stopped and continued in turn. Only the
process's own two cores count: nothing else should run on them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import contenders  # first: it names the caches before torch reads them

import torch  # isort: skip

from . import cpu, memory_bound
from .timing import environment

LIMIT = 1.5
FAIR = 4 / 3
"""The time that one and a half cores take for the work of two."""
CASES = {**memory_bound.CASES, **cpu.CASES}
DEFAULT = ("gemm-1024", "bert-b1-s128", "softmax-2048x4096", "layernorm-8192x1024", "gelu-8M", "sum-outer-8192x1024", "sum-all-16M", "transpose-4096")
SPIN = "import os; os.sched_setaffinity(0, [{core}])\nwhile True: pass"


@contextmanager
def neighbour(core: int) -> Iterator[Callable[[bool], None]]:
    """A process that spins on a core while it is told to; silent at first."""
    process = subprocess.Popen([sys.executable, "-c", SPIN.format(core=core)])
    try:
        process.send_signal(signal.SIGSTOP)

        def busy(yes: bool) -> None:
            process.send_signal(signal.SIGCONT if yes else signal.SIGSTOP)
            time.sleep(0.3)  # until the scheduler has seen it
        yield busy
    finally:
        process.kill()
        process.wait()


def median(call: Callable[[], Any], seconds: float) -> float:
    """Seconds of a call."""
    call()
    end, times = time.perf_counter() + seconds, []
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.no_grad()
def measure(name: str, peers: Sequence[str], seconds: float, rounds: int, busy: Callable[[bool], None]) -> dict[str, Any]:
    """One row: milliseconds alone and beside the neighbour, of eager, aicc and each peer."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    function, args = CASES[name].build()
    if isinstance(function, torch.nn.Module):
        function.eval()
    path = contenders.export(function, args) if set(peers) & set(contenders.FROM_ONNX) else ""
    calls: dict[str, Callable[[], Any]] = {"eager": lambda: function(*args)}
    for peer in ["aicc", *peers]:
        calls[peer] = contenders.PEERS[peer](path if peer in contenders.FROM_ONNX else function, args, 2)
    times: dict[tuple[str, bool], list[float]] = {(c, b): [] for c in calls for b in (False, True)}
    for _ in range(rounds):
        for beside in (False, True):
            busy(beside)
            for contender, call in calls.items():
                times[contender, beside].append(median(call, seconds / rounds))
        busy(False)
    row: dict[str, Any] = {"case": name}
    for contender in calls:
        alone, beside_ = min(times[contender, False]), statistics.median(times[contender, True])
        row |= {f"{contender}_alone_ms": alone * 1e3, f"{contender}_beside_ms": beside_ * 1e3, f"{contender}_slower": beside_ / alone / FAIR}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(DEFAULT), help="names, or parts of them, of the cases of cpu.py and memory_bound.py")
    parser.add_argument("--peers", default="none", help=f"'all' that are installed, 'none', or some of {','.join(contenders.PEERS)}")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each contender per case, alone and beside each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    names = list(dict.fromkeys(n for part in options.cases.split(",") for n in CASES if part in n))
    peers = contenders.choose(options.peers)
    cores = sorted(os.sched_getaffinity(0))[:2]
    if isinstance(peers, str) or not names or len(cores) < 2:
        parser.error(peers if isinstance(peers, str) else "no case matches" if not names else "two cores are needed")
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(2)
    about, rows = environment(), []
    print(f"{about['cpu']}, torch {about['torch']}, 2 threads on cores {cores}, a spinning process on core {cores[1]}, load {about['load']}")
    print(f"{'case':<28} " + " ".join(f"{c + ': ms alone / beside, slower':>40}" for c in ["aicc", "eager", *peers]))
    with neighbour(cores[1]) as busy:
        for name in names:
            row = measure(name, peers, options.seconds, options.rounds, busy)
            rows.append(row)
            cells = [f"{row[f'{c}_alone_ms']:.2f} / {row[f'{c}_beside_ms']:.2f}  {row[f'{c}_slower']:.2f}" for c in ["aicc", "eager", *peers]]
            print(f"{name:<28} " + " ".join(f"{c:>40}" for c in cells), flush=True)
    worst = max(rows, key=lambda r: r["aicc_slower"])
    print(f"aicc: at most {LIMIT} times a fair half share: {sum(r['aicc_slower'] <= LIMIT for r in rows)} of {len(rows)} cases; "
          f"worst {worst['case']} {worst['aicc_slower']:.2f}")
    if options.json:
        options.json.write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")
    sys.exit(any(r["aicc_slower"] > LIMIT for r in rows))


if __name__ == "__main__":
    main()
