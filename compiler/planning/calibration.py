"""Measuring this machine for the planner: GEMM, attention, memory and collective curves, fitted to a cluster file.

    cluster, report = calibrate(CalibrationRequest(ranks=2))
    Path("here.toml").write_text(cluster_toml(cluster))

All ranks measure at the same time, as they compute at the same time in a training step: what they share (memory, caches, power)
counts. Measured is what programs run: on CPUs code that aicc has compiled, on GPUs the libraries that it calls; collectives are torch's
functional ones, over gloo or NCCL. Times are the lower quartile of many calls, of the slowest rank. The model's form is in
`passes/shard/kernels.py` and `collectives.py`; what is fitted is `gemm`, `gemm_half_k`, `kernel_overhead_s`, `attention`, `memory`, and per
level alpha and efficiency; element-wise kernels and collectives of all ranks are kept as curves.
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
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ...passes.shard.calibrate import GemmSample, LinkSample, fit_attention, fit_gemm, fit_link, fit_memory
from ...passes.shard.cluster import Cluster, Device, Efficiency, Level, NodeGroup
from ...passes.shard.collectives import axis_group, collective_time
from ...passes.shard.kernels import attention_time, gemm_time, memory_time
from ..dynamo import aicc
from ..errors import UserError

__all__ = ["Calibration", "CalibrationRequest", "calibrate"]

_GEMMS = {"cpu": ((256, 256, 256), (512, 512, 128), (512, 512, 512), (512, 2048, 512), (1024, 1024, 256), (1024, 1024, 1024)),
          "cuda": ((256, 256, 256), (512, 512, 512), (1024, 1024, 1024), (2048, 2048, 512), (4096, 4096, 1024),
                   (4096, 4096, 4096), (8192, 8192, 4096))}
_SUMS = {"cpu": (1 << 17, 1 << 19, 1 << 21, 1 << 23, 1 << 25), "cuda": (1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 28)}
"""Bytes of each of the three tensors of an addition."""
_ATTENTION = {"cpu": ((2, 4, 256, 64), (1, 4, 512, 64)), "cuda": ((8, 16, 1024, 64), (2, 16, 4096, 128))}
"""(batch, heads, sequence, head size), causal."""
_MESSAGES = (1 << 12, 1 << 16, 1 << 19, 1 << 21, 1 << 23, 1 << 25)
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
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, args=(device, ranks, threads, request.seconds, folder), nprocs=ranks, join=True)  # type: ignore[no-untyped-call]
        samples = _Samples(**torch.load(Path(folder) / "samples.pt"))
    found, rows = _fit_device(device, ranks, threads, samples)
    level = Level("nvlink" if device == "cuda" else "loopback", ranks, 50e-6, 1e9)
    if ranks > 1:
        links = [LinkSample(*row) for row in samples.links]
        level = fit_link(replace(level, bandwidth=4 * max(s.nbytes / s.seconds for s in links)), links)
    cluster = Cluster(request.name or socket.gethostname() or "here", (NodeGroup(found, 1),), (level,))
    if ranks > 1:
        group = axis_group(cluster, 1, ranks)
        rows += [(f"{s.kind} {int(s.nbytes) >> 10} KiB on {s.ranks} ranks", s.seconds, collective_time(s.kind, s.nbytes, group)) for s in links]
    return Calibration(cluster, tuple(rows), time.monotonic() - began)


@dataclass(frozen=True)
class _Samples:
    """gemms: by dtype, (m, n, k, seconds). sums: (bytes moved, seconds). attention: (FLOPs, seconds forward, seconds backward). links: rows of
    LinkSample.
    """

    gemms: dict[str, list[tuple[int, int, int, float]]]
    sums: list[tuple[float, float]]
    attention: list[tuple[float, float, float]]
    links: list[tuple[str, str, float, int, float]]


def _fit_device(kind: str, ranks: int, threads: int, found: _Samples) -> tuple[Device, list[tuple[str, float, float]]]:
    gemms = {name: [GemmSample(*row) for row in rows] for name, rows in found.gemms.items()}
    peaks = {name: 1.02 * max(2 * s.m * s.n * s.k / s.seconds for s in rows) for name, rows in gemms.items()}
    main = max(peaks, key=lambda name: peaks[name])
    if kind == "cuda":
        facts = torch.cuda.get_device_properties(0)
        name, memory, cores = facts.name, float(facts.total_memory), facts.multi_processor_count
    else:
        name = f"CPU, {threads} threads a rank"
        memory, cores = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks, 1
    bandwidth = 1.02 * max(nbytes / seconds for nbytes, seconds in found.sums[-2:])
    device = Device(name, MappingProxyType(peaks), memory, bandwidth, cores, 0.03 * memory, overlap_loss=0.0 if kind == "cuda" else 1.0,
                    efficiency=Efficiency())
    device = fit_memory(fit_attention(fit_gemm(device, main, gemms[main]), main, found.attention), found.sums)
    rows = [(f"GEMM {main} {s.m} x {s.n} x {s.k}", s.seconds, gemm_time(device, main, 1, s.m, s.n, s.k, unit=4 if main == "fp32" else 2))
            for s in gemms[main]]
    for flops, ahead, back in found.attention:
        rows += [(f"attention {main} {flops / 1e9:.2g} GFLOP", ahead, attention_time(device, main, flops)),
                 ("  its backward pass", back, attention_time(device, main, flops, backward=True))]
    rows += [(f"sum of {int(nbytes) // 3 >> 10} KiB", seconds, memory_time(device, nbytes)) for nbytes, seconds in found.sums]
    return device, rows


class _Timer:
    """Times calls on all ranks at once. empty: seconds of a call that does next to nothing, which a kernel inside a program does not pay."""

    def __init__(self, kind: str, ranks: int):
        self.kind, self.ranks, self.empty = kind, ranks, 0.0
        self.sync: Callable[[], object] = torch.cuda.synchronize if kind == "cuda" else lambda: None

    def __call__(self, call: Callable[[], object], budget: float, before: Callable[[], object] = lambda: None) -> float:
        """Seconds of `call`: the lower quartile, of the slowest rank, over as many calls as `budget` seconds allow (5 to 50). `before` is
        not timed.
        """
        took = [self._once(call, before) for _ in range(2)][-1]
        count = self._slowest(max(5.0, min(50.0, budget / max(1e-6, took))))
        times = torch.tensor([self._once(call, before) for _ in range(int(count))], dtype=torch.float64)
        return self._slowest(float(times.quantile(0.25)))

    def kernels(self, call: Callable[[], object], budget: float, before: Callable[[], object] = lambda: None) -> float:
        """Seconds of the kernels of `call`: without what calling and synchronising take."""
        seconds = self(call, budget, before)
        return max(seconds - self.empty, 0.1 * seconds)

    def _once(self, call: Callable[[], object], before: Callable[[], object]) -> float:
        before()
        self.sync()
        if self.ranks > 1:
            dist.barrier()
            self.sync()
        start = time.perf_counter()
        call()
        self.sync()
        return time.perf_counter() - start

    def _slowest(self, value: float) -> float:
        if self.ranks == 1:
            return value
        agreed = torch.tensor([value], dtype=torch.float64, device=self.kind)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        return float(agreed.item())


def _worker(rank: int, kind: str, ranks: int, threads: int, seconds: float, folder: str) -> None:
    """One rank; rank 0 writes the samples."""
    torch.set_num_threads(threads)
    if kind == "cuda":
        torch.cuda.set_device(rank)
    if ranks > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    timer, budget = _Timer(kind, ranks), seconds / 4
    timer.empty = _empty_call(timer)
    found = _Samples(_measure_gemms(timer, budget), _measure_sums(timer, budget), _measure_attention(timer, budget),
                     _measure_links(timer, rank, budget) if ranks > 1 else [])
    if rank == 0:
        torch.save(vars(found), Path(folder) / "samples.pt")
    if ranks > 1:
        dist.destroy_process_group()


def _empty_call(timer: _Timer) -> float:
    x = torch.ones(16, device=timer.kind)
    return timer(partial(_as_run(timer.kind, torch.add), x, x), 0.5)


def _as_run(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as programs run it: compiled on CPUs; on GPUs eager, which calls the same libraries."""
    return torch.compile(function, backend=aicc, dynamic=False) if kind == "cpu" else function


def _thrice(a: Any, b: Any) -> list[torch.Tensor]:
    """Three products in one program: what a call costs by itself counts a third."""
    return [torch.mm(x, y) for x, y in zip(a, b, strict=True)]


def _measure_gemms(timer: _Timer, budget: float) -> dict[str, list[tuple[int, int, int, float]]]:
    kind, found = timer.kind, {}
    for name, dtype in _DTYPES[kind].items():
        rows = []
        for m, n, k in _GEMMS[kind]:
            a = [torch.randn(m, k, device=kind).to(dtype) for _ in range(3)]
            b = [torch.randn(k, n, device=kind).to(dtype) for _ in range(3)]
            torch.compiler.reset()
            share = budget / len(_GEMMS[kind]) / len(_DTYPES[kind])
            rows.append((m, n, k, timer.kernels(partial(_as_run(kind, _thrice), a, b), share) / 3))
        found[name] = rows
    return found


def _measure_sums(timer: _Timer, budget: float) -> list[tuple[float, float]]:
    rows = []
    for size in _SUMS[timer.kind]:
        x, y = (torch.ones(size // 4, device=timer.kind) for _ in range(2))
        torch.compiler.reset()
        rows.append((3.0 * size, timer.kernels(partial(_as_run(timer.kind, torch.add), x, y), budget / len(_SUMS[timer.kind]))))
    return rows


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def _measure_attention(timer: _Timer, budget: float) -> list[tuple[float, float, float]]:
    kind, rows = timer.kind, []
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    for b, h, s, d in _ATTENTION[kind]:
        q, k, v = (torch.randn(b, h, s, d, device=kind, dtype=dtype, requires_grad=True) for _ in range(3))
        grad = torch.ones_like(q)
        torch.compiler.reset()
        run = _as_run(kind, _causal)
        made: list[torch.Tensor] = []

        def forward(run: Any = run, args: Any = (q, k, v), made: Any = made) -> None:
            made[:] = [run(*args)]

        def backward(args: Any = (q, k, v), made: Any = made, grad: torch.Tensor = grad) -> None:
            torch.autograd.grad(made[0], args, grad)
        ahead = timer.kernels(forward, budget / 4)
        rows.append((2.0 * b * h * s * s * d, ahead, timer.kernels(backward, budget / 4, before=forward)))
    return rows


def _measure_links(timer: _Timer, rank: int, budget: float) -> list[tuple[str, str, float, int, float]]:
    """Every kind of collective as compiled programs start it, and messages between two ranks."""
    kind, ranks, group = timer.kind, timer.ranks, dist.distributed_c10d._get_default_group().group_name
    ops, samples = torch.ops._c10d_functional, []
    for nbytes in _MESSAGES:
        whole = torch.ones(nbytes // 4 // ranks * ranks, device=kind)
        part, into = torch.ones(whole.numel() // ranks, device=kind), torch.empty_like(whole)
        pieces = [part.numel()] * ranks

        def p2p(whole: torch.Tensor = whole, into: torch.Tensor = into) -> None:
            if rank == 0:
                dist.send(whole, 1)
                dist.recv(into, 1)
            elif rank == 1:
                dist.recv(into, 0)
                dist.send(whole, 0)
        calls: dict[str, tuple[str, Callable[[], Any]]] = {
            "all_reduce": ("ring", partial(ops.all_reduce, whole, "sum", group)),
            "all_gather": ("ring", partial(ops.all_gather_into_tensor, part, ranks, group)),
            "reduce_scatter": ("ring", partial(ops.reduce_scatter_tensor, whole, "sum", ranks, group)),
            "all_to_all": ("pairwise", partial(ops.all_to_all_single, whole, pieces, pieces, group)), "p2p": ("direct", p2p)}
        for name, (algorithm, call) in calls.items():
            def run(call: Callable[[], Any] = call) -> None:
                result = call()
                if result is not None:
                    ops.wait_tensor(result)
            seconds = timer(run, budget / len(_MESSAGES) / len(calls))
            samples.append((name, algorithm, float(whole.numel() * 4), ranks, seconds / 2 if name == "p2p" else seconds))
    return samples
