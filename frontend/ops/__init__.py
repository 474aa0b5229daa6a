"""The op table: ATen overload -> lowering. One row per operator, in one file per family."""

from __future__ import annotations

from . import contractions, creation, elementwise, indexing, normalisation, pooling, random, reductions, sorting, views
from .table import Lower, merge

__all__ = ["COMPLEX", "TABLE"]

TABLE: dict[str, Lower] = merge(elementwise.ROWS, views.ROWS, reductions.ROWS, contractions.ROWS, indexing.ROWS, pooling.ROWS,
                                normalisation.ROWS, creation.ROWS, random.ROWS, sorting.ROWS)

COMPLEX = (frozenset(views.ROWS) - {"aten.constant_pad_nd.default"}) | frozenset(
    f"aten.{n}.default" for n in ("alias", "clone", "detach", "lift_fresh_copy", "lift_fresh", "lift", "positive", "contiguous", "alias_copy"))
"""Rows that take complex numbers: they only move them. All other operators on complex numbers are ATen's."""
