"""How a row's processes ended, from what torchrun and they wrote to stderr: the errors, else the signal, where each rank was, and what the host had left."""

from __future__ import annotations

import re
import resource
import shutil
from pathlib import Path

__all__ = ["describe"]


def describe(stderr: str) -> str:
    """One line. Python's errors are enough where there are any; a process that ended without one is said with all that is known."""
    lines = stderr.splitlines()
    errors = [x for x in lines if re.match(r"(\[rank\d+\]: ?)?[\w.]*(Error|Exception|Interrupt|Exit)(: |$)", x) and "ChildFailed" not in x]
    own = [x for x in errors if "closed by peer" not in x and "reset by peer" not in x] or errors
    signals = [x.strip() for x in lines if re.search(r"exitcode +: (?!.*\bN/A)|Signal \d+|Fatal Python error|terminate called|what\(\):", x)]
    phases = sorted({m.group(1): m.group(0) for x in lines for m in re.finditer(r"rank (\d+) (?:reached|left) [\w ]+", x)}.values())
    stack = [x.strip() for x in lines if re.match(r"\s+File .* line \d+ in ", x)]  # faulthandler's form
    stack += _native(lines)
    parts = [" / ".join(dict.fromkeys(x[:300] for x in group[:8])) for group in (own, signals, phases, stack) if group]
    return "; ".join([*parts, *([] if own else [_host()])]) or "no message"


def _native(lines: list[str]) -> list[str]:
    """The frames of the thread that got the signal, as torch's handler prints them."""
    at = next((i for i, x in enumerate(lines) if "fatalSignalHandler(" in x), len(lines))
    found = []
    for line in lines[at + 1:]:
        m = re.match(r"frame #\d+: (.*?) \(0x[0-9a-f]+ in (\S+)\)", line.strip())
        if m is None:
            break
        found.append(f"{m.group(1)} in {m.group(2).rsplit('/', 1)[-1]}")
    return found[1:7]


def _host() -> str:
    """Memory, shared memory, files and processes: what a process may have run out of."""
    memory = dict(re.findall(r"(\w+): +(\d+) kB", _read("/proc/meminfo")))
    killed = [line for place in ("memory.events", "memory/memory.oom_control") for line in _read(f"/sys/fs/cgroup/{place}").splitlines()
              if "oom_kill" in line]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return (f"host: {int(memory.get('MemAvailable', 0)) >> 20} GiB free, largest child {peak >> 10} MiB, /dev/shm "
            f"{_free('/dev/shm')} MiB free, files {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}, load {_read('/proc/loadavg').strip()}, {', '.join(killed)}")


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _free(path: str) -> int:
    try:
        return shutil.disk_usage(path).free >> 20
    except OSError:
        return 0
