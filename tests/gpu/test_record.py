"""Programs with operator calls as CUDA graphs, on a device that only writes down what it is asked (operators run, kernels do not)."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from aicc.runtime import cuda_record
from aicc.runtime.cuda_graph import CudaGraph
from aicc.runtime.cuda_replay import graph_memory

from .fake_device import FakeDevice
from .test_replay import build, device_for


@pytest.fixture(autouse=True)
def _no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator of these tests stands for those that may be recorded."""
    graph_memory().release()
    monkeypatch.setattr(cuda_record, "RECORDABLE", cuda_record.RECORDABLE | {"aten.linalg_matrix_exp.default"})


def exponential(a: torch.Tensor) -> torch.Tensor:
    return torch.linalg.matrix_exp(a)


def made(f: Any, *inputs: torch.Tensor) -> tuple[CudaGraph, FakeDevice]:
    manifest, blobs = build(f, *inputs)
    device = device_for(manifest)
    return CudaGraph(manifest, blobs, on=device, cudagraphs=True), device


def test_the_second_call_records_and_every_replay_gives_tensors_of_its_own() -> None:
    graph, device = made(exponential, torch.eye(4))
    a = torch.eye(4)
    outputs, expected = [], []
    for n in range(1, 6):
        a.copy_(torch.eye(4) * n)
        outputs.append(graph(a)[0])
        expected.append(torch.linalg.matrix_exp(a))
    assert device.recordings == 1 and [c[0] for c in device.calls].count("replay") == 4, "the first call warms up, the second records"
    assert len({t.data_ptr() for t in outputs}) == 5, "an output stays as it is"
    for t, e in zip(outputs, expected, strict=True):
        torch.testing.assert_close(t, e)


def test_another_address_is_another_recording_and_the_oldest_makes_room() -> None:
    graph, device = made(exponential, torch.eye(4))
    given = [torch.eye(4) * n for n in range(1, cuda_record.LIMIT + 2)]
    graph(given[0])
    for a in given:
        torch.testing.assert_close(graph(a)[0], torch.linalg.matrix_exp(a))
    assert device.recordings == len(given)
    graph(given[-1])
    assert device.recordings == len(given)
    graph(given[0])
    assert device.recordings == len(given) + 1


def test_addresses_that_never_come_again_end_it_with_a_warning() -> None:
    graph, device = made(exponential, torch.eye(4))
    kept = [torch.eye(4) * n for n in range(1, cuda_record.PATIENCE + 4)]
    with pytest.warns(RuntimeWarning, match="goes on without CUDA graphs: .* keep changing"):
        for a in kept:
            torch.testing.assert_close(graph(a)[0], torch.linalg.matrix_exp(a))
    assert device.recordings == cuda_record.PATIENCE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(graph(kept[0])[0], torch.linalg.matrix_exp(kept[0]))


def test_a_recording_that_fails_is_said_and_the_call_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, device = made(exponential, torch.eye(4))
    graph(torch.eye(4))

    def refuse(run: Any, stream: int) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    device.record = refuse  # type: ignore[method-assign]
    with pytest.warns(RuntimeWarning, match="goes on without CUDA graphs: operation not permitted when stream is capturing$"):
        torch.testing.assert_close(graph(torch.eye(4) * 2)[0], torch.linalg.matrix_exp(torch.eye(4) * 2))


def test_within_a_capture_of_the_user_operators_are_called() -> None:
    graph, device = made(exponential, torch.eye(4))
    for capturing in (False, True, False):
        device.user_captures = capturing
        graph(torch.eye(4))
    assert device.recordings == 1 and [c[0] for c in device.calls].count("replay") == 1


def test_out_of_memory_replays_nothing_and_the_next_call_works(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, device = made(exponential, torch.eye(4))
    a = torch.eye(4)
    graph(a)
    graph(a)
    before = list(device.calls)

    def full(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_strided", full)
        with pytest.raises(torch.OutOfMemoryError):
            graph(a)
    assert device.calls == before
    torch.testing.assert_close(graph(a)[0], torch.linalg.matrix_exp(a))
    assert len(device.calls) == len(before) + 1


def test_an_expanded_result_stays_expanded() -> None:
    base = torch.tensor([[1.0], [2.0]])
    recording = cuda_record._Recording(lambda: None, [base.expand(2, 3), base])
    first, second = recording.run()
    assert first.stride()[1] == 0 and torch.equal(first, base.expand(2, 3)) and torch.equal(second, base)
    assert len({base.data_ptr(), first.data_ptr(), second.data_ptr()}) == 3


def test_results_that_the_host_reads_are_not_recorded() -> None:
    manifest, _ = build(exponential, torch.eye(4))
    assert cuda_record.refusal(manifest) == ""
    assert "read by the host" in cuda_record.refusal({**manifest, "results": [{"kind": "item", "buffer": 0}]})
    assert "depend on data" in cuda_record.refusal({**manifest, "steps": [["allocate", [0]]]})
