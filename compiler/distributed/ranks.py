"""What ranks tell each other before anything runs, and which piece of a tensor is whose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ...ir.interpreter.dist import piece
from ...ir.sharding import Mesh, Placement
from ...passes.shard.plan import Plan
from ..errors import UserError

__all__ = ["agree", "check_world", "local_piece"]


def agree(what: str, mine: str, among: str = "") -> None:
    """Raises UserError on every rank unless all ranks (that give the same `among`) say the same."""
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, (among, mine))
    for group in dict.fromkeys(a for a, _ in said):
        texts = list(dict.fromkeys(t for a, t in said if a == group))
        if len(texts) > 1:
            listed = "; ".join(f"ranks {', '.join(str(r) for r, s in enumerate(said) if s == (group, t))}: {t[:200]}" for t in texts)
            raise UserError(f"the ranks disagree on {what}: {listed}")


def check_world(mesh: Mesh, plan: Plan) -> None:
    """UserError unless as many ranks run as the plan takes."""
    if not dist.is_initialized():
        raise UserError("no process group: call torch.distributed.init_process_group() and start the program with torchrun")
    world = dist.get_world_size()
    if world != mesh.ranks:
        axes = " * ".join(f"{name} {size}" for name, size in mesh.axes)
        raise UserError(f"the plan {plan.label} takes {mesh.ranks} ranks ({axes}), but {world} "
                        f"{'is' if world == 1 else 'are'} running: start it with torchrun --nproc-per-node {mesh.ranks}")


def local_piece(x: torch.Tensor, placement: Mapping[str, Placement], mesh: Mesh, order: Sequence[str], rank: int) -> torch.Tensor:
    """This rank's piece of a whole tensor."""
    at = mesh.coordinates(rank)
    for axis in order:
        p = placement.get(axis)
        if p is not None and p.kind == "shard":
            x = piece(x, at[axis], mesh.size(axis), p.dim, p.parts)
    return x
