"""Every environment variable that aicc reads, in one place.

AICC_STRICT=1        a graph that does not compile raises, instead of running through ATen with a warning
AICC_CACHE_DIR=DIR   where compiled artifacts are kept (default: the user's cache directory)
AICC_CACHE=0         do not read or write the artifact cache
AICC_FEATURES=LIST   CPU features to compile for, such as "avx2,fma", instead of all that the host has
AICC_WORKERS=N       processes that compile GPU kernels (default: one per core, at most 16; 0: this process alone), and threads that compile
                     code for CPUs (default: one per core, at most 8; 0 or 1: the calling thread alone)
AICC_VERIFY=1        verify the IR after every pass, not only at the end of each stage (a tenth of the time to compile)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import SettingError

__all__ = ["Environment", "read_environment"]


@dataclass(frozen=True)
class Environment:
    """The variables, typed."""

    strict: bool
    cache: bool
    cache_dir: Path
    features: tuple[str, ...] | None
    verify: bool
    workers: int | None


def read_environment(environ: Mapping[str, str] | None = None) -> Environment:
    """Reads `environ` (os.environ by default). SettingError names a variable whose value makes no sense."""
    env = os.environ if environ is None else environ

    def flag(name: str, default: bool) -> bool:
        value = env.get(name, "").strip().lower()
        if value in ("", "1", "true", "yes", "on", "0", "false", "no", "off"):
            return default if value == "" else value in ("1", "true", "yes", "on")
        raise SettingError(f"{name} must be 0 or 1, got '{value}'")

    workers = env.get("AICC_WORKERS", "").strip()
    if workers and not workers.isdecimal():
        raise SettingError(f"AICC_WORKERS must be a number of processes or threads, got '{workers}'")
    base = env.get("XDG_CACHE_HOME") or str(Path(env.get("HOME", "/tmp")) / ".cache")
    features = env.get("AICC_FEATURES")
    return Environment(strict=flag("AICC_STRICT", False), cache=flag("AICC_CACHE", True),
                       cache_dir=Path(env.get("AICC_CACHE_DIR") or Path(base) / "aicc"),
                       features=None if features is None else tuple(f.strip() for f in features.split(",") if f.strip()),
                       verify=flag("AICC_VERIFY", False), workers=int(workers) if workers else None)
