"""Declarative op definitions: name, operands, results, attributes, traits, one line of semantics.

A dialect is a file that calls `define` once per op. Generic passes ask `op.has_trait(Pure)`, never for an op's name.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .core import IRError

if TYPE_CHECKING:
    from .core import Operation

__all__ = ["AttrSpec", "OpDef", "Trait", "attr", "define", "lookup", "optional", "registered"]


class Trait(Enum):
    Pure = auto()            # no side effect, result depends on operands and attributes alone
    Elementwise = auto()     # each result element depends on the matching operand elements (after broadcasting)
    Commutative = auto()     # the two operands may be swapped
    Idempotent = auto()      # f(f(x)) == f(x)
    ViewLike = auto()        # result elements are operand elements, moved or repeated
    Reduction = auto()       # combines elements along some dimensions
    Contraction = auto()     # sums of products
    Terminator = auto()      # ends its block
    IsolatedFromAbove = auto()  # its regions see nothing from outside
    Symbol = auto()          # has `sym_name`, is referred to as @name
    ConstantLike = auto()    # no operands, value in an attribute
    Structured = auto()      # a computation over an iteration space (tensor level)
    Random = auto()          # draws random numbers: never merged or dropped silently
    ReadsMemory = auto()
    WritesMemory = auto()
    Communicates = auto()    # exchanges data with other devices


@dataclass(frozen=True)
class AttrSpec:
    """An attribute: whether it must be given, its default, and what it means."""

    doc: str = ""
    required: bool = True
    default: Any = None


def attr(doc: str = "") -> AttrSpec:
    """A required attribute."""
    return AttrSpec(doc)


def optional(default: Any = None, doc: str = "") -> AttrSpec:
    """An attribute with a default; it is not printed when absent."""
    return AttrSpec(doc, False, default)


@dataclass(frozen=True, eq=False)
class OpDef:
    """The definition of an op. Operand and result names ending in '*' stand for any number of values."""

    name: str
    doc: str
    operands: tuple[str, ...] = ()
    results: tuple[str, ...] = ("result",)
    attrs: dict[str, AttrSpec] = field(default_factory=dict)
    traits: frozenset[Trait] = frozenset()
    regions: int = 0
    verify: Callable[[Operation], None] | None = None
    extra_attrs: bool = False  # accepts attributes beyond `attrs` (annotations such as profile data)

    @property
    def dialect(self) -> str:
        return self.name.partition(".")[0]

    @cached_property
    def required(self) -> frozenset[str]:
        """The names of the attributes that must be given."""
        return frozenset(k for k, spec in self.attrs.items() if spec.required)


_REGISTRY: dict[str, OpDef] = {}


def define(name: str, doc: str, *, operands: Sequence[str] | str = (), results: Sequence[str] | str = ("result",),
           attrs: dict[str, AttrSpec] | None = None, traits: Sequence[Trait] = (), regions: int = 0,
           verify: Callable[[Operation], None] | None = None) -> OpDef:
    """Registers an op. `operands` and `results` may be given as one string of names."""
    if name in _REGISTRY:
        raise IRError(f"op '{name}' is defined twice")
    ops = tuple(operands.split()) if isinstance(operands, str) else tuple(operands)
    res = tuple(results.split()) if isinstance(results, str) else tuple(results)
    made = _REGISTRY[name] = OpDef(name, doc, ops, res, dict(attrs or {}), frozenset(traits), regions, verify)
    return made


def lookup(name: str) -> OpDef:
    """The definition of `name`; IRError with the nearest names if there is none."""
    found = _REGISTRY.get(name)
    if found is None:
        near = difflib.get_close_matches(name, _REGISTRY, 3)
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; dialects: {', '.join(sorted({d.dialect for d in _REGISTRY.values()}))}"
        raise IRError(f"unknown op '{name}'{hint}")
    return found


def registered(dialect: str | None = None) -> list[OpDef]:
    """All op definitions, or those of one dialect, in order of definition."""
    return [d for d in _REGISTRY.values() if dialect is None or d.dialect == dialect]
