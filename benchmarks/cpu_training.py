"""Training steps on the CPU: forward, loss, backward and optimizer, by eager, Inductor and aicc, in one process.

    python -m aicc.benchmarks.cpu_training [--cases gpt2,resnet18] [--threads 1 2] [--no-inductor] [--no-check] [--parts] [--profile N] [--json FILE]

A row per case: milliseconds per step (the best block's median, see `timing.py`), eager's and Inductor's time over aicc's, the largest distance of a
gradient from that in float64 (over its largest value), the largest such distance over eager's own (`gradients.py`), externs, and seconds until the
first step is done. A row that is further away than ACCURACY times eager is WRONG and the exit code is 1. Networks with kinks are checked on small
inputs away from these. `--parts` also measures forward and backward without the optimizer. `--profile N` prints the N operators that take longest
in one step by torch's profiler: those left to ATen and eager autograd's. Float32, AdamW; the model and the optimizer's step are compiled apart, as
users do.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import contenders  # first: it names the caches before torch reads them

import torch  # isort: skip
import torch.nn.functional as F
from aicc.compiler.driver import Compilation, watching
from aicc.tests.models.networks import ResNet18
from torch import Tensor, nn

from . import gradients
from .networks import EncoderLayer
from .timing import environment, first_call, geometric_mean, measure_blocks

ACCURACY = 2.0
"""Most distance from float64 of a tensor's gradient, over eager's."""


class GPT2(nn.Module):
    """Causal pre-norm transformer: tokens `[b, s]` to the loss of predicting each next one."""

    def __init__(self, width: int, layers: int, heads: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.layers = nn.ModuleList(CausalLayer(width, heads, 4 * width, pre=True) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for layer in self.layers:
            x = layer(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class CausalLayer(EncoderLayer):
    def attention(self, x: Tensor) -> Tensor:
        b, s, d = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, d))


class Classified(nn.Module):
    """A classifier with its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), labels)


class Recurrent(nn.Module):
    """An LSTM with the mean square of its outputs as loss."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0].square().mean()


@dataclass(frozen=True)
class Case:
    """`check` makes the inputs on which gradients are compared; None: those of `build`."""

    name: str
    build: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]
    check: Callable[[], tuple[Tensor, ...]] | None = None


CASES = {c.name: c for c in (
    Case("gpt2-6x768-b1-s128", lambda: (GPT2(768, 6, 12, 16000, 256), (torch.randint(0, 16000, (1, 128)),))),
    Case("resnet18-b4", lambda: (Classified(ResNet18()), (torch.randn(4, 3, 224, 224), torch.randint(0, 1000, (4,)))),
         lambda: (torch.randn(2, 3, 64, 64), torch.randint(0, 1000, (2,)))),
    Case("lstm-32x64x256", lambda: (Recurrent(256), (torch.randn(64, 32, 256),))),
    Case("mlp-b256", lambda: (Classified(nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 10))),
                              (torch.randn(256, 512), torch.randint(0, 10, (256,))))),
)}


def contender(model: nn.Module, inputs: tuple[Tensor, ...], backend: str | None, optimize: bool) -> tuple[Callable[[], Any], nn.Module]:
    """A training step of a copy of the model, and that copy."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    forward: Callable[..., Tensor] = model if backend is None else torch.compile(model, backend=backend)
    update = optimizer.step if backend is None else torch.compile(optimizer.step, backend=backend)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        forward(*inputs).backward()
        if optimize:
            update()

    return step, model


def check(case: Case, model: nn.Module, inputs: tuple[Tensor, ...]) -> gradients.Comparison:
    """aicc's gradients against those in float64."""
    def compiled(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        torch._dynamo.reset()
        step, model = contender(model, inputs, "aicc", False)
        step()
        return [p.grad for p in model.parameters() if p.grad is not None]

    return gradients.compare(model, inputs if case.check is None else gradients.without_kinks(model, case.check), compiled)


def measure(case: Case, backends: list[str], seconds: float, parts: bool, checked: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"case": case.name, "aicc_error": float("nan"), "aicc_over_eager": float("nan")}
    torch.manual_seed(0)
    built, inputs = case.build()
    if checked:
        found = check(case, built, inputs)
        row |= {"aicc_error": found.error, "aicc_over_eager": found.worst, "furthest": found.where}
    for optimize in (True, False) if parts else (True,):
        steps, names = [], []
        compilations: list[Compilation] = []
        for name in ("eager", *backends):
            torch._dynamo.reset()
            step, _ = contender(built, inputs, None if name == "eager" else name, optimize)
            try:
                with watching(compiled=compilations.append):
                    spent, _ = first_call(step)
            except Exception as e:  # a peer that cannot
                if name != "inductor":
                    raise
                row["inductor_failure"] = f"{type(e).__name__}: {e}".splitlines()[0]
                continue
            names.append(name)
            steps.append(step)
            row.setdefault(f"{name}_compile_s", spent)
        for name, t in zip(names, measure_blocks(steps, seconds), strict=True):
            row[f"{name}_{'ms' if optimize else 'gradient_ms'}"] = t.seconds * 1e3
        row.setdefault("externs", sum(len(c.stats["externs"]) for c in compilations))
    return row


def profile(case: Case, most: int) -> None:
    """One step of aicc: torch's operators, which are eager's and those left to ATen."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    compilations: list[Compilation] = []
    with watching(compiled=compilations.append):
        step, _ = contender(*case.build(), "aicc", True)
        step()
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        step()
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=most, max_name_column_width=40))
    for c in compilations:
        assert c.graph is not None
        print(c.name, c.stats["kernels"], "kernels,", c.stats["launches"], "launches,", [(e["target"], e["reason"]) for e in c.stats["externs"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", help="names, or parts of them, separated by commas")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--seconds", type=float, default=3, help="how long each contender is measured per case")
    parser.add_argument("--no-inductor", action="store_true")
    parser.add_argument("--no-check", action="store_true", help="do not compare gradients with float64 (which compiles networks with kinks twice)")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--profile", type=int, default=0, metavar="N")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="S", help="begin no further case after this many seconds")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    names = list(dict.fromkeys(n for part in (options.cases or "").split(",") for n in CASES if part in n))
    backends = ["aicc"] if options.no_inductor else ["inductor", "aicc"]
    contenders.warm_up(backends)
    rows, wrong, start = [], False, time.perf_counter()
    for threads in options.threads:
        torch.set_num_threads(threads)
        print(f"{environment()['cpu']}, torch {torch.__version__}, {threads} thread(s), load {environment()['load']}, float32, AdamW\n")
        print(f"{'case':<22} {'eager ms':>9} {'inductor':>9} {'aicc':>9} {'eager/aicc':>10} {'inductor/aicc':>13} "
              f"{'error':>8} {'/eager':>6} {'externs':>7}  compile s")
        here = []
        for name in names:
            if time.perf_counter() - start > options.budget:
                print(f"{name}: not measured, out of time")
                continue
            if options.profile:
                profile(CASES[name], options.profile)
                continue
            row = {**measure(CASES[name], backends, options.seconds, options.parts, not options.no_check), "threads": threads}
            here.append(row)
            bad = row["aicc_over_eager"] > ACCURACY
            wrong |= bad
            for kind in ("ms", "gradient_ms") if options.parts else ("ms",):
                times = {n: row.get(f"{n}_{kind}", float("nan")) for n in ("eager", "inductor", "aicc")}
                compiling = ", ".join(f"{n} {row[f'{n}_compile_s']:.1f}" for n in backends if f"{n}_compile_s" in row)
                print(f"{name if kind == 'ms' else '  without optimizer':<22} " + " ".join(f"{t:>9.2f}" for t in times.values()) +
                      f" {times['eager'] / times['aicc']:>10.2f} {times['inductor'] / times['aicc']:>13.2f} {row['aicc_error']:>8.1e} "
                      f"{row['aicc_over_eager']:>6.2f} {row['externs']:>7}  {compiling}{' WRONG' if bad else ''}", flush=True)
        rows += here
        if here:
            means = {n: geometric_mean([r["eager_ms"] / r[f"{n}_ms"] for r in here if f"{n}_ms" in r]) for n in backends}
            print("geometric mean over eager: " + ", ".join(f"{n} {mean:.2f}x" for n, mean in means.items()))
        if options.json:
            options.json.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=2) + "\n")
    sys.exit(wrong)


if __name__ == "__main__":
    main()
