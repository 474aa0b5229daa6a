"""`dist` ops of a graph-level module to externs: the program of one rank.

    lower_collectives(module, mesh, rank, {"dp": "3", "tp": "5"})      # axis -> name of the rank's process group

Messages are rank-major and contiguous: what is cut along the first dimension is so already, and travels as it is; around others there
are reshapes and permutations, graph ops that fuse with what computes the operand and reads the result.
Every collective is one call of `_c10d_functional` (NCCL on GPUs, gloo on CPUs), which starts it, and one of
`aicc_dist.wait`, which ends it and has the operand among its arguments, so that its memory is not used again before.

Order. Every rank runs the same list of collectives: there is no control flow, ranks differ in constants alone, and the externs are
marked as having effects, so that no pass reorders them. `collective_order` is that list as text; ranks compare it before the first step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...ir.builder import Builder
from ...ir.core import IRError, Operation, Value
from ...ir.sharding import Mesh
from ...ir.types import DTYPES, TensorType

__all__ = ["collective_order", "lower_collectives"]

_COLLECTIVES = ("dist.all_reduce", "dist.all_gather", "dist.reduce_scatter", "dist.all_to_all", "dist.shift")


def collective_order(module: Operation) -> list[str]:
    """One line per collective, in order: what must be the same on every rank."""
    return [f"{op.name} axis={op['axis']} {op.operands[0].type} -> {op.result.type} {op.attributes.get('kind', '')}".strip()
            for op in module.walk() if op.name in _COLLECTIVES]


def lower_collectives(module: Operation, mesh: Mesh, rank: int, groups: Mapping[str, str]) -> None:
    """Replaces all dist ops, in place. IRError if an axis has no group."""
    at = mesh.coordinates(rank)
    for func in [op for op in module.body if op.name == "func"]:
        for op in func.body.ops:
            if op.parent is None:
                continue  # a wait, gone with its start
            if op.name.startswith("dist."):
                _Lowering(op, at, groups).run()
            op.attributes.pop("_sharding", None)
        _choose(func)
        func.attributes["arg_attrs"] = tuple({k: v for k, v in a.items() if k != "sharding"} for a in func["arg_attrs"])
    for op in module.body.ops:
        if op.name == "dist.mesh":
            op.erase()


def _choose(func: Operation) -> None:
    """Selects whose condition compares this rank's place with a number give what they choose; what the other branch needs is dead then."""
    for op in func.body.ops:
        condition = op.operands[0].defining_op if op.name == "graph.select" else None
        if condition is None or condition.name != "graph.ge" or not all(
                v.defining_op is not None and v.defining_op.name == "graph.full" for v in condition.operands):
            continue
        here, bound = (v.defining_op["value"] for v in condition.operands)  # type: ignore[index]
        chosen = op.operands[1 if here >= bound else 2]
        if chosen.type != op.result.type:
            chosen = Builder.before_op(op).op("graph.expand", chosen, type=op.result.type)
        op.result.replace_all_uses_with(chosen)
        op.erase()


class _Lowering:
    def __init__(self, op: Operation, at: Mapping[str, int], groups: Mapping[str, str]):
        self.op, self.at, self.groups = op, at, groups
        self.b = Builder.before_op(op)

    def run(self) -> None:
        op = self.op
        if op.name == "dist.coordinate":
            made = self.b.op("graph.full", type=TensorType((), DTYPES["i64"]), value=self.at[op["axis"]])
        elif op.name == "dist.shard":
            made = self._shard()
        elif op.name == "dist.wait":
            return  # lowered with its start
        elif op.name in _COLLECTIVES:
            self._collective()
            return
        else:
            raise IRError(f"'{op.name}' has no lowering to collectives")
        made.name = op.result.name
        op.result.replace_all_uses_with(made)
        op.erase()

    # -- graph ops

    def _reshape(self, x: Value, shape: list[int]) -> Value:
        t = x.type
        assert isinstance(t, TensorType)
        return x if t.shape == tuple(shape) and t.strides is None else self.b.op("graph.reshape", x, type=TensorType(tuple(shape), t.dtype))

    def _permute(self, x: Value, perm: list[int]) -> Value:
        t = x.type
        assert isinstance(t, TensorType)
        return x if perm == sorted(perm) else self.b.op("graph.permute", x, type=TensorType(tuple(t.shape[p] for p in perm), t.dtype),
                                                        perm=tuple(perm))

    def _shard(self) -> Value:
        op = self.op
        n, d, parts, (x,) = op["ranks"], op["dim"], op["parts"], op.operands
        shape, t = _shape(x), op.result.type
        assert isinstance(t, TensorType)
        c = shape[d] // (n * parts)
        r = (self.at[op["axis"]] - op["shift"]) % n
        if parts == 1:
            starts = tuple(r * c if i == d else 0 for i in range(len(shape)))
            return self.b.op("graph.slice", x, type=TensorType(t.shape, t.dtype), starts=starts, steps=(1,) * len(shape))
        cut = self._reshape(x, [*shape[:d], parts, n, c, *shape[d + 1:]])
        starts = tuple(r if i == d + 1 else 0 for i in range(len(shape) + 2))
        mine = self.b.op("graph.slice", cut, type=TensorType((*shape[:d], parts, 1, c, *shape[d + 1:]), t.dtype), starts=starts,
                         steps=(1,) * (len(shape) + 2))
        return self._reshape(mine, list(_shape(op.result)))

    # -- collectives

    def _collective(self) -> None:
        op = self.op
        message, target, args, result = _FORMS[op.name](self)
        group = self.groups.get(op["axis"])
        if group is None:
            raise IRError(f"no process group for mesh axis '{op['axis']}'; there are {', '.join(self.groups) or 'none'}")
        dtype = message.type.dtype  # type: ignore[attr-defined]
        started = self._extern(f"_c10d_functional.{target}.default", [message], ({"operand": 0}, *args, group), TensorType(tuple(result), dtype))
        wait = next((u for u in op.result.users if u.name == "dist.wait"), None) if op["stage"] == "start" else None
        if wait is not None:
            self.b = Builder.before_op(wait)
        where = json.dumps({"op": op.name, "axis": op["axis"], "type": str(op.result.type), "at": str(op.location)})
        done = self._extern("aicc_dist.wait.default", [started, message], ({"operand": 0}, {"operand": 1}, where, group),
                            TensorType(tuple(result), dtype))
        made = self._result(done)
        made.name = op.result.name
        if wait is not None:
            wait.result.replace_all_uses_with(made)
            wait.erase()
        op.result.replace_all_uses_with(made)
        op.erase()

    def _extern(self, target: str, operands: list[Value], args: tuple[Any, ...], t: TensorType) -> Value:
        return self.b.create("graph.extern", operands, {"target": target, "args": args, "result_kinds": ("tensor",), "random": True,
                                                        "reason": "a collective"}, [t]).result

    def _result(self, x: Value) -> Value:
        """The message that came, in the shape that the op gives."""
        op = self.op
        if op.name == "dist.all_gather":
            piece, d, parts, n = list(_shape(op.operands[0])), op["dim"], op["parts"], op["ranks"]
            if d == 0 and parts == 1:
                return x
            cut = self._reshape(x, [n, *piece[:d], parts, piece[d] // parts, *piece[d + 1:]])
            x = self._permute(cut, [*range(1, d + 2), 0, *range(d + 2, len(piece) + 2)])
        elif op.name == "dist.all_to_all":
            piece, s, c, n = list(_shape(op.operands[0])), op["split"], op["concat"], op["ranks"]
            piece[s] //= n
            x = self._permute(self._reshape(x, [n, *piece]), [*range(1, c + 1), 0, *range(c + 1, len(piece) + 1)])
        return self._reshape(x, list(_shape(op.result)))

    def _all_reduce(self) -> tuple[Value, str, tuple[Any, ...], list[int]]:
        (x,) = self.op.operands
        return x, "all_reduce", (self.op["kind"],), list(_shape(x))

    def _all_gather(self) -> tuple[Value, str, tuple[Any, ...], list[int]]:
        (x,) = self.op.operands
        n, shape = self.op["ranks"], list(_shape(x))
        return x, "all_gather_into_tensor", (n,), [n * shape[0], *shape[1:]]

    def _reduce_scatter(self) -> tuple[Value, str, tuple[Any, ...], list[int]]:
        op = self.op
        (x,) = op.operands
        shape, d, n, parts = list(_shape(x)), op["dim"], op["ranks"], op["parts"]
        if d == 0 and parts == 1:
            return x, "reduce_scatter_tensor", (op["kind"], n), [shape[0] // n, *shape[1:]]
        cut = self._reshape(x, [*shape[:d], parts, n, shape[d] // (n * parts), *shape[d + 1:]])
        moved = self._permute(cut, [d + 1, *(i for i in range(len(shape) + 2) if i != d + 1)])
        return self._reshape(moved, [_count(x)]), "reduce_scatter_tensor", (op["kind"], n), [_count(x) // n]

    def _all_to_all(self) -> tuple[Value, str, tuple[Any, ...], list[int]]:
        op = self.op
        (x,) = op.operands
        shape, s, n = list(_shape(x)), op["split"], op["ranks"]
        cut = self._reshape(x, [*shape[:s], n, shape[s] // n, *shape[s + 1:]])
        moved = self._permute(cut, [s, *(i for i in range(len(shape) + 1) if i != s)])
        sizes = (_count(x) // n,) * n
        return self._reshape(moved, [_count(x)]), "all_to_all_single", (sizes, sizes), [_count(x)]

    def _shift(self) -> tuple[Value, str, tuple[Any, ...], list[int]]:
        """An all-to-all in which each rank sends to the next alone: torch's functional collectives have no other message between two ranks."""
        op = self.op
        (x,) = op.operands
        n, here, count = op["ranks"], self.at[op["axis"]], _count(x)
        come, go = (tuple(count if r == other % n else 0 for r in range(n)) for other in (here - 1, here + 1))
        return self._reshape(x, [count]), "all_to_all_single", (come, go), [count]


_FORMS = {"dist.all_reduce": _Lowering._all_reduce, "dist.all_gather": _Lowering._all_gather,
          "dist.reduce_scatter": _Lowering._reduce_scatter, "dist.all_to_all": _Lowering._all_to_all,
          "dist.shift": _Lowering._shift}


def _shape(v: Value) -> tuple[int, ...]:
    assert isinstance(v.type, TensorType)
    return v.type.shape  # type: ignore[return-value]


def _count(v: Value) -> int:
    total = 1
    for s in _shape(v):
        total *= s
    return total
