"""The graph dialect: named tensor operations with value semantics, one for each thing a PyTorch user would name.

Elementwise ops exist for every row of `arith` (`graph.add`, `graph.exp`, ...), plus `graph.select`, `graph.cast`; operands
broadcast as in numpy (also across ranks) and have one element type: the frontend inserts the casts that torch's type promotion implies.
Shapes are those of the result type; ops that only move data (`ViewLike`) need no more attributes than their doc says.
Dimensions in attributes are non-negative.
"""

from __future__ import annotations

from ..core import IRError, Operation
from ..expr import product
from ..opdef import Trait, attr, define, optional
from ..types import TensorType
from .arith import BY_NAME, ROWS

P, E, V, R = Trait.Pure, Trait.Elementwise, Trait.ViewLike, Trait.Reduction


def _tensor(op: Operation, i: int = 0) -> TensorType:
    t = op.operands[i].type
    if not isinstance(t, TensorType):
        raise IRError(f"operand {i} of '{op.name}' must be a tensor, got {t}")
    return t


def _verify_elementwise(op: Operation) -> None:
    out = op.result.type
    assert isinstance(out, TensorType)
    shape: list = [1] * max((_tensor(op, i).rank for i in range(len(op.operands))), default=0)
    for i in range(len(op.operands)):
        t = _tensor(op, i)
        for j, size in enumerate(t.shape, len(shape) - t.rank):
            if shape[j] == 1:
                shape[j] = size
            elif size != 1 and size != shape[j]:
                raise IRError(f"'{op.name}' cannot broadcast {', '.join(str(v.type) for v in op.operands)}")
    if tuple(shape) != out.shape:
        raise IRError(f"'{op.name}' gives shape [{', '.join(map(str, shape))}], but its result is declared as {out}")
    row = BY_NAME.get(op.name.partition(".")[2])
    dtypes = {_tensor(op, i).dtype.name for i in range(len(op.operands))}
    if row is not None:
        if len(dtypes) > 1:
            raise IRError(f"'{op.name}' needs one element type, got {', '.join(sorted(dtypes))}; insert graph.cast")
        want = "i1" if row.result == "i1" else dtypes.pop()
        if out.dtype.name != want:
            raise IRError(f"'{op.name}' gives {want}, but its result is declared as {out}")


for _row in ROWS:
    define(f"graph.{_row.name}", _row.doc + ", elementwise", operands=("x",) if _row.arity == 1 else ("a", "b", "c")[:_row.arity],
           traits=[P, E, *([Trait.Commutative] if _row.commutative else [])], verify=_verify_elementwise)
define("graph.select", "a where cond, else b", operands="cond a b", traits=[P, E], verify=_verify_elementwise)
define("graph.cast", "converted to the element type of the result", operands="x", traits=[P, E], verify=_verify_elementwise)
define("graph.require", "`value`; a false element of `cond` makes the call fail with RuntimeError", operands="cond value",
       attrs={"message": attr()}, traits=[P, E], verify=_verify_elementwise)
define("graph.relu", "max(x, 0)", operands="x", traits=[P, E], verify=_verify_elementwise)
define("graph.silu", "x * sigmoid(x)", operands="x", traits=[P, E], verify=_verify_elementwise)
define("graph.gelu", "x * Phi(x); approximate='tanh' for the tanh form", operands="x", attrs={"approximate": optional("none")},
       traits=[P, E], verify=_verify_elementwise)

# -- constants --------------------------------------------------------------------------------------------------------
define("graph.full", "every element is `value`", attrs={"value": attr("bool, int or float")}, traits=[P, Trait.ConstantLike])
define("graph.constant", "a constant tensor", attrs={"value": attr("Dense")}, traits=[P, Trait.ConstantLike])
define("graph.iota", "start + step * i along the only dimension", attrs={"start": optional(0), "step": optional(1)}, traits=[P])
define("graph.sym", "a 0-d i64 tensor that holds a size expression", attrs={"expr": attr("Expr or int")}, traits=[P])

define("graph.random_bits", "random bits of element i from Philox 4x32-10 with the halves of the i64 `seed` as key: u64, words 2 * pair and "
       "2 * pair + 1 (low, high) at counter (i low, i high, stream, 0); u32, word i % 4 at the counter of i // 4", operands="seed",
       attrs={"stream": attr("number of the random tensor in its graph"), "pair": optional(0)}, traits=[P])

# -- views: elements moved or repeated ---------------------------------------------------------------------------------


def _verify_reshape(op: Operation) -> None:
    source, result = _tensor(op), op.result.type
    assert isinstance(result, TensorType)
    if product(source.shape) != product(result.shape) and not _symbolic(source, result):
        raise IRError(f"'graph.reshape' changes the number of elements: {source} -> {result}")


def _symbolic(*types: TensorType) -> bool:
    return any(not isinstance(d, int) for t in types for d in t.shape)


def _verify_permute(op: Operation) -> None:
    source, result = _tensor(op), op.result.type
    assert isinstance(result, TensorType)
    if sorted(op["perm"]) != list(range(source.rank)) or result.shape != tuple(source.shape[p] for p in op["perm"]):
        raise IRError(f"'graph.permute' by {op['perm']} does not take {source} to {result}")


define("graph.reshape", "the same elements in row-major order under another shape", operands="x", traits=[P, V], verify=_verify_reshape)
define("graph.permute", "result dimension i is operand dimension perm[i]", operands="x", attrs={"perm": attr()}, traits=[P, V],
       verify=_verify_permute)
define("graph.expand", "broadcast to the shape of the result, numpy rules", operands="x", traits=[P, V])
define("graph.slice", "result[i] = x[starts + i * steps], per dimension; the result type gives the sizes", operands="x",
       attrs={"starts": attr(), "steps": attr()}, traits=[P, V])
define("graph.flip", "reversed along `dims`", operands="x", attrs={"dims": attr()}, traits=[P, V])
define("graph.remap", "result[d0, d1, ...] = x[map]: any other view, as index expressions over the result's dimensions", operands="x",
       attrs={"map": attr("one Expr over d0, d1, ... per dimension of x")}, traits=[P, V])
define("graph.cat", "operands joined along `dim`", operands="xs*", attrs={"dim": attr()}, traits=[P])
define("graph.pad", "`low` and `high` elements of `value` added per dimension; negative amounts crop", operands="x",
       attrs={"low": attr(), "high": attr(), "value": attr()}, traits=[P])

# -- contractions -----------------------------------------------------------------------------------------------------


def _verify_matmul(op: Operation) -> None:
    a, b, out = _tensor(op, 0), _tensor(op, 1), op.result.type
    assert isinstance(out, TensorType)
    if a.rank < 2 or a.rank != b.rank or a.shape[-1] != b.shape[-2] or a.dtype != b.dtype:
        raise IRError(f"'graph.matmul' needs [..., M, K] and [..., K, N] of one rank and type, got {a} and {b}")
    if out.shape != (*a.shape[:-1], b.shape[-1]) or a.shape[:-2] != b.shape[:-2]:
        raise IRError(f"'graph.matmul' of {a} and {b} cannot give {out}")


_CONV = {"stride": attr(), "padding": attr(), "dilation": attr(), "groups": optional(1)}
define("graph.matmul", "[..., M, K] @ [..., K, N], equal batch dimensions; accumulates floats of 16 bits in f32", operands="lhs rhs",
       traits=[P, Trait.Contraction], verify=_verify_matmul)
define("graph.conv", "N-d convolution: x [B, C, *spatial], w [O, C/groups, *kernel]; add the bias separately", operands="x w",
       attrs=_CONV, traits=[P, Trait.Contraction])
define("graph.conv_transpose", "gradient of conv to its input: x [B, O, *spatial], w [O, C/groups, *kernel] -> [B, C, *result]",
       operands="x w", attrs={**_CONV, "output_padding": optional(())}, traits=[P, Trait.Contraction])
define("graph.conv_weight_grad", "gradient of conv to its weight: grad [B, O, *], x [B, C, *] -> [O, C/groups, *kernel]",
       operands="grad x", attrs=_CONV, traits=[P, Trait.Contraction])
define("graph.attention", "softmax(q @ k^T * scale + mask) @ v over [B, H, S, D]; k and v may have fewer heads (H a multiple)",
       operands="q k v mask*", results="result lse", attrs={"scale": attr("float"), "causal": optional(False)},
       traits=[P, Trait.Contraction])
define("graph.attention_backward", "gradients of attention to q, k and v: from that of its result, its operands, its result and its lse",
       operands="grad q k v result lse mask*", results="dq dk dv", attrs={"scale": attr("float"), "causal": optional(False)},
       traits=[P, Trait.Contraction])

# -- reductions -------------------------------------------------------------------------------------------------------
_DIMS = {"dims": attr("dimensions combined, ascending"), "keepdim": optional(False)}
for _name, _doc in {"sum": "sum", "prod": "product", "amax": "maximum, NaN if any is", "amin": "minimum, NaN if any is",
                    "any": "or", "all": "and", "mean": "arithmetic mean"}.items():
    define(f"graph.{_name}", f"{_doc} over `dims`", operands="x", attrs=_DIMS, traits=[P, R])
for _name in ("argmax", "argmin"):
    define(f"graph.{_name}", "index (i64) of the first extreme element along `dims` (one, or all: flat index); the first NaN wins",
           operands="x", attrs=_DIMS, traits=[P, R])
define("graph.var_mean", "variance with `correction`, and mean, over `dims`", operands="x", results="var mean",
       attrs={**_DIMS, "correction": optional(1.0), "exact": optional(False, "CPUs compute those of float32 in float64, as eager does")},
       traits=[P, R])
define("graph.scan", "running combination along `dim`: kind is sum, prod, max, min or logsumexp", operands="x",
       attrs={"dim": attr(), "kind": attr()}, traits=[P])
define("graph.sort", "the first `keep` elements along `dim` in stable sorted order, and their i64 positions; NaN is the largest",
       operands="x", results="values indices", attrs={"dim": attr(), "keep": attr("a size, at most the dimension's"),
                                                      "largest": optional(True, "the largest come first"),
                                                      "pick": optional("", "last: of those the last alone; median: the same, but the "
                                                                       "first NaN if there is one")}, traits=[P])
define("graph.softmax", "exp(x) / sum(exp(x)) along `dim`", operands="x", attrs={"dim": attr()}, traits=[P, R])
define("graph.log_softmax", "x - log(sum(exp(x))) along `dim`", operands="x", attrs={"dim": attr()}, traits=[P, R])
define("graph.layer_norm", "(x - mean) * rstd over the last `ndims` dimensions, times weight plus bias when given",
       operands="x weight_bias*", results="result mean rstd", attrs={"ndims": attr(), "eps": attr()}, traits=[P, R])
define("graph.rms_norm", "x / sqrt(mean(x^2) + eps) over the last `ndims` dimensions, times weight when given", operands="x weight*",
       results="result rstd", attrs={"ndims": attr(), "eps": attr()}, traits=[P, R])
define("graph.group_norm", "normalises [B, C, *] over each of `groups` channel groups; weight and bias per channel when given",
       operands="x weight_bias*", results="result mean rstd", attrs={"groups": attr(), "eps": attr()}, traits=[P, R])

# -- windows ----------------------------------------------------------------------------------------------------------
_POOL = {"kernel": attr(), "stride": attr(), "padding": attr(), "dilation": optional(()), "ceil_mode": optional(False)}
define("graph.max_pool", "window maximum of [B, C, *] and its flat spatial index (i64)", operands="x", results="result indices",
       attrs=_POOL, traits=[P, R])
define("graph.avg_pool", "window mean of [B, C, *]; `divisor` replaces the window size when given", operands="x",
       attrs={**_POOL, "count_include_pad": optional(True), "divisor": optional(None)}, traits=[P, R])

# -- indexing ---------------------------------------------------------------------------------------------------------
define("graph.embedding", "weight[indices]: [V, *] and [*] -> [*indices, *weight[1:]]", operands="weight indices", traits=[P])
define("graph.bags", "of each bag, the sum, mean or max of the rows of `weight` [V, D] that `indices` [N] names, times `scales` [N]: [B, D]; "
       "bags lie one behind the other, from the i64 `starts` [B] on (or [B + 1], the last being the end); the index `padding` counts for nothing, "
       "and nothing is 0", operands="weight indices starts scales*", attrs={"kind": attr(), "padding": optional(None)}, traits=[P])
define("graph.gather", "result[i..] = x[.., index[i..], ..] at `dim`, as torch.gather", operands="x index", attrs={"dim": attr()}, traits=[P])
define("graph.take", "x with `dim` indexed by the 1-d i64 `index` (torch.index_select)", operands="x index", attrs={"dim": attr()}, traits=[P])
define("graph.index", "advanced indexing: `dims` of x indexed by tensors that broadcast together; the broadcast shape goes where torch puts it",
       operands="x indices*", attrs={"dims": attr()}, traits=[P])
define("graph.index_put", "x with x[indices at dims] = values, or += when `accumulate`", operands="x values indices*",
       attrs={"dims": attr(), "accumulate": optional(False)}, traits=[P])
define("graph.scatter", "x with x[.., index[i..], ..] combined with src[i..] at `dim`; reduce is set, add, mul, amax or amin",
       operands="x index src", attrs={"dim": attr(), "reduce": optional("set")}, traits=[P])

# -- effects and the rest -----------------------------------------------------------------------------------------------
define("graph.assign", "writes `value` into the memory of the function argument `target` at the end of the call", operands="target value",
       results=(), traits=[Trait.WritesMemory])
define("graph.extern", "an ATen operator called as it is", operands="tensors*", results="results*",
       attrs={"target": attr("such as 'aten.sort.default'"),
              "args": attr("positional arguments; {operand = i} stands for tensor operand i, {expr = e} for a size"),
              "kwargs": optional({}, "keyword arguments, likewise"), "reason": optional("", "why it is not compiled"),
              "result_kinds": optional((), "per result of the operator: 'tensor', 'none' or 'int'"),
              "random": optional(False, "draws from the global generator: keeps its order"),
              "operand_strides": optional((), "per operand: its strides in eager, or none for row-major; empty: all row-major"),
              "defines": optional({}, "unbacked symbol -> [result, dimension], dimension -1 for the value of an int, -2 for an offset")},
       traits=[Trait.ReadsMemory])
