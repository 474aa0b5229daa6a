"""The table of docs/language.md, made from the rows of the themes."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

from . import (
    test_autograd,
    test_control_flow,
    test_dynamic,
    test_kinds,
    test_layouts,
    test_modes,
    test_mutation,
    test_random,
    test_recurrent,
    test_views,
)

__all__ = ["BEGIN", "END", "table"]

BEGIN, END = "<!-- rows: made from tests/language, do not edit -->", "<!-- end of rows -->"
_THEMES: dict[str, ModuleType] = {
    "Views and aliases": test_views, "In-place operations": test_mutation, "Layouts, sizes and plain values": test_layouts, "Modes": test_modes,
    "Autograd and torch.func": test_autograd, "Control flow": test_control_flow, "Recurrent layers": test_recurrent, "Kinds of tensors": test_kinds,
    "Sizes that depend on data": test_dynamic, "Random numbers": test_random,
}


def table() -> str:
    """One table per theme, in markdown."""
    return "\n".join(line for title, module in _THEMES.items() for line in _theme(title, module))


def _theme(title: str, module: ModuleType) -> Iterator[str]:
    yield from ("", f"### {title}", "", "| | becomes | |", "|---|---|---|")
    for name, row in module.ROWS.items():
        yield f"| {name}{' (gradients too)' if row.train and 'training' not in name else ''} | {row.outcome} | {row.note} |"
