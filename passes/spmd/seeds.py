"""Where parameters lie on a tensor axis, found from the graph (Megatron's pattern falls out, for any model).

    placements = tensor_seeds(module, ranks, outputs)        # argument -> placement; missing ones are replicated

The forward ops are followed in order, with the placement that values take along the axis. A weight that multiplies a replicated
activation is cut by columns; one that multiplies an activation cut along the contraction is cut by rows (and the result is a
partial sum, taken as resolved); a table that is looked up is cut by rows; a bias follows what it is added to. A result that is later
sliced into equal pieces (fused q, k, v) cuts its weight part by part. When an activation must be gathered after all, the weights that
cut it are ruled out and the walk starts again, so that what is left needs no gathers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ...ir.core import BlockArg, Operation, Value
from ...ir.opdef import Trait
from ...ir.sharding import REPLICATE, Placement, shard
from ...ir.types import TensorType
from .rules import Strategy, shape_of, strategies

__all__ = ["forward_ops", "tensor_seeds"]


def forward_ops(func: Operation, outputs: int) -> list[Operation]:
    """The ops that the first `outputs` results need, in order."""
    needed: set[Value] = set(func.body.terminator.operands[:outputs])
    found = []
    for op in func.body.reversed():
        if op is not func.body.terminator and any(r in needed for r in op.results):
            needed.update(op.operands)
            found.append(op)
    return found[::-1]


def tensor_seeds(module: Operation, ranks: int, outputs: int) -> dict[int, Placement]:
    """See the module docstring. Considers arguments of kind 'param'; `outputs`: how many results belong to the forward pass."""
    func = next(op for op in module.body if op.name == "func")
    ops = forward_ops(func, outputs)
    forbidden: set[int] = set()
    while True:
        walk = _Walk(func, ops, ranks, forbidden)
        conflict = walk.run()
        if not conflict:
            return {i: p for i, p in walk.decided.items() if p != REPLICATE}
        forbidden |= conflict


@dataclass
class _Walk:
    func: Operation
    ops: list[Operation]
    ranks: int
    forbidden: set[int]
    decided: dict[int, Placement] = field(default_factory=dict)
    state: dict[Value, Placement] = field(default_factory=dict)
    cause: dict[Value, frozenset[int]] = field(default_factory=dict)

    def run(self) -> set[int]:
        """Walks the ops; the parameters to rule out if an activation had to be gathered."""
        kinds = [a.get("kind", "input") for a in self.func["arg_attrs"]]
        self.open = {a for a, kind in zip(self.func.body.args, kinds) if kind == "param"}
        self.state = dict.fromkeys(self.func.body.args, REPLICATE)
        self.views: dict[Value, list[Operation]] = {}
        inside = set(self.ops)
        self.users = {v: [u for u in v.users if u in inside] for op in self.ops for v in (*op.operands, *op.results)}
        for op in self.ops:
            conflict = self._op(op)
            if conflict:
                return set(conflict)
        return set()

    # -- parameters behind views

    def _parameter(self, v: Value) -> BlockArg | None:
        """The undecided parameter that `v` is (a view of)."""
        source = self.views[v][0].operands[0] if v in self.views else v
        return source if isinstance(source, BlockArg) and source in self.open and source.index not in self.decided else None

    def _decide(self, v: Value, placement: Placement) -> bool:
        """Lays the parameter behind `v` so that `v` is as `placement`; False if no placement of it does that."""
        arg = self._parameter(v)
        assert arg is not None
        chain, at = self.views.get(v, []), placement
        placements = [at]
        for op in reversed(chain):
            parts = {at.parts}
            found = next((s for s in strategies(op, self.ranks, parts) if s.results[0] == at), None)
            if found is None:
                return False
            at = found.operands[0]
            placements.append(at)
        if at.kind != "shard" or arg.index in self.forbidden:
            return False
        self.decided[arg.index] = at
        for value, p in zip([arg, *(op.result for op in chain)], reversed(placements), strict=True):
            self.state[value] = p
            self.cause[value] = frozenset({arg.index})
        return True

    # -- ops

    def _op(self, op: Operation) -> frozenset[int]:
        if op.has_trait(Trait.ViewLike) or op.name == "graph.cast":
            (x,) = op.operands
            if self._parameter(x) is not None:
                self.views[op.result] = [*self.views.get(x, []), op]
                self.state[op.result] = REPLICATE
                return frozenset()
        opened = [v for v in op.operands if self._parameter(v) is not None]
        if opened:
            self._parameters(op, opened)
        states = [self._known(v) for v in op.operands]
        if all(s == REPLICATE for s in states):
            for r in op.results:
                self.state[r] = REPLICATE
            return frozenset()
        parts = {s.parts for s in states}
        fitting = [s for s in strategies(op, self.ranks, parts) if self._fits(s, states)]
        if not fitting:
            return frozenset().union(*(self.cause.get(v, frozenset()) for v in op.operands))
        best = max(fitting, key=lambda s: sum(p.kind == "shard" for p in s.results))
        causes = frozenset().union(*(self.cause.get(v, frozenset()) for v in op.operands))
        for r, p in zip(op.results, best.results, strict=True):
            self.state[r] = REPLICATE if p.kind == "partial" else p
            self.cause[r] = frozenset() if p.kind != "shard" else causes
        return frozenset()

    def _known(self, v: Value) -> Placement:
        return self.state.get(v, REPLICATE)

    def _fits(self, s: Strategy, states: list[Placement]) -> bool:
        return all(have == want or (have == REPLICATE and want.kind == "shard") for have, want in zip(states, s.operands, strict=True))

    def _parameters(self, op: Operation, opened: list[Value]) -> None:
        if op.name == "graph.matmul" and op.operands[1] in opened and op.operands[0] not in opened:
            self._matmul(op)
        elif op.name == "graph.embedding" and op.operands[0] in opened:
            if self._known(op.operands[1]) == REPLICATE and self._depends_on_input(op.operands[1]):  # positions are few
                self._decide(op.operands[0], shard(0))
        else:
            states = [self._known(v) for v in op.operands]
            if any(s.kind == "shard" for s in states):  # a bias or scale of what is cut already
                fits = [s for s in strategies(op, self.ranks, {s.parts for s in states}) if self._fits(s, states)]
                for v, p in zip(op.operands, fits[0].operands if fits else states, strict=True):
                    if v in opened and p.kind == "shard" and self._parameter(v) is not None:
                        self._decide(v, p)
        for v in opened:
            arg = self._parameter(v)
            if arg is not None and len(self.users.get(arg, ())) <= 1:
                self.decided[arg.index] = REPLICATE

    def _depends_on_input(self, v: Value) -> bool:
        kinds = [a.get("kind", "input") for a in self.func["arg_attrs"]]
        frontier, seen = [v], {v}
        while frontier:
            current = frontier.pop()
            if isinstance(current, BlockArg):
                if kinds[current.index] == "input":
                    return True
                continue
            for operand in current.defining_op.operands if current.defining_op is not None else ():
                if operand not in seen:
                    seen.add(operand)
                    frontier.append(operand)
        return False

    def _matmul(self, op: Operation) -> None:
        x, w = op.operands
        have, rank = self._known(x), len(shape_of(x))
        if have.kind == "shard" and have.dim == rank - 1:
            self._decide(w, shard(rank - 2, have.parts))
        elif have == REPLICATE:
            for parts in dict.fromkeys((_parts_of(op.result, rank - 1), 1)):
                if shape_of(w)[rank - 1] % (parts * self.ranks) == 0 and self._decide(w, shard(rank - 1, parts)):
                    return


def _parts_of(v: Value, dim: int) -> int:
    """How many equal slices along `dim` are taken of `v`, looking through elementwise ops and reshapes that keep that dimension."""
    t = v.type
    assert isinstance(t, TensorType)
    size = t.shape[dim]
    frontier, seen = [v], set()
    while frontier:
        current = frontier.pop()
        for user in current.users:
            if not user.results or user in seen:
                continue
            seen.add(user)
            shape = shape_of(user.results[0])
            if user.name == "graph.slice" and shape and isinstance(size, int) and isinstance(shape[-1], int) and 0 < shape[-1] < size:
                source = shape_of(user.operands[0])
                if source[-1] == size and size % shape[-1] == 0 and user["starts"][-1] % shape[-1] == 0 and shape[:-1] == source[:-1]:
                    return size // shape[-1]
            keeps = user.has_trait(Trait.Elementwise) or user.name == "graph.reshape"
            if keeps and shape and shape[-1] == size:
                frontier.append(user.results[0])
    return 1
