"""What a table row works with: the node's types, conversions of arguments, and short ways to make graph ops.

A row is a function `lower(c, *args, **kwargs)`: `c` is the `Context`, the rest are the operator's schema arguments with
defaults filled in, where tensors are `Value`s, sizes are `Dim`s and other Python values are themselves.
Methods infer result types from operands by numpy's rules, so that a row reads like the formula it implements.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from ..ir.builder import Builder
from ..ir.core import Value
from ..ir.dialects.arith import BY_NAME
from ..ir.expr import Dim, Expr, product
from ..ir.ranges import known_nonnegative
from ..ir.types import DTYPES, DType, TensorType
from .dtypes import FROM_TORCH, TO_TORCH, from_torch
from .errors import Unsupported
from .scalars import lower_number
from .symbols import SymbolTable

__all__ = ["Context", "Number", "SymScalar", "fits", "like", "typeof"]

I1, I64, F32, F64 = (DTYPES[n] for n in ("i1", "i64", "f32", "f64"))
Number = bool | int | float


@dataclass(frozen=True)
class SymScalar:
    """A symbolic float, bool or integer that is no polynomial of sizes: the torch.Sym* value itself."""

    value: Any


class Context:
    """Builds the graph ops of one FX node at a time; `node` and `val` (its meta value) change from node to node."""

    def __init__(self, builder: Builder, symbols: SymbolTable):
        self.b = builder
        self.symbols = symbols
        self.node: fx.Node = None  # type: ignore[assignment]  # set by the importer before any row runs
        self.val: Any = None
        self.numbers: dict[str, Value] = {}  # symbols that are no sizes -> the 0-d tensors that hold them
        self.closed = False  # set at the results: from there on, nothing is computed
        self.defined: set[str] = set()  # symbols whose values are known at this point: arguments, then results of externs

    # -- types of the node

    def type_of(self, fake: torch.Tensor) -> TensorType:
        """The type of a fake tensor, without its strides."""
        return TensorType(self.dims(fake.shape), from_torch(fake.dtype))

    def fake(self, i: int | None = None) -> torch.Tensor:
        """The fake tensor that the node gives, or the i-th of several."""
        found = self.val if i is None and isinstance(self.val, torch.Tensor) else self.val[i or 0]
        if not isinstance(found, torch.Tensor):
            raise Unsupported("the result is not a tensor")
        return found

    def argument(self, i: int) -> torch.Tensor:
        """The fake tensor of the node's i-th argument, for its strides and device."""
        given: Any = self.node.args[i]
        return given.meta["val"]

    def out(self, i: int | None = None) -> TensorType:
        return self.type_of(self.fake(i))

    @property
    def shape(self) -> tuple[Dim, ...]:
        return self.out().shape

    @property
    def dtype(self) -> DType:
        return self.out().dtype

    # -- scalars and sizes

    def dim(self, size: Any) -> Dim:
        return self.symbols.dim(size)

    def dims(self, sizes: Sequence[Any]) -> tuple[Dim, ...]:
        """Sizes or strides of a tensor."""
        return tuple(self._size(s) for s in sizes)

    def _size(self, size: Any) -> Dim:
        """As `dim`; a size that is computed from a float in the data (`int(x.sum().item())`) becomes a symbol, read when it is computed."""
        try:
            return self.dim(size)
        except Unsupported:
            if self.closed or not isinstance(size, torch.SymInt) or not any(s.name in self.numbers for s in size.node.expr.free_symbols):
                raise
        value = self.number(SymScalar(size))
        name = self.symbols.define(size)
        self.b.create("graph.extern", [value], {"target": "aten._local_scalar_dense.default", "args": ({"operand": 0},), "result_kinds": ("int",),
                                                "reason": "a size read from data", "defines": {name: (0, -1)}}, [value.type])
        self.defined.add(name)
        return self.dim(size)

    def axis(self, dim: int, rank: int) -> int:
        """`dim` counted from the front; 0-d tensors have the dimensions -1 and 0, as in torch."""
        return dim % max(rank, 1)

    def axes(self, dims: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
        """Dimensions counted from the front, ascending; none or an empty list stands for all."""
        if rank == 0:
            return ()
        if dims is None or (not isinstance(dims, int) and not len(dims)):
            return tuple(range(rank))
        return tuple(sorted({d % rank for d in ((dims,) if isinstance(dims, int) else dims)}))

    def positive(self, e: Dim) -> bool:
        """True if `e` >= 0 is certain for the ranges of the symbols."""
        return known_nonnegative(e) or self.symbols.nonnegative(e)

    def index(self, i: Dim, size: Dim) -> Dim:
        """An element's index, negative ones counted from the end. Unsupported if its sign is unknown."""
        if isinstance(i, int):
            return i + size if i < 0 else i
        if self.positive(i):
            return i
        if self.positive(-i - 1):
            return i + size
        raise Unsupported(f"the sign of the index '{i}' is unknown")

    def scalar(self, x: Any, dtype: DType) -> Value:
        """A 0-d tensor of `dtype`: from a Python number, a size, a symbolic number, or a tensor (cast)."""
        if isinstance(x, Value):
            return self.cast(x, dtype)
        if isinstance(x, Expr):
            return self.cast(self.b.op("graph.sym", type=TensorType((), I64), expr=x), dtype)
        if isinstance(x, SymScalar):
            return self.cast(self.number(x), dtype)
        return self.full((), x, dtype)

    def number(self, x: SymScalar) -> Value:
        """A symbolic number as a 0-d tensor: i64, f64 or i1."""
        kind = {torch.SymInt: I64, torch.SymFloat: F64, torch.SymBool: I1}[type(x.value)]
        known = self.numbers.get(str(x.value.node.expr))
        if known is not None:
            return self.cast(known, kind)
        return self.cast(lower_number(self, x.value.node.expr), kind)

    def full(self, shape: Sequence[Dim], value: Number, dtype: DType) -> Value:
        if isinstance(value, complex) or dtype.kind == "complex":
            raise Unsupported("complex numbers")
        if dtype.is_integer and isinstance(value, float) and value != value // 1:
            value = int(value)
        converted = {"float": float, "bool": bool}.get(dtype.kind, int)(value)
        return self.b.op("graph.full", type=TensorType(tuple(shape), dtype), value=converted)

    def constant_of(self, v: Any) -> Number | None:
        """The number that a value is known to hold in every element; None if it is not known."""
        if isinstance(v, (bool, int, float)):
            return v
        if not isinstance(v, Value):
            return None
        op = v.defining_op
        while op is not None and op.name in ("graph.expand", "graph.reshape", "graph.permute", "graph.slice"):
            op = op.operands[0].defining_op
        return op["value"] if op is not None and op.name == "graph.full" else None

    def promote(self, *xs: Any) -> DType:
        """The element type to which torch promotes the operands (tensors over 0-d tensors over Python numbers)."""
        groups: list[list[torch.dtype]] = [[], [], []]
        for x in xs:
            if isinstance(x, Value):
                groups[0 if typeof(x).rank else 1].append(TO_TORCH[typeof(x).dtype])
            elif isinstance(x, bool):
                groups[2].append(torch.bool)
            elif isinstance(x, (int, Expr)):
                groups[2].append(torch.int64)
            elif isinstance(x, (float, SymScalar)):
                groups[2].append(torch.get_default_dtype())
            else:
                raise Unsupported(f"an operand of type {type(x).__name__}")
        result: torch.dtype | None = None
        for group in groups:
            if not group:
                continue
            here = group[0]
            for t in group[1:]:
                here = torch.promote_types(here, t)
            if result is None or _category(here) > _category(result):
                result = here if result is None else torch.promote_types(result, here)
        assert result is not None
        return FROM_TORCH[result]

    # -- elementwise

    def cast(self, x: Value, dtype: DType) -> Value:
        """`x` converted; anything but zero is true, as in torch."""
        t = typeof(x)
        if t.dtype == dtype:
            return x
        if "complex" in (t.dtype.kind, dtype.kind):
            raise Unsupported("complex numbers")
        if dtype == I1:
            return self.ew("ne", x, 0)
        return self.b.op("graph.cast", x, type=TensorType(t.shape, dtype))

    def ew(self, name: str, *operands: Any, **attrs: Any) -> Value:
        """`graph.<name>` of broadcasting operands of one element type; numbers and sizes take the type of the tensors."""
        typed = [v for v in (operands[1:] if name in ("select", "require") else operands) if isinstance(v, Value)]
        dtype = typeof(typed[0]).dtype
        if dtype.kind == "complex":
            raise Unsupported("complex numbers")
        values = [v if isinstance(v, Value) else self.scalar(v, dtype) for v in operands]
        values, shape = self._broadcast(values)
        row = BY_NAME.get(name)
        result = I1 if row is not None and row.result == "i1" else dtype
        return self.b.op(f"graph.{name}", *values, type=TensorType(shape, result), **attrs)

    def _broadcast(self, values: list[Value]) -> tuple[list[Value], tuple[Dim, ...]]:
        """The broadcast shape. Sizes that torch has proved equal but that read differently are unified by a reshape."""
        rank = max(typeof(v).rank for v in values)
        shape: list[Dim] = [1] * rank
        for v in values:
            t = typeof(v)
            for j, size in enumerate(t.shape, rank - t.rank):
                if shape[j] == 1 or (isinstance(size, int) and size != 1):
                    shape[j] = size
        matched = []
        for v in values:
            t = typeof(v)
            want = tuple(1 if size == 1 else shape[j] for j, size in enumerate(t.shape, rank - t.rank))
            matched.append(v if want == t.shape else self.reshape(v, want))
        return matched, tuple(shape)

    # -- movement

    def reshape(self, x: Value, shape: Sequence[Dim]) -> Value:
        t = typeof(x)
        if t.shape == tuple(shape):
            return x
        return self.b.op("graph.reshape", x, type=TensorType(tuple(shape), t.dtype))

    def permute(self, x: Value, perm: Sequence[int]) -> Value:
        t = typeof(x)
        if list(perm) == list(range(t.rank)):
            return x
        return self.b.op("graph.permute", x, type=TensorType(tuple(t.shape[p] for p in perm), t.dtype), perm=tuple(perm))

    def transpose(self, x: Value, i: int, j: int) -> Value:
        perm = list(range(typeof(x).rank))
        perm[i], perm[j] = perm[j], perm[i]
        return self.permute(x, perm)

    def expand(self, x: Value, shape: Sequence[Dim]) -> Value:
        t = typeof(x)
        if t.shape == tuple(shape):
            return x
        return self.b.op("graph.expand", x, type=TensorType(tuple(shape), t.dtype))

    def slice(self, x: Value, dim: int, start: Dim, size: Dim, step: int = 1) -> Value:
        """`size` elements of dimension `dim` from `start` on, every `step`-th."""
        t = typeof(x)
        if start == 0 and step == 1 and size == t.shape[dim]:
            return x
        starts: list[Dim] = [0] * t.rank
        steps, shape = [1] * t.rank, list(t.shape)
        starts[dim], steps[dim], shape[dim] = start, step, size
        return self.b.op("graph.slice", x, type=TensorType(tuple(shape), t.dtype), starts=tuple(starts), steps=tuple(steps))

    def remap(self, x: Value, shape: Sequence[Dim], index: Sequence[Dim]) -> Value:
        return self.b.op("graph.remap", x, type=TensorType(tuple(shape), typeof(x).dtype), map=tuple(index))

    def pad(self, x: Value, low: Sequence[Dim], high: Sequence[Dim], value: Number) -> Value:
        t = typeof(x)
        if all(x == 0 for x in (*low, *high)):
            return x
        shape = tuple(a + s + b for a, s, b in zip(low, t.shape, high, strict=True))
        converted = {"float": float, "bool": bool}.get(t.dtype.kind, int)(value)
        return self.b.op("graph.pad", x, type=TensorType(shape, t.dtype), low=tuple(low), high=tuple(high), value=converted)

    def cat(self, xs: Sequence[Value], dim: int) -> Value:
        if len(xs) == 1:
            return xs[0]
        shape = list(typeof(xs[0]).shape)
        for x in xs[1:]:
            shape[dim] = shape[dim] + typeof(x).shape[dim]
        return self.b.op("graph.cat", *xs, type=TensorType(tuple(shape), typeof(xs[0]).dtype), dim=dim)

    def iota(self, size: Dim, dtype: DType = I64, start: Dim = 0, step: Dim = 1) -> Value:
        extra: dict[str, Any] = {**({"start": start} if start != 0 else {}), **({"step": step} if step != 1 else {})}
        return self.b.op("graph.iota", type=TensorType((size,), dtype), **extra)

    def positions(self, shape: Sequence[Dim], dim: int) -> Value:
        """i64 positions along `dim`, of a shape that broadcasts against `shape`."""
        return self.reshape(self.iota(shape[dim]), [s if j == dim else 1 for j, s in enumerate(shape)])

    # -- contractions and reductions

    def matmul(self, a: Value, b: Value) -> Value:
        ta, tb = typeof(a), typeof(b)
        if ta.shape[:-2] != tb.shape[:-2] or ta.shape[-1] != tb.shape[-2]:  # equal for torch, written differently
            b = self.reshape(b, (*ta.shape[:-2], ta.shape[-1], tb.shape[-1]))
        return self.b.op("graph.matmul", a, b, type=TensorType((*ta.shape[:-1], tb.shape[-1]), ta.dtype))

    def reduce(self, name: str, x: Value, dims: Sequence[int], keepdim: bool = False, dtype: DType | None = None) -> Value:
        """`graph.<name>` over `dims` (ascending, from the front); an identity when there are none."""
        t = typeof(x)
        if not dims and name not in ("argmax", "argmin"):
            return x
        shape = tuple(1 if i in dims else s for i, s in enumerate(t.shape) if keepdim or i not in dims)
        extra = {"keepdim": True} if keepdim else {}
        return self.b.op(f"graph.{name}", x, type=TensorType(shape, dtype or t.dtype), dims=tuple(dims), **extra)

    def numel(self, x: Value, dims: Sequence[int]) -> Dim:
        return product(typeof(x).shape[d] for d in dims)


def fits(x: Any, dtype: DType) -> bool:
    """True if the Python number is represented exactly by a 16-bit float type; True for all other types."""
    if not isinstance(x, (int, float)) or dtype.name not in ("bf16", "f16"):
        return not isinstance(x, Expr) or dtype.name not in ("bf16", "f16")
    value = float(x)
    if value != value or abs(value) == float("inf"):
        return True
    if dtype.name == "f16":
        try:
            return bool(struct.unpack("<e", struct.pack("<e", value))[0] == value)
        except OverflowError:
            return False
    try:
        bits = struct.pack("<f", value)
    except OverflowError:
        return False
    return bool(struct.unpack("<f", bits)[0] == value) and bits[:2] == b"\0\0"


def typeof(v: Value) -> TensorType:
    """The type of a value; every value of a graph is a tensor."""
    assert isinstance(v.type, TensorType)
    return v.type


def like(v: Value) -> TensorType:
    """The type of a new tensor with the shape and element type of `v`: row-major, whatever the layout of `v` is."""
    return typeof(v).with_strides(None)


def _category(t: torch.dtype) -> int:
    return 3 if t.is_complex else 2 if t.is_floating_point else 0 if t == torch.bool else 1
