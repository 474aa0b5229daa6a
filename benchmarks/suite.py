"""What the CPU suites have in common: their command line, and the loop over threads and cases.

    options = parse(parser, CASES, "all", 1.5)             # adds --cases, --threads, --peers, --seconds, --budget, --json and --list, and reads them
    for threads, cases in options.runs(): ...              # sets torch's number of threads; `cases` ends when the budget does
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import contenders  # first: it names the caches before torch reads them

import torch  # isort: skip

__all__ = ["Suite", "parse"]


@dataclass
class Suite:
    """What was asked for: `names` of cases in order, `peers` that are installed; `given` holds the options of the suite's own."""

    names: list[str]
    threads: list[int]
    peers: list[str]
    seconds: float
    budget: float
    json: Path | None
    given: argparse.Namespace
    rows: list[dict[str, Any]] = field(default_factory=list)
    start: float = field(default_factory=time.perf_counter)

    def runs(self) -> Iterator[tuple[int, Iterator[str]]]:
        """(threads, cases to measure) in turn, with torch set to so many threads."""
        for threads in self.threads:
            torch.set_num_threads(threads)
            yield threads, self._cases()

    def _cases(self) -> Iterator[str]:
        for name in self.names:
            if time.perf_counter() - self.start > self.budget:
                print(f"{name:<28} not measured: out of time")
                continue
            yield name

    def add(self, row: dict[str, Any], **about: Any) -> None:
        """One more row of the results; with --json the file is whole after each."""
        self.rows.append(row)
        if self.json:
            self.json.write_text(json.dumps({**about, "rows": self.rows}, indent=2) + "\n")


def parse(parser: argparse.ArgumentParser, cases: Collection[str], peers: str, seconds: float) -> Suite:
    """Reads the command line; `peers` and `seconds` are defaults. Ends the program with a message where something does not exist."""
    parser.add_argument("--cases", help="names, or parts of them, separated by commas; measured in this order")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--peers", default=peers, help=f"'all' that are installed, 'none', or some of {','.join(contenders.PEERS)}")
    parser.add_argument("--seconds", type=float, default=seconds, help="how long each contender is measured per case")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="S", help="begin no further case after this many seconds")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--list", action="store_true", help="print the cases and end")
    given = parser.parse_args()
    names = list(dict.fromkeys(n for part in (given.cases or "").split(",") for n in cases if part in n))
    if given.list:
        parser.exit(0, "\n".join(cases) + "\n")
    if not names:
        parser.error(f"no case matches; there are {', '.join(cases)}")
    chosen = contenders.choose(given.peers)
    if isinstance(chosen, str):
        parser.error(chosen)
    return Suite(names, given.threads, chosen, given.seconds, given.budget, given.json, given)
