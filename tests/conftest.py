"""What holds for every test: strict compilation with the IR verified after every pass, one thread, a cache of the run's own.

Also makes `tests/support` importable, and names the hypothesis profiles (`--hypothesis-profile=long` searches for many minutes)."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

os.environ["AICC_STRICT"] = os.environ["AICC_VERIFY"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests run side by side
_CACHE = None if "AICC_CACHE_DIR" in os.environ else tempfile.mkdtemp(prefix="aicc-test-cache-")
if _CACHE is not None:  # xdist workers inherit it
    os.environ["AICC_CACHE_DIR"] = _CACHE

sys.path.insert(0, str(Path(__file__).parent))

from support.products import leave_to_slow  # noqa: E402  (needs the path)
from support.profiles import register  # noqa: E402

register()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write expected texts anew instead of comparing with them")


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    leave_to_slow(items)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # torch, transformers and nine thousand tests stay: tests that look for leaks do not walk through them (0.3 s each time)


def pytest_runtest_setup() -> None:
    """Dynamo remembers by code object, and has one for all of torch's own layers: whatever tests came before, sizes that they used would be symbols in
    this one, and the ninth layer of a process would run eagerly, so that a test compares eager with eager."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
    guards = sys.modules.get("torch._dynamo.guards")
    if guards is not None:  # torch measures each frame's guards on an emptied cache, for a log: 0.03 s of a compilation's 0.8
        guards.profile_guard_manager = lambda *_: 0.0


def pytest_unconfigure(config: pytest.Config) -> None:
    gc.unfreeze()  # else what extension modules made would count as leaked
    if _CACHE is not None:
        shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """True when golden texts are to be written anew."""
    return bool(request.config.getoption("--update-golden"))
