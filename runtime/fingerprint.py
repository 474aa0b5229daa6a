"""A quick look at memory that should not have changed: a hash of a few elements of each tensor.

torch counts in-place writes in a tensor's version, but not those through `p.data`, numpy views or raw pointers (a soft update
`target.data.copy_(...)`, say). Sampling `SAMPLES` elements per tensor natively costs nanoseconds each and sees every write to a whole
tensor; a write to single elements that bypasses torch can still go unseen.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache

import torch
from llvmlite import binding

from .loader import NativeLibrary, initialize, load_object

__all__ = ["SAMPLES", "Samples"]

SAMPLES = 8

_IR = """
define i64 @sample(ptr %addresses, i64 %count) {
entry:
  %empty = icmp eq i64 %count, 0
  br i1 %empty, label %done, label %loop
loop:
  %i = phi i64 [ 0, %entry ], [ %next, %loop ]
  %hash = phi i64 [ 1469598103934665603, %entry ], [ %mixed, %loop ]
  %slot = getelementptr i64, ptr %addresses, i64 %i
  %address = load i64, ptr %slot
  %place = inttoptr i64 %address to ptr
  %word = load i32, ptr %place, align 1
  %wide = zext i32 %word to i64
  %xored = xor i64 %hash, %wide
  %mixed = mul i64 %xored, 1099511628211
  %next = add i64 %i, 1
  %more = icmp ult i64 %next, %count
  br i1 %more, label %loop, label %done
done:
  %result = phi i64 [ 0, %entry ], [ %mixed, %loop ]
  ret i64 %result
}
"""


@cache
def _library() -> NativeLibrary:
    initialize()
    machine = binding.Target.from_default_triple().create_target_machine(opt=2, reloc="pic", codemodel="default")
    module = binding.parse_assembly(_IR)
    module.triple = machine.triple
    module.data_layout = str(machine.target_data)
    return load_object(machine.emit_object(module), ["sample"])


@cache
def _sample() -> Callable[[int, int], int]:
    return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)(_library().address("sample"))


class Samples:
    """Addresses of elements spread over some CPU tensors; `read()` hashes what is there now. The tensors must be alive."""

    __slots__ = ("_addresses", "_at", "_count", "_function", "hash")

    def __init__(self, tensors: Sequence[torch.Tensor]):
        places = [a for t in tensors if t.device.type == "cpu" for a in _places(t)]
        self._addresses = (ctypes.c_uint64 * len(places))(*places)
        self._at = ctypes.addressof(self._addresses)
        self._count = len(places)
        self._function = _sample()
        self.hash = self.read()

    def read(self) -> int:
        return int(self._function(self._at, self._count))

    def unchanged(self) -> bool:
        return self.read() == self.hash


def _places(t: torch.Tensor) -> list[int]:
    """Addresses from which four bytes of the tensor can be read."""
    count = t.numel()
    width = t.element_size()
    span = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) * width + width if count else 0
    if span < 4:
        return []
    base = t.data_ptr()
    found = []
    for k in range(min(SAMPLES, count)):
        linear, offset = k * (count - 1) // max(1, min(SAMPLES, count) - 1), 0
        for n, s in zip(reversed(t.shape), reversed(t.stride()), strict=True):
            offset += linear % n * s
            linear //= n
        found.append(base + min(offset * width, span - 4))
    return found
