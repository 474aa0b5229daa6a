"""All fuzzers for a budget of time, with fresh seeds: `make fuzz`, or

    python tests/fuzz/run.py --seconds 600 [--seed 7] [--only text]

Each round is a process of its own, so that a crash or a hang is a finding like any other. A finding prints its shrunk example and the
command that finds it again; the exit code is 1 if there was one. Memory is bounded (`--gigabytes` of address space), time per round too.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

FUZZERS: dict[str, tuple[str, float]] = {
    "programs": ("tests/fuzz/test_programs.py", 4),
    "levels": ("tests/fuzz/test_levels.py", 3),
    "captured": ("tests/unit/passes/test_random_programs.py", 3),
    "memory": ("tests/unit/passes/test_memory_random.py", 1),
    "text": ("tests/fuzz/test_text.py", 1),
    "files": ("tests/fuzz/test_files.py", 1),
}
"""Name -> file, and its share of the time."""
SHRINKING = 240  # seconds that a round may take beyond its share, to make a finding small


@dataclass(frozen=True)
class Finding:
    """What a round found: the end of pytest's report, or how the process died."""

    fuzzer: str
    seed: int
    text: str

    @property
    def command(self) -> str:
        return f"python -m pytest {FUZZERS[self.fuzzer][0]} -x --hypothesis-profile=fuzz --hypothesis-seed={self.seed}"

    @property
    def kind(self) -> str:
        """Findings of one kind are shown once: the failing test and its error."""
        lines = [line for line in self.text.splitlines() if line.startswith(("FAILED", "the process"))]
        return f"{self.fuzzer} {lines[-1][:160] if lines else self.text[-160:]}"


def run_round(fuzzer: str, seed: int, until: float, gigabytes: float) -> Finding | None:
    """One process on one file with one seed."""
    with tempfile.TemporaryDirectory(prefix="aicc-fuzz-") as folder:
        note = Path(folder) / "example"
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "AICC_FUZZ_UNTIL": str(until), "AICC_FUZZ_NOTE": str(note), "AICC_CACHE": "0",
                       "PYTHONFAULTHANDLER": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=short", "--show-capture=no", "-p", "no:cacheprovider",
                   "--hypothesis-profile=fuzz", f"--hypothesis-seed={seed}", FUZZERS[fuzzer][0]]
        most = int(gigabytes * (1 << 30))
        process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   start_new_session=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (most, most)))
        try:
            output, _ = process.communicate(timeout=max(0, until - time.time()) + SHRINKING)
            died = process.returncode < 0 or process.returncode > 5
            how = f"the process died of {signal.Signals(-process.returncode).name if process.returncode < 0 else process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            died, how = True, "the process did not end"
        if not died:
            return None if process.returncode == 0 else Finding(fuzzer, seed, _end(output))
        failed = Path(f"{note}.failed")
        seen = failed.read_text() if failed.exists() else note.read_text() if note.exists() else ""
        return Finding(fuzzer, seed, f"{_end(output)}\n{how}; at work on\n{seen}")


def _end(output: str, lines: int = 160) -> str:
    return "\n".join(output.splitlines()[-lines:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("FUZZ_SECONDS", "600")))
    parser.add_argument("--seed", type=int, default=None, help="of the whole run (default: a fresh one)")
    parser.add_argument("--only", choices=sorted(FUZZERS), action="append", help="this fuzzer; may be given several times")
    parser.add_argument("--gigabytes", type=float, default=24, help="address space of each process")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(1 << 32)
    rng = random.Random(seed)
    chosen = {name: FUZZERS[name][1] for name in arguments.only or FUZZERS}
    start = time.time()
    end = start + arguments.seconds
    print(f"fuzzing for {arguments.seconds:.0f} s with seed {seed}", flush=True)
    spent = dict.fromkeys(chosen, 0.0)
    rounds = dict.fromkeys(chosen, 0)
    found: dict[str, Finding] = {}
    while time.time() < end:
        name = min(chosen, key=lambda n: spent[n] / chosen[n])
        began = time.time()
        share = max(30.0, arguments.seconds * chosen[name] / sum(chosen.values()) / 3)
        finding = run_round(name, rng.randrange(1 << 32), min(end, began + share), arguments.gigabytes)
        spent[name] += time.time() - began
        rounds[name] += 1
        if finding is not None and finding.kind not in found:
            found[finding.kind] = finding
            print(f"\n===== FINDING of '{name}', seed {finding.seed}\n{finding.text}\n=> {finding.command}\n", flush=True)
    for name in chosen:
        print(f"{name:9} {rounds[name]:3} rounds {spent[name]:5.0f} s")
    print(f"{len(found)} findings in {time.time() - start:.0f} s (seed {seed})")
    for finding in found.values():
        print(f"  {finding.kind}\n    {finding.command}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
