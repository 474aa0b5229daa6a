"""Watching what `torch.compile(..., backend="aicc")` compiles, for the tests of whole models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aicc.compiler.capture import Recorder
from aicc.compiler.driver import Compilation, watching
from aicc.ir import Operation
from aicc.runtime.executor import CompiledGraph

__all__ = ["Recorded", "compiled_graphs", "graph_of", "recorded"]


@contextmanager
def compiled_graphs() -> Iterator[list[Compilation]]:
    """A list that grows by one entry for every graph compiled while it is open (those found in the cache too)."""
    seen: list[Compilation] = []
    with watching(compiled=seen.append):
        yield seen


def graph_of(compilation: Compilation) -> CompiledGraph:
    assert compilation.graph is not None
    return compilation.graph


@dataclass
class Recorded:
    """One graph: its module after each stage, and the arguments of its first call."""

    stages: dict[str, Operation]
    arguments: list[Any] = field(default_factory=list)


@contextmanager
def recorded() -> Iterator[list[Recorded]]:
    """Like `compiled_graphs`, with the modules of every stage and the arguments. Bypasses the artifact cache."""
    recorder, seen = Recorder(), []

    def spy(compilation: Compilation) -> None:
        record = Recorded(recorder.graphs[-1].stages)
        seen.append(record)
        graph = graph_of(compilation)
        run = graph._run

        def remember(arguments: Any) -> list[Any]:
            record.arguments = record.arguments or list(arguments)
            return run(arguments)

        graph._run = remember

    with recorder.watching(), watching(compiled=spy):
        yield seen
