"""The examples run, and docs/index.md is what its script writes today."""

from __future__ import annotations

import os
import platform
import runpy
import subprocess
import sys
from pathlib import Path

import aicc
import pytest

ROOT = Path(__file__).parents[3]


def run(script: str, *arguments: str) -> str:
    found = str(Path(aicc.__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in (found, os.environ.get("PYTHONPATH", "")) if p)}
    done = subprocess.run([sys.executable, str(ROOT / "examples" / script), *arguments], capture_output=True, text=True, env=env, timeout=300,
                          check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def here(script: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that the script prints, run in this process."""
    runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_compile(capsys: pytest.CaptureFixture[str]) -> None:
    differences = [float(line.rpartition(" ")[2]) for line in here("01_compile.py", capsys)]
    assert len(differences) == 3 and max(differences) < 1e-5


def test_dump_ir(capsys: pytest.CaptureFixture[str]) -> None:
    lines = here("02_dump_ir.py", capsys)
    assert "graph.softmax x1" in lines[0] and "host.launch" in lines[-1]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the page is written for x86-64 with AVX2")
def test_walkthrough_is_up_to_date(update_golden: bool) -> None:
    page = ROOT / "docs" / "index.md"
    if update_golden:
        run("03_walkthrough.py", "--write", str(page))
    written, now = page.read_text().splitlines(), run("03_walkthrough.py").splitlines()
    difference = next((i for i, (a, b) in enumerate(zip(written, now)) if a != b), min(len(written), len(now)))
    assert written == now, f"docs/index.md is out of date from line {difference + 1} on; `make docs` writes it anew (then read the diff)"
