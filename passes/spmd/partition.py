"""SPMD partitioning: a graph-level module becomes the program that every rank of a mesh runs.

    done = partition(module, mesh, policies, arguments, results)
    done.module       the per-rank module: local shapes, `dist` ops where ranks meet, `_sharding` on every op
    done.origin       per-rank value -> (value of the given module, its placement along every axis)

`arguments` and `results` give the placement of each argument and result along each axis (a missing axis: replicated; a result
of None: wherever it comes out, resolved if partial). The mesh's axes are taken one after the other, in the order of `policies`: each
time the whole module is partitioned along one axis, and the next axis cuts what that left. So every op has one small
choice per axis, and collectives of the axes before are ops like any other.

Along an axis the ops are taken in order. Of the strategies of an op (see `rules.py`) and of running it replicated, the cheapest is
chosen: bytes to bring the operands where the strategy wants them, each form of a value being made once; plus what it costs to
resolve partial results later. Values move by all-gather, all-reduce, reduce-scatter, all-to-all or local slicing. What must not
move is weighed by the axis's `Policy`: on a data axis activations stay and parameters are gathered (ZeRO-3); on a tensor axis
sharded parameters stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...ir.builder import Builder
from ...ir.core import Block, BlockArg, IRError, Operation, Value
from ...ir.opdef import Trait
from ...ir.sharding import REPLICATE, Mesh, Placement, local_shape, partial
from ...ir.types import DTYPES, TensorType
from ...ir.verifier import verify
from .build import I1, I64, LocalBuilder, tensor_type
from .ring import ring_strategy
from .rules import Strategy, strategies
from .special import PROGRAMS

__all__ = ["Partitioned", "Policy", "partition"]

Sharding = Mapping[str, Placement]


@dataclass(frozen=True)
class Policy:
    """How an axis is used. role: 'data' or 'tensor'. pinned: arguments whose pieces are never gathered if it can be helped
    (on a tensor axis: all sharded ones). sequence: partial sums may be left cut along the sequence (dimension 1 of 3 or more). rows: along
    dimension 0 instead, the batch, where that comes out even: pieces are then contiguous. No other axis may cut it.
    ring: attention that is cut along the sequence sends keys and values round (`ring.py`).
    """

    axis: str
    role: str = "data"
    pinned: frozenset[int] = frozenset()
    sequence: bool = False
    rows: bool = False
    ring: bool = False


@dataclass
class Partitioned:
    """See the module docstring. `gathered` names arguments that had to be gathered although they are pinned, per axis."""

    module: Operation
    origin: dict[Value, tuple[Value, dict[str, Placement]]]
    gathered: dict[str, set[int]] = field(default_factory=dict)
    moved: list[tuple[str, str, Operation]] = field(default_factory=list)


PINNED, ACTIVATION, SLICE, LATENCY = 1000.0, 30.0, 1e-3, 64.0
"""Weights: of moving a pinned parameter, of moving activations on a data axis, of slicing; and bytes per message."""


def partition(module: Operation, mesh: Mesh, policies: Sequence[Policy], arguments: Sequence[Sharding],
              results: Sequence[Sharding | None]) -> Partitioned:
    """See the module docstring. IRError, with the op, for what cannot be done (symbolic shapes, pieces that do not come out even)."""
    func = _function(module)
    _check(func, mesh, arguments, results)
    done = Partitioned(module, {v: (v, {}) for v in _values(func)})
    for policy in policies:
        ranks = mesh.size(policy.axis)
        if ranks == 1:
            continue
        step = _AxisPartitioner(done.module, policy, ranks, [a.get(policy.axis, REPLICATE) for a in arguments],
                                [None if r is None else r.get(policy.axis, REPLICATE) for r in results])
        new = step.run()
        origin = {}
        for value, (before, placement) in step.origin.items():
            found = done.origin.get(before)
            if found is not None:
                origin[value] = (found[0], {**found[1], policy.axis: placement})
        done = Partitioned(new, origin, {**done.gathered, policy.axis: step.gathered}, done.moved + step.moved)
    if done.module is module:
        mapping: dict[Value, Value] = {}
        done.module = module.clone(mapping)
        done.origin = {new: (old, {}) for old, new in mapping.items()}
    _annotate(done, mesh, arguments)
    verify(done.module)
    return done


def _function(module: Operation) -> Operation:
    funcs = [op for op in module.body if op.name == "func"]
    if len(funcs) != 1:
        raise IRError(f"only a module of one function can be partitioned; this one has {len(funcs)}")
    return funcs[0]


def _values(func: Operation) -> list[Value]:
    return [*func.body.args, *(r for op in func.body for r in op.results)]


def _check(func: Operation, mesh: Mesh, arguments: Sequence[Sharding], results: Sequence[Sharding | None]) -> None:
    returned = func.body.terminator.operands
    if len(arguments) != len(func.body.args) or len(results) != len(returned):
        raise IRError(f"{len(arguments)} argument and {len(results)} result shardings for a function of {len(func.body.args)} "
                      f"arguments and {len(returned)} results")
    if func["symbols"] or any(not isinstance(s, int) for v in _values(func) if isinstance(v.type, TensorType) for s in v.type.shape):
        raise IRError("only programs of constant shapes can be partitioned; capture the model with the sizes it runs with")
    for v, sharding in [*zip(func.body.args, arguments), *((v, s) for v, s in zip(returned, results) if s is not None)]:
        for axis, placement in sharding.items():
            mesh.size(axis)
            if placement.kind == "shard" and not 0 <= placement.dim < tensor_type(v).rank:
                raise IRError(f"'{v.name}' of type {v.type} has no dimension {placement.dim} to cut along '{axis}'")


def _annotate(done: Partitioned, mesh: Mesh, arguments: Sequence[Sharding]) -> None:
    """`_sharding` on ops, `sharding` on arguments, and the mesh in the module."""
    func = _function(done.module)
    for op in func.body:
        shardings = [done.origin[r][1] if r in done.origin else None for r in op.results]
        if any(shardings):
            op.attributes["_sharding"] = tuple(
                None if s is None else {a: p.attribute for a, p in s.items() if p != REPLICATE} for s in shardings)
    attrs = list(func["arg_attrs"] or ({},) * len(func.body.args))
    for i, sharding in enumerate(arguments):
        cut = {a: p.attribute for a, p in sharding.items() if p != REPLICATE}
        attrs[i] = {**attrs[i], **({"sharding": cut} if cut else {})}
    func.attributes["arg_attrs"] = tuple(attrs)
    block = done.module.body
    if not any(op.name == "dist.mesh" for op in block):
        made = Operation.create("dist.mesh", (), {"sym_name": "mesh", "shape": mesh.shape, "axes": mesh.names})
        block.insert_before(block.first, made) if block.first is not None else block.append(made)


class _AxisPartitioner:
    """Partitions along one axis; see the module docstring."""

    def __init__(self, module: Operation, policy: Policy, ranks: int, arguments: list[Placement], results: list[Placement | None]):
        self.module, self.policy, self.ranks = module, policy, ranks
        self.arguments, self.results = arguments, results
        self.forms: dict[Value, dict[Placement, Value]] = {}
        self.origin: dict[Value, tuple[Value, Placement]] = {}
        self.pinned: dict[Value, set[int]] = {}  # values that are views of parameters -> those arguments
        self.free: set[Value] = set()  # parameters which may be gathered
        self.uses: dict[Value, int] = {}
        self.wanted: dict[Value, Placement] = {}  # where a value should lie for the results' sake
        self.sequence: set[Value] = set()  # values that are cut along the sequence by choice
        self.gathered: set[int] = set()
        self.moved: list[tuple[str, str, Operation]] = []

    def run(self) -> Operation:
        module = self.module
        func = _function(module)
        new_block = Block()
        for op in module.body:
            if op is not func:
                new_block.append(op.clone())
        self.body = Block()
        self.b = LocalBuilder(Builder.at_end(self.body), self.policy.axis, self.ranks)
        for i, arg in enumerate(func.body.args):
            self._argument(i, arg, func)
        for op in func.body:
            self.uses.update({v: self.uses.get(v, 0) + 1 for v in op.operands})
        self._want(func)
        for op in func.body:
            self.b.b.location = op.location
            if op.has_trait(Trait.Terminator):
                self._return(op)
            elif op.name == "graph.assign":
                placement = next(iter(self.forms[op.operands[0]]))
                self._clone(op, Strategy((placement, placement), ()))
            else:
                self._op(op)
            for v in op.operands:
                self.uses[v] -= 1
        from_region = func.region.__class__([self.body])
        new_block.append(Operation.create("func", (), dict(func.attributes), (), [from_region], func.location))
        return Operation.create("module", (), dict(module.attributes), (), [module.region.__class__([new_block])], module.location)

    def _argument(self, i: int, arg: BlockArg, func: Operation) -> None:
        t, placement = tensor_type(arg), self.arguments[i]
        try:
            shape = local_shape(t.shape, placement, self.ranks)
        except IRError as e:
            raise IRError(f"argument '{arg.name}' of type {t} along axis '{self.policy.axis}': {e}") from e
        new = self.body.add_arg(t if shape == t.shape else TensorType(shape, t.dtype), arg.name)
        self.forms[arg] = {placement: new}
        self.origin[new] = (arg, placement)
        if placement.kind == "shard":
            attrs = func["arg_attrs"]
            is_parameter = not attrs or attrs[i].get("kind", "input") in ("param", "buffer")
            if i in self.policy.pinned or (self.policy.role == "tensor" and is_parameter):
                self.pinned[arg] = {i}
            elif is_parameter:
                self.free.add(arg)

    def _want(self, func: Operation) -> None:
        """Follows the results' placements back through views and sums."""
        for v, p in zip(func.body.terminator.operands, self.results, strict=True):
            if p is not None:
                self.wanted.setdefault(v, p)
        for op in func.body.reversed():
            if not op.results or op.results[0] not in self.wanted:
                continue
            if not (op.has_trait(Trait.ViewLike) or op.name in ("graph.cast", "graph.add")):
                continue
            want = self.wanted[op.results[0]]
            found = _replicated(op) if want == REPLICATE else next(
                (s for s in strategies(op, self.ranks, {want.parts}) if s.results[0] == want), None)
            for v, p in zip(op.operands, found.operands if found is not None else ()):
                if len(v.users) == 1:
                    self.wanted.setdefault(v, p)

    # -- choosing

    def _op(self, op: Operation) -> None:
        if all(set(self.forms[v]) == {REPLICATE} or v in self.free for v in op.operands):
            self._clone(op, _replicated(op))  # nothing is cut (or only parameters that are gathered): nothing is to be gained
            return
        ring = ring_strategy(op, self.ranks) if self.policy.ring else None
        if ring is not None:
            self._clone(op, ring)
            return
        parts = {p.parts for v in op.operands for p in self.forms[v] if p.kind == "shard"}
        found = strategies(op, self.ranks, parts)
        tokens = self.sequence if self.policy.role == "tensor" else ()
        if op.name == "graph.reshape" and op.operands[0] in tokens:  # gathered before, once, not after each view
            found = [s for s in found if s.operands[0] in self.forms[op.operands[0]] and s.results[0].parts <= s.operands[0].parts]
        # Rows of tokens are for products, which want them whole: gathered as tokens once, not as rows and as columns of each product.
        flat = op.has_trait(Trait.ViewLike) and tensor_type(op.result).rank < 3 <= tensor_type(op.operands[0]).rank
        if flat and op.operands[0] in tokens:
            found = []
        # Parameters that may be gathered are, before anything else happens to them: once, and in the order of their memory.
        found = [s for s in found if not any(p.kind == "shard" and v in self.free for v, p in zip(op.operands, s.operands))]
        candidates = [*found, _replicated(op)]
        self._clone(op, min(candidates, key=lambda s: self._cost(op, s)))

    def _cost(self, op: Operation, s: Strategy) -> float:
        total = s.traffic
        for v, p in dict.fromkeys(zip(op.operands, s.operands, strict=True)):
            total += self._move_cost(v, p)
        for r, p in zip(op.results, s.results, strict=True):
            size = _bytes(r)
            if r in self.wanted:
                total += self._settle_cost(size, p, self.wanted[r])
            elif p.kind == "partial":  # it must be resolved one day: by a reduce-scatter at best, where that is allowed
                half = self.policy.sequence or self.policy.role == "data"
                total += self._all_reduce_cost(size) * (0.5 if half else 1.0)
            total += 1e-4 * size * (1.0 if p.kind != "shard" else 1.0 / self.ranks)
        return total

    def _settle_cost(self, size: float, p: Placement, want: Placement) -> float:
        """Bytes from `p` to where the value is wanted in the end."""
        gather = size * (self.ranks - 1) / self.ranks + LATENCY
        if p == want:
            return 0.0
        if p.kind == "partial":
            return self._all_reduce_cost(size) if want.kind != "shard" else gather
        if p == REPLICATE:
            return SLICE * size
        return gather if want.kind != "shard" else gather / self.ranks if _exchangeable(p, want) else gather

    def _all_reduce_cost(self, size: float) -> float:
        return 2 * size * (self.ranks - 1) / self.ranks + 2 * LATENCY

    def _move_cost(self, v: Value, to: Placement) -> float:
        """Weighed bytes to have `v` as `to`."""
        if to in self.forms[v]:
            return 0.0
        return min(self._step_cost(v, have, to) for have in self.forms[v])

    def _step_cost(self, v: Value, have: Placement, to: Placement) -> float:
        size, n = float(_bytes(v)), self.ranks
        share = max(1, self.uses.get(v, 1))
        gather = size * (n - 1) / n * (1.0 if have.parts == 1 else 1.2) + LATENCY
        if have.kind == "partial":
            if to == REPLICATE:
                return self._all_reduce_cost(size) / share
            if to.kind == "shard" and have.op == "sum" and self._scatters(v, to):
                return gather / share
            return float("inf")
        if have == REPLICATE:
            if to.kind == "shard":
                return 0.0 if _constant(v) else SLICE * size
            if to == partial() and tensor_type(v).dtype.is_float:
                return 0.0 if _is_zero(v) else 2 * SLICE * size
            return float("inf")
        weight = PINNED if v in self.pinned else 1.0 if v in self.free or self.policy.role == "tensor" else ACTIVATION
        if to == REPLICATE:
            return gather * weight
        if to.kind == "shard":
            return weight * (gather / n if _exchangeable(have, to) else gather)
        return float("inf")

    def _scatters(self, v: Value, to: Placement) -> bool:
        t = tensor_type(v)
        if self.policy.role == "data" and self.policy.pinned:  # experts are cut: their terms go back to where the tokens are
            return to == Placement("shard", 0) and t.rank >= 2 and isinstance(t.shape[0], int) and t.shape[0] % self.ranks == 0
        if not self.policy.sequence or t.rank < 3:
            return False
        even = [d for d in ((0, 1) if self.policy.rows else (1,)) if isinstance(t.shape[d], int) and t.shape[d] % self.ranks == 0]
        return bool(even) and to == Placement("shard", even[0])

    # -- building

    def _get(self, v: Value, to: Placement, user: Operation, *, final: bool = False) -> Value:
        """`v` as `to`, made on first demand. `final`: for the return, where any reduce-scatter is fine."""
        forms = self.forms[v]
        if to in forms:
            return forms[to]
        have = min(forms, key=lambda p: 0.0 if final and p.kind == "partial" else self._step_cost(v, p, to))
        x = forms[have]
        forms[to] = made = self._move(v, x, have, to, user)
        if to.kind == "shard" and have.kind == "shard" and not _exchangeable(have, to):
            forms.setdefault(REPLICATE, made.defining_op.operands[0])  # type: ignore[union-attr]
        if made not in self.origin:
            self.origin[made] = (v, to)
        if not made.name and v.name:
            made.name = f"{v.name}_{_SUFFIX[to.kind]}"
        return made

    def _move(self, v: Value, x: Value, have: Placement, to: Placement, user: Operation) -> Value:
        b = self.b
        if have.kind == "shard":
            if v in self.pinned:
                self.gathered |= self.pinned[v]
            if v not in self.free:
                self.moved.append((self.policy.axis, f"{v.name}: {have} -> {to}", user))
        if have.kind == "partial" and to.kind == "replicate":
            return b.all_reduce(x, have.op)
        if have.kind == "partial" and to.kind == "shard":
            self.sequence.add(v)
            return b.reduce_scatter(x, to, have.op)
        if have.kind == "shard" and to.kind == "replicate":
            return b.all_gather(x, have)
        if have.kind == "shard" and to.kind == "shard":
            if _exchangeable(have, to):
                return b.all_to_all(x, to.dim, have.dim)
            return b.shard(b.all_gather(x, have), to)
        if have == REPLICATE and to.kind == "shard":
            return self._cut(v, x, to)
        if have == REPLICATE and to.kind == "partial" and to.op == "sum":
            return x if _is_zero(v) else self._term(x)
        raise IRError(f"'{v.name}' of type {v.type} cannot go from {have} to {to} for '{user.name}' at {user.location}")

    def _cut(self, v: Value, x: Value, to: Placement) -> Value:
        """A piece of a replicated value; of constants, a smaller constant."""
        op = x.defining_op
        t = tensor_type(x)
        local = TensorType(local_shape(t.shape, to, self.ranks), t.dtype)
        if op is not None and op.name == "graph.full":
            return self.b.b.op("graph.full", type=local, value=op["value"])
        if op is not None and op.name == "graph.expand":
            source = tensor_type(op.operands[0])
            at = to.dim - (t.rank - source.rank)
            if at < 0 or source.shape[at] == 1:
                return self.b.b.op("graph.expand", op.operands[0], type=local)
        return self.b.shard(x, to)

    def _term(self, x: Value) -> Value:
        """A replicated value as one term of a sum: rank 0 has it, the others have zeros."""
        b = self.b
        first = b.ew("eq", b.coordinate(), b.full((), 0, I64), dtype=I1)
        return b.ew("select", first, x, b.full((), 0.0, tensor_type(x).dtype))

    def _clone(self, op: Operation, s: Strategy) -> None:
        operands = [self._get(v, p, op) for v, p in zip(op.operands, s.operands, strict=True)]
        if s.emit:
            made = PROGRAMS[s.emit](self.b, op, operands)
        else:
            types = [self._local(op, r, p) for r, p in zip(op.results, s.results, strict=True)]
            new = self.b.b.create(op.name, operands, self._attributes(op, s), types)
            made = list(new.results)
        for old, new_value, p in zip(op.results, made, s.results, strict=True):
            new_value.name = old.name
            self.forms[old] = {p: new_value}
            self.origin[new_value] = (old, p)
            if p.kind == "shard" and any(v in self.sequence and q.kind == "shard" for v, q in zip(op.operands, s.operands, strict=True)):
                self.sequence.add(old)
        if op.has_trait(Trait.ViewLike) or op.name == "graph.cast":
            self._inherit(op)

    def _inherit(self, op: Operation) -> None:
        (source,) = op.operands
        if next(iter(self.forms[op.result])).kind != "shard":
            return
        if source in self.pinned:
            self.pinned[op.result] = self.pinned[source]

    def _local(self, op: Operation, r: Value, p: Placement) -> Any:
        t = tensor_type(r)
        if p.kind != "shard":
            return t
        return TensorType(local_shape(t.shape, p, self.ranks), t.dtype)

    def _attributes(self, op: Operation, s: Strategy) -> dict[str, Any]:
        attrs = {k: v for k, v in op.attributes.items() if k != "_sharding"}
        if op.name == "graph.extern" and any(p.kind == "shard" for p in s.operands):
            attrs.pop("operand_strides", None)  # strides of the whole tensor
        if op.name == "graph.cat" and any(a != b for a, b in zip(s.operands, s.results * len(s.operands))):
            return attrs
        return attrs

    def _return(self, op: Operation) -> None:
        operands = []
        for v, want in zip(op.operands, self.results, strict=True):
            self.b.b.location = v.defining_op.location if v.defining_op is not None else op.location
            to = want
            if to is None:
                to = next((p for p in self.forms[v] if p.kind == "shard"), REPLICATE)
            operands.append(self._get(v, to, op, final=True))
        self.b.b.location = op.location
        self.b.b.create(op.name, operands)


_SUFFIX = {"replicate": "whole", "shard": "piece", "partial": "term"}


def _replicated(op: Operation) -> Strategy:
    return Strategy((REPLICATE,) * len(op.operands), (REPLICATE,) * len(op.results))


def _bytes(v: Value) -> int:
    t = v.type
    return int(t.numel) * t.dtype.bytes if isinstance(t, TensorType) else 8  # type: ignore[arg-type, call-overload]


def _exchangeable(have: Placement, to: Placement) -> bool:
    """One all-to-all does it."""
    return have.parts == to.parts == 1 and have.dim != to.dim


def _constant(v: Value) -> bool:
    op = v.defining_op
    return op is not None and op.name == "graph.full"


def _is_zero(v: Value) -> bool:
    """Zeros, also repeated or converted: partial as they are."""
    op = v.defining_op
    while op is not None and op.name in ("graph.expand", "graph.reshape", "graph.cast", "graph.permute"):
        op = op.operands[0].defining_op
    return op is not None and op.name == "graph.full" and op["value"] == 0


assert DTYPES["i64"] is I64
