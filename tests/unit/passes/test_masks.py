"""Comparisons of random bits, and masks with scales, keep every bit; the Triton text takes one instruction for a product of words."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from aicc.backends.triton.printer import print_kernel
from aicc.frontend import random as _operators  # noqa: F401  (registers them)
from aicc.ir.interpreter import interpret
from aicc.ir.parser import parse_module
from aicc.ir.passes import PassContext, parse_pipeline, run_pipeline
from support.stages import CUDA, capture, check_levels, lowered
from torch import Tensor

COMPARED = """module {{ func @f {{ ^(%w: tensor<{n}xu32>):
  %y = tensor.generic(%w) {{dims = [{n}], maps = [[d0]]}} : tensor<{n}xi1> {{ ^(%a: u32):
    %n = arith.constant() {{value = {shift}}} : u32
    %s = arith.shr(%a, %n) : u32
    %i = arith.cast(%s) : i32
    %x = arith.cast(%i) : f32
    %f = arith.constant() {{value = {factor}}} : f32
    %u = arith.mul(%x, %f) : f32
    %p = arith.constant() {{value = {bound}}} : f32
    %c = arith.{name}(%u, %p) : i1
    tensor.yield(%c)
  }}
  return(%y)
}} }}"""
MASKED = """module {{ func @f {{ ^(%x: tensor<{n}xf32>, %m: tensor<{n}xi1>):
  %y = tensor.generic(%x, %m) {{dims = [{n}], maps = [[d0], [d0]]}} : tensor<{n}xf32> {{ ^(%a: f32, %b: i1):
    %k = arith.cast(%b) : f32
    %z = arith.mul(%a, %k) : f32
    %s = arith.constant() {{value = {scale}}} : f32
    %r = arith.mul(%z, %s) : f32
    tensor.yield(%r)
  }}
  return(%y)
}} }}"""


def _both(text: str, *inputs: Tensor) -> tuple[Tensor, Tensor, set[str]]:
    """Before and after, and the body's ops after."""
    module = parse_module(text)
    (before,) = interpret(module, list(inputs))
    run_pipeline(module, parse_pipeline("canonicalize,dce"), PassContext())
    (after,) = interpret(module, list(inputs))
    return before, after, {op.name for op in module.walk()}


@pytest.mark.parametrize("name", ["ge", "lt"])
@pytest.mark.parametrize(("bound", "shift", "rewritten"), [
    (0.1, 8, True), (0.5, 8, True), (1 / 3, 9, True), (2.0**-24, 8, True), (1 - 2.0**-24, 8, True), (1e-30, 8, True),
    (0.0, 8, False), (-0.25, 8, False), (1.0, 8, False), (2.0, 8, False), (0.1, 7, False)])
def test_random_bits_are_compared(name: str, bound: float, shift: int, rewritten: bool) -> None:
    edge = int(bound * 2**24) << shift if 0 <= bound < 1 else 0
    near = torch.arange(max(0, edge - 3000), edge + 3000) % 2**32
    words = torch.cat([near, torch.randint(0, 2**32, (3000,)), torch.tensor([0, 1, 255, 256, 2**31, 2**32 - 1])]).to(torch.uint32)
    before, after, ops = _both(COMPARED.format(n=len(words), shift=shift, factor=2.0**-24, bound=bound, name=name), words)
    assert torch.equal(before, after)
    assert ("arith.mul" not in ops) == rewritten


@pytest.mark.parametrize(("scale", "rewritten"), [(1 / 0.9, True), (2.0, True), (0.3, True), (-2.0, False), (0.0, False)])
def test_mask_and_scale_are_one_factor(scale: float, rewritten: bool) -> None:
    x = torch.cat([torch.randn(500), torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 3e38, -3e38, 1e-45, -1e-45])]).repeat(2)
    mask = torch.arange(len(x)) < len(x) // 2
    before, after, ops = _both(MASKED.format(n=len(x), scale=scale), x, mask)
    torch.testing.assert_close(before, after, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(before.signbit() & (before == before), after.signbit() & (after == after))
    assert ("arith.select" in ops) == rewritten


def test_words_are_multiplied_by_one_instruction() -> None:
    """Twenty products of Philox, ten rounds of two: of the second two in the first round, one factor is a constant."""
    def dropped(x: Tensor, seed: Tensor) -> Tensor:
        kept = torch.ops.aicc.random_uniform(seed, [16, 64], 0, torch.float32) >= 0.25
        return F.relu(x) * kept * (1 / 0.75)

    x, seed = torch.randn(16, 64), torch.tensor(1234567890123)
    program = capture(dropped, [x, seed])
    check_levels(program, CUDA)
    module = lowered(program, CUDA)
    (text,) = [print_kernel(op).text for op in module.body if op.name == "tile.kernel"]
    assert text.count(" = multiply_words(") == 20
