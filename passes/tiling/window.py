"""Depthwise convolutions on CPUs: a register tile of several output positions of a row by a few vectors of channels.

    window = find_window(fused, ranges)                    # None: another form of kernel fits better
    grid = emit_window(window, outputs, target, e, buffers, tile)

Needs channels innermost in the image, the taps and the result (`passes/layout.py`, `passes/pack.py`). A program computes one row of the result: all
positions along it, tile by tile, and for each tile all its channels, so that memory is read as it lies and each line while it is in the first cache.
The sums of a tile stay in registers for all taps. Taps along the row are written out: positions that several taps of a tile read are loaded once;
taps across rows are loops.

No access is masked: taps that would read the padding are left out. Across rows that shortens the loops; positions at the ends of a row, where taps
along it fall outside, are computed one at a time with loops over all taps. Channels that do not fill a tile have a narrower one of their own.
Every position sums its taps in the same order, whichever tile computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...ir import Dim, Operation, Target, TensorType, TileType, Value, element_type, sym
from ...ir.dialects.tensor import fill_of, parallel_dims
from ...ir.expr import ceildiv, floordiv, free_symbols, maximum, minimum, product, substitute
from ...ir.ranges import Bounds, known_less, known_nonnegative, lower_bound, simplify, split_linear
from ...ir.types import index
from ..structured import is_contraction, is_pointwise, space_bounds
from .bodies import evaluate_body
from .emit import Emitter
from .frame import align
from .window_tiles import Shape

__all__ = ["Slide", "Window", "emit_window", "find_window", "window_shape"]

PROGRAMS = 16
"""Programs that a launch should have at least, to share out among threads: fewer rows are cut into runs of channels."""
RUN = 64
"""Fewest channels of such a run."""


@dataclass(frozen=True)
class Slide:
    """Along one axis of the image, of `size` elements, tap k of output position p reads element p * stride + k * dilation + start.

    `dim` is the number of the position's dimension (None: there is one position), `tap` that of the tap's; `count` taps. `padded`: some are outside.
    """

    dim: int | None
    tap: int
    stride: int
    dilation: int
    start: int
    count: int
    size: Dim
    padded: bool

    def taps(self, at: Dim) -> tuple[Dim, Dim]:
        """The range of taps inside of the image at a position."""
        if not self.padded:
            return 0, self.count
        first = at * self.stride + self.start
        return maximum(0, ceildiv(-first, self.dilation)), minimum(self.count, ceildiv(self.size - first, self.dilation))

    def interior(self, positions: Dim) -> tuple[Dim, Dim]:
        """The range of positions, of so many, all of whose taps are inside."""
        if not self.padded:
            return 0, positions
        low = minimum(positions, max(0, -(self.start // self.stride)))
        last = floordiv(self.size - 1 - self.start - (self.count - 1) * self.dilation, self.stride)
        return low, maximum(low, minimum(positions, last + 1))


@dataclass(frozen=True)
class Window:
    """A depthwise convolution and the pointwise members after it. `image` and `taps` are operand numbers, `lane` is the dimension of channels,
    `along` slides along a row of the result, `across` are the others, outermost first; `place[op][d]` is the convolution's dimension (or 0) of a
    member's."""

    op: Operation
    image: int
    taps: int
    lane: int
    along: Slide
    across: tuple[Slide, ...]
    members: tuple[Operation, ...]
    place: Mapping[Operation, Sequence[Dim]]


def window_shape(w: Window) -> Shape:
    """What the choice of a tile depends on; sizes unknown at compile time are 0."""
    a, channels = w.along, w.op["dims"][w.lane]
    low, high = a.interior(w.op["dims"][a.dim])
    rows = product(s.count for s in w.across)
    assert isinstance(channels, int) and isinstance(rows, int)
    return Shape(high - low if isinstance(low, int) and isinstance(high, int) else 0, channels, rows, a.count, a.stride, a.dilation)


def find_window(fused: Operation, symbols: Bounds) -> Window | None:
    """The form of a `tensor.fused` of generics that this file computes; None if it has another."""
    members = [op for op in fused.body if op.name != "tensor.yield"]
    if any(m.name != "tensor.generic" for m in members):
        return None
    products = [m for m in members if m["reductions"]]
    if len(products) != 1 or not is_contraction(products[0]) or not all(is_pointwise(m) for m in members if m is not products[0]):
        return None
    op = products[0]
    if element_type(op.result.type).name not in ("f32", "f64"):
        return None
    place = _places(op, members, list(fused.body.args), list(fused.body.terminator.operands))
    if place is None:
        return None
    bounds = {**symbols, **space_bounds(op["dims"])}
    for image in range(2):
        found = _slides(op, image, bounds)
        lane = _lane(op, image, bounds)
        if found is None or lane is None or not isinstance(op["dims"][lane], int) or any(s.dim == lane for s in found):
            continue
        sliding = [s for s in found if s.dim is not None]
        if not sliding:
            continue
        along = min(sliding, key=lambda s: _stride(op, image, s.dim, bounds))
        across = tuple(sorted((s for s in found if s is not along), key=lambda s: -_stride(op, image, s.tap, bounds)))
        return Window(op, image, 1 - image, lane, along, across, tuple(members), place)
    return None


def _places(op: Operation, members: list[Operation], inputs: list[Value], outputs: list[Value]) -> dict[Operation, list[Dim]] | None:
    """Positions of the members over the dimensions of `op`; None where one walks others than its result's."""
    frame = align(members, inputs, outputs)
    names = [str(e) for e in frame.position[op]]
    known: dict[str, Dim] = {f: sym(f"d{j}") for j, f in enumerate(names[:len(parallel_dims(op))])}
    place: dict[Operation, list[Dim]] = {}
    for m in members:
        if m is op:
            continue
        at: list[Dim] = [known.get(str(e), 0 if frame.sizes.get(str(e)) == 1 else -1) for e in frame.position[m]]
        if -1 in at:
            return None
        place[m] = at
    return place


def _slides(op: Operation, i: int, bounds: Bounds) -> list[Slide] | None:
    """How the windows lie on operand i; None if that is no image with windows along some of its axes."""
    parallel, dims, v = len(parallel_dims(op)), op["dims"], op.operands[i]
    assert isinstance(v.type, TensorType)
    taps = {f"d{j}" for j in range(parallel, len(dims))}
    found: list[Slide] = []
    for e, size in zip(op["maps"][i], v.type.shape, strict=True):
        mine = free_symbols(e) & taps
        floor = lower_bound(simplify(e, bounds), bounds)
        padded = fill_of(op, i) is not None and not (known_less(e, size, bounds) and floor is not None and known_nonnegative(floor))
        if not mine:
            if padded:
                return None
            continue
        positions = free_symbols(e) - taps
        if len(mine) > 1 or len(positions) > 1 or any(not s.startswith("d") for s in positions):
            return None
        (tap,), dim = mine, next(iter(positions), None)
        split = split_linear(e, tap)
        rest = (0, split[1]) if split is not None and dim is None else split_linear(split[1], dim) if split is not None and dim is not None else None
        if split is None or rest is None:
            return None
        numbers = (rest[0] if dim is not None else 1, split[0], rest[1], dims[int(tap[1:])])
        if not all(isinstance(n, int) for n in numbers) or numbers[0] < 1 or numbers[1] < 1:  # type: ignore[operator]
            return None
        found.append(Slide(None if dim is None else int(dim[1:]), int(tap[1:]), *numbers, size, padded))  # type: ignore[arg-type]
    places = [s.dim for s in found if s.dim is not None]
    return found if sorted(s.tap for s in found) == list(range(parallel, len(dims))) and len(set(places)) == len(places) else None


def _lane(op: Operation, image: int, bounds: Bounds) -> int | None:
    """The dimension along which the image, the taps and the result are contiguous, if the taps depend on no other position."""
    result, taps = op.result.type, op["maps"][1 - image]
    assert isinstance(result, TensorType)
    if fill_of(op, 1 - image) is not None:
        return None
    parallel = {f"d{d}" for d in range(len(parallel_dims(op)))}
    for d in range(result.rank):
        if result.layout[d] == 1 and result.shape[d] != 1:
            of_taps = frozenset().union(*(free_symbols(e) for e in taps)) & parallel
            fits = of_taps == {f"d{d}"} and all(_stride(op, i, d, bounds) == 1 for i in (0, 1))
            return d if fits else None
    return None


def _stride(op: Operation, i: int, d: int | None, bounds: Bounds) -> int:
    """The distance in operand i between steps of a dimension; unknown sizes count as much."""
    split = split_linear(_offset(op.operands[i], op["maps"][i], {}, bounds), f"d{d}")
    return -1 if split is None else split[0] if isinstance(split[0], int) else 1 << 40


def _offset(v: Value, m: Sequence[Dim], at: Mapping[str, Dim], bounds: Bounds) -> Dim:
    assert isinstance(v.type, TensorType)
    total: Dim = 0
    for e, stride in zip(m, v.type.layout, strict=True):
        total = total + substitute(e, at) * stride
    return simplify(total, bounds)


def emit_window(w: Window, outputs: Sequence[Value], target: Target, e: Emitter, buffers: Mapping[Value, Value], tile: tuple[int, int]) -> list[Dim]:
    """Writes the body of the kernel, in tiles of so many positions by channels; returns the grid."""
    return _Lowering(w, outputs, target, buffers, tile).emit(e)


class _Lowering:
    def __init__(self, w: Window, outputs: Sequence[Value], target: Target, buffers: Mapping[Value, Value], tile: tuple[int, int]):
        self.w, self.outputs, self.buffers, self.tile = w, outputs, buffers, tile
        self.fused = target.multiplies_and_adds
        self.made: dict[Value, Operation] = {r: m for m in w.members for r in m.results}
        self.dtype = element_type(w.op.result.type)
        self.channels: tuple[Dim, Dim] = (0, w.op["dims"][w.lane])

    def emit(self, e: Emitter) -> list[Dim]:
        w, dims = self.w, self.w.op["dims"]
        rows = [d for d in range(len(parallel_dims(w.op))) if d not in (w.lane, w.along.dim)]
        count, channels = product(dims[d] for d in rows), dims[w.lane]
        unit = -(-RUN // self.tile[1]) * self.tile[1]
        runs = min(-(-PROGRAMS // count), max(1, channels // unit)) if isinstance(count, int) and count > 0 else 1
        per = -(-channels // (runs * unit)) * unit
        runs = -(-channels // per)
        grid = [*([runs] if runs > 1 else []), *(dims[d] for d in rows)]
        programs = [e.fresh(e.builder.op("tile.program_id", type=index, axis=k), 0, n - 1) for k, n in enumerate(grid)]
        if runs > 1:
            p = programs.pop(0)
            self.channels = (p * per, minimum(channels, p * per + per))
        self._row(e, dict(zip(rows, programs, strict=True)))
        return grid

    def _row(self, e: Emitter, at: dict[int, Dim]) -> None:
        """All positions of a row: tiles between, then those at the ends by themselves."""
        along, size = self.w.along, self.w.op["dims"][self.w.along.dim]
        low, high = along.interior(size)
        wide, inside = self.tile[0], high - low
        done = low + floordiv(inside, wide) * wide
        self._positions(e, at, low, done, wide)
        if isinstance(inside, int):
            self._positions(e, at, done, high, inside % wide)
            done = high
        apart = done - low  # the ends as one range, from which these are left out
        if low == 0 or not isinstance(low, int) or not isinstance(apart, int):
            self._ends(e, at, 0, low, lambda i: i)
            self._ends(e, at, done, size, lambda i: i)
        else:
            self._ends(e, at, 0, size - apart, lambda i: i + minimum(1, floordiv(i, low)) * apart)

    def _positions(self, e: Emitter, at: dict[int, Dim], low: Dim, high: Dim, wide: int) -> None:
        if wide == 0 or low == high:
            return

        def body(inner: Emitter, x: Dim, _: list[Value]) -> list[Value]:
            self._all_channels(inner, {**at, self.w.along.dim: x}, wide, inside=True)  # type: ignore[dict-item]
            return []
        e.loop(low, high, wide, [], body)

    def _ends(self, e: Emitter, at: dict[int, Dim], low: Dim, high: Dim, place: Callable[[Dim], Dim]) -> None:
        if low == high:
            return
        along = self.w.along

        def body(inner: Emitter, i: Dim, _: list[Value]) -> list[Value]:
            x = inner.named(simplify(place(i), inner.bounds()), self.w.op["dims"][along.dim] - 1)
            self._all_channels(inner, {**at, along.dim: x}, 1, inside=False)  # type: ignore[dict-item]
            return []
        e.loop(low, high, 1, [], body)

    def _all_channels(self, e: Emitter, at: dict[int, Dim], wide: int, inside: bool) -> None:
        first, last = self.channels
        width, channels = self.tile[1], self.w.op["dims"][self.w.lane]
        whole = channels // width * width

        def tiles(low: Dim, high: Dim, lanes: int) -> None:
            if low == high:
                return

            def body(inner: Emitter, c: Dim, _: list[Value]) -> list[Value]:
                shaped = Emitter(inner.builder, (wide, lanes), inner.symbols, inner.variables, inner.ranges, inner.coarse)
                self._tile(shaped, {**at, self.w.lane: c + sym("t1")}, inside)
                return []
            e.loop(low, high, lanes, [], body)
        tiles(first, minimum(whole, last), width)
        if channels % width:
            tiles(maximum(whole, first), last, channels % width)

    def _tile(self, e: Emitter, at: dict[int, Dim], inside: bool) -> None:
        w = self.w
        place = {f"d{d}": x + sym("t0") if e.shape[0] > 1 and d == w.along.dim else x for d, x in at.items()}
        zero = e.broadcast(e.builder.constant(0.0, self.dtype), e.shape)

        def taps(x: Emitter, slides: Sequence[Slide], here: dict[str, Dim], acc: Value) -> Value:
            if not slides:
                return self._step(x, here, acc)
            s, *rest = slides
            if s is w.along and inside:
                for k in range(s.count):
                    acc = taps(x, rest, {**here, f"d{s.tap}": k}, acc)
                return acc
            low, high = s.taps(0 if s.dim is None else at[s.dim])
            return x.loop(simplify(low, x.bounds()), simplify(high, x.bounds()), 1, [acc],
                          lambda y, k, carried: [taps(y, rest, {**here, f"d{s.tap}": k}, carried[0])])[0]
        self._finish(e, place, taps(e, [*w.across, w.along], place, zero))

    def _step(self, e: Emitter, at: dict[str, Dim], acc: Value) -> Value:
        """acc + image * tap."""
        op, b, bounds = self.w.op, e.builder, e.bounds()
        values = {}
        for i in (self.w.taps, self.w.image):
            v = op.operands[i]
            loaded = e.load(self.buffers[v], _offset(v, op["maps"][i], at, bounds))
            x = next(iter(op.body.args[i].uses))[0]
            while x.name == "arith.cast":
                loaded = e.arith(x, [loaded])
                x = next(iter(x.result.uses))[0]
            values[i] = loaded if loaded.type.shape == e.shape else e.broadcast(loaded, e.shape)  # type: ignore[attr-defined]
        image, tap = values[self.w.image], values[self.w.taps]
        return b.arith("fma", image, tap, acc) if self.fused else b.arith("add", acc, b.arith("mul", image, tap))

    def _finish(self, e: Emitter, at: dict[str, Dim], acc: Value) -> None:
        """Applies the pointwise members, and stores what leaves the kernel."""
        values: dict[Value, Value] = {self.w.op.result: acc}
        loads: dict[Any, Value] = {}
        bounds = e.bounds()
        places: dict[Operation, dict[str, Dim]] = {self.w.op: dict(at)}
        for m, position in self.w.place.items():
            places[m] = {f"d{j}": substitute(x, at) for j, x in enumerate(position)}

        def load(v: Value, m: Sequence[Dim], here: Mapping[str, Dim]) -> Value:
            offset = _offset(v, m, here, bounds)
            if (v, offset) not in loads:
                loads[v, offset] = e.load(self.buffers[v], offset)
            return loads[v, offset]

        def value(v: Value) -> Value:
            if v not in values:
                op = self.made[v]

                def operand(i: int) -> Value:
                    x = op.operands[i]
                    return value(x) if x in self.made else load(x, op["maps"][i], places[op])
                with e.builder.at(op.location):
                    values.update(zip(op.results, evaluate_body(e, op, places[op], operand, self.buffers, []), strict=True))
            return values[v]

        for out in self.outputs:
            op, made = self.made[out], value(out)
            assert isinstance(out.type, TensorType)
            offset = _offset(out, [sym(f"d{j}") for j in range(out.type.rank)], places[op], bounds)
            if isinstance(made.type, TileType) and made.type.shape != e.shape:
                made = e.broadcast(made, e.shape)
            e.store(self.buffers[out], made, offset)
