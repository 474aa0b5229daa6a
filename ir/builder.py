"""Building IR: an insertion point and short ways to create ops.

    b = Builder.at_end(block)
    y = b.create("arith.mul", [x, x], types=[x.type])          # -> Operation
    y = b.op("graph.matmul", a, c, type=TensorType(...))       # -> its single result
    z = b.arith("add", y, 1.0)                                 # result type and scalar constants inferred
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .core import UNKNOWN, Block, IRError, Location, Operation, Region, Value
from .dialects.arith import BY_NAME
from .types import DTYPES, DType, ScalarType, TensorType, TileType, Type, element_type

__all__ = ["Builder", "arith_result_type", "make_func", "make_module"]


def arith_result_type(name: str, types: Sequence[Type]) -> Type:
    """The result type of `arith.<name>` on operands of `types`: broadcast shape, and i1 for comparisons."""
    row = BY_NAME.get(name)
    dtype = element_type(types[1] if name == "select" else types[0])
    if row is not None and row.result == "i1":
        dtype = DTYPES["i1"]
    return with_tile_shape(types, dtype)


def with_tile_shape(types: Sequence[Type], dtype: DType) -> Type:
    """The broadcast of the tile shapes among `types`, with element type `dtype`; a scalar if there are no tiles."""
    tiles = [t for t in types if isinstance(t, TileType)]
    if not tiles:
        return ScalarType(dtype)
    shape = tuple(max(sizes) for sizes in zip(*(t.shape for t in tiles), strict=True))
    return TileType(shape, dtype)


class Builder:
    """Creates ops at an insertion point, with the current location."""

    def __init__(self, block: Block, before: Operation | None = None, location: Location = UNKNOWN):
        self.block = block
        self.before = before
        self.location = location

    @staticmethod
    def at_end(block: Block, location: Location = UNKNOWN) -> Builder:
        return Builder(block, None, location)

    @staticmethod
    def before_op(op: Operation) -> Builder:
        """Inserts before `op`, with its location."""
        assert op.parent is not None
        return Builder(op.parent, op, op.location)

    @contextmanager
    def at(self, location: Location) -> Iterator[None]:
        """Ops created inside carry `location`."""
        saved, self.location = self.location, location
        try:
            yield
        finally:
            self.location = saved

    def insert(self, op: Operation) -> Operation:
        if self.before is None:
            self.block.append(op)
        else:
            self.block.insert_before(self.before, op)
        return op

    def create(self, name: str, operands: Sequence[Value] = (), attrs: dict[str, Any] | None = None, types: Sequence[Type] = (),
               regions: Sequence[Region] = ()) -> Operation:
        return self.insert(Operation.create(name, operands, attrs, types, regions, self.location))

    def op(self, name: str, *operands: Value, type: Type, **attrs: Any) -> Value:
        """Creates an op with one result and gives the result."""
        return self.create(name, operands, attrs, [type]).result

    # -- scalars and tiles

    def constant(self, value: bool | int | float, dtype: DType) -> Value:
        """An `arith.constant`; `value` is converted to what `dtype` needs."""
        want: Callable[[Any], Any] = {"float": float, "bool": bool}.get(dtype.kind, int)
        return self.op("arith.constant", type=ScalarType(dtype), value=want(value))

    def arith(self, name: str, *operands: Value | bool | int | float) -> Value:
        """`arith.<name>`; Python numbers become constants of the element type of the first value among the operands.

        For "select" the condition does not decide the element type.
        """
        typed = [v for v in (operands[1:] if name == "select" else operands) if isinstance(v, Value)]
        if not typed:
            raise IRError(f"arith.{name} needs at least one value to know its type")
        dtype = element_type(typed[0].type)
        values = [v if isinstance(v, Value) else self.constant(v, dtype) for v in operands]
        return self.op(f"arith.{name}", *values, type=arith_result_type(name, [v.type for v in values]))

    def cast(self, x: Value, dtype: DType) -> Value:
        """`x` converted to `dtype`; `x` itself when it has that type already."""
        if element_type(x.type) == dtype:
            return x
        return self.op("arith.cast", x, type=with_tile_shape([x.type], dtype))

    # -- tensors

    def generic(self, inputs: Sequence[Value], maps: Sequence[Any], dims: Sequence[Any], body: Callable[..., Any], *,
                reductions: int = 0, combine: Sequence[str] = (), fills: Sequence[Any] = (), name: str = "") -> Operation:
        """A `tensor.generic`. `body(builder, *args)` builds the body and returns the value (or values) to yield.

        Result types follow: the parallel part of `dims`, and the yielded element types (i64 for argmax and argmin).
        """
        types = [v.type if m is None else ScalarType(element_type(v.type)) for v, m in zip(inputs, maps, strict=True)]
        block = Block(types)
        inner = Builder(block, None, self.location)
        out = body(inner, *block.args)
        values = tuple(out) if isinstance(out, (tuple, list)) else (out,)
        inner.create("tensor.yield", values)
        shape = tuple(dims[:len(dims) - reductions])
        kinds = tuple(combine) or ("none",) * len(values)
        dtypes = [DTYPES["i64"] if k in ("argmax", "argmin") else element_type(v.type) for k, v in zip(kinds, values, strict=True)]
        attrs: dict[str, Any] = {"dims": tuple(dims), "maps": tuple(None if m is None else tuple(m) for m in maps)}
        if reductions:
            attrs |= {"reductions": reductions, "combine": kinds}
        if any(f is not None for f in fills):
            attrs["fills"] = tuple(fills)
        made = self.create("tensor.generic", inputs, attrs, [TensorType(shape, d) for d in dtypes], [Region([block])])
        if name:
            for r in made.results:
                r.name = name
        return made


def make_module(level: str = "", **attrs: Any) -> tuple[Operation, Block]:
    """An empty module and its block."""
    block = Block()
    return Operation.create("module", (), {**({"level": level} if level else {}), **attrs}, (), [Region([block])]), block


def make_func(block: Block, name: str, arg_types: Sequence[Type], arg_names: Sequence[str] = (), **attrs: Any) -> tuple[Operation, Block]:
    """A function appended to a module's block, and its (still empty) body."""
    body = Block(arg_types, arg_names)
    func = Operation.create("func", (), {"sym_name": name, **attrs}, (), [Region([body])])
    block.append(func)
    return func, body
