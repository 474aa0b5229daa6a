"""Measuring this machine for the planner: GEMM, memory and collective curves, fitted to a cluster file.

    cluster, report = calibrate(CalibrationRequest(ranks=2))
    Path("here.toml").write_text(cluster_toml(cluster))

One device (a GPU, or as many CPU threads as one rank has) is timed alone; collectives run on `ranks` processes (NCCL on GPUs, gloo on CPUs).
Every time is the best of a few, so that a neighbour on the machine does not count. The model's form is in `passes/shard/kernels.py` and
`collectives.py`; what is fitted to the samples is `gemm`, `gemm_half_k`, `kernel_overhead_s`, `memory`, and per level alpha and efficiency.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ...passes.shard.calibrate import GemmSample, LinkSample, fit_gemm, fit_link, fit_memory
from ...passes.shard.cluster import Cluster, Device, Efficiency, Level, NodeGroup
from ...passes.shard.collectives import ALGORITHMS
from ...passes.shard.kernels import gemm_time, memory_time
from ..errors import UserError

__all__ = ["Calibration", "CalibrationRequest", "calibrate"]

_GEMMS = {"cpu": ((128, 128, 128), (256, 256, 256), (512, 512, 128), (512, 512, 512), (512, 2048, 512), (1024, 1024, 256), (1024, 1024, 1024)),
          "cuda": ((256, 256, 256), (512, 512, 512), (1024, 1024, 1024), (2048, 2048, 512), (4096, 4096, 1024),
                   (4096, 4096, 4096), (8192, 8192, 4096))}
_COPIES = {"cpu": (1 << 20, 1 << 22, 1 << 24, 1 << 26), "cuda": (1 << 24, 1 << 26, 1 << 28, 1 << 30)}
_MESSAGES = (1 << 12, 1 << 16, 1 << 20, 1 << 23, 1 << 25)
_DTYPES = {"cpu": {"fp32": torch.float32}, "cuda": {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}}


@dataclass(frozen=True)
class CalibrationRequest:
    """ranks: processes of a node (1: no collectives are measured). threads: CPU threads of a rank, 0: an equal share. seconds: in all."""

    ranks: int = 0
    device: str = ""
    threads: int = 0
    seconds: float = 30.0
    name: str = ""


@dataclass(frozen=True)
class Calibration:
    """The cluster, and rows of (what, measured seconds, predicted seconds after the fit)."""

    cluster: Cluster
    rows: tuple[tuple[str, float, float], ...]
    seconds: float


def calibrate(request: CalibrationRequest) -> Calibration:
    """Measure and fit. Raises UserError for a device that is not there or nonsense counts."""
    began = time.monotonic()
    device = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in _GEMMS or (device == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"--device {device}: allowed: cpu" + (", cuda" if torch.cuda.is_available() else " (this machine has no CUDA device)"))
    there = torch.cuda.device_count() if device == "cuda" else len(os.sched_getaffinity(0))
    ranks = request.ranks or there
    if not 1 <= ranks <= max(there, 16 if device == "cpu" else 1):
        raise UserError(f"--ranks {ranks}: this machine has {there} {'GPUs' if device == 'cuda' else 'CPU cores'}")
    if request.seconds < 2:
        raise UserError(f"--seconds {request.seconds:g}: at least 2 are needed")
    threads = request.threads or max(1, there // ranks)
    budget = request.seconds / 3
    saved = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found, rows = _measure_device(device, ranks, budget)
    finally:
        torch.set_num_threads(saved)
    level = Level("nvlink" if device == "cuda" else "loopback", ranks, 50e-6, 1e9)
    if ranks > 1:
        samples = _measure_links(device, ranks, threads, budget)
        fastest = max(s.nbytes / s.seconds for s in samples) * 4
        level = fit_link(replace(level, bandwidth=fastest), samples)
        rows += [(f"{s.kind} {int(s.nbytes) >> 10} KiB on {s.ranks} ranks", s.seconds,
                  ALGORITHMS[s.kind][s.algorithm](s.ranks, s.nbytes, level.alpha, level.port_rate)) for s in samples]
    cluster = Cluster(request.name or socket.gethostname() or "here", (NodeGroup(found, 1),), (level,))
    return Calibration(cluster, tuple(rows), time.monotonic() - began)


def _best(call: Callable[[], object], sync: Callable[[], object], budget: float) -> float:
    """The fastest of some calls: at least three, at most 50, for about `budget` seconds."""
    call()
    sync()
    best, spent, count = float("inf"), 0.0, 0
    while count < 3 or (spent < budget and count < 50):
        start = time.perf_counter()
        call()
        sync()
        took = time.perf_counter() - start
        best, spent, count = min(best, took), spent + took, count + 1
    return best


def _measure_device(kind: str, ranks: int, budget: float) -> tuple[Device, list[tuple[str, float, float]]]:
    sync = torch.cuda.synchronize if kind == "cuda" else lambda: None
    samples: dict[str, list[GemmSample]] = {}
    share = budget / (len(_GEMMS[kind]) * len(_DTYPES[kind]))
    for name, dtype in _DTYPES[kind].items():
        for m, n, k in _GEMMS[kind]:
            a, b = torch.randn(m, k, device=kind).to(dtype), torch.randn(k, n, device=kind).to(dtype)
            samples.setdefault(name, []).append(GemmSample(m, n, k, _best(partial(torch.matmul, a, b), sync, share)))
    copies = []
    for size in _COPIES[kind]:
        source, target = torch.ones(size // 4, device=kind), torch.empty(size // 4, device=kind)
        copies.append((2.0 * size, _best(partial(target.copy_, source), sync, budget / len(_COPIES[kind]))))
    peaks = {name: 1.02 * max(2 * s.m * s.n * s.k / s.seconds for s in rows) for name, rows in samples.items()}
    main = max(peaks, key=lambda name: peaks[name])
    if kind == "cuda":
        facts = torch.cuda.get_device_properties(0)
        name, memory, cores = facts.name, float(facts.total_memory), facts.multi_processor_count
    else:
        name = f"CPU, {torch.get_num_threads()} threads a rank"
        memory, cores = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks, 1
    bandwidth = 1.02 * max(nbytes / seconds for nbytes, seconds in copies[-2:])
    device = Device(name, MappingProxyType(peaks), memory, bandwidth, cores, 0.03 * memory, efficiency=Efficiency(attention=0.3))
    device = fit_memory(fit_gemm(device, main, samples[main]), copies)
    rows = [(f"GEMM {main} {s.m} x {s.n} x {s.k}", s.seconds, gemm_time(device, main, 1, s.m, s.n, s.k, unit=4 if main == "fp32" else 2))
            for s in samples[main]]
    rows += [(f"copy {int(nbytes) >> 21} MiB", seconds, memory_time(device, nbytes)) for nbytes, seconds in copies]
    return device, rows


def _measure_links(kind: str, ranks: int, threads: int, budget: float) -> list[LinkSample]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_link_worker, args=(kind, ranks, threads, budget, folder), nprocs=ranks, join=True)  # type: ignore[no-untyped-call]
        return [LinkSample(*row) for row in torch.load(Path(folder) / "samples.pt")]


def _link_worker(rank: int, kind: str, ranks: int, threads: int, budget: float, folder: str) -> None:
    """One rank: times all-reduce and all-gather; rank 0 writes the samples."""
    torch.set_num_threads(threads)
    if kind == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    sync = torch.cuda.synchronize if kind == "cuda" else lambda: None
    samples = []
    for nbytes in _MESSAGES:
        whole = torch.ones(nbytes // 4 // ranks * ranks, device=kind)
        part = torch.ones(whole.numel() // ranks, device=kind)
        parts = list(whole.chunk(ranks))
        calls: dict[str, Callable[[], object]] = {"all_reduce": partial(dist.all_reduce, whole), "all_gather": partial(dist.all_gather, parts, part)}
        for name, call in calls.items():
            seconds = _agreed(call, sync, budget / len(_MESSAGES) / len(calls), kind)
            samples.append((name, "ring", float(whole.numel() * 4), ranks, seconds))
    if rank == 0:
        torch.save(samples, Path(folder) / "samples.pt")
    dist.destroy_process_group()


def _agreed(call: Callable[[], object], sync: Callable[[], object], budget: float, kind: str) -> float:
    """The fastest of a number of calls that all ranks agree on; the slowest rank's time counts."""
    call()
    sync()
    start = time.perf_counter()
    call()
    sync()
    count = torch.tensor([budget / max(1e-6, time.perf_counter() - start)], device=kind)
    dist.all_reduce(count, dist.ReduceOp.MIN)
    best = float("inf")
    for _ in range(max(3, min(50, int(count.item())))):
        dist.barrier()
        start = time.perf_counter()
        call()
        sync()
        took = torch.tensor([time.perf_counter() - start], device=kind)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        best = min(best, float(took.item()))
    return best
