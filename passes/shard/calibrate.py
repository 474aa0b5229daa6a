"""Calibration: the cost model's constants, their fit to published runs, and their fit to measurements on a machine.

Entry points:
- `CONSTANTS`: every constant of the model, what it means, and whether it is fitted;
- `fit_constants(cases)`: least squares on the rows of `published.FITTED`, for the constants marked fitted;
- `fit_gemm`, `fit_attention`, `fit_memory`, `fit_link`: from timed samples to `Efficiency` and `Level` values;
- `cluster_toml(cluster)`: the cluster file to write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import least_squares  # type: ignore[import-untyped]

from .cluster import Cluster, Device, Level
from .collectives import ALGORITHMS
from .curves import Curve, rising
from .kernels import ATTENTION_BACKWARD, gemm_time
from .published import Case, predict_case

__all__ = ["CONSTANTS", "Constant", "GemmSample", "LinkSample", "cluster_toml", "fit_attention", "fit_constants", "fit_gemm",
           "fit_link", "fit_memory", "with_constants"]


@dataclass(frozen=True)
class Constant:
    """One constant of the cost model. bounds are physical; `read` and `write` find it in a cluster."""

    name: str
    meaning: str
    fitted: bool
    bounds: tuple[float, float]
    read: Callable[[Cluster], float]
    write: Callable[[Cluster, float], Cluster]


def _device(cluster: Cluster, **changes: Any) -> Cluster:
    """The cluster with its first device's efficiency changed."""
    group = cluster.groups[0]
    device = replace(group.device, efficiency=replace(group.device.efficiency, **changes))
    return replace(cluster, groups=(replace(group, device=device), *cluster.groups[1:]))


def _level(cluster: Cluster, index: int, efficiency: float) -> Cluster:
    levels = list(cluster.levels)
    levels[index] = replace(levels[index], efficiency=efficiency)
    return replace(cluster, levels=tuple(levels))


def _efficiency(name: str, meaning: str, fitted: bool, bounds: tuple[float, float]) -> Constant:
    return Constant(name, meaning, fitted, bounds, lambda c: float(getattr(c.groups[0].device.efficiency, name)),
                    lambda c, v: _device(c, **{name: v}))


CONSTANTS: tuple[Constant, ...] = (
    _efficiency("gemm", "fraction of peak FLOP/s of a large GEMM in full waves", True, (0.4, 1.0)),
    _efficiency("memory", "fraction of memory bandwidth of element-wise kernels", True, (0.3, 1.0)),
    Constant("network", "fraction of line rate of long messages between nodes", True, (0.3, 1.0),
             lambda c: c.levels[1].efficiency, lambda c, v: _level(c, 1, v)),
    Constant("fabric", "fraction of line rate of long messages inside a node (nccl-tests bus bandwidth over line rate)", False,
             (0.3, 1.0), lambda c: c.levels[0].efficiency, lambda c, v: _level(c, 0, v)),
    _efficiency("gemm_half_k", "K at which a GEMM tile's fixed cost equals its main loop (one 128-deep pipeline fill)", False,
                (0.0, 1024.0)),
    _efficiency("kernel_overhead_s", "seconds lost per kernel", False, (0.0, 1e-4)),
    _efficiency("attention", "fraction of peak FLOP/s of streaming attention (no published row uses it)", False, (0.1, 1.0)),
)


def with_constants(cluster: Cluster, values: dict[str, float]) -> Cluster:
    """The cluster with the named constants set. Raises KeyError for an unknown name."""
    known = {c.name: c for c in CONSTANTS}
    for name, value in values.items():
        cluster = known[name].write(cluster, value)
    return cluster


def fit_constants(cases: Sequence[Case]) -> dict[str, float]:
    """Fit the constants marked `fitted` to the cases marked fitted: least squares of relative errors from the cases' own
    cluster.

    All cases must be on one kind of cluster. Raises ValueError when there are fewer fitted cases than constants.
    """
    chosen = [c for c in cases if c.fitted]
    free = [c for c in CONSTANTS if c.fitted]
    if len(chosen) < len(free):
        raise ValueError(f"{len(chosen)} fitted rows cannot fix {len(free)} constants")

    def errors(point: np.ndarray) -> list[float]:
        values = dict(zip((c.name for c in free), point, strict=True))
        return [predict_case(replace(case, cluster=with_constants(case.cluster, values))).error for case in chosen]

    start = np.array([c.read(chosen[0].cluster) for c in free])
    bounds = tuple(np.array([c.bounds[i] for c in free]) for i in (0, 1))
    found = least_squares(errors, start, bounds=bounds, diff_step=1e-2, x_scale=start, max_nfev=20)
    return {c.name: float(v) for c, v in zip(free, found.x, strict=True)}


@dataclass(frozen=True)
class GemmSample:
    """A timed GEMM of m x k by k x n."""

    m: int
    n: int
    k: int
    seconds: float


@dataclass(frozen=True)
class LinkSample:
    """A timed collective: kind and algorithm of `collectives.ALGORITHMS`, full buffer in bytes, ranks on one level."""

    kind: str
    algorithm: str
    nbytes: float
    ranks: int
    seconds: float


def fit_gemm(device: Device, dtype: str, samples: Sequence[GemmSample]) -> Device:
    """The device with `gemm`, `gemm_half_k` and `kernel_overhead_s` fitted to samples (at least three, of different
    sizes).
    """
    if len(samples) < 3:
        raise ValueError(f"{len(samples)} GEMM samples; at least three are needed")

    def candidate(point: np.ndarray) -> Device:
        return replace(device, efficiency=replace(device.efficiency, gemm=float(point[0]), gemm_half_k=float(point[1]),
                                                  kernel_overhead_s=float(point[2]) * 1e-6))

    def errors(point: np.ndarray) -> list[float]:
        trial = candidate(point)
        return [gemm_time(trial, dtype, 1, s.m, s.n, s.k) / s.seconds - 1 for s in samples]

    e = device.efficiency
    start = np.array([e.gemm, e.gemm_half_k, max(0.5, e.kernel_overhead_s * 1e6)])
    found = least_squares(errors, start, bounds=([0.01, 0.0, 0.0], [1.0, 4096.0, 1000.0]), diff_step=1e-2,
                          x_scale=[0.1, 50.0, 5.0], max_nfev=60, loss="soft_l1", f_scale=0.1)  # a disturbed sample counts less
    return candidate(found.x)


def fit_attention(device: Device, dtype: str, samples: Sequence[tuple[float, float, float]]) -> Device:
    """The device with `attention` and `attention_backward` from (FLOPs forward, seconds forward, seconds backward) samples: geometric means."""
    if not samples:
        raise ValueError("no attention samples; at least one is needed")
    peak, overhead = device.flops(dtype), device.efficiency.kernel_overhead_s
    forward = [flops / max(1e-9, ahead - overhead) / peak for flops, ahead, _ in samples]
    ratio = [ATTENTION_BACKWARD * max(1e-9, ahead - overhead) / max(1e-9, back - overhead) for _, ahead, back in samples]
    rate, back = (float(np.exp(np.mean(np.log(x)))) for x in (forward, ratio))
    return replace(device, efficiency=replace(device.efficiency, attention=min(1.0, rate), attention_backward=back))


def fit_memory(device: Device, samples: Sequence[tuple[float, float]]) -> Device:
    """The device with `memory` fitted to (bytes moved, seconds) samples: the slope of seconds over bytes, at most the full rate; and with
    the samples themselves as its `memory_curve`, since caches make small kernels faster than any one rate.
    """
    sizes, seconds = (np.array([s[i] for s in samples], dtype=float) for i in (0, 1))
    if len(set(sizes)) < 2:
        raise ValueError("memory samples of one size only; at least two sizes are needed")
    slope = max(float(np.polyfit(sizes, seconds, 1, w=1 / seconds)[0]), 1e-30)
    curve = rising(tuple(sorted((float(n), float(t)) for n, t in samples)))
    return replace(device, efficiency=replace(device.efficiency, memory=min(1.0, 1 / slope / device.memory_bandwidth), memory_curve=curve))


def fit_link(level: Level, samples: Sequence[LinkSample]) -> Level:
    """The level with alpha and efficiency fitted to samples. A collective's time is steps * alpha + bytes / rate, so both
    coefficients come from the formula itself. Samples of groups of all its children become its curves, the formulas are for other groups.
    Raises ValueError when the samples do not fix both.
    """
    rows = []
    for s in samples:
        formula = ALGORITHMS[s.kind][s.algorithm]
        rows.append((formula(s.ranks, 0.0, 1.0, 1.0), formula(s.ranks, s.nbytes, 0.0, 1.0), s.seconds))
    table = np.array(rows, dtype=float)
    if len(table) < 2 or np.linalg.matrix_rank(table[:, :2] / table[:, 2:]) < 2:
        raise ValueError("link samples of one size only; at least two sizes are needed")
    weighted = table[:, :2] / table[:, 2:]
    scale, trust = weighted.max(axis=0), np.ones(len(table))
    for _ in range(8):  # least squares of relative errors, with disturbed samples counting less each time (Huber's weights)
        solution = np.linalg.lstsq(weighted / scale * trust[:, None], trust, rcond=None)[0] / scale
        errors = np.abs(weighted @ solution - 1)
        trust = np.sqrt(np.minimum(1.0, 0.1 / np.maximum(errors, 1e-12)))
    alpha, per_byte = float(max(solution[0], 0.0)), float(max(solution[1], 1e-30))
    points: dict[str, dict[float, float]] = {}
    for s in samples:
        if s.ranks == level.size:
            points.setdefault(s.kind, {})[s.nbytes] = s.seconds
    curves = tuple((kind, rising(tuple(sorted(found.items())))) for kind, found in points.items() if len(found) > 1)
    return replace(level, alpha=alpha, efficiency=min(1.0, 1 / per_byte / level.bandwidth), curves=curves)


def cluster_toml(cluster: Cluster) -> str:
    """A cluster file of a uniform cluster; `load_cluster` reads it back equal. Raises ValueError for a mixed cluster."""
    if len(cluster.groups) != 1:
        raise ValueError(f"cluster {cluster.name} mixes devices; write its groups by preset")
    device = cluster.groups[0].device
    lines = [f'name = "{cluster.name}"', f"nodes = {cluster.groups[0].nodes}", "", "[device]", f'name = "{device.name}"']
    facts = ("memory_bytes", "memory_bandwidth", "cores", "reserved_bytes", "host_bandwidth", "overlap_loss")
    lines += [f"{f} = {getattr(device, f)!r}" for f in facts]
    lines += ["", "[device.peak_flops]", *(f"{d} = {v!r}" for d, v in device.peak_flops.items())]
    lines += ["", "[device.efficiency]", *(f"{f} = {_value(v)}" for f, v in vars(device.efficiency).items() if v != ())]
    for level in cluster.levels:
        lines += ["", "[[levels]]", *(f"{f} = {_value(v)}" for f, v in vars(level).items() if f != "curves")]
        if level.curves:
            lines += ["", "[levels.curves]", *(f"{kind} = {_value(curve)}" for kind, curve in level.curves)]
    return "\n".join(lines) + "\n"


def _value(value: str | float | Curve) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    return repr(value) if isinstance(value, int | float) else repr([list(point) for point in value])
