"""Quality as exact numbers: kernels launched, bytes moved by memory-bound graphs, and arena bytes over their lower bound.

A change that fuses less, moves more or plans worse fails here; one that does better should lower the number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from aicc.compiler.options import Options
from aicc.compiler.pipelines import STAGES, pipeline
from aicc.frontend.decompositions import decomposition_table
from aicc.frontend.importer import import_graph
from aicc.ir import Operation, Target
from aicc.ir.expr import evaluate
from aicc.ir.passes import PassContext, parse_pipeline, run_pipeline
from functorch.compile import aot_function, make_boxed_func
from support.stages import AVX2, CUDA

R = torch.randn


@dataclass(frozen=True)
class Result:
    """A lowered program: kernels launched per call, those run once to pack parameters, bytes that launches move, and the memory plan."""

    launches: int
    packs: int
    externs: int
    bytes: int
    arena: int
    lower_bound: int


def lowered(fn: Callable[..., Any], args: tuple[torch.Tensor, ...], target: Target, params: int = 0, host: bool = False) -> Result:
    """`fn` taken to the tile level (and the host level with `host`); the last `params` arguments are parameters."""
    made: list[Operation] = []

    def compiler(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        kinds = ["input"] * (len(inputs) - params) + ["param"] * params
        made.append(import_graph(gm, arg_kinds=kinds))
        return make_boxed_func(gm.forward)

    with torch.no_grad():
        aot_function(fn, compiler, inference_compiler=compiler, decompositions=decomposition_table(), dynamic=False)(*args)
    module, = made
    moved: list[Operation] = []
    for stage in STAGES if host else STAGES[:3]:
        run_pipeline(module, parse_pipeline(pipeline(stage, target, Options())), PassContext(target))
        if stage == "tile":
            kernels = {op["sym_name"]: op for op in module.body if op.name == "tile.kernel"}
            launches = [op for op in module.walk() if op.name == "tile.launch"]
            cached = [op for op in launches if op["cached"]]
            moved = [kernels[op["kernel"].name] for op in launches if not op["cached"]]
            total = sum(int(evaluate(k["bytes"], {})) for k in moved)
            externs = sum(op.name.endswith(".extern") for op in module.walk())
    func = next(op for op in module.body if op.name == "func")
    stats = func["stats"] if host else {}
    return Result(len(moved), len(cached), externs, total, int(stats.get("arena_bytes", 0)), int(stats.get("lower_bound", stats.get("arena_bytes", 0))))


def numel_bytes(*tensors: torch.Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def mlp(x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor) -> torch.Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def attention_block(x: torch.Tensor, wq: torch.Tensor, wo: torch.Tensor, n1: torch.Tensor, n2: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor,
                    w2: torch.Tensor, b2: torch.Tensor) -> torch.Tensor:
    """A BERT layer: 4 heads, post-norm."""
    b, t, d = x.shape
    q, k, v = F.linear(x, wq).view(b, t, 3, 4, d // 4).permute(2, 0, 3, 1, 4)
    a = (q @ k.transpose(-1, -2) / 8).softmax(-1) @ v
    x = F.layer_norm(x + F.linear(a.transpose(1, 2).reshape(b, t, d), wo), (d,), n1)
    return F.layer_norm(x + mlp(x, w1, b1, w2, b2), (d,), n2)


MLP = (R(64, 96), R(256, 96), R(256), R(96, 256), R(96))
BLOCK = (R(2, 50, 64), R(192, 64), R(64, 64), R(64), R(64), R(256, 64), R(256), R(64, 256), R(64))

# name -> (function, arguments, how many of the last are parameters, launches on a CPU, packs, launches on a GPU)
LAUNCHES: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...], int, int, int, int]] = {
    "pointwise chain": (lambda x, y: torch.tanh(x * y + 1).relu() / 2, (R(64, 300), R(300)), 0, 1, 0, 1),
    "softmax": (lambda x: x.softmax(-1), (R(64, 300),), 0, 1, 0, 1),
    "softmax of columns": (lambda x: x.softmax(0), (R(64, 300),), 0, 1, 0, 1),
    # the comparison of the (smaller) mask is a kernel of its own: one would do
    "masked scaled softmax": (lambda x, m: (x / 8).masked_fill(m > 0, -1e9).softmax(-1), (R(4, 64, 64), R(64, 64)), 0, 2, 0, 2),
    "masked by a bool": (lambda x, m: (x / 8).masked_fill(m, -1e9).softmax(-1), (R(4, 64, 64), R(64, 64) > 0), 0, 1, 0, 1),
    "log_softmax": (lambda x: x.log_softmax(-1), (R(64, 300),), 0, 1, 0, 1),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (300,), w, b), (R(64, 300), R(300), R(300)), 2, 1, 0, 1),
    "residual RMSNorm": (lambda x, r, w: F.rms_norm(x + r, (300,), w), (R(64, 300), R(64, 300), R(300)), 1, 1, 0, 1),
    "residual RMSNorm, sum kept": (lambda x, r, w: (F.rms_norm(x + r, (300,), w), x + r), (R(64, 300), R(64, 300), R(300)), 1, 1, 0, 1),
    "two sums of one tensor": (lambda x: (x.sum(1), (x * x).sum(1)), (R(64, 300),), 0, 1, 0, 1),
    "variance": (lambda x: x.var(1), (R(64, 300),), 0, 1, 0, 1),
    "views only": (lambda x: x.t().reshape(-1)[3:100].flip(0), (R(64, 300),), 0, 1, 0, 1),
    "linear, bias, gelu": (lambda x, w, b: F.gelu(F.linear(x, w, b)), (R(64, 96), R(256, 96), R(256)), 2, 1, 1, 1),
    "gelu MLP": (mlp, MLP, 4, 2, 2, 2),
    "embedding, norm": (lambda i, w, g: F.layer_norm(F.embedding(i, w), (64,), g), (torch.randint(0, 9, (4, 20)), R(9, 64), R(64)), 2, 1, 0, 1),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches(name: str) -> None:
    fn, args, params, cpu, packs, gpu = LAUNCHES[name]
    on_cpu, on_gpu = lowered(fn, args, AVX2, params), lowered(fn, args, CUDA, params)
    assert (on_cpu.launches, on_cpu.packs, on_cpu.externs) == (cpu, packs, 0)
    assert (on_gpu.launches, on_gpu.packs, on_gpu.externs) == (gpu, 0, 0)


def test_launches_of_a_bert_layer() -> None:
    cpu, gpu = lowered(attention_block, BLOCK, AVX2, 8), lowered(attention_block, BLOCK, CUDA, 8)
    assert (cpu.packs, cpu.externs, gpu.packs, gpu.externs) == (4, 0, 0, 0)
    # qkv, attention, projection, norm, two linears, norm; on a CPU also packing the keys, and attention of this size in three kernels
    assert gpu.launches == 7
    assert cpu.launches == 10


MINIMAL: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "pointwise chain": (lambda x, y: torch.tanh(x * y + 1).relu() / 2, (R(64, 300), R(300))),
    "broadcast of two": (lambda x, y: x[:, None] * y[None], (R(64), R(300))),
    "transpose": (lambda x: x.t().contiguous() + 1, (R(64, 300),)),
    "softmax": (lambda x: x.softmax(-1), (R(64, 300),)),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (300,), w, b), (R(64, 300), R(300), R(300))),
    "residual RMSNorm": (lambda x, r, w: F.rms_norm(x + r, (300,), w), (R(64, 300), R(64, 300), R(300))),
    "bf16": (lambda x: (x * 2).relu(), (R(64, 300).bfloat16(),)),
    "casts": (lambda x: (x * 2).to(torch.bfloat16), (R(64, 300),)),
    "sums": (lambda x: (x.sum(1), (x * x).sum(1)), (R(64, 300),)),
    "column sums": (lambda x: x.sum(0), (R(64, 300),)),
    "all sums": (lambda x: x.sum(), (R(64, 300),)),
    "arg": (lambda x: x.max(1), (R(64, 300),)),
    "two outputs": (lambda x, y: (x + y, x - y), (R(64, 300), R(64, 300))),
    "cat": (lambda x, y: torch.cat([x, y], 1), (R(64, 300), R(64, 100))),
}


@pytest.mark.parametrize("name", MINIMAL)
def test_minimal_traffic(name: str) -> None:
    """A fused memory-bound graph reads each input and writes each output once."""
    fn, args = MINIMAL[name]
    with torch.no_grad():
        results = torch.utils._pytree.tree_leaves(fn(*args))
    for target in (AVX2, CUDA):
        assert lowered(fn, args, target).bytes == numel_bytes(*args, *results)


def test_a_slice_moves_only_what_it_reads() -> None:
    x = R(64, 300)
    assert lowered(lambda x: x[:, 10:30] * 2, (x,), AVX2).bytes == 2 * 64 * 20 * 4
    assert lowered(lambda x: x[3] + x[5], (x,), AVX2).bytes == 3 * 300 * 4


# name -> function, arguments, parameters; the arena may be this many bytes over the largest sum of live sizes
ARENAS: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...], int, int]] = {
    "softmax": (lambda x: x.softmax(-1), (R(64, 300),), 0, 0),
    "gelu MLP": (mlp, MLP, 4, 0),
    "BERT layer": (attention_block, BLOCK, 8, 0),
}


@pytest.mark.parametrize("name", ARENAS)
def test_arena(name: str) -> None:
    fn, args, params, over = ARENAS[name]
    r = lowered(fn, args, AVX2, params, host=True)
    assert r.arena - r.lower_bound <= over
    if name == "softmax":
        assert r.arena == 0, "one kernel from input to output needs no memory"
    if name == "gelu MLP":
        assert r.arena == 64 * 256 * 4, "the hidden activations alone"
