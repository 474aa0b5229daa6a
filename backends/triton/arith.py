"""The arith dialect as Triton expressions.

Rows are keyed by op name and kind of element type ('f' float, 'i' signed, 'u' unsigned, 'b' bool); {0}, {1}, {2} are the
operands, {T} the Triton type, {N} its bits. Semantics are torch's (see `ir/dialects/arith.py`). Division, square root and the
elementary functions are libdevice's: Triton's own are approximations meant for float32 alone. Floats narrower than 32 bits
compute in float32 and round once.
"""

from __future__ import annotations

from ...ir.core import IRError, Operation, Value
from ...ir.dialects.arith import BY_NAME
from ...ir.types import DTYPES, DType, element_type
from .dtypes import tl_type

__all__ = ["arith_text", "literal", "rounded_to_bf16"]

F32 = DTYPES["f32"]
WORD = 0xFFFFFFFF
_KIND = {"float": "f", "int": "i", "uint": "u", "bool": "b", "index": "i"}


def _same(text: str, kinds: str = "fiub") -> dict[str, str]:
    return dict.fromkeys(kinds, text)


def _libdevice(name: str, arity: int = 1) -> dict[str, str]:
    return {"f": f"libdevice.{name}({', '.join(f'{{{k}}}' for k in range(arity))})"}


_LIBDEVICE = (
    "exp",
    "exp2",
    "expm1",
    "log",
    "log2",
    "log10",
    "log1p",
    "rsqrt",
    "sin",
    "cos",
    "tan",
    "asin",
    "acos",
    "atan",
    "sinh",
    "cosh",
    "tanh",
    "asinh",
    "acosh",
    "atanh",
    "erf",
    "erfc",
    "erfinv",
    "lgamma",
    "trunc",
)

TABLE: dict[str, dict[str, str]] = {
    "neg": _same("-{0}", "fiu"),
    "abs": {"f": "tl.abs({0})", "i": "tl.abs({0})", "u": "{0}"},
    "sign": {
        "f": "({0} > 0).to({T}) - ({0} < 0).to({T})",
        "i": "({0} > 0).to({T}) - ({0} < 0).to({T})",
        "u": "({0} != 0).to({T})",
        "b": "{0}",
    },
    "bitnot": _same("~{0}", "iub"),
    "isnan": {"f": "{0} != {0}"},
    "isinf": {"f": 'tl.abs({0}) == float("inf")'},
    "floor": {"f": "tl.floor({0})"},
    "ceil": {"f": "tl.ceil({0})"},
    "round": _libdevice("rint"),
    **{name: _libdevice(name) for name in _LIBDEVICE},
    "sqrt": _libdevice("sqrt_rn"),
    "reciprocal": _libdevice("rcp_rn"),
    "sigmoid": {"f": "sigmoid({0})"},
    "digamma": {"f": "digamma({0})"},
    "add": {**_same("{0} + {1}", "fiu"), "b": "{0} | {1}"},
    "sub": _same("{0} - {1}", "fiu"),
    "mul": {**_same("{0} * {1}", "fiu"), "b": "{0} & {1}"},
    "div": _libdevice("div_rn", 2),
    "floordiv": {"f": "float_floor_div({0}, {1})", "i": "floor_div({0}, {1})", "u": "{0} // {1}"},
    "truncdiv": _same("{0} // {1}", "iu"),
    "mod": {"f": "float_mod({0}, {1})", "i": "floor_mod({0}, {1})", "u": "{0} % {1}"},
    "rem": {**_libdevice("fmod", 2), **_same("{0} % {1}", "iu")},
    "pow": {**_libdevice("pow", 2), **_same("int_pow({0}, {1}, {N})", "iu")},
    "atan2": _libdevice("atan2", 2),
    "hypot": _libdevice("hypot", 2),
    "copysign": _libdevice("copysign", 2),
    "nextafter": _libdevice("nextafter", 2),
    "max": {
        "f": "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
        **_same("tl.maximum({0}, {1})", "iu"),
        "b": "{0} | {1}",
    },
    "min": {
        "f": "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
        **_same("tl.minimum({0}, {1})", "iu"),
        "b": "{0} & {1}",
    },
    "fmax": {"f": "tl.maximum({0}, {1})"},
    "fmin": {"f": "tl.minimum({0}, {1})"},
    "and": _same("{0} & {1}", "iub"),
    "or": _same("{0} | {1}", "iub"),
    "xor": _same("{0} ^ {1}", "iub"),
    "shl": _same("shift_left({0}, {1}, {N})", "iu"),
    "shr": {"i": "shift_right({0}, {1}, {N}, True)", "u": "shift_right({0}, {1}, {N}, False)"},
    **{
        name: _same(f"{{0}} {sign} {{1}}")
        for name, sign in {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}.items()
    },
    "fma": _libdevice("fma", 3),
}
_APPROXIMATE = {"exp": "exp_approx({0})", "exp2": "exp2_approx({0})", "sigmoid": "sigmoid_approx({0})", "div": "{0} / {1}",
                "tanh": "tanh_approx({0})", "log": "log_approx({0})", "erf": "erf_approx({0})"}
"""One to four instructions: 2 ulp (of the argument too, for exp and sigmoid; tanh: 2^-11 of the result; log: 2^-22 near 1), and subnormals
are zero. erf: 18 without a branch, 3e-7 (relative near 0)."""
_F64 = {"max": "max_nan({0}, {1})", "min": "min_nan({0}, {1})"}


def arith_text(op: Operation, args: list[str], index_type: str) -> str:
    """The expression of an arith op on operands that are variable names; `index_type` is what `index` is in this kernel."""
    name = op.name.partition(".")[2]
    dtype = element_type(op.operands[0].type) if op.operands else element_type(op.result.type)
    if name == "select":
        return f"tl.where({', '.join(args)})"
    if name == "cast":
        return _cast(args[0], dtype, element_type(op.result.type), index_type)
    kind = _KIND.get(dtype.kind, "")
    template = TABLE.get(name, {}).get(kind)
    if template is None:
        raise IRError(f"'{op.name}' on {dtype} has no lowering to Triton")
    if op.attributes.get("_approximate"):
        template = _APPROXIMATE.get(name, template)
    if op.attributes.get("_many_by_one"):
        template = "quotient({0}, {1})"
    if name == "mul" and dtype.name == "u64" and _is_word(op.operands[0]) and _is_word(op.operands[1]):
        template = "multiply_words({0}, {1})"
    if dtype.name == "f64":
        template = _F64.get(name, template)
    narrow = kind == "f" and dtype.bits < 32
    if narrow:
        args = [f"{a}.to(tl.float32)" for a in args]
    target = "tl.float32" if narrow else _type(dtype, index_type)
    text = template.format(*args, T=target, N=dtype.bits)
    if narrow and BY_NAME[name].result == "same":
        return narrowed(f"({text})", dtype)
    return text


def rounded_to_bf16(op: Operation) -> Value | None:
    """The float32 number of which `op` makes the nearest bfloat16, as a float32."""
    inner = op.operands[0].defining_op if op.name == "arith.cast" and element_type(op.result.type).name == "f32" else None
    if inner is None or inner.name != "arith.cast" or element_type(inner.result.type).name != "bf16":
        return None
    return inner.operands[0] if element_type(inner.operands[0].type).name == "f32" else None


def _is_word(v: Value) -> bool:
    """A u64 below 2^32: a constant, or masked by one."""
    made = v.defining_op
    if made is not None and made.name == "arith.and":
        return any(_is_small(x) for x in made.operands)
    return _is_small(v)


def _is_small(v: Value) -> bool:
    made = v.defining_op
    return made is not None and made.name == "arith.constant" and 0 <= made["value"] <= WORD


def narrowed(text: str, dtype: DType) -> str:
    """A float32 expression rounded to a narrower float type."""
    if dtype.name == "f8e4m3fn":
        return f"to_e4m3({text})"
    if dtype.name == "f8e5m2":
        return f"to_e5m2({text})"
    return f"{text}.to({tl_type(dtype)})"


def _type(dtype: DType, index_type: str) -> str:
    return index_type if dtype.kind == "index" else tl_type(dtype)


def _cast(x: str, source: DType, target: DType, index_type: str) -> str:
    if target.kind == "bool":
        return f"{x} != 0"
    if target.is_float and target.bits == 8:
        return narrowed(x if source.name == "f32" else f"{x}.to(tl.float32)", target)
    if source.is_float and source.bits == 8 and target.name != "f32":
        x = f"{x}.to(tl.float32)"
    if source.is_float and target.name in ("u8", "u16"):  # through a signed type: negative numbers wrap, as in torch
        x = f"{x}.to(tl.int32)"
    return f"{x}.to({_type(target, index_type)})"


def literal(value: bool | int | float) -> str:
    """A Python constant as Triton source."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return f'float("{value}")'
    return repr(value)
