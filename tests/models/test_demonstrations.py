"""What the compiler promises about whole models: graphs, native calls, operators left to ATen, memory, speed, text of every stage.

`pytest -s` prints the figures that the tests are about.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from aicc.compiler.driver import Compilation
from aicc.ir import Operation
from aicc.ir.core import equivalent
from aicc.ir.interpreter import interpret
from aicc.ir.parser import parse_module
from aicc.ir.printer import print_with_resources
from torch import Tensor, nn

from .observing import Recorded, compiled_graphs, graph_of, recorded
from .zoo import MODELS

# Everything else is slow: see `ModelCase.slow`.
PROMISED = ("gpt2", "llama", "bert", "resnet18")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        yield
    torch._dynamo.reset()


def _mlp(width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)).eval()


def _build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    if name == "mlp":
        return _mlp(), (torch.randn(8, 64, generator=torch.Generator().manual_seed(1)),)
    return MODELS[name].build()


# -- graphs and calls

def _generate(call: Callable[[Tensor], Tensor], tokens: Tensor, steps: int) -> Tensor:
    """Greedy decoding without a cache: the sequence grows by a token per step."""
    with torch.no_grad():
        for _ in range(steps):
            tokens = torch.cat([tokens, call(tokens)[:, -1].argmax(-1, keepdim=True)], 1)
    return tokens


@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_generation_compiles_once(name: str) -> None:
    model = MODELS[name].model()
    (prompt,) = MODELS[name].example_inputs(2, 7)
    with compiled_graphs() as graphs:
        tokens = _generate(torch.compile(model, backend="aicc", dynamic=True), prompt, 12)
    assert torch.equal(tokens, _generate(model, prompt, 12))
    assert len(graphs) == 1
    assert graph_of(graphs[0]).calls == 12


# What a model may leave to ATen; those that are not here leave nothing.
_GROUPED = {"aten.histc.default": 2, "transformers.grouped_mm_fallback.default": 4}
LEFT_TO_ATEN: dict[str, dict[str, int]] = {
    "lstm": {"aten.mkldnn_rnn_layer.default": 2},
    "mixtral": _GROUPED,
    "mixtral_loop": {"aten._assert_async.msg": 2},
}


@cache
def _called(name: str) -> tuple[Compilation, ...]:
    """The graphs of three calls. Compiled once: several tests look at them."""
    model, inputs = _build(name)
    with compiled_graphs() as graphs, torch.no_grad():
        compiled = torch.compile(model, backend="aicc")
        for _ in range(3):
            compiled(*inputs)
    return tuple(graphs)


@pytest.mark.parametrize("name", ["mlp", *PROMISED])
def test_one_native_call_per_graph(name: str) -> None:
    (compilation,) = _called(name)
    assert (graph_of(compilation).calls, graph_of(compilation).extern_calls) == (3, 0)


@pytest.mark.parametrize("name", [
    pytest.param(case.name, marks=[pytest.mark.slow] if case.name not in PROMISED else [])
    for case in MODELS.values() if not case.full_size
])
def test_operators_left_to_aten(name: str) -> None:
    graphs = _called(name)
    externs = Counter(e["target"] for g in graphs for e in g.stats["externs"])
    print(f"\n{name}: {len(graphs)} graph(s), {sum(g.stats['kernels'] for g in graphs)} kernels, {externs.total()} externs {dict(externs)}")
    assert graphs and externs <= Counter(LEFT_TO_ATEN.get(name, {}))


@pytest.mark.parametrize("name", PROMISED)
def test_the_arena_is_at_its_lower_bound(name: str) -> None:
    (memory,) = (g.stats["memory"] for g in _called(name))
    print(f"\n{name}: arena {memory['arena_bytes']}, lower bound {memory['lower_bound']}, without planning {memory['unplanned_bytes']}")
    assert 0 < memory["lower_bound"] <= memory["arena_bytes"] < memory["unplanned_bytes"]
    assert memory["arena_bytes"] <= 1.02 * memory["lower_bound"]


# -- speed

@pytest.mark.slow  # some 21 against 23 microseconds: other tests on the same core would decide
def test_a_two_layer_mlp_is_faster_than_eager() -> None:
    """Batch 8, one thread. The fastest of many calls, in alternating blocks: a busy machine only adds time."""
    model, inputs = _build("mlp")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        compiled = torch.compile(model, backend="aicc")
        with torch.no_grad():
            attempts = []
            for _ in range(5):
                attempts.append(_fastest([lambda: model(*inputs), lambda: compiled(*inputs)]))
                eager, ours = attempts[-1]
                if ours < eager:
                    break
    finally:
        torch.set_num_threads(threads)
    print("\n" + ", ".join(f"eager {1e6 * e:.1f} us, aicc {1e6 * a:.1f} us" for e, a in attempts))
    assert ours < eager, attempts


def _fastest(calls: list[Callable[[], Any]], blocks: int = 12, block: int = 400) -> list[float]:
    """Seconds of the fastest call of each."""
    best = [float("inf")] * len(calls)
    for _ in range(blocks):
        for i, call in enumerate(calls):
            for _ in range(block):
                start = time.perf_counter()
                call()
                best[i] = min(best[i], time.perf_counter() - start)
    return best


# -- memory

# Resident bytes before and after a call that finds no arena, no packed parameters and no pages to reuse.
_RESIDENT = """
import ctypes, gc, json, re, torch
from torch import nn
from aicc.compiler.driver import watching
from aicc.runtime.arena import shared_pool

torch.set_num_threads(1)

def status(key):
    with open("/proc/self/status") as f:
        return 1024 * int(re.search(key + r":\\s*(\\d+) kB", f.read())[1])

def reset_peak():
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")

torch.manual_seed(0)
model = %(model)s
x = %(input)s
seen = []
with torch.no_grad(), watching(compiled=seen.append):
    compiled = torch.compile(model, backend="aicc")
    held = compiled(x)  # else the next call would write its result there
    (compilation,) = seen
    graph = compilation.graph
    graph.invalidate()
    shared_pool().trim()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    try:
        reset_peak()
        peak = True
    except OSError:
        peak = False
    before = status("VmRSS")
    out = compiled(x)
    print(json.dumps({"grown": status("VmRSS") - before, "peak": status("VmHWM") - before if peak else None, **graph.memory,
                      "plan": compilation.stats["memory"]}))
"""

_LARGE = {
    "mlp": ("nn.Sequential(*[l for _ in range(4) for l in (nn.Linear(512, 512), nn.LayerNorm(512), nn.GELU())])",
            "torch.randn(16384, 512)"),
    "convolutions": ("nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), "
                     "nn.Conv2d(32, 8, 3, padding=1))", "torch.randn(4, 3, 192, 192)"),
}


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="resident memory is read from /proc")
@pytest.mark.parametrize("name", ["mlp", pytest.param("convolutions", marks=pytest.mark.slow)])
def test_resident_growth_is_what_the_plan_says(name: str) -> None:
    model, make_input = _LARGE[name]
    # Large blocks come from the system and go back to it, whatever was freed before.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", _RESIDENT % {"model": model, "input": make_input}], env=environment, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    planned = found["arena"] + found["outputs"] + found["persistent"]
    print(f"\n{name}: planned {planned} ({found['arena']} arena, {found['outputs']} outputs, {found['persistent']} packed), "
          f"lower bound of the arena {found['plan']['lower_bound']}, grown {found['grown']}, peak {found['peak']}")
    assert found["arena"] == found["plan"]["arena_bytes"] > 20e6
    assert abs(found["grown"] - planned) < 0.1 * planned + 2e6
    if found["peak"] is not None:
        assert found["peak"] < 1.1 * planned + 2e6


# -- the text of every stage

def _record(name: str, *, train: bool = False, dynamic: bool = False) -> tuple[list[Recorded], Tensor]:
    model, inputs = _build(name)
    with recorded() as graphs, torch.set_grad_enabled(train):
        output = torch.compile(model, backend="aicc", dynamic=dynamic or None)(*inputs)
        if train:
            output.square().mean().backward()
    return graphs, output.detach()


def _check_round_trip(module: Operation) -> None:
    text, resources = print_with_resources(module)
    parsed = parse_module(text, resources=resources)
    assert equivalent(parsed, module, locations=True)
    assert print_with_resources(parsed) == (text, resources)


@pytest.mark.parametrize(("name", "train", "dynamic"), [
    pytest.param("gpt2", False, False, marks=pytest.mark.slow), pytest.param("gpt2", False, True, marks=pytest.mark.slow), ("gpt2", True, False), ("resnet18", False, False),
])
def test_every_stage_parses_back(name: str, train: bool, dynamic: bool) -> None:
    graphs, _ = _record(name, train=train, dynamic=dynamic)
    assert len(graphs) == 1 + train
    for graph in graphs:
        assert list(graph.stages) == ["graph", "tensor", "tile", "host"]
        for module in graph.stages.values():
            _check_round_trip(module)


@pytest.mark.parametrize(("name", "stages"), [("gpt2", ("graph", "tensor")), ("mlp", ("graph", "tensor", "tile"))])
def test_every_stage_means_the_same(name: str, stages: tuple[str, ...]) -> None:
    (graph,), output = _record(name)
    model, inputs = _build(name)
    with torch.no_grad():
        eager = model(*inputs)
    tolerance = 1e-5 * eager.abs().max().item()
    torch.testing.assert_close(output, eager, rtol=0, atol=tolerance)
    for stage in stages:
        text, resources = print_with_resources(graph.stages[stage])
        (result,) = interpret(parse_module(text, resources=resources), graph.arguments)
        torch.testing.assert_close(result, eager, rtol=0, atol=tolerance, msg=lambda m, stage=stage: f"{stage}: {m}")
