"""Types and attributes: text, equality, what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from aicc.ir import DTYPES, BufferType, Dense, IRError, ScalarType, SymbolRef, TensorType, TileType, dtype, element_type, lookup, registered, sym
from aicc.ir.attributes import attribute_equal, check_attribute
from aicc.ir.opdef import define
from aicc.ir.parser import parse_module, parse_type
from aicc.ir.printer import print_attribute
from aicc.ir.types import contiguous_strides

S0, S1 = sym("s0"), sym("s1")
F32 = DTYPES["f32"]


@pytest.mark.parametrize(("t", "text"), [
    (ScalarType(F32), "f32"),
    (TensorType((), F32), "tensor<f32>"),
    (TensorType((2, 3), DTYPES["bf16"]), "tensor<2x3xbf16>"),
    (TensorType((S0, 4), F32), "tensor<s0x4xf32>"),
    (TensorType((S0 * 2 + 1, 0), F32), "tensor<(s0*2 + 1)x0xf32>"),
    (TensorType(((S0 + 1) // 2,), F32), "tensor<(((s0 + 1) // 2))xf32>"),
    (TensorType((S0, S1), F32, (1, S0)), "tensor<s0xs1xf32, strides=[1, s0]>"),
    (TensorType((2, 3), F32, (0, 0)), "tensor<2x3xf32, strides=[0, 0]>"),
    (BufferType((8, S0), DTYPES["i64"], (S0 * 2, 2)), "buffer<8xs0xi64, strides=[s0*2, 2]>"),
    (TileType((1, 16), DTYPES["i1"]), "tile<1x16xi1>"),
    *((TensorType((3,), d), f"tensor<3x{d.name}>") for d in DTYPES.values() if d.name != "index"),
])
def test_text(t: Any, text: str) -> None:
    assert str(t) == text
    assert parse_type(text) == t and hash(parse_type(text)) == hash(t)


@pytest.mark.parametrize("text", ["", "f33", "tensor", "tensor<", "tensor<2x3>", "tensor<2xxf32>", "tensor<2xf32", "array<2xf32>", "tensor<2xf32, strides=[1, 2]>",
                                  "tensor<2.5xf32>", "tensor<-xf32>"])
def test_what_is_no_type(text: str) -> None:
    with pytest.raises(ValueError):
        parse_type(text)


def test_strides_are_normalised() -> None:
    t = TensorType((S0, 3, 4), F32)
    assert contiguous_strides(t.shape) == (12, 4, 1) == t.layout
    assert t.with_strides((12, 4, 1)).strides is None
    assert t.with_strides((1, S0, S0 * 3)).layout == (1, S0, S0 * 3)
    assert t.numel == S0 * 12 and t.rank == 3


def test_element_types() -> None:
    assert dtype("bf16").bytes == 2 and dtype("i1").bytes == 1
    assert element_type(TileType((2, 2), F32)) is F32
    with pytest.raises(ValueError, match="unknown element type 'float'; known: f64, f32"):
        dtype("float")
    with pytest.raises(TypeError, match="has no element type"):
        element_type("f32")  # type: ignore[arg-type]


VALUES: list[Any] = [
    None, True, False, 0, -7, 1 << 70, 1.0, -0.0, 1e300, 5e-324, 1e16, math.inf, -math.inf, math.nan, "", "a\n\"b\\ \t\u00e9", S0 * 2 + 1, S0 // 3, SymbolRef("k.0"), ScalarType(F32),
    TensorType((S0,), F32), (), (1,), (1, (2.0, "x"), None), {}, {"a": 1, "b c": (True,)}, {"d": {"e": None}},
    Dense.from_numpy(np.arange(6.0).reshape(2, 3), F32), Dense.from_numpy(np.array([1.5, math.nan, -0.0]), F32), Dense.from_numpy(np.array(True), DTYPES["i1"]),
    Dense.from_numpy(np.array([1, 2], np.uint16), DTYPES["bf16"]), Dense.from_numpy(np.zeros((0, 3)), DTYPES["i64"]), Dense.from_numpy(np.array([1e-310, 3e300]), DTYPES["f64"]),
    Dense.from_numpy(np.array([0.1, -65504.0]), DTYPES["f16"]), Dense.from_numpy(np.array([255, 0]), DTYPES["u8"]), Dense.from_numpy(np.array([math.inf, -math.inf]), F32),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda v: print_attribute(v)[:40])
def test_attributes_round_trip(value: Any) -> None:
    check_attribute(value)
    op = parse_module(f"module {{a = {print_attribute(value)}}} {{ }}")
    assert attribute_equal(op.attributes["a"], value), f"{op.attributes['a']!r} is not {value!r}"
    assert print_attribute(op.attributes["a"]) == print_attribute(value)


def test_equality_of_attributes_is_strict() -> None:
    different = [0, 0.0, -0.0, False, None, "0", (), (0,), {}, math.nan, S0, 1, True, 1.0]
    for i, a in enumerate(different):
        for j, b in enumerate(different):
            assert attribute_equal(a, b) is (i == j), (a, b)
            assert attribute_equal((a,), (b,)) is (i == j) and attribute_equal({"k": a}, {"k": b}) is (i == j)


@pytest.mark.parametrize("value", [[1], {1: 2}, object(), ([],), {"a": {2}}, b"x", 1j])
def test_what_is_no_attribute(value: Any) -> None:
    with pytest.raises(TypeError):
        check_attribute(value)


def test_large_constants_travel_beside_the_text() -> None:
    big = Dense.from_numpy(np.arange(4096, dtype="<f4"), F32)
    resources: dict[str, bytes] = {}
    text = print_attribute(big, resources)
    assert "sha256:" in text and len(text) < 200 and resources == {big.digest: big.data}
    op = parse_module(f"module {{a = {text}}} {{ }}", resources=resources)
    assert op["a"] == big
    with pytest.raises(IRError, match="is not in the file's .resources folder"):
        parse_module(f"module {{a = {text}}} {{ }}")
    with pytest.raises(IRError, match="damaged"):
        parse_module(f"module {{a = {text}}} {{ }}", resources={big.digest: b"\0" * len(big.data)})


def test_the_registry_of_ops() -> None:
    with pytest.raises(IRError, match="unknown op 'graph.matmull'; did you mean graph.matmul"):
        lookup("graph.matmull")
    with pytest.raises(IRError, match="unknown op 'zzzzz'; dialects: arith, .*graph.*tile"):
        lookup("zzzzz")
    with pytest.raises(IRError, match="op 'graph.add' is defined twice"):
        define("graph.add", "again")
    assert all(d.doc and d.dialect == "tile" for d in registered("tile"))
    assert {d.dialect for d in registered()} >= {"module", "func", "return", "graph", "tensor", "arith", "tile", "host", "dist"}
