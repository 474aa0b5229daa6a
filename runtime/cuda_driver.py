"""The CUDA driver: what of libcuda aicc calls, with errors as exceptions.

    d = driver()                                   # CudaError where there is none
    module = d.load_module(cubin); handle = d.kernel(module, "name", shared_bytes)
    d.address("cuLaunchKernel")                    # for native code, which calls the driver by itself

Handles are integers. All calls expect the device's context to be current, which `Driver.context(index)` sees to.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

__all__ = ["CudaError", "Driver", "KernelNode", "driver"]

STATIC_SHARED = 48 * 1024
"""Shared memory above this must be asked for."""
_SET_MAX_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
_CAPTURING = 1  # CU_STREAM_CAPTURE_STATUS_ACTIVE
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_NO_TIMING = 2  # CU_EVENT_DISABLE_TIMING

_POINTER, _INT, _SIZE, _U64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_uint64
_OUT = ctypes.POINTER(ctypes.c_void_p)


class CudaError(RuntimeError):
    """A call of the CUDA driver, or of a library on top of it, failed."""


class KernelNode(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS (version 2)."""

    _fields_ = [
        ("function", _POINTER),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("params", _POINTER),
        ("extra", _POINTER),
        ("kernel", _POINTER),
        ("context", _POINTER),
    ]


_SIGNATURES: dict[str, list[Any]] = {
    "cuCtxGetCurrent": [_OUT],
    "cuModuleLoadData": [_OUT, ctypes.c_char_p],
    "cuModuleUnload": [_POINTER],
    "cuModuleGetFunction": [_OUT, _POINTER, ctypes.c_char_p],
    "cuFuncSetAttribute": [_POINTER, _INT, _INT],
    "cuStreamCreate": [_OUT, ctypes.c_uint],
    "cuStreamDestroy_v2": [_POINTER],
    "cuEventCreate": [_OUT, ctypes.c_uint],
    "cuEventDestroy_v2": [_POINTER],
    "cuStreamGetCaptureInfo_v2": [_POINTER, *[_POINTER] * 5],
    "cuStreamGetCaptureInfo_v3": [_POINTER, *[_POINTER] * 6],
    "cuStreamBeginCapture_v2": [_POINTER, _INT],
    "cuStreamEndCapture": [_POINTER, _OUT],
    "cuGraphKernelNodeGetParams_v2": [_POINTER, ctypes.POINTER(KernelNode)],
    "cuGraphInstantiateWithFlags": [_OUT, _POINTER, ctypes.c_ulonglong],
    "cuGraphExecKernelNodeSetParams_v2": [_POINTER, _POINTER, _POINTER],
    "cuGraphExecDestroy": [_POINTER],
    "cuGraphDestroy": [_POINTER],
}


class Driver:
    """libcuda. Functions are looked up when first needed; each raises CudaError on failure."""

    def __init__(self) -> None:
        try:
            self._lib = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise CudaError(f"there is no CUDA driver on this machine ({error})") from error
        self._lib.cuGetErrorString.argtypes = [_INT, ctypes.POINTER(ctypes.c_char_p)]
        self._functions: dict[str, Callable[..., int]] = {}
        self._launch = self._lib["cuGraphLaunch"]
        self._launch.argtypes = [_POINTER, _POINTER]

    def describe(self, code: int) -> str:
        """What a result code means."""
        text = ctypes.c_char_p()
        self._lib.cuGetErrorString(code, ctypes.byref(text))
        return f"{(text.value or b'unknown error').decode()} (CUDA result {code})"

    def address(self, name: str) -> int:
        """Where a function is; CudaError if this driver does not have it."""
        found = getattr(self._lib, name, None)
        if found is None:
            raise CudaError(f"the CUDA driver of this machine has no '{name}': it is too old")
        return ctypes.cast(found, ctypes.c_void_p).value or 0

    def call(self, name: str) -> Callable[..., int]:
        """A function of `_SIGNATURES`."""
        if name not in self._functions:
            self.address(name)
            function = self._lib[name]
            function.argtypes, function.restype = _SIGNATURES[name], _INT

            def check(code: int, f: Any, args: Any) -> int:
                if code:
                    raise CudaError(f"{name}: {self.describe(code)}")
                return code

            function.errcheck = check  # type: ignore[assignment]
            self._functions[name] = function
        return self._functions[name]

    def _get(self, name: str, *args: Any) -> int:
        """The handle that a function writes to its first argument."""
        out = ctypes.c_void_p()
        self.call(name)(ctypes.byref(out), *args)
        return int(out.value or 0)

    # -- modules

    def context(self, index: int) -> int:
        """torch's context of a device, made if need be and current now."""
        torch.cuda.set_device(index)
        torch.cuda.current_stream(index).synchronize()
        return self._get("cuCtxGetCurrent")

    def load_module(self, cubin: bytes) -> int:
        return self._get("cuModuleLoadData", cubin)

    def unload(self, module: int) -> None:
        self.call("cuModuleUnload")(module)

    def kernel(self, module: int, name: str, shared: int) -> int:
        """The handle of a kernel that takes `shared` bytes of dynamic shared memory."""
        handle = self._get("cuModuleGetFunction", module, name.encode())
        if shared > STATIC_SHARED:
            self.call("cuFuncSetAttribute")(handle, _SET_MAX_SHARED, shared)
        return handle

    # -- streams

    def create_side(self) -> tuple[int, int]:
        """A stream that waits for no other by itself, and an event that takes no time."""
        return self._get("cuStreamCreate", _NON_BLOCKING), self._get("cuEventCreate", _NO_TIMING)

    def destroy_side(self, stream: int, event: int) -> None:
        """What was launched on the stream runs to its end."""
        self.call("cuEventDestroy_v2")(event)
        self.call("cuStreamDestroy_v2")(stream)

    # -- graphs

    def capture(self, stream: int, launch: Callable[[], Any]) -> int:
        """The graph of what `launch` puts on the stream, which must be no legacy default stream."""
        self.call("cuStreamBeginCapture_v2")(stream, _THREAD_LOCAL)
        graph = 0
        try:
            launch()
        finally:
            graph = self._end_capture(stream)
        return graph

    def _end_capture(self, stream: int) -> int:
        out = ctypes.c_void_p()
        self.call("cuStreamEndCapture")(stream, ctypes.byref(out))
        return int(out.value or 0)

    def captured_node(self, stream: int) -> int:
        """The node that was captured last on a stream that is being captured. CudaError if it is not one (after a wait for another stream, say)."""
        with_data = hasattr(self._lib, "cuStreamGetCaptureInfo_v3")
        name = "cuStreamGetCaptureInfo_v3" if with_data else "cuStreamGetCaptureInfo_v2"
        status, number, graph, count = ctypes.c_int(), ctypes.c_uint64(), ctypes.c_void_p(), _SIZE(0)
        nodes, edges = ctypes.POINTER(ctypes.c_void_p)(), ctypes.c_void_p()
        self.call(name)(stream, ctypes.byref(status), ctypes.byref(number), ctypes.byref(graph), ctypes.byref(nodes),
                        *[ctypes.byref(edges)] * with_data, ctypes.byref(count))
        if status.value != _CAPTURING or count.value != 1:
            raise CudaError(f"the stream has {count.value} last nodes (status of its capture: {status.value})")
        return int(nodes[0] or 0)

    def node_params(self, node: int) -> KernelNode:
        """What a kernel of a graph is launched with."""
        params = KernelNode()
        self.call("cuGraphKernelNodeGetParams_v2")(node, ctypes.byref(params))
        return params

    def instantiate(self, graph: int) -> int:
        return self._get("cuGraphInstantiateWithFlags", graph, 0)

    def set_node(self, executable: int, node: int, params: KernelNode) -> None:
        """Gives a kernel of an instantiated graph new parameters: launches from now on use them."""
        self.call("cuGraphExecKernelNodeSetParams_v2")(executable, node, ctypes.byref(params))

    def launch_graph(self, executable: int, stream: int) -> int:
        """The driver's result, 0 for success."""
        return int(self._launch(executable, stream))

    def destroy_graph(self, graph: int, executables: Sequence[int]) -> None:
        """What runs already runs to its end."""
        for executable in executables:
            self.call("cuGraphExecDestroy")(executable)
        self.call("cuGraphDestroy")(graph)


@cache
def driver() -> Driver:
    """The driver of this machine; CudaError if it has none."""
    return Driver()
