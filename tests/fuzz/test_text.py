"""Damaged IR text: always an error of one class with a place, never a hang, a crash or much memory, and no code is run."""

from __future__ import annotations

import re
import resource
from functools import cache
from random import Random

import pytest
from aicc import passes  # noqa: F401  (importing passes registers them)
from aicc.backends.llvm import host_target
from aicc.ir.parser import ParseError, parse_module
from aicc.ir.passes import PassContext, parse_pipeline, run_pipeline
from aicc.ir.printer import print_op
from aicc.ir.verifier import VerificationError, verify
from hypothesis import given
from hypothesis import strategies as st
from support.fuzzing import at_most, attempt, runs_no_code, scaled
from support.random_ir import random_tensor_module

SECONDS = 20
MEMORY = 1 << 30
_TOKEN = re.compile(r'"[^"\n]*"|[%@^]?[\w.$-]+|\s+|.')
JUNK = ("", "(", ")", "{", "}", "[", "]", "<", ">", ",", ":", "=", "%", "%0", "@k", "^", "loc", "none", "true", "-", "//", "%", "*", "max(", "min(s0, ",
        "0", "-1", "1e999", "nan", "99999999999999999999", "9" * 5000, "s0", "d0", "((((s0))))", "tensor<", "tensor<4xf32>", "tile<s0xf32>",
        "tensor<-4xf32>", "buffer<4xf32, strides=[s0]>", "dense<f32, [4], \"0x00\">", "dense<f32, [99999999999], \"0x\">", "dense<i1, [-1], []>",
        "dense<f32, [2], \"sha256:00\">", "graph.add", "tile.for", "module", "func", "return", '"', '"\\u0000"', '"\\ud800"', "\x00", "\u2028", "é", "#", "//x\n",
        "(" * 300 + "s0" + ")" * 300, "[" * 300 + "]" * 300, "s0 // 0", "s0 % 0", "{a = {a = {a = 1}}}", "__import__('os')", "i0", "t0")


LOOPS = """module {level = "tensor"} { func @walk { ^(%c: tensor<4xf32>, %xs: tensor<6x4xf32>, %w: tensor<4xf32>):
  %end, %y = loop(%c, %xs, %w) {body = @step, carried = 1, sliced = 1, reversed_operands = [0]} : tensor<4xf32>, tensor<6x4xf32>
  return(%end, %y)
}
func @step {private = true} { ^(%c: tensor<4xf32>, %x: tensor<4xf32>, %w: tensor<4xf32>):
  %n = tensor.generic(%c, %x, %w) {dims = [4], maps = [[d0], [d0], [d0]]} : tensor<4xf32> {
    ^(%a: f32, %b: f32, %d: f32): %p = arith.mul(%b, %d) : f32 %q = arith.add(%a, %p) : f32 tensor.yield(%q) }
  return(%n, %n)
} }
"""
COLLECTIVES = """module { func @main { ^(%x: tensor<4x4xf32>):
  %a = dist.all_reduce(%x) {axis = "tp", ranks = 2} : tensor<4x4xf32>
  %p = dist.shard(%a) {axis = "tp", ranks = 2, dim = 1} : tensor<4x2xf32>
  %g = dist.all_gather(%p) {axis = "tp", ranks = 2, dim = 1} : tensor<4x4xf32>
  return(%g)
} }
"""


@cache
def texts() -> tuple[str, ...]:
    """Modules of the tensor, tile and host levels, some with loops, and one with collectives."""
    found = [COLLECTIVES]
    loops = parse_module(LOOPS)
    found.append(print_op(loops))
    run_pipeline(loops, parse_pipeline("simplify-loops,hoist-invariants,fuse,tile"), PassContext(host_target()))
    found.append(print_op(loops))
    run_pipeline(loops, parse_pipeline("schedule,bufferize,plan-memory"), PassContext(host_target()))
    found.append(print_op(loops))
    assert "host.loop" in found[-1]
    for seed in (3, 5):
        module, _ = random_tensor_module(seed, 4, dynamic=seed == 5)
        found.append(print_op(module))
        ctx = PassContext(host_target())
        for pipeline in ("inline,fuse,tile", "schedule,bufferize,plan-memory"):
            run_pipeline(module, parse_pipeline(pipeline), ctx)
            found.append(print_op(module, locations=True))
    return tuple(found)


def damaged(seed: int) -> str:
    """One of the texts with one to six tokens or stretches changed."""
    rng = Random(seed)
    tokens = _TOKEN.findall(rng.choice(texts()))
    for _ in range(rng.randint(1, 6)):
        i = rng.randrange(len(tokens) + 1)
        j = min(len(tokens), i + rng.choice([0, 1, 1, 1, 2, 9]))
        choice = rng.random()
        if choice < 0.6:
            tokens[i:j] = [rng.choice(JUNK)]
        elif choice < 0.7:
            tokens[i:j] = []
        elif choice < 0.8:
            tokens[i:i] = tokens[i:j] * rng.choice([2, 3, 200])
        elif choice < 0.9:
            tokens[i:j] = [rng.choice(tokens)]
        else:
            del tokens[i:]
    text = "".join(tokens)
    if rng.random() < 0.2 and text:
        at = rng.randrange(len(text))
        text = text[:at] + chr(rng.choice([0, 9, 10, 34, 37, 40, 92, 127, 0xE9, 0x2028, 0xD7FF, 0x1F600])) + text[at + 1:]
    return text


def check(text: str) -> None:
    """Parses (and verifies, when that succeeds)."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with at_most(SECONDS), runs_no_code():
        try:
            module = parse_module(text, filename="damaged.mlir")
        except ParseError as e:
            assert re.match(r"damaged\.mlir:\d+:\d+: .", str(e)), str(e)
            assert len(str(e)) < 2000, "a message is not the file"
        else:
            try:
                verify(module)
            except VerificationError as e:
                assert str(e).startswith("'")
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < MEMORY, f"{grown} bytes for {len(text)} characters"


def test_the_texts_are_right() -> None:
    for text in texts():
        verify(parse_module(text))


@scaled(150)
@given(st.integers(0, 1 << 40))
def test_damaged_text(seed: int) -> None:
    text = damaged(seed)
    attempt(text, lambda: check(text))


_FACTORS = " * ".join(f"(a{i} + b{i})" for i in range(40))
_BOMBS = {
    "a product of sums": _FACTORS,
    "a power": " * ".join(["(a + b + c + d + e + f + g + h + k + l)"] * 40),
    "deep parentheses": "(" * 20000 + "s0" + ")" * 20000,
    "deep minima": "min(s0, " * 2000 + "1" + ")" * 2000,
    "a long sum": " + ".join(f"x{i}" for i in range(20000)),
    "a long product": " * ".join(["9" * 2000] * 200),
    "nested remainders": "(" * 400 + "s0" + " % 7 + s0) // 3" * 400,
    "deep lists": "[" * 20000 + "]" * 20000,
    "deep dictionaries": "{a = " * 20000 + "1" + "}" * 20000,
}


@pytest.mark.parametrize("name", _BOMBS)
def test_small_texts_that_would_become_large(name: str) -> None:
    check(f"module {{\n  func @f {{a = {_BOMBS[name]}}} {{\n    return()\n  }}\n}}\n")
