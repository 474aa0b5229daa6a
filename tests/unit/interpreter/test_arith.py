"""Every arith op against torch (or Python's big integers), on the kinds of numbers where definitions differ."""

import math
from fractions import Fraction

import pytest
import torch
from aicc.ir import DTYPES, Operation, ScalarType, sym
from aicc.ir.builder import arith_result_type
from aicc.ir.core import Block
from aicc.ir.dialects.arith import BY_NAME, ROWS
from aicc.ir.interpreter import interpret_op
from aicc.ir.interpreter.context import TORCH_DTYPES

FLOATS = [0.0, -0.0, 0.5, -0.5, 1.0, -1.5, 2.5, 3.7, -3.7, 100.25, -100.25, math.inf, -math.inf, math.nan]
INTS = [0, 1, -1, 2, -3, 7, -8, 100, -128, 127]
KIND_OF = {"f": ("f32", "f64", "bf16", "f16"), "i": ("i64", "i32", "i8"), "u": ("u8", "u16", "u32", "u64"), "b": ("i1",)}

# what each op is in torch or Python, written here independently of the interpreter's own table
FLOAT_UNARY = {"neg": lambda x: -x, "abs": abs, "sign": torch.sgn, "sigmoid": torch.special.expit, "erf": torch.special.erf,
               "erfc": torch.special.erfc, "erfinv": torch.special.erfinv, "expm1": torch.special.expm1, "log1p": torch.special.log1p,
               "lgamma": torch.special.gammaln, "digamma": torch.special.psi, "exp2": torch.special.exp2,
               "rsqrt": lambda x: 1 / torch.sqrt(x), "reciprocal": lambda x: 1 / x, "round": torch.special.round}
FLOAT_BINARY = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "div": lambda a, b: a / b,
                "floordiv": lambda a, b: a // b, "mod": lambda a, b: a % b, "rem": torch.fmod, "pow": lambda a, b: a**b,
                "max": torch.maximum, "min": torch.minimum}
INTEGER = {"neg": lambda x: -x, "abs": abs, "sign": lambda x: (x > 0) - (x < 0), "bitnot": lambda x: ~x,
           "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "floordiv": lambda a, b: a // b,
           "truncdiv": lambda a, b: int(math.copysign(1, a) * math.copysign(1, b)) * (abs(a) // abs(b)), "mod": lambda a, b: a % b,
           "rem": lambda a, b: int(math.copysign(1, a)) * (abs(a) % abs(b)), "pow": lambda a, b: a**b, "max": max, "min": min,
           "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b, "shl": lambda a, b: a << b, "shr": lambda a, b: a >> b,
           "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
           "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b}
SAFE = {"floordiv": lambda a, b: b != 0, "truncdiv": lambda a, b: b != 0, "mod": lambda a, b: b != 0, "rem": lambda a, b: b != 0,
        "pow": lambda a, b: 0 <= b < 10, "shl": lambda a, b: 0 <= b < 8, "shr": lambda a, b: 0 <= b < 8}


def arith(name: str, *operands: torch.Tensor, dtype: str, result: str = "") -> torch.Tensor:
    """`arith.<name>` on operands declared as scalars of `dtype` (the interpreter broadcasts tensors of any shape)."""
    block = Block([ScalarType(DTYPES[dtype])] * len(operands))
    kind = ScalarType(DTYPES[result]) if result else arith_result_type(name, [a.type for a in block.args])
    op = Operation.create(f"arith.{name}", block.args, {}, [kind])
    (got,) = interpret_op(op, operands)
    return got


def cases(letter: str, wanted: str):
    return [(row.name, d) for row in ROWS if letter in row.kinds for d in KIND_OF[letter] if wanted in ("", row.result)]


def exact_fma(a: float, b: float, c: float) -> float:
    if all(map(math.isfinite, (a, b, c))):
        return float(Fraction(a) * Fraction(b) + Fraction(c))
    return a * b + c


def wrap(value: int, dtype: str) -> int:
    bits, signed = DTYPES[dtype].bits, DTYPES[dtype].is_signed
    value &= (1 << bits) - 1
    return value - (1 << bits) if signed and value >> (bits - 1) else value


@pytest.mark.parametrize("name,dtype", cases("f", ""))
def test_float(name, dtype):
    row, kind = BY_NAME[name], TORCH_DTYPES[dtype]
    grid = torch.tensor(FLOATS, dtype=kind)
    xs = torch.meshgrid(*[grid] * row.arity, indexing="ij")
    got = arith(name, *xs, dtype=dtype)
    if name == "fma":
        want = torch.tensor([exact_fma(a, b, c) for a, b, c in zip(*(x.flatten().tolist() for x in xs))], dtype=torch.float64)
        torch.testing.assert_close(got.flatten(), want.to(kind), equal_nan=True, rtol=0, atol=0)
        return
    reference = {**{n: getattr(torch, n) for n in BY_NAME if hasattr(torch, n)}, **FLOAT_UNARY, **FLOAT_BINARY}[name]
    wide = [x.to(torch.float32) if kind.itemsize == 2 and name != "nextafter" else x for x in xs]
    want = reference(*wide)
    assert got.dtype == (torch.bool if row.result == "i1" else kind)
    torch.testing.assert_close(got, want if row.result == "i1" else want.to(kind), equal_nan=True, rtol=1e-6 if dtype == "f32" else 1e-12,
                               atol=0)


@pytest.mark.parametrize("name,dtype", cases("i", "") + cases("u", ""))
def test_integer(name, dtype):
    row = BY_NAME[name]
    numbers = [wrap(x, dtype) for x in INTS]
    if row.arity == 1:
        pairs = [(x,) for x in numbers]
    else:
        pairs = [(a, b) for a in numbers for b in numbers if SAFE.get(name, lambda a, b: True)(a, b)]
    columns = [torch.tensor(c, dtype=TORCH_DTYPES[dtype]) for c in zip(*pairs)]
    got = arith(name, *columns, dtype=dtype)
    want = [INTEGER[name](*p) for p in pairs]
    if row.result == "i1":
        assert got.dtype == torch.bool and got.tolist() == want
    else:
        assert got.dtype == TORCH_DTYPES[dtype] and got.tolist() == [wrap(int(w), dtype) for w in want]


@pytest.mark.parametrize("name", [row.name for row in ROWS if "b" in row.kinds])
def test_bool(name):
    a, b = torch.tensor([False, False, True, True]), torch.tensor([False, True, False, True])
    got = arith(name, *(a, b)[:BY_NAME[name].arity], dtype="i1")
    logic = {"sign": a, "bitnot": ~a, "add": a | b, "mul": a & b, "max": a | b, "min": a & b, "and": a & b, "or": a | b, "xor": a ^ b,
             "eq": a == b, "ne": a != b, "lt": ~a & b, "le": ~a | b, "gt": a & ~b, "ge": a | ~b}
    assert torch.equal(got, logic[name])


@pytest.mark.parametrize("name", ["floordiv", "truncdiv", "mod", "rem"])
def test_integer_division_never_traps(name):
    lowest = torch.tensor([-2**63, 5, -2**63])
    got = arith(name, lowest, torch.tensor([0, 0, -1]), dtype="i64")
    assert got.tolist() == ([0, 0, -2**63] if "div" in name else [0, 0, 0])


def test_fma_rounds_once():
    a = torch.tensor([1 + 2**-12], dtype=torch.float32)
    got = arith("fma", a, a, -torch.ones(1), dtype="f32")
    assert got.item() == 2**-11 + 2**-24  # a*a + c in f32 would lose the last term
    b = torch.tensor([1 + 2**-30], dtype=torch.float64)
    assert arith("fma", b, b, -torch.ones(1, dtype=torch.float64), dtype="f64").item() == 2**-29 + 2**-60


def test_select_and_constant():
    block = Block([ScalarType(DTYPES["i1"]), ScalarType(DTYPES["f32"]), ScalarType(DTYPES["f32"])])
    op = Operation.create("arith.select", block.args, {}, [block.args[1].type])
    assert interpret_op(op, [True, 2.0, 3.0])[0].item() == 2.0
    constant = Operation.create("arith.constant", (), {"value": 7}, [ScalarType(DTYPES["i32"])])
    (got,) = interpret_op(constant, [])
    assert got.dtype == torch.int32 and got.item() == 7
    size = Operation.create("tensor.sym", (), {"expr": sym("s0") * 2 + 1}, [ScalarType(DTYPES["i64"])])
    assert interpret_op(size, [], symbols={"s0": 5})[0].item() == 11


@pytest.mark.parametrize("source,target,values,want", [
    ("f32", "i32", [1.9, -1.9, 0.0], [1, -1, 0]), ("f32", "i1", [0.0, 0.25, math.nan], [False, True, True]),
    ("i1", "f32", [True, False], [1.0, 0.0]), ("i32", "i8", [200, -200], [-56, 56]), ("i64", "u32", [-1, 5], [2**32 - 1, 5]),
    ("u64", "f32", [2**63], [float(2**63)]), ("f32", "bf16", [1.00390625], [1.0]), ("f32", "f8e4m3fn", [1.1], [1.125]),
    ("bf16", "i1", [0.0, 2.0], [False, True]), ("f16", "i64", [-2.5], [-2])])
def test_cast(source, target, values, want):
    got = arith("cast", torch.tensor(values, dtype=TORCH_DTYPES[source]), dtype=source, result=target)
    assert got.dtype == TORCH_DTYPES[target] and got.tolist() == want
