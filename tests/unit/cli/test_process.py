"""The command in a process of its own: `python -m aicc`, and a cache that cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import aicc
import pytest


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    found = str(Path(aicc.__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in (found, os.environ.get("PYTHONPATH", "")) if p), **environment}
    return subprocess.run([sys.executable, "-m", "aicc", *map(str, arguments)], capture_output=True, text=True, env=env, timeout=300, check=False)


def test_help_and_usage() -> None:
    done = run("--help")
    assert done.returncode == 0
    for command in ("dump-ir", "opt", "run", "explain", "env"):
        assert command in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="permissions as on POSIX")
@pytest.mark.parametrize("place", ["read-only", pytest.param("full", marks=pytest.mark.slow)])
def test_a_cache_that_cannot_be_written_gives_a_warning_and_no_more(mlp: Path, tmp_path: Path, place: str) -> None:
    directory = tmp_path / "closed" / "cache"
    if place == "full":
        directory = Path("/dev/full")  # every write to it says: no space left
    else:
        directory.parent.mkdir()
        directory.parent.chmod(0o500)
        if os.access(directory.parent, os.W_OK):
            directory = Path("/proc/aicc-cache")  # root may write anywhere but here
    done = run("run", mlp, "--cache", "--seconds", "0", AICC_CACHE_DIR=str(directory))
    assert done.returncode == 0, done.stderr
    assert "max error" in done.stdout
    warnings = [line for line in done.stderr.splitlines() if "aicc: the cache directory" in line]
    assert len(warnings) == 1 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
def test_a_reader_that_stops_early_is_no_error(mlp: Path) -> None:
    found = str(Path(aicc.__file__).parent.parent)
    done = subprocess.run(f"'{sys.executable}' -m aicc dump-ir '{mlp}' | head -n 1", shell=True, capture_output=True, text=True, timeout=300,
                          check=True, env={**os.environ, "PYTHONPATH": found})
    assert done.stdout.startswith("// =====") and "Traceback" not in done.stderr
