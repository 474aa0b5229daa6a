"""The profiler of compiled graphs, on a device that only writes down what it is asked."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from aicc.runtime.cuda_graph import CudaGraph
from aicc.runtime.cuda_profile import Profile

from .fake_device import FakeDevice
from .test_replay import build, device_for, two_kernels


class FakeClock:
    """Every launch takes as many microseconds as its number says, and each mark one."""

    def __init__(self, device: FakeDevice):
        self.device, self.marks, self.held = device, list[float](), list[float]()

    def hold(self, seconds: float) -> None:
        self.held.append(seconds)

    def mark(self) -> None:
        done = len(self.device.calls)
        self.marks.append(len(self.marks) + sum(10.0 * (1 + i % 2) for i in range(done)))

    def intervals(self) -> list[float]:
        marks, self.marks = self.marks, []
        return [b - a for a, b in pairwise(marks)]


def profiled(f: Any, *inputs: torch.Tensor, calls: int = 3) -> tuple[Profile, FakeDevice, list[Any]]:
    manifest, blobs = build(f, *inputs)
    device = device_for(manifest)
    graph = CudaGraph(manifest, blobs, on=device)
    clock = FakeClock(device)
    graph.profile = Profile(clock)
    outputs: list[Any] = []
    for _ in range(calls):
        outputs = graph(list(inputs))
    return graph.profile, device, outputs


def test_each_kernel_has_its_time_without_that_of_the_marks() -> None:
    a, b = torch.randn(32, 272), torch.randn(272, 272)
    profile, device, (out,) = profiled(two_kernels, a, b)
    assert out.shape == (32, 272) and [c[0] for c in device.calls] == ["launch"] * 6
    assert profile.calls == [[10.0, 20.0], [10.0, 20.0]]  # the first call is not counted
    assert [(r.kind, r.count, r.microseconds) for r in profile.rows()] == [("kernel", 1, 20.0), ("kernel", 1, 10.0)]
    assert profile.rows()[0].line and profile.table()[0].startswith("main: 30.0 us on the device in 2 steps")


def test_the_device_is_held_for_as_long_as_the_host_needed_before() -> None:
    a, b = torch.randn(32, 272), torch.randn(272, 272)
    profile, _, _ = profiled(two_kernels, a, b)
    clock: Any = profile.clock
    assert clock.held[0] == 0 and clock.held[1:] == pytest.approx([2 * h for h in profile.host[:-1]])


def test_operator_calls_are_steps_too() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.qr(x + 1.0)[1] * 2.0

    profile, _, _ = profiled(f, torch.eye(8))
    assert [kind for kind, *_ in profile.steps] == ["kernel", "extern", "kernel"]
    assert profile.steps[1][1].startswith("aten.linalg_qr") and len(profile.calls[0]) == 3


def test_nothing_measured_says_so() -> None:
    assert Profile(FakeClock(FakeDevice())).table() == [": no calls were measured"]
