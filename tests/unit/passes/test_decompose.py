"""Decomposition: every graph op, static and symbolic, means the same before and after.

`CASES` is the table: an op with its operand and result types. Each case is built, decomposed, verified, printed and parsed, and
interpreted at both levels: with all floats held in f64, where the formulas must agree to 1e-10, and in its own types.
Symbolic cases run the same module with several sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from aicc.ir import (
    DTYPES,
    Builder,
    Dense,
    Expr,
    IRError,
    Location,
    Operation,
    TensorType,
    equivalent,
    make_func,
    make_module,
    registered,
    sym,
)
from aicc.ir.dialects.arith import ROWS
from aicc.ir.expr import evaluate, floordiv, free_symbols
from aicc.ir.interpreter import interpret
from aicc.ir.interpreter.context import TORCH_DTYPES
from aicc.ir.parser import parse_module
from aicc.ir.passes import PassContext
from aicc.ir.printer import print_op
from aicc.ir.verifier import verify
from aicc.passes.decompose import RULES, Decompose
from aicc.passes.structured import is_contraction

S0, S1, S2 = sym("s0"), sym("s1"), sym("s2")
BINDINGS = ({"s0": 3, "s1": 4, "s2": 5}, {"s0": 1, "s1": 2, "s2": 7}, {"s0": 2, "s1": 1, "s2": 1})
INF, NAN = math.inf, math.nan


def t(dtype: str, *shape: Any) -> TensorType:
    return TensorType(shape, DTYPES[dtype])


@dataclass(frozen=True)
class Case:
    """One op. `ranges`: per integer operand, its values (low, high exclusive); `special`: values strewn into float operands."""

    op: str
    ins: tuple[TensorType, ...]
    outs: tuple[TensorType, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    ranges: dict[int, tuple[int, int]] = field(default_factory=dict)
    special: tuple[float, ...] = ()
    values: tuple[Any, ...] = ()  # operands given outright

    @property
    def label(self) -> str:
        extras = ",".join(f"{k}={v}" for k, v in self.attrs.items() if not isinstance(v, Dense))
        return f"{self.op}({', '.join(map(str, self.ins))}) {extras}{' special' if self.special or self.values else ''}"

    @property
    def symbols(self) -> set[str]:
        sizes = [e for typ in (*self.ins, *self.outs) for e in typ.shape]
        sizes += [e for v in self.attrs.values() for e in (v if isinstance(v, tuple) else (v,)) if isinstance(e, Expr)]
        return {s for e in sizes for s in free_symbols(e) if s[0] == "s"}


CASES: list[Case] = []


def case(op: str, ins: Any, outs: Any, *, ranges: Any = None, special: Any = (), values: Any = (), **attrs: Any) -> None:
    def many(x: Any) -> tuple:
        return x if isinstance(x, tuple) else tuple(x) if isinstance(x, list) else (x,)
    CASES.append(Case(f"graph.{op}", many(ins), many(outs), attrs, ranges or {}, tuple(special), tuple(values)))


# -- elementwise ------------------------------------------------------------------------------------------------------
_INTEGER_RANGES = {"shl": {1: (0, 7)}, "shr": {1: (0, 7)}, "pow": {1: (0, 4)}, "floordiv": {1: (1, 9)}, "truncdiv": {1: (1, 9)},
                   "mod": {1: (1, 9)}, "rem": {1: (1, 9)}}
for _row in ROWS:
    for _letter, _names in {"f": ("f32", "bf16", "f16", "f64"), "i": ("i64", "i32"), "u": ("u8",), "b": ("i1",)}.items():
        for _name in _names if _letter in _row.kinds else ():
            _out = "i1" if _row.result == "i1" else _name
            if _row.arity == 1:
                case(_row.name, t(_name, 3, 5), t(_out, 3, 5))
            elif _row.arity == 2:
                case(_row.name, [t(_name, 3, 1), t(_name, 2, 1, 4)], t(_out, 2, 3, 4), ranges=_INTEGER_RANGES.get(_row.name))
            else:
                case(_row.name, [t(_name, 3, 4), t(_name, 4), t(_name, 3, 1)], t(_out, 3, 4))
case("add", [t("f32", S0, 1, S2), t("f32", S1, 1)], t("f32", S0, S1, S2))
case("mul", [t("f32", S0 * S1 + 2, 4), t("f32")], t("f32", S0 * S1 + 2, 4))
for _name in ("max", "min", "fmax", "fmin", "lt", "eq", "sign", "isnan", "isinf", "exp"):
    case(_name, [t("f32", 6, 7)] * (2 if _name in ("max", "min", "fmax", "fmin", "lt", "eq") else 1),
         t("i1" if _name in ("lt", "eq", "isnan", "isinf") else "f32", 6, 7), special=(NAN, INF, -INF))
for _name in ("f32", "bf16", "i64", "i1"):
    case("select", [t("i1", 3, 1), t(_name, 4), t(_name, 3, 4)], t(_name, 3, 4))
    case("require", [t("i1", 3, 1), t(_name, 3, 4)], t(_name, 3, 4), message="no",
         values=(torch.ones(3, 1, dtype=torch.bool), torch.arange(12.0).reshape(3, 4).to(
             {"i1": torch.bool, "i64": torch.int64, "bf16": torch.bfloat16, "f32": torch.float32}[_name])))
    for _to in ("f32", "f64", "f16", "bf16", "i64", "i32", "i1"):
        case("cast", t(_name, 3, S1), t(_to, 3, S1))
case("cast", t("f32", 4), t("i1", 4), values=(torch.tensor([0.0, -0.0, 0.25, NAN]),))
for _name in ("f32", "bf16", "f64"):
    for _op in ("relu", "silu", "gelu"):  # torch's vectorised gelu of f32 gives NaN for infinity, which is its bug
        case(_op, t(_name, 3, 5), t(_name, 3, 5), special=(INF, -INF, NAN) if _op != "gelu" else ())
    case("gelu", t(_name, S0, 5), t(_name, S0, 5), approximate="tanh")

# -- sources ----------------------------------------------------------------------------------------------------------
for _name, _value in {"f32": 1.5, "bf16": -INF, "i64": -7, "i1": True, "u8": 3}.items():
    case("full", (), t(_name, 2, S1), value=_value)
case("full", (), t("f32"), value=NAN)
case("full", (), t("f32", 2), value=3)
case("iota", (), t("i64", S0))
case("iota", (), t("i64", 5), start=7, step=-2)
case("iota", (), t("f32", 5), start=0.5, step=0.25)
case("iota", (), t("f32", 5), start=2.0, step=3.0)
case("iota", (), t("bf16", 5), start=0.1, step=0.3)
case("iota", (), t("i64", S1), start=S0, step=2)
case("random_bits", t("i64"), t("u32", 3, 5), stream=2)
case("random_bits", t("i64"), t("u64", S0, 4), stream=0, pair=1)
case("random_bits", t("i64"), t("u64"), stream=7)
case("sym", (), t("i64"), expr=S0 * S1 + 1)
case("sym", (), t("i64"), expr=12)
case("constant", (), t("f32", 2, 3), value=Dense.from_numpy(np.arange(6.0).reshape(2, 3), DTYPES["f32"]))
case("constant", (), t("i64"), value=Dense.from_numpy(np.array(4), DTYPES["i64"]))

# -- views ------------------------------------------------------------------------------------------------------------
for _source, _result in [((2, 3, 4), (6, 4)), ((6, 4), (2, 3, 4)), ((2, 6), (3, 4)), ((4, 6, 5), (8, 3, 5)), ((1, 6, 1), (2,
                         1, 3)),
                         ((), (1, 1)), ((1,), ()), ((S0 * S1, 4), (S0, S1, 4)), ((S0, S1, 4), (S0 * S1, 4)), ((S0, S1 * 4),
                         (S0, S1, 2, 2)),
                         ((S0, S1 * 4), (S0 * S1, 4)), ((S0 * S1, 2, 6), (S0, S1 * 4, 3)), ((S0 * (S1 + 1), 3), (S0, S1 + 1,
                         3)),
                         ((S0 * 6,), (S0 * 2, 3)), ((S0 * 6, 4), (S0 * 4, 6)), ((0, 3), (3, 0)), ((S0, 12, S1), (S0 * 2,
                         S1 * 6)),
                         ((2, S0, 3, S1), (S0 * 6, S1)), ((S0 * S1, S2), (S0, S1 * S2))]:
    case("reshape", t("f32", *_source), t("f32", *_result))
case("permute", t("f32", 2, S1, 4), t("f32", 4, 2, S1), perm=(2, 0, 1))
case("permute", t("f32"), t("f32"), perm=())
case("expand", t("f32", 3, 1), t("f32", S0, 3, 4))
case("expand", t("f32", S0, 1), t("f32", S0, S1))
case("slice", t("f32", 5, S1 + 2), t("f32", 2, S1), starts=(4, 1), steps=(-3, 1))
case("slice", t("f32", S0 + 2, 7), t("f32", 1, 3), starts=(S0, 1), steps=(1, 2))
case("flip", t("f32", S0, 3, S1), t("f32", S0, 3, S1), dims=(0, 1))
case("remap", t("f32", 6, 5), t("f32", 3, 2, 5), map=(sym("d0") * 2 + sym("d1"), 4 - sym("d2")))
for _name in ("f32", "bf16", "i64", "i1"):
    case("cat", [t(_name, 2, 3), t(_name, 2, 1), t(_name, 2, 4)], t(_name, 2, 8), dim=1)
case("cat", [t("f32", S0, 3), t("f32", S1, 3)], t("f32", S0 + S1, 3), dim=0)
case("cat", [t("f32", S0, 3), t("f32", 0, 3)], t("f32", S0, 3), dim=0)
case("cat", [t("f32", 2, S0), t("f32", 2, 1), t("f32", 2, S0)], t("f32", 2, S0 * 2 + 1), dim=1, special=(NAN,))
case("cat", [t("f32", 0, 3)], t("f32", 0, 3), dim=0)
case("pad", t("f32", 3, S1), t("f32", 6, S1 + 1), low=(1, 0), high=(2, 1), value=-1.5)
case("pad", t("f32", 5, 6), t("f32", 3, 7), low=(-1, 2), high=(-1, -1), value=0.0)
case("pad", t("f32", 5, S1 + 2), t("f32", 3, S1), low=(-1, -1), high=(-1, -1), value=0.0)
case("pad", t("bf16", 3), t("bf16", 5), low=(1,), high=(1,), value=2)
case("pad", t("i1", 3), t("i1", 5), low=(1,), high=(1,), value=True)

# -- contractions -----------------------------------------------------------------------------------------------------
for _name in ("f32", "f64", "bf16", "f16", "i64", "i32"):
    case("matmul", [t(_name, 3, 4), t(_name, 4, 5)], t(_name, 3, 5))
case("matmul", [t("f32", S0, 2, S1, 8), t("f32", S0, 2, 8, S2)], t("f32", S0, 2, S1, S2))
case("matmul", [t("bf16", S0, S1), t("bf16", S1, 3)], t("f32", S0, 3))
case("matmul", [t("f32", 3, 1), t("f32", 1, 5)], t("f32", 3, 5))
case("matmul", [t("f32", 3, 0), t("f32", 0, 5)], t("f32", 3, 5))


def _out_size(n: Any, k: int, stride: int, padding: int, dilation: int) -> Any:
    return floordiv(n + 2 * padding - dilation * (k - 1) - 1, stride) + 1


# batch, in channels, spatial, out channels, kernel, stride, padding, dilation, groups
_CONVS: list[tuple] = [
    (2, 4, (7, 8), 6, (3, 3), (1, 1), (1, 1), (1, 1), 1), (2, 4, (7, 8), 6, (3, 2), (2, 1), (0, 0), (1, 2), 1),
    (2, 4, (7, 8), 6, (3, 2), (2, 3), (1, 2), (2, 1), 2), (2, 4, (6, 6), 4, (3, 3), (1, 2), (1, 1), (1, 1), 4),
    (2, 3, (6, 6), 6, (3, 3), (1, 1), (2, 2), (2, 2), 3), (2, 4, (5, 5), 6, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    (2, 1, (6, 6), 3, (2, 2), (1, 1), (0, 0), (1, 1), 1), (2, 4, (9,), 6, (3,), (2,), (1,), (1,), 1),
    (1, 2, (4, 5, 4), 3, (2, 3, 2), (1, 2, 1), (1, 0, 1), (1, 1, 1), 1), (2, 4, (6,), 4, (1,), (1,), (0,), (1,), 4),
    (S0, 4, (S1 + 4, S2 + 4), 6, (3, 3), (1, 2), (1, 1), (1, 1), 1), (S0, 4, (S1 + 4, 6), 6, (3, 3), (2, 1), (0, 0), (1, 1), 2),
]
for _b, _c, _sp, _o, _k, _s, _p, _dil, _g in _CONVS:
    _y = tuple(map(_out_size, _sp, _k, _s, _p, _dil))
    _attrs = {"stride": _s, "padding": _p, "dilation": _dil, "groups": _g}
    for _name in ("f32", "bf16") if _c == 4 else ("f32",):
        _x, _w, _out = t(_name, _b, _c, *_sp), t(_name, _o, _c // _g, *_k), t(_name, _b, _o, *_y)
        case("conv", [_x, _w], _out, **_attrs)
        case("conv_transpose", [_out, _w], _x, **_attrs)
        case("conv_weight_grad", [_out, _x], _w, **_attrs)


def _attention_case(name: str, b: Any, h: int, hk: int, s: Any, keys: Any, mask: TensorType | None, causal: bool,
                    **more: Any) -> None:
    ins = [t(name, b, h, s, 8), t(name, b, hk, keys, 8), t(name, b, hk, keys, 6)] + ([mask] if mask else [])
    case("attention", ins, [t(name, b, h, s, 6), t("f32", b, h, s)], scale=0.37, causal=causal, **more)


for _name in ("f32", "bf16"):
    _attention_case(_name, 2, 4, 4, 5, 7, None, False)
    _attention_case(_name, 2, 4, 2, 5, 5, None, True)
    _attention_case(_name, 2, 4, 1, 3, 6, t(_name, 1, 1, 3, 6), False)
    _attention_case(_name, S0, 4, 2, S1, S2, t("i1", S0, 1, S1, S2), False)
for _name, _kv, _s, _keys, _masks, _causal in (("f32", 4, 5, 7, [], False), ("f32", 2, 5, 5, [], True), ("bf16", 1, 3, 6, [t("bf16", 1, 1, 3, 6)], False),
                                               ("f64", 2, S0, S0, [], True)):
    _q, _k, _v = t(_name, 2, 4, _s, 8), t(_name, 2, _kv, _keys, 8), t(_name, 2, _kv, _keys, 6)
    _out = t(_name, 2, 4, _s, 6)
    case("attention_backward", [_out, _q, _k, _v, _out, t("f32", 2, 4, _s), *_masks], [_q, _k, _v], scale=0.37, causal=_causal)
_attention_case("f32", S0, 2, 2, S1, S1, t("f32", S1), True)
_attention_case("f32", 2, 2, 2, 5, 4, t("f32", 2, 1, 5, 4), False, special=(-INF, NAN))
CASES.append(Case("graph.attention", (t("f32", 1, 2, 3, 4),) * 3 + (t("i1", 3, 3),), (t("f32", 1, 2, 3, 4), t("f32", 1, 2, 3)),
                  {"scale": 0.5}, values=(None, None, None, torch.tensor([[True, False, True], [False] * 3, [True] * 3]))))

# -- reductions -------------------------------------------------------------------------------------------------------
for _op in ("sum", "prod", "amax", "amin", "any", "all", "mean", "argmax", "argmin"):
    for _dims in ((1,), (0, 1, 2)) if _op.startswith("arg") else ((1,), (0, 2), (0, 1, 2), ()):
        for _keep in (False, True):
            _shape = (S0, 4, S2)
            _left = tuple(1 if i in _dims else n for i, n in enumerate(_shape) if _keep or i not in _dims)
            for _name in ("f32", "bf16", "i64", "i32", "i1"):
                if (_name[0] != "f" and _name != "bf16" and _op == "mean") or (_name == "i1" and _op[:3] in ("ami", "ama")):
                    continue
                _to = {"any": "i1", "all": "i1", "argmax": "i64", "argmin": "i64"}.get(_op, _name)
                if _op in ("sum", "prod") and _name in ("i32", "i1"):
                    _to = "i64"
                case(_op, t(_name, *_shape), t(_to, *_left), dims=_dims, keepdim=_keep)
for _op in ("amax", "amin", "argmax", "argmin"):
    case(_op, t("f32", 6, 5), t("i64" if _op[1] == "r" else "f32", 6), dims=(1,), special=(NAN, INF, -INF))
case("argmax", t("i64", 6, 9), t("i64", 6), dims=(1,), ranges={0: (0, 3)})
case("argmin", t("i64", 6, 9), t("i64"), dims=(0, 1), ranges={0: (0, 3)})
case("sum", t("i8", 300), t("i64"), dims=(0,), ranges={0: (100, 127)})
case("sum", t("f16", 3, 4), t("f32", 3), dims=(1,))
case("mean", t("bf16", 3, 4), t("f32", 3), dims=(1,))
case("any", t("f32", 3, 4), t("i1", 3), dims=(1,), special=(0.0, NAN))
case("sum", t("f32"), t("f32"), dims=())
for _name in ("f32", "f64", "bf16"):
    for _correction in (0.0, 1.0, 0.5):
        case("var_mean", t(_name, 3, S2, 4), [t(_name, 3, 4)] * 2, dims=(1,), correction=_correction)
    case("var_mean", t(_name, 3, 5, 4), [t(_name, 1, 5, 1)] * 2, dims=(0, 2), keepdim=True)
case("var_mean", t("f32", 3, 1), [t("f32", 3)] * 2, dims=(1,))
for _kind in ("sum", "prod", "max", "min", "logsumexp"):
    for _dim in (0, 1, 2):
        case("scan", t("f32", S0, 4, S2), t("f32", S0, 4, S2), dim=_dim, kind=_kind)
    case("scan", t("bf16", 3, 4), t("bf16", 3, 4), dim=0, kind=_kind)
case("scan", t("i1", 3, 4), t("i64", 3, 4), dim=1, kind="sum")
case("scan", t("i32", 3, 4), t("i64", 3, 4), dim=0, kind="sum")
case("scan", t("f32"), t("f32"), dim=0, kind="sum")
case("scan", t("f32", 4, 6), t("f32", 4, 6), dim=1, kind="max", special=(NAN, INF))
for _name in ("f32", "bf16", "i64"):
    case("sort", t(_name, 5, 9), [t(_name, 5, 3), t("i64", 5, 3)], dim=1, keep=3)
case("sort", t("f32", S0, 4), [t("f32", S0, 4), t("i64", S0, 4)], dim=0, keep=S0, largest=False)
case("sort", t("f32", 9), [t("f32", 2), t("i64", 2)], dim=0, keep=2, largest=False, special=(NAN, INF))
for _op in ("softmax", "log_softmax"):
    for _name in ("f32", "bf16", "f64"):
        for _dim in (0, 1, 2):
            case(_op, t(_name, S0, 4, S2), t(_name, S0, 4, S2), dim=_dim)
    case(_op, t("f32", 8, 4), t("f32", 8, 4), dim=1, special=(NAN, INF, -INF))
    case(_op, t("f32", 2, 2), t("f32", 2, 2), dim=1, values=(torch.tensor([[-INF, -INF], [-INF, 1.0]]),))
    case(_op, t("f16", 3, 4), t("f32", 3, 4), dim=1)
    case(_op, t("f32"), t("f32"), dim=0)

# -- normalisations ---------------------------------------------------------------------------------------------------
for _name, _stat in (("f32", "f32"), ("bf16", "f32"), ("bf16", "bf16"), ("f64", "f64")):
    for _n, _given in ((1, 2), (1, 1), (1, 0), (2, 2)):
        _shape = (S0, 3, 6)
        _lead, _tail = _shape[:3 - _n], _shape[3 - _n:]
        _kept, _affine = (*_lead, *(1,) * _n), [t(_name, *_tail)] * _given
        case("layer_norm", [t(_name, *_shape), *_affine], [t(_name, *_shape), t(_stat, *_kept), t(_stat, *_kept)], ndims=_n,
             eps=1e-5)
        case("rms_norm", [t(_name, *_shape), *_affine[:1]], [t(_name, *_shape), t(_stat, *_kept)], ndims=_n, eps=1e-6)
    for _groups, _given in ((1, 2), (3, 2), (6, 0)):
        _affine = [t(_name, 6)] * _given
        case("group_norm", [t(_name, S0, 6, S1, 2), *_affine], [t(_name, S0, 6, S1, 2), *[t(_stat, S0, _groups)] * 2],
             groups=_groups, eps=1e-5)
case("layer_norm", [t("bf16", 4, S2), t("f32", S2), t("f32", S2)], [t("bf16", 4, S2), t("f32", 4, 1), t("f32", 4, 1)],
     ndims=1, eps=1e-5)
case("layer_norm", [t("f32", 4, 5)], [t("f32", 4, 5), t("f32", 4), t("f32", 4)], ndims=1, eps=1e-5)

# -- windows ----------------------------------------------------------------------------------------------------------


def _pool_size(n: Any, k: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> Any:
    if not ceil_mode:
        return _out_size(n, k, stride, padding, dilation)
    size = (n + 2 * padding - dilation * (k - 1) - 1 + stride - 1) // stride + 1
    return size - 1 if (size - 1) * stride >= n + padding else size


for _sp, _k, _s, _p, _dil, _ceil in [((6, 7), (2, 2), (2, 2), (0, 0), (1, 1), False), ((6, 7), (3, 3), (2, 2), (1, 1), (1, 1),
                                     False),
                                     ((6, 7), (3, 2), (2, 3), (1, 0), (1, 1), True), ((9, 8), (3, 2), (1, 2), (1, 1), (2, 3),
                                     False),
                                     ((9,), (3,), (2,), (1,), (1,), True), ((4, 5, 6), (2, 2, 3), (2, 1, 2), (1, 0, 1), (1, 1,
                                     1), False),
                                     ((S1 + 4, S2 + 4), (3, 3), (2, 2), (1, 1), (1, 1), False)]:
    _y = tuple(_pool_size(*a, _ceil) for a in zip(_sp, _k, _s, _p, _dil, strict=True))
    _attrs = {"kernel": _k, "stride": _s, "padding": _p, "ceil_mode": _ceil}
    for _name in ("f32", "bf16"):
        case("max_pool", t(_name, S0, 3, *_sp), [t(_name, S0, 3, *_y), t("i64", S0, 3, *_y)], dilation=_dil, **_attrs)
        if set(_dil) == {1}:
            for _include in (True, False):
                case("avg_pool", t(_name, S0, 3, *_sp), t(_name, S0, 3, *_y), count_include_pad=_include, **_attrs)
case("avg_pool", t("f32", 2, 3, 6, 7), t("f32", 2, 3, 3, 4), kernel=(2, 2), stride=(2, 2), padding=(0, 1), divisor=3)
case("max_pool", t("f32", 2, 2, 8, 8), [t("f32", 2, 2, 4, 4), t("i64", 2, 2, 4, 4)], kernel=(3, 3), stride=(2, 2), padding=(1,
     1),
     special=(-INF, INF))
for _dil in (1, 2):  # windows of -inf alone: the index is that of the first element inside
    case("max_pool", t("f32", 1, 1, 5, 5), [t("f32", 1, 1, 7 - 2 * _dil, 7 - 2 * _dil), t("i64", 1, 1, 7 - 2 * _dil,
         7 - 2 * _dil)],
         kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(_dil, _dil), values=(torch.full((1, 1, 5, 5), -INF),))
_ONE_NAN = torch.randn(1, 1, 6, 6, generator=torch.Generator().manual_seed(1))
_ONE_NAN[0, 0, 2, 3] = NAN
case("max_pool", t("f32", 1, 1, 6, 6), [t("f32", 1, 1, 6, 6), t("i64", 1, 1, 6, 6)], kernel=(3, 3), stride=(1, 1), padding=(1,
     1),
     values=(_ONE_NAN,))
case("max_pool", t("f32", 1, 1, 6, 6), [t("f32", 1, 1, 3, 3), t("i64", 1, 1, 3, 3)], kernel=(2, 2), stride=(2, 2), padding=(0,
     0),
     values=(torch.ones(1, 1, 6, 6),))

# -- indexing ---------------------------------------------------------------------------------------------------------
for _name in ("f32", "bf16"):
    case("embedding", [t(_name, 9, 4), t("i64", S0, S1)], t(_name, S0, S1, 4), ranges={1: (0, 9)})
    for _kind in ("sum", "mean", "max"):
        case("bags", [t(_name, 9, 4), t("i64", 7), t("i64", 4)], t(_name, 4, 4), kind=_kind, ranges={1: (0, 9)},
             values=(None, None, torch.tensor([0, 2, 2, 5])))
    case("gather", [t(_name, 5, 6), t("i64", 3, 6)], t(_name, 3, 6), dim=0, ranges={1: (0, 5)})
    case("index", [t(_name, 4, 5, 6, 3), t("i64", 2, 1), t("i64", 7)], t(_name, 4, 2, 7, 3), dims=(1, 2), ranges={1: (-5, 5),
         2: (-6, 6)})
case("embedding", [t("f32", 9, 4), t("i32")], t("f32", 4), ranges={1: (0, 9)})
case("bags", [t("f32", 9, 4), t("i32", 7), t("i64", 4), t("f32", 7)], t("f32", 3, 4), kind="sum", padding=3, ranges={1: (0, 9)},
     values=(None, None, torch.tensor([0, 2, 2, 7])))
case("embedding", [t("f32", S2 + 2, 2, 3), t("i32", 5)], t("f32", 5, 2, 3), ranges={1: (0, 3)})
case("gather", [t("f32", 5, S1, 6), t("i64", 2, S1, 9)], t("f32", 2, S1, 9), dim=2, ranges={1: (0, 6)})
case("take", [t("f32", 5, S1, 6), t("i64", S0)], t("f32", 5, S1, S0), dim=2, ranges={1: (0, 6)})
case("take", [t("i64", 5, 6), t("i32", 3)], t("i64", 3, 6), dim=0, ranges={1: (0, 5)})
case("index", [t("f32", 4, 5, 6, 3), t("i64", 2), t("i64", 7, 1)], t("f32", 7, 2, 5, 3), dims=(0, 2), ranges={1: (-4, 4),
     2: (-6, 6)})
case("index", [t("f32", S0 + 1, S1, 6), t("i64", S2)], t("f32", S0 + 1, S1, S2), dims=(2,), ranges={1: (-6, 6)})
case("index", [t("i1", 5, 6), t("i64", 3), t("i64")], t("i1", 3), dims=(0, 1), ranges={1: (-5, 5), 2: (0, 6)})
for _name, _accumulate in (("f32", True), ("bf16", True), ("i64", True), ("i1", False)):
    case("index_put", [t(_name, 4, 5, 3), t(_name, 7, 3), t("i64", 7), t("i64", 1)], t(_name, 4, 5, 3), dims=(0, 1),
         accumulate=_accumulate,
         ranges={2: (-4, 4), 3: (-5, 5)} if _accumulate else {2: (1, 2), 3: (0, 5)},
         values=() if _accumulate else (None, None, torch.tensor([0, -1, 1, 2, 0, 0, 0])))
case("index_put", [t("f32", 4, S1, 3), t("f32"), t("i64", 2)], t("f32", 4, S1, 3), dims=(2,), ranges={2: (-3, 3)})
case("index_put", [t("f32", 4, 5, 3), t("f32", 2, 1, 5), t("i64", 2, 1), t("i64", 3)], t("f32", 4, 5, 3), dims=(0, 2),
     accumulate=True,
     ranges={2: (-4, 4), 3: (-3, 3)})
for _reduce in ("set", "add", "mul", "amax", "amin"):
    for _name in ("f32", "bf16", "i64"):
        case("scatter", [t(_name, 5, 6), t("i64", 1, 4), t(_name, 3, 5)], t(_name, 5, 6), dim=0, reduce=_reduce,
             ranges={1: (0, 5)})
case("scatter", [t("f32", 5, S1), t("i64", 3, S1), t("f32", 3, S1)], t("f32", 5, S1), dim=0, reduce="add", ranges={1: (0, 5)})

# -- the rest ---------------------------------------------------------------------------------------------------------
case("extern", [t("f32", 3, S1)], [t("f32", 3, S1), t("i64", 3, S1)], target="aten.sort.default", args=({"operand": 0}, -1,
     True),
     kwargs={}, reason="sort", result_kinds=("tensor", "tensor"))
case("assign", [t("f32", S0, 3), t("f32", S0, 3)], ())


# -- running a case ---------------------------------------------------------------------------------------------------

def build(c: Case) -> Operation:
    """A module with one function of one op; results that have no use are returned all the same."""
    module, block = make_module("graph")
    _, body = make_func(block, "f", c.ins, [f"x{i}" for i in range(len(c.ins))], symbols=dict.fromkeys(sorted(c.symbols), (1,
                        None)))
    b = Builder.at_end(body, Location("model.py", 12, "layer.0"))
    op = b.create(c.op, body.args, c.attrs, c.outs)
    for i, r in enumerate(op.results):
        r.name = f"y{i}"
    b.create("return", op.results)
    verify(module)
    return module


def values_for(c: Case, symbols: dict[str, int], seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    made = []
    for i, typ in enumerate(c.ins):
        if i < len(c.values) and c.values[i] is not None:
            made.append(c.values[i])
            continue
        shape = [int(evaluate(e, symbols)) for e in typ.shape]
        dtype = TORCH_DTYPES[typ.dtype.name]
        if typ.dtype.is_float:
            x = torch.randn(shape, generator=g).to(dtype)
            if c.special:
                pick = torch.randint(0, 4 * len(c.special), shape, generator=g)
                for n, s in enumerate(c.special):
                    x[pick == n] = s
        elif typ.dtype.kind == "bool":
            x = torch.rand(shape, generator=g) < 0.5
        else:
            low, high = c.ranges.get(i, (0 if typ.dtype.kind == "uint" else -5, 6))
            x = torch.randint(low, high, shape, generator=g).to(dtype)
        made.append(x)
    return made


def run(module: Operation, inputs: list[torch.Tensor], symbols: dict[str, int],
        precision: torch.dtype | None) -> list[torch.Tensor]:
    """Results, then the arguments as they are afterwards."""
    mine = [x.to(precision) if precision and x.is_floating_point() else x.clone() for x in inputs]
    return [*interpret(module, mine, symbols=symbols, precision=precision), *mine]


TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def assert_same(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    assert len(got) == len(want)
    for x, y in zip(got, want, strict=True):
        tolerance = TOLERANCE.get(y.dtype, 0.0)
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * 0.1, equal_nan=True)


def decompose(module: Operation) -> Operation:
    made = module.clone()
    Decompose().run(made, PassContext())
    return made


@pytest.mark.parametrize("c", CASES, ids=lambda c: c.label)
def test_same_meaning(c: Case) -> None:
    module = build(c)
    made = decompose(module)
    verify(made)
    assert made["level"] == "tensor"
    assert not [op.name for op in made.walk() if op.opdef.dialect == "graph"]
    assert equivalent(parse_module(print_op(made)), made)
    exact = all(v.dtype.name not in ("f16", "bf16") for v in (*c.ins, *c.outs))
    for symbols in [{k: v for k, v in b.items() if k in c.symbols} for b in BINDINGS] if c.symbols else [{}]:
        inputs = values_for(c, symbols)
        assert_same(run(made, inputs, symbols, None), run(module, inputs, symbols, None))
        if exact:
            assert_same(run(made, inputs, symbols, torch.float64), run(module, inputs, symbols, torch.float64))


def test_every_op_has_a_rule_and_a_case() -> None:
    ops = {d.name for d in registered("graph")}
    assert set(RULES) == ops
    assert {c.op for c in CASES} == ops


_NARROW = [c for c in CASES if any(v.dtype.name in ("bf16", "f16") for v in c.ins)]


@pytest.mark.parametrize("c", _NARROW, ids=lambda c: c.label)
def test_narrow_floats_are_only_moved_and_cast(c: Case) -> None:
    free = {"arith.cast", "arith.select", "arith.constant", "arith.nextafter", "tensor.require"}
    for op in decompose(build(c)).walk():
        if op.opdef.dialect == "arith" and op.name not in free:
            assert all(v.type.dtype.bits >= 32 or not v.type.dtype.is_float for v in (*op.operands, *op.results)), op
        if op.name == "tensor.generic" and op["reductions"]:
            assert all(r.type.dtype.bits >= 32 or not r.type.dtype.is_float for r in op.results), op


# -- structure --------------------------------------------------------------------------------------------------------

def _generics(c: Case) -> list[Operation]:
    return [op for op in decompose(build(c)).walk() if op.name == "tensor.generic"]


_CONTRACTIONS = ("graph.matmul", "graph.conv", "graph.conv_weight_grad", "graph.attention")
_SUMS = [c for c in CASES if c.op in _CONTRACTIONS and c.ins[0].dtype.is_float and c.ins[1].shape != (4, 1, 1)]


@pytest.mark.parametrize("c", _SUMS, ids=lambda c: c.label)
def test_contractions_are_recognisable(c: Case) -> None:
    assert sum(map(is_contraction, _generics(c))) == (2 if c.op == "graph.attention" else 1)


def test_matmul_space() -> None:
    op, cast = _generics(Case("graph.matmul", (t("bf16", S0, 4, 8), t("bf16", S0, 8, S1)), (t("bf16", S0, 4, S1),)))
    assert op["dims"] == (S0, 4, S1, 8) and op["reductions"] == 1 and op["combine"] == ("sum",)
    assert str(op["maps"]) == "((d0, d1, d3), (d0, d3, d2))"
    assert op.result.type == t("f32", S0, 4, S1) and cast.result.type == t("bf16", S0, 4, S1)


def test_integer_products_accumulate_in_the_result_type() -> None:
    made = decompose(build(Case("graph.matmul", (t("i8", 17, 8), t("i8", 8, 8)), (t("i32", 17, 8),))))
    a, b = (torch.randint(-128, 128, s, dtype=torch.int8) for s in ((17, 8), (8, 8)))
    assert torch.equal(interpret(made, [a, b])[0], torch._int_mm(a, b))


def test_grouped_query_heads_are_read_in_place() -> None:
    c = next(c for c in CASES if c.op == "graph.attention" and c.ins[1].shape[1] == 2 and c.ins[0].shape[1] == 4)
    scores = _generics(c)[0]
    assert str(scores["maps"][1]) == "(d0, (d1 // 2), d3, d4)"


def test_depthwise_and_pointwise_convolutions_have_no_idle_reductions() -> None:
    depthwise = Case("graph.conv", (t("f32", 1, 4, 5, 5), t("f32", 4, 1, 3, 3)), (t("f32", 1, 4, 3, 3),),
                     {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 4})
    (op,) = _generics(depthwise)
    assert op["reductions"] == 2 and not op["fills"] and str(op["maps"][0]) == "(d0, d1, d2 + d4, d3 + d5)"
    pointwise = Case("graph.conv", (t("f32", 1, 4, 5, 5), t("f32", 8, 4, 1, 1)), (t("f32", 1, 8, 5, 5),),
                     {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)})
    (op,) = _generics(pointwise)
    assert op["reductions"] == 1 and str(op["maps"]) == "((d0, d4, d2, d3), (d1, d4, 0, 0))"


def test_unused_results_cost_nothing() -> None:
    c = next(c for c in CASES if c.op == "graph.max_pool")
    module = build(c)
    op = module.body.first.body.first
    module.body.first.body.terminator.set_operands([op.results[0]])
    made = decompose(module)
    assert [op["combine"] for op in made.walk() if op.name == "tensor.generic"] == [("max",)]


def test_names_locations_attributes_and_layout_are_kept() -> None:
    module, block = make_module("graph")
    func, body = make_func(block, "f", [t("f32", S0, 4)], ["x"], symbols={"s0": (2, 64)}, arg_attrs=({"name": "x",
                           "kind": "input"},))
    b = Builder.at_end(body, Location("model.py", 7, "mlp.fc1"))
    column_major = TensorType((S0, 4), DTYPES["f32"], (1, S0))
    y = b.op("graph.exp", body.args[0], type=column_major)
    y.name = "activation"
    b.create("return", [y])
    before = dict(func.attributes)
    Decompose().run(module, PassContext())
    verify(module)
    (op, last) = func.body.ops
    assert func.attributes == before and last.name == "return"
    assert op.result.name == "activation" and op.result.type == column_major
    assert all(inner.location == Location("model.py", 7, "mlp.fc1") for inner in op.walk())


def test_an_op_without_a_rule_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(RULES, "graph.softmax")
    with pytest.raises(IRError, match=r"'graph.softmax' at model.py:12 \(layer.0\) has no decomposition"):
        decompose(build(Case("graph.softmax", (t("f32", 2, 3),), (t("f32", 2, 3),), {"dim": 1})))


_BAD_INDICES = [
    ("embedding", (t("f32", 4, 2), t("i64", 1)), t("f32", 1, 2), {}, -1),
    ("embedding", (t("f32", 4, 2), t("i64", 1)), t("f32", 1, 2), {}, 4),
    ("gather", (t("f32", 4, 2), t("i64", 1, 2)), t("f32", 1, 2), {"dim": 0}, -1),
    ("take", (t("f32", 4), t("i64", 1)), t("f32", 1), {"dim": 0}, 4),
    ("index", (t("f32", 4, 2), t("i64", 1)), t("f32", 1, 2), {"dims": (0,)}, -5),
]


@pytest.mark.parametrize(("op", "ins", "out", "attrs", "bad"), _BAD_INDICES)
def test_bad_indices_raise(op: str, ins: tuple, out: TensorType, attrs: dict, bad: int) -> None:
    made = decompose(build(Case(f"graph.{op}", ins, (out,), attrs)))
    with pytest.raises(IndexError, match="is out of bounds for dimension 0 with size 4"):
        interpret(made, [torch.zeros([*ins[0].shape]), torch.full([*ins[1].shape], bad)])
