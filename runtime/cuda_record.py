"""CUDA graphs of programs that call ATen operators between their launches.

    record = Record(graph)                        # a `CudaGraph`; `refusal(manifest)` says why a program has none
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
from typing import TYPE_CHECKING, Any

import torch

from .cuda_driver import CudaError
from .cuda_replay import graph_memory
from .extern_call import copied

if TYPE_CHECKING:
    from .cuda_graph import CudaGraph

__all__ = ["Record", "refusal"]

LIMIT = 8
"""Recordings kept per program."""
PATIENCE = 4 * LIMIT
"""Recordings without reuse after which the program goes on without."""

RECORDABLE = frozenset(f"aten.{name}.default" for name in (
    "convolution", "convolution_backward", "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_efficient_attention_backward"))
"""Operators that neither wait for the device nor do anything on the host that a replay would miss."""


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
    """A recorded program: `replay()` runs it on the current stream and leaves what operators made for the caller in `made`, by buffer."""

    def __init__(self, replay: Callable[[], None], made: dict[int, torch.Tensor]):
        self.replay, self.made = replay, made

    def take(self) -> dict[int, torch.Tensor]:
        """Copies of what operators made, in tensors of their own."""
        plain = {i: t for i, t in self.made.items() if not any(s == 0 and n > 1 for n, s in zip(t.shape, t.stride(), strict=True))}
        fresh = {i: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for i, t in plain.items()}
        if fresh:
            torch._foreach_copy_(list(fresh.values()), list(plain.values()))
        return {i: fresh[i] if i in fresh else copied(t, tuple(t.shape), t.stride()) for i, t in self.made.items()}


class Record:
    """See the module docstring. `captures` and `launches` count."""

    def __init__(self, graph: CudaGraph):
        self.graph, self.on = graph, graph.cuda.on
        self.captures = self.launches = 0
        self.off = ""  # why recordings are not used any more
        early = set(graph._early)
        self._leaves = sorted({row["buffer"] for row in graph.manifest["results"] if "buffer" in row} - early)
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
            found.replay()
            self.launches += 1
            for i, t in found.take().items():
                buffers[i] = t
        return True

    def _recorded(self, tensors: Sequence[torch.Tensor], sizes: Any, buffers: list[Any], arena: torch.Tensor | None,
                  stream: int) -> _Recording | None:
        if self.captures >= PATIENCE and self.launches < 4 * self.captures:
            self._give_up(f"{self.captures} recordings for {self.launches} replays; addresses of its arguments or outputs keep changing")
            return None

        def run() -> list[torch.Tensor]:
            given = list(buffers)
            code, _ = self.graph._walk(tensors, given, sizes, arena)
            if code:
                raise CudaError("a check in a kernel failed")
            return [given[i] for i in self._leaves]

        try:
            replay, made = self.on.record(run, stream)
        except (CudaError, RuntimeError) as error:
            self._give_up(str(error).strip().splitlines()[0])
            return None
        self.captures += 1
        return _Recording(replay, dict(zip(self._leaves, made, strict=True)))

    def _give_up(self, reason: str) -> None:
        self.off = reason
        self._kept.clear()
        warnings.warn(f"'{self.graph.name}' goes on without CUDA graphs: {reason}", RuntimeWarning, stacklevel=5)
