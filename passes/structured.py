"""Working with structured ops (tensor.generic and its kin): reading maps, composing them, merging bodies.

Everything that fusion does to the algebra of an op is here; *whether* to do it is decided in `absorb_views`, `inline` and `fuse`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from ..ir import Block, Builder, Dim, DType, Expr, Operation, Region, ScalarType, TensorType, Value, element_type, sym
from ..ir.dialects.tensor import fill_of, parallel_dims
from ..ir.expr import fold, free_symbols, product, substitute
from ..ir.ranges import Bounds, contiguous_linear, known_less, simplify, split_linear
from ..ir.types import i64

__all__ = ["BESIDE", "EXPENSIVE", "PARTIAL", "PLAIN", "body_ops", "composed_map", "constant_values", "identity_map", "identity_of", "in_order",
           "index_value", "inline_into", "inline_into_gather", "inline_padded", "is_contraction", "is_identity_view", "is_pointwise",
           "map_bounds", "plain_dims", "rebuild", "reshape_like", "space_bounds", "tap_dims", "windowed_operand"]

EXPENSIVE = frozenset(f"arith.{n}" for n in (
    "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh",
    "acosh", "atanh", "erf", "erfc", "erfinv", "lgamma", "digamma", "sigmoid", "pow", "atan2", "hypot"))
"""Ops worth storing rather than computing twice."""
BESIDE = "_beside"
"""Attribute of a sum of columns in parts of so many rows, for the kernel that walks these rows (`row_columns.py`)."""
PLAIN = "_plain"
"""Attribute of a sum of products that is to be a reduction like any other."""
PARTIAL = "_partial"
"""Attribute of a reduction over the part of a product that one program makes (`tile_reductions`): "columns" or "rows", and how many."""


def identity_of(kind: str, dtype: DType) -> bool | int | float:
    """The neutral element of a combination."""
    if kind in ("sum", "any"):
        return False if dtype.kind == "bool" else 0
    if kind in ("prod", "all"):
        return True if dtype.kind == "bool" else 1
    if dtype.kind == "bool":
        return kind == "min"
    if dtype.is_float:
        return float("-inf") if kind == "max" else float("inf")
    low = 0 if dtype.kind == "uint" else -(1 << (dtype.bits - 1))
    high = (1 << dtype.bits) - 1 if dtype.kind == "uint" else (1 << (dtype.bits - 1)) - 1
    return low if kind == "max" else high


def space_bounds(dims: Sequence[Dim], prefix: str = "d") -> dict[str, tuple[Dim, Dim | None]]:
    """Ranges of the iteration variables of a space of `dims`."""
    return {f"{prefix}{i}": (0, size - 1) for i, size in enumerate(dims)}


def map_bounds(op: Operation) -> Bounds:
    """Ranges of the iteration variables of a structured op."""
    return space_bounds(op["dims"])


def identity_map(rank: int) -> tuple[Dim, ...]:
    return tuple(sym(f"d{i}") for i in range(rank))


def is_pointwise(op: Operation) -> bool:
    """A tensor.generic without reductions."""
    return op.name == "tensor.generic" and op["reductions"] == 0


def is_identity_view(op: Operation) -> bool:
    """A generic of one mapped operand whose body yields that operand unchanged."""
    if not is_pointwise(op) or len(op.operands) != 1 or op["maps"][0] is None or len(op.results) != 1:
        return False
    return len(op.body) == 1 and op.body.terminator.operands[0] is op.body.args[0]


def body_ops(op: Operation) -> list[Operation]:
    """The ops of the body without the terminator."""
    return [o for o in op.body if o.name != "tensor.yield"]


def is_contraction(op: Operation) -> bool:
    """sum over (a * b) of two distinct mapped operands, possibly cast first; at least one reduction dimension, and one of the result's that a
    single operand has: where both are read at the same points there is nothing to reuse, and it is a reduction like any other."""
    if op.name != "tensor.generic" or op["reductions"] == 0 or op["combine"] != ("sum",) or len(op.operands) != 2:
        return False
    if any(m is None for m in op["maps"]) or op.attributes.get(PLAIN):
        return False
    product = op.body.terminator.operands[0].defining_op
    if product is None or product.name != "arith.mul":
        return False
    sources = []
    for v in product.operands:
        while v.defining_op is not None and v.defining_op.name == "arith.cast":
            v = v.defining_op.operands[0]
        sources.append(v)
    if set(sources) != set(op.body.args) or len(body_ops(op)) != 1 + sum(o.name == "arith.cast" for o in body_ops(op)):
        return False
    reads = [{s for e in m for s in free_symbols(e)} for m in op["maps"]]
    own = {f"d{i}" for i in range(len(op["dims"]) - op["reductions"])} & (reads[0] ^ reads[1])
    return bool(own) or all(n == 1 for n in op["dims"][:len(op["dims"]) - op["reductions"]])


def plain_dims(m: Sequence[Dim]) -> list[int] | None:
    """The dimension numbers of a map made of distinct plain dims; None for any other map."""
    found = []
    for e in m:
        text = str(e)
        if not (isinstance(e, Expr) and text[0] == "d" and text[1:].isdigit()):
            return None
        found.append(int(text[1:]))
    return found if len(set(found)) == len(found) else None


def composed_map(outer: Sequence[Dim], inner: Sequence[Dim], bounds: Bounds) -> tuple[Dim, ...]:
    """The map p -> inner(outer(p)): `inner` reads at its d_j, which are the expressions `outer[j]`."""
    env = {f"d{j}": e for j, e in enumerate(outer)}
    return tuple(simplify(substitute(e, env), bounds) for e in inner)


def reshape_like(m: Sequence[Dim], dims: Sequence[Dim], shape: Sequence[Dim]) -> bool:
    """True if reading `shape` through `m` from the space `dims` visits every element once, in row-major order."""
    still: dict[str, Dim] = {f"d{i}": 0 for i, size in enumerate(dims) if size == 1}
    if product(dims) != product(shape):
        return False
    from_map = substitute(simplify(contiguous_linear(m, shape), space_bounds(dims)), still)
    return from_map == substitute(contiguous_linear(identity_map(len(dims)), dims), still)


def rebuild(op: Operation, builder: Builder, operands: Sequence[Value], maps: Sequence[Any], fills: Sequence[Any], dims: Sequence[Dim],
            index_map: Mapping[int, Dim] | None = None, reductions: int | None = None) -> Operation:
    """A copy of a tensor.generic in another iteration space: same body, new operands, maps and dims.

    `index_map` gives for each old dimension its expression in the new ones, for the body's `tensor.index`.
    """
    n = op["reductions"] if reductions is None else reductions
    block = Block([v.type if m is None else ScalarType(element_type(v.type)) for v, m in zip(operands, maps, strict=True)])
    renamed: dict[Value, Value] = dict(zip(op.body.args, block.args, strict=True))
    _copy_body(op, Builder(block, None, op.location), renamed, index_map, space_bounds(dims))
    Builder(block, None, op.location).create("tensor.yield", [renamed[v] for v in op.body.terminator.operands])
    attrs = {k: v for k, v in op.attributes.items() if k not in ("dims", "maps", "fills", "reductions")}
    attrs |= {"dims": tuple(dims), "maps": tuple(maps)}
    if n:
        attrs["reductions"] = n
    if any(f is not None for f in fills):
        attrs["fills"] = tuple(fills)
    shape = tuple(dims[:len(dims) - n])
    types = [TensorType(shape, element_type(r.type)) for r in op.results]
    with builder.at(op.location):
        made = builder.create("tensor.generic", operands, attrs, types, [Region([block])])
    for old, new in zip(op.results, made.results, strict=True):
        new.name = old.name
    return made


def _copy_body(op: Operation, builder: Builder, renamed: dict[Value, Value], index_map: Mapping[int, Dim] | None, bounds: Bounds) -> None:
    """Copies the ops of a body at the builder's point; `renamed` maps its arguments and learns its values."""
    for inner in body_ops(op):
        if inner.name == "tensor.index" and index_map is not None:
            renamed[inner.result] = index_value(builder, simplify(index_map[inner["dim"]], bounds), inner)
            continue
        builder.insert(inner.clone(renamed))


def index_value(b: Builder, e: Dim, like: Operation, dims: Sequence[Value] | None = None) -> Value:
    """The i64 value of an index expression over d0, d1, ... inside a body: positions there, or the values `dims`."""
    def leaf(name: str) -> Value:
        if name[0] == "d" and name[1:].isdigit():
            if dims is not None:
                return dims[int(name[1:])]
            return b.op("tensor.index", type=i64, dim=int(name[1:]))
        return b.op("tensor.sym", type=i64, expr=sym(name))

    names = {"add": "add", "mul": "mul", "floordiv": "floordiv", "mod": "mod", "max": "max", "min": "min"}
    with b.at(like.location):
        return fold(e, leaf, lambda n: b.constant(n, i64.dtype), {k: (lambda x, y, n=n: b.arith(n, x, y)) for k, n in names.items()})


def inline_into(consumer: Operation, producer: Operation) -> Operation:
    """Merges a pointwise producer into a structured consumer that reads its results through maps, and replaces the consumer.

    Every read of a producer result must be in bounds (no fill). The producer itself stays (dead if it has no other use).
    """
    lead = 1 if consumer.name == "tensor.scatter" else 0  # init is an operand without a map
    bounds = map_bounds(consumer)
    operands: list[Value] = []
    maps: list[Any] = []
    fills: list[Any] = []
    block = Block()
    inner = Builder(block, None, consumer.location)
    renamed: dict[Value, Value] = {}
    seen: dict[Any, Value] = {}

    def argument(v: Value, m: Any, fill: Any) -> Value:
        key = (v, m, repr(fill))
        if key not in seen:
            operands.append(v)
            maps.append(m)
            fills.append(fill)
            seen[key] = block.add_arg(v.type if m is None else ScalarType(element_type(v.type)))
        return seen[key]

    copies: dict[Any, dict[Value, Value]] = {}
    pending: list[tuple[Any, Value, int]] = []
    for i, (v, m, arg) in enumerate(zip(consumer.operands[lead:], consumer["maps"], consumer.body.args, strict=True)):
        if v.defining_op is producer and m is not None:
            assert fill_of(consumer, i) is None, "a padded read cannot be inlined"
            pending.append((m, arg, producer.results.index(v)))  # type: ignore[arg-type]
        else:
            renamed[arg] = argument(v, m, fill_of(consumer, i))
    for m, wanted, which in pending:
        if m not in copies:
            env = dict(enumerate(m))
            local: dict[Value, Value] = {}
            for k, (pv, pm, parg) in enumerate(zip(producer.operands, producer["maps"], producer.body.args, strict=True)):
                local[parg] = argument(pv, None if pm is None else composed_map(m, pm, bounds), fill_of(producer, k))
            _copy_body(producer, inner, local, env, bounds)
            copies[m] = local
        renamed[wanted] = copies[m][producer.body.terminator.operands[which]]
    for op in body_ops(consumer):
        inner.insert(op.clone(renamed))
    inner.create("tensor.yield", [renamed.get(v, v) for v in consumer.body.terminator.operands])
    attrs = {k: v for k, v in consumer.attributes.items() if k not in ("maps", "fills")} | {"maps": tuple(maps)}
    if any(f is not None for f in fills):
        attrs["fills"] = tuple(fills)
    made = Builder.before_op(consumer).create(consumer.name, [*consumer.operands[:lead], *operands], attrs,
                                              [r.type for r in consumer.results], [Region([block])])
    for old, new in zip(consumer.results, made.results, strict=True):
        new.name = old.name
        old.replace_all_uses_with(new)
    consumer.erase()
    return made


def inline_padded(consumer: Operation, i: int) -> Operation:
    """Merges the pointwise maker of operand i, which the pointwise `consumer` may read out of bounds, into it, and replaces the consumer: where
    a read is out of bounds the fill is chosen, whatever the maker's own operands (which are read with a fill of 0) give there."""
    v, m, fill = consumer.operands[i], consumer["maps"][i], fill_of(consumer, i)
    producer, bounds = v.defining_op, map_bounds(consumer)
    assert producer is not None and isinstance(v.type, TensorType)
    count = len(producer.operands)
    operands, maps = list(consumer.operands), list(consumer["maps"])
    fills = [fill_of(consumer, j) for j in range(len(operands))]
    operands[i:i + 1] = producer.operands
    maps[i:i + 1] = [composed_map(m, pm, bounds) for pm in producer["maps"]]
    fills[i:i + 1] = [None if fill is None else 0] * count
    block = Block([ScalarType(element_type(x.type)) for x in operands])
    b = Builder(block, None, consumer.location)
    local: dict[Value, Value] = dict(zip(producer.body.args, block.args[i:i + count], strict=True))
    _copy_body(producer, b, local, dict(enumerate(m)), bounds)
    y = local[producer.body.terminator.operands[producer.results.index(v)]]  # type: ignore[arg-type]
    if fill is not None:
        for e, size in zip(m, v.type.shape, strict=True):
            for low, high in ((e, size), (-1, e)):  # -1 < e < size
                if not known_less(low, high, bounds):
                    sides = [x if isinstance(x, int) else index_value(b, x, consumer) for x in (low, high)]
                    y = b.arith("select", b.arith("lt", *sides), y, fill)  # type: ignore[arg-type]
    outer = [*block.args[:i], y, *block.args[i + count:]]
    renamed: dict[Value, Value] = dict(zip(consumer.body.args, outer, strict=True))
    _copy_body(consumer, b, renamed, None, bounds)
    b.create("tensor.yield", [renamed[x] for x in consumer.body.terminator.operands])
    attrs = {**{k: x for k, x in consumer.attributes.items() if k not in ("maps", "fills")}, "maps": tuple(maps)}
    if any(f is not None for f in fills):
        attrs["fills"] = tuple(fills)
    made = Builder.before_op(consumer).create("tensor.generic", operands, attrs, [r.type for r in consumer.results], [Region([block])])
    for old, new in zip(consumer.results, made.results, strict=True):
        new.name = old.name
        old.replace_all_uses_with(new)
    consumer.erase()
    return made


def inline_into_gather(consumer: Operation, producer: Operation) -> Operation:
    """Replaces `tensor.extract`s of a pointwise producer's result by extracts of what the producer reads and a copy of its body, and replaces the
    consumer. Its fills stay; the producer's operands have none and are all mapped."""
    gathered = {i for i, v in enumerate(consumer.operands) if v.defining_op is producer and consumer["maps"][i] is None}
    kept = [i for i in range(len(consumer.operands)) if i not in gathered]
    operands = [consumer.operands[i] for i in kept] + list(producer.operands)
    maps = [consumer["maps"][i] for i in kept] + [None] * len(producer.operands)
    fills = [fill_of(consumer, i) for i in kept] + [None] * len(producer.operands)
    block = Block([v.type if m is None else ScalarType(element_type(v.type)) for v, m in zip(operands, maps, strict=True)])
    renamed: dict[Value, Value] = {consumer.body.args[i]: block.args[k] for k, i in enumerate(kept)}
    sources = block.args[len(kept):]
    b = Builder(block, None, consumer.location)
    for op in body_ops(consumer):
        which = op.operands[0].index if op.name == "tensor.extract" and op.operands[0].defining_op is None else -1  # type: ignore[attr-defined]
        if which not in gathered:
            b.insert(op.clone(renamed))
            continue
        indices = [renamed[v] for v in op.operands[1:]]
        local: dict[Value, Value] = {}
        for v, m, arg in zip(sources, producer["maps"], producer.body.args, strict=True):
            at = [index_value(b, e, op, indices) for e in m]
            local[arg] = b.create("tensor.extract", [v, *at], {"check": op["check"] and bool(at)}, [ScalarType(element_type(v.type))]).result
        for inner in body_ops(producer):
            local[inner.result] = indices[inner["dim"]] if inner.name == "tensor.index" else b.insert(inner.clone(local)).result
        renamed[op.result] = local[producer.body.terminator.operands[producer.results.index(consumer.operands[which])]]  # type: ignore[arg-type]
    b.create("tensor.yield", [renamed[v] for v in consumer.body.terminator.operands])
    attrs = {k: v for k, v in consumer.attributes.items() if k not in ("maps", "fills")} | {"maps": tuple(maps)}
    if any(f is not None for f in fills):
        attrs["fills"] = tuple(fills)
    made = Builder.before_op(consumer).create(consumer.name, operands, attrs, [r.type for r in consumer.results], [Region([block])])
    for old, new in zip(consumer.results, made.results, strict=True):
        new.name = old.name
        old.replace_all_uses_with(new)
    consumer.erase()
    return made


def in_order(t: TensorType, order: list[int]) -> TensorType:
    """The type laid out densely with its dimensions from outermost to innermost in `order`."""
    strides: list[Dim] = [0] * t.rank
    for k, d in enumerate(order):
        strides[d] = product(t.shape[x] for x in order[k + 1:])
    return t.with_strides(tuple(strides))


def constant_values(func: Operation) -> set[Value]:
    """Values that depend on parameters and constants alone."""
    known: set[Value] = {a for a, attrs in zip(func.body.args, func["arg_attrs"] or ({},) * len(func.body.args), strict=True)
                         if attrs.get("kind") == "param"}
    assigned = {op.operands[0] for op in func.body if op.name == "tensor.assign"}
    known -= assigned
    for op in func.body:
        if op.name in ("tensor.generic", "tensor.constant") and op.operands and all(v in known for v in op.operands):
            known.update(op.results)
    return known


def uses_dims(op: Operation) -> set[int]:
    """Dimensions whose position the body asks for (tensor.index)."""
    return {o["dim"] for o in op.body if o.name == "tensor.index"}


def tap_dims(m: Sequence[Dim]) -> list[int] | None:
    """The dims that an operand is read along, each by itself (backwards or in steps, too) and none twice; None if it is read in another way."""
    found: list[int] = []
    for e in m:
        named = free_symbols(e)
        if not named:
            continue
        d = next(iter(named))
        if len(named) != 1 or d[0] != "d" or not d[1:].isdigit() or split_linear(e, d) is None:
            return None
        found.append(int(d[1:]))
    return found if len(set(found)) == len(found) else None


def windowed_operand(op: Operation) -> int | None:
    """The operand of a contraction that is read as a convolution reads its input: at a parallel and a shorter summed dimension together (in that
    of a weight's gradient the summed one is the longer), or, without a window, in a layout with a summed dimension innermost that is not its
    last. The other operand is read at each of its dims by itself."""
    parallel = len(parallel_dims(op))
    for i in range(2):
        t = op.operands[i].type
        if tap_dims(op["maps"][1 - i]) is None or not isinstance(t, TensorType):
            continue
        reads = [{int(s[1:]) for s in free_symbols(e) if s[0] == "d" and s[1:].isdigit()} for e in op["maps"][i]]
        windows = [(op["dims"][min(r)], op["dims"][max(r)]) for r in reads if len(r) == 2 and min(r) < parallel <= max(r)]
        if windows:
            if all(isinstance(n, int) for w in windows for n in w) and prod(w[0] for w in windows) > prod(w[1] for w in windows):
                return i
            continue
        inner = [r for r, stride in zip(reads, t.layout, strict=True) if stride == 1]
        if t.rank > 2 and t.layout[-1] != 1 and len(inner) == 1 and inner[0] and min(inner[0]) >= parallel:
            return i
    return None
