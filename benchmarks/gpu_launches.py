"""What launches cost on one GPU, and what a second stream gains: tables for docs/gpu-host.md.

    python -m aicc.benchmarks.gpu_launches                      # both
    python -m aicc.benchmarks.gpu_launches costs                # n small products that do not fuse: the host's microseconds
    python -m aicc.benchmarks.gpu_launches streams              # models with branches: one stream, two, and Inductor

`costs`: host time per call without waiting for the device, medians. The line through n = 1 and n = 40 gives the cost of a launch (its slope) and of a
call (what is left). `streams`: milliseconds by CUDA events; error against float32 eager.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("AICC_STRICT", "1")

import torch
from aicc.compiler.dynamo import aicc as aicc_backend
from torch import Tensor, nn

from . import gpu_networks as networks
from .gpu import milliseconds

FEW, MANY = 1, 40
CONTENDERS: dict[str, dict[str, Any] | None] = {
    "eager": None, "inductor": {}, "inductor reduce-overhead": {"mode": "reduce-overhead"},
    "aicc": {"backend": aicc_backend}, "aicc cudagraphs": {"backend": aicc_backend, "options": {"cudagraphs": True}},
}


def chain(x: Tensor, weights: list[Tensor]) -> Tensor:
    """Products that cannot be one kernel: each needs whole rows of the one before."""
    for w in weights:
        x = torch.tanh(x @ w)
    return x


def host_microseconds(call: Callable[[], Any], calls: int = 30, rounds: int = 7) -> float:
    for _ in range(5):
        call()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) * 1e6 / calls)
    torch.cuda.synchronize()
    return statistics.median(times)


def costs() -> None:
    """The table of launches and calls."""
    print(f"{'host microseconds':28s} {'n=' + str(FEW):>8s} {'n=' + str(MANY):>8s} {'a launch':>9s} {'a call':>8s}")
    for name, how in CONTENDERS.items():
        found = {}
        for n in (FEW, MANY):
            x, w = torch.randn(32, 272, device="cuda"), [torch.randn(272, 272, device="cuda") / 16 for _ in range(n)]
            torch._dynamo.reset()
            run = chain if how is None else torch.compile(chain, dynamic=False, **how)
            with torch.no_grad():
                found[n] = host_microseconds(lambda run=run, x=x, w=w: run(x, w))
        launch = (found[MANY] - found[FEW]) / (MANY - FEW)
        print(f"{name:28s} {found[FEW]:8.1f} {found[MANY]:8.1f} {launch:9.2f} {found[FEW] - launch * FEW:8.1f}", flush=True)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...], bool]] = {
    "two-encoders-b1": (networks.TwoEncoders, ((1, 197, 768), (1, 77, 512)), False),
    "two-encoders-b8": (networks.TwoEncoders, ((8, 197, 768), (8, 77, 512)), False),
    "inception-b1": (networks.Inception, ((1, 192, 28, 28),), True),
    "towers-b64": (lambda: networks.Towers(6, 512, 4), ((64, 512),), False),
}


def streams() -> None:
    """Models with branches on one stream and on two."""
    for name, (make, shapes, last) in MODELS.items():
        torch.manual_seed(0)
        model = make().cuda().eval()
        xs = [torch.randn(shape, device="cuda") for shape in shapes]
        with torch.no_grad():
            true = model(*xs)
        torch._dynamo.reset()
        model, xs = model.half(), [x.half() for x in xs]
        if last:
            model, xs = model.to(memory_format=torch.channels_last), [x.contiguous(memory_format=torch.channels_last) for x in xs]
        calls: dict[str, Callable[[], Any]] = {}
        errors = {}
        for peer, how in {**CONTENDERS, "aicc, one stream": {"backend": aicc_backend, "options": {"streams": 1}},
                          "aicc cudagraphs, one stream": {"backend": aicc_backend, "options": {"streams": 1, "cudagraphs": True}}}.items():
            def forward(*xs: Tensor, model: nn.Module = model) -> Any:
                return model(*xs)
            # Code of its own, so that no contender's guards are looked through for another one.
            forward.__code__ = forward.__code__.replace(co_name=f"forward_{len(calls)}")
            run: Callable[..., Any] = forward if how is None else torch.compile(forward, dynamic=False, **how)

            def call(run: Callable[..., Any] = run, xs: list[Tensor] = xs) -> Any:
                with torch.no_grad():
                    return run(*xs)
            worst = max(float((call().float() - true).abs().max() / true.abs().max()) for _ in range(4))
            calls[peer], errors[peer] = call, worst
        for peer, ms in zip(calls, milliseconds(list(calls.values()), 100), strict=True):
            print(f"{name:14s} {peer:28s} {ms:8.4f} ms  error {errors[peer]:.1e}", flush=True)


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 1
    for section in sys.argv[1:] or ["costs", "streams"]:
        {"costs": costs, "streams": streams}[section]()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
