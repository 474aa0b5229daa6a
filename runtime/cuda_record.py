"""CUDA graphs of programs that call ATen operators between their launches.

    record = Record(name, on, leaves, walk)       # `refusal(manifest)` says why a program has none
    ran = record(tensors, sizes, buffers)         # in the place of the program's steps; False: they are still to be run

Operators allocate and hide the addresses that they use, so the whole program is recorded as it runs, once for each combination of the addresses
of arguments and outputs: torch's allocator gives the same few in turn, in a training loop above all. What operators make lies in memory that
belongs to the recordings, the same at every replay; what of it leaves the program is copied into tensors of its own, so that a call means what
it means without. Random numbers of operators come from torch's generator, which the device keeps for recordings.

The first call for new sizes runs as usual (libraries load and choose kernels, which a recording forbids), the second one records. Up to LIMIT
recordings are kept, the one used longest ago makes room. When they are not used again, or recording fails, the program goes on without and a
warning says why.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .cuda import Device
from .cuda_driver import CudaError
from .cuda_replay import graph_memory

__all__ = ["Record", "refusal"]

LIMIT = 8
"""Recordings kept per program."""
PATIENCE = 4 * LIMIT
"""Recordings without reuse after which the program goes on without."""

RECORDABLE = frozenset(f"aten.{name}.default" for name in (
    "convolution", "convolution_backward", "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward"))
"""Operators that neither wait for the device nor do anything on the host that a replay would miss, as was seen on one."""


def refusal(manifest: Mapping[str, Any]) -> str:
    """Why the program cannot be recorded, or nothing."""
    for kind, value in manifest["steps"]:
        if kind == "extern" and (value["target"] not in RECORDABLE or value["defines"]):
            return f"it calls {value['target']}, which is not compiled and may wait for the device"
        if kind == "allocate":
            return "sizes of its results depend on data"
    if manifest["persistent"] or any(row["kind"] == "item" for row in manifest["results"]):
        return "its results are read by the host"
    return ""


class _Recording:
    """A recorded program: `replay()` runs it on the current stream and leaves what operators made for the caller in `made`."""

    def __init__(self, replay: Callable[[], None], made: list[torch.Tensor]):
        self.replay, self.made = replay, made
        self.packed = [_packed(t) for t in made]

    def run(self) -> list[torch.Tensor]:
        """Replays, and gives copies of what operators made. All memory is there before anything runs."""
        fresh = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in self.packed]
        self.replay()
        if fresh:
            torch._foreach_copy_(fresh, self.packed)
        return [f if f.shape == t.shape else f.expand(t.shape) for f, t in zip(fresh, self.made, strict=True)]


def _packed(t: torch.Tensor) -> torch.Tensor:
    """`t` with one element along each dimension that is expanded."""
    for d, stride in enumerate(t.stride()):
        if stride == 0 and t.shape[d] > 1:
            t = t.narrow(d, 0, 1)
    return t


class Record:
    """See the module docstring. `captures` and `launches` count."""

    def __init__(self, name: str, on: Device, leaves: Sequence[int], walk: Callable[..., tuple[int, Any]]):
        """`leaves`: the buffers made by operators that leave the program; `walk(tensors, buffers, sizes, arena)` runs its steps."""
        self.name, self.on, self._leaves, self._walk = name, on, leaves, walk
        self.captures = self.launches = 0
        self.off = ""  # why recordings are not used any more
        self._kept: dict[Any, _Recording] = {}  # the one used last is the last
        self._warm: set[Any] = set()
        self._lock = threading.Lock()

    def __call__(self, tensors: Sequence[torch.Tensor], sizes: Any, buffers: list[Any]) -> bool:
        """Runs the program and fills in the buffers that operators make; False if the caller is to run it step by step."""
        stream = self.on.stream()
        if self.off or self.on.capturing():  # into a graph of the user's: its addresses are the user's business
            return False
        if (sizes.values, stream) not in self._warm:
            self._warm.add((sizes.values, stream))
            return False
        arena = graph_memory().block(self.on.device, stream, sizes.arena) if sizes.arena else None
        given = [*tensors, *[b for b in buffers if b is not None], *([] if arena is None else [arena])]
        key = (sizes.values, stream, *map(torch.Tensor.data_ptr, given))
        with self._lock:
            found = self._kept.pop(key, None)
            if found is None:
                found = self._recorded(tensors, sizes, buffers, arena, stream)
            if found is None:
                return False
            self._kept[key] = found
            if len(self._kept) > LIMIT:
                del self._kept[next(iter(self._kept))]
            for i, t in zip(self._leaves, found.run(), strict=True):
                buffers[i] = t
            self.launches += 1
        return True

    def _recorded(self, tensors: Sequence[torch.Tensor], sizes: Any, buffers: list[Any], arena: torch.Tensor | None,
                  stream: int) -> _Recording | None:
        if self.captures >= PATIENCE and self.launches < 4 * self.captures:
            self._give_up(f"{self.captures} recordings for {self.launches} replays; addresses of its arguments or outputs keep changing")
            return None

        def run() -> list[torch.Tensor]:
            given = list(buffers)
            code, _ = self._walk(tensors, given, sizes, arena)
            if code:
                raise CudaError("a check in a kernel failed")
            return [given[i] for i in self._leaves]

        try:
            replay, made = self.on.record(run, stream)
        except (CudaError, RuntimeError) as error:
            self._give_up(str(error).strip().splitlines()[0])
            return None
        self.captures += 1
        return _Recording(replay, made)

    def _give_up(self, reason: str) -> None:
        self.off = reason
        self._kept.clear()
        warnings.warn(f"'{self.name}' goes on without CUDA graphs: {reason}", RuntimeWarning, stacklevel=5)
