"""Reductions and scans as Triton text, by kind and by the class of their element type."""

from __future__ import annotations

__all__ = ["KINDS", "REDUCTIONS", "SCANS"]

KINDS = {"float": "f", "int": "i", "uint": "i", "bool": "b", "index": "i"}
_PLAIN = "tl.reduce({{x}}, {{axis}}, {}, keep_dims=True)"
REDUCTIONS = {
    "sum": {
        "f": "tl.sum({x}, {axis}, keep_dims=True)",
        "i": "tl.sum({x}, {axis}, keep_dims=True)",
        "b": "(tl.max({x}.to(tl.int32), {axis}, keep_dims=True) != 0)",
    },
    "prod": {
        "f": _PLAIN.format("product"),
        "i": _PLAIN.format("product"),
        "b": "(tl.min({x}.to(tl.int32), {axis}, keep_dims=True) != 0)",
    },
    "max": {
        "f": _PLAIN.format("max_nan"),
        "i": "tl.max({x}, {axis}, keep_dims=True)",
        "b": "(tl.max({x}.to(tl.int32), {axis}, keep_dims=True) != 0)",
    },
    "min": {
        "f": _PLAIN.format("min_nan"),
        "i": "tl.min({x}, {axis}, keep_dims=True)",
        "b": "(tl.min({x}.to(tl.int32), {axis}, keep_dims=True) != 0)",
    },
}
SCANS = {
    "sum": {"f": "plus", "i": "plus"},
    "prod": {"f": "product", "i": "product"},
    "max": {"f": "max_nan", "i": "larger"},
    "min": {"f": "min_nan", "i": "smaller"},
}
REDUCTIONS["any"], REDUCTIONS["all"] = REDUCTIONS["max"], REDUCTIONS["min"]
