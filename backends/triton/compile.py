"""Triton source -> cubin, on any machine: neither a GPU nor its driver is needed.

    kernel = compile_kernel(source, target, divisible=(True, True))
    kernel.cubin, kernel.symbol, kernel.num_warps, kernel.shared, ...

The source is written to a file of its own below the cache folder (Triton reads functions through `inspect`), which is also
where Triton keeps
its intermediate results.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDAOptions
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from ...ir.core import IRError
from ...ir.target import Target
from .descriptors import descriptor_row
from .elf import resource_usage
from .printer import KernelSource

__all__ = ["CompiledKernel", "compile_kernel", "default_cache", "load_function", "triton_cache"]

ATTEMPTS = 8
SHARED_LIMITS = {70: 96, 75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
"""KiB of shared memory that one block may have, by compute capability (CUDA C++ programming guide, table of technical
specifications)."""


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel as the driver loads it.

    `symbol` is its name in the cubin; `parameters` how many it takes: those of the signature (a descriptor is five), then scratch
    pointers of Triton's own (null when `global_scratch` is 0). `num_warps` counts those of all partitions. `descriptors` are as in
    `descriptors.descriptor_row`. `shared` is dynamic shared memory in bytes, `registers` per thread, `spills` bytes of stack per
    thread.
    """

    name: str
    symbol: str
    cubin: bytes
    source: str
    signature: tuple[str, ...]
    parameters: int
    num_warps: int
    num_stages: int
    shared: int
    registers: int
    spills: int
    global_scratch: int
    checks: int
    descriptors: tuple[dict[str, Any], ...] = ()


def _compiled(source: Any, target: GPUTarget, options: Any) -> Any:
    """triton.compile, again where Python 3.11 and 3.12 mix up the depths of two threads that parse at once (python/cpython#106905)."""
    for _ in range(ATTEMPTS):
        try:
            return triton.compile(source, target=target, options=options)
        except Exception as e:
            if "AST constructor recursion depth mismatch" not in str(e):
                raise
    return triton.compile(source, target=target, options=options)


def compile_kernel(
    source: KernelSource,
    target: Target,
    *,
    divisible: Sequence[bool] = (),
    num_warps: int | None = None,
    num_stages: int | None = None,
    cache_dir: Path | None = None,
) -> CompiledKernel:
    """Compiles for `target.capability`. `divisible` says of each buffer argument whether its address is always a multiple
    of 16.

    cache_dir: where the source file goes. Enter `triton_cache` around calls, to say where Triton's own files go.
    When a block needs more shared memory than the target has, fewer stages are tried.
    IRError, with the source, if Triton rejects it.
    """
    folder = cache_dir or default_cache()
    function = load_function(source, folder)
    arguments = list(source.signature)
    attrs = {(i,): [["tt.divisibility", 16]] for i, d in enumerate(divisible) if d}
    warps = num_warps or source.num_warps or _warps(source)
    most = num_stages or source.num_stages or 3
    limit = SHARED_LIMITS.get(target.capability, 99) * 1024
    gpu = GPUTarget("cuda", target.capability, 32)
    kind = GluonASTSource if source.registers else ASTSource
    for stages in range(most, most - 1, -1) if source.registers else range(most if source.dot else 1, 0, -1):
        options = _options(num_warps=warps, num_stages=stages, enable_fp_fusion=True, enable_reflect_ftz=False, maxnreg=source.registers or None)
        try:
            made = _compiled(kind(function, source.signature, {}, attrs), gpu, options)
        except Exception as e:
            raise IRError(f"Triton rejects kernel '{source.name}': {type(e).__name__}: {str(e)[:2000]}\n{source.text}") from e
        if made.metadata.shared <= limit:
            break
    else:
        raise IRError(
            f"kernel '{source.name}' needs {made.metadata.shared} bytes of shared memory; {target.name} has {limit} per block"
        )
    metadata, cubin = made.metadata, made.asm["cubin"]
    registers, spills = resource_usage(cubin, metadata.name)
    return CompiledKernel(
        source.name,
        metadata.name,
        cubin,
        source.text,
        tuple(source.signature[a] for a in arguments),
        _count_parameters(made.asm["ptx"], metadata.name),
        metadata.num_warps,  # with the warps of other partitions
        stages,
        metadata.shared,
        registers,
        spills,
        getattr(metadata, "global_scratch_size", 0) or 0,
        source.checks,
        tuple(descriptor_row(d, m) for d, m in zip(source.descriptors, metadata.tensordesc_meta if source.descriptors else (), strict=True)),
    )


@contextmanager
def triton_cache(folder: Path | None) -> Iterator[None]:
    """Triton keeps its files below `folder` meanwhile, and leaves paths (line tables) out of its code: it is the same on
    every machine.

    The settings are the process's: enter this in one thread only.
    """
    with triton.knobs.cache.scope(), triton.knobs.compilation.scope():
        triton.knobs.cache.dir = str((folder or default_cache()) / "triton")
        triton.knobs.compilation.disable_line_info = True
        yield


def load_function(source: KernelSource, folder: Path) -> Any:
    """The Triton function of a source, imported from a file under `folder`."""
    digest = hashlib.sha256(source.text.encode()).hexdigest()[:16]
    path = folder / "source" / f"{source.name[:80]}_{digest}.py"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{id(source)}.tmp")
        temporary.write_text(source.text)
        temporary.replace(path)
    spec = importlib.util.spec_from_file_location(f"aicc_kernel_{digest}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, source.name)


def default_cache() -> Path:
    """Below the folder for temporary files, one per user."""
    return Path(tempfile.gettempdir()) / f"aicc-{os.getuid()}"


def _warps(source: KernelSource) -> int:
    """Matrix products keep up to 64 accumulators per thread, others up to 16 elements."""
    threads = source.tile // (64 if source.dot else 8)
    return max(4 if source.dot else 1, min(16 if source.tile >= 8192 and not source.dot else 8, threads // 32))


def _options(**wanted: Any) -> dict[str, Any]:
    """Those options that this version of Triton has."""
    known = {f.name for f in dataclasses.fields(CUDAOptions)}
    return {k: v for k, v in wanted.items() if k in known}


def _count_parameters(ptx: str, name: str) -> int:
    found = re.search(rf"\.visible\s+\.entry\s+{re.escape(name)}\s*\(([^)]*)\)", ptx)
    if found is None:
        raise IRError(f"the PTX of kernel '{name}' has no entry of that name")
    return found.group(1).count(".param")
