"""More faults to plant (see `planted.py`): where products end and results are stored, and in the order of launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from aicc.backends.llvm import nontemporal as llvm_nontemporal
from aicc.passes import nontemporal, schedule, tile_reductions
from aicc.passes.tiling import contraction
from llvmlite import ir
from planted import Planted, r

__all__ = ["PLANTED_KERNELS", "plant_a_wrong_order"]


# -- programs


class Normalised(torch.nn.Module):
    """A convolution with the batch norm of inference behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(r(24, 8, 3, 3))
        self.mean, self.var, self.scale, self.shift = r(24), r(24).square() + 0.5, r(24), r(24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.conv2d(x, self.w, stride=2)
        z = F.batch_norm(y, self.mean, self.var, self.scale, self.shift)
        return torch.relu(z)


def sums_of_exponentials(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = (x * 0.1) @ w
    return y.exp().sum(-1)


def products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = x @ y
    return z.sin() * 2


def pointwise(x: torch.Tensor) -> torch.Tensor:
    y = x.exp()
    return y * 2 + 1


# -- faults


def _one_channel_for_all(m: pytest.MonkeyPatch) -> None:
    """What is read along the channels behind a product is read at the first."""
    true = contraction.Contraction._member
    m.setattr(contraction.Contraction, "_member", lambda self, e, op, at, *rest: true(self, e, op, {**at, "d1": 0}, *rest))


def _last_part_too_long(m: pytest.MonkeyPatch) -> None:
    m.setattr(tile_reductions, "_leave_out", lambda made, parts, combine: None)


def _lanes_reversed(m: pytest.MonkeyPatch) -> None:
    """Vectors that are stored past the caches, of everything that is larger than 4 KB."""
    true = llvm_nontemporal.Nontemporal.store

    def wrong(self: Any, value: ir.Value, pointer: ir.Value) -> None:
        n = value.type.count
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), n), [*range(n)][::-1])
        true(self, self.k.b.shuffle_vector(value, value, lanes), pointer)
    m.setattr(llvm_nontemporal.Nontemporal, "store", wrong)
    m.setattr(nontemporal, "cache_bytes", lambda target: 4096)


def plant_a_wrong_order(m: pytest.MonkeyPatch) -> None:
    """Launches come before those that make what they read, and nothing seems to cost less."""
    m.setattr(schedule, "_depth_first", lambda graph, costs: graph.ops[::-1])
    m.setattr(schedule._Costs, "peak", lambda self, order: int(len(order) > 1 and order[0] in {v.defining_op for op in order for v in op.operands}))


PLANTED_KERNELS: dict[str, Planted] = {
    "tile (behind a product)": Planted("tile", "", Normalised(), (r(2, 8, 9, 9),), _one_channel_for_all, 12),
    "tile-reductions": Planted("tile-reductions", "", sums_of_exponentials, (r(64, 64), r(64, 600)), _last_part_too_long, 6),
    "program (past the caches)": Planted("program", "", pointwise, (r(64, 512),), _lanes_reversed, 6),
}
