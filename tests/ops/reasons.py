"""Why an operator is left to ATen: a class for each `graph.extern`, from its target and from what the frontend says."""

from __future__ import annotations

import torch

__all__ = ["CLASSES", "class_of"]

CLASSES: dict[str, str] = {
    "random": "draws eager's numbers from torch's generator, as the sweep asks for (`fallback_random`); by default many of these are compiled",
    "sorting": "a library routine of many passes that nothing fuses with",
    "linear algebra": "LAPACK's factorisations and solvers",
    "FFT": "MKL's and pocketfft's transforms",
    "data-dependent size": "the size of the result depends on values",
    "number on the host": "a value that the host program needs as a Python number",
    "complex": "aicc has no complex arithmetic; operators that only move complex numbers are compiled",
    "special function": "a special function or orthogonal polynomial without a vector form in aicc",
    "effect": "called for its effect, such as an error check",
    "not written": "could be compiled; nobody has written it",
}

_NAMES: dict[str, tuple[str, ...]] = {
    "random": ("rrelu_with_noise_functional",),
    "sorting": ("sort", "topk", "kthvalue", "median", "nanmedian", "mode", "searchsorted"),
    "FFT": ("_fft_*",),
    "linear algebra": ("linalg_*", "_linalg_*", "cholesky*", "lu_unpack", "lu_solve", "geqrf", "ormqr", "triangular_solve"),
    "data-dependent size": ("nonzero", "masked_select", "unique_consecutive", "_unique2", "bincount", "repeat_interleave"),
    "number on the host": ("_local_scalar_dense", "item"),
    "complex": ("view_as_real", "view_as_complex", "complex", "polar", "_conj", "_conj_physical", "imag", "real", "angle"),
    "special function": ("special_*", "polygamma", "igamma", "igammac", "i0", "frexp"),
}


def class_of(target: str, reason: str) -> str:
    """One of `CLASSES` for an extern of `target` ("aten.sort.default")."""
    namespace, name, overload = target.split(".")
    op = getattr(getattr(getattr(torch.ops, namespace), name, None), overload, None)
    if torch.Tag.nondeterministic_seeded in getattr(op, "tags", ()):
        return "random"
    if reason == "complex numbers":
        return "complex"
    if "depends on data" in reason:
        return "data-dependent size"
    if reason == "called for its effect":
        return "effect" if not name.startswith("_linalg") else "linear algebra"
    for kind, names in _NAMES.items():
        if any(name == n or (n.endswith("*") and name.startswith(n[:-1])) for n in names):
            return kind
    return "not written"
