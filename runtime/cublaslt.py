"""Matrix products by cuBLASLt: descriptions, algorithms and the records that native code calls it with.

    lt = load_cublaslt()                                     # the library that torch has loaded; CudaError if there is none
    plans = ProductPlans(lt, shapes, positions, device)      # one shape per product of a native function
    plans.fixed or plans.at(symbols)                         # address of an array: one address of a record per product

A shape says d[b, i, j] = act(sum over k of a[b, i, k] * b[b, k, j]  + bias[j] + c[b, i, j]) on strided memory (JSON data; sizes and strides
in elements, as in `sizes.py`):

    sizes       [batch, m, n, k]
    a, b        strides of batch, row and column: one of row and column is 1
    d, c        strides of batch and row; columns are contiguous (c: null without one)
    types       dtypes of {a, b, d, c, bias}; compute: "f32" (IEEE), "tf32" or "f64"
    align       bytes of which the addresses of {a, b, c, d} are multiples
    bias, act   whether there is a bias; "none" or "relu"
    workspace   bytes of temporary memory it may use
    guess       which algorithm of the heuristic's list (measured: `product_choice.py`); none: the first, and no others are asked for

cuBLAS is column-major: it is asked for the transposed product d' = b' a', whose rows are contiguous in memory; so the bias, one number
per column of d, is one per row of d', as its epilogue wants it.

A record has the words `PLAN` of `backends/triton/native.py`. Algorithms come from cuBLASLt's own heuristic, once per shape.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .cuda_driver import CudaError
from .sizes import Size, compile_size, evaluate_size

__all__ = ["CublasLt", "ProductPlans", "load_cublaslt", "matrix_layouts"]

DESCRIPTOR_BYTES = 1024  # as in backends/triton/native.py
MOST_GUESSES = 8
RESULT_BYTES, ALGORITHM_BYTES = 96, 64  # cublasLtMatmulHeuristicResult_t begins with its cublasLtMatmulAlgo_t

# Values of cublasLt.h and library_types.h.
DATA_TYPES = {"f32": 0, "f64": 1, "f16": 2, "bf16": 14}
COMPUTE = {"f32": (68, 0), "tf32": (77, 0), "f64": (70, 1)}
"""(compute type, type of the scalars)."""
EPILOGUES = {(False, "none"): 1, (False, "relu"): 2, (True, "none"): 4, (True, "relu"): 6}
_TRANSA, _TRANSB, _EPILOGUE, _BIAS_POINTER, _BIAS_TYPE = 3, 4, 7, 8, 26
_BATCH_COUNT, _BATCH_STRIDE = 5, 6
_MAX_WORKSPACE, _MIN_ALIGNMENT = 1, {"a": 5, "b": 6, "c": 7, "d": 8}
_STATUS = {1: "not initialized", 3: "out of memory", 7: "invalid value", 8: "not supported by this device", 11: "mapping error",
           13: "execution failed", 14: "internal error", 15: "not supported", 16: "licence error"}

Layout = tuple[int, int, int, bool]
"""(rows, columns, leading dimension, transposed) of a column-major matrix."""


class CublasLt:
    """The library, with one handle per device (a handle may be used by several threads)."""

    def __init__(self, path: str):
        self._lib = ctypes.CDLL(path)
        self._handles: dict[int | None, int] = {}

    def handle(self, device: torch.device) -> int:
        """The handle for a device, which must be current."""
        if device.index not in self._handles:
            made = ctypes.c_void_p()
            self.check("cublasLtCreate", self._lib.cublasLtCreate(ctypes.byref(made)))
            self._handles[device.index] = int(made.value or 0)
        return self._handles[device.index]

    def address(self, name: str) -> int:
        """Where a function is."""
        return ctypes.cast(self._lib[name], ctypes.c_void_p).value or 0

    def describe(self, code: int) -> str:
        """What a status means."""
        return f"{_STATUS.get(code, 'unknown status')} (cuBLAS status {code})"

    def check(self, what: str, code: int) -> None:
        if code:
            raise CudaError(f"{what}: {self.describe(code)}")

    def layout(self, dtype: str, rows: int, columns: int, ld: int, batch: int, stride: int) -> int:
        """A description of a column-major matrix (or `batch` of them)."""
        made = ctypes.c_void_p()
        self.check("cublasLtMatrixLayoutCreate", self._lib.cublasLtMatrixLayoutCreate(
            ctypes.byref(made), DATA_TYPES[dtype], ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(ld)))
        if batch > 1:
            self._set("cublasLtMatrixLayoutSetAttribute", made, _BATCH_COUNT, ctypes.c_int32(batch))
            self._set("cublasLtMatrixLayoutSetAttribute", made, _BATCH_STRIDE, ctypes.c_int64(stride))
        return int(made.value or 0)

    def descriptor(self, compute: str, transposed: tuple[bool, bool], epilogue: int, bias: str | None) -> ctypes.Array[ctypes.c_char]:
        """A description of a product, in memory that may be copied. Its bias is at address 16 for now: native code sets it."""
        memory = ctypes.create_string_buffer(DESCRIPTOR_BYTES)
        kind, scale = COMPUTE[compute]
        self.check("cublasLtMatmulDescInit", self._lib.cublasLtMatmulDescInit_internal(memory, ctypes.c_size_t(DESCRIPTOR_BYTES), kind, scale))
        for which, t in zip((_TRANSA, _TRANSB), transposed, strict=True):
            self._set("cublasLtMatmulDescSetAttribute", memory, which, ctypes.c_int32(int(t)))
        self._set("cublasLtMatmulDescSetAttribute", memory, _EPILOGUE, ctypes.c_uint32(epilogue))
        if bias is not None:
            self._set("cublasLtMatmulDescSetAttribute", memory, _BIAS_TYPE, ctypes.c_int32(DATA_TYPES[bias]))
            self._set("cublasLtMatmulDescSetAttribute", memory, _BIAS_POINTER, ctypes.c_uint64(16))
        return memory

    def algorithms(self, handle: int, descriptor: Any, layouts: Mapping[str, int], workspace: int, align: Mapping[str, int], count: int) -> list[Any]:
        """The algorithms that the library's heuristic puts first, at most `count`; CudaError if it has none."""
        preference = ctypes.c_void_p()
        self.check("cublasLtMatmulPreferenceCreate", self._lib.cublasLtMatmulPreferenceCreate(ctypes.byref(preference)))
        self._set("cublasLtMatmulPreferenceSetAttribute", preference, _MAX_WORKSPACE, ctypes.c_uint64(workspace))
        for name, which in _MIN_ALIGNMENT.items():
            self._set("cublasLtMatmulPreferenceSetAttribute", preference, which, ctypes.c_uint32(align[name]))
        results, found = ctypes.create_string_buffer(count * RESULT_BYTES), ctypes.c_int()
        pointer = ctypes.c_void_p
        code = self._lib.cublasLtMatmulAlgoGetHeuristic(
            pointer(handle), descriptor, *[pointer(layouts[n]) for n in ("a", "b", "c", "d")], preference, count, results, ctypes.byref(found))
        self._lib.cublasLtMatmulPreferenceDestroy(preference)
        self.check("cublasLtMatmulAlgoGetHeuristic", code or (0 if found.value else 15))
        return [ctypes.create_string_buffer(results.raw[i * RESULT_BYTES:(i + 1) * RESULT_BYTES], RESULT_BYTES) for i in range(found.value)]

    def matmul(self, *arguments: Any) -> int:
        """`cublasLtMatmul` as it is; its status."""
        return int(self._lib.cublasLtMatmul(*arguments))

    def set_bias(self, descriptor: Any, address: int) -> None:
        """Where the bias of a described product is."""
        self._set("cublasLtMatmulDescSetAttribute", descriptor, _BIAS_POINTER, ctypes.c_uint64(address))

    @property
    def version(self) -> int:
        """Such as 120804."""
        self._lib.cublasLtGetVersion.restype = ctypes.c_size_t
        return int(self._lib.cublasLtGetVersion())

    def free_layout(self, layout: int) -> None:
        self._lib.cublasLtMatrixLayoutDestroy(ctypes.c_void_p(layout))

    def _set(self, function: str, target: Any, attribute: int, value: Any) -> None:
        code = self._lib[function](target, attribute, ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value)))
        self.check(f"{function} {attribute}", code)


@cache
def load_cublaslt() -> CublasLt:
    """The cuBLASLt that torch has loaded; CudaError if it has none."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError as error:
        raise CudaError(f"cannot find the cuBLASLt that torch has loaded: {error}") from error
    for line in maps.splitlines():
        path = line.split(None, 5)[-1]
        if Path(path).name.startswith("libcublasLt.so"):
            return CublasLt(path)
    raise CudaError("torch has loaded no cuBLASLt")


def matrix_layouts(sizes: Sequence[int], a: Sequence[int], b: Sequence[int], d: Sequence[int]) -> dict[str, Layout]:
    """The transposed product d' (n x m) = b' (n x k) a' (k x m) in cuBLAS's terms: its first operand is our b, its second our a.

    ValueError where a matrix has no contiguous dimension, or rows that overlap.
    """
    _, m, n, k = sizes
    return {"a": _matrix("b", n, k, b[2], b[1]), "b": _matrix("a", k, m, a[2], a[1]), "d": _matrix("d", n, m, 1, d[1])}


def _matrix(name: str, rows: int, columns: int, row_stride: int, column_stride: int) -> Layout:
    if row_stride == 1 or rows == 1:
        found = (rows, columns, column_stride if columns > 1 else rows, False)
        if found[2] >= rows:
            return found
    if column_stride == 1 or columns == 1:
        found = (columns, rows, row_stride if rows > 1 else columns, True)
        if found[2] >= columns:
            return found
    raise ValueError(f"operand {name} of a matrix product has strides {row_stride} and {column_stride} for {rows} x {columns}")


class _Shape:
    """A shape with its sizes ready to evaluate."""

    def __init__(self, row: Mapping[str, Any], positions: Mapping[str, int]):
        self.row = row
        keys = [key for key in ("sizes", "a", "b", "d", "c") if row[key]]
        self.numbers: dict[str, list[Size]] = {key: [compile_size(e, positions) for e in row[key]] for key in keys}
        self.fixed = all(isinstance(n, int) for group in self.numbers.values() for n in group)

    def at(self, values: Sequence[int]) -> dict[str, list[int]]:
        return {key: [evaluate_size(n, values) for n in group] for key, group in self.numbers.items()}


class ProductPlans:
    """See the module docstring. `fixed` is the address where no size is symbolic, else None."""

    LIMIT = 256

    def __init__(self, lt: CublasLt, shapes: Sequence[Mapping[str, Any]], positions: Mapping[str, int], device: torch.device):
        self._lt, self._device = lt, device
        self._shapes = [_Shape(row, positions) for row in shapes]
        self._count = len(positions)
        self._memo: dict[tuple[int, ...], _Plan] = {}
        self._older: dict[tuple[int, ...], _Plan] = {}  # kept for threads that are about to use one
        self.fixed: int | None = self._plan(()).address if all(s.fixed for s in self._shapes) else None

    @property
    def guesses(self) -> int:
        """How many algorithms the library has for the last product of known sizes, where more than one was asked for."""
        return self._plan(()).guesses

    def at(self, symbols: int) -> int:
        """The address for the symbol values at address `symbols`."""
        return self._plan(tuple((ctypes.c_int64 * self._count).from_address(symbols))).address

    def _plan(self, values: tuple[int, ...]) -> _Plan:
        found = self._memo.get(values)
        if found is None:
            if len(self._memo) >= self.LIMIT:
                self._older, self._memo = self._memo, {}
            with torch.cuda.device(self._device) if self._device.type == "cuda" else torch.no_grad():
                found = self._memo[values] = _Plan(self._lt, self._lt.handle(self._device), self._shapes, values)
        return found


class _Plan:
    """The records of all products for one set of symbol values."""

    def __init__(self, lt: CublasLt, handle: int, shapes: Sequence[_Shape], values: tuple[int, ...]):
        self._lt, self._handle = lt, handle
        self.guesses = 0  # that the library has for the last product, if several were asked for
        self._keep: list[Any] = []
        self._layouts: list[int] = []
        known: dict[str, int] = {}
        array = (ctypes.c_uint64 * max(1, len(shapes)))()
        for i, shape in enumerate(shapes):
            numbers = shape.at(values)
            key = repr((numbers, sorted(shape.row.items(), key=str)))
            if key not in known:
                known[key] = self._record(shape.row, numbers)
            array[i] = known[key]
        self._keep.append(array)
        self.address = ctypes.addressof(array)

    def _record(self, row: Mapping[str, Any], numbers: Mapping[str, Sequence[int]]) -> int:
        batch, m, n, _ = numbers["sizes"]
        if 0 in (batch, m, n):
            return 0
        lt, types, align = self._lt, row["types"], row["align"]
        found = matrix_layouts(numbers["sizes"], numbers["a"], numbers["b"], numbers["d"])
        c = numbers.get("c", numbers["d"])
        strides = {"a": numbers["b"][0], "b": numbers["a"][0], "c": c[0], "d": numbers["d"][0]}
        shapes = {**found, "c": _matrix("c", n, m, 1, c[1])}
        kinds = {"a": types["b"], "b": types["a"], "c": types.get("c", types["d"]), "d": types["d"]}
        layouts = {name: lt.layout(kinds[name], *shapes[name][:3], batch, strides[name]) for name in ("a", "b", "c", "d")}
        self._layouts += layouts.values()
        descriptor = lt.descriptor(row["compute"], (shapes["a"][3], shapes["b"][3]), EPILOGUES[row["bias"], row["act"]],
                                   types["bias"] if row["bias"] else None)
        aligned = {"a": align["b"], "b": align["a"], "c": align["c"], "d": align["d"]}
        guess = row.get("guess", 0)
        results = lt.algorithms(self._handle, descriptor, layouts, row["workspace"], aligned, max(MOST_GUESSES, guess + 1) if "guess" in row else 1)
        self.guesses, result = len(results), results[min(guess, len(results) - 1)]
        real = ctypes.c_double if row["compute"] == "f64" else ctypes.c_float
        scalars = (real * 2)(1, 1 if row["c"] else 0)
        beta = ctypes.addressof(scalars) + ctypes.sizeof(real)
        record = (ctypes.c_uint64 * 10)(
            self._handle, ctypes.addressof(descriptor), layouts["a"], layouts["b"], layouts["c"], layouts["d"], ctypes.addressof(result),
            ctypes.addressof(scalars), beta, row["workspace"])
        self._keep += [descriptor, result, scalars, record]
        return ctypes.addressof(record)

    def __del__(self) -> None:
        for layout in self.__dict__.get("_layouts", ()):
            self._lt.free_layout(layout)
