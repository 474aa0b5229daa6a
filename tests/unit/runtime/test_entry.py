"""The native entry of a program, by itself: what it lets through, what it hands back to Python."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from aicc.runtime import tensor_layout as layouts
from aicc.runtime.entry import NOT_AS_KNOWN, Entry, make_entry
from aicc.runtime.fingerprint import Fingerprint
from aicc.runtime.loader import NativeFunction, load_object
from aicc.runtime.tensor_layout import tensor_layout

# The function counts in its first output how often it ran, and fails with the code that the symbol says.
COUNTS = """
define i32 @main_0(ptr %t, ptr %s) {
  %at = getelementptr ptr, ptr %t, i64 2
  %out = load ptr, ptr %at
  %n = load i64, ptr %out
  %more = add i64 %n, 1
  store i64 %more, ptr %out
  %code = load i32, ptr %s
  ret i32 %code
}
"""
TABLE = """
define i32 @main_0(ptr %t, ptr %s) {
  %at = getelementptr ptr, ptr %t, i64 2
  %out = load ptr, ptr %at
  call void @llvm.memcpy.p0.p0.i64(ptr %out, ptr %t, i64 48, i1 false)
  ret i32 0
}
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)
"""


@pytest.fixture
def native(compile_ir: Callable[..., bytes]) -> Callable[[str], NativeFunction]:
    return lambda text: load_object(compile_ir(text), ["main_0"]).function("main_0")


def entry_of(main: NativeFunction, positions: list[int], count: int) -> Entry:
    entry = make_entry(main, positions, count, 1)
    assert entry is not None
    return entry


@pytest.mark.skipif(not sys.platform.startswith("linux") or sys.implementation.name != "cpython", reason="found on Linux with CPython")
def test_the_layout_is_found() -> None:
    assert tensor_layout() is not None


def test_the_table_holds_every_address(native: Callable[[str], NativeFunction]) -> None:
    entry = entry_of(native(TABLE), [2, 0], 3)
    a, b, out, arena = torch.ones(3)[1:], torch.nn.Parameter(torch.ones(2)), torch.zeros(6, dtype=torch.int64), torch.zeros(64, dtype=torch.uint8)
    known = entry.known(copies=[17, 19])
    assert known is not None
    expected = [b.data_ptr(), a.data_ptr(), out.data_ptr(), 17, 19]
    for args in ([a, 5, b], (a, 5, b)):
        assert entry.call(known.address, args, [out], arena, 0) == 0
        assert out.tolist() == [*expected, arena.data_ptr()]
    assert entry.call(known.address, [a, 5, b], [out], None, 0) == 0
    assert out.tolist() == [*expected, 0]


def test_codes_come_back_and_objects_are_left_as_they_were(native: Callable[[str], NativeFunction]) -> None:
    entry = entry_of(native(COUNTS), [0, 1], 2)
    known, symbols = entry.known(), (ctypes.c_int64 * 1)(7)
    x, args, out = torch.ones(3), [torch.ones(3), torch.ones(3)], torch.zeros(1, dtype=torch.int64)
    assert known is not None
    before = [sys.getrefcount(o) for o in (x, args, out, args[0])]
    for _ in range(100):
        assert entry.call(known.address, args, [out], x, ctypes.addressof(symbols)) == 7
    assert before == [sys.getrefcount(o) for o in (x, args, out, args[0])] and out.item() == 100


class Own(torch.Tensor):
    pass


@pytest.mark.parametrize("args", [
    [torch.ones(3)], [torch.ones(3)] * 3, [torch.ones(3), None], [torch.ones(3), 3], [torch.ones(3), torch.ones(3).as_subclass(Own)],
    [torch.ones(3), "text"]], ids=["few", "many", "none", "number", "subclass", "text"])
def test_unusual_arguments_are_left_to_python(native: Callable[[str], NativeFunction], args: list[Any]) -> None:
    entry = entry_of(native(COUNTS), [0, 1], 2)
    known, out = entry.known(), torch.zeros(1, dtype=torch.int64)
    assert known is not None
    assert entry.call(known.address, args, [out], None, 0) == NOT_AS_KNOWN and out.item() == 0


def _write(w: torch.Tensor) -> None:
    w.add_(1)


def _write_unseen(w: torch.Tensor) -> None:
    w.data.add_(1)


def _replace(w: torch.Tensor) -> None:
    w.data = w.data.clone()


def _free_and_replace(w: torch.Tensor) -> None:
    """The new storage may get the address of the old one."""
    shape = w.shape
    w.data = torch.empty(0)
    gc.collect()
    w.data = torch.ones(shape)


def _move(w: torch.Tensor) -> None:
    w.set_(w.untyped_storage(), 1, (2,), (1,))


def _nothing(w: torch.Tensor) -> None:
    w.detach().view(3)


@pytest.mark.parametrize("change", [_nothing, _write, _write_unseen, _replace, _free_and_replace, _move])
@torch.no_grad()
def test_every_change_of_a_parameter_is_noticed(native: Callable[[str], NativeFunction], change: Callable[[torch.Tensor], None]) -> None:
    entry = entry_of(native(COUNTS), [0, 1], 2)
    x, w, out = torch.ones(3), torch.nn.Parameter(torch.ones(3)), torch.zeros(1, dtype=torch.int64)
    symbols = (ctypes.c_int64 * 1)()
    storage = w.untyped_storage()
    reference = storage._weak_ref()
    known = entry.known([1], [w.data_ptr()], [w._version], [storage._cdata], [], Fingerprint([w]))
    del storage
    assert known is not None
    change(w)
    code = entry.call(known.address, [x, w], [out], None, ctypes.addressof(symbols))
    torch.UntypedStorage._free_weak_ref(reference)
    assert (code, out.item()) == ((0, 1) if change is _nothing else (NOT_AS_KNOWN, 0))


@torch.no_grad()
def test_a_tensor_without_a_counter_in_the_same_memory(native: Callable[[str], NativeFunction]) -> None:
    entry = entry_of(native(COUNTS), [0, 1], 2)
    x, w, out = torch.ones(3), torch.ones(3), torch.zeros(1, dtype=torch.int64)
    known = entry.known([1], [w.data_ptr()], [0], [w.untyped_storage()._cdata])
    assert known is not None
    with torch.inference_mode():
        same = torch.empty(0).set_(w.untyped_storage(), 0, (3,), (1,))
    assert same.is_inference() and same.data_ptr() == w.data_ptr()
    assert entry.call(known.address, [x, same], [out], None, 0) == NOT_AS_KNOWN
    assert entry.known([1], [same.data_ptr()], [object()], [0]) is None


def test_a_layout_that_is_not_understood_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert layouts._only([False, True, True]) is None and layouts._only([False]) is None and layouts._only([False, True]) == 8
    monkeypatch.setattr(layouts, "_exported", lambda name: None)
    assert layouts.tensor_layout.__wrapped__() is None
