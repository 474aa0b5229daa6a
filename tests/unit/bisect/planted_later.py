"""More faults to plant (see `planted.py`): in the passes about loops, streams and convolutions, in memory's lifetimes, in native loops, and in the
passes for GPUs, whose programs are bisected for a GPU that this machine need not have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from aicc.backends.llvm import loops as llvm_loops
from aicc.ir import Operation, Value
from aicc.passes import (
    hoist_invariants,
    lift_sums,
    liveness,
    merge_launches,
    plan_memory,
    simplify_loops,
    split_dimensions,
    split_reductions,
    stream,
    turn_streams,
    unpad_concatenations,
    winograd,
)
from aicc.passes.tiling import stream_cpu
from planted import Planted, deep, r
from torch._higher_order_ops.scan import scan

__all__ = ["PLANTED_LATER"]


# -- programs

def backwards(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    last, ys = scan(lambda c, v: (torch.tanh(c * 0.5 + v), c * v), h, x.flip(0))
    return ys.sum(0) + last


def two_weights(h: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    last, ys = scan(lambda c, v: (torch.tanh(v @ a + c @ b), c + 1), h, x)
    return ys.sum(0) + last


def outer_sums(c: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    last, ys = scan(lambda c, v: (c + v.t() @ v, v * 2), c, x)
    return last.exp() + ys.sum()


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    p = ((q @ k.transpose(-1, -2)) * 0.3).softmax(-1)
    return p @ v


class Convolved(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(r(32, 32, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.conv2d(x.tanh(), self.w, padding=1)
        return y * 2


def rotated(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    a, b = x.exp(), y.sin()
    z = torch.cat([a, b], -1)
    return z * 2


def long_sum(x: torch.Tensor) -> torch.Tensor:
    s = (x * x).sum()
    return s.sqrt()


def group_norm(x: torch.Tensor) -> torch.Tensor:
    y = F.group_norm(x, 8)
    return y.tanh()


def two_softmaxes(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    a = x.cumsum(-1)
    b = y.cumsum(-1)
    return a.sin() @ b


# -- faults

def _reversal_forgotten(m: pytest.MonkeyPatch) -> None:
    m.setattr(simplify_loops, "_set", lambda loop, key, numbers: loop.attributes.pop(key, None))


def _invariants_swapped(m: pytest.MonkeyPatch) -> None:
    true = hoist_invariants._drop_unused

    def wrong(loop: Operation, body: Operation) -> None:
        true(loop, body)
        first = loop["carried"] + loop["sliced"]
        same = [i for i in range(first, len(loop.operands)) if loop.operands[i].type == loop.operands[-1].type]
        if len(same) > 1:
            a, b = loop.operands[same[0]], loop.operands[same[-1]]
            loop.set_operand(same[0], b)
            loop.set_operand(same[-1], a)
    m.setattr(hoist_invariants, "_drop_unused", wrong)


def _last_trip_forgotten(m: pytest.MonkeyPatch) -> None:
    true = lift_sums._after
    m.setattr(lift_sums, "_after", lambda b, loop, term, sources, trips: true(b, loop, term, sources, trips - 1))


def _turned_copy_read_as_before(m: pytest.MonkeyPatch) -> None:
    def wrong(op: Operation, made: Any) -> None:
        for i, v in enumerate(op.operands):
            if v in made and op["maps"][i] is not None:
                op.set_operand(i, made[v][0])
    m.setattr(turn_streams, "_read", wrong)
    m.setattr(turn_streams, "why_small", lambda s, target: "")  # with gradients, only streams beyond the outer cache are turned


def _padding_one_off(m: pytest.MonkeyPatch) -> None:
    true = winograd._transformed_input
    m.setattr(winograd, "_transformed_input", lambda b, op, site, tiles: true(
        b, op, replace(site, rows=tuple(replace(r, start=r.start + 1) for r in site.rows)), tiles))


def _operands_of_streams_swapped(m: pytest.MonkeyPatch) -> None:
    true = stream._fused

    def wrong(*args: Any) -> Operation:
        made = true(*args)
        same = [i for i, v in enumerate(made.operands) if v.type == made.operands[-1].type]
        if len(same) > 1:
            a, b = made.operands[same[0]], made.operands[same[-1]]
            made.set_operand(same[0], b)
            made.set_operand(same[-1], a)
        return made
    m.setattr(stream, "_fused", wrong)


def _tail_counted(m: pytest.MonkeyPatch) -> None:
    """What lies behind the end of the stream counts in the row's sum."""
    true = stream_cpu.CpuStream._combined
    m.setattr(stream_cpu.CpuStream, "_combined", lambda self, scope, op, acc, masked: true(self, scope, op, acc, False))


def _dead_too_early(m: pytest.MonkeyPatch) -> None:
    true = liveness.live_ranges
    m.setattr(liveness, "live_ranges", lambda func: {v: (first, first) for v, (first, _) in true(func).items()})
    m.setattr(plan_memory, "check_plan", lambda func, kernels: None)  # it would say so at once


def _always_the_first_slice(m: pytest.MonkeyPatch) -> None:
    true = llvm_loops._Loop._slice
    m.setattr(llvm_loops._Loop, "_slice", lambda self, base, v, t: true(self, base, v, llvm_loops.I64(0)))


def _period_one_off(m: pytest.MonkeyPatch) -> None:
    true = unpad_concatenations.mod
    m.setattr(unpad_concatenations, "mod", lambda e, n: true(e, n - 1))


def _parts_overlap(m: pytest.MonkeyPatch) -> None:
    true = split_reductions.simplify

    def wrong(e: Any, bounds: Any) -> Any:
        return true(split_reductions.substitute(e, {"d0": 0}), bounds)
    m.setattr(split_reductions, "simplify", wrong)


def _groups_mixed_up(m: pytest.MonkeyPatch) -> None:
    true = split_dimensions.composed_map

    def wrong(outer: Any, inner: Any, bounds: Any) -> Any:
        made = true(outer, inner, bounds)
        return made if len(made) != 2 else tuple(split_dimensions.sym("d0") * 0 for _ in made)
    m.setattr(split_dimensions, "composed_map", wrong)


def _results_of_parts_swapped(m: pytest.MonkeyPatch) -> None:
    true = merge_launches._merged_kernel

    def wrong(launches: Any, kernels: Any, operands: Any, results: list[Value]) -> Operation:
        return true(launches, kernels, operands, results[::-1] if len({v.type for v in results}) == 1 else results)
    m.setattr(merge_launches, "_merged_kernel", wrong)


_QKV = (r(1, 264, 32), r(1, 264, 32), r(1, 264, 32))  # smaller and narrower ones are not streamed on CPUs

PLANTED_LATER: dict[str, Planted] = {
    "simplify-loops": Planted("simplify-loops", "", backwards, (r(4, 6), r(5, 4, 6)), _reversal_forgotten, 4),
    "hoist-invariants": Planted("hoist-invariants", "", two_weights, (r(4, 16), r(5, 4, 16), r(16, 16), r(16, 16)), _invariants_swapped, 6),
    "lift-sums": Planted("lift-sums", "", outer_sums, (r(6, 6), r(5, 4, 6)), _last_trip_forgotten, 4),
    "turn-streams": Planted("turn-streams", "", attention, _QKV, _turned_copy_read_as_before, 12, train=True),
    "winograd": Planted("winograd", "F.conv2d(", Convolved(), (r(1, 32, 6, 8),), _padding_one_off),
    "stream": Planted("stream", "", attention, _QKV, _operands_of_streams_swapped, 12),
    "tile (streams)": Planted("tile", "", attention, _QKV, _tail_counted, 12),
    "plan-memory (lifetimes)": Planted("plan-memory", "", deep, (r(24, 24), r(24, 24)), _dead_too_early, 5),
    "program (loops)": Planted("program", "", two_weights, (r(4, 16), r(5, 4, 16), r(16, 16), r(16, 16)), _always_the_first_slice, 8),
    "unpad-concatenations": Planted("unpad-concatenations", "torch.cat([a, b], -1)", rotated, (r(5, 8), r(5, 8)), _period_one_off, target="cuda:90"),
    "split-reductions": Planted("split-reductions", "(x * x).sum()", long_sum, (r(512, 512),), _parts_overlap, target="cuda:90"),
    "split-dimensions": Planted("split-dimensions", "", group_norm, (r(32, 16, 4, 4),), _groups_mixed_up, target="cuda:90"),
    "merge-launches": Planted("merge-launches", "", two_softmaxes, (r(32, 32), r(32, 32)), _results_of_parts_swapped, 4, target="cuda:90"),
}
