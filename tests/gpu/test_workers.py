"""Processes that compile kernels: what they make, and what happens when they fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from aicc.backends.triton import compile_gpu, compile_kernel, triton_cache
from aicc.backends.triton.printer import KernelSource, print_kernel
from aicc.backends.triton.workers import Workers, start_workers
from aicc.compiler.env import read_environment
from aicc.compiler.errors import SettingError
from aicc.ir import Operation
from aicc.ir.core import IRError
from aicc.ir.parser import parse_module

from .cases import SM90, capture
from .test_printer import COPY


def source(op: str = "exp", size: int = 100) -> KernelSource:
    return print_kernel(parse_module(COPY.format(grid="2", symbols="", shape=size, size=size, op=op)).body.first)


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    made = Workers(90, 2)
    yield made
    made.close()


def children(made: Workers) -> list[int]:
    return [int(p) for p in Path(f"/proc/{made.process.pid}/task/{made.process.pid}/children").read_text().split()]


def test_what_they_make_is_what_is_made_here(workers: Workers, tmp_path: Path) -> None:
    wanted = [source(op) for op in ("exp", "neg", "sqrt")]
    with ThreadPoolExecutor(3) as pool:
        there = list(pool.map(lambda s: workers.compile(s, SM90, (True, True), tmp_path / "there"), wanted))
    with triton_cache(tmp_path / "here"):
        assert there == [compile_kernel(s, SM90, divisible=(True, True), cache_dir=tmp_path / "here") for s in wanted]


def test_errors_come_back(workers: Workers, tmp_path: Path) -> None:
    wrong = KernelSource("wrong", source().text.replace("def k(", "def wrong(").replace("libdevice.exp", "nothing"), {"x": "*fp32", "y": "*fp32"},
                         2, (), 0, 64, False)
    with pytest.raises(IRError, match="Triton rejects kernel 'wrong'"):
        workers.compile(wrong, SM90, (), tmp_path)
    assert workers.compile(source("abs"), SM90, (), tmp_path).name == "k"  # the process goes on


def test_a_process_that_dies_is_replaced_by_another_and_the_last_by_an_error(tmp_path: Path) -> None:
    made = Workers(90, 2)
    made.compile(source(), SM90, (), tmp_path)  # they have started
    first, second = children(made)
    os.kill(first, signal.SIGKILL)
    assert [made.compile(source("neg", n), SM90, (), tmp_path).name for n in (70, 80)] == ["k", "k"]
    os.kill(second, signal.SIGKILL)
    with pytest.raises(OSError, match="ended"):
        made.compile(source("sqrt"), SM90, (), tmp_path)
    assert made.count == 0
    made.process.wait(timeout=20)


def test_a_kernel_that_kills_processes_is_an_error_about_the_kernel(tmp_path: Path) -> None:
    made = Workers(90, 3)
    deadly = KernelSource("deadly", "import os\nos._exit(3)\n", {}, 0, (), 0, 1, False)
    with pytest.raises(IRError, match="ends its process on kernel 'deadly'"):
        made.compile(deadly, SM90, (), tmp_path)
    assert made.compile(source(), SM90, (), tmp_path).name == "k"
    made.close()


def test_without_processes_kernels_are_compiled_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Operation] = []

    def keep(module: Operation, gm: torch.fx.GraphModule, args: list[Any]) -> Any:
        found.append(module)
        return gm.forward(*args)

    capture(lambda x: x.exp(), (torch.randn(100),), keep, until="host")
    broken = Workers(90, 2)
    broken.process.kill()
    with pytest.warns(RuntimeWarning, match="compiled in this process"):
        assert len(compile_gpu(found[0], SM90, cache_dir=tmp_path, workers=broken).kernels) == 1
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    assert start_workers(91, 2) is None


def test_they_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    script = "import os\nfrom aicc.backends.triton.workers import Workers\nprint(Workers(90, 2).process.pid, flush=True)\nos._exit(0)\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    helper = int(done.stdout)
    for _ in range(300):
        if not Path(f"/proc/{helper}").exists() or "Z" in Path(f"/proc/{helper}/stat").read_text().split()[2]:
            return
        signal.sigtimedwait([], 0.1)
    raise AssertionError("the processes outlive the one that started them")


def test_their_number() -> None:
    assert read_environment({}).workers is None and read_environment({"AICC_WORKERS": "0"}).workers == 0
    with pytest.raises(SettingError, match="AICC_WORKERS must be a number"):
        read_environment({"AICC_WORKERS": "many"})
