"""The models of the zoo: eager, aicc and Inductor side by side, in one process.

    python -m aicc.benchmarks.models [--models gpt2,bert] [--threads 1] [--train] [--no-inductor] [--json FILE]

A row per model: milliseconds per call (`timing.py` says how they are taken), the largest error against eager in float64 over the
largest true value (in training: of output, loss and every gradient), graphs, operators left to ATen, kernels, and the seconds of a
first call, with caches that were empty when the run began (Inductor finds single kernels again that an earlier model had, such as
Llama's for Qwen2; aicc keeps whole graphs). float32, one thread unless told otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import contenders  # first: it names the caches before torch reads them

import torch  # isort: skip
from aicc.compiler.driver import Compilation, watching
from aicc.tests.models.reference import Float64Everywhere, double
from aicc.tests.models.zoo import MODELS, Inputs, ModelCase
from torch import Tensor, nn

from .timing import best_block_medians, environment, first_call, geometric_mean

# Variants of a model that has a row already.
LEFT_OUT = ("mixtral_batched", "mixtral_loop")
GRADIENT_SCALE = 1e-3  # no gradient is measured on a finer scale than this fraction of the largest
COLUMNS = (("model", "<20"), ("eager ms", ">9"), ("aicc ms", ">9"), ("inductor ms", ">11"), ("aicc x", ">7"), ("inductor x", ">10"),
           ("error", ">8"), ("eager's", ">8"), ("graphs", ">6"), ("externs", ">7"), ("kernels", ">7"), ("aicc s", ">7"), ("inductor s", ">10"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", help=f"names, separated by commas; default: all but {', '.join(LEFT_OUT)}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--train", action="store_true", help="forward, loss and backward; default without the full-size models")
    parser.add_argument("--no-inductor", action="store_true")
    parser.add_argument("--seconds", type=float, default=1.5, help="how long each contender is measured per model")
    parser.add_argument("--cpu-time", action="store_true", help="count this thread's CPU time, not wall time: for one thread on a busy machine")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.cpu_time else time.perf_counter
    names = options.models.split(",") if options.models else [
        n for n, case in MODELS.items() if n not in LEFT_OUT and not (options.train and case.full_size)]
    unknown = [n for n in names if n not in MODELS]
    if unknown:
        parser.error(f"no model {', '.join(unknown)}; the zoo has {', '.join(MODELS)}")

    backends = ["aicc"] if options.no_inductor else ["aicc", "inductor"]
    contenders.warm_up(backends)
    about = environment()
    print(f"{about['cpu']}, torch {about['torch']}, {about['threads']} of {about['cores']} cores, load {about['load']}, "
          f"{'one training step' if options.train else 'inference'}, float32\n")
    print(" ".join(format(title, width) for title, width in COLUMNS), flush=True)
    rows = []
    for name in names:
        try:
            row = measure(MODELS[name], backends, options.train, options.seconds, clock)
        except Exception as e:  # one model that fails must not cost the table
            traceback.print_exc(file=sys.stderr)
            row = {"model": name, "failure": f"{type(e).__name__}: {e}".splitlines()[0]}
        rows.append(row)
        print(_line(row), flush=True)
    good = [r for r in rows if "failure" not in r]
    for contender in backends:
        print(f"geometric mean over eager, {contender}: {geometric_mean([r['eager_ms'] / r[f'{contender}_ms'] for r in good]):.2f}x")
    about["load at the end"] = environment()["load"]
    print(f"load at the end {about['load at the end']}")
    if options.json:
        options.json.write_text(json.dumps({"environment": about, "train": options.train, "rows": rows}, indent=2) + "\n")
    sys.exit(len(good) != len(rows))


def measure(case: ModelCase, backends: list[str], train: bool, seconds: float, clock: Callable[[], float]) -> dict[str, Any]:
    """One row."""
    torch._dynamo.reset()
    model, inputs = case.build()
    runner = _step if train else _forward
    truth = _truth(case, inputs, runner)
    calls = {"eager": runner(case, model, model, inputs)}
    row: dict[str, Any] = {"model": case.name, "batch": case.batch, "size": case.size, "eager_error": _error(calls["eager"](), truth)}
    compilations: list[Compilation] = []
    # torch leaves nn.LSTM to eager unless it is told not to: compiled here, for both.
    with torch._dynamo.config.patch(allow_rnn=True):
        for name in backends:
            calls[name] = runner(case, model, torch.compile(model, backend=name), inputs)
            with watching(compiled=compilations.append):
                row[f"{name}_compile_s"], result = first_call(calls[name])
            row[f"{name}_error"] = _error(result, truth)
        times = best_block_medians(list(calls.values()), seconds, clock)
    row.update({f"{name}_ms": t * 1e3 for name, t in zip(calls, times, strict=True)})
    externs = [e["target"] for c in compilations for e in c.stats["externs"]]
    memory = [c.stats["memory"] for c in compilations]
    return {**row, "graphs": len(compilations), "externs": len(externs), "extern_targets": sorted(set(externs)),
            "kernels": sum(c.stats["kernels"] for c in compilations), "arena_bytes": [m["arena_bytes"] for m in memory],
            "lower_bound": [m["lower_bound"] for m in memory], "stages_s": [c.seconds for c in compilations]}


Results = dict[str, Tensor]


def _forward(case: ModelCase, module: nn.Module, call: Callable[..., Tensor], inputs: Inputs) -> Callable[[], Results]:
    def run() -> Results:
        with torch.no_grad():
            return {"output": call(*inputs)}
    return run


def _step(case: ModelCase, module: nn.Module, call: Callable[..., Tensor], inputs: Inputs) -> Callable[[], Results]:
    """Forward, loss, backward. No dropout and no optimizer: every step gives the same gradients."""
    module.train()

    def run() -> Results:
        module.zero_grad(set_to_none=True)
        output = call(*inputs)
        loss = case.loss(output, inputs)
        loss.backward()
        gradients = {f"gradient of {n}": p.grad for n, p in module.named_parameters() if p.grad is not None}
        return {"output": output.detach(), "loss": loss.detach(), **gradients}
    return run


def _truth(case: ModelCase, inputs: Inputs, runner: Callable[..., Callable[[], Results]]) -> Results:
    model = MODELS[case.truth or case.name].model().double()
    with Float64Everywhere():
        return runner(case, model, model, double(inputs))()


def _error(results: Results, truth: Results) -> float:
    """The largest error of any result over the largest value of the true one."""
    largest = max((t.abs().max().item() for n, t in truth.items() if n.startswith("gradient")), default=0.0)
    worst = 0.0
    for name, true in truth.items():
        scale = max(true.abs().max().item(), GRADIENT_SCALE * largest if name.startswith("gradient") else 0.0, 1e-30)
        error = (results[name].double() - true).abs().max().item() / scale
        worst = error if error != error else max(worst, error)  # NaN stays
    return worst


def _line(row: dict[str, Any]) -> str:
    if "failure" in row:
        return f"{row['model']:<20} FAILED: {row['failure'][:150]}"
    eager, aicc, inductor = row["eager_ms"], row["aicc_ms"], row.get("inductor_ms")
    cells = [row["model"], f"{eager:.3f}", f"{aicc:.3f}", f"{inductor:.3f}" if inductor else "", f"{eager / aicc:.2f}",
             f"{eager / inductor:.2f}" if inductor else "", f"{row['aicc_error']:.1e}", f"{row['eager_error']:.1e}", str(row["graphs"]),
             str(row["externs"]), str(row["kernels"]), f"{row['aicc_compile_s']:.1f}",
             f"{row['inductor_compile_s']:.1f}" if inductor else ""]
    return " ".join(format(cell, width) for cell, (_, width) in zip(cells, COLUMNS, strict=True))


if __name__ == "__main__":
    main()
