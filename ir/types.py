"""Types: scalars, tensors (values), buffers (memory) and tiles (what a kernel computes on)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .expr import Dim, product

__all__ = [
    "DTYPES",
    "BufferType",
    "DType",
    "ScalarType",
    "TensorType",
    "TileType",
    "Type",
    "bf16",
    "contiguous_strides",
    "dtype",
    "element_type",
    "f16",
    "f32",
    "f64",
    "i1",
    "i8",
    "i16",
    "i32",
    "i64",
    "index",
    "u8",
]


@dataclass(frozen=True)
class DType:
    """An element type. `bits` is its size in memory (i1 is stored as one byte, like torch.bool)."""

    name: str
    bits: int
    kind: str  # 'float', 'int', 'uint', 'bool', 'complex', 'index'

    def __str__(self) -> str:
        return self.name

    @property
    def bytes(self) -> int:
        return self.bits // 8

    @property
    def is_float(self) -> bool:
        return self.kind == "float"

    @property
    def is_integer(self) -> bool:
        return self.kind in ("int", "uint", "index")

    @property
    def is_signed(self) -> bool:
        return self.kind in ("int", "float", "index")


DTYPES: dict[str, DType] = {d.name: d for d in (
    DType("f64", 64, "float"), DType("f32", 32, "float"), DType("f16", 16, "float"), DType("bf16", 16, "float"),
    DType("f8e4m3fn", 8, "float"), DType("f8e5m2", 8, "float"),
    DType("i64", 64, "int"), DType("i32", 32, "int"), DType("i16", 16, "int"), DType("i8", 8, "int"),
    DType("u8", 8, "uint"), DType("u16", 16, "uint"), DType("u32", 32, "uint"), DType("u64", 64, "uint"),
    DType("i1", 8, "bool"), DType("c64", 64, "complex"), DType("c128", 128, "complex"), DType("index", 64, "index"),
)}


def dtype(name: str) -> DType:
    """The element type called `name`; ValueError lists the known ones."""
    try:
        return DTYPES[name]
    except KeyError:
        raise ValueError(f"unknown element type '{name}'; known: {', '.join(DTYPES)}") from None


class Type:
    """Base of all types. Types are immutable, hashable and compare structurally."""


@dataclass(frozen=True)
class ScalarType(Type):
    """One element in a register."""

    dtype: DType

    def __str__(self) -> str:
        return self.dtype.name


f64, f32, f16, bf16, i64, i32, i16, i8, u8, i1, index = (
    ScalarType(DTYPES[n]) for n in ("f64", "f32", "f16", "bf16", "i64", "i32", "i16", "i8", "u8", "i1", "index"))


def contiguous_strides(shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """Row-major strides, in elements."""
    return tuple(product(shape[i + 1:]) for i in range(len(shape)))


@dataclass(frozen=True)
class _Shaped(Type):
    shape: tuple[Dim, ...]
    dtype: DType

    @property
    def rank(self) -> int:
        return len(self.shape)

    @cached_property
    def numel(self) -> Dim:
        return product(self.shape)

    def _dims(self) -> str:
        return "".join(f"{d if isinstance(d, int) or (len(d.terms) == 1 and str(d).isidentifier()) else f'({d})'}x"
                       for d in self.shape)


@dataclass(frozen=True)
class TensorType(_Shaped):
    """A tensor with value semantics. `strides` (elements) is its layout in memory; None means row-major."""

    strides: tuple[Dim, ...] | None = None

    def __str__(self) -> str:
        layout = "" if self.strides is None else f", strides=[{', '.join(map(str, self.strides))}]"
        return f"tensor<{self._dims()}{self.dtype}{layout}>"

    @property
    def layout(self) -> tuple[Dim, ...]:
        """The strides in elements, explicit."""
        return contiguous_strides(self.shape) if self.strides is None else self.strides

    def with_strides(self, strides: tuple[Dim, ...] | None) -> TensorType:
        """The same tensor in another layout; row-major strides are normalised to None."""
        if strides is not None and tuple(strides) == contiguous_strides(self.shape):
            strides = None
        return TensorType(self.shape, self.dtype, strides)


@dataclass(frozen=True)
class BufferType(_Shaped):
    """Memory: `shape` elements laid out with `strides` (elements; None means row-major) from a base address."""

    strides: tuple[Dim, ...] | None = None

    def __str__(self) -> str:
        layout = "" if self.strides is None else f", strides=[{', '.join(map(str, self.strides))}]"
        return f"buffer<{self._dims()}{self.dtype}{layout}>"

    @property
    def layout(self) -> tuple[Dim, ...]:
        return contiguous_strides(self.shape) if self.strides is None else self.strides


@dataclass(frozen=True)
class TileType(_Shaped):
    """A block of elements in registers; the shape is constant."""

    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"tile<{self._dims()}{self.dtype}>"


def element_type(t: Type) -> DType:
    """The element type of a scalar, tensor, buffer or tile type."""
    if isinstance(t, (ScalarType, _Shaped)):
        return t.dtype
    raise TypeError(f"type '{t}' has no element type")
