"""Compiled graphs and CUDA graphs on a device that only writes down what it is asked."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from aicc.compiler.gpu import compile_cuda
from aicc.ir import Operation
from aicc.runtime.artifact import Artifact
from aicc.runtime.cuda import CudaError
from aicc.runtime.cuda_graph import CudaGraph
from aicc.runtime.cuda_replay import graph_memory

from .cases import SM90, capture
from .fake_device import FakeDevice


def build(f: Any, *inputs: torch.Tensor, dynamic: bool = False) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Manifest and blobs of the one graph of `f`."""
    found: list[tuple[dict[str, Any], dict[str, bytes]]] = []

    def keep(module: Operation, gm: torch.fx.GraphModule, args: list[Any]) -> Any:
        artifact = Artifact.from_bytes(compile_cuda(module, SM90).to_bytes())
        found.append((artifact.manifest, artifact.blobs))
        return gm.forward(*args)

    capture(f, inputs, keep, until="host", target=SM90, dynamic=dynamic)
    (made,) = found
    return made


@pytest.fixture(autouse=True)
def _no_memory() -> None:
    graph_memory().release()


def device_for(manifest: dict[str, Any]) -> FakeDevice:
    counts = [row["parameters"] for row in manifest["cuda"]["kernels"].values()]
    return FakeDevice(lambda handle: counts[handle - 100])


def two_kernels(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.tanh(a @ b) @ b  # too wide for one kernel


def test_a_call_launches_every_kernel_on_the_current_stream_and_allocates_its_outputs() -> None:
    manifest, blobs = build(two_kernels, torch.randn(32, 272), torch.randn(272, 272))
    device = device_for(manifest)
    graph = CudaGraph(manifest, blobs, on=device)
    a, b = torch.randn(32, 272), torch.randn(272, 272)
    (out,) = graph([a, b])
    assert out.shape == (32, 272) and [c[0] for c in device.calls] == ["launch", "launch"] and device.calls[0][5] == 77
    first, second = device.calls
    assert first[6][:2] == [a.data_ptr(), b.data_ptr()]
    assert second[6][:3] == [first[6][2], b.data_ptr(), out.data_ptr()]


def test_a_misaligned_argument_is_copied_and_the_others_are_not() -> None:
    manifest, blobs = build(lambda a, b: a * b + 1, torch.randn(64), torch.randn(64))
    device = device_for(manifest)
    graph = CudaGraph(manifest, blobs, on=device)
    base, b = torch.randn(65), torch.randn(64)
    a = base[1:]
    graph(a, b)
    ((*_, parameters),) = device.calls
    assert a.data_ptr() not in parameters[:2] and b.data_ptr() in parameters[:2]
    assert all(p % 16 == 0 for p in parameters[:3])


def test_a_view_of_a_misaligned_argument_is_one_of_the_argument() -> None:
    manifest, blobs = build(lambda a: (a.view(-1), a + 1), torch.randn(9, 48), dynamic=True)
    graph = CudaGraph(manifest, blobs, on=device_for(manifest))
    a = torch.randn(5 * 48 + 1)[1:].view(5, 48)
    rows = str(manifest["inputs"][0]["shape"][0])
    given: dict[int, Any] = {p: 5 if s == rows else 48 for p, s in manifest["symbol_args"]} | {manifest["inputs"][0]["position"]: a}
    view, _ = graph(*[given[p] for p in sorted(given)])
    assert view.shape == (240,) and view.data_ptr() == a.data_ptr() and view.storage_offset() == 1


def test_a_failing_launch_names_kernel_and_line() -> None:
    manifest, blobs = build(lambda a: a.softmax(-1), torch.randn(8, 64))
    device = device_for(manifest)
    graph = CudaGraph(manifest, blobs, on=device)
    device.fail_at, device.fail_with = 0, 1
    with pytest.raises(CudaError, match=r"launching kernel '\w+' \(step 1 of 1 of 'main_0', from .*test_replay\.py:\d+.*\): result 1"):
        graph(torch.randn(8, 64))


def test_a_graph_is_captured_at_the_second_call_and_patched_after() -> None:
    manifest, blobs = build(two_kernels, torch.randn(32, 272), torch.randn(272, 272))
    device = device_for(manifest)
    graph = CudaGraph(manifest, blobs, on=device, cudagraphs=True)
    a, b, c = torch.randn(32, 272), torch.randn(272, 272), torch.randn(32, 272)
    graph(a, b)
    assert [x[0] for x in device.calls] == ["launch", "launch"], "the first call warms up"
    device.calls.clear()
    (second,) = graph(a, b)
    (third,) = graph(c, b)
    (fourth,) = graph(c, b)
    assert [x[0] for x in device.calls] == ["graph"] * 3
    for (_, _, stream, calls), x, out in zip(device.calls, (a, c, c), (second, third, fourth), strict=True):
        first, last = calls
        assert stream == 77 and first[6][:2] == [x.data_ptr(), b.data_ptr()]
        assert last[6][:3] == [first[6][2], b.data_ptr(), out.data_ptr()]
    replay = graph.replay
    assert replay is not None and (replay.captures, replay.launches) == (1, 3)
    variants = len({(x.data_ptr(), out.data_ptr()) for x, out in zip((a, c, c), (second, third, fourth), strict=True)})
    assert len(device.executables) == variants


def test_only_kernels_with_another_address_get_new_parameters() -> None:
    manifest, blobs = build(two_kernels, torch.randn(32, 272), torch.randn(272, 272))
    device = device_for(manifest)
    graph = CudaGraph(manifest, blobs, on=device, cudagraphs=True)
    b = torch.randn(272, 272)
    given = [torch.randn(32, 272) for _ in range(7)]
    for x in given[:1] + given:
        out = graph(x, b)[0]
    replay = graph.replay
    assert replay is not None and replay.captures == 1
    moved = device.calls[-1][3]
    assert moved[0][6][0] == given[-1].data_ptr() and moved[1][6][2] == out.data_ptr()
    assert len(device.executables) == 4, "no more variants than that; the oldest is changed"
    assert 6 <= replay.patches <= 12, "of two kernels only the first reads what changes each time"


def test_each_set_of_sizes_has_its_own_graph() -> None:
    manifest, blobs = build(lambda a: torch.tanh(a).sum(-1), torch.randn(9, 48), dynamic=True)
    device = device_for(manifest)
    graph = CudaGraph(manifest, blobs, on=device, cudagraphs=True)
    for n in (5, 6, 5, 6, 5):
        rows = str(manifest["inputs"][0]["shape"][0])
        given: dict[int, Any] = {p: n if s == rows else 48 for p, s in manifest["symbol_args"]}
        given |= {manifest["inputs"][0]["position"]: torch.randn(n, 48)}
        graph(*[given[p] for p in sorted(given)])
    kinds = [c[0] for c in device.calls]
    assert kinds.count("graph") == 3 and graph.replay is not None and graph.replay.captures == 2


def test_a_check_that_failed_is_reported_by_the_next_replay() -> None:
    manifest, blobs = build(lambda t, i: t[i] * 2, torch.randn(9, 4), torch.tensor([1, 2]))
    device = device_for(manifest)
    graph = CudaGraph(manifest, blobs, on=device, cudagraphs=True)
    args = torch.randn(9, 4), torch.tensor([1, 2])
    for _ in range(3):
        graph(*args)
    device.error[0] = 1
    with pytest.raises(IndexError):
        graph(*args)
    graph(*args)
    assert device.calls[-1][0] == "graph"


def test_a_misaligned_argument_is_noticed_by_a_replay() -> None:
    manifest, blobs = build(lambda a: a * 2, torch.randn(64))
    device = device_for(manifest)
    graph = CudaGraph(manifest, blobs, on=device, cudagraphs=True)
    base = torch.randn(65)
    for x in (torch.randn(64), torch.randn(64), torch.randn(64), base[1:]):
        graph(x)
    *_, (_, _, _, ((*_, parameters),)) = device.calls
    assert parameters[0] != base[1:].data_ptr() and parameters[0] % 16 == 0


def branches(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    for _ in range(2):
        x, y = torch.tanh(x).cumsum(1), torch.sigmoid(y).cumsum(1)
    return x + y.flip(1)


def test_two_streams_are_captured_and_patched() -> None:
    """Chains of scans that do not depend on each other; each kernel is found in the graph on whatever stream it was captured."""
    manifest, blobs = build(branches, torch.randn(30, 40000), torch.randn(30, 40000))
    (steps,) = manifest["cuda"]["functions"].values()
    assert [s[1] for s in steps if s[0] == "wait"] == [1, 0]
    assert {s[3] for s in steps if s[0] == "launch"} == {0, 1}
    device = device_for(manifest)
    graph = CudaGraph(manifest, blobs, on=device, cudagraphs=True)
    for _ in range(3):
        x, y = torch.randn(30, 40000), torch.randn(30, 40000)
        plain = [c for c in device.calls if c[0] == "launch"]
        (out,) = graph(x, y)
    kind, _, stream, calls = device.calls[-1]
    launched = [c for c in calls if c[0] == "launch"]
    assert kind == "graph" and stream == 77 and len(launched) == len(plain) == sum(s[0] == "launch" for s in steps)
    assert [c[0] for c in calls if c[0] != "launch"] == ["record", "wait", "record", "wait"]
    reads = {p for c in launched for p in c[6]}
    assert {x.data_ptr(), y.data_ptr(), out.data_ptr()} <= reads
    for step, call in zip([s for s in steps if s[0] == "launch"], launched, strict=True):
        assert call[1] == graph.cuda.entries[step[1]], "each kernel keeps its own node"
    assert graph.replay is not None and graph.replay.captures == 1


def test_a_failing_capture_falls_back_with_a_warning() -> None:
    manifest, blobs = build(lambda a: a * 2, torch.randn(64))
    device = device_for(manifest)
    graph = CudaGraph(manifest, blobs, on=device, cudagraphs=True)
    graph(torch.randn(64))

    def refuse(launch: Any) -> int:
        raise CudaError("no capture today")
    device.capture = refuse  # type: ignore[method-assign]
    with pytest.warns(RuntimeWarning, match="without CUDA graphs: no capture today"):
        graph(torch.randn(64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graph(torch.randn(64))
    assert [c[0] for c in device.calls] == ["launch"] * 3


def test_within_a_capture_of_the_user_launches_are_plain() -> None:
    manifest, blobs = build(lambda a: a * 2, torch.randn(64))
    device = device_for(manifest)
    graph = CudaGraph(manifest, blobs, on=device, cudagraphs=True)
    for capturing in (False, False, True, False):
        device.user_captures = capturing
        graph(torch.randn(64))
    assert [c[0] for c in device.calls] == ["launch", "graph", "launch", "graph"]


def test_operators_that_may_wait_and_foreign_arguments_decline_graphs_with_a_warning() -> None:
    manifest, blobs = build(lambda a: torch.linalg.inv(a) * 2, torch.eye(4))
    with pytest.warns(RuntimeWarning, match=r"without CUDA graphs: it calls aten\.linalg_inv"):
        CudaGraph(manifest, blobs, on=device_for(manifest), cudagraphs=True)


@pytest.mark.parametrize("cudagraphs", [False, True])
def test_out_of_memory_starts_nothing_and_the_next_call_works(monkeypatch: pytest.MonkeyPatch, cudagraphs: bool) -> None:
    left: list[int] = []  # allocations until memory is out; none: there is enough

    def allocator(device: torch.device) -> Any:
        def empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            if left:
                left[0] -= 1
                if left[0] < 0:
                    raise torch.OutOfMemoryError("out of memory")
            return torch.empty_strided(shape, strides, dtype=dtype)

        return empty

    def changes_its_argument(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        out = torch.tanh(a @ b) @ b
        a.add_(1)
        return out

    monkeypatch.setattr("aicc.runtime.cuda_graph._allocator", allocator)
    manifest, blobs = build(changes_its_argument, torch.randn(32, 272), torch.randn(272, 272))
    device = device_for(manifest)
    graph = CudaGraph(manifest, blobs, on=device, cudagraphs=cudagraphs)
    a, b = torch.randn(32, 272), torch.randn(272, 272)
    before = a.clone()
    failed = 0
    for enough in range(8):
        left[:] = [enough]
        try:
            graph(a, b)
        except torch.OutOfMemoryError:
            failed += 1
            assert not device.calls and torch.equal(a, before)
        else:
            break
    left.clear()
    assert failed >= 1 and device.calls
    device.calls.clear()
    (out,) = graph(a, b)
    assert out.shape == (32, 272) and device.calls
