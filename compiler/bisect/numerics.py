"""How far two lists of tensors are apart, and how far they may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

__all__ = ["EPSILON", "Difference", "Tolerance", "algebra_tolerance", "difference", "distance", "perturbed",
           "rounding_tolerance", "sensitivity"]

Tensor = torch.Tensor
Tolerance = Sequence[float]
"""Per tensor, the largest absolute difference of a finite element; integers and bools must be equal where it is 0."""

EPSILON = {torch.float64: 2.3e-16, torch.float32: 1.2e-7, torch.float16: 9.8e-4, torch.bfloat16: 7.9e-3, torch.float8_e4m3fn: 0.125,
           torch.float8_e5m2: 0.25}
SLACK = 40
"""Roundings of the largest magnitude that any order of evaluation may commit, beside those that eager commits."""
RELATIVE, GROUP = 1e-9, 1e-12
"""What float64 may differ by: relative to the largest element of the tensor, and of all tensors."""


@dataclass(frozen=True)
class Difference:
    """Where two tensors are furthest apart: number `index` of the list, at `where`; `problem` instead when they cannot be compared."""

    index: int
    where: tuple[int, ...] = ()
    got: float = 0.0
    want: float = 0.0
    error: float = 0.0
    bound: float = 0.0
    problem: str = ""

    def __str__(self) -> str:
        if self.problem:
            return f"result {self.index}: {self.problem}"
        place = f" at {list(self.where)}" if self.where else ""
        return f"result {self.index}{place} is {self.got:.9g}, should be {self.want:.9g} (off by {self.error:.3g}; allowed {self.bound:.3g})"


def _numeric(x: Tensor) -> Tensor:
    if x.is_complex():
        return torch.view_as_real(x.resolve_conj()).double()
    return x.double() if x.is_floating_point() else x


def _inexact(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def scales(values: Sequence[Tensor]) -> list[float]:
    """The largest finite magnitude of each tensor; 0 for integers and empty ones."""
    found = []
    for x in values:
        x = _numeric(x) if _inexact(x) else x.new_empty(0, dtype=torch.float64)
        x = x[x.isfinite()]
        found.append(float(x.abs().max()) if x.numel() else 0.0)
    return found


def algebra_tolerance(want: Sequence[Tensor]) -> list[float]:
    """For float64 against float64: rounding in any order, through a well-conditioned program."""
    each = scales(want)
    group = max(each, default=0.0)
    return [RELATIVE * s + GROUP * group + 1e-300 for s in each]


def rounding_tolerance(truth: Sequence[Tensor], plain: Sequence[Tensor]) -> list[float]:
    """For results in the program's own types against float64 `truth`: four times what `plain` (eager, say) is off, and `SLACK` roundings."""
    bounds = []
    for x, p, scale in zip(truth, plain, scales(truth), strict=True):
        a, b = _numeric(x), _numeric(p)
        off = (a - b).abs() if _inexact(x) else torch.zeros(0)
        off = off[off.isfinite()]
        worst = float(off.max()) if off.numel() else 0.0
        bounds.append(4 * worst + SLACK * EPSILON.get(p.dtype, 1.2e-7) * scale + 1e-30)
    return bounds


def difference(got: Sequence[Tensor], want: Sequence[Tensor], allowed: Tolerance, *, nonfinite: bool = True,
               exact_integers: bool = True) -> Difference | None:
    """The first tensor of `got` that is not `want`, at its worst element; None if all are within their bounds.

    With `nonfinite`, NaN and infinities must stand at the same places; without, elements that are not finite in `want` count for nothing.
    """
    if len(got) != len(want):
        return Difference(0, problem=f"there are {len(got)} results instead of {len(want)}")
    for i, (g, w, bound) in enumerate(zip(got, want, allowed, strict=True)):
        if g.shape != w.shape:
            return Difference(i, problem=f"its shape is {list(g.shape)} instead of {list(w.shape)}")
        if _inexact(g) != _inexact(w):
            return Difference(i, problem=f"its type is {g.dtype} instead of {w.dtype}")
        if not g.numel() or (not exact_integers and not _inexact(w)):
            continue
        found = _worst(i, _numeric(g), _numeric(w), bound if _inexact(w) else 0.0, nonfinite)
        if found is not None:
            return found
    return None


def _worst(index: int, g: Tensor, w: Tensor, bound: float, nonfinite: bool) -> Difference | None:
    if g.is_floating_point():
        off = torch.where(g == w, 0.0, (g - w).abs())
        off = torch.where(g.isnan() & w.isnan(), 0.0, off).nan_to_num(nan=float("inf"), posinf=float("inf"))
        if not nonfinite:
            off = torch.where(w.isfinite(), off, 0.0)
    else:
        off = (g != w).double()
    worst = float(off.max())
    if worst <= bound:
        return None
    at = tuple(int(k) for k in torch.unravel_index(off.argmax(), off.shape))
    return Difference(index, at, float(g[at]), float(w[at]), worst, bound)


def perturbed(x: Tensor, relative: float, seed: int) -> Tensor:
    """`x` with each element changed by up to `relative` of itself, at random; integers as they are."""
    if not x.is_floating_point() or not x.numel():
        return x
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
    changed = x.double() * (1 + relative * noise)
    return torch.where(x.isfinite(), changed, x.double()).to(x.dtype)


def sensitivity(run: Callable[[float, int], Sequence[Tensor]], want: Sequence[Tensor], relative: float, draws: int = 2) -> list[float]:
    """How much each tensor of `want` moves when the inputs move by `relative`: `run(relative, seed)` gives the moved results."""
    found = [0.0] * len(want)
    for seed in range(draws):
        for i, (g, w) in enumerate(zip(run(relative, seed), want, strict=True)):
            if g.shape == w.shape and g.numel():
                off = (_numeric(g).double() - _numeric(w).double()).abs()
                off = off[off.isfinite()]
                found[i] = max(found[i], float(off.max()) if off.numel() else 0.0)
    return found


def distance(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest error of a floating tensor, relative to its largest magnitude; infinity where NaN or shapes differ. For people."""
    worst = 0.0
    for g, w, scale in zip(got, want, scales(want)):
        if _inexact(g) and _inexact(w):
            found = difference([g], [w], [0.0])
            if found is not None:
                worst = max(worst, float("inf") if found.problem else found.error / (scale or 1.0))
    return worst
