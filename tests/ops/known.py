"""Where compiled results are allowed to differ from eager's, and why. A row needs a true limit; a bug has no place here.

`KNOWN[(op, kind)]` names an operator as OpInfo does (with its variant, "std.unbiased") and what is expected of it:

    "random"     values are drawn from a generator; only the types and shapes of the results are compared
    "undefined"  eager leaves the values of some results undefined (uninitialised memory, a free choice of signs or order);
                 only the types and shapes are compared
    "numerics"   eager's own rounding is not reproducible; a difference is counted as known
    "torch"      torch itself cannot compile it with any backend, or its decompositions differ from its kernels
"""

from __future__ import annotations

__all__ = ["KNOWN", "known"]

_UNINITIALISED = "the values of uninitialised memory"

KNOWN: dict[tuple[str, str], str] = {
    **{(op, "undefined"): _UNINITIALISED for op in ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty",
                                                     "new_empty_strided")},
}


def known(op: str, kind: str) -> str | None:
    """The reason of the row for this operator and kind, or None."""
    return KNOWN.get((op, kind))
