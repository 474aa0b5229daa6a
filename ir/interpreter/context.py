"""What every level of the interpreter shares: element types, symbol values, blocks of ops, and errors.

A `Context` runs blocks: `run_block(block, env)` calls the handler of each op with its operands' values, checks the shapes and
element types of the results against the declared ones, and drops values after their last use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..attributes import Dense
from ..core import Block, IRError, Operation, Value
from ..expr import Dim, Expr, evaluate, fold, free_symbols, substitute, sym
from ..ranges import split_linear
from ..types import DType, TensorType, Type
from .arith import SAME_WIDTH_SIGNED, convert

Tensor = torch.Tensor
Handler = Callable[["Context", Operation, list[Any]], Sequence[Any]]

__all__ = ["TORCH_DTYPES", "WIDENED", "Context", "Handler", "Numerics", "affine_index", "bind_shape",
           "evaluate_index", "failure", "flat_take", "to_tensor"]

TORCH_DTYPES: dict[str, torch.dtype] = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "f8e4m3fn": torch.float8_e4m3fn,
    "f8e5m2": torch.float8_e5m2, "i64": torch.int64, "i32": torch.int32, "i16": torch.int16, "i8": torch.int8,
    "u8": torch.uint8, "u16": torch.uint16, "u32": torch.uint32, "u64": torch.uint64, "i1": torch.bool,
    "c64": torch.complex64, "c128": torch.complex128, "index": torch.int64,
}
_BIT_PATTERNS = {"bf16": torch.uint16, "f8e4m3fn": torch.uint8, "f8e5m2": torch.uint8}
WIDENED = frozenset({torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2})
"""Element types whose sums are accumulated in f32."""


def failure(op: Operation, message: str) -> IRError:
    """An error that shows the op (its first line) and the Python line that it came from."""
    text = str(op).split("\n", 1)[0]
    where = f"\n  at {op.location}" if op.location.file else ""
    return IRError(f"{message}\n  in {text[:400]}{where}")


@dataclass(frozen=True)
class Numerics:
    """How element types are represented. With `precision`, every float type is held in that torch dtype.

    With `exact` too, a cast to a narrower float still rounds to that type (the value is then held in `precision`).
    """

    precision: torch.dtype | None = None
    exact: bool = False

    def dtype(self, d: DType) -> torch.dtype:
        """The torch dtype that holds elements of type `d`."""
        return self.precision if self.precision is not None and d.is_float else TORCH_DTYPES[d.name]

    def cast(self, x: Tensor, d: DType) -> Tensor:
        """`x` converted to element type `d`."""
        if self.exact and self.precision is not None and d.is_float and x.is_floating_point():
            x = convert(x, TORCH_DTYPES[d.name])
        return convert(x, self.dtype(d))


def to_tensor(value: Dense) -> Tensor:
    """The torch tensor of a constant."""
    array = np.array(value.to_numpy())  # a writable copy: torch warns about read-only memory
    made = torch.from_numpy(array)
    name = value.dtype.name
    return made.view(_BIT_PATTERNS[name]).view(TORCH_DTYPES[name]) if name in _BIT_PATTERNS else made


def flat_take(flat: Tensor, index: Tensor) -> Tensor:
    """flat[index] for a 1-d `flat` of any element type and an integer `index` of any shape."""
    kind = flat.dtype
    narrow = SAME_WIDTH_SIGNED.get(kind)
    source = flat if narrow is None else flat.view(narrow)
    got = source[index.reshape(-1)].reshape(index.shape)
    return got if narrow is None else got.view(kind)


_INDEX_OPS: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b, "mul": lambda a, b: a * b, "floordiv": lambda a, b: a // b, "mod": lambda a, b: a % b,
    "max": lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
    "min": lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
}


def evaluate_index(ctx: Context, e: Dim, grids: Mapping[str, Tensor]) -> Tensor:
    """The value of an index expression, as an i64 tensor; `grids` (which broadcast) come before the size symbols."""
    if isinstance(e, int):
        return torch.tensor(e)
    value = fold(e, lambda name: grids[name] if name in grids else ctx.dim(sym(name)), lambda n: n, _INDEX_OPS)
    return torch.as_tensor(value)


def affine_index(ctx: Context, index: Sequence[Dim], grids: Mapping[str, Tensor],
                 shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(position in a row-major tensor of `shape`, where all indices are in bounds), broadcast over the grids that `index` uses.

    Positions that are out of bounds are clamped to 0, so that they can be read and then discarded.
    """
    flat, inside = torch.tensor(0), torch.tensor(True)
    for e, n in zip(index, shape, strict=True):
        i = evaluate_index(ctx, e, grids)
        flat = flat * n + i
        inside = inside & (i >= 0) & (i < n)
    return torch.where(inside, flat, 0), inside


def bind_shape(shape: Sequence[Dim], actual: Sequence[int], symbols: MutableMapping[str, int], what: str) -> None:
    """Learns the symbols of `shape` from `actual` sizes; IRError where they disagree.

    A size that is linear in its only unknown symbol determines it; other sizes are checked once their symbols are known.
    """
    if len(shape) != len(actual):
        raise IRError(f"{what} has shape {list(actual)}, but its type says [{', '.join(map(str, shape))}]")
    for size, n in zip(shape, actual):
        if isinstance(size, int):
            continue
        unknown = free_symbols(size) - symbols.keys()
        if len(unknown) != 1:
            continue
        name, = unknown
        parts = split_linear(substitute(size, dict(symbols)), name)
        if parts is None:
            continue
        factor, offset = parts
        if isinstance(factor, int) and isinstance(offset, int) and factor != 0 and (n - offset) % factor == 0:
            symbols[name] = (n - offset) // factor
    for i, (size, n) in enumerate(zip(shape, actual)):
        if free_symbols(size) <= symbols.keys() and evaluate(size, symbols) != n:
            raise IRError(f"{what} has size {n} in dimension {i}, where its type says '{size}'"
                          + (f" = {evaluate(size, symbols)}" if isinstance(size, Expr) else ""))


@dataclass
class Context:
    """The state of one interpretation."""

    handlers: Mapping[str, Handler]
    numerics: Numerics = Numerics()
    symbols: dict[str, int] = field(default_factory=dict)
    kernels: Mapping[str, Operation] = field(default_factory=dict)
    check: bool = False
    assignments: list[tuple[Value, Tensor]] = field(default_factory=list)  # (argument, its new value)
    functions: Mapping[str, Operation] = field(default_factory=dict)

    # -- attributes and types

    def dim(self, e: Dim) -> int:
        """The value of a size expression."""
        if isinstance(e, int):
            return e
        try:
            return int(evaluate(e, self.symbols))
        except KeyError as missing:
            raise IRError(f"the symbol {missing} of '{e}' has no value; give it in `symbols`") from None

    def dims(self, shape: Sequence[Dim]) -> tuple[int, ...]:
        return tuple(self.dim(e) for e in shape)

    def shape(self, t: Type) -> tuple[int, ...]:
        """The concrete shape of a shaped type; () for scalars."""
        return self.dims(getattr(t, "shape", ()))

    def dtype(self, t: Type) -> torch.dtype:
        """The torch dtype that holds elements of type `t`."""
        return self.numerics.dtype(t.dtype)  # type: ignore[attr-defined]

    def scalar(self, value: Any, d: DType) -> Tensor:
        """A 0-d tensor of element type `d` holding a Python number or a size expression."""
        number = self.dim(value) if isinstance(value, Expr) else value
        return torch.tensor(number, dtype=self.numerics.dtype(d))

    def to_type(self, x: Tensor, t: Type) -> Tensor:
        """`x` converted to the element type that `t` declares (as computed, without the rounding of an `exact` cast)."""
        return convert(x, self.dtype(t))

    # -- running

    def run_op(self, op: Operation, operands: list[Any]) -> Sequence[Any]:
        """The results of one op; IRError (or IndexError for indices given by the user) names the op."""
        handler = self.handlers.get(op.name)
        if handler is None:
            raise failure(op, f"'{op.name}' has no reference semantics at this place")
        try:
            results = handler(self, op, operands)
        except IndexError as e:
            raise IndexError(str(failure(op, str(e)))) from e
        except IRError as e:
            raise e if "\n  in " in str(e) else failure(op, str(e)) from e
        except (RuntimeError, TypeError, ValueError, KeyError) as e:
            raise failure(op, f"{type(e).__name__}: {e}") from e
        self._check(op, results)
        return results

    def _check(self, op: Operation, results: Sequence[Any]) -> None:
        if len(results) != len(op.results):
            raise failure(op, f"'{op.name}' computed {len(results)} results, but declares {len(op.results)}")
        for r, x in zip(op.results, results):
            if not isinstance(r.type, TensorType):
                continue
            try:
                bind_shape(r.type.shape, x.shape, self.symbols, f"result {r.index}")  # extern ops give new (unbacked) sizes
            except IRError as e:
                raise failure(op, str(e)) from None
            if x.dtype != self.dtype(r.type):
                raise failure(op, f"result {r.index} was computed in {x.dtype}, but is declared as {r.type}")

    def run_block(self, block: Block, env: dict[Value, Any]) -> list[Any]:
        """Runs all ops of `block`; gives the values of its terminator's operands."""
        last_use: dict[Value, Operation] = {}
        for op in block:
            for nested in op.walk():
                for v in nested.operands:
                    last_use[v] = op
        terminator = block.terminator
        for op in block:
            if op is terminator:
                break
            operands = [env[v] for v in op.operands]
            for r, x in zip(op.results, self.run_op(op, operands)):
                env[r] = x
            for v in {*op.operands, *op.results}:
                if last_use.get(v, op) is op:
                    env.pop(v, None)
        return [env[v] for v in terminator.operands]
