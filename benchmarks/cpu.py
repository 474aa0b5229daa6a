"""The CPU suite: models and single kernels at fixed shapes, eager beside Inductor and aicc in one process.

    python -m aicc.benchmarks.cpu [--cases softmax,mlp] [--threads 1] [--no-inductor] [--peers onnxruntime,openvino] [--json FILE]

A row per case: milliseconds per call, speed over eager, and the largest difference from eager over eager's largest value
(a row whose difference exceeds `TOLERANCE` is marked WRONG and the exit code is 1). float32, batch 1 unless the name says more.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from . import contenders  # first: it names the caches before torch reads them

import torch  # isort: skip
import torch.nn.functional as F
from aicc.compiler.driver import Compilation, watching
from aicc.tests.models.zoo import MODELS
from torch import nn
from torch.utils._pytree import tree_leaves

from . import networks
from .timing import best_block_medians, environment, first_call, geometric_mean

TOLERANCE = 1e-4
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


def _sdpa() -> Built:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), tuple(_rand(1, 8, 1024, 64) for _ in range(3))


CASES = {c.name: c for c in (
    Case("llama-prefill-256", _llama),
    Case("llama-decode-ctx512", _llama_decode),
    Case("bert-b1-s128", lambda: (networks.BertEncoder(768, 4, 12), (_rand(1, 128, 768),))),
    Case("bert-b4-s128", lambda: (networks.BertEncoder(768, 4, 12), (_rand(4, 128, 768),))),
    Case("vit-s-b1", lambda: (networks.ViT(384, 6, 6, 16, 224), (_rand(1, 3, 224, 224),))),
    Case("resnet18-b1", MODELS["resnet18_full"].build),
    Case("mobilenetv2-b1", MODELS["mobilenet_v2_full"].build),
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
COLUMNS = (("case", "<28"), ("eager ms", ">9"), ("aicc ms", ">9"), ("inductor ms", ">11"), ("aicc x", ">7"), ("inductor x", ">10"),
           ("error", ">8"), ("externs", ">7"), ("kernels", ">7"), ("aicc s", ">7"), ("inductor s", ">10"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", help="names, or parts of them, separated by commas")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-inductor", action="store_true")
    parser.add_argument("--peers", default="", help=f"others to measure, separated by commas: {', '.join(contenders.PEERS)}")
    parser.add_argument("--seconds", type=float, default=1.5, help="how long each contender is measured per case")
    parser.add_argument("--cpu-time", action="store_true", help="count this thread's CPU time, not wall time: for one thread on a busy machine")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.cpu_time else time.perf_counter
    parts = options.cases.split(",") if options.cases else [""]
    names = [n for n in CASES if any(p in n for p in parts)]
    if not names:
        parser.error(f"no case matches; there are {', '.join(CASES)}")

    backends = ["aicc"] if options.no_inductor else ["aicc", "inductor"]
    peers = [p for p in options.peers.split(",") if p]
    if unknown := [p for p in peers if p not in contenders.PEERS]:
        parser.error(f"no peer {', '.join(unknown)}; there are {', '.join(contenders.PEERS)}")
    if packages := contenders.missing(peers):
        parser.error(f"{', '.join(packages)} missing: pip install aicc[peers]")
    if options.cpu_time and "openvino" in peers:
        parser.error("OpenVINO computes in threads of its own: --cpu-time would not see them")
    contenders.warm_up(backends)
    about = environment()
    print(f"{about['cpu']}, torch {about['torch']}, {about['threads']} of {about['cores']} cores, load {about['load']}, float32\n")
    print(" ".join(format(title, width) for title, width in COLUMNS), *(f"{p + ' ms':>15}" for p in peers), flush=True)
    rows = []
    for name in names:
        try:
            row = measure(CASES[name], backends, options.seconds, clock, peers)
        except Exception as e:  # one case that fails must not cost the table
            traceback.print_exc(file=sys.stderr)
            row = {"case": name, "failure": f"{type(e).__name__}: {e}".splitlines()[0]}
        rows.append(row)
        print(_line(row), *(f"{row.get(f'{p}_ms', float('nan')):>15.3f}" for p in peers), flush=True)
    good = [r for r in rows if "failure" not in r]
    for contender in [*backends, *peers]:
        print(f"geometric mean over eager, {contender}: {geometric_mean([r['eager_ms'] / r[f'{contender}_ms'] for r in good]):.2f}x")
    theirs = ["eager", *backends[1:], *peers]
    print(f"geometric mean of the best of {', '.join(theirs)} over aicc: "
          f"{geometric_mean([min(r[f'{p}_ms'] for p in theirs) / r['aicc_ms'] for r in good]):.2f}x")
    about["load at the end"] = environment()["load"]
    print(f"load at the end {about['load at the end']}")
    if options.json:
        options.json.write_text(json.dumps({"environment": about, "rows": rows}, indent=2) + "\n")
    sys.exit(any("failure" in r or not r["aicc_error"] <= TOLERANCE for r in rows))


@torch.no_grad()
def measure(case: Case, backends: list[str], seconds: float, clock: Callable[[], float], peers: list[str]) -> dict[str, Any]:
    """One row."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    function, args = case.build()
    if isinstance(function, nn.Module):
        function.eval()
    expected = tree_leaves(function(*args))
    calls: dict[str, Callable[[], Any]] = {"eager": lambda: function(*args)}
    row: dict[str, Any] = {"case": case.name}
    compilations: list[Compilation] = []
    for name in backends:
        compiled = torch.compile(function, backend=name)
        calls[name] = lambda compiled=compiled: compiled(*args)
        with watching(compiled=compilations.append):
            row[f"{name}_compile_s"], result = first_call(calls[name])
        row[f"{name}_error"] = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(tree_leaves(result), expected, strict=True))
    for name in peers:
        start = time.perf_counter()
        calls[name] = contenders.PEERS[name](function, args, torch.get_num_threads())
        result = tree_leaves(calls[name]())
        row[f"{name}_compile_s"] = time.perf_counter() - start
        row[f"{name}_error"] = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(result, expected, strict=True))
    times = best_block_medians(list(calls.values()), seconds, clock)
    row.update({f"{name}_ms": t * 1e3 for name, t in zip(calls, times, strict=True)})
    return {**row, "graphs": len(compilations), "externs": sum(len(c.stats["externs"]) for c in compilations),
            "kernels": sum(c.stats["kernels"] for c in compilations)}


def _line(row: dict[str, Any]) -> str:
    if "failure" in row:
        return f"{row['case']:<28} FAILED: {row['failure'][:150]}"
    eager, aicc, inductor = row["eager_ms"], row["aicc_ms"], row.get("inductor_ms")
    cells = [row["case"], f"{eager:.3f}", f"{aicc:.3f}", f"{inductor:.3f}" if inductor else "", f"{eager / aicc:.2f}",
             f"{eager / inductor:.2f}" if inductor else "", f"{row['aicc_error']:.1e}", str(row["externs"]), str(row["kernels"]),
             f"{row['aicc_compile_s']:.1f}", f"{row['inductor_compile_s']:.1f}" if inductor else ""]
    wrong = "" if row["aicc_error"] <= TOLERANCE else "  WRONG"
    return " ".join(format(cell, width) for cell, (_, width) in zip(cells, COLUMNS, strict=True)) + wrong


if __name__ == "__main__":
    main()
