"""The plans that the search looks at: which degrees, micro-batches, schedules and policies are possible.

Entry points: `Space` (what is allowed, with pins), `skeletons(...)` (plans without schedule and split, ZeRO as a choice
of gathering), `schedule_choices(...)`. Everything here is enumeration; nothing is dropped for being slow (bounds do that
in `planner.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

from .cluster import Cluster
from .model import ModelConfig
from .plan import CONTEXT, RECOMPUTE, Plan, plan_problems
from .schedules import SCHEDULES, schedule_problem
from .tables import ConfigError, nearest

__all__ = ["Space", "divisors", "parse_pins", "schedule_choices", "skeletons"]


@dataclass(frozen=True)
class Space:
    """What may be chosen. pins: (plan field, value) pairs that every plan keeps. Tensor parallelism stays inside a node
    unless pinned.

    gpipe is left out by default: 1F1B takes the same time and less memory. offload is tried only when allowed.
    """

    schedules: tuple[str, ...] = ("1f1b", "interleaved", "zb-h1", "zb-v", "dualpipe", "dualpipe-v")
    recompute: tuple[str, ...] = RECOMPUTE
    zero: tuple[int, ...] = (0, 1, 2, 3)
    max_micro_batch: int = 16
    max_interleave: int = 12
    max_context: int = 32
    min_rows: int = 1024  # sequence positions per context rank
    offload: bool = False
    pins: tuple[tuple[str, Any], ...] = ()

    def pin(self, **pins: Any) -> Space:
        """This space with more pins (later ones win). Raises ConfigError for an unknown field, or an unknown name of a choice."""
        known = [f.name for f in fields(Plan)]
        for name, value in pins.items():
            if name not in known:
                raise ConfigError(f"'{name}' is not a field of a plan; {nearest(name, known)}")
            choices = {"schedule": SCHEDULES, "recompute": RECOMPUTE, "context": CONTEXT}.get(name)
            if choices is not None and value not in choices:
                raise ConfigError(f"{name} '{value}' is unknown; {nearest(str(value), list(choices))}")
        return replace(self, pins=tuple({**dict(self.pins), **pins}.items()))

    def values(self, field: str, usual: tuple[Any, ...]) -> tuple[Any, ...]:
        """The pinned value alone, or the usual ones."""
        pinned = dict(self.pins)
        return (pinned[field],) if field in pinned else usual


def parse_pins(text: str) -> dict[str, Any]:
    """Pins from `tp=8,zero=1,recompute=full`. Raises ConfigError for unknown fields and values of the wrong type."""
    kinds: dict[str, type] = {name: type(value) for name, value in vars(Plan()).items()}
    pins: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (s.strip() for s in item.partition("="))
        if name not in kinds or not equals:
            raise ConfigError(f"'{item}': write field=value; {nearest(name, kinds)}")
        kind = kinds[name]
        if kind is tuple:
            pins[name] = tuple(int(v) for v in value.split("+"))
        elif kind is bool:
            if value.lower() not in ("true", "false"):
                raise ConfigError(f"'{item}': {name} must be true or false")
            pins[name] = value.lower() == "true"
        elif kind is int:
            if not value.isdigit():
                raise ConfigError(f"'{item}': {name} must be a whole number")
            pins[name] = int(value)
        else:
            pins[name] = value
    return pins


def divisors(n: int) -> tuple[int, ...]:
    """All divisors of n, ascending."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return tuple(sorted({*small, *(n // d for d in small)}))


def skeletons(config: ModelConfig, cluster: Cluster, global_batch: int, space: Space) -> Iterator[Plan]:
    """Every combination of degrees, micro-batch, recomputation and gathering (zero 0 stands for 0 to 2, zero 3 for itself).

    Schedule and split are left at their defaults.
    """
    size = cluster.size
    zeros = [z for z in (0, 3) if any(v == 3 if z == 3 else v < 3 for v in space.values("zero", space.zero))]
    for tp in space.values("tp", tuple(d for d in divisors(config.heads) if d <= cluster.node_size)):
        for cp in space.values("cp", _contexts(config, space)):
            if size % (tp * cp):
                continue
            for pp in space.values("pp", tuple(d for d in divisors(size // (tp * cp)) if d <= config.layers)):
                if size % (tp * cp * pp):
                    continue
                dp = size // (tp * cp * pp)
                if dp not in space.values("dp", (dp,)) or global_batch % dp:
                    continue
                yield from _policies(config, Plan(dp=dp, tp=tp, cp=cp, pp=pp), global_batch, space, zeros, cluster)


def _contexts(config: ModelConfig, space: Space) -> tuple[int, ...]:
    return tuple(d for d in divisors(config.seq) if d <= space.max_context and (d == 1 or config.seq // d >= space.min_rows))


def _policies(config: ModelConfig, plan: Plan, global_batch: int, space: Space, zeros: list[int],
              cluster: Cluster) -> Iterator[Plan]:
    experts = config.moe.experts if config.moe else 1
    stage = plan.devices // plan.pp
    micro = tuple(d for d in divisors(global_batch // plan.dp) if d <= space.max_micro_batch)
    choices = product(
        space.values("ep", tuple(d for d in divisors(experts) if stage % d == 0)),
        space.values("sp", (True, False) if plan.tp > 1 else (False,)), space.values("micro_batch", micro),
        space.values("recompute", space.recompute), zeros if stage > 1 else zeros[:1],
        space.values("offload", (False, True) if space.offload else (False,)))
    for ep, sp, micro_batch, recompute, zero, offload in choices:
        found = replace(plan, ep=ep, sp=sp, micro_batch=micro_batch, recompute=recompute, zero=zero, offload=offload)
        if plan.cp > 1:  # the search takes the cheaper way; ring is always possible
            found = replace(found, context=space.values("context", ("ring",))[0])
        if not plan_problems(found, config, cluster, global_batch):
            yield found


def schedule_choices(config: ModelConfig, plan: Plan, global_batch: int, space: Space) -> Iterator[Plan]:
    """`plan` under every schedule and interleave that exists for its micro-batches."""
    m = plan.micro_batches(global_batch)
    if plan.pp == 1:
        yield replace(plan, schedule="1f1b", interleave=1)
        return
    for schedule in space.values("schedule", space.schedules):
        most = min(space.max_interleave, config.layers // plan.pp) if schedule == "interleaved" else 1
        for interleave in space.values("interleave", tuple(range(2 if schedule == "interleaved" else 1, most + 1))):
            if schedule_problem(schedule, plan.pp, m, interleave) is None:
                found = replace(plan, schedule=schedule, interleave=interleave)
                if found.parts <= config.layers + 2 and (SCHEDULES[schedule].copies == 1 or plan.zero < 3):
                    yield found
