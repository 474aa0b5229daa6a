"""From an FX graph to something that runs.

    compile_fx(gm, example_inputs, options)   ->  a callable with AOTAutograd's boxed calling convention

The stages are `frontend.import_graph`, then the pipelines of `pipelines.py`, then a backend; `Compilation` keeps what happened
(remarks, seconds per stage, sizes) for `aicc explain` and `aicc run`. An `Observer` sees the module after every pass.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import llvmlite
import torch
from torch.utils._python_dispatch import _disable_current_modes

from .. import __version__, passes  # noqa: F401  (importing passes registers them)
from ..backends.llvm import compile_module, host_features, host_target
from ..frontend.importer import import_graph
from ..ir import Operation, Target
from ..ir.passes import Pass, PassContext, Remark, parse_pipeline, run_pipeline
from ..ir.printer import print_with_resources
from ..ir.verifier import verify
from ..runtime.artifact import Artifact
from ..runtime.cache import ArtifactCache, cache_key
from ..runtime.cuda_graph import CudaGraph
from ..runtime.executor import CompiledGraph
from .autotune import Tuner, tune_tiles
from .autotune_products import tune_products
from .collector import collector_off
from .env import read_environment
from .errors import SettingError
from .gpu import compile_cuda, cuda_device, cuda_target, kernel_resources, triton_version, workers_for
from .launches import launches, total
from .manifest import build_manifest
from .options import Options
from .pipelines import STAGES, pipeline

__all__ = ["Compilation", "Observer", "compile_fx", "compile_graph", "cpu_target", "lower", "mark_saved", "statistics", "watching"]

Observer = Callable[[str, "Pass | None", Operation], None]
"""Called with the stage, the pass that just ran (None at the end of a stage), and the module."""


@dataclass
class Compilation:
    """What compiling one graph did."""

    name: str
    target: Target
    seconds: dict[str, float] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)
    cached: bool = False
    llvm_ir: str = ""
    graph: CompiledGraph | None = None


def cpu_target(options: Options) -> Target:
    """The host CPU, or what `options.features` says of it. SettingError for a feature that this kind of processor does not have."""
    known = host_features()
    for name in options.features or ():
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            raise SettingError(f"unknown CPU feature '{name}'" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    return host_target(options.features)


def lower(module: Operation, target: Target, options: Options, compilation: Compilation, observe: Observer | None = None) -> None:
    """Takes a graph-level module to the host level in place."""
    ctx = PassContext(target)
    for stage in STAGES:
        start = time.perf_counter()
        run_pipeline(module, parse_pipeline(pipeline(stage, target, options)), ctx, verify_each=options.verify,
                     after_each=None if observe is None else partial(observe, stage))
        if not options.verify:
            verify(module)
        compilation.seconds[stage] = time.perf_counter() - start
        if stage == "tensor" and options.mode == "max-autotune" and _is_here(target):
            kept = read_environment().cache_dir if options.cache else None
            tune_tiles(module, ctx, Tuner(options, kept))
            if target.is_gpu:
                tune_products(module, ctx, torch.device("cuda", torch.cuda.current_device()), kept)
            compilation.seconds["autotune"] = time.perf_counter() - start - compilation.seconds[stage]
        if observe is not None:
            observe(stage, None, module)
    compilation.remarks.extend(ctx.remarks)
    compilation.stats["passes"] = dict(ctx.timings)


def _is_here(target: Target) -> bool:
    """Code for the target can be run by this process."""
    return torch.cuda.is_available() if target.is_gpu else target.digest == host_target(None).digest


def compile_graph(module: Operation, options: Options, *, name: str = "graph", observe: Observer | None = None,
                  device: str | None = None) -> Compilation:
    """Compiles a graph-level module for the device of its arguments, through the artifact cache. An observer bypasses the cache.

    `device` is a CUDA device for a module whose arguments are on none.
    """
    device = cuda_device(module) or device
    target = cpu_target(options) if device is None else cuda_target(device)
    compilation = Compilation(name, target)
    env = read_environment()
    store = ArtifactCache(env.cache_dir) if options.cache and observe is None else None
    key = ""
    if store is not None:
        start = time.perf_counter()
        text, resources = print_with_resources(module, locations=False)
        key = cache_key([text, *sorted(resources), options.key, target.digest, __version__, torch.__version__, llvmlite.__version__,
                         triton_version(), platform.machine(), _source_digest(), _tuned_for(options),
                         *(str(op.location) for op in module.walk() if op.name == "graph.extern")])
        found = store.get(key)
        compilation.seconds["cache"] = time.perf_counter() - start
        if found is not None:
            compilation.cached = True
            compilation.stats.update(found.manifest.get("stats", {}))
            compilation.graph = _load(found, device, options)
            return compilation
    lower(module, target, options, compilation, observe)
    start = time.perf_counter()
    if device is None:
        compiled = compile_module(module, target, threads=env.workers)
        compilation.llvm_ir = compiled.llvm_ir
        artifact = Artifact(build_manifest(module, errors=compiled.errors), {"object": compiled.object_code})
    else:
        artifact = compile_cuda(module, target, cache_dir=env.cache_dir, workers=workers_for(target))
    compilation.seconds["llvm" if device is None else "triton"] = time.perf_counter() - start
    artifact.manifest["stats"] = statistics(module)
    if device is not None:
        artifact.manifest["stats"]["resources"] = kernel_resources(artifact.manifest, target.capability)
    compilation.stats.update(artifact.manifest["stats"])
    if store is not None:
        store.put(key, Artifact(json.loads(json.dumps(artifact.manifest)), artifact.blobs))
    start = time.perf_counter()
    compilation.graph = _load(artifact, device, options)
    compilation.seconds["load"] = time.perf_counter() - start
    return compilation


def _tuned_for(options: Options) -> str:
    """Measured tiles are the best for a number of threads; modelled ones do not depend on it."""
    return f"{torch.get_num_threads()} threads" if options.mode == "max-autotune" else ""


def _load(artifact: Artifact, device: str | None, options: Options) -> CompiledGraph:
    if device is None:
        return CompiledGraph(artifact.manifest, artifact.blobs["object"])
    return CudaGraph(artifact.manifest, artifact.blobs, device, cudagraphs=options.replays)


def statistics(module: Operation) -> dict[str, Any]:
    """Kernels, launches (outside loops, and in them), externs with their reasons, and the memory plan of a host-level module."""
    func = next(op for op in module.body if op.name == "func")
    externs = [op for op in func.body if op.name == "host.extern"]
    return {"kernels": sum(op.name == "tile.kernel" for op in module.body),
            **total(launches(module)).to_json(),
            "packed": sum(op.name == "host.launch" and op["cached"] for op in func.body),
            "library": sum(op.name == "host.library" for op in func.body),
            "externs": [{"target": op["target"], "reason": op["reason"], "location": str(op.location)} for op in externs],
            "memory": {k: (v if isinstance(v, int) else str(v)) for k, v in func["stats"].items()}}


def compile_fx(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], options: Options | None = None, *, name: str = "graph",
               arg_kinds: Sequence[str] | None = None, observe: Observer | None = None, saved_from: int | None = None) -> CompiledGraph:
    """Compiles an AOTAutograd graph. The result takes a list of arguments (which it empties) and returns a list.

    `saved_from`: the results from this one on are kept for the backward pass, where nobody but it sees them.
    """
    options = options or Options.from_user()
    with collector_off(), _disable_current_modes():  # AOTAutograd compiles under fake tensors; constants must be folded on real ones
        start = time.perf_counter()
        if not options.pack_parameters:
            arg_kinds = None  # nothing is known to stay the same between calls
        module = import_graph(gm, name="main", arg_kinds=arg_kinds, alias_results=True)
        if saved_from is not None:
            mark_saved(module, saved_from)
        spent = time.perf_counter() - start
        compilation = compile_graph(module, options, name=name, observe=observe or _observer(), device=_cuda_device_of(gm))
    compilation.seconds = {"import": spent, **compilation.seconds}
    assert compilation.graph is not None
    for watcher in _WATCHERS:
        if watcher.compiled is not None:
            watcher.compiled(compilation)
    return compilation.graph


def mark_saved(module: Operation, first: int) -> None:
    """Notes on the program's results from number `first` on that the user does not see them (`passes/alias_views.py` shares their memory)."""
    for func in [f for f in module.body if f.name == "func"]:
        func.attributes["result_attrs"] = tuple({**a, "saved": True} if i >= first and a.get("kind", "tensor") == "tensor" else a
                                                for i, a in enumerate(func["result_attrs"]))


def _cuda_device_of(gm: torch.fx.GraphModule) -> str | None:
    """The CUDA device that anything in the graph is on: graphs without arguments make their tensors somewhere too."""
    for node in gm.graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, torch.Tensor) and val.device.type == "cuda":
            return f"cuda:{val.device.index or 0}"
    return None


@dataclass(frozen=True)
class _Watcher:
    observe: Observer | None
    compiled: Callable[[Compilation], None] | None


_WATCHERS: list[_Watcher] = []


@contextmanager
def watching(observe: Observer | None = None, compiled: Callable[[Compilation], None] | None = None) -> Iterator[None]:
    """While it is open, `compiled` is told of every graph that this process compiles, and `observe` sees the passes at work."""
    watcher = _Watcher(observe, compiled)
    _WATCHERS.append(watcher)
    try:
        yield
    finally:
        _WATCHERS.remove(watcher)


def _observer() -> Observer | None:
    return next((w.observe for w in reversed(_WATCHERS) if w.observe is not None), None)


@cache
def _source_digest() -> str:
    """A hash of aicc's own source: artifacts of another version of the compiler are never used."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for folder in ("ir", "frontend", "passes", "backends", "runtime", "compiler"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
