"""Running compiled CUDA kernels: cubins are loaded and launched through the CUDA driver, on torch's current stream.

    library = CudaLibrary(program, blobs, device=0)
    run = library.function("main_0")          # int run(table address, symbols address), as native functions are

`program` is JSON data (made by `backends/triton`):

    kernels     name -> {blob, symbol, threads, shared, parameters, buffers, symbols, grid, checks}
    functions   name -> [["launch", kernel, [place, ...]] | ["copy", source place, target place, bytes], ...]
    constants   base64

A place is ["table", slot, byte offset] or ["constant", number, byte offset]; sizes are as in `sizes.py`. The table is the
executor's.
A kernel's parameters are its buffers, its size symbols (int64), the address of the error word if it checks indices, and
then null
pointers for Triton's own scratch memory.

A launch costs one call of cuLaunchKernel: parameter arrays are made once, and only the frame that they point into is
rewritten per call.
A failed check is known late, as for any CUDA error: kernels write to a word of pinned host memory, which the next call
reads (code 1).
"""

from __future__ import annotations

import base64
import ctypes
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import prod
from typing import Any

import torch

from .artifact import ArtifactError
from .sizes import Size, compile_size, evaluate_size

__all__ = ["CudaError", "CudaLibrary", "driver"]

MAX_GRID = (1 << 31) - 1
STATIC_SHARED = 48 * 1024
"""Shared memory above this must be asked for."""
_SET_MAX_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class CudaError(RuntimeError):
    """A call of the CUDA driver failed."""


class _Driver:
    """The few functions of libcuda that are needed; each raises CudaError on failure."""

    def __init__(self) -> None:
        try:
            lib = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise CudaError(f"there is no CUDA driver on this machine ({error})") from error
        pointer, u32 = ctypes.c_void_p, ctypes.c_uint
        self._describe = lib.cuGetErrorString
        self._describe.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
        self.launch = self._checked(
            lib, "cuLaunchKernel", [pointer, u32, u32, u32, u32, u32, u32, u32, pointer, pointer, pointer]
        )
        self.load = self._checked(lib, "cuModuleLoadData", [ctypes.POINTER(pointer), ctypes.c_char_p])
        self.unload = self._checked(lib, "cuModuleUnload", [pointer])
        self.get_function = self._checked(lib, "cuModuleGetFunction", [ctypes.POINTER(pointer), pointer, ctypes.c_char_p])
        self.set_attribute = self._checked(lib, "cuFuncSetAttribute", [pointer, ctypes.c_int, ctypes.c_int])
        self.copy = self._checked(lib, "cuMemcpyDtoDAsync_v2", [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, pointer])

    def _checked(self, lib: ctypes.CDLL, name: str, types: list[Any]) -> Callable[..., int]:
        function = getattr(lib, name)
        function.argtypes = types
        function.restype = ctypes.c_int

        def check(code: int, f: Any, args: Any) -> int:
            if code:
                text = ctypes.c_char_p()
                self._describe(code, ctypes.byref(text))
                raise CudaError(f"{name}: {(text.value or b'unknown error').decode()} (code {code})")
            return code

        function.errcheck = check
        return function  # type: ignore[no-any-return]


@cache
def driver() -> _Driver:
    """The driver; CudaError if the machine has none."""
    return _Driver()


class CudaLibrary:
    """Loaded kernels, constants on the device, and the functions that launch them."""

    def __init__(self, program: Mapping[str, Any], blobs: Mapping[str, bytes], device: torch.device | int | str = "cuda"):
        """ArtifactError if the program is malformed, CudaError if the driver rejects a kernel."""
        self.device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.program = program
        self.launches = 0
        self._functions: dict[str, CudaFunction] = {}
        self._modules: dict[str, ctypes.c_void_p] = {}
        with torch.cuda.device(self.device):
            torch.cuda.current_stream().synchronize()  # makes torch's context, and it current
            self.error = torch.zeros(1, dtype=torch.int32, pin_memory=True)
            self._error_word = ctypes.c_int32.from_address(self.error.data_ptr())
            self.constants = [_upload(text, self.device) for text in program["constants"]]
            self.entries = {name: self._load(row, blobs) for name, row in program["kernels"].items()}

    def _load(self, row: Mapping[str, Any], blobs: Mapping[str, bytes]) -> int:
        """The driver's handle of a kernel; equal cubins are loaded once."""
        d = driver()
        if row["digest"] not in self._modules:
            module = ctypes.c_void_p()
            try:
                d.load(ctypes.byref(module), blobs[row["blob"]])
            except KeyError as error:
                raise ArtifactError(f"the artifact lacks the cubin '{row['blob']}'") from error
            self._modules[row["digest"]] = module
        function = ctypes.c_void_p()
        d.get_function(ctypes.byref(function), self._modules[row["digest"]], row["symbol"].encode())
        if row["shared"] > STATIC_SHARED:
            d.set_attribute(function, _SET_MAX_SHARED, row["shared"])
        return int(function.value or 0)

    def function(self, name: str) -> CudaFunction:
        """A function of the program by name; ArtifactError if there is none."""
        if name not in self._functions:
            if name not in self.program["functions"]:
                raise ArtifactError(f"the program has no function '{name}'; it has {', '.join(self.program['functions'])}")
            self._functions[name] = CudaFunction(self, self.program["functions"][name])
        return self._functions[name]

    def bind(self, symbols: Sequence[str]) -> None:
        """Says in which order the symbol values come (the manifest's)."""
        self.positions = {s: i for i, s in enumerate(symbols)}

    def take_error(self) -> int:
        """The error of a launch that has finished since the last time this was asked, or 0."""
        code = self._error_word.value
        if code:
            self._error_word.value = 0
        return code

    def __del__(self) -> None:
        for module in self.__dict__.get("_modules", {}).values():
            try:
                driver().unload(module)
            except CudaError:  # the context may be gone at exit
                return


def _upload(text: str, device: torch.device) -> torch.Tensor:
    data = bytearray(base64.b64decode(text, validate=True))
    return (torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)).to(device)


class _Sizes:
    """What depends on symbol values: byte offsets of the places, and (programs) or bytes of the steps."""

    __slots__ = ("extents", "offsets")

    def __init__(self, offsets: list[int], extents: list[int]):
        self.offsets, self.extents = offsets, extents


class CudaFunction:
    """One list of launches, callable with the addresses of the table and of the symbol values."""

    def __init__(self, library: CudaLibrary, steps: Sequence[Sequence[Any]]):
        self.library = library
        positions = library.positions
        kernels = library.program["kernels"]
        self._slots: list[int] = []  # table slot of each place of the frame; constants have -1
        self._bases: list[int] = []  # address of constants, 0 for others
        self._offsets: list[Size] = []
        self._extents: list[Size | list[Size]] = []
        places: dict[str, int] = {}

        def place(row: Sequence[Any]) -> int:
            kind, slot, offset = row
            key = repr(row)
            if key not in places:
                places[key] = len(self._slots)
                self._slots.append(-1 if kind == "constant" else int(slot))
                self._bases.append(library.constants[slot].data_ptr() if kind == "constant" else 0)
                self._offsets.append(compile_size(offset, positions))
            return places[key]

        raw: list[tuple[Any, ...]] = []
        for step in steps:
            if step[0] == "launch":
                row = kernels[step[1]]
                raw.append(("launch", step[1], [place(p) for p in step[2]]))
                self._extents.append([compile_size(g, positions) for g in row["grid"]])
            else:
                raw.append(("copy", place(step[1]), place(step[2])))
                self._extents.append(compile_size(step[3], positions))
        # The frame: addresses of the places, symbol values, the error word's address, a null pointer.
        n, m = len(self._slots), len(positions)
        self._frame = (ctypes.c_uint64 * (n + m + 2))()
        self._values = (ctypes.c_int64 * m).from_buffer(self._frame, 8 * n) if m else None
        self._frame[n + m] = library.error.data_ptr()
        base = ctypes.addressof(self._frame)
        self._steps: list[tuple[Any, ...]] = []
        for item in raw:
            if item[0] == "copy":
                self._steps.append(item)
                continue
            row = kernels[item[1]]
            cells = [*item[2], *(n + positions[s] for s in row["symbols"]), *([n + m] if row["checks"] else [])]
            cells += [n + m + 1] * (row["parameters"] - len(cells))
            if len(cells) != row["parameters"]:
                raise ArtifactError(f"kernel '{item[1]}' takes {row['parameters']} parameters, not {len(cells)}")
            params = (ctypes.c_void_p * len(cells))(*[base + 8 * c for c in cells])
            self._steps.append(
                ("launch", library.entries[item[1]], row["threads"], row["shared"], ctypes.addressof(params), params)
            )
        self._lock = threading.Lock()
        self._memo: dict[tuple[int, ...], _Sizes] = {}
        self._table_size = max([*self._slots, -1]) + 1
        self._checks = any(kernels[i[1]]["checks"] for i in raw if i[0] == "launch")

    def __call__(self, table: int, symbols: int) -> int:
        """Launches everything on the current stream of the library's device. 0, or the code of an error of an earlier
        launch."""
        library = self.library
        if self._checks and (code := library.take_error()):
            return code
        slots = (ctypes.c_uint64 * self._table_size).from_address(table)[:] if self._table_size else []
        slots.append(0)  # for constants, whose slot is -1
        n = len(self._slots)
        values: tuple[int, ...] = ()
        if self._values is not None:
            values = tuple((ctypes.c_int64 * len(self._values)).from_address(symbols)[:])
        sizes = self._memo.get(values) or self._measure(values)
        d = driver()
        launch, copy = d.launch, d.copy
        stream = torch._C._cuda_getCurrentRawStream(library.device.index)
        with self._lock:
            self._frame[:n] = [slots[s] + o for s, o in zip(self._slots, sizes.offsets)]
            if self._values is not None:
                self._values[:] = list(values)
            for step, extent in zip(self._steps, sizes.extents):
                if not extent:
                    continue
                if step[0] == "launch":
                    _, function, threads, shared, params, _ = step
                    launch(function, extent, 1, 1, threads, 1, 1, shared, stream, params, None)
                else:
                    copy(self._frame[step[2]], self._frame[step[1]], extent, stream)
        library.launches += len(self._steps)
        return 0

    def _measure(self, values: tuple[int, ...]) -> _Sizes:
        offsets = [b + evaluate_size(o, values) for b, o in zip(self._bases, self._offsets)]
        extents = [
            prod(evaluate_size(g, values) for g in e) if isinstance(e, list) else evaluate_size(e, values)
            for e in self._extents
        ]
        if any(e > MAX_GRID for e, s in zip(extents, self._steps) if s[0] == "launch"):
            raise ValueError(f"a kernel would need more than {MAX_GRID} programs")
        if len(self._memo) >= 512:
            self._memo.clear()
        found = self._memo[values] = _Sizes(offsets, extents)
        return found
