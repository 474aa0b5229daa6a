"""Whole models on one GPU against eager and Inductor's modes, in one process: milliseconds, error, peak memory, seconds to compile, and
where the time goes.

    python -m aicc.benchmarks.gpu_models                                          # all rows; eager, Inductor, its CUDA graphs, and aicc's
    python -m aicc.benchmarks.gpu_models --only decode-b1,bert-b1 --profile       # and every kernel's time
    python -m aicc.benchmarks.gpu_models --peers eager,inductor,reduce-overhead,max-autotune --json out.json

Contenders: eager, inductor, reduce-overhead, max-autotune (Inductor's modes), aicc, aicc-reduce-overhead, aicc-max-autotune, and aicc-whole-loss,
which has all logits of a loss in memory. Times are medians of CUDA events around batches of calls, contenders interleaved (training: `alone`, a step
that is waited for, with the host's way to its first kernel). `error` is against
float32 eager on the same weights (rounded to the row's type), as the largest difference over the largest value; eager's own stands beside it. For
training it is that of all gradients. `peak` is what a call allocates above what was there before. Training is forward, loss and backward without an
optimizer, gradients set to None before.
`limit` is weights and caches over the copy bandwidth, or the operations of matrix products over an 8192 cubed product, measured in the same run.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import gc
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("AICC_STRICT", "1")

import torch
from aicc.compiler.driver import Compilation, watching
from aicc.compiler.dynamo import aicc as aicc_backend
from aicc.runtime.cuda_profile import Profile
from torch import Tensor, nn

from . import gpu_networks as networks
from .gpu import limits, milliseconds

DEFAULT = "eager,inductor,reduce-overhead,aicc,aicc-reduce-overhead"
STEPS = 8
"""Steps of training that follow each other without waiting, as in a loop over batches; a step that is waited for is measured beside them."""
READY, RESULT = "-- ready --", "-- result -- "
Calls = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Row:
    """`build()` gives the model (float32, on the CPU) and its inputs (on the CPU; floats take the row's type)."""

    name: str
    build: Callable[[], tuple[nn.Module, tuple[Any, ...]]]
    dtype: torch.dtype = torch.bfloat16
    train: bool = False
    channels_last: bool = False
    bytes: float = 0
    flops: float = 0


def _tokens(vocabulary: int, *shape: int) -> Tensor:
    return torch.randint(0, vocabulary, shape)


LLAMA = (2048, 8, 16, 8, 5632, 32000)
LAYER_WEIGHTS = 2048 * 2048 * 3 + 3 * 2048 * 5632
WEIGHTS = 8 * LAYER_WEIGHTS + 2048 * 32000
CONTEXT = 1024


def _decode(kind: Callable[..., nn.Module], batch: int, functional: bool) -> Row:
    def build() -> tuple[nn.Module, tuple[Any, ...]]:
        cache = [torch.randn(batch, 8, CONTEXT, 128) for _ in range(16)]
        return kind(*LLAMA, CONTEXT), (_tokens(32000, batch, 1), torch.tensor([CONTEXT - 2]), cache)
    held = 16 * batch * 8 * CONTEXT * 128 * 2
    return Row(f"llama-decode{'-functional' if functional else ''}-b{batch}", build, bytes=2 * WEIGHTS + held * (2 if functional else 1))


def _bert(batch: int, train: bool = False) -> Row:
    flops = 2 * batch * 128 * 12 * (12 * 768 * 768 + 2 * 128 * 768)
    return Row(f"bert{'-train' if train else ''}-b{batch}", lambda: (networks.Bert(), (_tokens(30522, batch, 128),)), train=train,
               bytes=2 * 12 * 12 * 768 * 768, flops=flops * (3 if train else 1))


def _resnet(batch: int, train: bool) -> Row:
    return Row(f"resnet50{'-train' if train else ''}-b{batch}", lambda: (networks.ResNet50(), (torch.randn(batch, 3, 224, 224),)),
               torch.bfloat16 if train else torch.float16, train, True, flops=batch * 8.2e9 * (3 if train else 1))


ROWS = [
    Row("llama-prefill-2048", lambda: (networks.Llama(*LLAMA, 2048), (_tokens(32000, 1, 2048),)),
        flops=2 * 2048 * 8 * (LAYER_WEIGHTS + 2048 * 2048)),
    _decode(networks.LlamaDecode, 1, False),
    _decode(networks.LlamaDecode, 16, False),
    _decode(networks.LlamaDecodeFunctional, 1, True),
    _decode(networks.LlamaDecodeFunctional, 16, True),
    _bert(32),
    _bert(1),
    _resnet(64, False),
    Row("mlp-b4096", lambda: (networks.mlp(512, 1024, 1024, 512, 256, 1), (torch.randn(4096, 512),)), torch.float16,
        flops=2 * 4096 * (512 * 1024 * 2 + 1024 * 1024 + 512 * 256 + 256)),
    Row("gpt-train-b8", lambda: (networks.Gpt(1024, 12, 16, 50304, 1024), (_tokens(50304, 8, 1024), _tokens(50304, 8, 1024))), train=True,
        flops=6 * 8192 * (12 * 12 * 1024**2 + 50304 * 1024 + 12 * 1024 * 1024)),
    _bert(32, True),
    _resnet(64, True),
]


def _to(x: Any, dtype: torch.dtype, last: bool) -> Any:
    def move(t: Tensor) -> Tensor:
        t = t.cuda().to(dtype) if t.is_floating_point() else t.cuda()
        return t.to(memory_format=torch.channels_last) if last and t.dim() == 4 else t
    return torch.utils._pytree.tree_map_only(Tensor, move, x)


class Subject:
    """One row's model and inputs on the GPU."""

    def __init__(self, row: Row):
        torch.manual_seed(0)
        model, inputs = row.build()
        self.row = row
        self.model = _on_gpu(model.train(row.train), row)
        self.inputs = _to(inputs, row.dtype, row.channels_last)

    def call(self, model: Callable[..., Any]) -> Any:
        """Runs it; the results, or in training nothing: gradients are in the parameters."""
        if not self.row.train:
            with torch.no_grad():
                return model(*self.inputs)
        for p in self.model.parameters():
            p.grad = None
        out = model(*self.inputs)
        (out if out.dim() == 0 else out.float().square().mean()).backward()
        return None

    def results(self, out: Any) -> list[Tensor]:
        """What is compared: outputs, or gradients. For a decoder, the logits and not the caches it hands on."""
        if self.row.train:
            return [p.grad.float().clone() for p in self.model.parameters() if p.grad is not None]
        return [(out[0] if isinstance(out, tuple) else out).float().clone()]

    def reference(self) -> list[Tensor]:
        """Results of the float32 model with the same (rounded) weights and inputs."""
        wide = Subject.__new__(Subject)
        wide.row, wide.model = self.row, copy.deepcopy(self.model).float()
        wide.inputs = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.float() if t.is_floating_point() else t.clone(), self.inputs)
        tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        try:
            return wide.results(wide.call(wide.model))
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


def _on_gpu(model: nn.Module, row: Row) -> nn.Module:
    model = model.cuda().to(row.dtype)
    return model.to(memory_format=torch.channels_last) if row.channels_last else model


def _error(got: list[Tensor], true: list[Tensor]) -> float:
    scale = max(float(t.abs().max()) for t in true)
    return max(float((g - t).abs().max() / t.abs().max().clamp(min=1e-3 * scale)) for g, t in zip(got, true, strict=True))


def contender(model: nn.Module, name: str) -> Callable[..., Any]:
    if name == "eager":
        return model
    if name == "aicc-whole-loss":
        return torch.compile(model, backend=aicc_backend, dynamic=False, options={"loss_bytes": 0})
    if name.startswith("aicc"):
        return torch.compile(model, backend=aicc_backend, dynamic=False, mode=name[5:] or None)
    return torch.compile(model, dynamic=False, mode=None if name == "inductor" else name)


class Contest:
    """The contenders of one row: `Contest(row, peers)` compiles and checks them, `measure` takes their times."""

    def __init__(self, row: Row, peers: list[str]):
        self.subject = Subject(row)
        self.found: dict[str, Any] = {"case": row.name}
        self.made: dict[str, Callable[..., Any]] = {}
        self.compilations: list[Compilation] = []
        self._true = self.subject.reference()
        for name in peers:
            try:
                self.made[name] = self._first_call(name)
            except Exception as e:
                self.found[f"{name}_failed"] = f"{type(e).__name__}: {str(e)[:1500]}"
                print(f"  {row.name} {name} failed: {self.found[f'{name}_failed']}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()

    def _first_call(self, name: str) -> Callable[..., Any]:
        subject, seen = self.subject, list[Compilation]()
        start = time.perf_counter()
        with watching(compiled=seen.append), self._hearing(name):
            made = contender(subject.model, name)
            out = subject.call(made)
        torch.cuda.synchronize()
        self.found[f"{name}_s"] = time.perf_counter() - start
        self.found[f"{name}_error"] = _error(subject.results(out), self._true)
        if name == "aicc":
            self.compilations = seen
            for c in seen:
                print(f"  {subject.row.name} {c.name}: {_summary(c)}", flush=True)
        return made

    @contextmanager
    def _hearing(self, name: str) -> Iterator[None]:
        """What is warned of at run time (a fallback makes a row slow, and nothing else says so) is printed."""
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always", RuntimeWarning)
            yield
        for text in dict.fromkeys(str(w.message) for w in heard if issubclass(w.category, RuntimeWarning)):
            print(f"  {self.subject.row.name} {name} says: {text[:400]}", flush=True)

    def _peak(self, name: str) -> None:
        """Bytes that a call allocates; and a later call must be right too."""
        subject, made = self.subject, self.made[name]
        with self._hearing(name):
            for _ in range(2):  # CUDA graphs are recorded
                subject.call(made)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = subject.call(made)
        torch.cuda.synchronize()
        self.found[f"{name}_peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6
        self.found[f"{name}_error"] = max(self.found[f"{name}_error"], _error(subject.results(out), self._true))

    def measure(self, profile: int, budget_ms: float) -> dict[str, Any]:
        """`profile`: how many of the slowest steps to print."""
        found, subject = self.found, self.subject
        copied, gemm = limits()
        found["limit"] = max(subject.row.bytes / copied, subject.row.flops / gemm)
        calls: Calls = {}
        for name, made in self.made.items():
            self._peak(name)
            calls[name] = lambda made=made: subject.call(made)
        for name, ms in zip(calls, milliseconds(list(calls.values()), budget_ms, STEPS if subject.row.train else 1), strict=True):
            found[name] = ms
        if subject.row.train:
            for name, ms in zip(calls, milliseconds(list(calls.values()), 0), strict=True):
                found[f"{name}_alone"] = ms
        others = [found[p] for p in calls if not p.startswith("aicc")]
        ours = [found[p] for p in calls if p.startswith("aicc")]
        if others and ours:
            found["speedup"] = min(others) / min(ours)
        show(found)
        if profile and "aicc" in self.made:
            print_profile(subject, self.made["aicc"], self.compilations, profile)
        return found


def _summary(c: Compilation) -> str:
    seconds = ", ".join(f"{k} {v:.1f}" for k, v in c.seconds.items() if v > 0.05)
    externs = ", ".join(sorted({e["target"] for e in c.stats.get("externs", [])}))
    return (f"{c.stats['launches']} launches of {c.stats['kernels']} kernels, {c.stats['library']} library products, "
            f"{len(c.stats['externs'])} externs{f' ({externs})' if externs else ''}; seconds: {seconds}")


def print_profile(subject: Subject, made: Callable[..., Any], compilations: list[Compilation], rows: int) -> None:
    """Where a call's time goes, graph by graph."""
    graphs = [c.graph for c in compilations if c.graph is not None and hasattr(c.graph, "profile")]
    for graph in graphs:
        graph.profile = Profile()
    for _ in range(5):
        subject.call(made)
    for graph in graphs:
        for line in graph.profile.table(rows):
            print(f"    {line}", flush=True)
        graph.profile = None


def show(found: dict[str, Any]) -> None:
    ratio = f", best peer / best aicc {found['speedup']:.2f}" if "speedup" in found else ""
    print(f"{found['case']}: limit {found['limit']:.3f} ms{ratio}")
    for name in [k.removesuffix("_s") for k in found if k.endswith("_s")]:
        alone = f" ({found[f'{name}_alone']:.3f} alone)" if f"{name}_alone" in found else ""
        print(f"  {name:22s} {found[name]:8.3f} ms{alone}  error {found[f'{name}_error']:.1e}  peak {found[f'{name}_peak_mb']:7.0f} MB  "
              f"first call {found[f'{name}_s']:5.1f} s", flush=True)


def side_by_side(rows: list[Row], options: argparse.Namespace, begin: float) -> list[dict[str, Any]]:
    """Each row in a process of its own: all compile at once, and then they take turns to measure."""
    command = [sys.executable, "-m", "aicc.benchmarks.gpu_models", "--peers", options.peers, "--profile", str(options.profile), "--budget",
               str(options.budget), "--compile-seconds", str(options.compile_seconds), "--turn", "--only"]
    running = [(r, subprocess.Popen([*command, r.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
               for r in rows]
    texts: dict[str, list[str]] = {r.name: [] for r in rows}
    ready = {r.name: threading.Event() for r in rows}
    readers = [threading.Thread(target=_read, args=(p, texts[r.name], ready[r.name]), daemon=True) for r, p in running]
    for reader in readers:
        reader.start()
    for r in rows:
        if not ready[r.name].wait(max(0.0, begin + options.compile_seconds - time.time())):
            print(f"{r.name} is not ready after {time.time() - begin:.0f} s", flush=True)
    found = []
    pairs = sorted(zip(running, readers, strict=True), key=lambda pair: not ready[pair[0][0].name].is_set())
    for (r, p), reader in pairs:
        left = begin + options.seconds - time.time()
        if ready[r.name].is_set() and left > 1 and p.poll() is None and p.stdin is not None:
            p.stdin.write("go\n")
            p.stdin.flush()
            reader.join(left)
        p.kill()
        for line in texts[r.name]:
            if line.startswith(RESULT):
                found.append(json.loads(line.removeprefix(RESULT)))
                if options.json:
                    options.json.write_text(json.dumps(found, indent=1))
            elif line != READY and "Warning: " not in line and not line.startswith("  warnings.warn"):
                print(line, flush=True)
    return found


def _read(p: subprocess.Popen[str], lines: list[str], ready: threading.Event) -> None:
    assert p.stdout is not None
    for line in p.stdout:
        lines.append(line.rstrip("\n"))
        if lines[-1] == READY:
            ready.set()
    ready.set()  # it has ended


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows, separated by commas")
    parser.add_argument("--peers", default=DEFAULT, help="contenders, separated by commas")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="print the N steps of aicc's graphs that take longest")
    parser.add_argument("--budget", type=float, default=100, help="milliseconds for which each contender is measured")
    parser.add_argument("--side-by-side", action="store_true", help="compile all rows at once, a process each: their seconds mean little")
    parser.add_argument("--compile-seconds", type=float, default=300, help="side by side: how long to wait for rows that compile")
    parser.add_argument("--turn", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=1e9, help="no further row is begun after this")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 1
    begin = time.time()
    wanted = [r for r in options.only.split(",") if r]
    unknown = set(wanted) - {r.name for r in ROWS}
    if unknown:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(r.name for r in ROWS)}")
    peers = [p for p in options.peers.split(",") if p]
    rows = sorted((r for r in ROWS if not wanted or r.name in wanted), key=lambda r: wanted.index(r.name) if wanted else 0)
    if options.side_by_side:
        found = side_by_side(rows, options, begin)
    else:
        found = []
        for row in rows:
            if time.time() - begin > options.seconds:
                print(f"{row.name}: out of time")
                continue
            if options.turn:
                faulthandler.dump_traceback_later(max(1, options.compile_seconds - 4), file=sys.stdout)
            contest = Contest(row, peers)
            if options.turn:
                faulthandler.cancel_dump_traceback_later()
                print(READY, flush=True)
                sys.stdin.readline()
            found.append(contest.measure(options.profile, options.budget))
            if options.turn:
                print(RESULT + json.dumps(found[-1]), flush=True)
            del contest
            gc.collect()
            torch.cuda.empty_cache()
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    ratios = [f["speedup"] for f in found if "speedup" in f]
    if ratios and not options.turn:
        print(f"best peer / best aicc over {len(ratios)} rows, geometric mean: {statistics.geometric_mean(ratios):.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
