"""Which forward values the backward pass makes again instead of keeping them.

    remade = recomputable(module, outputs, "selective")      # a test on forward ops

    none        what costs nothing: views, constants, wider copies of kept values, all-gathers (a gathered parameter of ZeRO-3 is not kept
                between the passes, nor is a gathered activation of sequence parallelism), what is picked from an argument and takes more memory than
                that (an expert's weights for each token), and what element-wise ops alone make of kept values
    selective   also element-wise ops, reductions and products of two activations: norms, activation functions, plain attention. Kept are the
                results of products with parameters, of operators that are called (streaming attention is one) and of reducing collectives
    full        everything inside a repeated block, its collectives too: of a block, what it reads is kept (Chen et al. 2016, "Training Deep
                Nets with Sublinear Memory Cost", with one segment per block). Outside of blocks as `none`

Random ops are never made again. Blocks are told by the module path of an op's location: members of the module list that most ops come from.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence

from ...ir.core import BlockArg, Operation, Value
from ...ir.opdef import Trait
from .build import tensor_type

__all__ = ["MODES", "blocks_of", "derivation", "recomputable"]

MODES = ("none", "selective", "full")
_NUMBERED = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
_KEPT = ("graph.extern", "graph.attention", "graph.conv", "graph.conv_transpose", "graph.embedding", "graph.gather", "graph.index", "graph.scatter",
         "graph.random_bits")
LONGEST = 24
"""Element-wise ops in a row that are run again: they fuse, and the kept values that they start from are read anyway."""
SMALL = 64
"""A value that takes so many times less is kept beside another without a thought."""
_PICKING = ("graph.embedding", "graph.gather", "graph.index")
_SOURCES = ("graph.iota", "graph.sym", "dist.coordinate", "dist.shard")
_REDUCING = ("dist.all_reduce", "dist.reduce_scatter", "dist.all_to_all")


def recomputable(ops: Sequence[Operation], mode: str) -> Callable[[Operation], bool]:
    """The test for the forward ops given. ValueError for an unknown mode."""
    if mode not in MODES:
        raise ValueError(f"recompute '{mode}' is unknown; allowed: {', '.join(MODES)}")
    if mode == "none":
        return _free
    if mode == "selective":
        return lambda op: _free(op) or not _kept(op)
    block, inside = blocks_of(ops), set(ops)
    crossing = {op for op in block if any(u in inside and block.get(u) != block[op] for r in op.results for u in r.users)}
    return lambda op: _free(op) or (op in block and op not in crossing and not _random(op))


def derivation(v: Value, kept: Collection[Value]) -> list[Operation] | None:
    """The views, constants and element-wise ops that make `v` from kept values and arguments; None if it takes more than that."""
    found: dict[Operation, None] = {}
    wanted = [v]
    while wanted:
        x = wanted.pop()
        op = x.defining_op
        if op is None or x in kept or op in found:
            continue
        free = op.has_trait(Trait.ViewLike) or op.has_trait(Trait.ConstantLike) or op.name in _SOURCES or _gathers_parameter(op)
        if len(found) == LONGEST or not (free or op.has_trait(Trait.Elementwise)):
            return None
        found[op] = None
        wanted.extend(op.operands)
    return list(found)


def cheaper_roots(kept: Sequence[Value]) -> list[Value]:
    """Values that element-wise ops make kept ones of, and that take less memory than those: to be kept in their place. (The three values that the
    gradient of a tanh-GELU reads are made of one, the product that goes into it; what a loss reads in float32 may be a product of 16 bits
    and the largest of each row.) Of a value's origins, one may be of its own size; the others are small, or kept already.
    """
    there = set(kept)
    made_of: dict[Value, list[Value]] = {}
    small: dict[Value, list[Value]] = {}
    for v in kept:
        missing = [r for r in _roots(v) or [v] if r not in there]
        large = [r for r in missing if SMALL * _bytes(r) > _bytes(v)]
        if len(large) == 1:
            made_of.setdefault(large[0], []).append(v)
            small.setdefault(large[0], []).extend(r for r in missing if r is not large[0])
    chosen = [r for r, made in made_of.items() if _bytes(r) + sum(map(_bytes, dict.fromkeys(small[r]))) < sum(map(_bytes, made))]
    return [x for r in chosen for x in (r, *small[r])]


def _roots(v: Value) -> list[Value] | None:
    """The values, but for arguments and constants, that views and element-wise ops make `v` of; None if that takes too many ops."""
    found: dict[Operation, None] = {}
    roots: dict[Value, None] = {}
    wanted = [v]
    while wanted:
        x = wanted.pop()
        op = x.defining_op
        if op is None or op in found:
            continue
        free = op.has_trait(Trait.ViewLike) or op.has_trait(Trait.ConstantLike) or op.name in _SOURCES or _gathers_parameter(op)
        if not (free or op.has_trait(Trait.Elementwise)):
            roots[x] = None
            continue
        if len(found) == LONGEST:
            return None
        found[op] = None
        wanted.extend(op.operands)
    return list(roots)


def _bytes(v: Value) -> int:
    t = tensor_type(v)
    return int(t.numel) * t.dtype.bytes  # type: ignore[arg-type, call-overload]


def blocks_of(ops: Sequence[Operation]) -> dict[Operation, int]:
    """The repeated block that an op is part of, for ops inside blocks."""
    found: dict[Operation, tuple[str, int]] = {}
    for op in ops:
        match = _NUMBERED.search(op.location.module)
        if match is not None:
            found[op] = (op.location.module[:match.start()], int(match.group(1)))
    if not found:
        return {}
    prefix, _ = Counter(p for p, _ in found.values()).most_common(1)[0]
    return {op: number for op, (p, number) in found.items() if p == prefix}


def _free(op: Operation) -> bool:
    """Makes its result without arithmetic on the forward pass's values."""
    if op.has_trait(Trait.ViewLike) or op.has_trait(Trait.ConstantLike):
        return True
    if op.name == "graph.cast":
        return tensor_type(op.result).dtype.bytes >= tensor_type(op.operands[0]).dtype.bytes
    return op.name in (*_SOURCES, "dist.all_gather") or _picks_parameter(op)


def _gathers_parameter(op: Operation) -> bool:
    """A gather of an argument, which the backward pass makes again for the gradient anyway."""
    return op.name == "dist.all_gather" and isinstance(op.operands[0], BlockArg)


def _picks_parameter(op: Operation) -> bool:
    """Rows of an argument, more of them than it and their numbers take: an expert's weights for each token, which are read where they lie."""
    if op.name not in _PICKING or not _is_parameter(op.operands[0]):
        return False
    sizes = [t.numel * t.dtype.bytes for t in map(tensor_type, (op.result, *op.operands)) if isinstance(t.numel, int)]
    return len(sizes) == 1 + len(op.operands) and sizes[0] > sum(sizes[1:])


def _random(op: Operation) -> bool:
    return op.name == "graph.extern" and bool(op["random"])


def _kept(op: Operation) -> bool:
    """What selective recomputation keeps."""
    if op.name in _REDUCING:
        return True
    if op.name == "graph.matmul":
        return any(_is_parameter(v) for v in op.operands)
    return op.name in _KEPT


def _is_parameter(v: Value) -> bool:
    """An argument, perhaps gathered, viewed or converted. The forward pass changes none (`joint.py` refuses such models), so the backward pass
    reads in it what the forward pass read."""
    while v.defining_op is not None:
        op = v.defining_op
        if not (op.has_trait(Trait.ViewLike) or op.name in ("graph.cast", "dist.all_gather", "dist.shard", "dist.wait")):
            return False
        v = op.operands[0]
    return isinstance(v, BlockArg)
