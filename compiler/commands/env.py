"""`aicc env`: what was found on this machine, and what that enables."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape
from rich.table import Table

from ... import __version__
from ...backends.llvm import host_target
from ...ir.expr import sym
from ...ir.target import Target
from ...passes.tiling.cpu_tiles import gemm_tile
from ...runtime.cache import ArtifactCache
from ..env import read_environment
from ..errors import UserError
from .common import Debug, console, reports_errors

__all__ = ["env"]

_NOTABLE = ("sse4.2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512vnni", "avx512bf16", "avx512fp16",
            "amx-tile", "amx-bf16", "amx-int8", "neon", "sve", "bf16", "i8mm", "dotprod")


@reports_errors
def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Show what aicc found: CPU, threads, versions, GPU, cache; and what that enables."""
    try:
        facts = _facts()
    except ValueError as e:  # an AICC_ variable without sense
        raise UserError(str(e)) from e
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    out = console()
    table = Table("what", "found", "enables", title=f"aicc {__version__}", title_justify="left")
    for name, row in facts.items():
        table.add_row(name, escape(row["found"]), escape(row["enables"]))
    out.print(table)


def _facts() -> dict[str, dict[str, str]]:
    settings = read_environment()
    target = host_target(settings.features)
    rows: dict[str, tuple[str, str]] = {
        "CPU": (f"{_cpu_name()} ({target.name}, {platform.machine()})", f"code for {target.triple}"),
        "features": (" ".join(f for f in _NOTABLE if f in target.features) or "none of note", _vectors(target)),
        "caches": (f"L1 {_size(target.l1)}, L2 {_size(target.l2)}, L3 {_size(target.l3)}", "sizes of GEMM blocks"),
        "threads": (f"{torch.get_num_threads()} of torch, {os.cpu_count()} CPUs", "parallel loops on torch's own OpenMP threads"),
        "Python": (platform.python_version(), ""),
        "torch": (torch.__version__, "capture, autograd, ATen for what has no lowering"),
        "llvmlite": (_version("llvmlite"), "CPU code"),
        "triton": (_version("triton"), "GPU code, also compiled where there is no GPU" if _version("triton") != "missing" else "no GPU code"),
        "GPU": _gpu(),
        "cache": _cache(settings.cache, settings.cache_dir),
        "strict": ("on" if settings.strict else "off", "a graph that does not compile raises" if settings.strict else
                   "a graph that does not compile runs through ATen, with a warning"),
    }
    return {name: {"found": found, "enables": enables} for name, (found, enables) in rows.items()}


def _vectors(target: Target) -> str:
    rows, columns, _ = gemm_tile(target, sym("m"), sym("n"), sym("k"))
    return (f"{target.vector_bits}-bit vectors: {target.lanes(32)}-lane float32 kernels, {rows}x{columns} GEMM tiles in "
            f"{target.vector_registers} registers")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor() or "unknown")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def _gpu() -> tuple[str, str]:
    if not torch.cuda.is_available():
        return "none", "CPU only here; kernels for a named GPU can still be compiled"
    p = torch.cuda.get_device_properties(0)
    return (f"{torch.cuda.device_count()} x {p.name}, sm_{p.major}{p.minor}, {p.total_memory >> 30} GiB, {p.multi_processor_count} multiprocessors",
            "model.cuda() through Triton")


def _cache(on: bool, directory: Path) -> tuple[str, str]:
    if not on:
        return "off (AICC_CACHE=0)", "every process compiles anew"
    existing = next((p for p in (directory, *directory.parents) if p.exists()), Path("/"))
    if not os.access(existing, os.W_OK):
        return f"{directory}, not writable", "compiled code is not kept; set AICC_CACHE_DIR to a folder that can be written"
    entries = ArtifactCache(directory).entries() if directory.is_dir() else []
    return f"{directory}: {len(entries)} entries, {_size(sum(size for _, size, _ in entries))}", "compiled code is kept between processes"


_UNITS: tuple[tuple[int, str], ...] = ((30, "GiB"), (20, "MiB"), (10, "KiB"))


def _size(n: int) -> str:
    return next((f"{n / (1 << shift):.3g} {unit}" for shift, unit in _UNITS if n >= 1 << shift), f"{n} B")
