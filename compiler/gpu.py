"""Compiling for a CUDA device: which one a graph is for, what it can do, and the artifact that
`runtime.cuda_graph.CudaGraph` runs.

    device = cuda_device(module)                  # "cuda:0", or None for a program on the CPU
    target = cuda_target(device)
    artifact = compile_cuda(module, target)       # a host-level module -> manifest with its program under "cuda", and cubins
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

from ..backends.triton import Workers, compile_gpu, start_workers
from ..backends.triton.occupancy import occupancy
from ..ir import Operation, Target
from ..ir.core import IRError
from ..runtime.artifact import Artifact
from .env import read_environment
from .manifest import build_manifest

__all__ = ["compile_cuda", "cuda_device", "cuda_target", "kernel_resources", "triton_version", "workers_for"]

MOST_WORKERS = 16
ERRORS = {1: "an index is out of range"}


def cuda_device(module: Operation) -> str | None:
    """The CUDA device of the program's arguments; None if all are on the CPU. IRError if there are several."""
    devices = {
        a["device"]
        for f in module.body
        if f.name == "func"
        for a in f["arg_attrs"]
        if str(a.get("device", "")).startswith("cuda")
    }
    if len(devices) > 1:
        raise IRError(f"a graph for several devices: {', '.join(sorted(devices))}")
    return devices.pop() if devices else None


def cuda_target(device: str) -> Target:
    """What a device of this machine can do. Features, as torch's settings say now: "tf32", float32 products may round their operands;
    "deterministic", results are the same in every run (colliding additions of a scatter are made in order then, by few programs)."""
    chosen = (("tf32", _tf32_allowed()), ("deterministic", torch.are_deterministic_algorithms_enabled()))
    return _target(device, tuple(name for name, on in chosen if on))


@cache
def _target(device: str, features: tuple[str, ...]) -> Target:
    p = torch.cuda.get_device_properties(device)
    capability = 10 * p.major + p.minor
    return Target(
        kind="cuda",
        name=f"sm_{capability}",
        capability=capability,
        multiprocessors=p.multi_processor_count,
        l2=p.L2_cache_size,
        features=tuple(f for f in features if f != "tf32" or capability >= 80),
    )


def _tf32_allowed() -> bool:
    """`torch.backends.cuda.matmul.allow_tf32`, or its successor where this torch has one (they must not be mixed)."""
    settings = torch.backends.cuda.matmul
    try:
        return bool(settings.fp32_precision == "tf32")
    except (AttributeError, RuntimeError):
        return bool(settings.allow_tf32)


def compile_cuda(module: Operation, target: Target, *, cache_dir: Path | None = None, threads: int | None = None,
                 workers: Workers | None = None) -> Artifact:
    """The artifact of a planned host-level module. Kernels compile `threads` at a time (default: one per core, at most 8), or as many as there are
    `workers`."""
    compiled = compile_gpu(module, target, cache_dir=cache_dir, threads=threads or min(8, _cores()), workers=workers)
    manifest = build_manifest(module, errors=ERRORS, device="cuda")
    manifest["cuda"] = compiled.program
    return Artifact(manifest, compiled.blobs)


def workers_for(target: Target) -> Workers | None:
    """The processes that compile for a target: `AICC_WORKERS` of them, by default one per core, at most MOST_WORKERS. They are started by the first
    call and are ready a second or two later. None: kernels are compiled in this process."""
    wanted = read_environment().workers
    count = min(MOST_WORKERS, _cores()) if wanted is None else wanted
    return start_workers(target.capability, count) if count > 1 or wanted else None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def kernel_resources(manifest: Mapping[str, Any], capability: int) -> dict[str, dict[str, Any]]:
    """Of each kernel: registers per thread, spilled and shared bytes, warps, programs per multiprocessor and what limits them."""
    found = {}
    for name, row in manifest["cuda"]["kernels"].items():
        warps = row["threads"] // 32
        held = occupancy(capability, warps, row["registers"], row["shared"])
        found[name] = {"registers": row["registers"], "spills": row["spills"], "shared": row["shared"], "warps": warps,
                       "programs": held.programs, "occupancy": round(held.share, 3), "limit": held.limit}
    return found


def triton_version() -> str:
    """Part of cache keys."""
    return str(triton.__version__)
