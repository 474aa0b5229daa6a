"""Long reductions to few elements in two steps, so that every multiprocessor (CPUs: every thread) has work.

    sum over K of f        ->        sum over S of (sum over K / S of f)

The first step makes S partial results in parallel (split-K, for a contraction); the second is small and fuses with what reads it.
A sum and the sum of squares about its mean (a variance: batch norm) are split together, each part about its own mean, so that the first step stays
one pass over memory (see `rescale.about_mean` for the formula by which parts merge).
Only dimensions that S divides are split; on GPUs, where the outermost summed dimension (a batch) has too few elements, each of these again, along the
next. The order of additions is fixed: results are the same in every run, and with any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..ir import Builder, Dim, Operation, Target, TensorType, Value, element_type, sym
from ..ir.dialects.tensor import fill_of, parallel_dims
from ..ir.expr import as_int, product, substitute
from ..ir.passes import Pass, PassContext, register
from ..ir.ranges import simplify, split_linear
from .narrow_results import ROUNDS
from .rescale import about_mean
from .structured import BESIDE, is_contraction, is_pointwise, rebuild, space_bounds
from .tiling.columns import COLUMNS as LOOP_COLUMNS
from .tiling.gpu_tiles import COLUMNS, FEW_ROWS, early_columns, gemm_tile_gpu, packed_bytes, product_bytes
from .tiling.roles import is_row_major, roles_of

CPU_PARTS = 16
"""Programs that a reduction on a CPU is split into at most."""
CPU_POINTS = 1 << 18
"""Points of a part: some 50 microseconds."""
ADDED = 8
"""Parts of a product that are added up element by element, and not by a reduction."""
SPLITTABLE = frozenset({"sum", "prod", "max", "min", "any", "all"})


@register
@dataclass(frozen=True)
class SplitReductions(Pass):
    """See the module docstring. A part keeps at least `least` steps (`least_row` along contiguous memory, which one
    program reads quickly, and which often fuses with what reads it; `least_column` of columns on GPUs), and there are at most `most` parts."""

    name: ClassVar[str] = "split-reductions"
    least: int = 256
    least_row: int = 16384
    least_column: int = 128
    most: int = 512

    def run(self, module: Operation, ctx: PassContext) -> None:
        for func in [f for f in module.body if f.name == "func"]:
            for op in list(func.body):
                if op.parent is None or op.name != "tensor.generic" or not op["reductions"] or not all(isinstance(n, int) for n in op["dims"]):
                    continue
                if not set(op["combine"]) <= SPLITTABLE or 0 in op["dims"] or BESIDE in op.attributes:
                    continue
                cut = self._on_gpu(op, ctx.target) if ctx.target.is_gpu else self._on_cpu(op)
                if cut.parts > 1:
                    squares = _squares_about_mean(op)
                    if squares is None:
                        split(op, cut)
                    else:
                        _split_moments(op, squares, cut)
                    ctx.remark("done", f"a reduction of {op['dims'][cut.dim]} elements in {cut.parts} parts", op.location)

    def _on_gpu(self, op: Operation, target: Target) -> Cut:
        (programs, alone), room = _programs(op, target), target.multiprocessors
        if is_contraction(op):
            others = _launched_with(op)
            programs += sum(_programs(other, target)[0] for other in others)
            if others and 3 * programs >= room:
                return Cut(0, 1)  # what reads them would have to add parts first
            parts = self._early_parts(op, target)
            if parts:
                return self._parts(op, parts)
        if is_contraction(op) or reduces_rows(op):
            each = 2 if is_contraction(op) else 4  # programs per multiprocessor, as measured
            wanted = room // programs if alone else -(-each * room // programs)
            return self._parts(op, wanted) if 2 * programs <= room else Cut(0, 1)
        wanted = -(-8 * room // programs)
        if wanted < 3:
            return Cut(0, 1)
        limit = self._limit(op, wanted, self.least_column)
        cut, first = self._parts(op, limit, self.least_column), len(parallel_dims(op))
        whole, rest = op["dims"][first], op["dims"][first + 1:first + 2]
        again = next((p for p in range(limit // whole, 0, -1) if rest[0] % p == 0), 1) if rest and whole > 1 else 1
        if again > 1:
            outer = Cut(first, whole * again, again)
        else:
            outer = Cut(first, next((p for p in range(min(limit, whole), 1, -1) if whole % p == 0), 1))
        return outer if outer.parts >= cut.parts else cut  # a part of neighbours in memory

    def _early_parts(self, op: Operation, target: Target) -> int:
        """In how many parts a program holds all of its K in shared memory (`early_columns`), the fewest; 1: whole; 0: not so."""
        roles = roles_of(op)
        if roles is None or len(roles.k) != 1 or product_bytes(op) != 2 or is_row_major(op, roles):
            return 0
        if op.operands[roles.right].defining_op is not None:
            return 0
        batch, m, n, k = (product(op["dims"][d] for d in r) for r in (roles.batch, roles.m, roles.n, roles.k))
        length, most = as_int(k), min(ADDED, self._limit(op, ADDED))
        return next((p for p in range(1, most + 1) if length % p == 0 and early_columns(target, batch * p, m, n, length // p)), 0)

    def _on_cpu(self, op: Operation) -> Cut:
        """Few parts, each worth a thread's while: how many depends on nothing but the sizes, so that results do not depend on the machine."""
        if is_contraction(op) or _shares_a_pass(op):
            return Cut(0, 1)
        made = as_int(product(parallel_dims(op)))
        programs = max(1, made if reduces_rows(op) else made // LOOP_COLUMNS)
        points = as_int(product(op["dims"]))
        return self._parts(op, min(CPU_PARTS // programs, points // CPU_POINTS))

    def _parts(self, op: Operation, wanted: int, least: int = 0) -> Cut:
        """How many parts, and of which dimension: the largest divisor up to what is wanted."""
        d = max(range(len(parallel_dims(op)), len(op["dims"])), key=lambda i: op["dims"][i])
        return Cut(d, next((p for p in range(self._limit(op, wanted, least), 1, -1) if op["dims"][d] % p == 0), 1))

    def _limit(self, op: Operation, wanted: int, least: int = 0) -> int:
        """The most parts. `least`: steps that a part keeps; 0: `least`, or `least_row`."""
        length = product(op["dims"][len(parallel_dims(op)):])
        least = least or (self.least_row if not is_contraction(op) and reduces_rows(op) else self.least)
        return min(wanted, self.most, int(length) // least, _affordable(op))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Cut:
    """`parts` of dimension `dim`; or, where `again` is not 1, each of its elements in so many parts of the next dimension."""

    dim: int
    parts: int
    again: int = 1


def _shares_a_pass(op: Operation) -> bool:
    """What it reads is made or also read by pointwise code, in one pass over memory with which it may be one kernel: its parts could not."""
    for v in op.operands:
        others = [u for u in (v.defining_op, *v.users) if u is not None and u is not op and u.name == "tensor.generic"]
        if any(not is_contraction(u) and (u["dims"] != op["dims"] or not set(u["combine"]) <= SPLITTABLE) for u in others):
            return True
    return False


def _programs(op: Operation, target: Target) -> tuple[int, bool]:
    """About how many programs the op would be as one kernel, and whether each does best with a multiprocessor to itself."""
    count = product(parallel_dims(op))
    assert isinstance(count, int)
    roles = roles_of(op) if is_contraction(op) else None
    if roles is not None:
        batch, m, n, k = (product(op["dims"][d] for d in r) for r in (roles.batch, roles.m, roles.n, roles.k))
        makers = [v.defining_op for v in op.operands if v.defining_op is not None and is_pointwise(v.defining_op)]
        tile = gemm_tile_gpu(target, batch, m, n, k, product_bytes(op), exact=not element_type(op.result.type).is_float,
                             stored=packed_bytes(op, makers), row_major=is_row_major(op, roles))
        return max(1, tile.programs(as_int(batch), as_int(m), as_int(n))), tile.turned
    return max(1, count if reduces_rows(op) else count // COLUMNS), False


def _launched_with(op: Operation) -> list[Operation]:
    """Other products of the same few rows, as query, key and value of a token: `merge-launches` makes one launch of them."""
    roles = roles_of(op)
    if roles is None or product(op["dims"][d] for d in roles.m) not in range(FEW_ROWS + 1):
        return []
    v, k = op.operands[roles.left], [op["dims"][d] for d in roles.k]
    found = []
    for u in dict.fromkeys(v.users):
        theirs = roles_of(u) if u is not op and u.name == "tensor.generic" and is_contraction(u) else None
        if theirs is not None and u.operands[theirs.left] is v and [u["dims"][d] for d in theirs.k] == k and not theirs.batch:
            found.append(u)
    return found


def _affordable(op: Operation) -> int:
    """Partial results are written and read again: they must not outweigh the operands."""
    read = sum(as_int(v.type.numel) * v.type.dtype.bytes for v in op.operands if isinstance(v.type, TensorType))
    made = sum(as_int(product(parallel_dims(op))) * element_type(y.type).bytes for y in op.body.terminator.operands)
    return read // max(1, 2 * made)


def reduces_rows(op: Operation) -> bool:
    """The largest operand is contiguous along a summed dimension: a program takes a row each; else it takes COLUMNS columns."""
    sizes = [(v.type.numel, i) for i, v in enumerate(op.operands)  # type: ignore[attr-defined]
             if op["maps"][i] is not None and isinstance(v.type, TensorType) and isinstance(v.type.numel, int)]
    if not sizes:
        return True
    i = max(sizes)[1]
    offset: Dim = 0
    for e, stride in zip(op["maps"][i], op.operands[i].type.layout, strict=True):  # type: ignore[attr-defined]
        offset = offset + e * stride
    offset = simplify(offset, space_bounds(op["dims"]))
    for d in range(len(parallel_dims(op)), len(op["dims"])):
        linear = split_linear(offset, f"d{d}")
        if op["dims"][d] > 1 and linear is not None and linear[0] == 1:
            return True
    return False


@dataclass(frozen=True)
class _Space:
    """Dimension d = part * (size / parts) + rest; the parts come first."""

    dims: list[Dim]
    place: dict[int, Dim]

    @staticmethod
    def of(op: Operation, cut: Cut) -> _Space:
        dims, d, parts = list(op["dims"]), cut.dim, cut.parts
        if cut.again > 1:
            chunk = dims[d + 1] // cut.again
            place: dict[int, Dim] = {j: sym(f"d{j + 1}") for j in range(len(dims))}
            place[d] = sym("d0") // cut.again + sym(f"d{d + 1}")
            place[d + 1] = sym("d0") % cut.again * chunk + sym(f"d{d + 2}")
            return _Space([parts, *dims[:d], 1, chunk, *dims[d + 2:]], place)
        chunk = dims[d] // parts
        place = {j: sym(f"d{j + 1}") for j in range(len(dims))}
        place[d] = sym("d0") * chunk + sym(f"d{d + 1}")
        return _Space([parts, *dims[:d], chunk, *dims[d + 1:]], place)

    def map(self, m: Sequence[Dim] | None) -> tuple[Dim, ...] | None:
        """A read of the op's in the new space."""
        env, bounds = {f"d{j}": e for j, e in self.place.items()}, space_bounds(self.dims)
        return None if m is None else tuple(simplify(substitute(e, env), bounds) for e in m)


def _partial(op: Operation, b: Builder, space: _Space) -> Operation:
    fills = [fill_of(op, i) for i in range(len(op.operands))]
    return rebuild(op, b, op.operands, [space.map(m) for m in op["maps"]], fills, space.dims, space.place, op["reductions"])


def split(op: Operation, cut: Cut) -> Operation:
    """Makes `op` a sum of parts; the op that adds them up."""
    b, parts = Builder.before_op(op), cut.parts
    partial = _partial(op, b, _Space.of(op, cut))
    rounds = partial.attributes.pop(ROUNDS, None)
    dims, rank = op["dims"], len(op["dims"]) - op["reductions"]
    if is_contraction(op) and parts <= ADDED and len(op.results) == 1 and op["combine"] == ("sum",):
        made = _added(partial, b, dims[:rank], parts)
        _take_place(op, made)
        return made
    read = (sym(f"d{rank}"), *(sym(f"d{j}") for j in range(rank)))
    made = b.generic(list(partial.results), [read] * len(partial.results), [*dims[:rank], parts], lambda _, *xs: xs,
                     reductions=1, combine=op["combine"])
    if rounds is not None:
        made.attributes[ROUNDS] = rounds
    _take_place(op, made)
    return made


def _added(partial: Operation, b: Builder, dims: Sequence[Dim], parts: int) -> Operation:
    """The sum of a few parts as a pointwise op, which any reader takes in: a norm sums up what it normalises."""
    outer = tuple(sym(f"d{j}") for j in range(len(dims)))

    def total(i: Builder, *xs: Value) -> Value:
        found = xs[0]
        for x in xs[1:]:
            found = i.arith("add", found, x)
        return found
    return b.generic([partial.result] * parts, [(p, *outer) for p in range(parts)], list(dims), total)


def _take_place(op: Operation, made: Operation) -> None:
    for old, new in zip(op.results, made.results, strict=True):
        new.name, new.type = old.name, old.type
        old.replace_all_uses_with(new)
    op.erase()


# -- variances --------------------------------------------------------------------------------------------------------------------


def _squares_about_mean(total: Operation) -> Operation | None:
    """The sum of squares about the mean that `total`, a sum, gives; over the same space."""
    for row in [u for u in total.results[0].users if u.name == "tensor.generic" and len(u.results) == 1]:
        for squares in row.result.users:
            if squares.name != "tensor.generic" or len(squares.results) != 1 or squares["dims"] != total["dims"]:
                continue
            if squares["reductions"] != total["reductions"] or ROUNDS in squares.attributes or ROUNDS in total.attributes:
                continue
            if about_mean(squares, {row.result: row, total.result: total}, _same_read) is total:
                return squares
    return None


def _same_read(a: Operation, i: int, b: Operation, j: int) -> bool:
    same = a.operands[i] is b.operands[j] and a["maps"][i] is not None and a["maps"][i] == b["maps"][j]
    return same and repr(fill_of(a, i)) == repr(fill_of(b, j))


def _split_moments(total: Operation, squares: Operation, cut: Cut) -> None:
    """Sums, and squares about the mean of each part; then m2 = sum over parts of m2_i + n * (mean_i - mean)^2."""
    space, parts = _Space.of(total, cut), cut.parts
    rank = len(total["dims"]) - total["reductions"]
    count = as_int(product(total["dims"][rank:])) // parts
    b = Builder.before_op(total)
    sums = _partial(total, b, space)
    k = next(i for i, v in enumerate(squares.operands) if v.defining_op is not None and total.result in v.defining_op.operands)
    row = squares.operands[k].defining_op
    assert row is not None
    shifted = {f"d{j}": sym(f"d{j + 1}") for j in range(len(row["dims"]))}
    means = b.generic([sums.result], [(sym("d0"), *(substitute(e, shifted) for e in row["maps"][0]))], [parts, *row["dims"]],
                      lambda i, x: i.arith("div", x, float(count)))
    operands, maps = list(squares.operands), [space.map(m) for m in squares["maps"]]
    operands[k], maps[k] = means.result, (sym("d0"), *(maps[k] or ()))
    fills = [fill_of(squares, i) for i in range(len(operands))]
    spread = rebuild(squares, b, operands, maps, fills, space.dims, space.place, squares["reductions"])
    dims = [*total["dims"][:rank], parts]
    outer = tuple(sym(f"d{j}") for j in range(rank))
    _take_place(total, b.generic([sums.result], [(sym(f"d{rank}"), *outer)], dims, lambda _, x: x, reductions=1, combine=total["combine"]))
    b = Builder.before_op(squares)
    own = tuple(squares["maps"][k])  # of the mean: along parallel dimensions

    def merged(i: Builder, m2: Value, part: Value, mean: Value) -> Value:
        apart = i.arith("sub", part, mean)
        return i.arith("add", m2, i.arith("mul", i.arith("mul", apart, apart), float(count)))

    made = b.generic([spread.result, means.result, squares.operands[k]], [(sym(f"d{rank}"), *outer), (sym(f"d{rank}"), *own), own], dims, merged,
                     reductions=1, combine=squares["combine"])
    _take_place(squares, made)
