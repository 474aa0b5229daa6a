"""`make fuzz` itself: failures, crashes and hangs are findings that say how to find them again."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

BODY = '''
import os, time
from hypothesis import given, strategies as st
from support.fuzzing import attempt, scaled

@scaled(20)
@given(st.integers(0, 1000))
def test_it(n):
    attempt(f"number {{n}}", lambda: check(n))

def check(n):
    if n >= 10:
        {trouble}
'''
CASES = {
    "right": ("pass", ""),
    "wrong": ('raise AssertionError("too large")', "n=10"),
    "crash": ("os.abort()", "the process died of SIGABRT; at work on\nnumber "),
    "hang": ("time.sleep(1000)", "the process did not end; at work on\nnumber "),
}


def driver() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_driver", Path(__file__).parent / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n == "hang" else []) for n in CASES])
def test_what_a_round_reports(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trouble, expected = CASES[name]
    made = driver()
    file = Path(__file__).parent / f"test_made_up_{name}.py"  # below the conftest that knows the profile
    file.write_text(BODY.format(trouble=trouble))
    monkeypatch.setitem(made.FUZZERS, name, (str(file), 1))
    monkeypatch.setattr(made, "SHRINKING", 60 if name != "hang" else 5)
    try:
        finding = made.run_round(name, 5, time.time() + 15, 24)
    finally:
        file.unlink()
    if not expected:
        assert finding is None
        return
    assert expected in finding.text, finding.text
    assert finding.command == f"python -m pytest {file} -x --hypothesis-profile=fuzz --hypothesis-seed=5"
