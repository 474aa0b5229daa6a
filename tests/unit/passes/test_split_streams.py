"""Streams of few rows in parts (flash-decoding): against eager at the tensor and tile levels, and how many kernels there are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from aicc.compiler.pipelines import pipeline
from aicc.ir import Operation, TensorType
from aicc.ir.interpreter import interpret
from aicc.ir.passes import PassContext, parse_pipeline, run_pipeline
from support.stages import CUDA, OPTIONS, Program, capture, check_levels, compare, copied, lowered
from torch import Tensor

NEVER = float("-inf")


def _inputs(batch: int, heads: int, key_heads: int, rows: int, length: int, width: int = 16, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(length)
    shapes = ((batch, heads, rows, width), (batch, key_heads, length, width), (batch, key_heads, length, width))
    return [torch.randn(s, generator=g).to(dtype) for s in shapes]


def _groups(q: Tensor, k: Tensor) -> Tensor:
    """Scores of grouped heads, [batch, key heads, group, rows, length]."""
    return q.unflatten(1, (k.shape[1], -1)) @ k[:, :, None].mT * 0.25


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.25).softmax(-1) @ v


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (3 * torch.tanh(_groups(q, k) / 3)).softmax(-1) @ v[:, :, None]


def seen(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Each sequence of the batch has a length of its own; parts beyond it are masked throughout."""
    mask = (torch.arange(k.shape[2]) < lengths[:, None])[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def nothing_seen(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Softmax by hand is NaN where nothing is seen, and so is what is combined."""
    s = torch.where((torch.arange(k.shape[2]) < lengths[:, None])[:, None, None], q @ k.mT, NEVER)
    return s.softmax(-1) @ v


def speculative(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A few new tokens, causal among each other: the masked end of the cache is known when compiling."""
    rows, columns = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2], torch.arange(k.shape[2])
    s = torch.where(columns <= rows, q @ k.repeat_interleave(2, 1).mT, NEVER)
    return s.softmax(-1) @ v.repeat_interleave(2, 1)


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT + (torch.arange(k.shape[2]) - k.shape[2]) * torch.tensor([0.5, 0.125])[:, None, None]
    return (s.softmax(-1) @ v).transpose(1, 2).flatten(2)


def with_sums(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row values leave the kernel too."""
    s = q @ k.mT
    m = s.amax(-1, keepdim=True)
    e = (s - m).exp()
    total = e.sum(-1, keepdim=True)
    return e @ v / total, m, total.log() + m


def made_finite(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Softmax that is 0, and not NaN, where nothing is seen, by the maximum."""
    s = torch.where((torch.arange(k.shape[2]) < lengths[:, None])[:, None, None], q @ k.mT, NEVER)
    m = s.amax(-1, keepdim=True)
    e = (s - torch.where(m == NEVER, 0.0, m)).exp()
    return e @ v / e.sum(-1, keepdim=True).clamp(min=1e-6)


CASES: dict[str, tuple[Callable[..., object], list[Tensor]]] = {
    "sdpa": (sdpa, _inputs(1, 4, 2, 1, 512)),
    "heads_of_their_own": (plain, _inputs(2, 2, 2, 1, 512)),
    "bf16": (sdpa, _inputs(1, 4, 2, 1, 512, 32, torch.bfloat16)),
    "ragged": (sdpa, _inputs(2, 4, 2, 1, 523)),
    "capped": (capped, _inputs(1, 4, 2, 1, 640)),
    "lengths": (seen, [*_inputs(3, 4, 2, 1, 512), torch.tensor([512, 100, 1])]),
    "lengths_ragged": (seen, [*_inputs(3, 4, 2, 1, 521), torch.tensor([521, 130, 7])]),
    "nothing_seen": (nothing_seen, [*_inputs(2, 2, 2, 1, 512), torch.tensor([0, 200])]),
    "speculative": (speculative, _inputs(1, 4, 2, 5, 768)),
    "alibi": (alibi, _inputs(1, 2, 2, 3, 512)),
    "with_sums": (with_sums, _inputs(1, 2, 2, 2, 512)),
    "made_finite": (made_finite, [*_inputs(2, 2, 2, 1, 512), torch.tensor([0, 300])]),
}


def _kernels(module: Operation) -> list[Operation]:
    return [op for func in module.body if func.name == "func" for op in func.body if op.name == "tensor.fused" and op["kernel"] != "copy"]


def _program(name: str) -> Program:
    function, inputs = CASES[name]
    return capture(function, inputs)


@pytest.mark.parametrize("name", CASES)
def test_parts(name: str) -> None:
    program = _program(name)
    module = lowered(program, CUDA, "tensor")
    streams = [op for op in _kernels(module) if op["kernel"].startswith("stream")]
    assert len(streams) == 1, [op["kernel"] for op in _kernels(module)]
    check_levels(program, CUDA)


def test_two_kernels_and_all_heads_of_a_group_in_one_tile() -> None:
    stream, combined = _kernels(lowered(_program("sdpa"), CUDA, "tensor"))
    products = [op for op in stream.body if op.name == "tensor.generic" and op["reductions"] and op["dims"][-1] in (16, 128)]
    assert all(op["dims"][:5] == (1, 2, 4, 2, 1) for op in products)  # batch, key heads, parts, heads of a group, rows
    assert [r.type for r in combined.results] == [TensorType((1, 4, 1, 16), combined.result.type.dtype)]  # type: ignore[attr-defined]


def test_masked_steps_are_outside_the_loop() -> None:
    """The last part of a ragged length ends where the length does."""
    module = lowered(_program("ragged"), CUDA, "tile")
    stream = next(op for op in module.body if op.name == "tile.kernel" and op["sym_name"].startswith("stream"))
    assert any("min" in str(v) or "program" in str(v) for op in stream.walk() if op.name == "tile.for" for v in op.attributes.values())


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_any_number_of_parts(parts: int) -> None:
    """The pass alone changes nothing but the order of additions."""
    program = _program("lengths")
    module = program.module()
    text = pipeline("tensor", CUDA, OPTIONS)
    passes = text[:text.index("split-streams")] + f"split-streams{{parts={parts}}},dce"
    run_pipeline(module, parse_pipeline(pipeline("graph", CUDA, OPTIONS)), PassContext(CUDA))
    run_pipeline(module, parse_pipeline(passes), PassContext(CUDA))
    compare(interpret(module, [copied(x) for x in program.inputs], check=True), program, f"{parts} parts")
    assert any(len(op["dims"]) == 7 for func in module.body for op in func.body if op.name == "tensor.generic")  # parts and groups of heads


def test_enough_programs_are_left_whole() -> None:
    q, k, v = _inputs(1, 4, 4, 1, 512)
    many = [x.expand(80, -1, -1, -1).contiguous() for x in (q, k, v)]
    stream, = _kernels(lowered(capture(sdpa, many), CUDA, "tensor"))
    assert len(stream.results) == 1


def test_a_length_that_grows() -> None:
    """The kernel for a symbolic length serves others."""
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (2, 16)).transpose(1, 2) for x in (q, k, v))
        return (q @ k.mT * 0.25).softmax(-1) @ v

    def inputs(n: int) -> list[Tensor]:
        g = torch.Generator().manual_seed(n)
        return [torch.randn(2, m, 32, generator=g) for m in (1, n, n)]

    module = lowered(capture(f, inputs(300), dynamic=True), CUDA, "tile")
    assert any(op["sym_name"].startswith("stream") for op in module.body if op.name == "tile.kernel")
    for n in (17, 64, 1031):
        program = capture(f, inputs(n))
        compare(interpret(module, [copied(x) for x in program.inputs], check=True), program, f"length {n}")
