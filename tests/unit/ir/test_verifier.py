"""The verifier: one malformed module per check, and what its error says."""

from __future__ import annotations

import pytest
from aicc.ir import Block, Location, Operation, Region, make_func, make_module
from aicc.ir.parser import parse_module
from aicc.ir.types import f32
from aicc.ir.verifier import VerificationError, verify

VALID = {
    "graph": "%y = graph.exp(%x) : tensor<4x8xf32>\nreturn(%y)",
    "generic": """%y = tensor.generic(%x) {dims = [4, 8], reductions = 1, combine = ["sum"], maps = [[d0, d1]]} : tensor<4xf32> {
        ^(%a: f32):
          tensor.yield(%a)
      }
      return(%y)""",
}


def module(body: str, before: str = "") -> str:
    return f"module {{ {before} func @f {{ ^(%x: tensor<4x8xf32>, %w: tensor<8x3xf32>, %i: tensor<4xi64>):\n{body}\n }} }}"


def generic(attrs: str, result: str = "tensor<4x8xf32>", args: str = "%a: f32", operands: str = "%x", body: str = "tensor.yield(%a)") -> str:
    return module(f"%y = tensor.generic({operands}) {{{attrs}}} : {result} {{ ^({args}): {body} }}\nreturn(%y)")


def kernel(body: str, attrs: str = "grid = [4], outputs = 1", args: str = "%x: buffer<64xf32>, %y: buffer<64xf32>", end: str = "tile.yield()") -> str:
    return f"module {{ tile.kernel @k {{{attrs}}} {{ ^({args}):\n{body}\n{end} }} }}"


LOAD = "%v = tile.load(%x) {offset = t0, shape = [8]} : tile<8xf32>\n"

CASES = {
    # structure
    "operand count": (module("%y = graph.exp(%x, %x) : tensor<4x8xf32>\nreturn(%y)"), "has 2 operands, its definition names 1: x"),
    "result count": (module("%y, %z = graph.exp(%x) : tensor<4x8xf32>, tensor<4x8xf32>\nreturn(%y)"), "has 2 results, its definition names 1: result"),
    "too few variadic": (module("tile.store(%x)\nreturn()"), "needs at least 2 operands"),
    "region count": (module("%y = tensor.generic(%x) {dims = [4], maps = [[d0, 0]]} : tensor<4xf32>\nreturn(%y)"), "has 0 regions, its definition 1"),
    "unknown attribute": (module("%y = graph.softmax(%x) {dim = 1, dimm = 2} : tensor<4x8xf32>\nreturn(%y)"), "unknown attribute 'dimm'; did you mean 'dim'"),
    "unknown attribute, none near": (module("%y = graph.exp(%x) {zzz = 2} : tensor<4x8xf32>\nreturn(%y)"), "unknown attribute 'zzz'; it has none"),
    "missing attribute": (module("%y = graph.softmax(%x) : tensor<4x8xf32>\nreturn(%y)"), "lacks the attribute dim"),
    "terminator": (module("return(%x)\n%y = graph.exp(%x) : tensor<4x8xf32>\nreturn(%y)"), "a terminator must be the last op of its block"),
    "function without return": (module("%y = graph.exp(%x) : tensor<4x8xf32>"), "must end with 'return'"),
    "argument attributes": ("module { func @f {arg_attrs = [{}]} { ^(%x: tensor<f32>, %y: tensor<f32>): return(%x) } }", "'arg_attrs' has 1 entries for 2 arguments"),
    # graph
    "elementwise shape": (module("%y = graph.exp(%x) : tensor<4x9xf32>\nreturn(%y)"), r"gives shape \[4, 8\], but its result is declared as tensor<4x9xf32>"),
    "elementwise type": (module("%y = graph.exp(%x) : tensor<4x8xf64>\nreturn(%y)"), "gives f32, but its result is declared"),
    "comparison type": (module("%y = graph.lt(%x, %x) : tensor<4x8xf32>\nreturn(%y)"), "gives i1"),
    "broadcast": (module("%y = graph.add(%x, %w) : tensor<4x8xf32>\nreturn(%y)"), "cannot broadcast tensor<4x8xf32>, tensor<8x3xf32>"),
    "mixed types": (module("%y = graph.add(%x, %i) : tensor<4x8xf32>\nreturn(%y)"), "cannot broadcast|needs one element type"),
    "reshape": (module("%y = graph.reshape(%x) : tensor<5x7xf32>\nreturn(%y)"), "changes the number of elements"),
    "permute": (module("%y = graph.permute(%x) {perm = [0, 0]} : tensor<4x8xf32>\nreturn(%y)"), r"by \(0, 0\) does not take"),
    "matmul": (module("%y = graph.matmul(%w, %x) : tensor<8x8xf32>\nreturn(%y)"), "needs .*M, K.* and .*K, N"),
    # tensor
    "maps": (generic("dims = [4, 8], maps = []"), "has 0 maps for 1 operands"),
    "fills": (generic("dims = [4, 8], maps = [[d0, d1]], fills = [1.0, 2.0]"), "has 2 fills for 1 operands"),
    "body arguments": (generic("dims = [4, 8], maps = [[d0, d1]]", args="%a: f32, %b: f32"), "has 2 arguments for 1 operands"),
    "map rank": (generic("dims = [4, 8], maps = [[d0]]"), "map 0 of 'tensor.generic' has 1 expressions"),
    "map dimension": (generic("dims = [4, 8], maps = [[d0, d2]]"), "map 0 of 'tensor.generic' uses d2, but there are 2 dimensions"),
    "argument type": (generic("dims = [4, 8], maps = [[d0, d1]]", args="%a: f64"), "argument 0 of the body must be f32, got f64"),
    "whole argument": (generic("dims = [4, 8], maps = [none]", body="%c = arith.constant() {value = 1.0} : f32 tensor.yield(%c)"), "stands for the whole"),
    "reductions": (generic("dims = [4, 8], reductions = 3, maps = [[d0, d1]]"), "'reductions' is 3 for 2 dimensions"),
    "combine missing": (generic("dims = [4, 8], reductions = 1, maps = [[d0, d1]]", "tensor<4xf32>"), "'combine' of result 0 is 'none' with 1 reduction"),
    "combine without reductions": (generic('dims = [4, 8], combine = ["sum"], maps = [[d0, d1]]'), "'combine' of result 0 is 'sum' with 0 reduction"),
    "combine unknown": (generic('dims = [4, 8], reductions = 1, combine = ["avg"], maps = [[d0, d1]]', "tensor<4xf32>"), "'avg'"),
    "result shape": (generic('dims = [4, 8], reductions = 1, combine = ["sum"], maps = [[d0, d1]]', "tensor<8xf32>"), r"result 0 must be f32 of shape \[4\]"),
    "argmax type": (generic('dims = [4, 8], reductions = 1, combine = ["argmax"], maps = [[d0, d1]]', "tensor<4xf32>"), "result 0 must be i64"),
    "yield count": (generic("dims = [4, 8], maps = [[d0, d1]]", body="tensor.yield(%a, %a)"), "yields 2 values"),
    "yield missing": (generic("dims = [4, 8], maps = [[d0, d1]]", body="%b = arith.exp(%a) : f32"), "must end with 'tensor.yield'"),
    "scan kind": (module('%y = tensor.scan(%x) {dims = [4, 8], maps = [[d0, d1]], kind = "mean"} : tensor<4x8xf32> { ^(%a: f32): tensor.yield(%a) }\nreturn(%y)'),
                  "scan kind 'mean'"),
    "scan shape": (module('%y = tensor.scan(%x) {dims = [4, 8], maps = [[d0, d1]], kind = "sum"} : tensor<4xf32> { ^(%a: f32): tensor.yield(%a) }\nreturn(%y)'),
                   "of the shape of its iteration space"),
    "scatter indices": (module('%y = tensor.scatter(%x, %i) {dims = [4], maps = [[d0]]} : tensor<4x8xf32> { ^(%a: i64): %c = arith.constant() {value = 1.0} : f32 '
                               'tensor.yield(%c, %a) }\nreturn(%y)'), "must yield a value and 2 indices"),
    "fused sees nothing outside": (module("%y = tensor.fused() : tensor<4x8xf32> { tensor.yield(%x) }\nreturn(%y)"), "not visible in this region"),
    # arith
    "arith types": (module("""%y = tensor.generic(%x, %i) {dims = [4, 8], maps = [[d0, d1], [d0]]} : tensor<4x8xf32> { ^(%a: f32, %b: i64):
        %c = arith.add(%a, %b) : f32 tensor.yield(%c) }\nreturn(%y)"""), "needs operands of one element type, got f32, i64"),
    "arith domain": (generic("dims = [4], maps = [[d0]]", "tensor<4xi64>", "%a: i64", "%i", "%b = arith.exp(%a) : i64 tensor.yield(%b)"), "is not defined on i64"),
    "select": (generic("dims = [4, 8], maps = [[d0, d1]]", body="%b = arith.select(%a, %a, %a) : f32 tensor.yield(%b)"), r"needs \(i1, T, T\)"),
    "constant": (generic("dims = [4, 8], maps = [[d0, d1]]", body="%b = arith.constant() {value = 1} : f32 tensor.yield(%b)"), "needs a float value, got 1"),
    # tile
    "kernel end": (kernel("", end="tile.yield(%x)"), "must end with an empty 'tile.yield'"),
    "kernel argument": (kernel("", args="%x: tensor<4xf32>"), "kernel argument 0 must be a buffer"),
    "grid symbol": (kernel("", attrs="grid = [s0], outputs = 1"), "the grid uses s0, not listed in 'symbols'"),
    "load type": (kernel("%v = tile.load(%x) {offset = t0, shape = [8]} : tile<9xf32>"), "cannot give tile<9xf32>"),
    "load index": (kernel("%v = tile.load(%x) {offset = i0 + t0, shape = [8]} : tile<8xf32>"), "uses i0, but the op has 0 index operands"),
    "load rank": (kernel("%v = tile.load(%x) {offset = t1, shape = [8]} : tile<8xf32>"), "uses t1, but the tile has rank 1"),
    "mask": (kernel("%v = tile.load(%x) {offset = t0, shape = [8], mask = [[t0]]} : tile<8xf32>"), "must be a pair"),
    "store type": (kernel(LOAD + "%w = arith.cast(%v) : tile<8xi64>\ntile.store(%y, %w) {offset = t0}"), "element types differ"),
    "atomic": (kernel(LOAD + 'tile.store(%y, %v) {offset = t0, atomic = "xor"}'), "atomic 'xor' is not one of"),
    "tile shapes": (kernel(LOAD + "%u = tile.load(%x) {offset = t0, shape = [4]} : tile<4xf32>\n%s = arith.add(%v, %u) : tile<8xf32>"), r"cannot broadcast tile sizes \['4', '8'\]"),
    "tile ranks": (kernel(LOAD + "%u = tile.load(%x) {offset = t0, shape = [1, 8]} : tile<1x8xf32>\n%s = arith.add(%v, %u) : tile<8xf32>"), "mixes tiles of ranks"),
    "for arguments": (kernel("tile.for() {lower = 0, upper = 4} { ^(%i: f32): tile.yield() }"), "takes an index and 0 carried values"),
    "for yield": (kernel(LOAD + "%r = tile.for(%v) {lower = 0, upper = 4} : tile<8xf32> { ^(%i: index, %a: tile<8xf32>): tile.yield() }"), "must yield its carried values"),
    "for step": (kernel("tile.for() {lower = 0, upper = 4, step = 0} { ^(%i: index): tile.yield() }"), "must be a positive constant, got 0"),
    "reduce axis": (kernel(LOAD + '%r = tile.reduce(%v) {axis = 1, kind = "sum"} : tile<1xf32>'), "reduce"),
    "dot": (kernel("%a = tile.load(%x) {offset = t0, shape = [2, 4]} : tile<2x4xf32>\n%d = tile.dot(%a, %a, %a) : tile<2x4xf32>"), "'tile.dot' of tile<2x4xf32> and"),
}


@pytest.mark.parametrize("name", CASES)
def test_violation(name: str) -> None:
    text, message = CASES[name]
    op = parse_module(text)
    with pytest.raises(VerificationError, match=message) as e:
        verify(op)
    assert "  > " in str(e.value), "the error shows the IR around the op"


@pytest.mark.parametrize("name", VALID)
def test_valid(name: str) -> None:
    verify(parse_module(module(VALID[name])))


def test_uses_must_follow_definitions() -> None:
    op = parse_module(module("%y = graph.exp(%x) : tensor<4x8xf32>\n%z = graph.neg(%y) : tensor<4x8xf32>\nreturn(%z)"))
    first, second, _ = op.body.first.body.ops  # type: ignore[union-attr]
    first.detach()
    op.body.first.body.insert_after(second, first)  # type: ignore[union-attr]
    with pytest.raises(VerificationError, match="operand 0 is not defined before its use"):
        verify(op)


def test_the_error_shows_where() -> None:
    module_, top = make_module("graph")
    _, body = make_func(top, "f", [f32])
    bad = body.append(Operation.create("graph.exp", [body.args[0]], {}, [f32], (), Location("model.py", 7, "block.1")))
    body.append(Operation.create("return", bad.results))
    with pytest.raises(VerificationError, match=r"(?s)at model.py:7 \(block.1\).*  > .*graph.exp.*\n    return") as e:
        verify(module_)
    assert e.value.op is bad


def test_attribute_values_are_checked() -> None:
    op = Operation.create("module", (), {"level": ["graph"]}, (), [Region([Block()])])
    with pytest.raises(VerificationError, match="attribute 'level': list is not an attribute"):
        verify(op)
