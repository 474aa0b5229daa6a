"""The CPU suite: models and single kernels at fixed shapes; aicc beside its peers, in one process.

    python -m aicc.benchmarks.cpu [--cases softmax,mlp] [--threads 1 2] [--peers inductor,onnxruntime] [--json FILE] [--plot FILE]

A table per number of threads, a row per case: milliseconds per call (the best block's median, see `timing.py`), how much slower the worst block
of aicc was (spread), the best peer's time over aicc's, the distance of aicc's result from float64 as a multiple of eager's, and seconds from
nothing to the first result: for ONNX Runtime and OpenVINO from the exported file, and last those of the export, which they need beside.
A row whose result is further from eager's than `TOLERANCE` (of the largest value), or further from float64 than `ACCURACY` times eager,
is marked WRONG and the exit code is 1. float32, batch 1 unless the name says more.
`aicc-direct` is the same code by `aicc.compile`, without Dynamo's guards, which the sessions of ONNX Runtime and OpenVINO do not have either; its
ratio stands beside that of `torch.compile` and is no part of the summary's.
Peers beside eager are those installed of: inductor, inductor-max (freezing and max-autotune), onnxruntime, openvino (`pip install aicc[peers]`).
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from . import contenders  # first: it names the caches before torch reads them

import torch  # isort: skip
import torch.nn.functional as F
from aicc.compiler.driver import Compilation, watching
from aicc.tests.models.networks import MobileNetV2, ResNet18
from torch import nn
from torch.utils._pytree import tree_leaves

from . import networks
from .suite import parse
from .timing import environment, first_call, geometric_mean, measure_blocks

TOLERANCE = 1e-4
ACCURACY, ROUNDING = 2.0, 1e-6
"""Most distance from float64: this multiple of eager's, or this part of the largest value, the rounding of eight float32 operations."""
Built = tuple[Callable[..., Any], tuple[Any, ...]]


@dataclass(frozen=True)
class Case:
    """`build` makes the function or module and its arguments, from torch's global random state."""

    name: str
    build: Callable[[], Built]


def _rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def _llama() -> Built:
    return networks.Llama(768, 6, 12, 4, 2048, 16000, 512), (torch.randint(0, 16000, (1, 256)),)


def _llama_decode() -> Built:
    cache = (_rand(6, 1, 4, 511, 64), _rand(6, 1, 4, 511, 64))
    return networks.LlamaDecode(768, 6, 12, 4, 2048, 16000, 512), (torch.randint(0, 16000, (1, 1)), *cache)


def _mlp() -> Built:
    widths = (512, 1024, 1024, 512)
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(512, 1)), (_rand(256, 512),)


def _linear_gelu() -> Built:
    return lambda x, w, b: F.gelu(F.linear(x, w, b)), (_rand(256, 768), _rand(3072, 768), _rand(3072))


def _plain_attention() -> Built:
    return networks.plain_attention, (*(_rand(8, 1024, 64) for _ in range(3)), torch.ones(1024, 1024).tril().bool())


def _images(model: nn.Module) -> Built:
    """With statistics as after training: the variance 1 of a new model rounds alike in every layer, and so do not its errors in life."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)  # type: ignore[union-attr, operator]
            m.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr, operator]
    return model, (_rand(1, 3, 224, 224),)


def _sdpa() -> Built:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), tuple(_rand(1, 8, 1024, 64) for _ in range(3))


CASES = {c.name: c for c in (
    Case("llama-prefill-256", _llama),
    Case("llama-decode-ctx512", _llama_decode),
    Case("bert-b1-s128", lambda: (networks.BertEncoder(768, 4, 12), (_rand(1, 128, 768),))),
    Case("bert-b4-s128", lambda: (networks.BertEncoder(768, 4, 12), (_rand(4, 128, 768),))),
    Case("vit-s-b1", lambda: (networks.ViT(384, 6, 6, 16, 224), (_rand(1, 3, 224, 224),))),
    Case("resnet18-b1", lambda: _images(ResNet18())),
    Case("mobilenetv2-b1", lambda: _images(MobileNetV2())),
    Case("mlp-b256", _mlp),
    Case("tiny-mlp-b8", lambda: (networks.tiny_mlp(64), (_rand(8, 64),))),
    Case("gemm-1024", lambda: (torch.mm, (_rand(1024, 1024), _rand(1024, 1024)))),
    Case("gemm-256x3072x768-bias-gelu", _linear_gelu),
    Case("add-rmsnorm-2048x4096", lambda: (networks.add_rms_norm, (_rand(2048, 4096), _rand(2048, 4096), _rand(4096)))),
    Case("softmax-2048x4096", lambda: (lambda x: x.softmax(-1), (_rand(2048, 4096),))),
    Case("gelu-tanh-chain-8M", lambda: (networks.gelu_tanh, (_rand(8 << 20),))),
    Case("plain-attn-s1024", _plain_attention),
    Case("sdpa-causal-s1024", _sdpa),
    Case("lstm-32x64x256", lambda: (nn.LSTM(256, 256), (_rand(64, 32, 256),))),
    Case("reduce-dim0-8192x1024", lambda: (lambda x: x.sum(0), (_rand(8192, 1024),))),
)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu-time", action="store_true", help="count this thread's CPU time, not wall time: for one thread on a busy machine")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a chart of speed over eager (`pip install aicc[plot]`)")
    suite = parse(parser, CASES, "all", 1.5)
    peers, options = suite.peers, suite.given
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("matplotlib is missing: pip install aicc[plot]")
    if options.cpu_time and ("openvino" in peers or suite.threads != [1]):
        parser.error("--cpu-time counts the calling thread alone: one thread, and no OpenVINO, which computes in threads of its own")
    clock = time.thread_time if options.cpu_time else time.perf_counter
    contenders.warm_up(["aicc", *(p for p in peers if p in ("inductor", *contenders.FROM_ONNX))])
    about = environment()
    for threads, names in suite.runs():
        print(f"{about['cpu']}, torch {about['torch']}, {threads} of {about['cores']} cores, load {environment()['load']}, float32\n")
        print(_line({"case": "case"}, peers), flush=True)
        here = []
        for name in names:
            try:
                row = measure(CASES[name], peers, suite.seconds, clock)
            except Exception as e:  # one case that fails must not cost the table
                traceback.print_exc(file=sys.stderr)
                row = {"case": name, "failure": f"{type(e).__name__}: {e}".splitlines()[0]}
            here.append({**row, "threads": threads})
            print(_line(row, peers), flush=True)
            suite.add(here[-1], environment=about)
        _summary([r for r in here if "failure" not in r], peers)
        if threads == suite.threads[0]:  # later ones find caches filled
            _compile_summary([r for r in here if "failure" not in r], peers)
    print(f"load at the end {environment()['load']}")
    if options.plot:
        plot(suite.rows, ["aicc", *peers], options.plot)
    sys.exit(any(_is_wrong(r) for r in suite.rows))


@torch.no_grad()
def measure(case: Case, peers: Sequence[str], seconds: float, clock: Callable[[], float]) -> dict[str, Any]:
    """One row. A peer that cannot run the case is noted and left out."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    function, args = case.build()
    if isinstance(function, nn.Module):
        function.eval()
    expected = tree_leaves(function(*args))
    truth = _in_float64(function, args)
    row: dict[str, Any] = {"case": case.name, "eager_error64": _distance(expected, truth)}
    calls: dict[str, Callable[[], Any]] = {"eager": lambda: function(*args)}
    compilations: list[Compilation] = []
    path = ""
    for name in ["aicc", contenders.DIRECT, *peers]:
        try:
            if name in contenders.FROM_ONNX and not path:
                start = time.perf_counter()
                path = contenders.export(function, args)
                row["export_s"] = time.perf_counter() - start
            start = time.perf_counter()
            with watching(compiled=compilations.append if name == "aicc" else None):
                call = contenders.PEERS[name](path if name in contenders.FROM_ONNX else function, args, torch.get_num_threads())
                result = tree_leaves(first_call(call)[1])
        except Exception as e:
            if name == "aicc":
                raise
            row[f"{name}_failure"] = f"{type(e).__name__}: {e}".splitlines()[0]
            continue
        calls[name] = call
        row[f"{name}_compile_s"] = time.perf_counter() - start
        row[f"{name}_error"], row[f"{name}_error64"] = _distance(result, expected), _distance(result, truth)
    times = measure_blocks(list(calls.values()), seconds, clock)
    for name, t in zip(calls, times, strict=True):
        row[f"{name}_ms"], row[f"{name}_spread"] = t.seconds * 1e3, t.spread
    return {**row, "graphs": len(compilations), "externs": sum(len(c.stats["externs"]) for c in compilations),
            "kernels": sum(c.stats["kernels"] for c in compilations)}


def _in_float64(function: Callable[..., Any], args: tuple[Any, ...]) -> list[torch.Tensor]:
    """What the function gives in double precision."""
    if isinstance(function, nn.Module):
        function = copy.deepcopy(function).double()
    return tree_leaves(function(*(a.double() if a.is_floating_point() else a for a in args)))


def _distance(found: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    """The largest difference over the largest value."""
    return max(((a.double() - b.double()).abs().max() / b.double().abs().max()).item() for a, b in zip(found, truth, strict=True))


def _best_peer(row: dict[str, Any], peers: Sequence[str]) -> float:
    return min(row[f"{p}_ms"] for p in ["eager", *peers] if f"{p}_ms" in row)


def _is_wrong(row: dict[str, Any]) -> bool:
    return "failure" in row or not row["aicc_error"] <= TOLERANCE or row["aicc_error64"] > max(ACCURACY * row["eager_error64"], ROUNDING)


def _line(row: dict[str, Any], peers: Sequence[str]) -> str:
    """A row of the table, or its heading."""
    if "failure" in row:
        return f"{row['case']:<28} FAILED: {row['failure'][:150]}"
    heading = "eager_ms" not in row
    cells = [f"{row['case']:<28}"]
    for name in ["eager", *peers, contenders.DIRECT, "aicc"]:
        cells.append(f"{name:>12}" if heading else f"{row.get(f'{name}_ms', float('nan')):>12.3f}")
    if heading:
        return " ".join([*cells, "spread  peer/aicc  peer/direct  err/eager's  externs kernels  compile s:", ", ".join(["aicc", *peers]), "+ export"])
    cells += [f"{100 * row['aicc_spread']:>4.0f} %", f"{_best_peer(row, peers) / row['aicc_ms']:>10.2f}",
              f"{_best_peer(row, peers) / row.get(f'{contenders.DIRECT}_ms', float('nan')):>12.2f}",
              f"{row['aicc_error64'] / max(row['eager_error64'], 1e-12):>11.2f}", f"{row['externs']:>9} {row['kernels']:>7}  "]
    cells.append(", ".join(f"{row[f'{p}_compile_s']:.1f}" if f"{p}_compile_s" in row else "failed" for p in ["aicc", *peers]))
    if "export_s" in row:
        cells.append(f"+ {row['export_s']:.1f}")
    return " ".join(cells) + ("  WRONG" if _is_wrong(row) else "")


def _summary(rows: list[dict[str, Any]], peers: Sequence[str]) -> None:
    for name in ["aicc", *peers]:
        common = [r["eager_ms"] / r[f"{name}_ms"] for r in rows if f"{name}_ms" in r]
        print(f"geometric mean over eager, {name}: {geometric_mean(common):.2f}x of {len(common)} cases")
    direct = [_best_peer(r, peers) / r[f"{contenders.DIRECT}_ms"] for r in rows if f"{contenders.DIRECT}_ms" in r]
    if direct:
        print(f"best peer of each case over {contenders.DIRECT}: geometric mean {geometric_mean(direct):.2f}x of {len(direct)} cases")
    ratios = [_best_peer(r, peers) / r["aicc_ms"] for r in rows]
    if rows:
        worst = min(zip(ratios, (r["case"] for r in rows), strict=True))
        print(f"best peer of each case over aicc: geometric mean {geometric_mean(ratios):.2f}x, least {worst[0]:.2f}x ({worst[1]})\n")


def _compile_summary(rows: list[dict[str, Any]], peers: Sequence[str]) -> None:
    for p in peers:
        for exported in (False, True) if p in contenders.FROM_ONNX else (False,):
            ratios = [r["aicc_compile_s"] / (r[f"{p}_compile_s"] + (r["export_s"] if exported else 0)) for r in rows if f"{p}_compile_s" in r]
            if ratios:
                print(f"seconds to the first result, aicc over {p}{' with the export' if exported else ''}: geometric mean "
                      f"{geometric_mean(ratios):.2f} of {len(ratios)} cases, most {max(ratios):.2f}")


def plot(rows: list[dict[str, Any]], names: Sequence[str], path: Path) -> None:
    """Speed over eager: a group of bars per case, a chart per number of threads."""
    pyplot = importlib.import_module("matplotlib.pyplot")
    good = [r for r in rows if "failure" not in r]
    counts = sorted({r["threads"] for r in good})
    figure, axes = pyplot.subplots(len(counts), 1, figsize=(14, 5 * len(counts)), squeeze=False, layout="constrained")
    for threads, (axis,) in zip(counts, axes, strict=True):
        here = [r for r in good if r["threads"] == threads]
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            heights = [r["eager_ms"] / r[f"{name}_ms"] if f"{name}_ms" in r else 0 for r in here]
            axis.bar([x + i * width for x in range(len(here))], heights, width, label=name)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks([x + 0.4 for x in range(len(here))], [r["case"] for r in here], rotation=30, ha="right")
        axis.set_ylabel(f"speed over eager, {threads} thread{'s' if threads > 1 else ''}")
        axis.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
