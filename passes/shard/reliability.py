"""What a long run really gives: stragglers, failures, checkpoints, restarts, and going on with the nodes that are left.

Entry points:
- `with_stragglers(config, plan, cluster, batch, jitter)`: the step when devices differ in speed;
- `Failures`, `run_with_failures(step_s, devices, failures)`: a discrete-event run of days; `best_interval` (Young 1974, Daly 2006);
- `pipeline_templates`, `elastic_plan(problem, plan, survivors)`: re-planning onto the surviving nodes as in Oobleck (Jang et al. 2023):
  pipelines of different depths that together use every node, with the micro-batches dealt so that all finish together.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from math import inf, sqrt

import numpy as np

from .cluster import Cluster
from .model import ModelConfig
from .partition import even_split
from .plan import Plan, plan_problems
from .step import StepReport, predict_step

__all__ = ["Elastic", "Failures", "RunReport", "Template", "best_interval", "elastic_plan", "pipeline_templates", "run_with_failures",
           "with_stragglers"]


def with_stragglers(config: ModelConfig, plan: Plan, cluster: Cluster, global_batch: int, jitter: float, slowest: float = 1.0,
                    software: str = "aicc", seed: int = 0) -> StepReport:
    """The step when every device's speed varies: its time is multiplied by 1 + |normal| * jitter, and one device's by `slowest`.

    A tensor (and context) group runs at its slowest member's pace, a pipeline rank so; the data-parallel ranks wait for the slowest
    pipeline. The few pipelines that may be slowest are run, not all. Raises ValueError for a negative jitter or a speed-up.
    """
    if jitter < 0 or slowest < 1:
        raise ValueError(f"jitter = {jitter}, slowest = {slowest}: jitter must not be negative and the slowest device at least 1.0")
    factors = 1.0 + np.abs(np.random.default_rng(seed).normal(size=(plan.pp, plan.dp, plan.tp * plan.cp))) * jitter
    factors[0, 0, 0] *= slowest
    ranks = factors.max(axis=2)  # (pp, dp)
    candidates = {int(ranks.max(axis=0).argmax()), *np.argsort(ranks.sum(axis=0))[-3:].tolist()}
    reports = [predict_step(config, plan, cluster, global_batch, software, exact=False, slowdown=tuple(ranks[:, d].tolist()))
               for d in sorted(candidates)]
    return max(reports, key=lambda r: r.seconds)


@dataclass(frozen=True)
class Failures:
    """mtbf_s: mean seconds between failures of one device (exponential). checkpoint_s: seconds that writing one stops the run.
    restart_s: from a failure to the first new step, detection, rescheduling and loading included. interval_s: seconds of work between
    checkpoints, 0: the best one. repair_s: until a failed node is back (elastic runs go on without it; others wait).
    """

    mtbf_s: float
    checkpoint_s: float = 30.0
    restart_s: float = 300.0
    interval_s: float = 0.0
    repair_s: float = 0.0


def best_interval(failures: Failures, devices: int) -> float:
    """Seconds of work between checkpoints that lose least (Daly's first order: sqrt(2 * C * M) - C, M the fleet's mean time between
    failures), never less than one checkpoint's own time.
    """
    fleet = failures.mtbf_s / devices
    return max(failures.checkpoint_s, sqrt(2 * failures.checkpoint_s * fleet) - failures.checkpoint_s)


@dataclass(frozen=True)
class RunReport:
    """A run of `seconds`: the share that went into steps that count (goodput), and where the rest went, in seconds."""

    seconds: float
    steps: float
    goodput: float
    failures: int
    lost: float
    checkpointing: float
    down: float
    interval_s: float


def run_with_failures(step_s: float, devices: int, failures: Failures, days: float = 30.0, seed: int = 0) -> RunReport:
    """Run for `days`: work, checkpoint, fail, roll back, restart, again. Events only, so the fleet's size does not matter.

    Raises ValueError for times that are not positive.
    """
    if step_s <= 0 or failures.mtbf_s <= 0 or devices < 1 or days <= 0:
        raise ValueError("step time, mtbf, devices and days must be positive")
    interval = failures.interval_s or best_interval(failures, devices)
    rng, end, now = np.random.default_rng(seed), days * 86400.0, 0.0
    fleet, kept, since, lost, writing, down, count = failures.mtbf_s / devices, 0.0, 0.0, 0.0, 0.0, 0.0, 0
    fails = float(rng.exponential(fleet))
    while now < end:
        due = now + interval - since  # the next checkpoint starts
        if min(fails, end) >= due + failures.checkpoint_s:
            now, kept, since = due + failures.checkpoint_s, kept + interval, 0.0
            writing += failures.checkpoint_s
            continue
        if fails >= end:
            kept += since + max(0.0, min(end, due) - now)  # the run ends in good order
            break
        worked = since + max(0.0, min(fails, due) - now)
        writing += max(0.0, fails - due)
        lost, since, count = lost + worked, 0.0, count + 1
        stop = failures.restart_s + failures.repair_s
        down += min(stop, end - fails)
        now = fails + stop
        fails = now + float(rng.exponential(fleet))
    return RunReport(end, kept / step_s, kept / end, count, lost, writing, down, interval)


@dataclass(frozen=True)
class Template:
    """A pipeline on `nodes` nodes: its plan (dp 1), seconds per further micro-batch, and seconds of the first one."""

    nodes: int
    plan: Plan
    period: float
    fill: float

    def seconds(self, micro_batches: int) -> float:
        return self.fill + (micro_batches - 1) * self.period if micro_batches else 0.0


def pipeline_templates(config: ModelConfig, plan: Plan, cluster: Cluster, capacity: float = inf) -> list[Template]:
    """Pipelines of `plan`'s tensor, context and micro-batch sizes on 1, 2, ... nodes, every one that fits in memory; deeper ones than
    twice the plan's own depth are left out. The schedule is 1F1B, which every depth can run.
    """
    per_stage, found = plan.tp * plan.cp, []
    own = max(1, -(-per_stage * plan.pp // cluster.node_size))
    for nodes in range(1, 2 * own + 1):
        devices = nodes * cluster.node_size
        pp = devices // per_stage
        if devices % per_stage or not 1 <= pp <= config.layers:
            continue
        alone = replace(plan, dp=1, pp=pp, ep=1 if config.moe is None else min(plan.ep, per_stage), schedule="1f1b", interleave=1, zero=0,
                        split=even_split(config.layers, pp))
        small = replace(cluster, groups=(replace(cluster.groups[0], nodes=nodes),))
        counts = (4 * pp, 8 * pp)
        if plan_problems(alone, config, small, counts[0] * alone.micro_batch):
            continue
        few, many = (predict_step(config, alone, small, m * alone.micro_batch) for m in counts)
        if few.peak_memory <= min(capacity, few.capacity[0]):
            period = (many.pipeline - few.pipeline) / (counts[1] - counts[0])
            found.append(Template(nodes, alone, period, few.pipeline - (counts[0] - 1) * period))
    return found


@dataclass(frozen=True)
class Elastic:
    """Pipelines on the surviving nodes. pipelines: (template, micro-batches) each; seconds: of a step without the data-parallel
    exchange; idle_nodes: left out.
    """

    pipelines: tuple[tuple[Template, int], ...]
    seconds: float
    idle_nodes: int


def elastic_plan(config: ModelConfig, plan: Plan, cluster: Cluster, global_batch: int, survivors: int) -> Elastic | None:
    """The fastest set of pipelines on `survivors` nodes of a uniform cluster, or None when no template fits.

    Which counts of each template use most nodes at the highest summed rate: dynamic programming over nodes. Then micro-batches go one by
    one to the pipeline that would finish first, which is the fastest way to deal them.
    """
    templates = pipeline_templates(config, plan, cluster)
    if not templates or survivors < min(t.nodes for t in templates):
        return None
    best: list[tuple[float, tuple[Template, ...]]] = [(0.0, ())] * (survivors + 1)
    for nodes in range(1, survivors + 1):
        best[nodes] = best[nodes - 1]
        for template in templates:
            if template.nodes <= nodes:
                rate, before = best[nodes - template.nodes]
                if rate + 1 / template.period > best[nodes][0] * (1 + 1e-12):
                    best[nodes] = (rate + 1 / template.period, (*before, template))
    chosen = best[survivors][1]
    total = global_batch // plan.micro_batch
    dealt = [0] * len(chosen)
    heap = [(t.fill, i) for i, t in enumerate(chosen)]
    heapq.heapify(heap)
    for _ in range(total):
        finish, i = heapq.heappop(heap)
        dealt[i] += 1
        heapq.heappush(heap, (finish + chosen[i].period, i))
    rows = tuple((t, n) for t, n in zip(chosen, dealt, strict=True))
    return Elastic(rows, max(t.seconds(n) for t, n in rows), survivors - sum(t.nodes for t in chosen))
