"""A compiled graph whose kernels run on a CUDA device.

    graph = CudaGraph(manifest, blobs, device="cuda:0")       # manifest["cuda"] is the program of `cuda.py`, blobs its cubins
    outputs = graph(*args)

Kernels take inputs to start at multiples of 16 bytes, as torch's allocator gives them; an argument that does not (a slice,
say) is copied for
the call, and back if the program writes to it. Numbers that live on the CPU (0-d tensors) are brought over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .cuda import CudaLibrary
from .executor import CompiledGraph

__all__ = ["CudaGraph"]

ALIGNMENT = 16
_data_ptr = torch.Tensor.data_ptr


class CudaGraph(CompiledGraph):
    """See the module docstring."""

    def __init__(
        self,
        manifest: dict[str, Any],
        blobs: Mapping[str, bytes],
        device: torch.device | str = "cuda",
        *,
        check_inputs: bool = False,
    ):
        library = CudaLibrary(manifest["cuda"], blobs, device)
        super().__init__(manifest, device=library.device, library=library, check_inputs=check_inputs)
        self.cuda = library
        self._places = sorted(int(x["position"]) for x in manifest["inputs"])
        self._written = {int(manifest["inputs"][i]["position"]) for i in manifest["mutated"]}
        self._foreign: list[int] | None = None

    def __call__(self, *args: Any) -> list[Any]:
        boxed = args[0] if len(args) == 1 and type(args[0]) is list else None
        given: Sequence[Any] = args if boxed is None else boxed
        if self._foreign is None:  # devices are part of what a graph is compiled for
            self._foreign = [i for i in self._places if not given[i].is_cuda]
        if self._foreign or any(_data_ptr(given[i]) % ALIGNMENT for i in self._places):
            outputs = self._moved(given)
        else:
            outputs = self._run(given)
        if boxed is not None:
            boxed.clear()
        return outputs

    def _moved(self, args: Sequence[Any]) -> list[Any]:
        """Runs on copies of the arguments that are not where the kernels expect them."""
        given, back = list(args), []
        for i in self._places:
            t = args[i]
            if t.is_cuda and t.data_ptr() % ALIGNMENT == 0:
                continue
            given[i] = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=self.device).copy_(t)
            if i in self._written:
                back.append((t, given[i]))
        outputs = self._run(given)
        with torch.no_grad():
            for t, made in back:
                t.copy_(made)
        return outputs

    def check(self) -> None:
        """Waits for the device; IndexError if a kernel met an index out of range since the last call."""
        torch.cuda.synchronize(self.device)
        code = self.cuda.take_error()
        if code:
            self._fail(code)
