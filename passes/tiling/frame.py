"""The loop nest of a fused group: its frame, which dimensions collapse, which one is vectorised, and in which stage each value is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...ir import Dim, Operation, TensorType, Value, sym
from ...ir.dialects.tensor import fill_of, parallel_dims
from ...ir.expr import free_symbols, minimum, product, substitute
from ...ir.ranges import Bounds, simplify, split_linear
from ..rescale import Declined, Dependence, about_mean
from ..structured import EXPENSIVE, body_ops, uses_dims

__all__ = ["Access", "Frame", "align", "analyse", "traffic", "work"]


@dataclass(frozen=True)
class Access:
    """One read or write: the flat offset in elements as an expression over frame dimensions f0, f1, ..."""

    value: Value
    offset: Dim
    bytes: int
    is_store: bool
    weight: Dim


@dataclass
class Frame:
    """Loops f0, f1, ... of sizes `sizes`; `inner` are reduced or missing in some member; `position[op][d]` is dimension d of an op
    as an expression over the frame."""

    sizes: dict[str, Dim]
    inner: frozenset[str]
    position: dict[Operation, list[Dim]]
    members: list[Operation]
    inputs: list[Value]
    outputs: list[Value]
    accesses: list[Access] = field(default_factory=list)
    stage: dict[Operation, int] = field(default_factory=dict)
    online: dict[Operation, Operation] = field(default_factory=dict)  # a sum -> the maximum of its own stage that shifts it
    moments: dict[Operation, Operation] = field(default_factory=dict)  # a sum of squares about the mean -> the sum of its own stage
    means: dict[Operation, Operation] = field(default_factory=dict)  # what divides such a sum by the number of its terms -> the sum

    @property
    def outer(self) -> list[str]:
        return [f for f in self.sizes if f not in self.inner]

    def bounds(self, symbols: Bounds) -> dict[str, tuple[Dim | None, Dim | None]]:
        return {**symbols, **{f: (0, s - 1) for f, s in self.sizes.items()}}

    def is_full(self, op: Operation) -> bool:
        """The op is computed at every frame point, not once per outer point."""
        if op["reductions"]:
            return False
        used = {f for e in self.position[op] for f in _names(e)}
        return bool(used & self.inner) or not self.inner


def _names(e: Dim) -> set[str]:
    return {s for s in free_symbols(e) if s[0] == "f" and s[1:].isdigit()}


def analyse(fused: Operation, symbols: Bounds, members: list[Operation] | None = None) -> Frame:
    """The frame of a `tensor.fused` of generics, or of some of its members."""
    outputs = list(fused.body.terminator.operands)
    if members is None:
        members = [op for op in fused.body if op.name == "tensor.generic"]
    else:
        outputs = [v for v in outputs if v.defining_op in members]
    frame = align(members, list(fused.body.args), outputs)
    _collect_accesses(frame, symbols)
    _collapse(frame, symbols)
    _assign_stages(frame)
    return frame


def align(members: list[Operation], inputs: list[Value], outputs: list[Value]) -> Frame:
    """Rebuilds the shared frame from the members' reads of each other (the fusion pass made sure that there is one)."""
    place: dict[Operation, list[str | None]] = {}
    sizes: dict[str, Dim] = {}
    made: dict[Value, Operation] = {r: op for op in members for r in op.results}

    def new(size: Dim) -> str:
        name = f"f{len(sizes)}"
        sizes[name] = size
        return name

    anchor = max(members, key=lambda op: (len([d for d in op["dims"] if d != 1]), op["reductions"]))
    order = [anchor, *(m for m in members if m is not anchor)]
    place[anchor] = [new(s) for s in anchor["dims"]]
    pending = order[1:]
    while pending:
        progressed = []
        for op in pending:
            dims = _linked(op, place, made, members)
            if dims is None:
                continue
            _complete(op, dims, sizes, place, new)
            place[op] = dims
            progressed.append(op)
        pending = [op for op in pending if op not in place]
        if not progressed and pending:
            op = pending[0]
            dims = [None] * len(op["dims"])
            _complete(op, dims, sizes, place, new)
            place[op] = dims
            pending = pending[1:]
    wide = [f for f, s in sizes.items() if s != 1]
    inner: set[str] = set()
    for op in members:
        have = set(place[op][:len(parallel_dims(op))])
        inner |= {f for f in wide if f not in have}
    return Frame(sizes, frozenset(inner), {op: [sym(f) for f in place[op]] for op in members}, members, inputs, outputs)  # type: ignore[arg-type]


def _linked(op: Operation, place: dict[Operation, list[Any]], made: dict[Value, Operation], members: list[Operation]) -> list[Any] | None:
    """Frame names of the dims of `op` that reads tie to an already placed member; None if nothing ties it."""
    dims: list[Any] = [None] * len(op["dims"])
    tied = False
    for v, m in zip(op.operands, op["maps"], strict=True):
        producer = made.get(v)
        if producer in place and m is not None:
            tied = True
            for e, f in zip(m, place[producer], strict=False):
                _tie(dims, e, f)
    for reader in members:
        if reader not in place:
            continue
        for v, m in zip(reader.operands, reader["maps"], strict=True):
            if made.get(v) is op and m is not None:
                tied = True
                for j, e in enumerate(m):
                    text = str(e)
                    if text[0] == "d" and text[1:].isdigit():
                        dims[j] = place[reader][int(text[1:])]
    if tied:
        return dims
    for v, m in zip(op.operands, op["maps"], strict=True):  # siblings of one input
        for other in members:
            if m is None or other not in place or v not in other.operands:
                continue
            theirs = other["maps"][other.operands.index(v)]
            if theirs is None:
                continue
            for e, t in zip(m, theirs, strict=True):
                text = str(t)
                if text[0] == "d" and text[1:].isdigit() and text not in [str(x) for x in theirs if x is not t]:
                    _tie(dims, e, place[other][int(text[1:])])
            if all(d is not None for d in dims):
                return dims
            dims = [None] * len(op["dims"])
    return None


def _tie(dims: list[Any], e: Dim, f: Any) -> None:
    text = str(e)
    if text[0] == "d" and text[1:].isdigit():
        dims[int(text[1:])] = f


def _complete(op: Operation, dims: list[Any], sizes: dict[str, Dim], place: dict[Operation, list[Any]], new: Any) -> None:
    """Gives the untied dims of `op` frame names: reduced dims must be ones that some placed member reduces or lacks."""
    parallel = len(parallel_dims(op))
    lacking = {f for f in sizes for other in place if sizes[f] != 1 and f not in place[other][:len(parallel_dims(other))]}
    for d in range(len(dims)):
        if dims[d] is not None:
            continue
        free = [f for f in sizes if f not in dims and sizes[f] == op["dims"][d]]
        preferred = [f for f in free if (f in lacking) == (d >= parallel)] or free
        dims[d] = preferred[0] if preferred else new(op["dims"][d])


def _offset(op: Operation, m: Any, layout: tuple[Dim, ...], frame: Frame, bounds: Bounds) -> Dim:
    env = {f"d{j}": e for j, e in enumerate(frame.position[op])}
    total: Dim = 0
    for e, stride in zip(m, layout, strict=True):
        total = total + substitute(e, env) * stride
    return simplify(total, bounds)


def _collect_accesses(frame: Frame, symbols: Bounds) -> None:
    bounds = frame.bounds(symbols)
    internal = {r for op in frame.members for r in op.results}
    for op in frame.members:
        for v, m in zip(op.operands, op["maps"], strict=True):
            if v in internal or m is None:
                continue
            assert isinstance(v.type, TensorType)
            frame.accesses.append(Access(v, _offset(op, m, v.type.layout, frame, bounds), v.type.dtype.bytes, False, v.type.numel))
        for r in op.results:
            if r in frame.outputs:
                assert isinstance(r.type, TensorType)
                m = [sym(f"d{j}") for j in range(r.type.rank)]
                frame.accesses.append(Access(r, _offset(op, m, r.type.layout, frame, bounds), r.type.dtype.bytes, True, r.type.numel))


def _collapse(frame: Frame, symbols: Bounds) -> None:
    """Merges dimensions that every access walks as one: stride(a) == stride(b) * size(b). Positions become div/mod of the merged one,
    which cancel out in every offset."""
    pinned = set()
    for op in frame.members:
        for d in uses_dims(op):
            pinned |= _names(frame.position[op][d])
        for i, m in enumerate(op["maps"]):
            if fill_of(op, i) is not None and m is not None:
                for e in m:
                    env = {f"d{j}": p for j, p in enumerate(frame.position[op])}
                    pinned |= _names(substitute(e, env))
    if 0 in frame.sizes.values():
        return  # nothing will run
    for f in [f for f, s in frame.sizes.items() if s == 1]:
        _substitute(frame, {f: 0}, symbols)
        del frame.sizes[f]
        frame.inner -= {f}
    again = True
    while again:
        again = False
        names = [f for f in frame.sizes if f not in pinned]
        for a in names:
            for b in names:
                if a != b and (a in frame.inner) == (b in frame.inner) and all(_walks_as_one(x.offset, a, b, frame.sizes[b]) for x in frame.accesses):
                    size = frame.sizes[a] * frame.sizes[b]
                    merged = sym(b)
                    old_b = frame.sizes[b]
                    frame.sizes[b] = size
                    _substitute(frame, {a: merged // old_b, b: merged % old_b}, symbols)
                    del frame.sizes[a]
                    frame.inner -= {a}
                    again = True
                    break
            if again:
                break


def _walks_as_one(offset: Dim, a: str, b: str, size_b: Dim) -> bool:
    first, second = split_linear(offset, a), split_linear(offset, b)
    return first is not None and second is not None and first[0] == second[0] * size_b


def _substitute(frame: Frame, env: dict[str, Dim], symbols: Bounds) -> None:
    bounds = frame.bounds(symbols)
    for op in frame.members:
        frame.position[op] = [simplify(substitute(e, env), bounds) for e in frame.position[op]]
    frame.accesses = [Access(x.value, simplify(substitute(x.offset, env), bounds), x.bytes, x.is_store, x.weight) for x in frame.accesses]


def _assign_stages(frame: Frame) -> None:
    """stage[op]: which loop over the inner dimensions computes it. Results of a reduction in stage k are ready for stage k + 1."""
    made = {r: op for op in frame.members for r in op.results}
    for op in frame.members:
        level = 0
        partner = frame.online.get(op) or frame.moments.get(op)
        if partner is not None:
            frame.stage[op] = frame.stage[partner]
            continue
        for v in op.operands:
            if v in made:
                producer = made[v]
                level = max(level, frame.stage[producer] + (1 if producer["reductions"] else 0))
        frame.stage[op] = level


def make_online(frame: Frame) -> None:
    """Sums of exp(x - max(x)) move to the stage of the maximum: one pass over the row less. What is summed is computed again where it is needed
    later."""
    made: dict[Value, Operation] = {r: op for op in frame.members for r in op.results}

    def kind_of(v: Value) -> str:
        op = made.get(v)
        return "" if op is None else "reduction" if op["reductions"] else "full" if frame.is_full(op) else "row"

    rules = Dependence(kind_of)
    for op in frame.members:
        if op["reductions"] and op["combine"] == ("sum",):
            try:
                f = rules.of(op, op.body.terminator.operands[0])
                maximum = made[f.value] if f.kind == "product" and f.value in made and not f.scales and not f.guarded else None
                plain = maximum is not None and maximum["reductions"] and maximum["combine"] == ("max",) and rules.of(
                    maximum, maximum.body.terminator.operands[0]).kind == "free"
            except Declined:
                continue
            if plain and maximum is not None and frame.stage[op] == frame.stage[maximum] + 1:
                frame.online[op] = maximum
    if frame.online:
        _assign_stages(frame)


def make_moments(frame: Frame) -> None:
    """Sums of (x - mean(x))^2 move to the stage of the mean: one pass over the row less."""
    made: dict[Value, Operation] = {r: op for op in frame.members for r in op.results}
    for op in frame.members:
        total = about_mean(op, made, lambda a, i, b, j: _same_read(frame, a, i, b, j)) if op["reductions"] else None
        if total is not None and frame.stage[op] == frame.stage[total] + 1:
            frame.moments[op] = total
            frame.means |= {m: total for m in frame.members if tuple(m.operands) == (total.result,) and m.results[0] in op.operands}
    if frame.moments:
        _assign_stages(frame)


def _same_read(frame: Frame, a: Operation, i: int, b: Operation, j: int) -> bool:
    """Operand i of member a and operand j of member b are one element at every point of the frame."""
    (v, m), (w, n) = (a.operands[i], a["maps"][i]), (b.operands[j], b["maps"][j])
    if v is not w or m is None or n is None or repr(fill_of(a, i)) != repr(fill_of(b, j)):
        return False

    def place(op: Operation, x: Any) -> list[Dim]:
        env = {f"d{k}": e for k, e in enumerate(frame.position[op])}
        return [simplify(substitute(e, env), frame.bounds({})) for e in x]

    return place(a, m) == place(b, n)


def is_expensive(op: Operation) -> bool:
    """Worth keeping rather than computing again in a later stage."""
    return any(o.name in EXPENSIVE for o in body_ops(op))


def traffic(frame: Frame) -> Dim:
    """Bytes read and written if each element that is touched moves once: of a tensor that is read through slices, at most their points."""
    touched: dict[Value, dict[Dim, Dim]] = {}
    access = {x.value: x for x in frame.accesses}
    for x in frame.accesses:
        touched.setdefault(x.value, {})[x.offset] = product(s for f, s in frame.sizes.items() if f in free_symbols(x.offset))
    return sum((minimum(x.weight, sum(touched[v].values(), 0)) * x.bytes for v, x in access.items()), 0)  # type: ignore[return-value]


def work(frame: Frame) -> Dim:
    """Scalar operations, counting one per body op and point."""
    points = product(frame.sizes.values())
    return points * sum(len(op.body) for op in frame.members)
