"""What a function, method or `partial` reaches by itself, without calling anything: the layers, objects and variables that its program depends on."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

from .ahead_checks import PLAIN

__all__ = ["Held", "is_container", "is_plain"]


def is_plain(value: Any) -> bool:
    """A number, text or the like, or a tuple of such: compared by value."""
    return all(map(is_plain, value)) if isinstance(value, tuple) else isinstance(value, PLAIN)


def is_container(value: Any) -> bool:
    """A list, dict or set, or a tuple of such, of nothing but plain values, and not empty."""
    if isinstance(value, (list, set, tuple)):
        return len(value) > 0 and all(is_plain(x) or is_container(x) for x in value)
    return isinstance(value, dict) and len(value) > 0 and all(is_plain(k) and (is_plain(x) or is_container(x)) for k, x in value.items())


class Held:
    """What a function or method reaches by itself: its object, `partial`'s arguments, variables of closures, and what is in these in lists, tuples,
    dicts and functions. `modules`; `functions`; other `objects` whose methods are called; `cells` of plain variables, with their names, and
    `containers` of those that are lists and the like of plain values."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.functions: list[FunctionType] = []
        self.objects: list[Any] = []
        self.cells: list[tuple[CellType, str]] = []
        self.containers: list[tuple[CellType, str]] = []
        self._seen: set[int] = set()

    def add(self, x: Any, *, called: bool = True) -> None:
        """`called`: it is what was compiled, or the object of a method that is."""
        if id(x) in self._seen:
            return
        self._seen.add(id(x))
        inside: Iterable[Any] = ()
        if isinstance(x, nn.Module):
            self.modules.append(x)
        elif isinstance(x, MethodType):
            self.add(x.__self__)
            inside = [x.__func__]
        elif isinstance(x, partial):
            inside = [x.func, *x.args, *x.keywords.values()]
        elif isinstance(x, FunctionType):
            self.functions.append(x)
            for name, cell in zip(x.__code__.co_freevars, x.__closure__ or (), strict=True):
                self._add_cell(cell, name)
        elif isinstance(x, (list, tuple)):
            inside = x
        elif isinstance(x, dict):
            inside = x.values()
        elif called and not isinstance(x, type) and hasattr(x, "__dict__"):
            self.objects.append(x)
            inside = list(vars(x).values())
        for y in inside:
            self.add(y, called=False)

    def _add_cell(self, cell: CellType, name: str) -> None:
        try:
            value = cell.cell_contents
        except ValueError:  # not assigned yet
            return
        if is_plain(value):
            self.cells.append((cell, name))
        elif is_container(value):
            self.containers.append((cell, name))
        else:
            self.add(value, called=False)
