"""Native host functions, against a driver that only writes down what it is asked."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import threading
from typing import Any

import pytest
from aicc.backends.triton.host import Copy, Launch, MatMul, Place, Program, Step, Wait
from aicc.backends.triton.native import MISALIGNED, emit_native
from aicc.ir import Operation, sym
from aicc.ir.core import Block, IRError, Region
from aicc.ir.expr import Dim, ceildiv
from aicc.ir.expr_json import expr_to_json
from aicc.runtime.artifact import ArtifactError
from aicc.runtime.cuda import CudaError, CudaLibrary

from .fake_device import FakeDevice

KERNEL = {"threads": 128, "shared": 256, "parameters": 6, "symbols": ["s1"], "checks": 1, "blob": "cubin", "symbol": "k", "digest": "d"}


def kernel(*grid: Dim) -> Operation:
    block = Block()
    block.append(Operation.create("tile.yield"))
    return Operation.create("tile.kernel", (), {"sym_name": "k", "grid": grid, "symbols": ("s1",), "outputs": 1}, (), [Region([block])])


def load(steps: list[Step], device: FakeDevice, *, grid: tuple[Dim, ...] = (ceildiv(sym("s1"), 64), 3), constants: tuple[bytes, ...] = (),
         inputs: tuple[int, ...] = (), symbols: tuple[str, ...] = ("s0", "s1"), row: dict[str, Any] | None = None) -> CudaLibrary:
    """A library of one function, main_0, compiled and linked."""
    rows = {"k": {**KERNEL, **(row or {})}}
    program = Program({"k": kernel(*grid)}, {"main_0": steps}, list(constants), {"main_0": symbols}, {"main_0": inputs})
    host = emit_native(program, rows)
    data = {
        "kernels": {name: {**r, "grid": [expr_to_json(g) for g in grid]} for name, r in rows.items()},
        "constants": ["AAAA" for _ in constants],
        "functions": {"main_0": [step_json(s) for s in steps]},
        "host": {"blob": "host", "imports": list(host.imports)},
    }
    library = CudaLibrary(data, {"cubin": b"cubin", "host": host.object_code}, on=device)
    library.bind(list(symbols))
    return library


def step_json(step: Step) -> list[Any]:
    if isinstance(step, Launch):
        return ["launch", step.kernel, [p.to_json() for p in step.buffers], step.stream, step.line]
    if isinstance(step, Copy):
        return ["copy", step.source.to_json(), step.target.to_json(), expr_to_json(step.bytes), step.stream, step.line]
    if isinstance(step, Wait):
        return ["wait", step.stream]
    return ["product", {n: p.to_json() for n, p in step.places.items()}, dict(step.shape), step.stream, step.line]


def run(library: CudaLibrary, table: list[int], symbols: list[int]) -> int:
    t, s = (ctypes.c_uint64 * max(1, len(table)))(*table), (ctypes.c_int64 * max(1, len(symbols)))(*symbols)
    return library.function("main_0")(ctypes.addressof(t), ctypes.addressof(s))


def test_a_launch_has_addresses_sizes_the_error_word_and_null_scratch() -> None:
    device = FakeDevice()
    library = load([Launch("k", (Place(2, sym("s0") * 64), Place(0, 8, constant=True)))], device, constants=(b"\0\0\0",))
    assert run(library, [1000, 2000, 3000], [5, 130]) == 0
    ((kind, function, grid, threads, shared, stream, parameters),) = device.calls
    assert (kind, function, grid, threads, shared, stream) == ("launch", 100, (9, 1, 1), 128, 256, 77)
    assert parameters == [3000 + 5 * 64, library.constants[0].data_ptr() + 8, 130, device.error.data_ptr(), 0, 0]


MAP = {"buffer": 1, "type": 9, "sizes": [128, 4096], "strides": [512], "box": [64, 128], "swizzle": 3, "numbers": [4096, 128, 256, 1]}


def test_a_tensor_map_is_encoded_for_the_address_of_this_call() -> None:
    device = FakeDevice(lambda handle: 10)
    steps: list[Step] = [Launch("k", (Place(0, 0), Place(1, 64)), "f.py:1")] * 2
    library = load(steps, device, grid=(1,), row={"symbols": [], "checks": 0, "descriptors": [MAP], "parameters": 10})
    for base in (0x4000, 0x8000):
        assert run(library, [0x1000, base], [1, 1]) == 0
    assert device.maps == [(9, base + 64, [128, 4096], [512], [64, 128], [1, 1], 0, 3, 2, 0) for base in (0x4000, 0x8000)], "once per call"
    for call, base in zip(device.calls, (0x4000, 0x4000, 0x8000, 0x8000), strict=True):
        assert call[6][:7] == [0x1000, base + 64, base + 64, 4096, 128, 256, 1] and call[6][7:] == [0, 0, 0]


def test_a_tensor_map_that_the_driver_refuses_names_the_kernel() -> None:
    device = FakeDevice(lambda handle: 10)
    device.encode_result = 1
    library = load([Launch("k", (Place(0, 0), Place(1, 0)), "f.py:7")], device, grid=(1,),
                   row={"symbols": [], "checks": 0, "descriptors": [MAP], "parameters": 10})
    with pytest.raises(CudaError, match="kernel 'k'.*f.py:7.*result 1"):
        run(library, [0x1000, 0x4000], [1, 1])
    assert not device.calls


def test_launches_and_copies_run_in_order_and_empty_ones_not_at_all() -> None:
    device = FakeDevice()
    a, b = Place(0, 16), Place(1, 0)
    steps: list[Step] = [Copy(a, b, sym("s0") * 4), Launch("k", (b, a)), Copy(b, a, sym("s1")), Copy(b, a, 0), Copy(b, b, 64)]
    run(load(steps, device), [1000, 2000], [5, 0])
    assert device.calls == [("copy", 2000, 1016, 20, 77), ("copy", 2000, 2000, 64, 77)]
    device.calls.clear()
    run(load(steps, device), [1000, 2000], [0, 1])
    assert [c[0] for c in device.calls] == ["launch", "copy", "copy"]


def test_sizes_are_evaluated_anew_in_each_call() -> None:
    device = FakeDevice()
    library = load([Launch("k", (Place(0, sym("s0")), Place(0, 0)))], device)
    for s0, s1 in ((16, 64), (32, 65), (16, 64)):
        run(library, [4096], [s0, s1])
    assert [(c[2][0], c[6][0], c[6][2]) for c in device.calls] == [(3, 4112, 64), (6, 4128, 65), (3, 4112, 64)]


def test_an_earlier_error_is_reported_before_anything_is_launched_and_only_once() -> None:
    device = FakeDevice()
    library = load([Launch("k", (Place(0, 0), Place(0, 0)))], device)
    device.error[0] = 3
    assert run(library, [1000], [1, 1]) == 3
    assert device.calls == []
    assert run(library, [1000], [1, 1]) == 0
    assert len(device.calls) == 1


def test_a_failing_launch_stops_the_program_and_names_its_kernel_and_line() -> None:
    device = FakeDevice()
    step = Launch("k", (Place(0, 0), Place(0, 0)), "model.py:12")
    library = load([Copy(Place(0, 0), Place(0, 0), 4), step, step], device)
    device.fail_at, device.fail_with = 1, 719
    with pytest.raises(CudaError, match=r"kernel 'k' \(step 2 of 3 of 'main_0', from model.py:12\): result 719; a kernel that was launched earlier"):
        run(library, [1000], [1, 64])
    assert [c[0] for c in device.calls] == ["copy"]
    device.fail_at, device.count = 0, 0
    with pytest.raises(CudaError, match=r"launching a copy \(step 1 of 3"):
        run(library, [1000], [1, 64])


def test_too_large_a_grid_is_an_error_at_run_time_or_when_compiling() -> None:
    device = FakeDevice()
    library = load([Launch("k", (Place(0, 0), Place(0, 0)), "m.py:1")], device, grid=(sym("s1") * 64,))
    with pytest.raises(CudaError, match=r"from m.py:1\): the grid has more than 2147483647 programs"):
        run(library, [1000], [1, 1 << 30])
    assert device.calls == []
    with pytest.raises(IRError, match="would need"):
        load([Launch("k", (Place(0, 0), Place(0, 0)))], device, grid=(1 << 31,))


def test_a_misaligned_input_is_noticed_before_anything_is_launched() -> None:
    device = FakeDevice()
    library = load([Launch("k", (Place(0, 0), Place(1, 0)))], device, inputs=(0, 2))
    function = library.function("main_0")
    symbols = (ctypes.c_int64 * 2)(1, 64)
    for table, code in (((4096, 4100, 4112), 0), ((4096, 4096, 4104), MISALIGNED), ((4097, 4096, 4096), MISALIGNED)):
        t = (ctypes.c_uint64 * 3)(*table)
        assert function.native(ctypes.addressof(t), ctypes.addressof(symbols), 0, 0, 0, 0, function.count) == code
    assert len(device.calls) == 1


def test_the_library_context_is_current_for_the_call_alone() -> None:
    device = FakeDevice()
    library = load([Launch("k", (Place(0, 0), Place(0, 0)))], device)
    run(library, [1000], [1, 64])
    assert device.switched == []
    device.current = 6000
    run(library, [1000], [1, 64])
    assert device.switched == [5000, 6000]
    device.switched.clear()
    device.fail_at, device.fail_with, device.count = 0, 1, 0
    with pytest.raises(CudaError):
        run(library, [1000], [1, 64])
    assert device.switched == [5000, 6000], "also after a failure"
    device.current, device.fail_at = 0, -1
    device.switched.clear()
    run(library, [1000], [1, 64])
    assert device.switched == [5000], "a thread without a context keeps the library's"


def test_products_get_their_plan_operands_in_the_transposed_order_and_the_bias_of_the_call() -> None:
    device = FakeDevice()
    places = {"a": Place(0, 32), "b": Place(1, 0), "d": Place(2, 0), "bias": Place(3, 8), "workspace": Place(4, 64)}
    library = load([MatMul({"sizes": []}, **places), MatMul({"sizes": []}, Place(0, 0), Place(1, 0), Place(2, 0), Place(4, 0), c=Place(3, 0))], device)
    run(library, [1 << 12, 2 << 12, 3 << 12, 4 << 12, 5 << 12], [0, 0])
    first, second = device.calls
    handle, alpha, beta, algorithm, workspace_bytes = 1001, 1008, 1009, 1007, 1010
    assert first == ("product", [4242, (4 << 12) + 8], handle, alpha, 2 << 12, 1003, (1 << 12) + 32, 1004, beta, 3 << 12, 1005, 3 << 12, 1006,
                     algorithm, (5 << 12) + 256, workspace_bytes, 77), "temporary memory is aligned"
    assert second[1] == [4243, 0] and second[9:11] == (4 << 12, 1005) and second[14] == 5 << 12


def test_several_threads_may_run_one_function() -> None:
    device = FakeDevice()
    library = load([Launch("k", (Place(0, 0), Place(1, sym("s0"))))] * 5, device)
    function = library.function("main_0")

    def work(n: int) -> None:
        table, symbols = (ctypes.c_uint64 * 2)(16 * n, 1 << 20), (ctypes.c_int64 * 2)(n, 64 * n)
        for _ in range(40):
            assert function(ctypes.addressof(table), ctypes.addressof(symbols)) == 0
    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 5)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(device.calls) == 4 * 40 * 5
    for _, _, grid, _, _, _, parameters in device.calls:
        n = parameters[0] // 16
        assert parameters[1:3] == [(1 << 20) + n, 64 * n] and grid == (3 * n, 1, 1)


def two_streams() -> list[Step]:
    k = Launch("k", (Place(0, 0), Place(1, 0)))
    return [k, Wait(1), k, dataclasses.replace(k, stream=1), Wait(0), k]


def test_programmatic_launches_begin_early_but_not_after_a_wait() -> None:
    device = FakeDevice()
    library = load(two_streams(), device, row={"dependent": True})
    run(library, [16, 32], [0, 64])
    launches = [c for c in device.calls if c[0] == "launch"]
    assert [c[5] for c in launches] == [77, 77, 1001, 77] and device.early == [True, True, False, False]
    assert all(c[1:5] == (100, (3, 1, 1), 128, 256) for c in launches) and launches[0][6][:3] == [16, 32, 64]


def test_what_reads_weights_before_it_waits_begins_early_only_behind_our_kernels() -> None:
    """Nothing says that what a copy, a library or the caller launched has waited for what was before it."""
    k, copy = Launch("k", (Place(0, 0), Place(1, 0))), Copy(Place(0, 0), Place(1, 0), 64)
    device = FakeDevice()
    run(load([k, k, copy, k, k], device, row={"dependent": True, "early": True}), [16, 32], [0, 64])
    assert device.early == [False, True, False, True]


def streams_of(device: FakeDevice) -> list[Any]:
    """What was asked, by stream."""
    return [("launch", c[5]) if c[0] == "launch" else c for c in device.calls]


def test_steps_of_the_second_stream_run_between_events() -> None:
    device = FakeDevice()
    library = load(two_streams(), device)
    for _ in range(2):
        device.calls.clear()
        assert run(library, [16, 32], [0, 64]) == 0
        assert streams_of(device) == [("launch", 77), ("record", 2001, 77), ("wait", 1001, 2001), ("launch", 77), ("launch", 1001),
                                      ("record", 2001, 1001), ("wait", 77, 2001), ("launch", 77)]
    assert device.sides == 1, "calls one after the other share a stream"


def test_within_a_capture_of_the_user_there_is_one_stream() -> None:
    device = FakeDevice()
    library = load(two_streams(), device)
    device.user_captures = True
    run(library, [16, 32], [0, 64])
    assert streams_of(device) == [("launch", 77)] * 4


def test_a_failure_on_two_streams_leaves_the_caller_s_waiting_for_the_other() -> None:
    device = FakeDevice()
    library = load(two_streams(), device)
    device.fail_at, device.fail_with = 4, 9
    with pytest.raises(CudaError, match=r"launching kernel 'k' \(step 4 of 6"):
        run(library, [16, 32], [0, 64])
    assert streams_of(device)[-2:] == [("record", 2001, 1001), ("wait", 77, 2001)]
    device.count, device.fail_at = 0, 1
    with pytest.raises(CudaError, match=r"letting one stream wait for the other \(step 2 of 6 of 'main_0'\): result 9"):
        run(library, [16, 32], [0, 64])


def test_calls_of_several_threads_have_streams_and_events_of_their_own() -> None:
    device = FakeDevice()
    library = load(two_streams(), device)
    function = library.function("main_0")
    at_once = threading.Barrier(3)
    native = function.native

    def together(*args: int) -> int:
        at_once.wait()
        return native(*args)
    function.native = together
    table, symbols = (ctypes.c_uint64 * 2)(16, 32), (ctypes.c_int64 * 2)(0, 64)
    threads = [threading.Thread(target=function, args=(ctypes.addressof(table), ctypes.addressof(symbols))) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    del t, threads
    assert device.sides == 3
    used: dict[int, set[int]] = {}
    for call in device.calls:
        if call[0] == "wait":
            used.setdefault(call[2], set()).add(call[1])
    assert used == {2000 + n: {1000 + n, 77} for n in (1, 2, 3)}
    del function, library
    gc.collect()
    assert sorted(device.sides_destroyed) == [(1000 + n, 2000 + n) for n in (1, 2, 3)]


def test_kernels_that_do_not_fit_and_missing_parts_are_errors() -> None:
    device = FakeDevice()
    with pytest.raises(IRError, match="takes 3 parameters, not 4"):
        load([Launch("k", (Place(0, 0), Place(0, 0)))], device, row={"parameters": 3})
    library = load([Launch("k", (Place(0, 0), Place(0, 0)))], device)
    with pytest.raises(ArtifactError, match="no function 'other'"):
        library.function("other")
    with pytest.raises(ArtifactError, match="lacks the cubin"):
        CudaLibrary(library.program, {}, on=device)
    assert device.loaded == [b"cubin"], "equal cubins are loaded once"
