"""A compiled graph whose kernels run on a CUDA device.

    graph = CudaGraph(manifest, blobs, device="cuda:0")       # manifest["cuda"] is the program of `cuda.py`, blobs its machine code
    outputs = graph(*args)

Kernels take inputs to start at multiples of 16 bytes, as torch's allocator gives them; the native code says when one does not (a slice,
say), and then it is copied for the call, and back if the program writes to it. Numbers that live on the CPU (0-d tensors) are brought over.

Where the whole program is one native function, a call is: addresses of the arguments, allocations of the outputs and the arena, one native
call. With `cudagraphs` the launches are replayed from a CUDA graph instead (`cuda_replay.py`; programs with operator calls: `cuda_record.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .cuda import MISALIGNED, CudaFunction, CudaLibrary, Device
from .cuda_profile import Profile
from .cuda_record import Record, refusal
from .cuda_replay import Replay
from .executor import CompiledGraph
from .extern_call import ALIGNMENT
from .loader import NativeFunction
from .no_memory import require_memory
from .segments import Segments

__all__ = ["CudaGraph"]

_data_ptr = torch.Tensor.data_ptr


def _allocator(device: torch.device) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor]:
    """An uninitialised tensor on the device; torch's own shortcut past the dispatcher where there is one and a single device."""
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    shortcut = getattr(guards, "_empty_strided_cuda", None)
    if device.type == "cuda" and shortcut is not None and torch.cuda.device_count() == 1:
        return shortcut  # type: ignore[no-any-return]
    return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device)


class CudaGraph(CompiledGraph):
    """See the module docstring."""

    def __init__(
        self,
        manifest: dict[str, Any],
        blobs: Mapping[str, bytes],
        device: torch.device | str = "cuda",
        *,
        check_inputs: bool = False,
        cudagraphs: bool = False,
        on: Device | None = None,
    ):
        library = CudaLibrary(manifest["cuda"], blobs, device, on=on)
        self.cuda = library
        self.replay: Replay | None = None
        self.record: Record | None = None
        self.profile: Profile | None = None
        self._wants_replay = cudagraphs
        self._device_memory = _allocator(library.device)
        self._native_alignment = False
        super().__init__(manifest, device=library.device, library=library, check_inputs=check_inputs)
        self._places = sorted(int(x["position"]) for x in manifest["inputs"])
        self._written = {int(manifest["inputs"][i]["position"]) for i in manifest["mutated"]}
        self._foreign: list[int] | None = None
        if cudagraphs and self.replay is None:
            reason = refusal(manifest)
            if reason:
                self._decline(reason)
            else:
                leaves = {row["buffer"] for row in manifest["results"] if "buffer" in row} - set(self._early)
                self.record = Record(self.name, library.on, sorted(leaves), self._walk)

    def _allocator(self) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor]:
        return self._device_memory

    def _decline(self, reason: str) -> None:
        self.replay = self.record = None
        warnings.warn(f"'{self.name}' runs without CUDA graphs: {reason}", RuntimeWarning, stacklevel=3)

    def __call__(self, *args: Any) -> list[Any]:
        boxed = args[0] if len(args) == 1 and type(args[0]) is list else None
        given: Sequence[Any] = args if boxed is None else boxed
        if self._foreign is None:
            self._look_at(given)
        if self._foreign or not (self._native_alignment or self._aligned(given)):
            outputs = self._moved(given)
        elif self.profile is not None:
            outputs = self.profile.run(self, given)
        else:
            outputs = self._run(given)
        if boxed is not None:
            boxed.clear()
        return outputs

    def _look_at(self, args: Sequence[Any]) -> None:
        """Which arguments are elsewhere: devices are part of what a graph is compiled for."""
        if len(args) != self._arg_count:
            raise self._wrong_count(args)
        foreign = [i for i in self._places if args[i].device != self.device]
        if foreign and (self.replay is not None or self.record is not None):
            self._decline(f"argument {foreign[0]} is on {args[foreign[0]].device}")
        self._foreign = foreign

    def _aligned(self, args: Sequence[Any]) -> bool:
        return not any(_data_ptr(args[i]) % ALIGNMENT for i in self._places)

    def _moved(self, args: Sequence[Any]) -> list[Any]:
        """Runs on copies of the arguments that are not where the kernels expect them. A result that is a view of an argument is one of the argument
        itself, not of its copy: AOTAutograd makes it anew from where it begins."""
        given, back, copies = list(args), [], {}
        for i in self._places:
            t = args[i]
            if t.device == self.device and t.data_ptr() % ALIGNMENT == 0:
                continue
            given[i] = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=self.device).copy_(t)
            if t.device == self.device:
                copies[given[i].untyped_storage().data_ptr()] = t
            if i in self._written:
                back.append((t, given[i]))
        outputs = [_view_of(copies.get(o.untyped_storage().data_ptr()), o) if isinstance(o, torch.Tensor) else o for o in self._run(given)]
        with torch.no_grad():
            for t, made in back:
                t.copy_(made)
        return outputs

    def _launch(self, tensors: Sequence[torch.Tensor], buffers: list[Any], sizes: Any, segments: Segments | None) -> tuple[int, Sequence[int]]:
        if self.record is not None and segments is None:
            code = self.cuda.take_error()
            if code or self.record(tensors, sizes, buffers):
                return code, sizes.values
        return super()._launch(tensors, buffers, sizes, segments)

    def _one_call(self, native: NativeFunction) -> Callable[[Sequence[Any]], list[Any]]:
        """How to run a program that is one native call: as the base class does, with fewer steps for a device."""
        if self._packed is not None or not isinstance(native, CudaFunction):
            return super()._one_call(native)
        count, pick, static, checked = self._arg_count, self._pick, self._static, bool(self._input_specs)
        frames, fill, empty, plain = self._frames, self._fill, self._device_memory, self._plain and not self._mutated
        launch, stream, plan, steps = native.native, native.stream, native.plan, native.count
        two = native.two_streams
        if self._wants_replay:
            self.replay = Replay(native, self._input_count)
        self._native_alignment = True

        def run(args: Sequence[Any]) -> list[Any]:
            if len(args) != count:
                raise self._wrong_count(args)
            tensors = args if pick is None else pick(args)
            pointers = [*map(_data_ptr, tensors)]
            if 0 in pointers:
                require_memory(tensors)
            sizes = static or self._sizes(self._symbol_values(args, tensors))
            if checked:
                self._check_inputs(tensors, sizes.values)
            buffers = [empty(*spec) for spec in sizes.outputs]
            pointers += map(_data_ptr, buffers)
            if self.replay is not None:
                code = self.replay(pointers, sizes)
            else:
                arena = empty((sizes.arena,), (1,), torch.uint8) if sizes.arena else None
                try:
                    frame = frames.pop()
                except IndexError:
                    frame = self._new_frame()
                fill(frame[0], 0, *pointers, 0 if arena is None else arena.data_ptr())
                if two:
                    side = native.borrow()
                    code = launch(frame[1], sizes.address, stream(), plan(sizes.address), side.address if side else 0, 0, steps)
                    native.give_back(side)
                else:
                    code = launch(frame[1], sizes.address, stream(), plan(sizes.address), 0, 0, steps)
                frames.append(frame)
            self.calls += 1
            if code:
                if code == MISALIGNED and not self._aligned(args):
                    return self._moved(args)
                if code >= MISALIGNED:
                    raise native.failure(code)
                self._fail(code)
            return buffers if plain else self._finish(tensors, buffers, sizes.values)

        return run

    def check(self) -> None:
        """Waits for the device; IndexError if a kernel met an index out of range since the last call."""
        torch.cuda.synchronize(self.device)
        code = self.cuda.take_error()
        if code:
            self._fail(code)


def _view_of(argument: torch.Tensor | None, view: torch.Tensor) -> torch.Tensor:
    """`view` of an argument's copy, which fills a memory of its own, as one of the argument; without an argument `view` itself."""
    if argument is None:
        return view
    start = argument.storage_offset() * argument.element_size() // view.element_size() + view.storage_offset()
    return torch.empty(0, dtype=view.dtype, device=view.device).set_(argument.untyped_storage(), start, view.shape, view.stride())
