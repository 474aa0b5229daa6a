"""Convolutions and their gradients, as contractions with strided, padded reads.

Iteration space of `conv`: (b, o, *out; c, *kernel). Dimensions that are always 1 are left out of the reduction: c when a
group has one channel (depthwise), and each kernel dimension of size 1, so that a 1x1 convolution is a plain matrix product.
With groups the channel read is that of the output channel's group.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from functools import reduce as reduce_pairs
from itertools import product as combinations
from math import prod

from ...ir import Builder, Dim, Operation, Value
from ...ir.expr import as_int, ceildiv, floordiv, mod
from .common import Map, Rule, convert, d, index, move, reduce, shape_of, tensor_type, to_dtype
from .contraction import contract

__all__ = ["RULES"]


class _Reduction:
    """The reduction dimensions of a space with `parallel` parallel ones; those of constant size 1 are index 0 instead."""

    def __init__(self, parallel: int):
        self.parallel = parallel
        self.sizes: list[Dim] = []

    def add(self, size: Dim) -> Dim:
        """The index expression of one more dimension."""
        if size == 1:
            return 0
        self.sizes.append(size)
        return d(self.parallel + len(self.sizes) - 1)


def _window(op: Operation, out: Sequence[Dim], kernel: Sequence[Dim]) -> Map:
    """Where the forward convolution reads its input, per spatial dimension, at output positions `out` and kernel `kernel`."""
    steps = zip(out, kernel, op["stride"], op["padding"], op["dilation"], strict=True)
    return tuple(o * stride - padding + k * dilation for o, k, stride, padding, dilation in steps)


def _channel(o: Dim, out_channels: Dim, groups: int, per_group: Dim, c: Dim) -> Dim:
    """The input channel that output channel `o` reads at channel `c` of its group."""
    if groups == 1:
        return c
    return floordiv(o, floordiv(out_channels, groups)) * per_group + c


def _fill(op: Operation) -> int | None:
    return 0 if any(p != 0 for p in op["padding"]) else None


def _conv(b: Builder, op: Operation) -> list[Value]:
    x, w = op.operands
    out, (channels_out, per_group, *kernel) = shape_of(op.result), shape_of(w)
    space = _Reduction(len(out))
    c = space.add(per_group)
    ks = [space.add(k) for k in kernel]
    read_x = (d(0), _channel(d(1), channels_out, op["groups"], per_group, c),
              *_window(op, [d(2 + i) for i in range(len(ks))], ks))
    return [contract(b, op, out, space.sizes, (x, w), (read_x, (d(1), c, *ks)), _padded(op, x, None))]


def _padded(op: Operation, *reads: Value | None) -> tuple:
    """Fills: zero for the operands given, when the convolution pads."""
    if _fill(op) is None:
        return ()
    return tuple(None if v is None else 0.0 if tensor_type(v).dtype.is_float else 0 for v in reads)


def _conv_weight_grad(b: Builder, op: Operation) -> list[Value]:
    """Dimensions (o, c, *kernel; b, *out)."""
    grad, x = op.operands
    out, (batch, channels_out, *spatial) = shape_of(op.result), shape_of(grad)
    space = _Reduction(len(out))
    n = space.add(batch)
    positions = [space.add(s) for s in spatial]
    kernel = [d(2 + i) for i in range(len(positions))]
    read_x = (n, _channel(d(0), channels_out, op["groups"], out[1], d(1)), *_window(op, positions, kernel))
    return [contract(b, op, out, space.sizes, (grad, x), ((n, d(0), *positions), read_x), _padded(op, None, x))]


def _conv_transpose(b: Builder, op: Operation) -> list[Value]:
    """Dimensions (b, c, *result; o, *kernel): each result element gathers the input elements that the convolution spread to it.

    Input position (y + padding - k*dilation) / stride, where that is whole and within the input; elsewhere nothing is added.
    """
    if op["groups"] == 1 and all(s == 1 for s in op["stride"]):
        return [_with_turned_taps(b, op)]
    known = all(isinstance(n, int) for v in (*op.operands, op.result) for n in shape_of(v))
    if op["groups"] == 1 and all(x == 1 for x in op["dilation"]) and any(s != 1 for s in op["stride"]):
        ragged = any(k % stride != 0 for k, stride in zip(shape_of(op.operands[1])[2:], op["stride"], strict=True))
        return [_phases_apart(b, op) if ragged and known and prod(op["stride"]) <= APART else _by_phase(b, op)]
    x, w = op.operands
    out, (channels_in, per_group, *kernel) = shape_of(op.result), shape_of(w)
    groups = op["groups"]
    per_out = channels_in if groups == 1 else floordiv(channels_in, groups)
    space = _Reduction(len(out))
    o = space.add(per_out)
    ks = [space.add(k) for k in kernel]
    group_of_c = 0 if groups == 1 else floordiv(d(1), per_group)
    o = group_of_c * per_out + o
    steps = list(zip(ks, op["stride"], op["padding"], op["dilation"], strict=True))
    spread = [d(2 + i) + pad - k * dilation for i, (k, _, pad, dilation) in enumerate(steps)]
    read_x = (d(0), o, *(floordiv(e, stride) for e, (_, stride, _, _) in zip(spread, steps, strict=True)))
    read_w = (o, d(1) if groups == 1 else mod(d(1), per_group), *ks)
    want = tensor_type(op.result).dtype
    strided = [(i, k, step) for i, (k, *step) in enumerate(steps) if step[0] != 1]

    def position(i: Builder, dim: int, k: Dim, padding: int, dilation: int) -> Value:
        at = index(i, 2 + dim)
        if padding:
            at = i.arith("add", at, padding)
        if k == 0:
            return at
        step = index(i, int(str(k)[1:]))
        return i.arith("sub", at, step if dilation == 1 else i.arith("mul", step, dilation))

    def masked(i: Builder, value: Value) -> Value:
        for dim, k, (stride, padding, dilation) in strided:
            whole = i.arith("eq", i.arith("mod", position(i, dim, k, padding, dilation), stride), 0)
            value = i.arith("select", whole, value, 0)
        return value

    def body(i: Builder, value: Value, weight: Value) -> Value:
        if not want.is_float:
            value, weight = to_dtype(i, value, want), to_dtype(i, weight, want)
        return i.arith("mul", masked(i, value), weight)

    zero = 0.0 if tensor_type(x).dtype.is_float else 0
    total = reduce(b, out, space.sizes, (x, w), (read_x, read_w), body, "sum", fills=(zero, None))
    return [convert(b, total, want)]


def _with_turned_taps(b: Builder, op: Operation) -> Value:
    """A conv_transpose of stride 1 as a convolution whose taps are read backwards: what makes those fast, fits it."""
    x, w = op.operands
    out, (channels_in, _, *kernel) = shape_of(op.result), shape_of(w)
    space = _Reduction(len(out))
    o = space.add(channels_in)
    ks = [space.add(k) for k in kernel]
    steps = list(zip(ks, kernel, op["padding"], op["dilation"], strict=True))
    read_x = [d(2 + i) + padding - (size - 1) * dilation + k * dilation for i, (k, size, padding, dilation) in enumerate(steps)]
    taps = [size - 1 - k for k, size, _, _ in steps]
    inside = all(k == 1 and padding == 0 for k, padding in zip(kernel, op["padding"], strict=True)) and shape_of(x)[2:] == out[2:]
    zero = 0.0 if tensor_type(x).dtype.is_float else 0
    return contract(b, op, out, space.sizes, (x, w), ((d(0), o, *read_x), (o, d(1), *taps)), () if inside else (zero, None))


APART = 4
"""Most phases of a strided conv_transpose that are contractions of their own."""


def _phases_apart(b: Builder, op: Operation) -> Value:
    """A strided conv_transpose whose phases have different numbers of taps as one convolution of stride 1 per phase, with the
    taps that it meets (none: zeros), and a pointwise op that takes
    each result position from its phase.

    With y + padding = i*stride + r, position i of phase r sums kernel elements r + stride*t at input positions i - t.
    """
    x, w = op.operands
    (batch, channels, *size), (channels_in, _, *kernel) = shape_of(op.result), shape_of(w)
    steps = list(zip(op["stride"], op["padding"], kernel, size, strict=True))
    out = [batch, channels, *(ceildiv(extent + padding, stride) for stride, padding, _, extent in steps)]
    zero = 0.0 if tensor_type(x).dtype.is_float else 0
    made: dict[tuple[int, ...], Value] = {}
    for phase in combinations(*(range(stride) for stride, *_ in steps)):
        counts = [as_int(ceildiv(max(0, as_int(k) - r), stride)) for r, (stride, _, k, _) in zip(phase, steps, strict=True)]
        if 0 in counts:
            continue
        space = _Reduction(len(out))
        o = space.add(channels_in)
        taps = [space.add(n) for n in counts]
        at_x = [d(2 + i) - (n - 1) + t for i, (t, n) in enumerate(zip(taps, counts, strict=True))]
        at_w = [r + stride * (n - 1 - t) for r, t, n, (stride, *_) in zip(phase, taps, counts, steps, strict=True)]
        made[phase] = contract(b, op, out, space.sizes, (x, w), ((d(0), o, *at_x), (o, d(1), *at_w)), (zero, None))

    def body(i: Builder, *values: Value) -> Value:
        at = []
        for n, (stride, padding, _, _) in enumerate(steps):
            y = i.arith("add", index(i, 2 + n), padding) if padding else index(i, 2 + n)
            at.append(i.arith("mod", y, stride) if stride != 1 else None)
        total = i.constant(zero, tensor_type(op.result).dtype)
        for phase, v in zip(made, values, strict=True):
            here = [i.arith("eq", y, r) for r, y in zip(phase, at, strict=True) if y is not None]
            total = i.arith("select", reduce_pairs(partial(i.arith, "and"), here), v, total)
        return total

    read = (d(0), d(1), *(floordiv(d(2 + n) + padding, stride) if stride != 1 else d(2 + n) + padding
                          for n, (stride, padding, _, _) in enumerate(steps)))
    return b.generic(list(made.values()), [read] * len(made), shape_of(op.result), body, name=op.result.name).result


def _by_phase(b: Builder, op: Operation) -> Value:
    """A strided conv_transpose as one contraction, without wasted products where strides divide the kernel.

    With y + padding = i*stride + r, only kernel elements r + stride*t meet result position y, at input position i - t. So the contraction's
    dimensions are (b, c, i, r per spatial dimension; o, t per spatial dimension), and the result is read back at ((y + padding) // stride,
    (y + padding) % stride).
    """
    x, w = op.operands
    (batch, channels, *size), (channels_in, _, *kernel) = shape_of(op.result), shape_of(w)
    steps = list(zip(op["stride"], op["padding"], kernel, size, strict=True))
    dims: list[Dim] = [batch, channels]
    for stride, padding, _, extent in steps:
        dims += [ceildiv(extent + padding, stride), stride]
    space = _Reduction(len(dims))
    o = space.add(channels_in)
    taps = [space.add(ceildiv(k, stride)) for stride, _, k, _ in steps]
    at_x, at_w, at_y = [], [], []
    for n, (t, (stride, padding, _, _)) in enumerate(zip(taps, steps, strict=True)):
        at_x.append(d(2 + 2 * n) - t)
        at_w.append(d(3 + 2 * n) + t * stride if stride != 1 else t)
        y = d(2 + n) + padding
        at_y += [floordiv(y, stride), mod(y, stride)]
    zero = 0.0 if tensor_type(x).dtype.is_float else 0
    ragged = any(k % stride != 0 for stride, _, k, _ in steps)
    phases = contract(b, op, dims, space.sizes, (x, w), ((d(0), o, *at_x), (o, d(1), *at_w)), (zero, zero if ragged else None))
    return move(b, phases, shape_of(op.result), (d(0), d(1), *at_y))


RULES: dict[str, Rule] = {
    "graph.conv": _conv, "graph.conv_transpose": _conv_transpose, "graph.conv_weight_grad": _conv_weight_grad,
}
