"""A CUDA device that only writes down what native code asks of it: its functions are ctypes callbacks.

    device = FakeDevice()
    library = CudaLibrary(program, blobs, on=device)
    device.calls        # ("launch", handle, grid, threads, shared, stream, parameters) | ("copy", ...) | ("product", ...)

Kernel handles are 100, 101, ... in the order of loading. `fail_at` makes the call of that number fail with result `fail_with`. Graphs
are lists of calls in the order in which they were captured, on whatever stream: a launched one adds its calls, with the parameters that they have by then.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from aicc.runtime.cuda_driver import KernelNode

_P, _U32, _U64 = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64
_LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int32, _P, *[_U32] * 7, _P, _P, _P)
_LAUNCH_EX = ctypes.CFUNCTYPE(ctypes.c_int32, _P, _P, _P, _P)
_COPY = ctypes.CFUNCTYPE(ctypes.c_int32, _U64, _U64, _U64, _P)
_PRODUCT = ctypes.CFUNCTYPE(ctypes.c_int32, *[_P] * 14, _U64, _P)
_ATTRIBUTE = ctypes.CFUNCTYPE(ctypes.c_int32, _P, ctypes.c_int32, _P, _U64)
_ENCODE = ctypes.CFUNCTYPE(ctypes.c_int32, _P, _U32, _U32, _P, _P, _P, _P, _P, _U32, _U32, _U32, _U32)
_RECORD, _WAIT = ctypes.CFUNCTYPE(ctypes.c_int32, _P, _P), ctypes.CFUNCTYPE(ctypes.c_int32, _P, _P, _U32)
_CONTEXT = ctypes.CFUNCTYPE(ctypes.c_int32, _P)
CAPTURE_STREAM = 999


class FakeDevice:
    """See the module docstring. `parameters` says how many parameters the kernel with a handle takes."""

    def __init__(self, parameters: Callable[[int], int] = lambda handle: 6) -> None:
        self.device = torch.device("cpu")
        self.error = torch.zeros(1, dtype=torch.int32)
        self.calls: list[tuple[Any, ...]] = []
        self.captured: list[tuple[Any, ...]] = []
        self.graphs: dict[int, list[tuple[Any, ...]]] = {}
        self.executables: dict[int, list[tuple[Any, ...]]] = {}
        self.fail_at, self.fail_with, self.count = -1, 0, 0
        self.current = self.made = 5000  # the context
        self.switched: list[int] = []
        self.raw = 77
        self.loaded: list[bytes] = []
        self.destroyed: list[int] = []
        self.user_captures = False
        self.maps: list[tuple[Any, ...]] = []
        self.encode_result = 0
        self._parameters = parameters
        self._handles = 0
        self._bias: list[int] = []
        self.capture_streams: set[int] = set()
        self.events: dict[int, int] = {}  # event -> the stream on which it was recorded last
        self.last: dict[int, int] = {}  # stream -> its last captured node
        self.sides = 0
        self.recordings = 0
        self.early: list[bool] = []  # of each launch by `cuLaunchKernelEx`: whether it may begin early
        self.sides_destroyed: list[tuple[int, int]] = []
        self._keep = {
            "cuLaunchKernel": _LAUNCH(self._launch),
            "cuLaunchKernelEx": _LAUNCH_EX(self._launch_ex),
            "cuMemcpyDtoDAsync_v2": _COPY(self._copy),
            "cublasLtMatmul": _PRODUCT(self._product),
            "cublasLtMatmulDescSetAttribute": _ATTRIBUTE(self._attribute),
            "cuTensorMapEncodeTiled": _ENCODE(self._encode),
            "cuEventRecord": _RECORD(self._record_event),
            "cuStreamWaitEvent": _WAIT(self._wait_event),
            "cuCtxGetCurrent": _CONTEXT(self._get_context),
            "cuCtxSetCurrent": _CONTEXT(self._set_context),
        }

    # -- what native code calls

    def _record(self, stream: int, call: tuple[Any, ...]) -> int:
        self.count += 1
        if self.count - 1 == self.fail_at:
            return self.fail_with
        (self.captured if stream in self.capture_streams else self.calls).append(call)
        self.last[stream] = len(self.captured) - 1
        return 0

    def _record_event(self, event: int, stream: int | None) -> int:
        result = self._record(stream or 0, ("record", event, stream or 0))
        self.events[event] = stream or 0
        return result

    def _wait_event(self, stream: int | None, event: int, flags: int) -> int:
        """A stream that waits for one that is captured is captured from then on."""
        assert flags == 0
        if self.events[event] in self.capture_streams:
            self.capture_streams.add(stream or 0)
        return self._record(stream or 0, ("wait", stream or 0, event))

    def _launch(self, f: int, x: int, y: int, z: int, tx: int, ty: int, tz: int, shared: int, stream: int, params: int, extra: int) -> int:
        n = self._parameters(f)
        cells = (ctypes.c_void_p * n).from_address(params)
        values = [ctypes.c_uint64.from_address(c).value for c in cells]
        assert (ty, tz, extra) == (1, 1, None)
        return self._record(stream, ("launch", f, (x, y, z), tx, shared, stream, values))

    def _launch_ex(self, config: int, f: int, params: int, extra: int) -> int:
        """CUlaunchConfig, with at most one attribute: programmatic stream serialisation."""
        x, y, z, tx, ty, tz, shared = (_U32 * 7).from_address(config)
        stream, attributes = (_U64 * 2).from_address(config + 32)
        count = _U32.from_address(config + 48).value
        if count:
            assert count == 1 and _U32.from_address(attributes).value == 6 and ctypes.c_int32.from_address(attributes + 8).value == 1
        self.early.append(bool(count))
        return self._launch(f, x, y, z, tx, ty, tz, shared, stream, params, extra)

    def _copy(self, target: int, source: int, size: int, stream: int) -> int:
        return self._record(stream, ("copy", target, source, size, stream))

    def _encode(self, out: int, kind: int, rank: int, address: int, sizes: int, strides: int, box: int, ones: int, *rest: int) -> int:
        """The map's first words are the address, and the number of maps made before."""
        assert out % 64 == 0, "a tensor map must start at a multiple of 64 bytes"
        (ctypes.c_uint64 * 16).from_address(out)[:] = [address, len(self.maps), *[0] * 14]
        words = [list((t * n).from_address(at)) for t, n, at in ((_U64, rank, sizes), (_U64, rank - 1, strides), (_U32, rank, box), (_U32, rank, ones))]
        self.maps.append((kind, address, *words, *rest))
        return self.encode_result

    def _attribute(self, descriptor: int, which: int, value: int, size: int) -> int:
        assert size == 8
        ctypes.c_uint64.from_address(descriptor + 8 * which).value = ctypes.c_uint64.from_address(value).value
        return 0

    def _product(self, *args: int) -> int:
        descriptor = [ctypes.c_uint64.from_address(args[1] + 8 * i).value for i in (0, 8)]
        return self._record(args[-1], ("product", descriptor, *[0 if a is None else a for a in (args[0], *args[2:])]))

    def _get_context(self, out: int) -> int:
        ctypes.c_uint64.from_address(out).value = self.current
        return 0

    def _set_context(self, context: int) -> int:
        self.current = context or 0
        self.switched.append(self.current)
        return 0

    # -- what the library calls

    def context(self) -> int:
        return self.made

    def stream(self) -> int:
        return self.raw

    def address(self, name: str) -> int:
        return ctypes.cast(self._keep[name], ctypes.c_void_p).value or 0

    def describe(self, code: int) -> str:
        return f"result {code}"

    def load_module(self, cubin: bytes) -> int:
        self.loaded.append(cubin)
        return len(self.loaded)

    def unload(self, module: int) -> None:
        pass

    def kernel(self, module: int, name: str, shared: int) -> int:
        self._handles += 1
        return 99 + self._handles

    def plans(self, shapes: Sequence[Mapping[str, Any]], symbols: Mapping[str, int]) -> Any:
        """Records whose words are 1001, 1002, ..., with a descriptor of real memory."""
        self._records = []
        for i, _ in enumerate(shapes):
            memory = (ctypes.c_uint64 * 128)(4242 + i)
            record = (ctypes.c_uint64 * 10)(1001, ctypes.addressof(memory), *range(1003, 1011))
            self._records.append((memory, record))
        self._array = (ctypes.c_uint64 * len(shapes))(*[ctypes.addressof(r) for _, r in self._records])
        return SimpleNamespace(fixed=ctypes.addressof(self._array))

    # -- graphs

    def capturing(self) -> bool:
        return self.user_captures

    def capture(self, launch: Callable[[int], Any]) -> int:
        self.captured, self.capture_streams = [], {CAPTURE_STREAM}
        try:
            launch(CAPTURE_STREAM)
        finally:
            self.capture_streams = set()
        self.graphs[len(self.graphs) + 1] = self.captured
        return len(self.graphs)

    def record(self, run: Callable[[], list[torch.Tensor]], stream: int) -> tuple[Callable[[], None], list[torch.Tensor]]:
        """What is run again writes to the results of the first time, as it does on a device."""
        made, self.recordings = run(), self.recordings + 1

        def replay() -> None:
            self.calls.append(("replay", stream))
            for t, again in zip(made, run(), strict=True):
                t.copy_(again)
        return replay, made

    def create_side(self) -> tuple[int, int]:
        """Streams 1001, 1002, ... with events 2001, 2002, ..."""
        self.sides += 1
        return 999 + self.sides + 1, 1999 + self.sides + 1

    def destroy_side(self, stream: int, event: int) -> None:
        self.sides_destroyed.append((stream, event))

    def captured_node(self, stream: int) -> int:
        assert stream in self.capture_streams
        return self.last[stream]

    def node_params(self, node: int) -> KernelNode:
        return KernelNode(self.captured[node][1])

    def instantiate(self, graph: int) -> int:
        self.executables[len(self.executables) + 1] = list(self.graphs[graph])
        return len(self.executables)

    def set_node(self, executable: int, node: int, params: KernelNode) -> None:
        kind, f, *_ = self.executables[executable][node]
        cells = (ctypes.c_void_p * self._parameters(f)).from_address(params.params)
        values = [ctypes.c_uint64.from_address(c).value for c in cells]
        self.executables[executable][node] = (kind, params.function, tuple(params.grid), params.block[0], params.shared, CAPTURE_STREAM, values)

    def launch_graph(self, executable: int, stream: int) -> int:
        self.calls.append(("graph", executable, stream, [tuple(c) for c in self.executables[executable]]))
        return 0

    def destroy_graph(self, graph: int, executables: Sequence[int]) -> None:
        for x in (graph, *executables):
            self.destroyed.append(x)
