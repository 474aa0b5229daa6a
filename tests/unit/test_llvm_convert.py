"""Casts between element types against eager torch, for every pair of dtypes, scalar and vector."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from aicc.backends.llvm.convert import REPRESENTATIONS, emit_cast, from_memory, to_memory
from aicc.benchmarks.elementwise import compile_function, emit_loop
from llvmlite import ir

DTYPES = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i64": torch.int64,
    "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8, "i1": torch.bool,
    "u16": torch.uint16, "u32": torch.uint32, "u64": torch.uint64, "index": torch.int64,
}  # fmt: skip
FLOATS = ("f64", "f32", "f16", "bf16")
PAIRS = list(itertools.product(DTYPES, DTYPES))


def cast(x: torch.Tensor, source: str, target: str, width: int | None) -> torch.Tensor:
    """x through a compiled `emit_cast`; its length is a multiple of 16."""

    def emit(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
        return to_memory(b, emit_cast(b, from_memory(b, value, source), source, target), target)

    module = emit_loop(emit, [REPRESENTATIONS[source].memory], REPRESENTATIONS[target].memory, width)
    assert x.numel() % (width or 1) == 0
    output = torch.empty(x.shape, dtype=DTYPES[target])
    compile_function(module, "kernel", 2)(x.data_ptr(), output.data_ptr(), x.numel())
    return output


def samples(name: str) -> torch.Tensor:
    """In-range for every integer target where `name` is a float: values that do not fit have a test of their own."""
    generator = torch.Generator().manual_seed(0)
    dtype = DTYPES[name]
    if name == "i1":
        return torch.randint(0, 2, (64,), generator=generator).bool()
    if name not in FLOATS:
        info = torch.iinfo(dtype)
        edge = torch.tensor([info.min, info.min + 1, 0, 1, info.max - 1, info.max, *([3] * 10)], dtype=dtype)
        # uint64 has no randint of its own: all bits of int64 will do.
        bits = torch.randint(-(1 << 63), (1 << 63) - 1, (240,), generator=generator, dtype=torch.int64)
        return torch.cat([edge, bits.to(dtype)])
    edge = torch.tensor([0.0, -0.0, 0.5, -0.5, 0.9999, -0.9999, 1.5, 2.5, 126.9, 127.0, 1e-7, 1e-40, 65.0, 3.0, 4.0, 5.0])
    return torch.cat([edge, torch.rand(240, generator=generator) * 127]).to(dtype)


def same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal bits, any NaN for any NaN."""
    if not wanted.is_floating_point():
        return torch.equal(got, wanted)
    nan = torch.isnan(wanted)
    return torch.equal(torch.isnan(got), nan) and torch.equal(
        got[~nan].view(torch.uint8), wanted[~nan].view(torch.uint8)
    )


@pytest.mark.product
@pytest.mark.parametrize("width", [None, 16])
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_cast_as_torch(source: str, target: str, width: int | None) -> None:
    x = samples(source)
    assert same(cast(x, source, target, width), x.to(DTYPES[target]))


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", ["i64", "i32", "i16", "i8", "u8", "i1", "index"])
def test_values_that_do_not_fit(source: str, target: str) -> None:
    """As x86-64: the indefinite integer, of which narrow targets keep the low bits; NaN is true."""
    values = [math.nan, math.inf, -math.inf, 2.0**31, -(2.0**31), 2.0**63, -(2.0**63), 3e9, -3e9, 1e30, 300.0, -1.0, -300.0,
              40000.0, -40000.0, 1.0]  # fmt: skip
    x = torch.tensor(values, dtype=torch.float64).to(DTYPES[source])

    def expected(v: float) -> int:
        if target == "i1":
            return int(v != 0)
        # C++ goes to u8 by way of i64 (c10::static_cast_with_inter_type), to narrower signed integers by way of i32.
        bits = 64 if target in ("i64", "index", "u8") else 32
        fits = math.isfinite(v) and -(2.0 ** (bits - 1)) <= v < 2.0 ** (bits - 1)
        whole = int(v) if fits else -(2 ** (bits - 1))
        width = REPRESENTATIONS[target].memory.width
        whole &= (1 << width) - 1
        return whole if target == "u8" or whole < 1 << (width - 1) else whole - (1 << width)

    wanted = [expected(v) for v in x.double().tolist()]
    for width in (None, 16):
        assert cast(x, source, target, width).long().tolist() == wanted


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(FLOATS, 2)))
def test_float_rounding(source: str, target: str) -> None:
    """Ties, denormals, overflow, infinities and NaN of all payloads, on random bit patterns."""
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 16,), generator=generator)
    single = bits.to(torch.int32).view(torch.float32)
    ties = ((bits & ~0xFFFF) | 0x8000).to(torch.int32).view(torch.float32)
    narrow = torch.exp2(torch.linspace(-28, 18, 1 << 14)) * (1 + 2.0**-11)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 65504.0, 65519.9, 65520.0, 3.3961775e38, 1e39, 1e-8,
                            2.0**-25, 2.0**-24, 2.0**-133, 2.0**-134, 1e-46], dtype=torch.float64)  # fmt: skip
    x = torch.cat([single.double(), ties.double(), narrow.double(), -narrow.double(), special]).to(DTYPES[source])
    assert same(cast(x, source, target, 16), x.to(DTYPES[target]))


def test_upper_half_of_u64() -> None:
    x = torch.tensor([2.0**63, 2.0**63 + 2.0**40, 1.5 * 2.0**63, 2.0**64 - 2.0**40, 2.0**62, 5.0, 0.0, 2.0**32] * 2)
    wanted = [int(v) for v in x.tolist()]
    for width in (None, 16):
        assert cast(x, "f32", "u64", width).tolist() == wanted


def test_all_bf16_patterns_survive_f32() -> None:
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert same(cast(cast(x, "bf16", "f32", 16), "f32", "bf16", 16), x)


def test_wrong_register_type() -> None:
    b = ir.IRBuilder(ir.Block(ir.Function(ir.Module(), ir.FunctionType(ir.VoidType(), []), "f")))
    with pytest.raises(TypeError, match="bf16 is held as i16"):
        emit_cast(b, ir.Constant(ir.FloatType(), 1.0), "bf16", "f32")
