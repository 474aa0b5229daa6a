"""Attributes: the constants attached to an op.

An attribute is a plain immutable Python value: None, bool, int, float, str, Expr, Type, SymbolRef, Dense, a tuple
of attributes, or a dict from names to attributes. Nothing else: that is what lets the printer, the parser
and the artifact cache handle every op alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .expr import Dim, Expr
from .types import DType, Type

__all__ = ["NUMPY_DTYPES", "Attribute", "Dense", "SymbolRef", "attribute_equal", "check_attribute"]

Attribute = Any
"""See the module docstring; kept loose because a recursive alias helps no type checker."""

NUMPY_DTYPES = {"f64": "<f8", "f32": "<f4", "f16": "<f2", "i64": "<i8", "i32": "<i4", "i16": "<i2", "i8": "|i1", "u8": "|u1",
                "u16": "<u2", "u32": "<u4", "u64": "<u8", "i1": "|b1", "c64": "<c8", "c128": "<c16", "index": "<i8",
                "bf16": "<u2", "f8e4m3fn": "|u1", "f8e5m2": "|u1"}
"""How each element type is stored in numpy; bf16 and the fp8 types as their bit patterns."""


@dataclass(frozen=True)
class SymbolRef:
    """A reference to a named op, printed `@name`."""

    name: str

    def __str__(self) -> str:
        return f"@{self.name}"


@dataclass(frozen=True)
class Dense:
    """The elements of a constant tensor: little-endian bytes in row-major order."""

    dtype: DType
    shape: tuple[int, ...]
    data: bytes

    @staticmethod
    def from_numpy(array: np.ndarray, dtype: DType) -> Dense:
        return Dense(dtype, tuple(array.shape), np.ascontiguousarray(array, NUMPY_DTYPES[dtype.name]).tobytes())

    def to_numpy(self) -> np.ndarray:
        """A read-only array; bf16 and fp8 come as their bit patterns."""
        return np.frombuffer(self.data, NUMPY_DTYPES[self.dtype.name]).reshape(self.shape)

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


_PLAIN = frozenset({type(None), bool, int, float, str, Expr})


def check_attribute(value: Attribute) -> None:
    """Raises TypeError if `value` is not an attribute."""
    if type(value) in _PLAIN or isinstance(value, (bool, int, float, str, Expr, Type, SymbolRef, Dense)):
        return
    if isinstance(value, tuple):
        for x in value:
            check_attribute(x)
        return
    if isinstance(value, Mapping):
        for k, x in value.items():
            if not isinstance(k, str):
                raise TypeError(f"attribute dictionaries have string keys, got {k!r}")
            check_attribute(x)
        return
    raise TypeError(f"{type(value).__name__} is not an attribute: {value!r} (lists must be tuples)")


def attribute_equal(a: Attribute, b: Attribute) -> bool:
    """Structural equality in which NaN equals NaN, and 1, 1.0 and true differ."""
    if isinstance(a, float) and isinstance(b, float):
        return (a == b and str(a) == str(b)) or (a != a and b != b)
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(attribute_equal, a, b))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(attribute_equal(a[k], b[k]) for k in a)
    return bool(a == b)


Maps = tuple["tuple[Dim, ...] | None", ...]
