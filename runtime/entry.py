"""The way into a program that is one native call, itself native: a Python function whose body is machine code.

    entry = Entry(main, positions, count, outputs, persistent)       # None from `make_entry` where objects can't be read (`tensor_layout.py`)
    known = entry.known(packed...)                                   # what the parameters were when they were packed
    code = entry.call(known.address, args, buffers, arena, symbols)  # `main`'s code, or `NOT_AS_KNOWN`

One pass over the arguments takes the place of some ten Python operations per parameter: it reads addresses, compares those of packed parameters,
their storages, version counters and contents (`fingerprint.py`) with what is known, writes the table of addresses on the stack and calls `main`
without the interpreter's lock. Objects are read in three rounds (arguments, then their tensors, then storages), so that a processor has many
of them on the way from memory at once: behind the kernels of a large model none is in the caches.

`NOT_AS_KNOWN` says that nothing was done, for any reason: other parameters, arguments that are no plain tensors or have no memory, a wrong number of
them. Python code then does the same slowly, and finds out why.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from llvmlite import binding

from .fingerprint import Fingerprint, look_address
from .loader import NativeFunction, NativeLibrary, initialize, load_object
from .tensor_layout import TensorLayout, tensor_layout

__all__ = ["NOT_AS_KNOWN", "Entry", "Known", "make_entry"]

NOT_AS_KNOWN = -1
_FIELDS = ("main", "count", "inputs", "positions", "outputs", "persistent", "copies", "guards", "guarded", "parts", "part_count", "memory")
"""Of the block of int64 that native code is given: `count` arguments, of which `inputs` tensors at `positions`; `outputs` buffers; addresses of
`persistent` packed copies; `guards` rows of `guarded` (input, address, version, storage); and the parts of a fingerprint, with its memory."""
_PYTHON = ("PyLong_AsVoidPtr", "PyLong_FromLong", "PyEval_SaveThread", "PyEval_RestoreThread")


def _loop(name: str, count: str, body: str, after: str) -> str:
    """`body` for %NAME from 0 to `count`; it must end in the block it starts in, or branch to `NAME.next`."""
    return f"""
  br label %{name}.head
{name}.head:
  %{name} = phi i64 [ 0, %{name}.entry ], [ %{name}.more, %{name}.next ]
  %{name}.ends = icmp uge i64 %{name}, {count}
  br i1 %{name}.ends, label %{after}, label %{name}.body
{name}.body:{body}
  br label %{name}.next
{name}.next:
  %{name}.more = add i64 %{name}, 1
  br label %{name}.head
"""


def _ir(layout: TensorLayout, tensor_types: Sequence[int], list_type: int) -> str:
    """`ptr enter(ptr self, ptr given, i64 n)`, a METH_FASTCALL function of (address of the block, arguments, buffers, arena or None, symbols)."""
    is_tensor = "\n".join(f"  %is{i} = icmp eq ptr %type, inttoptr (i64 {t} to ptr)" for i, t in enumerate(tensor_types))
    either = "\n".join(f"  %any{i} = or i1 {'%any' + str(i - 1) if i > 1 else '%is0'}, %is{i}" for i in range(1, len(tensor_types)))
    last = f"%any{len(tensor_types) - 1}" if len(tensor_types) > 1 else "%is0"
    fields = "\n".join(f"  %{n}.at = getelementptr i64, ptr %block, i64 {i}\n  %{n} = load i64, ptr %{n}.at" for i, n in enumerate(_FIELDS))
    pointers = "\n".join(f"  %{n}.base = inttoptr i64 %{n} to ptr" for n in ("positions", "copies", "guarded", "parts", "memory", "main"))
    gather = _loop("i", "%inputs", f"""
  %position.at = getelementptr i64, ptr %positions.base, i64 %i
  %position = load i64, ptr %position.at
  %object.at = getelementptr ptr, ptr %args, i64 %position
  %object = load ptr, ptr %object.at
  %fine = call i1 @is_tensor(ptr %object)
  %cell = getelementptr i8, ptr %object, i64 {layout.implementation}
  %cell.at = getelementptr ptr, ptr %cells, i64 %i
  store ptr %cell, ptr %cell.at
  br i1 %fine, label %i.fine, label %no
i.fine:
  %tensor = load ptr, ptr %cell
  call void @llvm.prefetch.p0(ptr %tensor, i32 0, i32 3, i32 1)
  %tensor.rest = getelementptr i8, ptr %tensor, i64 64
  call void @llvm.prefetch.p0(ptr %tensor.rest, i32 0, i32 3, i32 1)""", "j.entry")
    reach = _loop("j", "%inputs", f"""
  %j.cell.at = getelementptr ptr, ptr %cells, i64 %j
  %j.cell = load ptr, ptr %j.cell.at
  %j.tensor = load ptr, ptr %j.cell
  %j.storage.at = getelementptr i8, ptr %j.tensor, i64 {layout.storage}
  %j.storage = load ptr, ptr %j.storage.at
  %j.counter.at = getelementptr i8, ptr %j.tensor, i64 {layout.counter}
  %j.counter = load ptr, ptr %j.counter.at
  call void @llvm.prefetch.p0(ptr %j.storage, i32 0, i32 3, i32 1)
  call void @llvm.prefetch.p0(ptr %j.counter, i32 0, i32 3, i32 1)""", "k.entry")
    address = _loop("k", "%inputs", f"""
  %k.cell.at = getelementptr ptr, ptr %cells, i64 %k
  %k.cell = load ptr, ptr %k.cell.at
  %slot = getelementptr ptr, ptr %table, i64 %k
  %failed = call i32 inttoptr (i64 {layout.data_ptr} to ptr)(ptr %k.cell, ptr %slot)
  %k.bad = icmp ne i32 %failed, 0
  br i1 %k.bad, label %no, label %k.reached
k.reached:
  %k.address = load ptr, ptr %slot
  %k.nowhere = icmp eq ptr %k.address, null
  br i1 %k.nowhere, label %no, label %k.next.jump
k.next.jump:""", "g.entry")
    guard = _loop("g", "%guards", f"""
  %row.at = mul i64 %g, 4
  %row = getelementptr i64, ptr %guarded.base, i64 %row.at
  %g.input = load i64, ptr %row
  %g.where.at = getelementptr i64, ptr %row, i64 1
  %g.where = load i64, ptr %g.where.at
  %g.version.at = getelementptr i64, ptr %row, i64 2
  %g.version = load i64, ptr %g.version.at
  %g.storage.at = getelementptr i64, ptr %row, i64 3
  %g.storage = load i64, ptr %g.storage.at
  %g.slot = getelementptr i64, ptr %table, i64 %g.input
  %g.now = load i64, ptr %g.slot
  %g.cell.at = getelementptr ptr, ptr %cells, i64 %g.input
  %g.cell = load ptr, ptr %g.cell.at
  %g.tensor = load ptr, ptr %g.cell
  %g.storage.place = getelementptr i8, ptr %g.tensor, i64 {layout.storage}
  %g.storage.now = load i64, ptr %g.storage.place
  %g.counter.place = getelementptr i8, ptr %g.tensor, i64 {layout.counter}
  %g.counter = load ptr, ptr %g.counter.place
  %g.moved = icmp ne i64 %g.where, %g.now
  %g.other = icmp ne i64 %g.storage, %g.storage.now
  %g.uncounted = icmp eq ptr %g.counter, null
  %g.bad0 = or i1 %g.moved, %g.other
  %g.bad1 = or i1 %g.bad0, %g.uncounted
  br i1 %g.bad1, label %no, label %g.counted
g.counted:
  %g.counts.at = getelementptr i8, ptr %g.counter, i64 {layout.version}
  %g.counts = load i32, ptr %g.counts.at
  %g.counts.wide = zext i32 %g.counts to i64
  %g.written = icmp ne i64 %g.counts.wide, %g.version
  br i1 %g.written, label %no, label %g.next.jump
g.next.jump:""", "o.entry")
    made = _loop("o", "%outputs", """
  %o.object.at = getelementptr ptr, ptr %made, i64 %o
  %o.object = load ptr, ptr %o.object.at
  %o.number = add i64 %inputs, %o
  %o.slot = getelementptr ptr, ptr %table, i64 %o.number
  %o.fine = call i1 @address(ptr %o.object, ptr %o.slot)
  br i1 %o.fine, label %o.next.jump, label %no
o.next.jump:""", "p.entry")
    copies = _loop("p", "%persistent", """
  %p.from = getelementptr i64, ptr %copies.base, i64 %p
  %p.value = load i64, ptr %p.from
  %p.number = add i64 %before, %p
  %p.slot = getelementptr i64, ptr %table, i64 %p.number
  store i64 %p.value, ptr %p.slot""", "last")
    return f"""
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
declare ptr @PyLong_AsVoidPtr(ptr)
declare ptr @PyLong_FromLong(i64)
declare ptr @PyEval_SaveThread()
declare void @PyEval_RestoreThread(ptr)
declare i64 @look(ptr, i64, ptr)

define internal i1 @is_tensor(ptr %object) alwaysinline {{
  %type.at = getelementptr i8, ptr %object, i64 8
  %type = load ptr, ptr %type.at
{is_tensor}
{either}
  ret i1 {last}
}}

define internal i1 @address(ptr %object, ptr %slot) alwaysinline {{
entry:
  %fine = call i1 @is_tensor(ptr %object)
  br i1 %fine, label %tensor, label %no
tensor:
  %cell = getelementptr i8, ptr %object, i64 {layout.implementation}
  %failed = call i32 inttoptr (i64 {layout.data_ptr} to ptr)(ptr %cell, ptr %slot)
  %well = icmp eq i32 %failed, 0
  ret i1 %well
no:
  ret i1 false
}}

define internal ptr @items(ptr %object) alwaysinline {{
entry:
  %type.at = getelementptr i8, ptr %object, i64 8
  %type = load ptr, ptr %type.at
  %is_list = icmp eq ptr %type, inttoptr (i64 {list_type} to ptr)
  %within = getelementptr i8, ptr %object, i64 {layout.items}
  br i1 %is_list, label %list, label %tuple
list:
  %apart = load ptr, ptr %within
  ret ptr %apart
tuple:
  ret ptr %within
}}

define ptr @enter(ptr %self, ptr %given, i64 %n) {{
entry:
  %block.object = load ptr, ptr %given
  %args.at = getelementptr ptr, ptr %given, i64 1
  %args.object = load ptr, ptr %args.at
  %made.at = getelementptr ptr, ptr %given, i64 2
  %made.object = load ptr, ptr %made.at
  %arena.at = getelementptr ptr, ptr %given, i64 3
  %arena.object = load ptr, ptr %arena.at
  %symbols.at = getelementptr ptr, ptr %given, i64 4
  %symbols.object = load ptr, ptr %symbols.at
  %block = call ptr @PyLong_AsVoidPtr(ptr %block.object)
  %symbols = call ptr @PyLong_AsVoidPtr(ptr %symbols.object)
{fields}
{pointers}
  %length.at = getelementptr i8, ptr %args.object, i64 {layout.items - 8}
  %length = load i64, ptr %length.at
  %right = icmp eq i64 %length, %count
  br i1 %right, label %start, label %no
start:
  %args = call ptr @items(ptr %args.object)
  %made = call ptr @items(ptr %made.object)
  %before = add i64 %inputs, %outputs
  %arena.slot = add i64 %before, %persistent
  %slots = add i64 %arena.slot, 1
  %table = alloca ptr, i64 %slots, align 16
  %cells = alloca ptr, i64 %slots, align 16
  br label %i.entry
i.entry:{gather}
j.entry:{reach}
k.entry:{address}
g.entry:{guard}
o.entry:{made}
p.entry:{copies}
last:
  %arena.place = getelementptr ptr, ptr %table, i64 %arena.slot
  store ptr null, ptr %arena.place
  %has_arena = call i1 @is_tensor(ptr %arena.object)
  br i1 %has_arena, label %with_arena, label %go
with_arena:
  %arena.fine = call i1 @address(ptr %arena.object, ptr %arena.place)
  br i1 %arena.fine, label %go, label %no
go:
  %thread = call ptr @PyEval_SaveThread()
  %no_part = icmp eq i64 %part_count, 0
  br i1 %no_part, label %as_known, label %looking
looking:
  %changed = call i64 @look(ptr %parts.base, i64 %part_count, ptr %memory.base)
  %same = icmp eq i64 %changed, 0
  br i1 %same, label %as_known, label %back
back:
  call void @PyEval_RestoreThread(ptr %thread)
  br label %no
as_known:
  %code = call i32 %main.base(ptr %table, ptr %symbols)
  call void @PyEval_RestoreThread(ptr %thread)
  %code.wide = sext i32 %code to i64
  %result = call ptr @PyLong_FromLong(i64 %code.wide)
  ret ptr %result
no:
  %never = call ptr @PyLong_FromLong(i64 {NOT_AS_KNOWN})
  ret ptr %never
}}
"""


class _Method(ctypes.Structure):
    """Python's PyMethodDef."""

    _fields_ = (("name", ctypes.c_char_p), ("function", ctypes.c_void_p), ("flags", ctypes.c_int), ("doc", ctypes.c_char_p))


_FASTCALL = 0x80
_METHODS: list[tuple[_Method, NativeLibrary]] = []
"""What Python functions made here point to, which nothing else would keep."""


@cache
def _enter() -> Callable[[int, Any, Any, Any, int], int] | None:
    layout = tensor_layout()
    if layout is None:
        return None
    initialize()
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=2, reloc="pic", codemodel="default")
    module = binding.parse_assembly(_ir(layout, [id(torch.Tensor), id(torch.nn.Parameter)], id(list)))
    module.triple = machine.triple
    module.data_layout = str(machine.target_data)
    imports = {name: ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value or 0 for name in _PYTHON}
    library = load_object(machine.emit_object(module), ["enter"], {**imports, "look": look_address()})
    method = _Method(b"enter", library.address("enter"), _FASTCALL, None)
    _METHODS.append((method, library))
    make = ctypes.pythonapi.PyCFunction_NewEx
    make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    function: Callable[[int, Any, Any, Any, int], int] = make(ctypes.addressof(method), None, None)
    return function


class Known:
    """A block that native code reads at `address`, as long as this object is there."""

    __slots__ = ("_kept", "address")

    def __init__(self, values: Sequence[int], *kept: Any):
        block = (ctypes.c_int64 * len(_FIELDS))(*values)
        self.address = ctypes.addressof(block)
        self._kept = (block, *kept)


class Entry:
    """See the module docstring. `positions` are those of the tensors among `count` arguments."""

    def __init__(self, call: Callable[[int, Any, Any, Any, int], int], main: NativeFunction, positions: Sequence[int], count: int, outputs: int):
        self.call = call
        self._native = main  # keeps the code
        self._main = ctypes.cast(main, ctypes.c_void_p).value or 0  # type: ignore[arg-type]
        self._count, self._outputs = count, outputs
        self._positions = (ctypes.c_int64 * len(positions))(*positions)

    def known(self, inputs: Sequence[int] = (), where: Sequence[int] = (), versions: Sequence[Any] = (), storages: Sequence[int] = (),
              copies: Sequence[int] = (), fingerprint: Fingerprint | None = None) -> Known | None:
        """What is compared, of the tensors with these numbers. None where a version is no number: those change with every call.

        The storages' memory must not be used for others while this is used (`packing.py` holds weak references).
        """
        if not all(type(v) is int for v in versions):
            return None
        rows = [n for row in zip(inputs, where, versions, storages, strict=True) for n in row]
        guarded = (ctypes.c_int64 * len(rows))(*rows)
        addresses = (ctypes.c_int64 * len(copies))(*copies)
        parts, count, team = (0, 0, 0) if fingerprint is None else fingerprint.block
        return Known([self._main, self._count, len(self._positions), ctypes.addressof(self._positions), self._outputs, len(copies),
                      ctypes.addressof(addresses), len(rows) // 4, ctypes.addressof(guarded), parts, count, team],
                     self._positions, guarded, addresses, fingerprint)


def make_entry(main: NativeFunction, positions: Sequence[int], count: int, outputs: int) -> Entry | None:
    """An entry, or None where this process's objects can't be read."""
    call = _enter()
    return None if call is None else Entry(call, main, positions, count, outputs)
