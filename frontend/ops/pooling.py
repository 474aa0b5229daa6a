"""Pooling and its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...ir.core import Value
from ...ir.expr import Dim, product
from ...ir.types import TensorType
from ..context import F32, I64, Context
from ..errors import Unsupported
from .table import Lower


def _t(x: Value) -> TensorType:
    assert isinstance(x.type, TensorType)
    return x.type


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
    return x if _t(x).rank == n + 2 else c.reshape(x, (1, *_t(x).shape))


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
        shape = _t(x).shape
        lead, area = shape[:-n], product(shape[-n:])
        points = product(_t(grad).shape[-n:])
        base = c.full((*lead, area), 0, _t(grad).dtype)
        made = c.b.op("graph.scatter", base, c.reshape(indices, (*lead, points)), c.reshape(grad, (*lead, points)), type=_t(base),
                      dim=len(lead), reduce="add")
        return c.reshape(made, shape)
    return lower


def avg_pool(n: int) -> Lower:
    def lower(c: Context, x: Value, kernel: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
              count_include_pad: bool = True, divisor: int | None = None) -> Value:
        size = _window(kernel, n)
        attrs = {"kernel": size, "stride": _window(stride, n, size), "padding": _window(padding, n),
                 **({"ceil_mode": True} if ceil_mode else {}), **({} if count_include_pad else {"count_include_pad": False}),
                 **({} if divisor is None else {"divisor": divisor})}
        made = c.b.op("graph.avg_pool", _batched(c, x, n), type=_type(c, None, n), **attrs)
        return c.reshape(made, c.shape)
    return lower


def avg_pool_backward(n: int) -> Lower:
    """Divides the gradient by the size of its window, then spreads it: a transposed depthwise convolution with ones."""
    def lower(c: Context, grad: Value, x: Value, kernel: Any, stride: Any, padding: Any, ceil_mode: bool, count_include_pad: bool,
              divisor: int | None) -> Value:
        size, pads = _window(kernel, n), _window(padding, n)
        steps = _window(stride, n, size)
        shape = _t(_batched(c, x, n)).shape
        grad = _batched(c, grad, n)
        out = _t(grad).shape
        work = F32 if _t(grad).dtype.name in ("bf16", "f16") else _t(grad).dtype
        channels = shape[1]
        if not isinstance(channels, int):
            raise Unsupported("pooling with a symbolic number of channels")
        share = c.cast(grad, work)
        if divisor is not None:
            share = c.ew("div", share, float(divisor))
        else:
            for i in range(n):
                count = _window_size(c, out[2 + i], shape[2 + i], size[i], steps[i], pads[i], count_include_pad)
                share = c.ew("div", share, c.reshape(c.cast(count, work), [out[2 + i] if j == i else 1 for j in range(n)]))
        reach = [(out[2 + i] - 1) * steps[i] + size[i] for i in range(n)]
        whole = c.b.op("graph.conv_transpose", share, c.full((channels, 1, *size), 1.0, work), stride=steps, padding=(0,) * n,
                       dilation=(1,) * n, groups=channels, type=TensorType((*out[:2], *reach), work))
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


def adaptive_avg_pool(n: int) -> Lower:
    """Windows of one size when the output divides the input; the mean of everything when the output is 1."""
    def lower(c: Context, x: Value, output_size: Any) -> Value:
        shape, rank = _t(x).shape, _t(x).rank
        out = c.shape[-n:]
        if all(o == 1 for o in out):
            return c.reduce("mean", x, tuple(range(rank - n, rank)), True)
        kernel = []
        for s, o in zip(shape[-n:], out, strict=True):
            if not isinstance(s, int) or not isinstance(o, int) or s % o:
                raise Unsupported("adaptive pooling with windows of several sizes")
            kernel.append(s // o)
        return avg_pool(n)(c, x, kernel, kernel)
    return lower


def adaptive_avg_pool_backward(c: Context, grad: Value, x: Value) -> Value:
    shape, out = _t(x).shape, _t(grad).shape
    n = 2
    kernel: list[int] = []
    for s, o in zip(shape[-n:], out[-n:], strict=True):
        if not isinstance(s, int) or not isinstance(o, int) or s % o:
            raise Unsupported("adaptive pooling with windows of several sizes")
        kernel.append(s // o)
    lead = shape[:-n]
    apart = [v for o, k in zip(out[-n:], kernel, strict=True) for v in (o, k)]
    unit = [v for o in out[-n:] for v in (o, 1)]
    spread = c.expand(c.reshape(grad, (*lead, *unit)), (*lead, *apart))
    return c.ew("div", c.reshape(spread, shape), float(product(kernel)))  # type: ignore[arg-type]


ROWS: dict[str, Lower] = {
    "aten.max_pool2d_with_indices.default": max_pool(2),
    "aten.max_pool3d_with_indices.default": max_pool(3),
    "aten.max_pool2d_with_indices_backward.default": max_pool_backward(2),
    "aten.max_pool3d_with_indices_backward.default": max_pool_backward(3),
    "aten.avg_pool1d.default": avg_pool(1),
    "aten.avg_pool2d.default": avg_pool(2),
    "aten.avg_pool3d.default": avg_pool(3),
    "aten.avg_pool2d_backward.default": avg_pool_backward(2),
    "aten.avg_pool3d_backward.default": avg_pool_backward(3),
    "aten.adaptive_avg_pool1d.default": adaptive_avg_pool(1),
    "aten._adaptive_avg_pool2d.default": adaptive_avg_pool(2),
    "aten._adaptive_avg_pool3d.default": adaptive_avg_pool(3),
    "aten._adaptive_avg_pool2d_backward.default": adaptive_avg_pool_backward,
}
