"""IR as text: printing and parsing are inverse for random modules of every level; malformed text is an error with line and column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aicc.ir import (
    DTYPES,
    Block,
    Builder,
    Dense,
    IRError,
    Location,
    Operation,
    Region,
    TensorType,
    equivalent,
    make_func,
    make_module,
    registered,
    sym,
)
from aicc.ir.parser import ParseError, load, parse_module
from aicc.ir.printer import print_op, print_with_resources, save
from hypothesis import given
from hypothesis import strategies as st
from support.fuzzing import scaled

NAMES = st.sampled_from(["", "", "x", "x", "x_1", "0", "7", "weird name!", "h\u00e9", "_"])
DIMS = st.sampled_from([0, 1, 3, sym("s0"), sym("s0") * sym("s1"), (sym("s0") + 63) // 64, sym("d0") % 4, -sym("s1") + 2])
TYPES = st.builds(lambda shape, d: TensorType(tuple(shape), DTYPES[d]), st.lists(DIMS, max_size=3), st.sampled_from(["f32", "bf16", "i64", "i1", "c64"]))
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-1 << 66, 1 << 66), st.floats(), st.text(max_size=8), DIMS, TYPES,
                    st.lists(st.integers(-9, 9), min_size=1, max_size=3).map(lambda x: Dense.from_numpy(np.array(x), DTYPES["i64"])))
ATTRIBUTES = st.recursive(SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=3).map(tuple), st.dictionaries(st.text(max_size=6), inner, max_size=2)), max_leaves=5)
LOCATIONS = st.one_of(st.just(Location()), st.builds(Location, st.text(max_size=8), st.integers(0, 9999), st.text(max_size=8)))
OPS = [d.name for d in registered() if d.dialect not in ("module", "func")]


@st.composite
def blocks(draw: Any, depth: int, outside: tuple[Any, ...] = ()) -> Block:
    """Any ops on any values in scope: the text form does not care whether they verify."""
    args = draw(st.lists(TYPES, max_size=3))
    block = Block(args, [draw(NAMES) for _ in args])
    visible = [*outside, *block.args]
    for _ in range(draw(st.integers(0, 4))):
        operands = draw(st.lists(st.sampled_from(visible), max_size=3)) if visible else []
        regions = [Region([draw(blocks(depth - 1, tuple(visible)))]) for _ in range(draw(st.integers(0, 2)) if depth else 0)]
        attrs = draw(st.dictionaries(st.one_of(st.sampled_from(["a", "value", "max", "min", "dense", "loc", "inf", "nan", "none", "true", "tensor", "f32", "e1", "h\u00e9"]), st.text(max_size=5)), ATTRIBUTES, max_size=2))
        if draw(st.booleans()):
            attrs["sym_name"] = draw(st.sampled_from(["", "f", "k.1", "k$_2"]))
        op = Operation.create(draw(st.sampled_from(OPS)), operands, attrs, draw(st.lists(TYPES, max_size=2)), regions, draw(LOCATIONS))
        for r in op.results:
            r.name = draw(NAMES)
        block.append(op)
        visible += op.results
    return block


@scaled(12)
@given(blocks(2))
def test_round_trip_of_random_modules(block: Block) -> None:
    module = Operation.create("module", (), {"level": "graph"}, (), [Region([block])])
    text, resources = print_with_resources(module)
    back = parse_module(text, resources=resources)
    assert equivalent(module, back, locations=True)
    assert print_with_resources(back) == (text, resources), "printing is not a fixed point"
    assert equivalent(module.clone(), module, locations=True) and print_op(module.clone()) == print_op(module)


def test_save_and_load(tmp_path: Path) -> None:
    module, top = make_module("graph")
    _, body = make_func(top, "f", ())
    b = Builder.at_end(body, Location("model.py", 12, "layers.0"))
    big = Dense.from_numpy(np.random.default_rng(0).normal(size=1000).astype("<f4"), DTYPES["f32"])
    b.create("return", [b.op("graph.constant", type=TensorType((1000,), DTYPES["f32"]), value=big)])
    save(module, tmp_path / "m.mlir")
    back = load(tmp_path / "m.mlir")
    assert equivalent(module, back, locations=True)
    assert [p.name for p in (tmp_path / "m.mlir.resources").iterdir()] == [f"{big.digest}.bin"]
    (tmp_path / "m.mlir").write_bytes(b"\xff\xfe")
    with pytest.raises(ParseError, match="not a text file"):
        load(tmp_path / "m.mlir")
    with pytest.raises(OSError):
        load(tmp_path / "missing.mlir")


def wrap(body: str) -> str:
    return f"module {{\n  func @f {{\n    ^(%x: tensor<4xf32>):\n{body}\n  }}\n}}"


@pytest.mark.parametrize(("text", "line", "column", "message"), [
    ("", 1, 1, "unexpected the end of the text"),
    ("module {", 1, 9, "unexpected the end of the text"),
    ("module {\n  func @f {\n    $\n  }\n}", 3, 5, r"unexpected character '\$'"),
    (wrap("%y = graph.exp(%z) : tensor<4xf32>"), 4, 16, "%z is used before it is defined"),
    (wrap("%y = graph.exp(%y) : tensor<4xf32>"), 4, 16, "%y is used before it is defined"),
    (wrap("%y = graph.expp(%x) : tensor<4xf32>"), 4, 6, "unknown op 'graph.expp'; did you mean graph.exp"),
    (wrap("%y, %z = graph.exp(%x) : tensor<4xf32>"), 4, 10, "names 2 results but has 1 result types"),
    (wrap("graph.exp(%x) : tensor<4xf32>"), 4, 1, "names 0 results but has 1 result types"),
    (wrap("%y = graph.exp(%x) : tensor<4xf33>"), 4, 22, "no known element type"),
    (wrap("%y = graph.exp(%x) : tensor<4xf32, strides=[1, 2]>"), 4, 22, "2 strides for 1 dimensions"),
    (wrap("%y = graph.exp(%x) {a = } : tensor<4xf32>"), 4, 25, "unexpected '}'"),
    (wrap("%y = graph.exp(%x) {a = 1.5 + s0} : tensor<4xf32>"), 4, 29, r"unexpected '\+'"),
    (wrap("%y = graph.exp(%x) {a = dense<f32, [3], [1.0]>} : tensor<4xf32>"), 4, 31, "needs 12 bytes, got 4"),
    (wrap("%y = graph.exp(%x) {a = s0 + true} : tensor<4xf32>"), 4, 25, "'True' cannot stand in an index expression"),
    (wrap("%y = graph.exp(%x) {a = s0 // 0} : tensor<4xf32>"), 4, 25, r"// 0"),
    (wrap("%y = graph.exp(%x) {a = \"unfinished} : tensor<4xf32>"), 4, 25, "unexpected character"),
    (wrap("%y = graph.exp(%x) {a = " + "9" * 4001 + "} : tensor<4xf32>"), 4, 25, "integer literal too long"),
    (wrap("}"), 6, 1, "unexpected"),
    ("module { } module { }", 1, 12, "unexpected 'module'"),
])
def test_errors_say_where(text: str, line: int, column: int, message: str) -> None:
    with pytest.raises(ParseError, match=message) as e:
        parse_module(text, filename="m.mlir")
    assert (e.value.line, e.value.column) == (line, column), str(e.value)
    assert str(e.value).startswith(f"m.mlir:{line}:{column}: ")
    if text:
        shown, marker = str(e.value).split("\n")[-2:]
        assert shown == f"  {text.splitlines()[line - 1][:200]}" and marker.rstrip() == " " * (column + 1) + "^"


def test_nesting_is_bounded() -> None:
    text = "module { func @f { " + "tile.for() {lower = 0} { " * 120 + "} " * 120 + "} }"
    with pytest.raises(ParseError, match="regions nest deeper than 100"):
        parse_module(text)


def test_values_of_a_region_are_not_visible_outside() -> None:
    text = wrap("""  %y = tensor.generic(%x) {dims = [4], maps = [[d0]]} : tensor<4xf32> {
      ^(%a: f32):
        %b = arith.exp(%a) : f32
        tensor.yield(%b)
    }
    return(%b)""")
    with pytest.raises(ParseError, match="%b is used before it is defined"):
        parse_module(text)


def test_duplicate_names_shadow_nothing() -> None:
    module = parse_module(wrap("%y = graph.exp(%x) : tensor<4xf32>\n%y = graph.exp(%y) : tensor<4xf32>\nreturn(%y)"))
    func = module.body.first
    assert func is not None
    first, second, end = func.body.ops
    assert second.operands[0] is first.result and end.operands[0] is second.result
    assert "%y_1 = graph.exp(%y)" in print_op(module)


def test_a_parse_error_is_an_ir_error() -> None:
    with pytest.raises(IRError):
        parse_module("nothing")
