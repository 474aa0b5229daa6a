"""The questions that bisect asks of one step: does what comes after mean what came before?

    verdict = PassCheck(passes, target)(module, arguments)      # a Verdict, or None when the step is right
    verdict = KernelCheck(target)(module, arguments)            # a tile-level module: each launch, compiled against interpreted
    verdict = ProgramCheck(passes, target)(module, arguments)   # compiled whole against its kernels one at a time

A check is a function of any module of the right level, so the reducer can ask it of smaller ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...ir import Target
from ...ir.core import IRError, Operation, equivalent
from ...ir.interpreter import HANDLERS
from ...ir.interpreter.context import Context, Numerics
from ...ir.passes import Pass, PassContext, PassError, run_pipeline
from .evaluate import function_of, run_module, tensor_outputs, written_arguments
from .kernels import NativeLaunch
from .memory import run_host, run_native
from .numerics import EPSILON, SLACK, Difference, algebra_tolerance, difference, perturbed, rounding_tolerance, scales, sensitivity

__all__ = ["Check", "KernelCheck", "PassCheck", "ProgramCheck", "Verdict", "algebra", "is_host", "rounding"]

Tensor = torch.Tensor
WIDE = torch.float64
_NOISE = 1e-13
"""Relative change of inputs whose effect float64 results may show: about a thousand roundings."""


@dataclass(frozen=True)
class Verdict:
    """kind: 'bug' (other values), 'unstable' (the same algebra, rounding beyond the budget) or 'crash'. `kernel` names a launch's kernel."""

    kind: str
    text: str
    difference: Difference | None = None
    kernel: str = ""


Check = Callable[[Operation, Sequence[Any]], "Verdict | None"]


def is_host(module: Operation) -> bool:
    """Whether the module is past bufferize."""
    return any(op.opdef.dialect == "host" for op in function_of(module).body) or module.attributes.get("level") == "host"


def _moved(run: Callable[[Sequence[Any]], Sequence[Tensor]], arguments: Sequence[Any]) -> Callable[[float, int], Sequence[Tensor]]:
    return lambda relative, seed: run([perturbed(a, relative, seed * 100 + i) if isinstance(a, Tensor) else a for i, a in enumerate(arguments)])


def algebra(before: Operation, after: Operation, arguments: Sequence[Any], want: Sequence[Tensor] | None = None,
            got: Sequence[Tensor] | None = None) -> Difference | None:
    """Where `after` computes something else than `before`, in float64. `want` and `got` are their results, where known."""
    want = run_module(before, arguments, WIDE) if want is None else want
    got = run_module(after, arguments, WIDE, check=True) if got is None else got
    allowed = algebra_tolerance(want)
    found = difference(got, want, allowed)
    if found is None or found.problem:
        return found
    if difference(got, run_module(before, arguments, WIDE, fold=True), allowed) is None:
        return None  # constants were folded in their own types
    wide = [a.to(WIDE) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    moved = sensitivity(_moved(lambda xs: run_module(before, xs, WIDE), wide), want, _NOISE)
    return difference(got, want, [a + 8 * m for a, m in zip(allowed, moved, strict=True)])


def rounding(got: Sequence[Tensor], truth: Sequence[Tensor], plain: Sequence[Tensor],
             moved: Callable[[float, int], Sequence[Tensor]]) -> Difference | None:
    """Where results in the program's own types are further from float64 `truth` than `plain` ones explain.

    `moved(relative, seed)` computes the truth for moved inputs. Integers may depend on rounding; they are the algebra's affair.
    """
    allowed = rounding_tolerance(truth, plain)
    plain_finite = [torch.where(p.double().isfinite(), t, torch.nan) if t.is_floating_point() and p.shape == t.shape else t
                    for t, p in zip(truth, plain, strict=True)]
    found = difference(got, plain_finite, allowed, nonfinite=False, exact_integers=False)
    if found is None or found.problem:
        return found
    epsilon = max((EPSILON.get(x.dtype, 0.0) for x in plain), default=1e-7)
    sensitive = sensitivity(moved, truth, 4 * epsilon)
    return difference(got, plain_finite, [a + 4 * s for a, s in zip(allowed, sensitive, strict=True)], nonfinite=False, exact_integers=False)


@dataclass(frozen=True)
class PassCheck:
    """Runs `passes` over a copy of a module on tensors, and compares. The last of them is the one in question."""

    passes: Sequence[Pass]
    target: Target

    def applied(self, module: Operation) -> Operation:
        after = module.clone()
        run_pipeline(after, self.passes, PassContext(self.target))
        return after

    def __call__(self, module: Operation, arguments: Sequence[Any]) -> Verdict | None:
        try:
            after = self.applied(module)
        except PassError as e:
            return Verdict("crash", str(e)) if e.pass_name == self.passes[-1].name else None
        except Exception as e:  # any fault of a pass is what is looked for
            return Verdict("crash", f"in pass '{self.passes[-1].name}': {type(e).__name__}: {e}")
        if is_host(after):
            return compare_host(module, after, arguments)
        return None if equivalent(module, after) else compare_tensors(module, after, arguments)


def compare_tensors(before: Operation, after: Operation, arguments: Sequence[Any]) -> Verdict | None:
    """Two modules on tensors: algebra, then rounding."""
    truth = run_module(before, arguments, WIDE)
    try:
        found = algebra(before, after, arguments, truth)
    except (IRError, IndexError) as e:
        return Verdict("bug", f"what it leaves cannot be run: {e}")
    if found is not None:
        return Verdict("bug", str(found), found)
    plain, got = run_module(before, arguments), run_module(after, arguments)
    found = rounding(got, truth, plain, _moved(lambda xs: run_module(before, xs, WIDE), _widened(arguments)))
    return None if found is None else Verdict("unstable", str(found), found)


def _widened(arguments: Sequence[Any]) -> list[Any]:
    return [a.to(WIDE) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]


def _outputs(func: Operation, ran: tuple[list[Any], list[Any]]) -> list[Tensor]:
    """As `run_module` orders them: what is returned, then arguments that are assigned to."""
    returned, given = ran
    tensors = [a for a in given if isinstance(a, Tensor)]
    return [*tensor_outputs(func, returned), *(tensors[i] for i in written_arguments(func))]


def compare_host(before: Operation, after: Operation, arguments: Sequence[Any]) -> Verdict | None:
    """A module on tensors against the host program made of it: the same kernels on the same values must give the same bits."""
    want = run_module(before, arguments)
    try:
        got = _outputs(function_of(before), run_host(after, arguments))
    except (IRError, IndexError, RuntimeError, ValueError) as e:
        return Verdict("bug", f"what it leaves cannot be run: {type(e).__name__}: {e}")
    exact = not any(op.name in ("tensor.extern", "tensor.library") for op in function_of(before).body)  # a layout may choose their algorithm
    allowed = [0.0] * len(want) if exact else [SLACK * EPSILON.get(w.dtype, 0.0) * s for w, s in zip(want, scales(want))]
    found = difference(got, want, allowed)
    return None if found is None else Verdict("bug", str(found), found)


class KernelCheck:
    """Each launch of a module: the backend's code against the interpreter, on the values that the interpreter makes."""

    def __init__(self, target: Target, launch: Any = None):
        self.native = launch or NativeLaunch(target)

    def __call__(self, module: Operation, arguments: Sequence[Any]) -> Verdict | None:
        found: list[Verdict] = []
        base = HANDLERS["tile.launch"]

        def launch(ctx: Context, op: Operation, xs: list[Any]) -> Sequence[Any]:
            want = base(ctx, op, xs)
            if not found:
                verdict = self._compare(ctx, op, xs, want)
                if verdict is not None:
                    found.append(verdict)
            return want
        run_module(module, arguments, handlers={"tile.launch": launch})
        return found[0] if found else None

    def _compare(self, ctx: Context, op: Operation, xs: list[Tensor], want: Sequence[Tensor]) -> Verdict | None:
        name, base = op["kernel"].name, HANDLERS["tile.launch"]
        try:
            got = self.native(ctx, op, xs)
        except IndexError as e:
            return Verdict("bug", str(e), kernel=name)
        except Exception as e:  # any fault of the code generator is what is looked for
            return Verdict("crash", f"{type(e).__name__}: {e}", kernel=name)
        near = [SLACK * EPSILON.get(w.dtype, 0.0) * s for w, s in zip(want, scales(want))]
        if difference(got, want, near) is None:
            return None
        wide = replace(ctx, numerics=Numerics(WIDE))
        truth = base(wide, op, _widened(xs))
        epsilon = max([EPSILON[x.dtype] for x in (*xs, *want) if x.dtype in EPSILON], default=0.0)
        others = [base(wide, op, [perturbed(x, 4 * epsilon, 100 * s + i) for i, x in enumerate(_widened(xs))]) for s in range(3)]
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            if w.is_floating_point():
                continue
            settled = torch.stack([o[i] == w for o in (truth, *others)]).all(0)  # does not depend on rounding
            bad = difference([torch.where(settled, g, w)], [w], [0.0])
            if bad is not None:
                return Verdict("bug", str(replace(bad, index=i)), replace(bad, index=i), name)
        moved = rounding(got, truth, want, lambda _, seed: others[seed])
        if moved is None and (odd := _odd(got, want, truth)) is not None:
            moved = odd
        return None if moved is None else Verdict("bug", str(moved), moved, name)


def _odd(got: Sequence[Tensor], want: Sequence[Tensor], truth: Sequence[Tensor]) -> Difference | None:
    """NaN or infinity where both the interpreter's results and the truth are finite."""
    for i, (g, w, t) in enumerate(zip(got, want, truth, strict=True)):
        if g.is_floating_point() and g.numel():
            odd = ~g.isfinite() & w.isfinite() & t.isfinite()
            if bool(odd.any()):
                at = tuple(int(k) for k in odd.nonzero()[0])
                return Difference(i, at, float(g[at]), float(t[at]), float("inf"), 0.0)
    return None


@dataclass(frozen=True)
class ProgramCheck:
    """The finished program against its kernels run one at a time by the same backend: host code, executor, packing, arenas."""

    passes: Sequence[Pass]
    target: Target
    run: Callable[[Operation, Sequence[Any], Target], tuple[list[Any], list[Any]]] = run_native
    launch: Any = None

    def __call__(self, module: Operation, arguments: Sequence[Any]) -> Verdict | None:
        host = module.clone()
        try:
            run_pipeline(host, self.passes, PassContext(self.target))
            got = _outputs(function_of(module), self.run(host, arguments, self.target))
        except Exception as e:  # any fault of the backend is what is looked for
            return Verdict("crash", f"{type(e).__name__}: {e}")
        want = run_module(module, arguments, handlers={"tile.launch": self.launch or NativeLaunch(self.target)})
        allowed = [SLACK * EPSILON.get(w.dtype, 0.0) * s for w, s in zip(want, scales(want))]
        found = difference(got, want, allowed)
        return None if found is None else Verdict("bug", str(found), found)
