"""How launches are put together, against a driver that only writes down what it is asked."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from aicc.runtime import cuda
from aicc.runtime.artifact import ArtifactError

PROGRAM = {
    "kernels": {
        "k": {
            "buffers": 2,
            "symbols": ["s1"],
            "checks": 1,
            "grid": [["floordiv", ["add", "s1", 63], 64], 3],
            "blob": "b",
            "symbol": "k",
            "threads": 128,
            "shared": 256,
            "parameters": 6,
        },
    },
    "constants": [],
    "functions": {},
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made: list[Any] = []

    def launch(
        function: int, x: int, y: int, z: int, threads: int, ty: int, tz: int, shared: int, stream: int, params: int, extra: Any
    ) -> None:
        cells = (ctypes.c_void_p * 6).from_address(params)
        made.append(
            ("launch", function, (x, y, z), threads, shared, stream, [ctypes.c_uint64.from_address(c).value for c in cells])
        )

    fake = SimpleNamespace(
        launch=launch, copy=lambda target, source, n, stream: made.append(("copy", target, source, n, stream))
    )
    monkeypatch.setattr(cuda, "driver", lambda: fake)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77, raising=False)
    return made


def library() -> Any:
    return SimpleNamespace(
        program=PROGRAM,
        positions={"s0": 0, "s1": 1},
        constants=[torch.zeros(4)],
        error=torch.zeros(1, dtype=torch.int32),
        entries={"k": 1234},
        device=SimpleNamespace(index=0),
        launches=0,
        take_error=lambda: 0,
    )


def run(steps: list[Any], table: list[int], symbols: list[int], lib: Any = None) -> int:
    function = cuda.CudaFunction(lib or library(), steps)
    t, s = (ctypes.c_uint64 * len(table))(*table), (ctypes.c_int64 * len(symbols))(*symbols)
    return function(ctypes.addressof(t), ctypes.addressof(s))


def test_a_launch_has_addresses_sizes_the_error_word_and_null_scratch(calls: list[Any]) -> None:
    lib = library()
    step = ["launch", "k", [["table", 2, ["mul", "s0", 64]], ["constant", 0, 8]]]
    assert run([step], [1000, 2000, 3000], [5, 130], lib) == 0
    ((kind, function, grid, threads, shared, stream, parameters),) = calls
    assert (kind, function, grid, threads, shared, stream) == ("launch", 1234, (9, 1, 1), 128, 256, 77)
    assert parameters == [3000 + 5 * 64, lib.constants[0].data_ptr() + 8, 130, lib.error.data_ptr(), 0, 0]


def test_copies_run_in_order_and_empty_ones_not_at_all(calls: list[Any]) -> None:
    run(
        [["copy", ["table", 0, 16], ["table", 1, 0], ["mul", "s0", 4]], ["copy", ["table", 1, 0], ["table", 0, 0], "s1"]],
        [1000, 2000],
        [5, 0],
    )
    assert calls == [("copy", 2000, 1016, 20, 77)]


def test_no_programs_no_launch(calls: list[Any]) -> None:
    step = ["launch", "k", [["table", 0, 0], ["table", 1, 0]]]
    run([step], [1000, 2000], [5, 0])
    assert calls == []


def test_sizes_are_measured_anew_for_new_symbols(calls: list[Any]) -> None:
    function = cuda.CudaFunction(library(), [["launch", "k", [["table", 0, "s0"], ["table", 0, 0]]]])
    table = (ctypes.c_uint64 * 1)(4096)
    for s0, s1 in ((16, 64), (32, 65), (16, 64)):
        symbols = (ctypes.c_int64 * 2)(s0, s1)
        function(ctypes.addressof(table), ctypes.addressof(symbols))
    assert [(c[2][0], c[6][0], c[6][2]) for c in calls] == [(3, 4112, 64), (6, 4128, 65), (3, 4112, 64)]


def test_an_earlier_error_is_reported_before_anything_is_launched(calls: list[Any]) -> None:
    lib = library()
    lib.take_error = lambda: 1
    assert run([["launch", "k", [["table", 0, 0], ["table", 0, 0]]]], [1000], [1, 1], lib) == 1
    assert calls == []


def test_too_few_parameters_are_an_error() -> None:
    lib = library()
    lib.program = {**PROGRAM, "kernels": {"k": {**PROGRAM["kernels"]["k"], "parameters": 3}}}  # type: ignore[dict-item]
    with pytest.raises(ArtifactError, match="parameters"):
        cuda.CudaFunction(lib, [["launch", "k", [["table", 0, 0], ["table", 0, 0]]]])
