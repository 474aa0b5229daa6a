"""`aicc shard MODEL --validate`: the plan's training step on virtual ranks in this process, against the whole model's, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..commands.output import console
from ..errors import UserError
from ..model_file import LoadedModel, load
from .auto_shard import auto_shard
from .validation import planted_faults, validate_plan

__all__ = ["check_plan"]


def check_plan(model: str, mesh: str, plan: Path | None) -> bool:
    """Prints how the sharded step compares, and how many planted faults the comparison catches. True if the step is right.

    The model file gives the model, small enough to run here, and inputs of a global batch. The loss is the output's own (`.loss`), or
    the mean of its squares.
    """
    found = load(model)
    if not isinstance(found, LoadedModel) or not isinstance(found.model, torch.nn.Module):
        raise UserError(f"'{model}' has no torch.nn.Module with inputs to run; --validate needs both (see `aicc run --help`)")
    with torch.no_grad():
        own_loss = getattr(found.model(*found.args, **found.kwargs), "loss", None) is not None
    inputs: Any = found.kwargs if found.kwargs else found.args
    if found.kwargs and found.args:
        raise UserError(f"'{model}': give its inputs all by name, or all by position")
    sharding = auto_shard(found.model, inputs, mesh=mesh or "1", loss_fn=None if own_loss else _mean_square, optimizer=torch.optim.AdamW,
                          plan=plan, device="cpu")
    whole = sharding.batch and sharding.batch * sharding.micro_batches
    tensors = [x[:sharding.batch] if x.dim() and x.shape[0] == whole else x  # one micro-batch
               for x in torch.utils._pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor)]
    report = validate_plan(sharding, found.model, tensors)
    out = console()
    out.print(f"plan {sharding.plan.label} on {sharding.plan.devices} virtual ranks")
    out.print(str(report), markup=False)
    if report.ok:
        out.print(str(planted_faults(sharding, found.model, tensors)), markup=False)
    return report.ok


def _mean_square(output: Any) -> torch.Tensor:
    leaves = [x for x in torch.utils._pytree.tree_leaves(output) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return torch.stack([x.float().square().mean() for x in leaves]).sum()
