"""Running compiled CUDA programs: cubins are loaded through the driver, and one native function launches them all.

    library = CudaLibrary(program, blobs, device=0)
    run = library.function("main_0")          # int run(table address, symbols address), as native functions of the CPU are

`program` is JSON data (made by `backends/triton`):

    kernels     name -> {blob, symbol, threads, shared, parameters, buffers, symbols, grid, checks, digest,
                descriptors}
    functions   name -> [["launch", kernel, [place, ...], stream, line] | ["copy", source place, target place, bytes, stream, line]
                         | ["product", {role: place}, shape, stream, line] | ["wait", stream], ...]
    constants   base64
    host        {blob, imports}: object code of the functions, made by `backends/triton/native.py`, whose docstring says what they take
                and return

A place is ["table", slot, byte offset] or ["constant", number, byte offset]; sizes are as in `sizes.py`. The table is the executor's.

Steps of stream 1 run on a stream of the library's own, beside the caller's; "wait" makes one wait for the other. Each call has a stream and an event
to itself (`SideStream`), so that calls of several threads do not take each other's events for their own.

The native function computes sizes and addresses, and calls `cuLaunchKernel` for each launch on torch's current stream; the functions
it calls are linked in by address. It keeps nothing between calls, so several threads may run it at once. A failed check in a kernel is
known late, as for any CUDA error: kernels write to a word of pinned host memory, which the next call reads (code 1).
"""

from __future__ import annotations

import base64
import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from .artifact import ArtifactError
from .cublaslt import ProductPlans, load_cublaslt
from .cuda_driver import CudaError, Driver, KernelNode, driver
from .loader import load_object

__all__ = ["MISALIGNED", "CudaError", "CudaFunction", "CudaLibrary", "Device", "SideStream"]

MISALIGNED = TOO_LARGE = 4095  # see backends/triton/native.py
STEP_BITS = 12
STATE = "aicc_state"
_STICKY = range(700, 800)
"""Results that a kernel of an earlier launch may have caused."""
_PROTOTYPE = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_void_p] * 5, ctypes.c_int32, ctypes.c_int32)


class Device(Protocol):
    """Where a library runs: `CudaDevice`, or a stand-in that records what is asked of it."""

    device: torch.device
    error: torch.Tensor

    def context(self) -> int: ...
    def stream(self) -> int: ...
    def load_module(self, cubin: bytes) -> int: ...
    def unload(self, module: int) -> None: ...
    def kernel(self, module: int, name: str, shared: int) -> int: ...
    def address(self, name: str) -> int: ...
    def describe(self, code: int) -> str: ...
    def plans(self, shapes: Sequence[Mapping[str, Any]], symbols: Mapping[str, int]) -> ProductPlans: ...
    def capturing(self) -> bool: ...
    def capture(self, launch: Callable[[int], Any]) -> int: ...
    def record(self, run: Callable[[], list[torch.Tensor]], stream: int) -> tuple[Callable[[], None], list[torch.Tensor]]: ...
    def create_side(self) -> tuple[int, int]: ...
    def destroy_side(self, stream: int, event: int) -> None: ...
    def captured_node(self, stream: int) -> int: ...
    def node_params(self, node: int) -> KernelNode: ...
    def instantiate(self, graph: int) -> int: ...
    def set_node(self, executable: int, node: int, params: KernelNode) -> None: ...
    def launch_graph(self, executable: int, stream: int) -> int: ...
    def destroy_graph(self, graph: int, executables: Sequence[int]) -> None: ...


class CudaDevice:
    """A device of this machine, through the driver."""

    def __init__(self, device: torch.device):
        self.device = device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
        self.driver: Driver = driver()
        self._pools: dict[int, Any] = {}  # a stream -> the memory of its recordings
        with torch.cuda.device(self.device):
            self._context = self.driver.context(self.device.index)
            self.error = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        index, current = self.device.index, torch._C._cuda_getCurrentRawStream
        self.stream: Callable[[], int] = lambda: current(index)
        self.capturing: Callable[[], bool] = torch.cuda.is_current_stream_capturing
        self.load_module, self.unload, self.kernel = self.driver.load_module, self.driver.unload, self.driver.kernel
        self.describe = self.driver.describe
        self.captured_node, self.node_params, self.instantiate = self.driver.captured_node, self.driver.node_params, self.driver.instantiate
        self.set_node, self.launch_graph = self.driver.set_node, self.driver.launch_graph
        self.destroy_graph = self.driver.destroy_graph
        self.destroy_side = self.driver.destroy_side

    def context(self) -> int:
        return self._context

    def address(self, name: str) -> int:
        return load_cublaslt().address(name) if name.startswith("cublas") else self.driver.address(name)

    def create_side(self) -> tuple[int, int]:
        with torch.cuda.device(self.device):
            return self.driver.create_side()

    def capture(self, launch: Callable[[int], Any]) -> int:
        """The graph of what `launch` puts on the stream that it is given."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream(self.device)
            return self.driver.capture(stream.cuda_stream, lambda: launch(stream.cuda_stream))

    def record(self, run: Callable[[], list[torch.Tensor]], stream: int) -> tuple[Callable[[], None], list[torch.Tensor]]:
        """What `run` does on the device as something that does it again on the current stream, and its results: the same tensors every time.
        Recordings for one `stream` share memory, for they run one after the other.

        `run` calls torch's operators too, so torch's own graph takes it, whose allocator and generator know of it; not by `torch.cuda.graph`,
        which empties the allocator's cache: then the next call's tensors would lie elsewhere.
        """
        graph = torch.cuda.CUDAGraph()
        pool = self._pools.setdefault(stream, torch.cuda.graph_pool_handle())
        with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.Stream(self.device)):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                made = run()
            except BaseException:
                self._abandon(graph, pool)
                raise
            graph.capture_end()
        return graph.replay, made

    def _abandon(self, graph: torch.cuda.CUDAGraph, pool: Any) -> None:
        """Ends a recording that has failed."""
        try:
            graph.capture_end()
        except RuntimeError:  # its cause is known; torch leaves the allocator in the recording's memory then
            torch._C._cuda_endAllocateToPool(self.device.index, pool)

    def plans(self, shapes: Sequence[Mapping[str, Any]], symbols: Mapping[str, int]) -> ProductPlans:
        with torch.cuda.device(self.device):
            return ProductPlans(load_cublaslt(), shapes, symbols, self.device)


class CudaLibrary:
    """Loaded kernels, constants on the device, and the functions that launch them."""

    def __init__(self, program: Mapping[str, Any], blobs: Mapping[str, bytes], device: torch.device | int | str = "cuda",
                 *, on: Device | None = None):
        """ArtifactError if the program is malformed, CudaError if the driver rejects a kernel."""
        self.on: Device = on or CudaDevice(torch.device("cuda", device) if isinstance(device, int) else torch.device(device))
        self.device = self.on.device
        self.program = program
        self.positions: dict[str, int] = {}
        self._functions: dict[str, CudaFunction] = {}
        self._modules: dict[str, int] = {}
        self.constants = [_upload(text, self.device) for text in program["constants"]]
        context = self.on.context()
        self.entries = {name: self._load(row, blobs) for name, row in program["kernels"].items()}
        host = program["host"]
        code = {name: self.on.address(name) for name in host["imports"]}
        try:
            self._native = load_object(blobs[host["blob"]], [*program["functions"], STATE], code)
        except KeyError as error:
            raise ArtifactError(f"the artifact lacks the host's code '{host['blob']}'") from error
        words = [self.on.error.data_ptr(), context, *self.entries.values(), *(c.data_ptr() for c in self.constants)]
        for i, word in enumerate(words):
            ctypes.c_uint64.from_address(self._native.address(STATE) + 8 * i).value = word

    def _load(self, row: Mapping[str, Any], blobs: Mapping[str, bytes]) -> int:
        """The driver's handle of a kernel; equal cubins are loaded once."""
        if row["digest"] not in self._modules:
            if row["blob"] not in blobs:
                raise ArtifactError(f"the artifact lacks the cubin '{row['blob']}'")
            self._modules[row["digest"]] = self.on.load_module(blobs[row["blob"]])
        return self.on.kernel(self._modules[row["digest"]], row["symbol"], row["shared"])

    def bind(self, symbols: Sequence[str]) -> None:
        """The order of symbol values is compiled into the code; their names are for the sizes of products."""
        self.positions = {s: i for i, s in enumerate(symbols)}

    def function(self, name: str) -> CudaFunction:
        """A function of the program by name; ArtifactError if there is none."""
        if name not in self._functions:
            if name not in self.program["functions"]:
                raise ArtifactError(f"the program has no function '{name}'; it has {', '.join(self.program['functions'])}")
            self._functions[name] = CudaFunction(self, name, _PROTOTYPE(self._native.address(name)))
        return self._functions[name]

    def take_error(self) -> int:
        """The error of a launch that has finished since the last time this was asked, or 0."""
        code = int(self.on.error[0])
        if code:
            self.on.error[0] = 0
        return code

    def __del__(self) -> None:
        for module in self.__dict__.get("_modules", {}).values():
            try:
                self.on.unload(module)
            except CudaError:  # the context may be gone at exit
                return


def _upload(text: str, device: torch.device) -> torch.Tensor:
    data = bytearray(base64.b64decode(text, validate=True))
    return (torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)).to(device)


class SideStream:
    """A stream and an event, for the second stream of one call at a time. `address` is that of both as native code reads them."""

    def __init__(self, on: Device):
        self._on = on
        self.stream, self._event = on.create_side()
        self._words = (ctypes.c_uint64 * 2)(self.stream, self._event)
        self.address = ctypes.addressof(self._words)

    def __del__(self) -> None:
        if "address" in self.__dict__:
            try:
                self._on.destroy_side(self.stream, self._event)
            except CudaError:  # the context may be gone at exit
                return


class CudaFunction:
    """One list of launches, callable with the addresses of the table and of the symbol values.

    `native(table, symbols, stream, plans, side, 0, count)` is the machine code itself, `plan(symbols)` what it wants for its matrix products, and
    `borrow()` for its second stream.
    """

    def __init__(self, library: CudaLibrary, name: str, native: Callable[..., int]):
        self.library, self.name, self.native = library, name, native
        self.steps: list[list[Any]] = library.program["functions"][name]
        self.count = len(self.steps)
        self.two_streams = any(step[0] == "wait" for step in self.steps)
        self.stream = library.on.stream
        shapes = [step[2] for step in self.steps if step[0] == "product"]
        self._plans = library.on.plans(shapes, library.positions) if shapes else None
        self.fixed_plan: int | None = 0 if self._plans is None else self._plans.fixed
        self._sides: list[SideStream] = []

    def plan(self, symbols: int) -> int:
        """The address of the plans of the matrix products, for the symbol values at this address."""
        return self.fixed_plan if self.fixed_plan is not None else self._plans.at(symbols)  # type: ignore[union-attr]

    def borrow(self) -> SideStream | None:
        """For one call, to be handed to `give_back` afterwards. None where everything goes to the caller's stream: in programs of one stream,
        and within a capture of the user's (a stream that it reaches stays in it until its end)."""
        if not self.two_streams or self.library.on.capturing():
            return None
        try:
            return self._sides.pop()
        except IndexError:
            return SideStream(self.library.on)

    def give_back(self, side: SideStream | None) -> None:
        if side is not None:
            self._sides.append(side)

    def __call__(self, table: int, symbols: int) -> int:
        """Launches everything on the current stream of the library's device. 0, or the code of a failed check in an earlier launch.

        CudaError if a launch fails.
        """
        side = self.borrow()
        code = self.native(table, symbols, self.stream(), self.plan(symbols), side.address if side else 0, 0, self.count)
        self.give_back(side)
        if code >= MISALIGNED:
            raise self.failure(code)
        return code

    def failure(self, code: int) -> CudaError:
        """What a code says that is none of a failed check."""
        if code == MISALIGNED:
            return CudaError(f"an input of '{self.name}' does not start at a multiple of 16 bytes")
        at, result = (code >> STEP_BITS) - 1, code & TOO_LARGE
        if at >= len(self.steps):
            return CudaError(f"making the context of {self.library.device} current for '{self.name}': {self.library.on.describe(result)}")
        step = self.steps[at]
        kind = step[0]
        if kind == "wait":
            return CudaError(f"letting one stream wait for the other (step {at + 1} of {len(self.steps)} of '{self.name}'): "
                             f"{self.library.on.describe(result)}")
        what = {"launch": f"kernel '{step[1]}'", "copy": "a copy", "product": "a matrix product by cuBLASLt"}[kind]
        line = f", from {step[-1]}" if step[-1] else ""
        where = f"launching {what} (step {at + 1} of {len(self.steps)} of '{self.name}'{line})"
        if result == TOO_LARGE and kind == "launch":
            return CudaError(f"{where}: the grid has more than {(1 << 31) - 1} programs")
        if kind == "product":
            return CudaError(f"{where}: {load_cublaslt().describe(result)}")
        hint = "; a kernel that was launched earlier may be the cause: CUDA_LAUNCH_BLOCKING=1 shows which" if result in _STICKY else ""
        return CudaError(f"{where}: {self.library.on.describe(result)}{hint}")
