"""Where compiled results are allowed to differ from eager's, and why. A row needs a true limit; a bug has no place here.

`KNOWN[(op, kind)]` names an operator as OpInfo does (with its variant, "std.unbiased") and what is expected of it, for all element
types or for those that the row names:

    "random"     values are drawn from a generator; only the types and shapes of the results are compared
    "undefined"  eager leaves the values of some results undefined (uninitialised memory, a free choice of signs or order);
                 only the types and shapes are compared
    "numerics"   eager's own rounding is not reproducible; a difference is counted as known
    "declined"   the compiler says that it does not take the graph (which then runs through ATen); a wrong result still fails
    "torch"      torch itself cannot compile it with any backend, or its decompositions differ from its kernels: counts only where
                 torch's own "aot_eager" backend fails in the same way
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["KINDS", "KNOWN", "Known", "known"]

KINDS = ("random", "undefined", "numerics", "declined", "torch")


@dataclass(frozen=True)
class Known:
    """Why, and for which element types (none: all)."""

    reason: str
    dtypes: tuple[str, ...] = ()


_UNINITIALISED = "the values of uninitialised memory"

_HALF_COMPLEX = "aicc has no element type for complex32"
_SINGULAR = "the singular values that are cut off are eager's rounding errors: torch's tracing computes others"

KNOWN: dict[tuple[str, str], Known] = {
    ("chalf", "declined"): Known(_HALF_COMPLEX),
    **{(op, "declined"): Known(_HALF_COMPLEX, ("float16",)) for op in ("complex", "view_as_complex")},
    ("combinations", "torch"): Known("Dynamo fails to trace it with sizes that depend on data captured in one graph"),
    ("masked_select", "torch"): Known("torch before 2.12 takes the elements of the first operand, not of the broadcast, for the most that may be selected"),
    ("tensor_split", "torch"): Known("torch fails to trace a number of sections that is read from data and captured in one graph"),
    ("linalg.pinv.singular", "torch"): Known(_SINGULAR, ("complex64",)),
    **{(op, "torch"): Known("torch.linalg.pinv of complex matrices, called as it is in what AOTAutograd's runtime runs, is wrong there and right outside",
                            ("complex64", "complex128")) for op in ("pinverse", "linalg.pinv")},
    ("nn.functional.conv2d", "numerics"): Known("a complex convolution is three real ones whose sums cancel: the last place of the largest term shows",
                                                ("complex64",)),
    ("nn.functional.instance_norm", "numerics"): Known(
        "eager rounds mean and deviation to 16 bits between forward and backward, in another order: gradients are as near to float64 on average, "
        "but not element by element", ("bfloat16",)),
    ("nn.functional.conv_transpose3d", "numerics"): Known(
        "sums of products that cancel (complex: three real convolutions): the last place of the largest term shows", ("complex64", "float32")),
    **{(op, "torch"): Known("the gradient of torch's decomposition rounds in other places than its kernel", ("float16", "bfloat16"))
       for op in ("cumprod", "masked.cumprod")},
    **{(op, "undefined"): Known(_UNINITIALISED) for op in ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty",
                                                     "new_empty_strided")},
}


def known(op: str, kind: str, dtype: str) -> str | None:
    """The reason of the row for this operator, kind and element type, or None."""
    row = KNOWN.get((op, kind))
    return row.reason if row is not None and (not row.dtypes or dtype in row.dtypes) else None
