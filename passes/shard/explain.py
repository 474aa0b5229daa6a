"""Why the plan is what it is: against one other choice, against another plan, and in a table of what people do by hand.

Entry points: `why(result)`, `why_not(problem, result, pins)`, `diff(a, b)`, `by_hand(problem)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from .plan import Plan, plan_problems
from .planner import Infeasible, Problem, SearchResult, search
from .space import divisors
from .step import StepReport, predict_step

__all__ = ["by_hand", "diff", "why", "why_not"]


def why(result: SearchResult) -> str:
    """The plan, where its time and memory go, the gap to the bound, and the best plans with other degrees."""
    best = result.best
    fullest = max(best.memory, key=lambda m: m.total)
    lines = [best.plan.label, f"step {best.seconds:.3f} s, {best.tokens_per_second:,.0f} tokens/s, MFU {best.mfu:.1%}, "
             f"HFU {best.hfu:.1%}"]
    lines += [f"  {name:22} {seconds:9.3f} s  {seconds / best.seconds:6.1%}" for name, seconds in best.breakdown().items()]
    lines.append(f"peak memory {fullest.total / 1e9:.1f} GB of {max(best.capacity) / 1e9:.1f} GB")
    lines += [f"  {f.name:22} {getattr(fullest, f.name) / 1e9:9.2f} GB" for f in fields(fullest)]
    state = "no plan of the space is faster"
    if not result.proved:
        state = f"stopped early: a plan of {result.open_bound:.3f} s is not ruled out"
    lines.append(f"lower bound {result.lower_bound:.3f} s without bubbles and memory (gap {result.gap:.1%}); {state}; "
                 f"{result.considered} combinations, {result.simulated} simulated, {result.seconds:.1f} s")
    lines += [f"  next best: {r.plan.label}: {r.seconds / best.seconds - 1:+.1%}, {r.peak_memory / 1e9:.1f} GB"
              for r in result.alternatives[:5]]
    return "\n".join(lines)


def why_not(problem: Problem, result: SearchResult, pins: Mapping[str, Any]) -> str:
    """What the best plan with `pins` costs, and why: searched afresh with the pins held."""
    wanted = ", ".join(f"{k}={v}" for k, v in pins.items())
    if all(getattr(result.plan, k, None) == v for k, v in pins.items()):
        return f"{wanted}: the plan has it"
    changed = replace(result.plan, split=(), **pins)
    try:
        found = search(replace(problem, space=problem.space.pin(**pins)))
    except Infeasible as error:
        reasons = [r for r in plan_problems(changed, problem.config, problem.cluster, problem.global_batch) if r not in str(error)]
        return f"{wanted}: not possible: {error}" + (f" ({'; '.join(reasons)})" if reasons else "")
    return f"{wanted}: best is {found.plan.label}\n" + diff(result.best, found.best)


def diff(a: StepReport, b: StepReport) -> str:
    """Fields of the plans that differ, and what each cause of time and memory gains or loses from a to b."""
    lines = [f"  {f.name}: {getattr(a.plan, f.name)} -> {getattr(b.plan, f.name)}" for f in fields(Plan)
             if getattr(a.plan, f.name) != getattr(b.plan, f.name)]
    lines.append(f"  step {a.seconds:.3f} s -> {b.seconds:.3f} s ({b.seconds / a.seconds - 1:+.1%})")
    before, after = a.breakdown(), b.breakdown()
    lines += [f"    {name:22} {after[name] - before[name]:+9.3f} s" for name in before
              if abs(after[name] - before[name]) > 0.002 * a.seconds]
    lines.append(f"  memory {a.peak_memory / 1e9:.1f} GB -> {b.peak_memory / 1e9:.1f} GB")
    return "\n".join(lines)


def _first(problem: Problem, plans: list[Plan]) -> StepReport | None:
    """The fastest of the plans that run and fit."""
    reports = [predict_step(problem.config, p, problem.cluster, problem.global_batch, problem.software, exact=False)
               for p in plans if not plan_problems(p, problem.config, problem.cluster, problem.global_batch)]
    limits = [r for r in reports if r.fits and r.peak_memory <= problem.capacity(problem.cluster.device)]
    return min(limits, key=lambda r: r.seconds, default=None)


def by_hand(problem: Problem) -> dict[str, StepReport | None]:
    """What a user would set up: DDP, FSDP (ZeRO-3), Megatron TP in a node x PP; micro-batch and recomputation at their
    best.

    None: that way does not fit or does not divide.
    """
    n, tp = problem.cluster.size, min(problem.cluster.node_size, problem.config.heads)

    def tuned(plan: Plan) -> list[Plan]:
        per = problem.global_batch // max(1, plan.dp)
        return [replace(plan, micro_batch=mb, recompute=r) for mb in divisors(max(1, per)) if mb <= 8
                for r in ("none", "selective", "full")]

    ways: dict[str, Callable[[], list[Plan]]] = {
        "DDP": lambda: tuned(Plan(dp=n)),
        "FSDP (ZeRO-3)": lambda: tuned(Plan(dp=n, zero=3)),
        f"Megatron TP{tp} x PP": lambda: [
            p for pp in divisors(n // tp) if pp <= problem.config.layers
            for p in tuned(Plan(dp=n // tp // pp, tp=tp, pp=pp, sp=tp > 1, zero=1))],
    }
    return {name: _first(problem, make()) for name, make in ways.items()}

