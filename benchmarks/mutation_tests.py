"""Which tests run which lines: a plugin of pytest's for `mutation.py`.

    pytest -p aicc.benchmarks.mutation_tests --mutation-lines lines.json --mutation-record found.json --mutation-shard 0/8 tests/...
    pytest -p aicc.benchmarks.mutation_tests --mutation-only tests.json tests/...

lines.json is {path of a source file: {line: [numbers of mutants]}}; found.json gets, for each test that passes, [its seconds, the numbers of the
mutants whose lines it runs], and the tests that fail. tests.json is a list of test names: they run in this order and no others do.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

__all__ = ["Recorder"]


def pytest_addoption(parser: pytest.Parser) -> None:
    for name in ("lines", "record", "shard", "only"):
        parser.addoption(f"--mutation-{name}", default="")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--mutation-record"):
        config.pluginmanager.register(Recorder(json.loads(Path(config.getoption("--mutation-lines")).read_text())), "mutation-recorder")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--mutation-shard"):
        first, step = map(int, config.getoption("--mutation-shard").split("/"))
        items[:] = items[first::step]
    if config.getoption("--mutation-only"):
        order = {name: i for i, name in enumerate(json.loads(Path(config.getoption("--mutation-only")).read_text()))}
        items[:] = sorted((i for i in items if i.nodeid in order), key=lambda i: order[i.nodeid])


class Recorder:
    """Traces the code that holds a wanted line while a test runs."""

    def __init__(self, lines: dict[str, dict[str, list[int]]]):
        self.lines = {path: {int(line): numbers for line, numbers in wanted.items()} for path, wanted in lines.items()}
        self.codes: dict[CodeType, dict[int, list[int]] | None] = {}
        self.hit: set[int] = set()
        self.passed: dict[str, tuple[float, list[int]]] = {}
        self.failed: list[str] = []

    def _wanted(self, code: CodeType) -> dict[int, list[int]] | None:
        if code not in self.codes:
            wanted = self.lines.get(code.co_filename, {})
            own = {line for _, _, line in code.co_lines() if line is not None} & wanted.keys()
            self.codes[code] = {line: wanted[line] for line in own} or None
        return self.codes[code]

    def trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        wanted = self._wanted(frame.f_code)
        if wanted is None:
            return None
        hit = self.hit
        hit.update(wanted.get(frame.f_lineno, ()))

        def local(frame: FrameType, event: str, arg: Any) -> Any:
            if event == "line":
                hit.update(wanted.get(frame.f_lineno, ()))
            return local
        return local

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.hit = set()
        start = time.perf_counter()
        sys.settrace(self.trace)
        try:
            return (yield)  # type: ignore[misc]
        finally:
            sys.settrace(None)
            if item.nodeid not in self.failed:
                self.passed[item.nodeid] = (time.perf_counter() - start, sorted(self.hit))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and report.nodeid not in self.failed:
            self.failed.append(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        found = {"passed": self.passed, "failed": self.failed}
        Path(session.config.getoption("--mutation-record")).write_text(json.dumps(found))
