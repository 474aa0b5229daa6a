"""Vector math against float64 references: ulp bounds, special values, every width, determinism across lanes."""

from __future__ import annotations

import functools
import math

import mpmath
import numpy as np
import pytest
import torch
from aicc.backends.llvm.vecmath import BINARY, MAX_ULP, UNARY
from aicc.benchmarks import elementwise, ulp
from aicc.benchmarks.elementwise import REFERENCES, host_features
from aicc.benchmarks.ulp import plain_errors, ulp_error
from llvmlite import ir

compile_elementwise = functools.cache(elementwise.compile_elementwise)  # most kernels serve several tests
SAMPLES = 1 << 20
TINY, MIN_NORMAL, MAX = 2.0**-149, 2.0**-126, (2 - 2.0**-23) * 2.0**127
SPECIALS = [
    0.0, TINY, 3 * TINY, MIN_NORMAL - TINY, MIN_NORMAL, 1e-30, 2.0**-24, 1e-4, 0.25, 0.5, 1 - 2.0**-24, 1.0, 1 + 2.0**-23,
    1.5, 2.0, 2.5, 3.0, math.pi, 4.0, 88.0, 88.72, 88.73, 89.4, 89.5, 103.9, 104.0, 126.0, 127.0, 128.0, 149.0, 150.0,
    1e4, 99999.0, 100001.0, 2.0**23 - 0.5, 2.0**23, 2.0**24, 2.0**24 + 2, 1e10, 1e30, MAX, math.inf, math.nan,
]  # fmt: skip


def specials(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Both signs, padded with ones to a multiple of 32."""
    values = torch.tensor([s * v for v in SPECIALS for s in (1.0, -1.0)], dtype=dtype)
    return torch.cat([values, torch.ones(-len(values) % 32, dtype=dtype)])


def random_bits(generator: torch.Generator, count: int) -> torch.Tensor:
    return torch.randint(-(1 << 31), 1 << 31, (count,), generator=generator).to(torch.int32).view(torch.float32)


def log_spaced(count: int) -> torch.Tensor:
    """Both signs of 2^-12 .. 2^12, where functions change."""
    half = torch.exp2(torch.linspace(-12, 12, count // 2, dtype=torch.float64)).float()
    return torch.cat([half, -half])


@pytest.fixture(scope="module")
def inputs() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    denormals = random_bits(generator, SAMPLES // 16) * 2.0**-149
    in_unit = torch.rand(SAMPLES // 4, generator=generator) * 2 - 1
    return torch.cat(
        [random_bits(generator, SAMPLES // 4), log_spaced(SAMPLES // 4), in_unit, denormals, specials()]
    )


def worst(error: torch.Tensor, *operands: torch.Tensor) -> str:
    top = int(error.argmax())
    return f"{float(error[top]):.3f} ulp at {[float(x[top]) for x in operands]}"


NUMERIC_UNARY = sorted(set(UNARY) - {"isnan", "isinf"})


@pytest.mark.parametrize("name", NUMERIC_UNARY)
def test_unary_ulp(name: str, inputs: torch.Tensor) -> None:
    got = compile_elementwise(name, width=16)(inputs)
    error = ulp_error(got, REFERENCES[name](inputs.double()))
    assert float(error.max()) <= MAX_ULP.get(name, 0.5), worst(error, inputs)


@pytest.mark.parametrize("name", NUMERIC_UNARY)
def test_specials_as_torch(name: str) -> None:
    """NaN, infinities, zeros and their signs where eager float32 gives them."""
    x = specials()
    got, eager = compile_elementwise(name, width=8)(x), REFERENCES[name](x)
    exact = REFERENCES[name](x.double()).float()
    for i in range(len(x)):
        if math.isnan(eager[i]) or (math.isinf(eager[i]) and math.isinf(exact[i])) or eager[i] == 0 == exact[i]:
            same = torch.equal(torch.signbit(got[i]), torch.signbit(eager[i])) or math.isnan(eager[i])
            assert torch.equal(got[i].nan_to_num(7.0), eager[i].nan_to_num(7.0)) and same, (x[i], got[i], eager[i])


@pytest.mark.parametrize("name", sorted(UNARY))
def test_every_width_gives_the_same_bits(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.cat([specials(), log_spaced(256), random_bits(generator, 256)])
    wanted = compile_elementwise(name, width=16)(x)
    for width in (None, 1, 4, 8, 32):
        got = compile_elementwise(name, width=width)(x)
        assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8)) or _only_nan_differs(got, wanted), width


@pytest.mark.parametrize("name", sorted(UNARY))
def test_target_features_do_not_change_values(name: str, inputs: torch.Tensor) -> None:
    features = host_features()
    for width in (16, 32):
        got = compile_elementwise(name, width=width, features=features)(inputs)
        wanted = compile_elementwise(name, width=width)(inputs)
        assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8)) or _only_nan_differs(got, wanted), width


def _only_nan_differs(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """NaN payloads and signs are not part of the contract."""
    nan = torch.isnan(got)
    return torch.equal(nan, torch.isnan(wanted)) and torch.equal(
        got[~nan].view(torch.int32), wanted[~nan].view(torch.int32)
    )


@pytest.mark.parametrize("name", ["isnan", "isinf"])
def test_masks(name: str, inputs: torch.Tensor) -> None:
    assert torch.equal(compile_elementwise(name)(inputs), REFERENCES[name](inputs))


@pytest.mark.parametrize("name", ["sin", "cos", "tan"])
def test_a_lane_does_not_see_its_neighbours(name: str) -> None:
    """A huge neighbour sends the vector through the cold loop; the other lanes keep their bits."""
    alone = torch.linspace(-50, 50, 1600)
    crowded = alone.clone()
    crowded[::16] = 1e20
    kernel = compile_elementwise(name, width=16)
    kept = torch.arange(1600) % 16 != 0
    assert torch.equal(kernel(alone)[kept], kernel(crowded)[kept])


# -- binary ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    special = specials()
    n = len(special)
    small = torch.randint(-20, 21, (2, SAMPLES // 8), generator=generator).float() / 2
    ordinary = torch.randn(2, SAMPLES // 4, generator=generator) * 8
    x = [special.repeat_interleave(n), random_bits(generator, SAMPLES // 4), small[0], ordinary[0], ordinary[0].abs()]
    y = [special.repeat(n), random_bits(generator, SAMPLES // 4), small[1], ordinary[1], ordinary[1]]
    return torch.cat(x), torch.cat(y)


# Exact operations, which must give what eager float32 gives: a float64 reference has other neighbours.
EXACT = {"nextafter", "maximum", "minimum", "fmax", "fmin", "copysign"}
REMAINDERS = {"fmod", "remainder"}


@pytest.mark.parametrize("name", sorted(set(BINARY) - EXACT - REMAINDERS))
def test_binary_ulp(name: str, pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = pairs
    got = compile_elementwise(name)(x, y)
    error = ulp_error(got, REFERENCES[name](x.double(), y.double()))
    assert float(error.max()) <= MAX_ULP.get(name, 0.5), worst(error, x, y)


@pytest.mark.parametrize("name", sorted(EXACT))
def test_binary_as_eager(name: str, pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    # A signalling NaN is a quiet one to the hardware, but not to the C library's fmax.
    x, y = (torch.where(torch.isnan(t), torch.nan, t) for t in pairs)
    assert_same_values(compile_elementwise(name)(x, y), REFERENCES[name](x, y), x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_remainders(dtype: torch.dtype, pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Exact, by numpy's float64 fmod: eager torch gives NaN where x / y overflows."""
    x, y = (t.to(dtype) for t in pairs)
    with np.errstate(invalid="ignore"):
        exact = torch.from_numpy(np.fmod(x.double().numpy(), y.double().numpy())).to(dtype)
    got = compile_elementwise("fmod", dtype)(x, y)
    assert_same_values(got, exact, x, y)
    assert torch.equal(torch.signbit(got[got == 0]), torch.signbit(x[got == 0]))
    moved = torch.where((exact != 0) & ((exact < 0) != (y < 0)), exact + y, exact)
    assert_same_values(compile_elementwise("remainder", dtype)(x, y), moved, x, y)


def assert_same_values(got: torch.Tensor, wanted: torch.Tensor, *operands: torch.Tensor) -> None:
    """Equal numbers, NaN where NaN is wanted."""
    differs = (got != wanted) & ~(torch.isnan(got) & torch.isnan(wanted))
    assert not differs.any(), [[float(t[i]) for t in (*operands, got, wanted)] for i in differs.nonzero()[:5]]


def test_remainders_agree_with_eager() -> None:
    """Including the infinite and zero divisors, for quotients in range."""
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(2, 1 << 16, generator=generator) * 100
    special = torch.tensor([math.inf, -math.inf, 0.0, -0.0, math.nan, 1.0, -1.0, 7.5])
    x, y = torch.cat([x, special.repeat(8)]), torch.cat([y, special.repeat_interleave(8)])
    for name in REMAINDERS:
        assert_same_values(compile_elementwise(name)(x, y), REFERENCES[name](x, y), x, y)


@pytest.mark.parametrize("name", sorted(BINARY))
def test_binary_widths(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.cat([specials(), random_bits(generator, 512)])
    y = torch.cat([specials().flip(0), random_bits(generator, 512)])
    wanted = compile_elementwise(name, width=16)(x, y)
    for width in (None, 1, 8, 32):
        got = compile_elementwise(name, width=width)(x, y)
        assert torch.equal(got, wanted) or _only_nan_differs(got, wanted), width


# -- float64 ---------------------------------------------------------------------------------------------------------


def _double_inputs() -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    bits = torch.randint(-(1 << 62), 1 << 62, (1 << 12,), generator=generator) * 2
    near_one = torch.rand(1 << 12, generator=generator, dtype=torch.float64) * 2 - 1
    scale = torch.exp2(torch.linspace(-30, 9, 1 << 11, dtype=torch.float64))
    return torch.cat([bits.view(torch.float64), near_one, scale, -scale, specials(torch.float64)])


@pytest.mark.parametrize("name", sorted(set(NUMERIC_UNARY) - {"digamma"}))
@pytest.mark.parametrize("width", [None, 8])
def test_unary_float64(name: str, width: int | None) -> None:
    x = _double_inputs()
    got = compile_elementwise(name, torch.float64, width)(x)
    # erfinv and lgamma are ill-conditioned near the ends and roots; so is the reference.
    tolerance = {"erfinv": 4e-15, "lgamma": 1e-13}.get(name, 1e-15)
    torch.testing.assert_close(got, REFERENCES[name](x), rtol=tolerance, atol=tolerance * 0.01, equal_nan=True)


def test_digamma_float64() -> None:
    """Against mpmath: eager torch loses digits near the poles."""
    generator = torch.Generator().manual_seed(6)
    chosen = torch.tensor([1e-300, 1e300, 1e-5, -1e-5, 0.5, 1.0, 2.0**-24 - 1, 2.0**-40 - 1], dtype=torch.float64)
    x = torch.cat([torch.rand(512, generator=generator, dtype=torch.float64) * 40 - 20, chosen])
    got = compile_elementwise("digamma", torch.float64, 8)(x)
    exact = torch.tensor([float(mpmath.digamma(mpmath.mpf(v))) for v in x.tolist()], dtype=torch.float64)
    # The absolute part is for the roots, where two terms of order one to ten cancel.
    torch.testing.assert_close(got, exact, rtol=4e-15, atol=2e-14)


@pytest.mark.parametrize("name", sorted(set(BINARY) - REMAINDERS))
def test_binary_float64(name: str) -> None:
    x = _double_inputs()
    y = x.flip(0)
    got = compile_elementwise(name, torch.float64, 8)(x, y)
    torch.testing.assert_close(got, REFERENCES[name](x, y), rtol=1e-15, atol=0, equal_nan=True)


# -- code ------------------------------------------------------------------------------------------------------------

INLINED = sorted(set(UNARY) - {"lgamma", "digamma"}) + sorted(BINARY)
COLD_CALLS = {"sin": {"sinf"}, "cos": {"cosf"}, "tan": {"tanf"}, "fmod": {"fmodf"}, "remainder": {"fmodf"}}


@pytest.mark.parametrize("name", INLINED)
def test_float32_calls_no_library(name: str) -> None:
    vector = ir.VectorType(ir.FloatType(), 8)
    module = ir.Module()
    arity = 1 if name in UNARY else 2
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [vector] * arity), "f")
    b = ir.IRBuilder(function.append_basic_block())
    (UNARY.get(name) or BINARY[name])(b, *function.args)
    called = {f.name for f in module.functions if not f.name.startswith("llvm.")} - {"f"}
    assert called == COLD_CALLS.get(name, set())


@pytest.mark.skipif("fma" not in host_features() or "avx2" not in host_features(), reason="needs AVX2 and FMA")
@pytest.mark.parametrize("name", INLINED)
def test_avx2_code_gives_the_same_bits(name: str) -> None:
    generator = torch.Generator().manual_seed(7)
    x = torch.cat([specials(), log_spaced(1024), random_bits(generator, 1024)])
    operands = [x] if name in UNARY else [x, x.roll(1)]
    wanted = compile_elementwise(name, width=16)(*operands)
    got = compile_elementwise(name, width=8, cpu="haswell")(*operands)
    assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8)) or _only_nan_differs(got, wanted)


def test_operand_types_are_checked() -> None:
    builder = ir.IRBuilder(ir.Block(ir.Function(ir.Module(), ir.FunctionType(ir.VoidType(), []), "f")))
    with pytest.raises(TypeError, match="float and double"):
        UNARY["exp"](builder, ir.Constant(ir.IntType(32), 1))
    with pytest.raises(TypeError, match="one type"):
        BINARY["pow"](builder, ir.Constant(ir.FloatType(), 1), ir.Constant(ir.DoubleType(), 1))


# -- measuring -------------------------------------------------------------------------------------------------------


def test_the_quick_measure_is_the_careful_one(inputs: torch.Tensor) -> None:
    """`plain_errors` gives `ulp_error`'s numbers, or leaves the block to it: a NaN, an infinity, a zero of the other sign, a large error."""
    x = inputs[torch.isfinite(inputs) & (inputs.abs() < 80)]
    got, exact = torch.exp(x), torch.exp(x.double())
    plain = plain_errors(got, exact)
    assert plain is not None
    torch.testing.assert_close(plain[1] * 2.0**23, ulp_error(got, exact), rtol=0, atol=0)
    assert plain[0] == float(ulp_error(got, exact).max())
    one = torch.ones(4, dtype=torch.float64)
    for bad, exact in ((math.nan, one), (math.inf, one), (-0.0, one * 0), (1.01, one), (1.0, one * math.nan), (3e38, one * math.inf)):
        assert plain_errors(torch.full((4,), bad), exact) is None


def test_a_sweep_counts_what_differs_in_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(x: torch.Tensor) -> torch.Tensor:
        y = torch.exp(x)
        y[:3], y[5], y[7] = math.nan, math.inf, y[7] * (1 + 2.0**-18)
        return y
    first = int(torch.tensor(1.0).view(torch.int32))
    whole = ulp.sweep("exp", first=first, end=first + 2 * ulp.CHUNK, eager_every=1)
    assert (whole.inputs, whole.nan, whole.infinity, whole.zero, whole.eager_kind) == (2 * ulp.CHUNK, 0, 0, 0, 0)
    assert 0.5 < whole.worst < MAX_ULP["exp"] and 0.5 < whole.eager < 2 and 1 <= whole.at < 1.1
    assert abs(ulp.exact_error("exp", whole.at) - whole.worst) < 1e-6
    monkeypatch.setattr(ulp, "_kernel", lambda *_: spoiled)
    bad = ulp.sweep("exp", first=first, end=first + ulp.CHUNK)
    assert (bad.nan, bad.infinity, bad.zero) == (3, 1, 0) and bad.worst > 30
