"""Where torch and Python keep what a call looks at: found by looking at tensors whose contents are known, never assumed.

    layout = tensor_layout()          # None where something is not as expected: then nobody reads objects natively
    layout.implementation             # offset, in a Python tensor, of the pointer to its C++ object

Offsets are bytes. They are the same for all tensors of a process, and differ between versions of torch.
"""

from __future__ import annotations

import ctypes
import platform
import struct
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

__all__ = ["TensorLayout", "tensor_layout"]

_SEEN = 96
"""Bytes of a tensor's C++ object that are looked at; it has twice as many."""
_COUNTER = 16
"""Of a version counter's object: behind the table of virtual functions and the count of references, as `_follows` makes sure."""


@dataclass(frozen=True)
class TensorLayout:
    """Offsets in objects, and the address of torch's C function `int32 aoti_torch_get_data_ptr(tensor, void **)`."""

    implementation: int
    storage: int
    """In the C++ tensor: the pointer to its storage."""
    counter: int
    """In the C++ tensor: the pointer to its version counter, null for tensors of inference mode."""
    version: int
    """In the counter: 32 bits."""
    items: int
    """In a list: the pointer to its items. In a tuple the items themselves are there."""
    data_ptr: int


@cache
def tensor_layout() -> TensorLayout | None:
    """The layout in this process."""
    if platform.python_implementation() != "CPython" or sysconfig.get_config_var("Py_GIL_DISABLED") or struct.calcsize("P") != 8:
        return None
    data_ptr = _exported("aoti_torch_get_data_ptr")
    with torch.inference_mode(False), torch.no_grad():
        parameter, plain = torch.nn.Parameter(torch.zeros(5, 3)), torch.ones(7, dtype=torch.int64)
        view, apart = parameter.detach()[1:], parameter.data
        with torch.inference_mode():
            uncounted = torch.zeros(3)
        tensors = [parameter, plain, view, apart, uncounted]
        python = [_words(id(t), type(t).__basicsize__) for t in tensors]
        implementation = _only([all(w[i] == t._cdata for w, t in zip(python, tensors, strict=True)) for i in range(min(map(len, python)))])
        native = [_words(t._cdata, _SEEN) for t in tensors]
        storage = _only([all(w[i] == t.untyped_storage()._cdata for w, t in zip(native, tensors, strict=True)) for i in range(_SEEN // 8)])
        of_parameter, of_plain, of_view, of_apart, of_uncounted = native
        # A view counts together with its base, `data` by itself, and nobody counts in inference mode.
        counter = _only([of_parameter[i] == of_view[i] != of_apart[i] and of_plain[i] not in (0, of_parameter[i], of_apart[i])
                         and of_apart[i] != 0 and of_uncounted[i] == 0 for i in range(_SEEN // 8)])
        items = _items()
        if None in (data_ptr, implementation, storage, counter, items) or not _follows(plain, of_plain[counter // 8]):  # type: ignore[operator]
            return None
    return TensorLayout(implementation, storage, counter, _COUNTER, items, data_ptr)  # type: ignore[arg-type]


def _words(address: int, size: int) -> Sequence[int]:
    return struct.unpack(f"{size // 8}Q", ctypes.string_at(address, size // 8 * 8))


def _only(found: Sequence[bool]) -> int | None:
    """The offset of the word that is as wanted, if there is one only."""
    return 8 * found.index(True) if sum(found) == 1 else None


def _follows(t: torch.Tensor, counter: int) -> bool:
    """Whether the counter at this address has the tensor's version, now and after writes."""
    for _ in range(3):
        if ctypes.c_uint32.from_address(counter + _COUNTER).value != t._version:
            return False
        t.add_(1)
    return True


def _items() -> int | None:
    """A list points to where a tuple has its items."""
    pair = (object(), object())
    made = [*pair]
    of_tuple, of_list = _words(id(pair), pair.__sizeof__()), _words(id(made), [].__sizeof__())
    at = next((i for i in range(len(of_tuple) - 1) if of_tuple[i:i + 2] == (id(pair[0]), id(pair[1]))), None)
    if at is None or at >= len(of_list):
        return None
    # Both have their length in front.
    same = of_tuple[at - 1] == of_list[at - 1] == 2 and _words(of_list[at], 16) == (id(pair[0]), id(pair[1]))
    return 8 * at if same else None


def _exported(name: str) -> int | None:
    """The address of a function of torch's library."""
    for path in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        try:
            return ctypes.cast(getattr(ctypes.CDLL(str(path)), name), ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None
