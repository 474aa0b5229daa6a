"""Views and other movement of elements. Values have no strides, so a copy and a view are the same thing here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...ir.core import Value
from ...ir.expr import Dim, ceildiv, floordiv, maximum, minimum, mod, product, sym
from ...ir.types import contiguous_strides
from ..context import I1, I64, Context, Number, like, typeof
from ..errors import Unsupported
from .table import Lower


def d(i: int) -> Dim:
    """The index along result dimension i."""
    return sym(f"d{i}")


def reshape(c: Context, x: Value, *_: Any) -> Value:
    return c.reshape(x, c.shape)


def permute(c: Context, x: Value, dims: Sequence[int]) -> Value:
    return c.permute(x, [c.axis(i, typeof(x).rank) for i in dims])


def transpose(c: Context, x: Value, i: int, j: int) -> Value:
    rank = typeof(x).rank
    return c.transpose(x, c.axis(i, rank), c.axis(j, rank)) if rank else x


def t(c: Context, x: Value) -> Value:
    return c.transpose(x, 0, 1) if typeof(x).rank == 2 else x


def expand(c: Context, x: Value, *_: Any, **__: Any) -> Value:
    return c.expand(x, c.shape)


def slice_bounds(c: Context, x: Value, dim: int, start: Any, end: Any, length: Dim) -> Dim:
    """The first index of a slice that has `length` elements: torch has decided on clamping, its result's size tells how."""
    size = typeof(x).shape[dim]
    if start is None:
        return 0
    if isinstance(start, int) and isinstance(size, int):
        return min(max(start + size if start < 0 else start, 0), size)
    if isinstance(start, int) and start < 0:
        return 0 if length == size else size + start
    return c.index(c.dim(start), size)


def slice_(c: Context, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    dim = c.axis(dim, typeof(x).rank)
    length = c.shape[dim]
    if length == typeof(x).shape[dim]:
        return x
    return c.slice(x, dim, slice_bounds(c, x, dim, start, end, length), length, step)


def select(c: Context, x: Value, dim: int, index: Any) -> Value:
    dim = c.axis(dim, typeof(x).rank)
    return c.reshape(c.slice(x, dim, c.index(c.dim(index), typeof(x).shape[dim]), 1), c.shape)


def split(c: Context, x: Value, sizes: Any, dim: int = 0) -> tuple[Value, ...]:
    """split, chunk and split_with_sizes: torch has computed the sizes of the parts."""
    dim = c.axis(dim, typeof(x).rank)
    parts, start = [], 0
    for i in range(len(c.val)):
        length = c.out(i).shape[dim]
        parts.append(c.slice(x, dim, start, length))
        start = start + length  # type: ignore[assignment]
    return tuple(parts)


def unbind(c: Context, x: Value, dim: int = 0) -> tuple[Value, ...]:
    dim = c.axis(dim, typeof(x).rank)
    return tuple(c.reshape(c.slice(x, dim, i, 1), c.out(i).shape) for i in range(len(c.val)))


def flip(c: Context, x: Value, dims: Sequence[int]) -> Value:
    axes = c.axes(dims, typeof(x).rank) if len(dims) else ()
    return c.b.op("graph.flip", x, type=like(x), dims=axes) if axes else x


def roll(c: Context, x: Value, shifts: Any, dims: Any = ()) -> Value:
    shifts = [shifts] if not isinstance(shifts, (list, tuple)) else shifts
    dims = [dims] if isinstance(dims, int) else dims
    if not len(dims):
        flat = c.reshape(x, (product(typeof(x).shape),))
        return c.reshape(_rolled(c, flat, shifts, [0]), typeof(x).shape)
    return _rolled(c, x, shifts, dims)


def _rolled(c: Context, x: Value, shifts: Sequence[Any], dims: Sequence[int]) -> Value:
    shape, rank = typeof(x).shape, typeof(x).rank
    index = [d(i) for i in range(rank)]
    for shift, dim in zip(shifts, dims, strict=True):
        i = c.axis(dim, rank)
        if shape[i] != 0:
            index[i] = mod(index[i] - mod(c.dim(shift), shape[i]) + shape[i], shape[i])
    return c.remap(x, shape, index)


def repeat(c: Context, x: Value, repeats: Sequence[Any]) -> Value:
    """Numpy's tile: each dimension [n] becomes [r, n] by expansion, then one of r * n."""
    counts = c.dims(repeats)
    rank = len(counts)
    shape = [1] * (rank - typeof(x).rank) + list(typeof(x).shape)
    apart = [s for n in shape for s in (1, n)]
    spread = [s for r, n in zip(counts, shape, strict=True) for s in (r, n)]
    return c.reshape(c.expand(c.reshape(x, apart), spread), c.shape)


def cat(c: Context, xs: Sequence[Value], dim: int = 0) -> Value:
    kept = [c.cast(x, c.dtype) for x in xs if not (typeof(x).rank == 1 and typeof(x).shape == (0,) and len(c.shape) != 1)]
    dim = c.axis(dim, len(c.shape))
    kept = [x for x in kept if typeof(x).shape[dim] != 0]
    return c.cat(kept, dim) if kept else c.full(c.shape, 0, c.dtype)


def stack(c: Context, xs: Sequence[Value], dim: int = 0) -> Value:
    dim = c.axis(dim, len(c.shape))
    unit = [1 if i == dim else s for i, s in enumerate(c.shape)]
    return c.cat([c.reshape(c.cast(x, c.dtype), unit) for x in xs], dim)


def constant_pad(c: Context, x: Value, pad: Sequence[Any], value: Number = 0) -> Value:
    low, high = _pad_amounts(c, x, pad)
    return c.pad(x, low, high, value)


def _pad_amounts(c: Context, x: Value, pad: Sequence[Any]) -> tuple[list[Dim], list[Dim]]:
    """torch lists (low, high) from the last dimension backwards."""
    amounts = c.dims(pad)
    rank = typeof(x).rank
    low: list[Dim] = [0] * rank
    high: list[Dim] = [0] * rank
    for i in range(len(amounts) // 2):
        low[rank - 1 - i], high[rank - 1 - i] = amounts[2 * i], amounts[2 * i + 1]
    return low, high


def replication_pad(c: Context, x: Value, pad: Sequence[Any]) -> Value:
    low, _ = _pad_amounts(c, x, pad)
    return c.remap(x, c.shape, [d(i) if c.shape[i] == n else maximum(minimum(d(i) - low[i], n - 1), 0)
                                for i, n in enumerate(typeof(x).shape)])


def reflection_pad(c: Context, x: Value, pad: Sequence[Any]) -> Value:
    low, _ = _pad_amounts(c, x, pad)

    def reflected(i: int, n: Dim) -> Dim:
        p = d(i) - low[i]
        p = maximum(p, -p)  # around the first element
        gap = (n - 1) - p
        return (n - 1) - maximum(gap, -gap)  # around the last

    return c.remap(x, c.shape, [d(i) if c.shape[i] == n else reflected(i, n) for i, n in enumerate(typeof(x).shape)])


def diagonal(c: Context, x: Value, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Value:
    rank = typeof(x).rank
    i, j = c.axis(dim1, rank), c.axis(dim2, rank)
    last = d(rank - 2)
    index: list[Dim] = []
    others = iter(range(rank - 2))
    for axis in range(rank):
        if axis == i:
            index.append(last + max(-offset, 0))
        elif axis == j:
            index.append(last + max(offset, 0))
        else:
            index.append(d(next(others)))
    return c.remap(x, c.shape, index)


def unfold(c: Context, x: Value, dim: int, size: int, step: int) -> Value:
    rank = typeof(x).rank
    if rank == 0:
        return c.reshape(x, c.shape)
    dim = c.axis(dim, rank)
    index = [d(i) * step + d(rank) if i == dim else d(i) for i in range(rank)]
    return c.remap(x, c.shape, index)


def as_strided(c: Context, x: Value, size: Any, stride: Any, storage_offset: Any = None) -> Value:
    """Undoes the strides of the source, which must fill its memory without gaps or overlap, in any order of dimensions."""
    sizes, strides, offset, order = _memory_of(c, x, storage_offset)
    if c.shape == sizes and c.dims(stride) == strides and offset == 0:
        return x
    if product(c.shape) == 0:
        return c.full(c.shape, 0, c.dtype)
    view_order = _dense_order(c.shape, c.dims(stride))
    if offset == 0 and view_order is not None and product(c.shape) == product(sizes):
        return _of_memory(c, _in_memory(c, x, order), c.shape, view_order)
    place = offset
    for i, s in enumerate(c.dims(stride)):
        place = place + d(i) * s
    index: list[Dim] = [0] * len(sizes)
    for i in order:
        index[i] = mod(floordiv(place, strides[i]), sizes[i]) if i != order[-1] else floordiv(place, strides[i])
    return c.remap(x, c.shape, index)


def _memory_of(c: Context, x: Value, storage_offset: Any) -> tuple[tuple[Dim, ...], tuple[Dim, ...], Dim, list[int]]:
    """Sizes and strides of the node's first argument, `storage_offset` from its first element, and its dimensions from the innermost out."""
    fake = c.argument(0)
    sizes, strides = typeof(x).shape, c.dims(fake.stride())
    offset = 0 if storage_offset is None else c.dim(storage_offset) - c.dim(fake.storage_offset())
    order = _dense_order(sizes, strides)
    if order is None:
        raise Unsupported("as_strided of a source with gaps in memory or symbolic strides")
    return sizes, strides, offset, order


def _dense_order(sizes: tuple[Dim, ...], strides: tuple[Dim, ...]) -> list[int] | None:
    """The dimensions (of more than one element) from the innermost out, if they fill their memory without gaps or overlap."""
    order = [i for i in reversed(range(len(sizes))) if sizes[i] != 1]
    if strides != contiguous_strides(sizes):
        if not all(isinstance(strides[i], int) for i in order):
            return None
        order.sort(key=lambda i: strides[i])  # type: ignore[arg-type,return-value]
    expected: Dim = 1
    for i in order:
        if strides[i] != expected:
            return None
        expected = expected * sizes[i]
    return order


def _in_memory(c: Context, x: Value, order: list[int]) -> Value:
    """The elements of `x` as they lie in memory, in one dimension; `order` is `_dense_order`'s."""
    outside_in = [i for i in range(typeof(x).rank) if i not in order] + order[::-1]
    return c.reshape(c.permute(x, outside_in), (product(typeof(x).shape),))


def _of_memory(c: Context, flat: Value, sizes: tuple[Dim, ...], order: list[int]) -> Value:
    """What `_in_memory` undoes."""
    outside_in = [i for i in range(len(sizes)) if i not in order] + order[::-1]
    return c.permute(c.reshape(flat, [sizes[i] for i in outside_in]), [outside_in.index(i) for i in range(len(sizes))])


def as_strided_scatter(c: Context, x: Value, src: Value, size: Any, stride: Any, storage_offset: Any = None) -> Value:
    """Writes `src` at its places in the memory of the source, row-major in `src` (the last of equal places wins); one that fills it replaces it."""
    sizes, _, offset, order = _memory_of(c, x, storage_offset)
    count = product(typeof(src).shape)
    if count == 0:
        return x
    src, written = c.cast(src, typeof(x).dtype), c.dims(stride)
    view_order = _dense_order(typeof(src).shape, written)
    if offset == 0 and view_order is not None and count == product(sizes):
        return _of_memory(c, _in_memory(c, src, view_order), sizes, order)
    places = c.scalar(offset, I64)
    for i, s in enumerate(written):
        places = c.ew("add", places, c.ew("mul", c.positions(typeof(src).shape, i), s))
    at = c.reshape(c.expand(places, typeof(src).shape), (count,))
    flat = _in_memory(c, x, order)
    made = c.b.op("graph.index_put", flat, c.reshape(src, (count,)), at, type=like(flat), dims=(0,))
    return _of_memory(c, made, sizes, order)


# -- writing into a view ----------------------------------------------------------------------------------------------


def slice_scatter(c: Context, x: Value, src: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    dim = c.axis(dim, typeof(x).rank)
    size, length = typeof(x).shape[dim], typeof(src).shape[dim]
    src = c.cast(src, typeof(x).dtype)
    if length == size:
        return c.expand(src, typeof(x).shape)
    if length == 0:
        return x
    first = slice_bounds(c, x, dim, start, end, length)
    if step != 1:
        return _strided_scatter(c, x, src, dim, first, step)
    src = c.expand(src, [length if i == dim else s for i, s in enumerate(typeof(x).shape)])
    rest = size - first - length
    background = c.constant_of(x)
    if background is not None:
        low: list[Dim] = [0] * typeof(x).rank
        high: list[Dim] = [0] * typeof(x).rank
        low[dim], high[dim] = first, rest
        return c.pad(src, low, high, background)
    parts = [c.slice(x, dim, 0, first), src, c.slice(x, dim, first + length, rest)]
    return c.cat([p for p in parts if typeof(p).shape[dim] != 0], dim)


def _strided_scatter(c: Context, x: Value, src: Value, dim: int, first: Dim, step: int) -> Value:
    shape, length = typeof(x).shape, typeof(src).shape[dim]
    src = c.expand(src, [length if i == dim else s for i, s in enumerate(shape)])
    nearest = [maximum(minimum(floordiv(d(i) - first, step), length - 1), 0) if i == dim else d(i) for i in range(len(shape))]
    away = c.ew("sub", c.positions(shape, dim), first)
    inside = c.ew("and", c.ew("eq", c.ew("mod", away, step), 0),
                  c.ew("and", c.ew("ge", away, 0), c.ew("lt", away, length * step)))
    return c.ew("select", inside, c.remap(src, shape, nearest), x)


def select_scatter(c: Context, x: Value, src: Value, dim: int, index: Any) -> Value:
    dim = c.axis(dim, typeof(x).rank)
    first = c.index(c.dim(index), typeof(x).shape[dim])
    unit = c.reshape(src, [1 if i == dim else s for i, s in enumerate(typeof(x).shape)])
    if typeof(x).shape[dim] == 1:
        return c.cast(unit, typeof(x).dtype)
    return slice_scatter(c, x, unit, dim, first, None)


def diagonal_scatter(c: Context, x: Value, src: Value, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Value:
    shape, rank = typeof(x).shape, typeof(x).rank
    i, j = c.axis(dim1, rank), c.axis(dim2, rank)
    row, col = c.positions(shape, i), c.positions(shape, j)
    on = c.ew("eq", c.ew("sub", col, row), offset)
    length = typeof(src).shape[-1]
    if length == 0:
        return x
    index = [d(k) for k in range(rank) if k not in (i, j)]
    index.append(minimum(maximum(d(i) - max(-offset, 0), 0), length - 1))
    return c.ew("select", on, c.remap(c.cast(src, typeof(x).dtype), shape, index), x)


def triangle(upper: bool) -> Lower:
    """triu and tril: elements on the wrong side of diagonal k become 0."""
    def lower(c: Context, x: Value, k: int = 0) -> Value:
        shape, rank = typeof(x).shape, typeof(x).rank
        gap = c.ew("sub", c.positions(shape[-2:], 1), c.positions(shape[-2:], 0))
        keep = c.ew("ge" if upper else "le", gap, k)
        assert typeof(keep).dtype == I1 and rank >= 2
        return c.ew("select", keep, x, c.full((), 0, typeof(x).dtype))
    return lower


def pixel_shuffle(c: Context, x: Value, r: int) -> Value:
    *batch, ch, h, w = typeof(x).shape
    n = len(batch)
    apart = c.reshape(x, (*batch, floordiv(ch, r * r), r, r, h, w))
    return c.reshape(c.permute(apart, [*range(n), n, n + 3, n + 1, n + 4, n + 2]), c.shape)


def pixel_unshuffle(c: Context, x: Value, r: int) -> Value:
    *batch, ch, h, w = typeof(x).shape
    n = len(batch)
    apart = c.reshape(x, (*batch, ch, ceildiv(h, r), r, ceildiv(w, r), r))
    return c.reshape(c.permute(apart, [*range(n), n, n + 2, n + 4, n + 1, n + 3]), c.shape)


_RESHAPES = ("view.default", "_unsafe_view.default", "reshape.default", "_reshape_alias.default", "unsqueeze.default",
             "squeeze.default", "squeeze.dim", "squeeze.dims", "flatten.using_ints", "unflatten.int", "view_as.default",
             "view_copy.default", "unsqueeze_copy.default", "squeeze_copy.default", "squeeze_copy.dim", "squeeze_copy.dims")
_SPLITS = ("split.Tensor", "split_with_sizes.default", "chunk.default", "unsafe_chunk.default", "unsafe_split.Tensor",
           "unsafe_split_with_sizes.default", "split_copy.Tensor", "split_with_sizes_copy.default", "tensor_split.sections")

ROWS: dict[str, Lower] = {
    **{f"aten.{n}": reshape for n in _RESHAPES},
    **{f"aten.{n}": split for n in _SPLITS},
    "aten.permute.default": permute,
    "aten.permute_copy.default": permute,
    "aten.transpose.int": transpose,
    "aten.transpose_copy.int": transpose,
    "aten.t.default": t,
    "aten.numpy_T.default": lambda c, x: c.permute(x, list(reversed(range(typeof(x).rank)))),
    "aten.movedim.int": lambda c, x, *_: _moved(c, x, *_),
    "aten.expand.default": expand,
    "aten.expand_copy.default": expand,
    "aten.slice.Tensor": slice_,
    "aten.slice_copy.Tensor": slice_,
    "aten.narrow.default": lambda c, x, dim, start, length: slice_(c, x, dim, start),
    "aten.select.int": select,
    "aten.select_copy.int": select,
    "aten.unbind.int": unbind,
    "aten.unbind_copy.int": unbind,
    "aten.flip.default": flip,
    "aten.roll.default": roll,
    "aten.repeat.default": repeat,
    "aten.cat.default": cat,
    "aten.stack.default": stack,
    "aten.constant_pad_nd.default": constant_pad,
    **{f"aten.replication_pad{n}d.default": replication_pad for n in (1, 2, 3)},
    **{f"aten.reflection_pad{n}d.default": reflection_pad for n in (1, 2, 3)},
    "aten.diagonal.default": diagonal,
    "aten.diagonal_copy.default": diagonal,
    "aten.unfold.default": unfold,
    "aten.unfold_copy.default": unfold,
    "aten.as_strided.default": as_strided,
    "aten.as_strided_copy.default": as_strided,
    "aten.as_strided_scatter.default": as_strided_scatter,
    "aten.slice_scatter.default": slice_scatter,
    "aten.select_scatter.default": select_scatter,
    "aten.diagonal_scatter.default": diagonal_scatter,
    "aten.triu.default": triangle(upper=True),
    "aten.tril.default": triangle(upper=False),
    "aten.pixel_shuffle.default": pixel_shuffle,
    "aten.pixel_unshuffle.default": pixel_unshuffle,
}


def _moved(c: Context, x: Value, source: int, target: int) -> Value:
    rank = typeof(x).rank
    order = [i for i in range(rank) if i != c.axis(source, rank)]
    order.insert(c.axis(target, rank), c.axis(source, rank))
    return c.permute(x, order)
