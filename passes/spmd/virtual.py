"""A partitioned module on all ranks of a mesh at once, in one process, with the reference interpreter.

    results = run_virtual(module, mesh, inputs_of_rank)      # results[rank] = operands of `return`

Ops run in step: each op on every rank before the next op, `dist` ops on the values of their group. No process groups, any N.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...ir.core import IRError, Operation, Value
from ...ir.interpreter import HANDLERS
from ...ir.interpreter.context import Context, Numerics
from ...ir.interpreter.dist import COMBINE, gather_pieces, piece, run_group
from ...ir.sharding import Mesh, Placement

__all__ = ["assemble", "disassemble", "run_virtual"]

Tensor = torch.Tensor
Watch = Callable[[Operation, list[dict[Value, Any]]], None]


@torch.no_grad()
def run_virtual(module: Operation, mesh: Mesh, inputs: Sequence[Sequence[Tensor]], *, precision: torch.dtype | None = None,
                watch: Watch | None = None) -> list[list[Tensor]]:
    """Runs the only function of `module` on every rank. inputs: per rank, one CPU tensor per argument (of the local shape).

    `watch(op, envs)` is called after each op with every rank's values. IRError names the op that fails.
    """
    func = next(op for op in module.body if op.name == "func")
    if len(inputs) != mesh.ranks:
        raise IRError(f"{len(inputs)} lists of inputs for a mesh of {mesh.ranks} ranks")
    contexts = [Context(HANDLERS, Numerics(precision)) for _ in range(mesh.ranks)]
    envs: list[dict[Value, Any]] = [
        {a: ctx.to_type(x.detach(), a.type) for a, x in zip(func.body.args, xs, strict=True)} for ctx, xs in zip(contexts, inputs)]
    for op in func.body:
        if op is func.body.terminator:
            break
        if op.name == "dist.coordinate":
            for rank, env in enumerate(envs):
                env[op.result] = torch.tensor(mesh.coordinates(rank)[op["axis"]])
        elif op.name == "dist.wait":
            for env in envs:
                env[op.result] = env[op.operands[0]]
        elif op.name.startswith("dist."):
            for group in mesh.groups(op["axis"]):
                for rank, value in zip(group, run_group(op, [envs[r][op.operands[0]] for r in group]), strict=True):
                    envs[rank][op.result] = value
        else:
            for ctx, env in zip(contexts, envs, strict=True):
                for r, x in zip(op.results, ctx.run_op(op, [env[v] for v in op.operands])):
                    env[r] = x
        if watch is not None:
            watch(op, envs)
    return [[env[v] for v in func.body.terminator.operands] for env in envs]


def disassemble(x: Tensor, mesh: Mesh, placement: dict[str, Placement], order: Sequence[str]) -> list[Tensor]:
    """Every rank's piece of a whole tensor; `order`: the axes in the order in which they cut."""
    made = []
    for rank in range(mesh.ranks):
        at, mine = mesh.coordinates(rank), x
        for axis in order:
            p = placement.get(axis)
            if p is not None and p.kind == "shard":
                mine = piece(mine, at[axis], mesh.size(axis), p.dim, p.parts)
        made.append(mine)
    return made


def assemble(xs: Sequence[Tensor], mesh: Mesh, placement: dict[str, Placement], order: Sequence[str]) -> Tensor:
    """The whole tensor from every rank's value. IRError if ranks that should hold the same thing do not."""
    current = {tuple(mesh.coordinates(r).items()): x for r, x in enumerate(xs)}
    for axis in reversed([a for a in mesh.names if a not in order] + list(order)):
        groups: dict[Any, dict[int, Tensor]] = {}
        for at, x in current.items():
            groups.setdefault(tuple(kv for kv in at if kv[0] != axis), {})[dict(at)[axis]] = x
        current = {}
        for rest, members in groups.items():
            current[rest] = _join([members[i] for i in range(len(members))], placement.get(axis), axis)
    (whole,) = current.values()
    return whole


def _join(xs: list[Tensor], p: Placement | None, axis: str) -> Tensor:
    if p is None or p.kind == "replicate":
        for r, x in enumerate(xs[1:], 1):
            close = x.shape == xs[0].shape and bool(torch.allclose(x.double(), xs[0].double(), rtol=1e-9, atol=1e-9, equal_nan=True))
            if not close:
                raise IRError(f"replicated along '{axis}', but rank {r} of it holds other values than rank 0")
        return xs[0]
    if p.kind == "shard":
        return gather_pieces(xs, p.dim, p.parts)
    total = xs[0]
    for x in xs[1:]:
        total = COMBINE[p.op](total, x)
    return total
