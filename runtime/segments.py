"""Programs with operator calls in between: native segments, externs, buffers whose size is known late.

`Segments.run` walks the steps of a manifest (see `executor.py`). An extern's operands are described by where they live:

    {"space": "input" | "buffer" | "persistent" | "constant" | "arena", "index", "offset" (bytes), "dtype", "shape", "strides"}

A constant's data is base64 in the manifest's `constants`. Results are torch's own tensors: they become the buffers that
`"buffers"` names, and native code reads them where they are.
"""

from __future__ import annotations

import base64
import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .artifact import ArtifactError
from .extern_call import ExternCall, TensorSpec
from .loader import NativeFunction
from .sizes import compile_size, evaluate_size

__all__ = ["Segments"]

class _Call:
    """What one call of the program works on."""

    __slots__ = ("address", "arena", "array", "buffers", "calls", "code", "externs", "packed", "symbols", "table", "tensors")

    def __init__(self, tensors: Sequence[torch.Tensor], buffers: list[Any], packed: Any, arena: torch.Tensor | None,
                 table: Any, address: int,
                 symbols: list[int], array: Any):
        self.tensors, self.buffers, self.packed, self.arena = tensors, buffers, packed, arena
        self.table, self.address, self.symbols, self.array = table, address, symbols, array
        self.calls = self.externs = self.code = 0

    def define(self, position: int, value: int) -> None:
        self.symbols[position] = value
        self.array[position] = value


Step = Callable[[_Call], None]
Place = Callable[[_Call], torch.Tensor]


class Segments:
    """The steps of one program, ready to run."""

    def __init__(self, steps: Sequence[Any], function: Callable[[str], NativeFunction], constants: Sequence[str],
                 positions: Mapping[str, int], inputs: Sequence[Mapping[str, Any]], specs: Sequence[TensorSpec],
                 device: torch.device | str = "cpu", around_extern: Callable[[str, Step], Step] = lambda target, step: step,
                 aligned: bool = False):
        """`around_extern(target, step)` is run in the place of an operator call; `aligned`: results of operators that start elsewhere than at
        a multiple of `extern_call.ALIGNMENT` are copied (always so on GPUs)."""
        self._aligned = aligned or torch.device(device).type == "cuda"
        self._function, self._constants, self._positions = function, constants, positions
        self._inputs, self._specs = inputs, specs
        self._device, self._around_extern = torch.device(device), around_extern
        makers: dict[str, Callable[[Any], Step]] = {"call": self._call, "extern": self._extern, "allocate": self._allocate, "drop": self._drop}
        self._steps: list[Step] = [makers[kind](value) for kind, value in steps]

    def run(self, tensors: Sequence[torch.Tensor], buffers: list[Any], packed: Any, arena: torch.Tensor | None, table: Any,
            address: int,
            symbols: list[int], array: Any) -> tuple[int, int, int]:
        """Runs all steps, filling in `buffers` and `symbols`; (native calls, extern calls, error code or 0)."""
        call = _Call(tensors, buffers, packed, arena, table, address, symbols, array)
        with torch.no_grad():  # the graph is below autograd already
            for step in self._steps:
                step(call)
                if call.code:
                    break
        return call.calls, call.externs, call.code

    # -- steps

    def _call(self, name: str) -> Step:
        native = self._function(name)

        def step(call: _Call) -> None:
            call.calls += 1
            call.code = native(call.address, ctypes.addressof(call.array))
        return step

    def _allocate(self, which: Sequence[int]) -> Step:
        specs = [(self._slot(i), i, self._specs[i]) for i in which]

        def step(call: _Call) -> None:
            for slot, i, spec in specs:
                made = torch.empty_strided(spec.shape(call.symbols), spec.strides(call.symbols), dtype=spec.dtype, device=self._device)
                call.buffers[i] = made
                call.table[slot] = made.data_ptr()
        return step

    def _drop(self, which: Sequence[int]) -> Step:
        places = [(self._slot(i), i) for i in which]

        def step(call: _Call) -> None:
            for slot, i in places:
                call.buffers[i] = None
                call.table[slot] = 0
        return step

    def _extern(self, row: Mapping[str, Any]) -> Step:
        invoke = ExternCall(row, self._positions, aligned=self._aligned)
        alone = row["target"].endswith(_COPY_MEMORY)
        operands = [self._operand(o, alone) for o in row["operands"]]
        targets = [(self._slot(i), i) for i in row["buffers"]]
        if len(targets) != len(row["results"]):
            raise ArtifactError(f"'{invoke.target}' has {len(row['results'])} results for {len(targets)} buffers")

        def step(call: _Call) -> None:
            call.externs += 1
            made = invoke([place(call) for place in operands], call.symbols, call.define)
            for (slot, i), tensor in zip(targets, made, strict=True):
                call.buffers[i] = tensor
                call.table[slot] = tensor.data_ptr()
        return self._around_extern(invoke.target, step)

    def _slot(self, i: Any) -> int:
        if type(i) is not int or not 0 <= i < len(self._specs):
            raise ArtifactError(f"{i!r} is no buffer; there are {len(self._specs)}")
        return len(self._inputs) + i

    # -- operands

    def _operand(self, row: Mapping[str, Any], alone: bool = False) -> Place:
        """Where an operand is; `alone`: as a tensor whose memory holds nothing else."""
        space = row["space"]
        if space not in _SPACES:
            raise ArtifactError(f"unknown space {space!r} of an operand")
        spec = TensorSpec(row, self._positions)
        offset = compile_size(row["offset"], self._positions)
        base = _SPACES[space](self, row)
        scale = spec.dtype.itemsize

        def place(call: _Call) -> torch.Tensor:
            memory = base(call)
            shape, strides = spec.shape(call.symbols), spec.strides(call.symbols)
            at = evaluate_size(offset, call.symbols) // scale  # offsets are multiples of the element size
            if at == 0 and memory.dtype == spec.dtype and memory.shape == shape and memory.stride() == strides:
                return memory
            if memory.dtype == spec.dtype:
                return memory.as_strided(shape, strides, memory.storage_offset() + at)
            start = memory.storage_offset() * memory.element_size() // scale + at
            storage = memory.untyped_storage()
            if alone and 0 not in shape:
                extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
                storage, start = storage[start * scale:(start + extent) * scale], 0
            return torch.empty(0, dtype=spec.dtype, device=self._device).set_(storage, start, shape, strides)
        return place

    def _input(self, row: Mapping[str, Any]) -> Place:
        at = int(row["index"])
        if not 0 <= at < len(self._inputs):
            raise ArtifactError(f"{at} is no input")
        return lambda call: call.tensors[at]

    def _buffer(self, row: Mapping[str, Any]) -> Place:
        at = self._slot(row["index"]) - len(self._inputs)
        return lambda call: call.buffers[at]

    def _persistent(self, row: Mapping[str, Any]) -> Place:
        at = int(row["index"])
        return lambda call: call.packed.memory[at]

    def _arena(self, row: Mapping[str, Any]) -> Place:
        nothing = torch.empty(0, dtype=torch.uint8, device=self._device)  # where all that is in the arena has no elements
        return lambda call: nothing if call.arena is None else call.arena

    def _constant(self, row: Mapping[str, Any]) -> Place:
        data = base64.b64decode(self._constants[int(row["index"])], validate=True)
        memory = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        memory = memory.to(self._device)
        return lambda call: memory


_COPY_MEMORY = ("aten.copy.default", "_scatter.default")
"""Operators that copy all the memory that their operand lies in, in elements of its type."""

_SPACES = {"input": Segments._input, "buffer": Segments._buffer, "persistent": Segments._persistent, "arena": Segments._arena,
           "constant": Segments._constant}
