"""What torch did before any backend saw a graph: the frames it captured, the guards on them, where it parted them, and why it captured
one again.

    log = CaptureLog()
    with log.watching():
        compiled = torch.compile(model, backend=..., options=log.options)
        compiled(...)
    log.frames, log.breaks, log.guards
"""

from __future__ import annotations

import linecache
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dynamo import utils

from .commands.places import short_place

__all__ = ["Break", "CaptureLog", "Frame"]


@dataclass(frozen=True)
class Frame:
    """One capture of a piece of a Python function. `recompiled` is torch's guard failure, empty for a first capture."""

    id: str
    function: str
    place: str
    ops: int
    guards: int
    recompiled: str = ""
    failure: str = ""


@dataclass(frozen=True)
class Break:
    """Where a function was parted into several graphs."""

    place: str
    line: str
    reason: str
    times: int = 1


@dataclass
class CaptureLog:
    """Filled when `watching` ends. `guards` has what is checked before captured code is used again: kind and Python expression."""

    frames: list[Frame] = field(default_factory=list)
    breaks: list[Break] = field(default_factory=list)
    guards: list[tuple[str, str]] = field(default_factory=list)

    @property
    def options(self) -> dict[str, Any]:
        """For torch.compile: lets this log see the guards, and keeps them all."""
        return {"guard_filter_fn": self._note_guards}

    @property
    def recompilations(self) -> list[Frame]:
        return [f for f in self.frames if f.recompiled]

    @contextmanager
    def watching(self) -> Iterator[CaptureLog]:
        """Starts from nothing: what torch counted so far is cleared."""
        utils.counters.clear()
        utils.clear_compilation_metrics()
        utils.graph_break_reasons.clear()
        try:
            yield self
        finally:
            self.frames += [_frame(m) for m in utils.get_compilation_metrics() if m.co_name is not None]
            self.breaks += _breaks(list(utils.graph_break_reasons))

    def _note_guards(self, entries: Any) -> list[bool]:
        self.guards.extend((e.guard_type, e.name) for e in entries)
        return [True] * len(entries)


def _frame(m: Any) -> Frame:
    resumed = re.fullmatch(r"torch_dynamo_resume_in_(.+)_at_(\d+)", m.co_name)
    function = f"{resumed[1]}, from line {resumed[2]} on" if resumed else m.co_name
    return Frame(str(m.compile_id), function, short_place(f"{m.co_filename}:{m.co_firstlineno}"), m.graph_op_count or 0, m.guard_count or 0,
                 _first_lines(m.recompile_reason or ""), _first_lines(m.fail_reason or ""))


def _breaks(reasons: list[Any]) -> list[Break]:
    found: Counter[tuple[str, str, str]] = Counter()
    for r in reasons:
        frames = [f for f in r.user_stack if not f.filename.startswith(torch.__path__[0])] or list(r.user_stack)
        place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        line = (linecache.getline(frames[-1].filename, frames[-1].lineno or 0) or frames[-1].line or "").strip() if frames else ""
        found[short_place(place), line, _first_lines(str(r.reason))] += 1
    return [Break(*key, times) for key, times in found.items()]


def _first_lines(text: str) -> str:
    """What it is and torch's explanation, without hints, contexts and links."""
    if text.startswith("generic_jump"):  # torch's word for it
        return "a branch on the value of a tensor"
    head, *rest = (line.strip() for line in text.splitlines()) if text else ("",)
    explained = next((line.removeprefix("Explanation:").strip() for line in rest if line.startswith("Explanation:")), "")
    return f"{head}: {explained}" if explained else head
