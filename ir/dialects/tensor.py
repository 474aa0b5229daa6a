"""The tensor dialect: structured computations over an iteration space.

    %r = tensor.generic(%a, %b) {dims = [4, 8, 16], reductions = 1, maps = [[d0, d2], [d2, d1]], combine = ["sum"]} : tensor<4x8xf32> {
      ^(%x: f32, %y: f32):
        %p = arith.mul(%x, %y) : f32
        tensor.yield(%p)
    }

`dims` are the sizes of the iteration space d0, d1, ...; the last `reductions` of them are combined away. Each result's shape is
the sizes of the parallel dimensions, in order, and result element [d0, .., dp] is the combination (per result: "none", "sum", "prod",
"max", "min", "any", "all", "argmax", "argmin") over the reduction dimensions of what the body yields.
`maps[i]` gives, for each dimension of operand i, the index read, as an expression over d0, d1, ... and size symbols;
`fills[i]`, when not none, is the value read where that index is out of bounds (padding); otherwise the index is in bounds.
A map of none passes the whole tensor to the body, for `tensor.extract` (gathers).
An argmax or argmin body yields the value compared; the result is the i64 position in row-major order of the reduction dimensions;
the first of equal values wins, and NaN beats all.
A generic whose body yields its only argument is a view: passes absorb it by composing maps.
"""

from __future__ import annotations

from ..core import IRError, Operation, Value
from ..expr import Dim, free_symbols
from ..opdef import Trait, attr, define, optional
from ..types import DTYPES, ScalarType, TensorType

COMBINE = ("none", "sum", "prod", "max", "min", "any", "all", "argmax", "argmin")
SCAN_KINDS = ("sum", "prod", "max", "min", "logsumexp")
SEGMENT_KINDS = ("sum", "mean", "max")
SCATTER_KINDS = ("set", "add", "mul", "max", "min")

_SPACE = {"dims": attr("sizes of the iteration space"), "maps": attr("one index map per operand, or none to pass the tensor whole"),
          "fills": optional((), "value read out of bounds, per operand; empty: all reads are in bounds")}


def parallel_dims(op: Operation) -> tuple[Dim, ...]:
    """Sizes of the parallel dimensions of a structured op."""
    dims = op["dims"]
    return dims[:len(dims) - op["reductions"]]


def fill_of(op: Operation, i: int) -> object:
    """The out-of-bounds value of operand i; None when its reads are in bounds."""
    fills = op["fills"]
    return fills[i] if fills else None


def _verify_space(op: Operation, operands: tuple[Value, ...]) -> None:
    dims, maps = op["dims"], op["maps"]
    names = {f"d{i}" for i in range(len(dims))}
    if len(maps) != len(operands):
        raise IRError(f"'{op.name}' has {len(maps)} maps for {len(operands)} operands")
    if op["fills"] and len(op["fills"]) != len(operands):
        raise IRError(f"'{op.name}' has {len(op['fills'])} fills for {len(operands)} operands")
    args = op.body.args
    if len(args) != len(operands):
        raise IRError(f"the body of '{op.name}' has {len(args)} arguments for {len(operands)} operands")
    for i, (v, m, a) in enumerate(zip(operands, maps, args, strict=True)):
        if not isinstance(v.type, TensorType):
            raise IRError(f"operand {i} of '{op.name}' must be a tensor, got {v.type}")
        if m is None:
            if a.type != v.type:
                raise IRError(f"argument {i} of the body stands for the whole {v.type}, but has type {a.type}")
            continue
        if len(m) != v.type.rank:
            raise IRError(f"map {i} of '{op.name}' has {len(m)} expressions for {v.type}")
        if a.type != ScalarType(v.type.dtype):
            raise IRError(f"argument {i} of the body must be {v.type.dtype}, got {a.type}")
        for e in m:
            unknown = {s for s in free_symbols(e) if s[0] == "d" and s[1:].isdigit()} - names
            if unknown:
                raise IRError(f"map {i} of '{op.name}' uses {', '.join(sorted(unknown))}, but there are {len(dims)} dimensions")


def _yielded(op: Operation) -> tuple[Value, ...]:
    last = op.body.last
    if last is None or last.name != "tensor.yield":
        raise IRError(f"the body of '{op.name}' must end with 'tensor.yield'")
    return last.operands


def _verify_generic(op: Operation) -> None:
    _verify_space(op, op.operands)
    n = op["reductions"]
    if not 0 <= n <= len(op["dims"]):
        raise IRError(f"'reductions' is {n} for {len(op['dims'])} dimensions")
    out = _yielded(op)
    combine = op["combine"] or ("none",) * len(op.results)
    if len(out) != len(op.results) or len(combine) != len(op.results):
        raise IRError(f"'tensor.generic' has {len(op.results)} results, yields {len(out)} values and combines {len(combine)}")
    for r, v, c in zip(op.results, out, combine, strict=True):
        if c not in COMBINE or (c == "none") != (n == 0):
            raise IRError(f"'combine' of result {r.index} is '{c}' with {n} reduction dimensions; one of {', '.join(COMBINE)}")
        want = "i64" if c in ("argmax", "argmin") else str(v.type)
        if not isinstance(r.type, TensorType) or r.type.shape != parallel_dims(op) or r.type.dtype.name != want:
            raise IRError(f"result {r.index} must be {want} of shape [{', '.join(map(str, parallel_dims(op)))}], got {r.type}")


def _verify_scan(op: Operation) -> None:
    _verify_space(op, op.operands)
    if op["kind"] not in SCAN_KINDS:
        raise IRError(f"scan kind '{op['kind']}' is not one of {', '.join(SCAN_KINDS)}")
    out = _yielded(op)
    if len(out) != 1 or not isinstance(op.result.type, TensorType) or op.result.type.shape != op["dims"]:
        raise IRError("'tensor.scan' yields one value and gives a tensor of the shape of its iteration space")


def _verify_sort(op: Operation) -> None:
    _verify_space(op, op.operands)
    shape = (*op["dims"][:-1], 1 if op["pick"] else op["keep"])
    if op["pick"] and (op["pick"] not in ("last", "median") or op["largest"]):
        raise IRError(f"'tensor.sort' picks the last or the median of the smallest, got '{op['pick']}'")
    if len(_yielded(op)) != 1 or any(not isinstance(r.type, TensorType) or r.type.shape != shape for r in op.results):
        raise IRError(f"'tensor.sort' yields one value and gives two tensors of shape [{', '.join(map(str, shape))}]")


def _verify_segments(op: Operation) -> None:
    _verify_space(op, op.operands)
    starts, result, out = op.operands[0].type, op.result.type, _yielded(op)
    if op["combine"] not in SEGMENT_KINDS:
        raise IRError(f"'combine' of 'tensor.segments' is '{op['combine']}', not one of {', '.join(SEGMENT_KINDS)}")
    if op["maps"][0] is not None or not isinstance(starts, TensorType) or starts.rank != 1 or starts.dtype.name != "i64":
        raise IRError(f"the first operand of 'tensor.segments' says where segments begin, an i64 tensor without a map, got {starts}")
    if len(op["dims"]) != 2 or not isinstance(result, TensorType) or result.rank != 2 or result.shape[1] != op["dims"][0]:
        raise IRError("'tensor.segments' goes over [columns, positions] and gives [segments, columns]")
    if result.shape[0] not in (starts.shape[0], starts.shape[0] - 1):
        raise IRError(f"{starts.shape[0]} starts are those of as many segments or of one less, got {result.shape[0]}")
    if len(out) not in (1, 2) or out[0].type != ScalarType(result.dtype) or len(out) == 2 and out[1].type != ScalarType(DTYPES["i1"]):
        raise IRError("'tensor.segments' yields a value of the result's type, and perhaps an i1")


def _verify_scatter(op: Operation) -> None:
    init, *rest = op.operands
    _verify_space(op, tuple(rest))
    if op["combine"] not in SCATTER_KINDS:
        raise IRError(f"scatter combine '{op['combine']}' is not one of {', '.join(SCATTER_KINDS)}")
    if init.type != op.result.type and getattr(init.type, "shape", None) != getattr(op.result.type, "shape", None):
        raise IRError(f"'tensor.scatter' into {init.type} cannot give {op.result.type}")
    assert isinstance(init.type, TensorType)
    if len(_yielded(op)) != 1 + init.type.rank:
        raise IRError(f"the body must yield a value and {init.type.rank} indices")


define("tensor.generic", "a computation over an iteration space; see the dialect's docstring", operands="inputs*", results="results*",
       attrs={**_SPACE, "reductions": optional(0, "how many trailing dimensions are combined"),
              "combine": optional((), "one kind per result")},
       regions=1, traits=[Trait.Pure, Trait.Structured], verify=_verify_generic)
define("tensor.scan", "running combination of the body's value along the last dimension of the space; the result has the whole space's shape",
       operands="inputs*", attrs={**_SPACE, "kind": attr("sum, prod, max, min, logsumexp")}, regions=1,
       traits=[Trait.Pure, Trait.Structured], verify=_verify_scan)
define("tensor.sort", "along the last dimension of the space, the first `keep` of the body's values in stable sorted order, and their i64 positions; "
       "NaN is the largest", operands="inputs*", results="values indices",
       attrs={**_SPACE, "keep": attr("a size, at most the dimension's"), "largest": optional(True, "the largest come first"),
              "pick": optional("", "last: of those the last alone; median: the same, but the first NaN if there is one")}, regions=1,
       traits=[Trait.Pure, Trait.Structured], verify=_verify_sort)
define("tensor.segments", "over the space [columns, positions], the combination of the body's value over each segment of positions, as [segments, "
       "columns]: segment s goes from starts[s] up to starts[s + 1] (the last to the end, if there are no more starts than segments); of nothing 0. "
       "Where the body yields an i1 too, positions at which it is false count for nothing. Starts that fall, or lie outside, make the call fail",
       operands="starts inputs*", attrs={**_SPACE, "combine": attr("sum, mean or max")}, regions=1,
       traits=[Trait.Pure, Trait.Structured], verify=_verify_segments)
define("tensor.scatter", "a copy of `init` into which, for each point of the space in row-major order, the body's (value, index...) is combined",
       operands="init inputs*", attrs={**_SPACE, "combine": optional("set", "set, add, mul, max or min")}, regions=1,
       traits=[Trait.Pure, Trait.Structured], verify=_verify_scatter)
define("tensor.fused", "ops that become one kernel; the region takes the operands and yields the results, each perhaps "
       "in another shape with its elements in the same order", operands="inputs*",
       results="results*", attrs={"kernel": optional("", "name of the kernel"), "why": optional("", "why they belong together"),
                               "tile": optional((), "measured to be best: the fields of `GpuTile` or `CpuTile`"),
                               "part": optional(0, "rows of a program that also sums up columns (`passes/row_columns.py`)"),
                               "ranges": optional((), "streams: [n, b]: operands n to n + 3 say which blocks of b steps each block of b rows needs")},
       regions=1, traits=[Trait.Pure, Trait.IsolatedFromAbove])
define("tensor.library", "ops that one call of a vendor's library computes: their meaning is the region, which takes the operands and yields "
       "the result", operands="inputs*",
       attrs={"library": attr("such as cublaslt"), "roles": attr("what each operand is: a, b (the factors), bias, c (a summand)"),
              "act": optional("none", "none or relu"), "why": optional("", "why the library does it"),
              "guess": optional(0, "measured to be best: which of the algorithms that the library proposes")},
       regions=1, traits=[Trait.Pure, Trait.IsolatedFromAbove])
define("tensor.yield", "ends a body", operands="values*", results=(), traits=[Trait.Terminator])
define("tensor.index", "the position along dimension `dim` of the enclosing iteration space, an i64", attrs={"dim": attr()}, traits=[Trait.Pure])
define("tensor.sym", "a size expression as an i64", attrs={"expr": attr()}, traits=[Trait.Pure])
define("tensor.extract", "source[indices]; with `check` an index out of range makes the call fail with IndexError",
       operands="source indices*", attrs={"check": optional(True)}, traits=[Trait.Pure])
define("tensor.require", "`value`; a false `cond` makes the call fail with RuntimeError (on GPUs nothing is checked, as in eager)",
       operands="cond value", attrs={"message": attr()}, traits=[Trait.Pure])
define("tensor.alias", "the operand's memory under another shape, from element `offset` on with the strides of the result's type: element d of the "
       "result is element `map`(d) of the operand", operands="source", attrs={"map": attr(), "offset": optional(0)},
       traits=[Trait.Pure, Trait.ViewLike])
define("tensor.constant", "a constant tensor", attrs={"value": attr("Dense")}, traits=[Trait.Pure, Trait.ConstantLike])
define("tensor.assign", "writes `value` into the memory of the function argument `target` at the end of the call", operands="target value",
       results=(), traits=[Trait.WritesMemory])
define("tensor.extern", "an ATen operator called as it is; attributes as in graph.extern", operands="tensors*", results="results*",
       attrs={"target": attr(), "args": attr(), "kwargs": optional({}), "reason": optional(""), "result_kinds": optional(()),
              "random": optional(False), "operand_strides": optional(()), "defines": optional({})},
       traits=[Trait.ReadsMemory])

