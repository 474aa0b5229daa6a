"""Random programs through `torch.compile(backend="aicc")` on a device, against float64: looks for wrong numbers for a budget of time.

    python tests/gpu/hunt.py --seconds 600 --jobs 8 [--seed 7]      # on a GPU; --device cpu: native code
    python tests/gpu/hunt.py --replay 7000012                       # one program again, as a finding says

Each seed is one program (`support/device_programs.py`) in one way: with fixed sizes, with symbolic ones (and called again with others), or with
gradients. Graphs that do not compile, processes that die or hang, and inputs that were written to are findings like wrong numbers. A finding prints the
first value that is wrong by itself; the exit code is 1 if there was one. Each process prints how many programs it judged, and which share of their elements
could be (see `Truth`).
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("AICC_STRICT", "1")
os.environ.setdefault("AICC_WORKERS", "0")  # the processes of a hunt are enough
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from support.device_programs import DeviceProgram, Truth, device_program, gradients  # noqa: E402

WAYS = ("fixed", "fixed", "symbolic", "training", "training", "symbolic training")
BLURRED_RUNS = 3
PER_PROCESS = 1_000_000
HANGS = 150
"""Seconds for one program."""
RIGHT = "nothing is wrong"
SHOWN = 2
"""Findings of a kind that a process prints."""


@dataclass(frozen=True)
class Fault:
    result: str
    text: str


def way_of(seed: int) -> str:
    return random.Random(~seed).choice(WAYS)


def poison(device: str) -> None:
    """Leaves NaN in memory that the allocator will hand out next."""
    if device != "cpu":
        junk = [torch.full((n,), float("nan"), device=device) for n in [1 << 22, *[1 << 18] * 8, *[1 << 12] * 32]]
        del junk


def attempt(program: DeviceProgram, results: Sequence[str], way: str, device: str, shares: list[float] | None = None) -> Fault | None:
    """Compiles, calls and judges these results (and with training the gradients). Raises what compiling raises."""
    training = "training" in way
    torch._dynamo.reset()
    compiled = torch.compile(program.function(results), backend="aicc", dynamic="symbolic" in way, fullgraph=True)
    for grown in (False, True)[:2 if "symbolic" in way else 1]:
        truths, inputs = truth(program, results, device, grown, training)
        if truths is None:
            if grown:
                break  # the program's constants do not fit other sizes
            return None
        before = [x.detach().clone() for x in inputs]
        poison(device)
        with torch.set_grad_enabled(training):
            made = list(compiled(*inputs))
            got = [*made, *(gradients(made, inputs, program.seed) if training else [])]
        wanted = [r.name for r, x in zip(program.recipes, inputs, strict=True) if x.requires_grad]
        names = [*results, *(f"the gradient of {n}" for n in wanted)]
        for name, t, g in zip(names, truths, got, strict=False):
            if fault := t.fault(g):
                return Fault(name, f"{name}{' with other sizes' if grown else ''}: {fault}")
            if shares is not None:
                shares.append(t.share)
        if len(got) != len(truths):
            return Fault("", f"{len(got)} results and gradients for {len(truths)}")
        for r, x, b in zip(program.recipes, inputs, before, strict=True):
            if not torch.equal(x.detach().nan_to_num(), b.nan_to_num()):
                return Fault(r.name, f"input {r.name} was written to")
    return None


def truth(program: DeviceProgram, results: Sequence[str], device: str, grown: bool, training: bool) -> tuple[list[Truth] | None, list[torch.Tensor]]:
    """What is known of results and gradients, and the inputs; None if eager or float64 cannot compute the program."""
    inputs = program.inputs(device, grown)
    if training:
        inputs = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
    rows = []
    try:
        with torch.set_grad_enabled(training):
            values = program.evaluate(inputs, results)
            types = {n: v.dtype for n, v in values.items()}
            for i in range(2 + BLURRED_RUNS):  # eager, float64, blurred
                blur = torch.Generator(device).manual_seed(program.seed + i) if i > 1 else None
                if i:
                    wide = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
                    values = program.evaluate(wide, results, types=types, blur=blur)
                used = inputs if i == 0 else wide
                made = [values[n] for n in results]
                rows.append([*made, *(gradients(made, used, program.seed) if training else [])])
        return [Truth(e, w, blurred) for e, w, *blurred in zip(*rows, strict=True)], inputs
    except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError) as e:
        if "CUDA error" in str(e):
            raise
        return None, inputs


def smallest(program: DeviceProgram, way: str, device: str, until: float) -> tuple[list[str], str]:
    """The first value that is wrong by itself, or all results."""
    for name, _ in program.lines:
        if time.time() > until:
            break
        if fault := failure(program, [name], way, device):
            return [name], fault
    return program.results, ""


def failure(program: DeviceProgram, results: Sequence[str], way: str, device: str, shares: list[float] | None = None) -> str | None:
    try:
        fault = attempt(program, results, way, device, shares)
        return None if fault is None else fault.text
    except Exception as e:
        if "CUDA error" in str(e) or "illegal memory" in str(e):
            print(f"FATAL {program.seed} ({way}): {str(e)[:300]}\n{program.source(results)}", flush=True)
            os._exit(7)  # nothing works in this process any more
        lines = [line for line in str(e).splitlines() if line.strip()]
        return f"{type(e).__name__}: {' / '.join(lines[:3])[:400]}"


def work(first: int, seconds: float, device: str, note: Path | None) -> int:
    """Programs from seed `first` on; how many findings there were."""
    warnings.simplefilter("ignore")
    start, seen, done, seed = time.time(), Counter[str](), 0, first
    shares: list[float] = []
    while time.time() - start < seconds:
        if note is not None:
            note.write_text(str(seed))
        program, way = device_program(seed), way_of(seed)
        seed += 1
        if not program.lines:
            continue
        done += 1
        fault = failure(program, program.results, way, device, shares)
        if fault is None:
            continue
        kind = f"{way} {fault[:40]}" if "Error" not in fault else fault[:100]
        seen[kind] += 1
        if seen[kind] <= SHOWN:
            results, again = smallest(program, way, device, min(time.time() + 30, start + seconds + 8))
            print(report(program, results, way, again or fault), flush=True)
    print(f"from {first}: {done} programs, {sum(shares) / max(1, len(shares)):.2f} of their elements judged, {sum(seen.values())} findings", flush=True)
    return sum(seen.values())


def report(program: DeviceProgram, results: Sequence[str], way: str, fault: str) -> str:
    inputs = "".join(f"    # {r}\n" for r in program.recipes)
    return f"{'right' if fault == RIGHT else 'WRONG'} {program.seed} ({way}) {fault}\n{program.source(results)}{inputs}".rstrip()


def hunt(seed: int, seconds: float, jobs: int, device: str) -> int:
    """`jobs` processes; one that dies or hangs is a finding, and another goes on behind its program. 1 if there was a finding."""
    until, found = time.time() + seconds, 0
    with tempfile.TemporaryDirectory(prefix="aicc-hunt-") as folder:
        notes = [Path(folder) / str(j) for j in range(jobs)]
        running: dict[int, subprocess.Popen[bytes]] = {}

        def begin(j: int, first: int) -> None:
            notes[j].write_text(str(first))
            environment = {**os.environ, "AICC_CACHE_DIR": f"{folder}/cache{j}", "TRITON_CACHE_DIR": f"{folder}/triton{j}"}
            running[j] = subprocess.Popen([sys.executable, __file__, "--work", str(first), "--seconds", str(until - time.time()), "--device", device,
                                           "--note", str(notes[j])], env=environment)

        for j in range(jobs):
            begin(j, (seed * jobs + j) * PER_PROCESS)
        while running:
            time.sleep(0.5)
            for j, process in list(running.items()):
                stuck = time.time() - notes[j].stat().st_mtime > HANGS
                if process.poll() is None and not stuck:
                    continue
                process.kill()
                code = process.wait()
                del running[j]
                if code in (0, 1) and not stuck:
                    found += code
                    continue
                found += 1
                at = int(notes[j].read_text())
                print(f"WRONG {at} ({way_of(at)}) the process {'hung' if stuck else f'died with {code}'}", flush=True)
                if until - time.time() > 20:
                    begin(j, at + 1)
    return int(found > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=random.randrange(100_000))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--replay", type=int, help="one program, by the seed of its report")
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--note", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.replay is not None:
        program, way = device_program(args.replay), way_of(args.replay)
        fault = failure(program, program.results, way, args.device)
        print(report(program, program.results, way, fault or RIGHT))
        return int(fault is not None)
    if args.work is not None:
        return int(work(args.work, args.seconds, args.device, args.note) > 0)
    print(f"seed {args.seed}", flush=True)
    return hunt(args.seed, args.seconds, args.jobs, args.device)


if __name__ == "__main__":
    sys.exit(main())
