"""CPU contractions get their right operand in panels.

The microkernel wants, for each panel of NR columns and each k, NR contiguous elements. This pass rewrites the right operand B[.., k, n] of a
contraction into packed[.., n // NR, k.., n % NR], made by an ordinary pointwise generic with zero fill past the last column; elementwise
producers of B then fuse into the packing. An operand that is made from parameters alone is packed once and kept (the launch is `cached`).
Where the target multiplies pairs of bf16 the panels hold them so: packed[.., n // NR, k // 2, n % NR, k % 2]; other integers in groups of 2 or 4
(`factors`).
Other operands that are contiguous along n already are packed when columns are ragged, or when a panel's rows lie far apart.
Padded (convolution) left operands are materialised with their padding, so that the inner loop tests no bounds.
The gradient of a convolution's parameter reads its input with windows over summed positions. Its columns are the taps, and channels innermost, so
that a panel is one tap's: the input is packed once, padding included, and each tap reads that at its own offset. With other numbers of channels
(an image's three) columns are the output channels, and the windows are read in place as the left operand.

After: every contraction that will run as a GEMM reads its right operand contiguously along n.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

from ..ir import Builder, Dim, Operation, TensorType, Value, element_type, sym
from ..ir.dialects.tensor import fill_of, parallel_dims
from ..ir.expr import ceildiv, evaluate, free_symbols, product, substitute
from ..ir.passes import Pass, PassContext, register
from ..ir.ranges import contiguous_linear, delinearize, known_nonnegative, lower_bound, simplify, split_linear, upper_bound
from ..ir.types import i64
from .layout import channel_of
from .structured import constant_values, in_order, is_contraction, plain_dims, space_bounds
from .tiling.contraction import GROUPS, MATRIX
from .tiling.cpu_tiles import contraction_tile, is_depthwise, multiplies_matrices, multiplies_pairs
from .tiling.roles import EXCHANGED, Roles, exchanged, roles_of
from .unpack import unpacked_in_kernel

SMALL_M = 4
"""With fewer rows, packing an operand that is used once costs more than it saves."""


PAIRS_M = 16
"""With fewer rows, turning an operand into pairs costs more than products of pairs save."""


@register
@dataclass(frozen=True)
class Pack(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "pack"

    def run(self, module: Operation, ctx: PassContext) -> None:
        if ctx.target.is_gpu:
            ctx.remark("note", "tensor cores read operands through shared memory: nothing to pack")
            return
        for func in [f for f in module.body if f.name == "func"]:
            constant = constant_values(func)
            for op in list(func.body):
                if is_contraction(op):
                    _choose_columns(op, constant, ctx)
                    roles = roles_of(op)
                    if is_depthwise(op):
                        _turn_image(op, constant, ctx)
                        _turn_window(op, constant, ctx)
                    elif roles is not None and roles.k:
                        roles = _exchange(op, roles, constant, ctx)
                        _materialise_padding(op, roles, ctx)
                        _pack_right(op, roles, constant, ctx)


def _pack_right(op: Operation, roles: Roles, constant: set[Value], ctx: PassContext) -> None:
    i = roles.right
    v, m = op.operands[i], op["maps"][i]
    m_size, n_size = _size(op, roles.m), _size(op, roles.n)
    k_order = sorted(roles.k, key=lambda d: -_stride(op, roles.left, d))  # the loop that walks the left operand contiguously is innermost
    mr, nr, _ = contraction_tile(op, roles, ctx.target)
    if i == op.attributes.get("_windows"):
        _pack_windows(op, roles, nr, ctx)
        return
    form = _deep_form(op, roles, k_order[-1], m_size, n_size, nr, ctx)
    if form == "matrices":
        nr = MATRIX[1]
    is_constant = v in constant
    if not is_constant:
        if isinstance(m_size, int) and m_size < SMALL_M:
            ctx.remark("declined", f"a contraction with {m_size} rows streams its right operand unpacked", op.location)
            return
        pays = form and isinstance(m_size, int) and m_size >= PAIRS_M
        if not pays and _contiguous_along_n(v, m, op, roles) and n_size % nr == 0 and _panel_is_compact(op, roles):
            return
    n_dims = [op["dims"][d] for d in roles.n]
    used = {int(s[1:]) for e in m for s in free_symbols(e) if s[0] == "d" and s[1:].isdigit()}
    batch = [d for d in roles.batch if d in used]
    panels = ceildiv(n_size, nr)
    side = GROUPS.get(form, 1)
    k_dims = [op["dims"][d] for d in k_order]
    k_dims[-1] = k_dims[-1] // side
    dims: list[Dim] = [*(op["dims"][d] for d in batch), panels, *k_dims, nr, *([side] if form else [])]
    lane = len(batch) + 1 + len(k_dims)
    at: dict[str, Dim] = {f"d{d}": sym(f"d{j}") for j, d in enumerate(batch)}
    column = sym(f"d{len(batch)}") * nr + sym(f"d{lane}")
    ragged = n_size % nr != 0
    for d, e in zip(roles.n, delinearize(column, n_dims), strict=True):
        at[f"d{d}"] = e
    for j, d in enumerate(k_order):
        at[f"d{d}"] = sym(f"d{len(batch) + 1 + j}")
    if form:
        at[f"d{k_order[-1]}"] = sym(f"d{lane - 1}") * side + sym(f"d{lane + 1}")
    bounds = space_bounds(dims)
    source_map = tuple(simplify(substitute(e, at), bounds) for e in m)
    fill = 0 if ragged else fill_of(op, i)
    b = Builder.before_op(op)
    body = _packing_body(len(batch), lane, nr, n_size) if ragged else (lambda bb, x: x)
    unpacked = None if form or not is_constant else unpacked_in_kernel(v, source_map, dims, m_size, mr, constant, body, fill, b)
    packed = unpacked or b.generic([v], [source_map], dims, body, fills=[fill], name=f"{v.name or 'b'}_packed").result
    flat = contiguous_linear([sym(f"d{d}") for d in roles.n], n_dims)
    op_bounds = space_bounds(op["dims"])
    k_at: list[Dim] = [sym(f"d{d}") for d in k_order]
    within: list[Dim] = []
    if form:
        k_at[-1:], within = [k_at[-1] // side], [k_at[-1] % side]
    new_map = (*(sym(f"d{d}") for d in batch), simplify(flat // nr, op_bounds), *k_at, simplify(flat % nr, op_bounds), *within)
    _set_operand(op, i, packed, new_map)
    op.attributes["_packed"] = form or True
    if is_constant and unpacked is None:
        constant.add(packed)
    how = ", once" if unpacked is None else ", as it is stored, once"
    ctx.remark("done", f"right operand {product(v.type.shape)} packed in panels of {nr}" + (how if is_constant else ""), op.location)  # type: ignore[attr-defined]


def _exchange(op: Operation, roles: Roles, constant: set[Value], ctx: PassContext) -> Roles:
    """Where both operands lie with K innermost and the right one, which is none of the parameters, is the larger: that one is read as it is and
    the left one packed. A register tile is square then, and turned when it is finished."""
    left, right = op.operands[roles.left], op.operands[roles.right]
    m, n = (_size(op, dims) for dims in (roles.m, roles.n))
    if right in constant or roles.batch or len(roles.k) != 1 or not isinstance(m, int) or not isinstance(n, int):
        return roles
    if op["fills"] or "_columns" in op.attributes:
        return roles
    lanes = ctx.target.lanes(32)
    if {element_type(v.type).name for v in (left, right, op.result)} != {"f32"} or lanes < EXCHANGED_LANES or n < lanes:
        return roles
    if m < lanes or -m % lanes * 8 > m or (left not in constant and n < 2 * m):  # lanes that no row is for, or little to gain
        return roles
    if any(_stride(op, i, roles.k[0]) != 1 for i in range(2)) or _stride(op, roles.right, roles.n[-1]) * 4 % SET_BYTES == 0:
        return roles
    if _feeds_reduction(op):
        return roles  # that may join the product's kernel, or make a stream of it
    op.attributes[EXCHANGED] = True
    ctx.remark("done", "the right operand, which is the larger, is read as it is: the product is that of the transpose", op.location)
    return exchanged(roles)


def _feeds_reduction(op: Operation) -> bool:
    """Something is reduced that elementwise operations make of the result."""
    following, seen = [op], {op}
    while following:
        for u in (u for r in following.pop().results for u in r.users if u.name == "tensor.generic"):
            if not is_contraction(u) and len(parallel_dims(u)) < len(u["dims"]):
                return True
            if u not in seen and not is_contraction(u):
                seen.add(u)
                following.append(u)
    return False


SET_BYTES = 2048
"""Rows this far apart fall into two sets of the first-level cache: sixteen of them, read a step of K at a time, throw each other out."""
EXCHANGED_LANES = 16
"""Lanes of a vector from which on a square tile has as many sums as the multiply-adds need."""


def _choose_columns(op: Operation, constant: set[Value], ctx: PassContext) -> None:
    """Which dimensions are the columns of a weight's gradient, and whether its windows are packed."""
    parallel = len(parallel_dims(op))
    if constant.intersection(op.operands) or any(not isinstance(n, int) for n in op["dims"]) or element_type(op.result.type).bits != 32:
        return
    reads = [[{int(s[1:]) for s in free_symbols(e) if s[0] == "d" and s[1:].isdigit()} for e in m] for m in op["maps"]]
    for i in range(2):
        windows = [r for r, e in zip(reads[i], op["maps"][i], strict=True) if len(r) == 2 and min(r) < parallel <= max(r) and _is_window(e, r)]
        own = [min(r) for r in reads[i] if len(r) == 1 and min(r) < parallel]
        others = [d for d in range(parallel) if any(d in r for r in reads[1 - i])]
        taps = [min(r) for r in windows]
        if not windows or len(own) != 1 or len(others) != 1 or {*own, *others, *taps} != set(range(parallel)):
            continue
        if any(op["dims"][min(r)] > op["dims"][max(r)] for r in windows) or sum(len(r) for r in reads[1 - i]) != 1 + len(op["dims"]) - parallel:
            continue
        if sym(f"d{own[0]}") not in op["maps"][i] or sym(f"d{others[0]}") not in op["maps"][1 - i]:  # several dimensions in one
            continue
        op.attributes["_columns"] = (*sorted(taps), *own)
        roles = roles_of(op)
        assert roles is not None
        if op["dims"][own[0]] % contraction_tile(op, roles, ctx.target)[1]:
            op.attributes["_columns"] = tuple(others)
        else:
            op.attributes["_windows"] = i
            _turn_positions(op, roles, ctx)
        return


def _is_window(e: Dim, dims: Collection[int]) -> bool:
    """A sum of multiples, as taps and positions are; heads and batches of attention, which are folded into rows and columns, are none."""
    split = [split_linear(e, f"d{d}") for d in dims]
    return all(s is not None and isinstance(s[0], int) for s in split)


def _turn_positions(op: Operation, roles: Roles, ctx: PassContext) -> None:
    """The left operand of a weight's gradient with its channels outermost and positions innermost: what a row meets lies in one piece."""
    i = roles.left
    v, m = op.operands[i], op["maps"][i]
    assert isinstance(v.type, TensorType)
    row = next(j for j, e in enumerate(m) if e == sym(f"d{roles.m[0]}"))
    order = [row, *(j for j in range(v.type.rank) if j != row)]
    source = tuple(sym(f"d{order.index(j)}") for j in range(v.type.rank))
    turned = Builder.before_op(op).generic([v], [source], [v.type.shape[j] for j in order], lambda bb, x: x, name=f"{v.name or 'g'}_turned")
    _set_operand(op, i, turned.result, tuple(m[j] for j in order))
    ctx.remark("done", "left operand turned: positions innermost", op.location)


def _pack_windows(op: Operation, roles: Roles, nr: int, ctx: PassContext) -> None:
    """packed[channel // nr, ..., channel % nr] of the right operand, the other dimensions as they lie in memory, padding included."""
    i = roles.right
    v, m = op.operands[i], op["maps"][i]
    assert isinstance(v.type, TensorType)
    bounds, channel = space_bounds(op["dims"]), sym(f"d{roles.n[-1]}")
    axis = next(j for j, e in enumerate(m) if e == channel)
    order = [j for j in sorted(range(v.type.rank), key=lambda j: -_stride_estimate(v.type.layout[j])) if j != axis]  # type: ignore[attr-defined]
    dims: list[Dim] = [op["dims"][roles.n[-1]] // nr]
    source: list[Dim] = [0] * v.type.rank
    source[axis] = sym("d0") * nr + sym(f"d{len(order) + 1}")
    read: list[Dim] = [channel // nr]
    for j in order:
        low, high = lower_bound(m[j], bounds), upper_bound(m[j], bounds)
        assert isinstance(low, int) and isinstance(high, int), "known sizes have known bounds"
        source[j] = sym(f"d{len(dims)}") + low
        dims.append(high + 1 - low)
        read.append(m[j] - low)
    b = Builder.before_op(op)
    packed = b.generic([v], [tuple(source)], [*dims, nr], lambda bb, x: x, fills=[fill_of(op, i)], name=f"{v.name or 'x'}_packed")
    _set_operand(op, i, packed.result, (*read, channel % nr))
    op.attributes["_packed"] = True
    ctx.remark("done", f"right operand {product(v.type.shape)} packed in panels of {nr} channels, for all taps", op.location)


def _deep_form(op: Operation, roles: Roles, last_k: int, m: Dim, n: Dim, nr: int, ctx: PassContext) -> str:
    """How the target takes several elements along K at once (`GROUPS`), or ''."""
    if op.attributes.get("_form"):  # an integer form, for which `factors` has made the left operand
        return str(op["_form"]) if op["dims"][last_k] % GROUPS[str(op["_form"])] == 0 and nr % ctx.target.lanes(32) == 0 else ""
    if multiplies_matrices(op, roles, last_k, ctx.target) and not (isinstance(n, int) and n < MATRIX[1] // 2):
        return "matrices"
    last = op["dims"][last_k]
    pairs = multiplies_pairs(op, ctx.target) and isinstance(last, int) and last % 2 == 0 and nr % ctx.target.lanes(32) == 0
    return "pairs" if pairs else ""


def _turn_image(op: Operation, constant: set[Value], ctx: PassContext) -> None:
    """A depthwise convolution whose channels are not innermost, in its image or its result, works on copies where they are."""
    taps = next((i for i, v in enumerate(op.operands) if v in constant), None)
    channel = None if taps is None or op.operands[1 - taps] in constant else channel_of(op, taps, ctx.target)
    if taps is None or channel is None:
        return
    image, result = op.operands[1 - taps], op.result
    assert isinstance(image.type, TensorType) and isinstance(result.type, TensorType)
    axis = op["maps"][1 - taps].index(sym(f"d{channel}"))

    def innermost(t: TensorType, last: int) -> TensorType:
        return in_order(t, [*(j for j in range(t.rank) if j != last), last])

    def copy(b: Builder, v: Value, t: TensorType) -> Value:
        made = b.generic([v], [tuple(sym(f"d{j}") for j in range(t.rank))], t.shape, lambda bb, x: x, name=f"{v.name or 'x'}_turned").result
        made.type = t
        return made
    if _stride(op, 1 - taps, channel) != 1:
        fills = op["fills"]
        _set_operand(op, 1 - taps, copy(Builder.before_op(op), image, innermost(image.type, axis)), op["maps"][1 - taps])
        if fills:
            op.attributes["fills"] = fills
        ctx.remark("done", "image turned: channels innermost", op.location)
    if result.type.layout[channel] != 1:
        wanted, users = result.type, list(result.uses)
        result.type = innermost(wanted, channel)
        assert op.next is not None, "a function ends with its return"
        back = copy(Builder.before_op(op.next), result, wanted)
        for user, i in users:
            user.set_operand(i, back)
    op.attributes["_turned"] = True


def _turn_window(op: Operation, constant: set[Value], ctx: PassContext) -> None:
    """A depthwise convolution reads its parameter with the dimension innermost that is contiguous in the result."""
    result = op.result.type
    assert isinstance(result, TensorType)
    innermost = next((d for d in range(result.rank) if result.layout[d] == 1 and result.shape[d] != 1), None)
    for i, (v, m) in enumerate(zip(op.operands, op["maps"], strict=True)):
        dims = plain_dims([e for e in m if e != 0])
        if v not in constant or dims is None or innermost not in dims or _stride(op, i, innermost) == 1:  # type: ignore[arg-type]
            continue
        order = [d for d in dims if d != innermost] + [innermost]
        at = {f"d{d}": sym(f"d{j}") for j, d in enumerate(order)}
        turned = Builder.before_op(op).generic([v], [tuple(substitute(e, at) for e in m)], [op["dims"][d] for d in order], lambda b, x: x,
                                               name=f"{v.name or 'w'}_turned")
        _set_operand(op, i, turned.result, tuple(sym(f"d{d}") for d in order))
        constant.add(turned.result)
        op.attributes["_turned"] = True
        ctx.remark("done", "the window's parameter turned to the result's layout, once", op.location)


def _packing_body(panel: int, lane: int, nr: int, n_size: Dim) -> Any:
    """Zero past the last column; the read itself may fall out of bounds there, or wrap around when n has several dimensions."""
    def body(b: Builder, x: Value) -> Value:
        first, last = (b.op("tensor.index", type=i64, dim=d) for d in (panel, lane))
        position = b.arith("add", b.arith("mul", first, nr), last)
        limit = b.op("tensor.sym", type=i64, expr=n_size)
        return b.arith("select", b.arith("lt", position, limit), x, 0)
    return body


def _set_operand(op: Operation, i: int, v: Value, m: tuple[Dim, ...]) -> None:
    maps, fills = list(op["maps"]), list(op["fills"] or (None,) * len(op.operands))
    maps[i], fills[i] = m, None
    op.attributes["maps"] = tuple(maps)
    op.attributes.pop("fills", None)
    if any(f is not None for f in fills):
        op.attributes["fills"] = tuple(fills)
    op.set_operand(i, v)


def _contiguous_along_n(v: Value, m: tuple[Dim, ...], op: Operation, roles: Roles) -> bool:
    assert isinstance(v.type, TensorType)
    offset: Dim = 0
    for e, stride in zip(m, v.type.layout, strict=True):
        offset = offset + e * stride
    last = f"d{roles.n[-1]}"
    split = split_linear(simplify(offset, space_bounds(op["dims"])), last)
    return split is not None and split[0] == 1


COMPACT = 1 << 17
"""A panel whose rows span more bytes than this misses the TLB and evicts itself from the caches: packing pays."""


def _panel_is_compact(op: Operation, roles: Roles) -> bool:
    """All rows of a panel, unpacked, lie within `COMPACT` bytes."""
    span = sum(_stride(op, roles.right, d) * (size if isinstance(size := op["dims"][d], int) else 1 << 12) for d in roles.k)
    return span * 4 <= COMPACT


def _stride(op: Operation, i: int, d: int) -> int:
    """The distance in operand i between steps of dimension d (sizes unknown at compile time count as 64)."""
    v, m = op.operands[i], op["maps"][i]
    assert isinstance(v.type, TensorType)
    offset: Dim = 0
    for e, stride in zip(m, v.type.layout, strict=True):
        offset = offset + e * stride
    split = split_linear(simplify(offset, space_bounds(op["dims"])), f"d{d}")
    return 0 if split is None else _stride_estimate(split[0])


def _stride_estimate(stride: Dim) -> int:
    return int(evaluate(stride, dict.fromkeys(free_symbols(stride), 64)))


def _size(op: Operation, dims: tuple[int, ...]) -> Dim:
    return product(op["dims"][d] for d in dims)


def _materialise_padding(op: Operation, roles: Roles, ctx: PassContext) -> None:
    """Replaces a padded read x[.., i*stride + k - pad, ..] by an in-bounds read of a padded copy of x."""
    i = roles.left
    fill = fill_of(op, i)
    if fill is None:
        return
    v, m = op.operands[i], op["maps"][i]
    assert isinstance(v.type, TensorType)
    bounds = space_bounds(op["dims"])
    dims: list[Dim] = []
    source: list[Dim] = []
    new_map: list[Dim] = []
    for j, (e, size) in enumerate(zip(m, v.type.shape, strict=True)):
        low, high = lower_bound(e, bounds), upper_bound(e, bounds)
        if low is None or high is None:
            ctx.remark("declined", f"the padding of dimension {j} has no known bounds", op.location)
            return
        low = min(low, 0) if isinstance(low, int) else 0 if known_nonnegative(low) else low
        extent = high + 1 - low
        gap = size - extent
        dims.append(size if low == 0 and isinstance(gap, int) and gap >= 0 else extent)
        source.append(sym(f"d{j}") + low)
        new_map.append(e - low)
    b = Builder.before_op(op)
    padded = b.generic([v], [tuple(source)], dims, lambda bb, x: x, fills=[fill], name=f"{v.name or 'x'}_padded")
    layout = v.type.layout
    assert isinstance(padded.result.type, TensorType)
    padded.result.type = in_order(padded.result.type, sorted(range(v.type.rank), key=lambda d: -_stride_estimate(layout[d])))
    _set_operand(op, i, padded.result, tuple(new_map))
    ctx.remark("done", "padding materialised", op.location)


__all__ = ["Pack"]
