"""The op table: ATen overload -> lowering. One row per operator, in one file per family."""

from __future__ import annotations

from . import contractions, creation, elementwise, indexing, normalisation, pooling, random, reductions, views
from .table import Lower, merge

__all__ = ["TABLE"]

TABLE: dict[str, Lower] = merge(elementwise.ROWS, views.ROWS, reductions.ROWS, contractions.ROWS, indexing.ROWS, pooling.ROWS,
                                normalisation.ROWS, creation.ROWS, random.ROWS)
