"""The Triton backend: a host-level module in, cubins and lists of launches out. No GPU is needed to compile.

    compiled = compile_gpu(module, target)
    compiled.program      # JSON data for `runtime.cuda.CudaLibrary`: kernels, functions, constants
    compiled.blobs        # cubins by name
    compiled.sources      # Triton text by kernel, for `aicc dump-ir`

`printer.py` makes the text (with `expressions.py`, `arith.py`, `parts.py`, `helpers.py`), `warp_groups.py` that of streams on Hopper (with
`stream_shape.py`, `descriptors.py`), `compile.py` the cubins, in processes of their own (`workers.py`), `host.py` the list of launches and
`native.py` the machine code that launches them; `simulate.py` runs kernels in Triton's interpreter.
"""

from __future__ import annotations

import base64
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...ir.core import IRError, Operation
from ...ir.expr import product
from ...ir.expr_json import expr_to_json
from ...ir.target import Target
from .compile import CompiledKernel, compile_kernel, triton_cache
from .early_weights import print_early_weights
from .few_rows import print_few_rows
from .host import Copy, Launch, Program, Step, Wait, build_program
from .native import NativeHost, emit_native
from .printer import KernelSource, print_kernel
from .warp_groups import print_warp_groups
from .workers import Workers, start_workers

__all__ = [
    "CompiledGpu",
    "CompiledKernel",
    "KernelSource",
    "NativeHost",
    "Workers",
    "compile_gpu",
    "compile_kernel",
    "emit_native",
    "may_begin",
    "print_kernel",
    "program_json",
    "start_workers",
    "triton_cache",
]


TENSOR_MAPS = 90
"""The compute capability whose kernels read matrices by tensor maps."""
PROGRAMMATIC = 90
"""From this one on, a kernel may be launched before the one in front of it has ended, and waits for that by itself."""
LONG, FEW = 16 << 20, 4
"""Bytes that take some ten times as long as an early start gains, and programs for each multiprocessor, all of which are there at once."""
MANY, LASTING = 16, frozenset({"tile.reduce", "tile.for", "tile.dot", "tile.scan"})
"""Programs per multiprocessor, and ops of programs that live long. Starting early saves a microsecond; 131 MB of zeros by 32000 programs, and rows
added to them by 16384, took 96.4 us with it and 86.0 without (H200)."""


@dataclass(frozen=True)
class CompiledGpu:
    """What the runtime needs, and what people look at. `program` goes into the artifact's manifest under "cuda", `blobs`
    beside it."""

    program: dict[str, Any]
    blobs: dict[str, bytes]
    kernels: dict[str, CompiledKernel]
    sources: dict[str, str]
    host: NativeHost


def compile_gpu(module: Operation, target: Target, *, cache_dir: Path | None = None, threads: int = 1, workers: Workers | None = None) -> CompiledGpu:
    """Compiles a module at the host level (after plan-memory) for a CUDA target, such as `Target(kind="cuda",
    name="sm_90", capability=90)`.

    cache_dir: where sources and Triton's intermediate files go. threads: kernels compiled side by side; with `workers`, by those processes.
    IRError names an op, or shows a kernel, that cannot be compiled.

    The manifest of `compiler.manifest.build_manifest(module)` fits: run with
        CompiledGraph(manifest, library=CudaLibrary(compiled.program, compiled.blobs, device), device=device)
    """
    program = build_program(module)
    sources = {name: _source(kernel, target, program.divisible(name)) for name, kernel in program.kernels.items()}

    def compiled_here_or_there(source: KernelSource, divisible: Sequence[bool]) -> CompiledKernel:
        if workers is not None:
            try:
                return workers.compile(source, target, divisible, cache_dir)
            except OSError as error:
                warnings.warn(f"kernels are compiled in this process, which takes longer: {error}", RuntimeWarning, stacklevel=2)
        return compile_kernel(source, target, divisible=divisible, cache_dir=cache_dir)

    def one(name: str) -> CompiledKernel:
        divisible = program.divisible(name)
        try:
            return compiled_here_or_there(sources[name], divisible)
        except IRError as error:
            if not sources[name].registers:
                raise
            warnings.warn(f"kernel '{name}' is compiled in its plain, slower form: {str(error)[:300]}", RuntimeWarning, stacklevel=2)
            sources[name] = print_kernel(program.kernels[name], dependent=may_begin(program.kernels[name], target))
            return compiled_here_or_there(sources[name], divisible)

    longest_first = sorted(sources, key=lambda name: -len(sources[name].text))
    with triton_cache(cache_dir), ThreadPoolExecutor(workers.count if workers is not None and workers.count else threads) as pool:
        made_of = dict(zip(longest_first, pool.map(one, longest_first), strict=True))
    compiled = {name: made_of[name] for name in sources}
    blobs = {f"cubin_{name}": k.cubin for name, k in compiled.items()}
    made = program_json(program, sources, compiled)
    native = emit_native(program, made["kernels"])
    made["host"] = {"blob": "host", "imports": list(native.imports)}
    texts = {n: s.text for n, s in sources.items()}
    return CompiledGpu(made, {**blobs, "host": native.object_code}, compiled, texts, native)


def _source(kernel: Operation, target: Target, divisible: Sequence[bool]) -> KernelSource:
    """The kernel in the form that suits the target best."""
    made = print_warp_groups(kernel, target, divisible)
    if isinstance(made, str):
        made = print_early_weights(kernel, target, divisible)
    if isinstance(made, str):
        made = print_few_rows(kernel, target, divisible)
    maps = divisible if target.capability == TENSOR_MAPS else ()
    return print_kernel(kernel, maps, dependent=may_begin(kernel, target)) if isinstance(made, str) else made


def may_begin(kernel: Operation, target: Target) -> bool:
    """It may be launched before the kernel in front has ended. Not so a long stream of a few programs for each multiprocessor, as attention over a
    cache in parts: beside programs of the kernel in front they would come to lie unevenly, which costs more than a start. Nor MANY programs that live
    no longer than a load and a store: each pays a little for it."""
    if target.capability < PROGRAMMATIC:
        return False
    programs, moved = product(kernel["grid"]), kernel["bytes"]
    if not isinstance(programs, int):
        return True
    if programs > MANY * target.multiprocessors > 0 and not any(op.name in LASTING for op in kernel.walk()):
        return False
    if not isinstance(moved, int) or not any(op.name == "tile.for" and op["part"] for op in kernel.body):
        return True
    return moved <= LONG or not target.multiprocessors < programs <= FEW * target.multiprocessors


def program_json(
    program: Program, sources: Mapping[str, KernelSource], compiled: Mapping[str, CompiledKernel]
) -> dict[str, Any]:
    """The program as JSON data; kernels without a compiled form (in simulation) have no entry point."""
    kernels: dict[str, Any] = {}
    for name, kernel in program.kernels.items():
        source = sources[name]
        row: dict[str, Any] = {
            "buffers": source.buffers,
            "symbols": list(source.symbols),
            "checks": source.checks,
            "grid": [source.programs] if source.programs else [expr_to_json(g) for g in kernel["grid"]],
        }
        if name in compiled:
            k = compiled[name]
            row |= {
                "blob": f"cubin_{name}",
                "symbol": k.symbol,
                "threads": 32 * k.num_warps,
                "shared": k.shared,
                "registers": k.registers,
                "spills": k.spills,
                "parameters": k.parameters,
                "descriptors": list(k.descriptors),
                "programs": source.programs,
                "dependent": source.dependent,
                "early": source.early,
                "digest": hashlib.sha256(k.cubin).hexdigest()[:16],
            }
        kernels[name] = row
    return {
        "kernels": kernels,
        "constants": [base64.b64encode(c).decode() for c in program.constants],
        "functions": {name: [_step(s) for s in steps] for name, steps in program.functions.items()},
    }


def _step(step: Step) -> list[Any]:
    if isinstance(step, Wait):
        return ["wait", step.stream]
    if isinstance(step, Launch):
        return ["launch", step.kernel, [p.to_json() for p in step.buffers], step.stream, step.line]
    if isinstance(step, Copy):
        return ["copy", step.source.to_json(), step.target.to_json(), expr_to_json(step.bytes), step.stream, step.line]
    return ["product", {name: p.to_json() for name, p in step.places.items()}, dict(step.shape), step.stream, step.line]
