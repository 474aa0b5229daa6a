"""Pooling and its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product as combinations
from typing import Any

from ...ir.core import Value
from ...ir.expr import Dim, floordiv, product, sym
from ...ir.types import DTYPES, TensorType
from ..context import F32, I64, Context, like, typeof
from ..errors import Unsupported
from ..window_places import GATHERED, spans
from .table import Lower

I32 = DTYPES["i32"]


def _window(x: Any, n: int, default: Sequence[int] | None = None) -> tuple[int, ...]:
    """A window parameter per spatial dimension; torch takes a number, one for all, or nothing for the default."""
    given = (x,) if isinstance(x, int) else tuple(x)
    if not given and default is not None:
        return tuple(default)
    if any(not isinstance(v, int) for v in given):
        raise Unsupported("symbolic window parameters")
    return given * n if len(given) == 1 else given


def _batched(c: Context, x: Value, n: int) -> Value:
    """[C, *] as [1, C, *]."""
    return x if typeof(x).rank == n + 2 else c.reshape(x, (1, *typeof(x).shape))


def _type(c: Context, i: int | None, n: int) -> TensorType:
    t = c.out(i)
    return t if t.rank == n + 2 else TensorType((1, *t.shape), t.dtype)


def max_pool(n: int) -> Lower:
    def lower(c: Context, x: Value, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1,
              ceil_mode: bool = False) -> tuple[Value, Value]:
        size = _window(kernel, n)
        attrs = {"kernel": size, "stride": _window(stride, n, size), "padding": _window(padding, n),
                 **({"dilation": _window(dilation, n)} if any(d != 1 for d in _window(dilation, n)) else {}),
                 **({"ceil_mode": True} if ceil_mode else {})}
        made = c.b.create("graph.max_pool", [_batched(c, x, n)], attrs, [_type(c, 0, n), _type(c, 1, n)])
        return c.reshape(made.results[0], c.out(0).shape), c.reshape(made.results[1], c.out(1).shape)
    return lower


def max_pool_backward(n: int) -> Lower:
    """Each output gradient goes to the input position that won."""
    def lower(c: Context, grad: Value, x: Value, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool,
              indices: Value) -> Value:
        shape = typeof(x).shape
        size, pads = _window(kernel, n), _window(padding, n)
        steps = _window(stride, n, size)
        covering = tuple(-(-k // s) for k, s in zip(size, steps, strict=True))
        known = all(isinstance(s, int) for s in (*shape, *typeof(grad).shape))
        if known and math.prod(covering) <= GATHERED and all(d == 1 for d in _window(dilation, n)):
            here = _flat(c, [c.positions(shape, len(shape) - n + i) for i in range(n)], shape[-n:])
            return _gathered(c, grad, indices, shape, steps, pads, covering, lambda _: here)
        lead, area = shape[:-n], product(shape[-n:])
        points = product(typeof(grad).shape[-n:])
        base = c.full((*lead, area), 0, typeof(grad).dtype)
        flat = (*lead, points)
        made = c.b.op("graph.scatter", base, c.reshape(indices, flat), c.reshape(grad, flat), type=like(base), dim=len(lead),
                      reduce="add")
        return c.reshape(made, shape)
    return lower


def _flat(c: Context, along: Sequence[Value], sizes: Sequence[Dim]) -> Value:
    """The row-major number of an element, by its positions."""
    flat = along[0]
    for position, size in zip(along[1:], sizes[1:], strict=True):
        flat = c.ew("add", c.ew("mul", flat, size), position)
    return flat


def window_places(c: Context, indices: Value, size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Value:
    """See `frontend/window_places.py`."""
    shape, n = typeof(indices).shape, len(size)
    rest = c.cast(indices, I32) if math.prod(size) < 1 << 31 else indices
    offsets: list[Value] = []
    for i in reversed(range(n)):
        first = c.ew("sub", c.ew("mul", c.positions(shape, len(shape) - n + i), stride[i]), padding[i])
        inside = c.ew("mod", rest, size[i]) if i else rest
        offsets.insert(0, c.ew("sub", inside, c.cast(first, typeof(rest).dtype)))
        rest = c.ew("floordiv", rest, size[i])
    return c.cast(_flat(c, offsets, spans(kernel, stride)), c.dtype)


def max_pool_gradient(c: Context, grad: Value, places: Value, size: Sequence[int], kernel: Sequence[int], stride: Sequence[int],
                      padding: Sequence[int]) -> Value:
    """Each output gradient goes to the input position that won, which knows its place in each window around it."""
    n, shape = len(size), (*typeof(grad).shape[:-len(size)], *size)
    covering = tuple(-(-k // s) for k, s in zip(kernel, stride, strict=True))
    moved = [c.ew("add", c.cast(c.positions(shape, len(shape) - n + i), I32), padding[i]) for i in range(n)]
    offsets = [c.ew("mod", m, s) for m, s in zip(moved, stride, strict=True)]

    def place(ts: Sequence[int]) -> Value:
        return _flat(c, [c.ew("add", o, t * s) for o, t, s in zip(offsets, ts, stride, strict=True)], spans(kernel, stride))
    return _gathered(c, grad, places, shape, stride, padding, covering, place)


def _gathered(c: Context, grad: Value, winners: Value, shape: Sequence[Dim], steps: Sequence[int], pads: Sequence[int],
              covering: Sequence[int], mine: Callable[[Sequence[int]], Value]) -> Value:
    """The sum of the gradients of those windows, at most `covering` along each dimension, whose winner is at the position. [*, *spatial], known
    sizes. `mine(ts)`: what `winners` has for the position in the window that begins `ts` strides before the last one around it."""
    lead = len(shape) - len(steps)
    out = typeof(grad).shape[lead:]
    work = F32 if typeof(grad).dtype.name in ("bf16", "f16") else typeof(grad).dtype
    reach = [max(0, (h - 1 + p) // s + 1 - o) for h, p, s, o in zip(shape[lead:], pads, steps, out, strict=True)]  # type: ignore[operator, type-var]
    low, high = [0] * lead + [t - 1 for t in covering], [0] * lead + reach
    winners, given = c.pad(winners, low, high, -1), c.pad(grad, low, high, 0)
    total = None
    for ts in combinations(*(reversed(range(t)) for t in covering)):  # in the order of the windows, as a loop over them would add
        places: list[Dim] = [sym(f"d{i}") for i in range(lead)]
        places += [floordiv(sym(f"d{lead + i}") + pads[i], steps[i]) + (covering[i] - 1 - t) for i, t in enumerate(ts)]
        wanted = mine(ts)
        won = c.ew("eq", c.cast(c.remap(winners, shape, places), typeof(wanted).dtype), wanted)
        share = c.ew("select", won, c.cast(c.remap(given, shape, places), work), c.scalar(0, work))
        total = share if total is None else c.ew("add", total, share)
    assert total is not None
    return c.cast(total, typeof(grad).dtype)


def avg_pool(n: int) -> Lower:
    def lower(c: Context, x: Value, kernel: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
              count_include_pad: bool = True, divisor: int | None = None) -> Value:
        size = _window(kernel, n)
        if not c.dtype.is_float:
            return _integer_mean(c, x, size, _window(stride, n, size), _window(padding, n), count_include_pad, divisor)
        attrs = {"kernel": size, "stride": _window(stride, n, size), "padding": _window(padding, n),
                 **({"ceil_mode": True} if ceil_mode else {}), **({} if count_include_pad else {"count_include_pad": False}),
                 **({} if divisor is None else {"divisor": divisor})}
        made = c.b.op("graph.avg_pool", _batched(c, x, n), type=_type(c, None, n), **attrs)
        return c.reshape(made, c.shape)
    return lower


def _integer_mean(c: Context, x: Value, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], include_pad: bool,
                  divisor: int | None) -> Value:
    """Sums of windows, divided as C++ divides integers. A window is two dimensions of a view: where it starts, and where in it."""
    n, shape, out = len(kernel), typeof(x).shape, c.shape[-len(kernel):]
    lead = typeof(x).rank - n
    reach = [(out[i] - 1) * stride[i] + kernel[i] - shape[lead + i] - padding[i] for i in range(n)]
    padded = c.pad(x, [0] * lead + list(padding), [0] * lead + reach, 0)
    places: list[Dim] = [sym(f"d{i}") for i in range(lead)]
    places += [sym(f"d{lead + i}") * stride[i] + sym(f"d{lead + n + i}") for i in range(n)]
    windows = c.remap(padded, (*c.shape, *kernel), places)
    total = c.reduce("sum", windows, range(lead + n, lead + 2 * n))
    if divisor is not None:
        return c.ew("truncdiv", total, divisor)
    count = None
    for i in range(n):
        here = c.reshape(_window_size(c, out[i], shape[lead + i], kernel[i], stride[i], padding[i], include_pad),
                         [out[i] if j == i else 1 for j in range(n)])
        count = here if count is None else c.ew("mul", count, here)
    assert count is not None
    return c.ew("truncdiv", total, c.cast(count, c.dtype))


def avg_pool_backward(n: int) -> Lower:
    """Divides the gradient by the size of its window, then spreads it: a transposed depthwise convolution with ones."""
    def lower(c: Context, grad: Value, x: Value, kernel: Any, stride: Any, padding: Any, ceil_mode: bool,
              count_include_pad: bool, divisor: int | None) -> Value:
        size, pads = _window(kernel, n), _window(padding, n)
        steps = _window(stride, n, size)
        shape = typeof(_batched(c, x, n)).shape
        grad = _batched(c, grad, n)
        out = typeof(grad).shape
        work = F32 if typeof(grad).dtype.name in ("bf16", "f16") else typeof(grad).dtype
        share = c.cast(grad, work)
        if divisor is not None:
            share = c.ew("div", share, float(divisor))
        else:
            for i in range(n):
                count = _window_size(c, out[2 + i], shape[2 + i], size[i], steps[i], pads[i], count_include_pad)
                share = c.ew("div", share, c.reshape(c.cast(count, work), [out[2 + i] if j == i else 1 for j in range(n)]))
        if pads == (0,) * n and size == steps and divisor is None and _divided(shape[-n:], out[-n:]) == size:
            return c.cast(c.reshape(_repeated(c, share, size), c.shape), c.dtype)
        lead = out[0] * out[1]
        reach = [(out[2 + i] - 1) * steps[i] + size[i] for i in range(n)]
        single, ones = c.reshape(share, (lead, 1, *out[2:])), c.full((1, 1, *size), 1.0, work)
        whole = c.b.op("graph.conv_transpose", single, ones, stride=steps,
                       padding=(0,) * n, dilation=(1,) * n, type=TensorType((lead, 1, *reach), work))
        low = [0, 0, *(-p for p in pads)]
        high = [0, 0, *(shape[2 + i] + pads[i] - reach[i] for i in range(n))]  # cropped, or never covered by a window
        return c.cast(c.reshape(c.pad(whole, low, high, 0.0), c.shape), c.dtype)
    return lower


def _window_size(c: Context, out: Dim, size: Dim, kernel: int, step: int, pad: int, include_pad: bool) -> Value:
    """How many elements each window along one dimension counts, i64 [out]."""
    first = c.iota(out, start=-pad, step=step)
    last = c.ew("min", c.ew("add", first, kernel), c.scalar(size + pad, I64))
    if not include_pad:
        first, last = c.ew("max", first, 0), c.ew("min", last, c.scalar(size, I64))
    return c.ew("sub", last, first)


def _divided(size: Sequence[Dim], out: Sequence[Dim]) -> tuple[int, ...]:
    """The window of each dimension when `out` divides `size`; empty when it does not or when that is unknown."""
    if any(not isinstance(s, int) or not isinstance(o, int) or s % o for s, o in zip(size, out, strict=True)):
        return ()
    return tuple(s // o for s, o in zip(size, out, strict=True))  # type: ignore[misc]


def _repeated(c: Context, x: Value, window: Sequence[int]) -> Value:
    """Each element repeated over its window of the trailing dimensions."""
    lead, out = typeof(x).shape[:-len(window)], typeof(x).shape[-len(window):]
    unit = [v for o in out for v in (o, 1)]
    apart = [v for o, k in zip(out, window, strict=True) for v in (o, k)]
    return c.reshape(c.expand(c.reshape(x, (*lead, *unit)), (*lead, *apart)),
                     (*lead, *(o * k for o, k in zip(out, window, strict=True))))


def adaptive_avg_pool(n: int) -> Lower:
    """Windows of one size when the output divides the input; the mean of everything when the output is 1."""
    def lower(c: Context, x: Value, output_size: Any) -> Value:
        rank, out = typeof(x).rank, c.shape[-n:]
        if all(o == 1 for o in out):
            return c.reduce("mean", x, tuple(range(rank - n, rank)), True)
        window = _divided(typeof(x).shape[-n:], out)
        if not window:
            raise Unsupported("adaptive pooling with windows of several sizes")
        return avg_pool(n)(c, x, window, window)
    return lower


def adaptive_avg_pool_backward(n: int) -> Lower:
    """Windows of one size; others are taken apart before (`formulas.py`)."""
    def lower(c: Context, grad: Value, x: Value) -> Value:
        shape = typeof(x).shape
        if all(o == 1 for o in typeof(grad).shape[-n:]):
            return c.expand(c.ew("div", grad, c.scalar(product(shape[-n:]), typeof(grad).dtype)), shape)
        window = _divided(shape[-n:], typeof(grad).shape[-n:])
        if not window:
            raise Unsupported("adaptive pooling with windows of several sizes")
        return _repeated(c, c.ew("div", grad, float(math.prod(window))), window)
    return lower


ROWS: dict[str, Lower] = {
    "aten.max_pool2d_with_indices.default": max_pool(2),
    "aten.max_pool3d_with_indices.default": max_pool(3),
    "aten.max_pool2d_with_indices_backward.default": max_pool_backward(2),
    "aten.max_pool3d_with_indices_backward.default": max_pool_backward(3),
    "aicc.window_places.default": window_places,
    "aicc.max_pool_gradient.default": max_pool_gradient,
    "aten.avg_pool1d.default": avg_pool(1),
    "aten.avg_pool2d.default": avg_pool(2),
    "aten.avg_pool3d.default": avg_pool(3),
    "aten.avg_pool2d_backward.default": avg_pool_backward(2),
    "aten.avg_pool3d_backward.default": avg_pool_backward(3),
    "aten.adaptive_avg_pool1d.default": adaptive_avg_pool(1),
    "aten._adaptive_avg_pool2d.default": adaptive_avg_pool(2),
    "aten._adaptive_avg_pool3d.default": adaptive_avg_pool(3),
    "aten._adaptive_avg_pool2d_backward.default": adaptive_avg_pool_backward(2),
    "aten._adaptive_avg_pool3d_backward.default": adaptive_avg_pool_backward(3),
}
