"""Writing the body of a kernel: loads, stores and arithmetic on tiles at symbolic positions.

While a kernel is built, positions are expressions over *loop variables* (named L0, L1, ...; each an SSA index value), size symbols, and
t0, t1, the position within a tile. `Emitter` turns such an expression into the operands and attributes that tile ops want.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...ir import Block, Builder, Dim, DType, Operation, Region, ScalarType, TensorType, TileType, Type, Value, element_type, sym
from ...ir.builder import arith_result_type, with_tile_shape
from ...ir.expr import free_symbols, mod, product, substitute
from ...ir.ranges import Bounds, known_less, known_nonnegative, lower_bound, simplify
from ...ir.types import DTYPES, index
from ..structured import identity_of

__all__ = ["COMBINE_OPS", "Emitter", "Pair", "emit_extract", "identity_of", "tile_or_scalar"]

Pair = tuple[Dim, Dim]
COARSE = frozenset({"arith.exp", "arith.exp2", "arith.sigmoid"})
"""Functions for which GPUs have a fast form that is wrong nowhere by more than 16-bit rounding."""
NARROW = COARSE | {"arith.erf", "arith.div"}
"""On GPUs, of kernels whose floats in memory have 16 bits; divisions are those of many numbers by one."""
FAST = COARSE | {"arith.tanh", "arith.erf", "arith.log"}
"""Functions of which backends may have a cheaper form (`fast_math`)."""
COMBINE_OPS = {"sum": "add", "prod": "mul", "max": "max", "min": "min", "any": "or", "all": "and"}


def tile_or_scalar(shape: Sequence[int], dtype: DType) -> Type:
    return TileType(tuple(shape), dtype) if shape else ScalarType(dtype)


@dataclass
class Emitter:
    """An insertion point inside a kernel, the loop variables in scope, and the tile shape [t0, t1]."""

    builder: Builder
    shape: tuple[int, int]
    symbols: Bounds
    variables: dict[str, Value] = field(default_factory=dict)
    ranges: dict[str, tuple[Dim | None, Dim | None]] = field(default_factory=dict)
    coarse: frozenset[str] = frozenset()  # functions that may be a few float32 ulp off

    def fresh(self, value: Value, low: Dim | None, high: Dim | None) -> Dim:
        """A new loop variable for `value`, known to lie in [low, high] (None: nothing is known)."""
        name = f"L{len(self.variables)}"
        self.variables[name] = value
        self.ranges[name] = (low, high)
        return sym(name)

    def named(self, e: Dim, high: Dim | None) -> Dim:
        """A loop variable that holds the value of `e`, in [0, high]: computed once, and short in what is built from it."""
        operands, names = self._operands([e])
        made = self.builder.create("tile.index", operands, {"expr": substitute(e, names), "shape": ()}, [index])
        return self.fresh(made.result, 0, high)

    def bounds(self) -> dict[str, tuple[Dim | None, Dim | None]]:
        return {**self.symbols, **self.ranges, "t0": (0, self.shape[0] - 1), "t1": (0, self.shape[1] - 1)}

    # -- positions ----------------------------------------------------------------------------------------------------

    def _operands(self, exprs: Sequence[Dim], extra: Sequence[Value] = ()) -> tuple[list[Value], dict[str, Dim]]:
        """Index operands for the loop variables used in `exprs`, after the `extra` ones, and their renaming to i0, i1, ..."""
        used = sorted({s for e in exprs for s in free_symbols(e) if s in self.variables}, key=lambda s: int(s[1:]))
        names: dict[str, Dim] = {s: sym(f"i{k + len(extra)}") for k, s in enumerate(used)}
        return [*extra, *(self.variables[s] for s in used)], names

    def tile_shape(self, exprs: Sequence[Dim]) -> tuple[int, ...]:
        """[] when the expressions do not depend on the position in the tile, else 1 for each dimension they ignore."""
        free = set().union(*(free_symbols(e) for e in exprs)) if exprs else set()
        if not free & {"t0", "t1"}:
            return ()
        return (self.shape[0] if "t0" in free else 1, self.shape[1] if "t1" in free else 1)

    def needed(self, pairs: Sequence[Pair]) -> list[Pair]:
        """The pairs that are not proved by the ranges in scope."""
        b = self.bounds()
        return [(x, y) for x, y in dict.fromkeys(pairs) if not known_less(x, y, b)]

    # -- memory -------------------------------------------------------------------------------------------------------

    def load(self, buffer: Value, offset: Dim, mask: Sequence[Pair] = (), low: Sequence[Dim] = (), other: Any = 0,
             extra: Sequence[Value] = (), extra_shape: tuple[int, ...] = (), check: bool = False,
             matrix: tuple[int, ...] = (), corner: tuple[Dim, ...] = (), streamed: bool = False) -> Value:
        """Reads at `offset`; `extra` are index tiles seen as i0, i1, ... in the expressions. `matrix`, `corner` and `streamed`: as in `tile.load`."""
        exprs = [offset, *(e for p in mask for e in p), *low, *corner]
        operands, names = self._operands(exprs, extra)
        shape = self.tile_shape([offset, *(p[0] for p in mask), *low])
        if extra_shape:
            shape = tuple(max(a, b) for a, b in zip(shape or (1, 1), extra_shape, strict=True))
        dtype = element_type(buffer.type)
        attrs: dict[str, Any] = {"offset": substitute(offset, names), "shape": shape}
        if mask:
            attrs["mask"] = tuple((substitute(a, names), substitute(b, names)) for a, b in mask)
        if low:
            attrs["mask_low"] = tuple(substitute(e, names) for e in low)
        if mask or low:
            attrs["other"] = _scalar(other, dtype)
        if check:
            attrs["check"] = True
        if matrix:
            attrs |= {"matrix": matrix, "corner": tuple(substitute(x, names) for x in corner)}
        if streamed:
            attrs["streamed"] = True
        return self.builder.create("tile.load", [buffer, *operands], attrs, [tile_or_scalar(shape, dtype)]).result

    def store(self, buffer: Value, value: Value, offset: Dim, mask: Sequence[Pair] = (), atomic: str = "", extra: Sequence[Value] = ()) -> None:
        """Writes `value`, broadcast to the tile that `offset` spans."""
        operands, names = self._operands([offset, *(e for p in mask for e in p)], extra)
        shape = self.tile_shape([offset, *(p[0] for p in mask)])
        if extra and isinstance(value.type, TileType):
            shape = value.type.shape  # type: ignore[assignment]  # tiles have constant shapes
        if shape and (not isinstance(value.type, TileType) or value.type.shape != shape):
            value = self.broadcast(value, shape)
        elif not shape and isinstance(value.type, TileType):
            shape = value.type.shape  # type: ignore[assignment]  # tiles have constant shapes
        attrs: dict[str, Any] = {"offset": substitute(offset, names)}
        if mask:
            attrs["mask"] = tuple((substitute(a, names), substitute(b, names)) for a, b in mask)
        if atomic:
            attrs["atomic"] = atomic
        self.builder.create("tile.store", [buffer, value, *operands], attrs)

    def prefetch(self, buffer: Value, offset: Dim, mask: Sequence[Pair] = (), length: int = 0, each: bool = False,
                 once: bool = False) -> None:
        """Asks for the cache line at `offset`, which may lie outside the buffer, once per unrolled round or in `each` of its steps; or for `length`
        bytes from each place of the tile on. `once`: nothing reads the line again."""
        operands, names = self._operands([offset, *(x for p in mask for x in p)])
        attrs: dict[str, Any] = {"offset": substitute(offset, names)}
        if length:
            attrs |= {"shape": self.tile_shape([offset]), "bytes": length}
        if each:
            attrs["each"] = True
        if once:
            attrs["once"] = True
        if mask:
            attrs["mask"] = tuple((substitute(a, names), substitute(b, names)) for a, b in mask)
        self.builder.create("tile.prefetch", [buffer, *operands], attrs)

    def broadcast(self, value: Value, shape: tuple[int, ...]) -> Value:
        return self.builder.op("tile.full", value, type=TileType(shape, element_type(value.type)))

    # -- values -------------------------------------------------------------------------------------------------------

    def index_value(self, e: Dim, dtype: DType = DTYPES["i64"]) -> Value:
        """The value of a position expression, as a tile or scalar of `dtype`."""
        operands, names = self._operands([e])
        shape = self.tile_shape([e])
        return self.builder.create("tile.index", operands, {"expr": substitute(e, names), "shape": shape},
                                   [tile_or_scalar(shape, dtype)]).result

    def mask_value(self, pairs: Sequence[Pair]) -> Value | None:
        """An i1 tile of where the pairs hold; None when they hold everywhere."""
        pairs = self.needed(pairs)
        if not pairs:
            return None
        operands, names = self._operands([e for p in pairs for e in p])
        shape = self.tile_shape([e for p in pairs for e in p])
        return self.builder.create("tile.mask", operands, {"mask": tuple((substitute(a, names), substitute(b, names)) for a, b in pairs),
                                                           "shape": shape}, [tile_or_scalar(shape, DTYPES["i1"])]).result

    def arith(self, op: Operation, args: Sequence[Value]) -> Value:
        """A copy of a scalar arith op on tiles, from the Python line that the scalar op came from."""
        types = [v.type for v in args]
        with self.builder.at(op.location if op.location.file else self.builder.location):
            if op.name == "arith.constant":
                return self.builder.create(op.name, (), op.attributes, [op.result.type]).result
            result = with_tile_shape(types, element_type(op.result.type)) if op.name == "arith.cast" else arith_result_type(op.name[6:], types)
            made = self.builder.create(op.name, args, dict(op.attributes), [result])
            if op.name in self.coarse and element_type(result).name == "f32":
                if op.name != "arith.div":
                    made.attributes["_approximate"] = True
                elif _is_wider(args[0], args[1]):
                    made.attributes["_many_by_one"] = True
            return made.result

    def require(self, op: Operation, operands: Sequence[Value], active: Sequence[Pair]) -> Value:
        """The `tensor.require` `op` on tiles (condition, value): only the positions inside of the space count."""
        cond, value = operands
        mask = self.mask_value([p for p in active if free_symbols(p[0]) & {"t0", "t1"}])
        if mask is not None:
            cond = self.builder.arith("or", cond, self.builder.arith("bitnot", mask))
        return self.builder.create("tile.require", [cond, value], dict(op.attributes), [value.type]).result

    # -- loops --------------------------------------------------------------------------------------------------------

    def loop(self, lower: Dim, upper: Dim, step: int, inits: Sequence[Value], body: Any, unroll: int = 1,
             part: str = "", ahead: int = 0) -> list[Value]:
        """`tile.for`; `body(emitter, position, carried)` builds one iteration and returns the carried values."""
        operands, names = self._operands([lower, upper])
        block = Block([index, *(v.type for v in inits)])
        b = self.bounds()
        low = lower if isinstance(lower, int) else lower_bound(lower, b)
        inner = Emitter(Builder(block, None, self.builder.location), self.shape, self.symbols, dict(self.variables), dict(self.ranges),
                        self.coarse)
        whole = mod(upper - lower, step) == 0  # then the last iteration starts a whole step before the end
        position = inner.fresh(block.args[0], 0 if low is None else low, simplify(upper - (step if whole else 1), self.symbols))
        out = body(inner, position, list(block.args[1:]))
        inner.builder.create("tile.yield", out)
        attrs: dict[str, Any] = {"lower": substitute(lower, names), "upper": substitute(upper, names), "step": step, "indices": len(operands)}
        if unroll > 1:
            attrs["unroll"] = unroll
        if part:
            attrs["part"] = part
        if ahead > 1:
            attrs["ahead"] = ahead
        made = self.builder.create("tile.for", [*operands, *inits], attrs, [v.type for v in inits], [Region([block])])
        return list(made.results)


def _is_wider(x: Value, y: Value) -> bool:
    """A tile of which each element of `y` meets many."""
    size = product(x.type.shape) if isinstance(x.type, TileType) else 1
    return isinstance(size, int) and size >= 16 * (product(y.type.shape) if isinstance(y.type, TileType) else 1)  # type: ignore[operator]


def _scalar(value: Any, dtype: DType) -> Any:
    if dtype.is_float:
        return float(value)
    return bool(value) if dtype.kind == "bool" else int(value)


def fill_masks(m: Sequence[Dim], shape: Sequence[Dim], positions: Mapping[str, Dim], bounds: Bounds) -> tuple[list[Pair], list[Dim]]:
    """What must hold for a padded read through map `m` to be inside `shape`: pairs a < b, and expressions >= 0."""
    pairs: list[Pair] = []
    low: list[Dim] = []
    for e, size in zip(m, shape, strict=True):
        at = simplify(substitute(e, positions), bounds)
        if not known_less(at, size, bounds):
            pairs.append((at, size))
        floor = lower_bound(at, bounds)
        if floor is None or not known_nonnegative(floor):
            low.append(at)
    return pairs, low


def emit_extract(e: Emitter, buffer: Value, source: Value, indices: Sequence[Value], check: bool, active: Sequence[Pair]) -> Value:
    """A gather: `source[indices]`, with lanes outside `active` reading element 0."""
    t = source.type
    assert isinstance(t, TensorType)
    mask = e.mask_value([p for p in active if free_symbols(p[0]) & {"t0", "t1"}])
    b = e.builder
    safe = []
    for v in indices:
        if isinstance(v.type, TileType) and mask is not None:
            v = b.arith("select", mask, v, 0)
        safe.append(v)
    offset: Dim = 0
    pairs: list[Pair] = []
    low: list[Dim] = []
    for k, (stride, size) in enumerate(zip(t.layout, t.shape, strict=True)):
        offset = offset + sym(f"i{k}") * stride
        if check:
            pairs.append((sym(f"i{k}"), size))
            low.append(sym(f"i{k}"))
    shapes = [v.type.shape for v in safe if isinstance(v.type, TileType)]
    shape = tuple(max(x) for x in zip(*shapes, strict=True)) if shapes else ()
    return e.load(buffer, offset, pairs, low, 0, extra=safe, extra_shape=shape, check=check)
