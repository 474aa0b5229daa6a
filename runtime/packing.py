"""Memory that outlives a call: parameters in another layout, made once and again when a parameter has changed.

A parameter counts as unchanged while all of these hold, compared with the time of packing:
- its data pointer is the same, and the storage it pointed into is still alive (else another tensor may have got the address);
- its version counter is the same: every in-place operation through torch raises it, those of optimizers, `load_state_dict`
  and `torch.no_grad()` included;
- the size symbols have the same values, where the packing depends on them.

- what it holds is the same: all of it up to 64 KiB, a word of every row beyond (`fingerprint.py`). That sees writes that torch does not
  count, through `p.data`, numpy views or raw pointers, to small tensors, to whole rows and to more than a few elements.

What cannot be seen: an uncounted write to a few elements of a large tensor. After such a write call `aicc.invalidate(module)`.
Inference tensors (made under `torch.inference_mode()`) have no version counter. They are packed anew in every call, with one
warning: slower, never stale. Parameters made outside of inference mode and only used inside it have a counter, and are cached.

Threads: a call takes the current `Packed` once and holds it until its native code has returned. Whoever finds it outdated makes
a new one under the lock, and writes into the old memory only if no other call still holds the old `Packed`.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .entry import Known
from .fingerprint import Fingerprint
from .huge_pages import prefer_huge_pages
from .loader import NativeFunction
from .sizes import Size, evaluate_size

__all__ = ["Packed", "PackedMemory", "PersistentBuffer", "forget_packed"]

_version: Callable[[torch.Tensor], int] = torch.Tensor._version.__get__  # type: ignore[attr-defined]
_expired = torch.UntypedStorage._expired  # type: ignore[attr-defined]


@dataclass(frozen=True)
class PersistentBuffer:
    """`pack` fills the buffer (None: that of another buffer does); `transient` ones live only while others are packed."""

    bytes: Size
    guards: tuple[int, ...]
    pack: NativeFunction | None
    transient: bool = False
    symbolic: bool = False


class Packed:
    """One consistent state of all persistent buffers. Immutable once published."""

    __slots__ = ("fingerprint", "keys", "known", "memory", "pointers", "refs", "storages", "symbols", "versions", "where")

    def __init__(self, where: Sequence[int], versions: list[object], symbols: tuple[int, ...], keys: list[object],
                 memory: list[torch.Tensor | None], refs: list[StorageWeakRef], fingerprint: Fingerprint):
        self.where = where        # addresses of all guarded arguments
        self.versions = versions  # and their version counters
        self.symbols = symbols    # symbol values, or () when no packing depends on them
        self.keys = keys          # the same per buffer
        self.memory = memory
        self.refs = refs          # weak references: they keep the storage's identity, not its data
        self.storages = [r.cdata for r in refs]
        self.fingerprint = fingerprint
        self.pointers = [0 if m is None else m.data_ptr() for m in memory]
        self.known: Known | None = None  # the same for native code (`entry.py`)

    def is_current(self, pointers: Sequence[int], versions: list[object], symbols: tuple[int, ...]) -> bool:
        return (self.versions == versions and self.where == pointers and self.symbols == symbols
                and not any(map(_expired, self.storages)) and self.fingerprint.unchanged())


class PackedMemory:
    """The persistent buffers of a graph."""

    def __init__(self, buffers: Sequence[PersistentBuffer], table_size: int, first_slot: int, device: torch.device | str = "cpu"):
        self.buffers = tuple(buffers)
        self.guards = tuple(sorted({g for b in buffers for g in b.guards}))
        self.symbolic = any(b.symbolic for b in buffers)
        self.packs = 0  # how many times native packing code ran
        self._pick: Callable[[Sequence[Any]], Sequence[Any]] = (
            itemgetter(*self.guards) if len(self.guards) > 1 else lambda values: [values[g] for g in self.guards])
        self._place = {g: i for i, g in enumerate(self.guards)}
        self._table_size = table_size
        self._first_slot = first_slot
        self._device = torch.device(device)
        self._lock = threading.Lock()
        self.current: Packed | None = None
        self._strides: list[tuple[int, ...]] | None = None
        self._warned = False
        _live.add(self)

    @property
    def bytes(self) -> int:
        """Bytes held at present."""
        packed = self.current
        return 0 if packed is None else sum(m.nbytes for m in packed.memory if m is not None)

    def reads(self, storages: set[int]) -> bool:
        """Whether what is packed now was made from one of these storages (addresses of their C++ objects)."""
        packed = self.current
        return packed is not None and not storages.isdisjoint(packed.storages)

    def invalidate(self) -> None:
        """Forgets everything; the next call packs anew."""
        with self._lock:
            self.current = None

    def get(self, tensors: Sequence[torch.Tensor], pointers: Sequence[int], symbols: tuple[int, ...],
            symbol_address: int) -> Packed:
        """The buffers for these arguments, packed now if need be.

        `tensors` and `pointers` are all tensor arguments and their addresses, `symbols` the symbol values, also at
        `symbol_address`. Hold the result until the native code that uses it has returned. IndexError if packing code reports an
        error.
        """
        guarded, where = self._pick(tensors), self._pick(pointers)
        if not self.symbolic:
            symbols = ()
        try:
            versions: list[object] = [*map(_version, guarded)]
        except RuntimeError:  # inference tensors: a new object equals nothing that was remembered
            versions = [object() if t.is_inference() else t._version for t in guarded]
            self._warn_uncounted()
        packed = self.current
        if packed is not None and packed.is_current(where, versions, symbols):
            return packed
        del packed  # `_renew` counts who holds it
        with self._lock:
            packed = self.current
            if packed is None or not packed.is_current(where, versions, symbols):
                del packed
                packed = self._renew(guarded, where, versions, symbols, pointers, symbol_address)
        return packed

    def _forget_if_dead(self) -> None:
        """Drops what was packed from parameters that are gone: Dynamo keeps the graphs of modules that are not there any more."""
        packed = self.current
        if packed is not None and any(map(_expired, packed.storages)):
            self.current = None  # without the lock: a call that renews meanwhile publishes its own

    def _renew(self, guarded: Sequence[torch.Tensor], where: Sequence[int], versions: list[object], symbols: tuple[int, ...],
               pointers: Sequence[int], symbol_address: int) -> Packed:
        self._check_strides(guarded)
        old, self.current = self.current, None  # from here on no other call can take `old`
        unused = old is not None and sys.getrefcount(old) == 2  # `old` and the argument of getrefcount
        for other in list(_live):
            if other is not self:
                other._forget_if_dead()
        refs = [StorageWeakRef(t.untyped_storage()) for t in guarded]
        fingerprint = Fingerprint(guarded)  # before packing, so that a later write is seen
        values = list((ctypes.c_int64 * len(symbols)).from_address(symbol_address)) if self.symbolic else []
        keys: list[object] = []
        memory: list[torch.Tensor | None] = []
        stale: list[int] = []
        for i, b in enumerate(self.buffers):
            places = [self._place[g] for g in b.guards]
            key = (tuple((where[p], versions[p], fingerprint.each[p]) for p in places), symbols if b.symbolic else ())
            keys.append(key)
            same = old is not None and old.keys[i] == key and not any(_expired(old.storages[p]) for p in places)
            if same and not b.transient:
                memory.append(old.memory[i])  # type: ignore[union-attr]
                continue
            stale.append(i)
            size = evaluate_size(b.bytes, values)
            previous = old.memory[i] if old is not None and unused else None
            # held by `old.memory`, `previous` and the argument: an even older state that a call still holds would be a fourth
            reusable = previous is not None and previous.nbytes == size and sys.getrefcount(previous) == 3
            memory.append(previous if reusable else self._allocate(size))
        if stale and all(self.buffers[i].transient for i in stale):
            stale = []  # nobody needs them
        self._pack(stale, memory, pointers, symbol_address)
        lasting = [None if b.transient else m for b, m in zip(self.buffers, memory, strict=True)]
        self.current = packed = Packed(where, versions, symbols, keys, lasting, refs, fingerprint)
        return packed

    def _check_strides(self, guarded: Sequence[torch.Tensor]) -> None:
        """ValueError where a parameter lies otherwise than when the graph was compiled: `p.data = other` is no change to Dynamo before torch 2.13."""
        strides = [tuple(0 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)) for t in guarded]
        if self._strides is None:
            self._strides = strides
        elif strides != self._strides and not self.symbolic:
            i = next(i for i, (a, b) in enumerate(zip(strides, self._strides, strict=True)) if a != b)
            raise ValueError(f"a parameter of shape {tuple(guarded[i].shape)} has strides {guarded[i].stride()} now, and the graph was compiled for "
                             f"{self._strides[i]}; this torch did not notice. Call torch._dynamo.reset(), or assign data that lies as the old did")

    def _allocate(self, size: int) -> torch.Tensor:
        memory = torch.empty(size, dtype=torch.uint8, device=self._device)
        if self._device.type == "cpu":
            prefer_huge_pages(memory.data_ptr(), size)
        return memory

    def _pack(self, stale: Sequence[int], memory: Sequence[torch.Tensor | None], pointers: Sequence[int],
              symbol_address: int) -> None:
        table = (ctypes.c_uint64 * self._table_size)()
        table[:len(pointers)] = list(pointers)
        for i, m in enumerate(memory):
            table[self._first_slot + i] = 0 if m is None else m.data_ptr()
        for i in stale:
            pack = self.buffers[i].pack
            if pack is not None:
                self.packs += 1
                code = pack(ctypes.addressof(table), symbol_address)
                if code:
                    raise IndexError(f"index out of range while parameters were prepared (code {code})")

    def _warn_uncounted(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn("aicc: a parameter was made under torch.inference_mode() and has no version counter, so it is packed "
                          "anew in every call; make the model outside of inference mode", RuntimeWarning, stacklevel=4)



_live: weakref.WeakSet[PackedMemory] = weakref.WeakSet()
"""What graphs hold at present, for `forget_packed`."""


def forget_packed(tensors: Iterable[torch.Tensor] | None = None) -> int:
    """Forgets what was packed from these tensors, or everything; how many graphs will pack anew."""
    storages = None if tensors is None else {t.untyped_storage()._cdata for t in tensors}
    stale = [m for m in list(_live) if m.bytes and (storages is None or m.reads(storages))]
    for memory in stale:
        memory.invalidate()
    return len(stale)
