"""Calls of ATen and custom operators from a compiled program.

The encoding of arguments is that of `graph.extern` (see `frontend/extern.py`), as JSON:

    null, bool, int, float, str     themselves
    list                            a list
    {"operand": i}                  tensor operand i
    {"expr": e}                     a size expression (see `sizes.py`)
    {"number": i}                   the Python number that operand i, of one element, holds
    {"dtype": "f32"}, {"device": "cpu"}, {"layout": "torch.strided"}, {"memory_format": "torch.channels_last"},
    {"complex": [re, im]}
    {"float": "nan"}                a float that JSON has no number for: nan, inf, -inf

Entry point: `ExternCall`. Tensors of operands and results are given and taken as torch tensors; where they live is the
executor's affair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .artifact import ArtifactError
from .dtypes import TORCH_DTYPES, torch_dtype
from .sizes import compile_size, compile_sizes

__all__ = ["ExternCall", "TensorSpec", "resolve_operator"]

Decoder = Callable[[Sequence[torch.Tensor], Sequence[int]], Any]
"""(operands, symbol values) -> the argument."""


class TensorSpec:
    """Shape, strides (elements) and element type of a tensor, some of them functions of the symbols."""

    __slots__ = ("_shape", "_strides", "dtype", "static")

    def __init__(self, manifest: Mapping[str, Any], positions: Mapping[str, int]):
        self.dtype = torch_dtype(manifest["dtype"])
        self._shape = compile_sizes(manifest["shape"], positions)
        self._strides = compile_sizes(manifest["strides"], positions)
        self.static = isinstance(self._shape, tuple) and isinstance(self._strides, tuple)

    def shape(self, symbols: Sequence[int]) -> tuple[int, ...]:
        return self._shape if isinstance(self._shape, tuple) else self._shape(symbols)

    def strides(self, symbols: Sequence[int]) -> tuple[int, ...]:
        return self._strides if isinstance(self._strides, tuple) else self._strides(symbols)


def resolve_operator(target: str) -> Any:
    """The operator `namespace.op.overload` under torch.ops. ArtifactError if it does not exist."""
    parts = target.split(".")
    found: Any = torch.ops
    try:
        if len(parts) != 3:
            raise AttributeError("expected namespace.op.overload")
        for part in parts:
            found = getattr(found, part)
    except (AttributeError, RuntimeError) as error:
        raise ArtifactError(f"torch has no operator '{target}' ({error}); import the library that registers it "
                            "before the program runs") from error
    return found


def _decoder(encoded: Any, positions: Mapping[str, int]) -> Decoder:
    if encoded is None or isinstance(encoded, (bool, int, float, str)):
        return lambda tensors, symbols: encoded
    if isinstance(encoded, list):
        parts = [_decoder(x, positions) for x in encoded]
        return lambda tensors, symbols: [p(tensors, symbols) for p in parts]
    if isinstance(encoded, dict) and len(encoded) == 1:
        (kind, value), = encoded.items()
        if kind in _KINDS:
            return _KINDS[kind](value, positions)
    raise ArtifactError(f"malformed operator argument {str(encoded)[:100]}")


def _operand(i: Any, positions: Mapping[str, int]) -> Decoder:
    if type(i) is not int or i < 0:
        raise ArtifactError(f"malformed operand number {i!r}")
    return lambda tensors, symbols: tensors[i]


def _number(i: Any, positions: Mapping[str, int]) -> Decoder:
    if type(i) is not int or i < 0:
        raise ArtifactError(f"malformed operand number {i!r}")
    return lambda tensors, symbols: tensors[i].item()


def _expr(tree: Any, positions: Mapping[str, int]) -> Decoder:
    size = compile_size(tree, positions)
    if isinstance(size, int):
        return lambda tensors, symbols: size
    return lambda tensors, symbols: size(symbols)


def _constant(convert: Callable[[Any], Any]) -> Callable[[Any, Mapping[str, int]], Decoder]:
    def make(value: Any, positions: Mapping[str, int]) -> Decoder:
        try:
            constant = convert(value)
        except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
            raise ArtifactError(f"malformed operator argument {value!r}: {error}") from error
        return lambda tensors, symbols: constant
    return make


def _attribute_of_torch(kind: type) -> Callable[[str], Any]:
    def find(name: str) -> Any:
        found = getattr(torch, name.removeprefix("torch."))
        if not isinstance(found, kind):
            raise ValueError(f"not a {kind.__name__}")
        return found
    return find


_KINDS: dict[str, Callable[[Any, Mapping[str, int]], Decoder]] = {
    "operand": _operand, "number": _number, "expr": _expr,
    "dtype": _constant(lambda name: TORCH_DTYPES[name] if name in TORCH_DTYPES else _attribute_of_torch(torch.dtype)(name)),
    "device": _constant(torch.device),
    "layout": _constant(_attribute_of_torch(torch.layout)),
    "memory_format": _constant(_attribute_of_torch(torch.memory_format)),
    "complex": _constant(lambda pair: complex(*pair)),
    "float": _constant(float),
}


def _laid_out(t: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    """`t` itself if its strides are right wherever they matter, else a copy with these strides."""
    if t.stride() == strides or all(n == 1 or a == b for n, a, b in zip(shape, t.stride(), strides, strict=True)):
        return t
    return _copied(t, shape, strides)


def _copied(t: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    """A copy of `t` in memory of its own with these strides."""
    repeated = [d for d, (n, stride) in enumerate(zip(shape, strides, strict=True)) if stride == 0 and n > 1]
    for d in repeated:  # an expanded dimension: every element along it is the same memory
        t = t.narrow(d, 0, 1)
    made = torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)
    return made.expand(shape) if repeated else made


def _definition(positions: Mapping[str, int], name: str, result: int, axis: int, low: int = 0, high: int | None = None) -> tuple[Any, ...]:
    """Where a symbol's value comes from, and the range that the program takes for granted."""
    return positions[name], int(result), int(axis), int(low), None if high is None else int(high)


def _measured(result: Any, axis: int, operands: Sequence[torch.Tensor]) -> int:
    """A size of the result; -1: the number that it is; -2: how many elements of the first operand's memory come before it, a view of that."""
    if axis >= 0:
        return int(result.shape[axis])
    return int(result) if axis == -1 else int(result.storage_offset() - operands[0].storage_offset())


ALIGNMENT = 16
"""Bytes of which addresses are multiples where compiled kernels and the library rely on it: on GPUs, always."""
_HANDED_ON = frozenset({"aicc_dist.wait.default"})
"""Operators that give an operand itself, which nobody reads or writes under its old name any more."""


class ExternCall:
    """One operator call: decodes arguments, calls, and checks and lays out the results; with `aligned`, at multiples of ALIGNMENT."""

    def __init__(self, manifest: Mapping[str, Any], positions: Mapping[str, int], *, aligned: bool = False):
        self._aligned = aligned
        self.target: str = manifest["target"]
        self._operator = resolve_operator(self.target)
        self._args = [_decoder(x, positions) for x in manifest["args"]]
        self._kwargs = {k: _decoder(x, positions) for k, x in manifest["kwargs"].items()}
        self._operand_strides = [None if s is None else compile_sizes(s, positions) for s in manifest["operand_strides"]]
        self._kinds: list[str] = list(manifest["result_kinds"])
        self._results = [TensorSpec(r, positions) for r in manifest["results"]]
        self._defines = [_definition(positions, *row) for row in manifest["defines"]]
        if len(self._results) != sum(kind != "none" for kind in self._kinds):
            raise ArtifactError(f"'{self.target}' has {len(self._results)} results described by {self._kinds}")

    def __call__(self, operands: list[torch.Tensor], symbols: Sequence[int],
                 define: Callable[[int, int], None]) -> list[torch.Tensor]:
        """The results as tensors with the declared type and strides, sharing no memory with the operands.

        `define(position, value)` is called for each symbol that the results decide, before result shapes are checked.
        RuntimeError if the operator returns something else than what was declared.
        """
        given = [t if s is None else _laid_out(t, tuple(t.shape), s if isinstance(s, tuple) else s(symbols))
                 for t, s in zip(operands, self._operand_strides, strict=True)] if self._operand_strides else operands
        returned = self._operator(*[a(given, symbols) for a in self._args],
                                  **{k: a(given, symbols) for k, a in self._kwargs.items()})
        several = isinstance(returned, (list, tuple))
        values = list(returned) if several else [] if not self._kinds else [returned]
        if len(values) != len(self._kinds):
            raise RuntimeError(f"'{self.target}' returned {len(values)} values; "
                               f"the program was compiled for {len(self._kinds)}")
        found = [v for v, kind in zip(values, self._kinds, strict=True) if kind != "none"]
        for position, result, axis, low, high in self._defines:
            value = _measured(found[result], axis, given)
            if value < low or (high is not None and value > high):
                raise RuntimeError(f"'{self.target}' gives the size {value}, where the program needs one "
                                   + (f"of at least {low}" if high is None else f"from {low} to {high}"))
            define(position, value)
        taken = {t.untyped_storage()._cdata for t in operands} if self.target not in _HANDED_ON else set()
        device = operands[0].device if operands else torch.device("cpu")
        return [self._result(v, spec, taken, symbols, device) for v, spec in zip(found, self._results, strict=True)]

    def _result(self, value: Any, spec: TensorSpec, taken: set[int], symbols: Sequence[int], device: torch.device) -> torch.Tensor:
        if not isinstance(value, torch.Tensor):
            return torch.scalar_tensor(value, dtype=spec.dtype, device=device)
        shape, strides = spec.shape(symbols), spec.strides(symbols)
        if tuple(value.shape) != shape or value.dtype != spec.dtype:
            raise RuntimeError(f"'{self.target}' returned {value.dtype} of shape {tuple(value.shape)}; "
                               f"the program was compiled for {spec.dtype} of shape {shape}")
        if value.is_conj() or value.is_neg():
            value = value.resolve_conj().resolve_neg()
        if value.untyped_storage()._cdata in taken:
            return _copied(value, shape, strides)
        made = _laid_out(value, shape, strides)
        return _copied(made, shape, strides) if self._aligned and made.data_ptr() % ALIGNMENT else made
