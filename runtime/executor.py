"""Runs a compiled graph: collects pointers, calls native code, wraps outputs.

    graph = CompiledGraph(manifest, object_code)
    outputs = graph(*args)          # or graph([...]) with the boxed convention: the list is emptied

Native functions have the type `int32 NAME_i(void **table, int64 *symbols)`. The table holds the addresses of the program's
buffers: tensor arguments, outputs, buffers that externs fill, persistent buffers by number, and the arena last; `symbols` the
size symbols in the order of the manifest. Native code between two externs is one segment; a program without externs is one
call.

The manifest (JSON, made by `compiler/manifest.py`; sizes as in `sizes.py`):

    name, symbols            names; `symbols` in table order
    inputs                   per tensor argument: {name, position among the caller's arguments, dtype, shape, strides, and
                             number = true where the caller passes a Python number}
    symbol_args              [[position, symbol or null], ...]: the caller's other arguments
    symbol_sources           [[symbol, input, dimension, "size" or "stride"], ...]
    buffers                  after the inputs: {kind: "output" | "extern" | "late", dtype, shape, strides}
    results                  {kind: "buffer", buffer} | {kind: "input", input} | {kind: "same", result} | {kind: "int", expr}
                             | {kind: "none"} | {kind: "item", buffer} | {kind: "view", input or buffer, shape, strides, offset,
                             and dtype if it is not the base's}
    persistent               {bytes, guards, pack, transient, symbolic}; `pack` names a function or is null
    arena                    bytes
    steps                    ["call", function] | ["extern", {...}] | ["allocate", [buffers]] | ["drop", [buffers]]
    mutated                  inputs that the program writes to
    constants                base64 of the constants that externs read (native code has its own copies)
    errors                   error code, as a string -> message; "RuntimeError: ..." raises that, any other OutOfRange

Thread safety: one graph may run in several threads at once; every call takes its own frame (table) and arena from pools.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, Protocol

import torch

from .arena import ArenaPool, shared_pool
from .artifact import ArtifactError
from .dtypes import torch_dtype
from .entry import NOT_AS_KNOWN, make_entry
from .extern_call import TensorSpec
from .loader import NativeFunction, NativeLibrary, load_object
from .no_memory import require_memory
from .outputs import empty_strided, is_large, shared_outputs, strided_bytes
from .packing import PackedMemory, PersistentBuffer
from .segments import Segments
from .sizes import Size, SizeError, compile_size, evaluate_size

__all__ = ["CompiledGraph", "OutOfRange"]

_data_ptr = torch.Tensor.data_ptr
_bump_version = torch.autograd.graph.increment_version
_MEMO_LIMIT = 512


class OutOfRange(IndexError, RuntimeError):
    """An index in the data is out of range. Eager raises IndexError from some operators and RuntimeError from others, such as gather."""


class Library(Protocol):
    """Compiled functions by name: native code (`loader.py`) or launches of CUDA kernels (`cuda.py`)."""

    def function(self, name: str) -> NativeFunction: ...

    def bind(self, symbols: Sequence[str]) -> None: ...


class _Sizes:
    """What depends on the symbol values: computed once per combination of values."""

    __slots__ = ("address", "arena", "array", "empty", "outputs", "values")

    def __init__(self, values: tuple[int, ...], outputs: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]],
                 arena: int, empty: Callable[..., torch.Tensor]):
        self.values = values
        self.empty = empty
        self.array = (ctypes.c_int64 * max(1, len(values)))(*values)
        self.address = ctypes.addressof(self.array)
        self.outputs = outputs
        self.arena = arena


class CompiledGraph:
    """See the module docstring. `calls` counts native calls, `extern_calls` operator calls (exact in one thread)."""

    def __init__(self, manifest: dict[str, Any], code: bytes = b"", *, arenas: ArenaPool | None = None, check_inputs: bool = False,
                 device: torch.device | str = "cpu", library: Library | None = None):
        """`code` is an object file; or else `library` has the functions. `arenas` defaults to the pool that all graphs of the process share.

        `device` is where arguments and results are.
        `check_inputs` compares every argument with the manifest (strict mode). ArtifactError if the manifest is malformed or the
        code does not fit it.
        """
        # AOTAutograd: call with one list, which may be emptied. On the instance, for torch._dynamo.disable copies `__dict__`.
        self._boxed_call = True
        self.device = torch.device(device)
        on_cpu = self.device.type == "cpu"
        self._empty = empty_strided if on_cpu else self._allocator()
        # torch's CUDA allocator is quick, and knows on which stream memory is still in use: nothing is kept beside it.
        self.arenas = arenas or (shared_pool() if on_cpu else ArenaPool(0, self.device))
        self.library: Library | None = library
        self.calls = 0
        self.extern_calls = 0
        try:
            self._read(manifest, code, check_inputs)
        except (KeyError, TypeError, IndexError, AttributeError, SizeError, ValueError) as error:
            raise ArtifactError(f"malformed manifest: {type(error).__name__}: {error}") from error

    def _allocator(self) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor]:
        """What makes uninitialised tensors on the device."""
        return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=self.device)

    @property
    def result_strides(self) -> list[tuple[int, ...] | None]:
        """The strides of each result that has memory of its own and known sizes, else None."""
        rows = (self.manifest["buffers"][r["buffer"]]["strides"] if r["kind"] == "buffer" else None for r in self.manifest["results"])
        return [tuple(s) if s is not None and all(isinstance(n, int) for n in s) else None for s in rows]

    @property
    def argument_count(self) -> int:
        return self._arg_count

    @property
    def result_count(self) -> int:
        return len(self._results)

    @property
    def makes_all(self) -> bool:
        """One native call whose results are new memory: no mode of torch's has a say in it, and no argument is written to or returned."""
        steps = self.manifest["steps"]
        return self._plain and not self._mutated and len(steps) == 1 and steps[0][0] == "call" and len(self._early) == self._buffer_count

    # -- reading the manifest

    def _read(self, manifest: dict[str, Any], code: bytes, check_inputs: bool) -> None:
        self.manifest = manifest
        self.name: str = manifest["name"]
        names: list[str] = manifest["symbols"]
        self._positions = {name: i for i, name in enumerate(names)}
        inputs, buffers = manifest["inputs"], manifest["buffers"]
        self._input_count, self._buffer_count = len(inputs), len(buffers)
        self._persistent_slot = len(inputs) + len(buffers)
        self._arena_slot = self._persistent_slot + len(manifest["persistent"])
        self._specs = [TensorSpec(b, self._positions) for b in buffers]
        self._input_specs = [TensorSpec(x, self._positions) for x in inputs] if check_inputs else []
        self._arena_size: Size = compile_size(manifest["arena"], self._positions)
        self._pick_inputs(inputs, manifest["symbol_args"])
        self._symbol_args = [(int(position), self._positions[name]) for position, name in manifest["symbol_args"]
                             if name is not None]
        self._symbol_sources = [(self._positions[name], _index(i, inputs), int(d), {"size": 0, "stride": 1}[what])
                                for name, i, d, what in manifest["symbol_sources"]]
        self._mutated = [_index(i, inputs) for i in manifest["mutated"]]
        self._errors: dict[str, str] = dict(manifest["errors"])

        calls = [step[1] for step in manifest["steps"] if step[0] == "call"]
        packs = [p["pack"] for p in manifest["persistent"] if p["pack"] is not None]
        if self.library is not None:
            self.library.bind(names)
        elif calls or packs:
            self.library = load_object(code, dict.fromkeys([*calls, *packs]))
        self._packed = self._read_persistent(manifest["persistent"])
        self._memo: dict[tuple[int, ...], _Sizes] = {}
        self._frames: list[tuple[Any, int]] = []

        # Buffers that exist before the first step: all but those that externs make or decide the size of.
        later = {i for step in manifest["steps"] if step[0] == "allocate" for i in step[1]}
        later |= {_index(i, buffers) for step in manifest["steps"] if step[0] == "extern" for i in step[1]["buffers"]}
        self._early = [i for i in range(len(buffers)) if i not in later]
        self._results = self._read_results(manifest["results"])
        constants: list[str] = manifest["constants"]
        self._fill = struct.Struct(f"={self._arena_slot + 1}Q").pack_into
        plain = [{"kind": "buffer", "buffer": i} for i in range(len(buffers))]
        self._plain = manifest["results"] == plain
        self._static: _Sizes | None = None if names else self._sizes(())
        self._segments = Segments(manifest["steps"], self._function, constants, self._positions, inputs, self._specs,
                                  self.device)
        self._run: Callable[[Sequence[Any]], list[Any]] = self._run_steps
        if len(manifest["steps"]) == len(calls) == 1 and len(self._early) == len(buffers):
            self._run = self._one_call(self._function(calls[0]))
        lazy = [int(x["position"]) for x in inputs if torch_dtype(x["dtype"]).is_complex]
        if lazy:
            self._run = _materialised(self._run, lazy)
        numbers = [(int(x["position"]), torch_dtype(x["dtype"])) for x in inputs if x.get("number")]
        if numbers:
            self._run = _with_numbers(self._run, numbers, self.device)

    def _pick_inputs(self, inputs: list[dict[str, Any]], symbol_args: list[list[Any]]) -> None:
        positions = self._places = [int(x["position"]) for x in inputs]
        self._arg_count = len(inputs) + len(symbol_args)
        if sorted([*positions, *(int(p) for p, _ in symbol_args)]) != list(range(self._arg_count)):
            raise ValueError("the positions of 'inputs' and 'symbol_args' are not 0, 1, 2, ... once each")
        self._pick: Callable[[Sequence[Any]], Sequence[torch.Tensor]] | None
        if positions == list(range(self._arg_count)):
            self._pick = None
        elif len(positions) > 1:
            self._pick = itemgetter(*positions)
        else:
            self._pick = lambda args: [args[p] for p in positions]

    def _function(self, name: str) -> NativeFunction:
        assert self.library is not None
        return self.library.function(name)

    def _read_persistent(self, rows: list[dict[str, Any]]) -> PackedMemory | None:
        if not rows:
            return None
        buffers = [PersistentBuffer(compile_size(r["bytes"], self._positions), tuple(r["guards"]),
                                    None if r["pack"] is None else self._function(r["pack"]), bool(r["transient"]),
                                    bool(r["symbolic"]))
                   for r in rows]
        if any(not 0 <= g < self._input_count for b in buffers for g in b.guards):
            raise ValueError("a guard is no input")
        return PackedMemory(buffers, self._arena_slot + 1, self._persistent_slot, self.device)

    def _read_results(self, rows: list[dict[str, Any]]) -> list[Callable[[Sequence[Any], Sequence[Any], Sequence[int],
                                                                          list[Any]], Any]]:
        return [_RESULT_KINDS[row["kind"]](row, self) for row in rows]

    # -- running

    def __call__(self, *args: Any) -> list[Any]:
        """The outputs, for arguments as the graph was compiled for. OutOfRange or RuntimeError for data that eager refuses."""
        if len(args) == 1 and type(args[0]) is list:
            boxed = args[0]
            outputs = self._run(boxed)
            boxed.clear()
            return outputs
        return self._run(args)

    def _one_call(self, native: NativeFunction) -> Callable[[Sequence[Any]], list[Any]]:
        """How to run a program that is one native call: by its native entry, where there is one and arguments are as it knows them."""
        slowly = self._in_python(native)
        if not isinstance(self.library, NativeLibrary) or self._input_specs:
            return slowly
        entry = make_entry(native, self._places, self._arg_count, self._buffer_count)
        if entry is None:
            return slowly
        static, memory, pick, count = self._static, self._packed, self._pick, self._arg_count
        acquire, release, enter = self.arenas.acquire, self.arenas.release, entry.call
        plain, symbolic = self._plain and not self._mutated, memory is not None and memory.symbolic
        always = entry.known()

        def run(args: Sequence[Any]) -> list[Any]:
            packed, known = None, always
            if memory is not None:
                packed = memory.current  # held until native code has returned
                known = None if packed is None else packed.known
            if known is None or len(args) != count:
                packed = None  # `packing.py` counts who holds it
                return first(args)
            sizes = static or self._sizes(self._symbol_values(args, args if pick is None else pick(args)))
            if symbolic and packed.symbols != sizes.values:  # type: ignore[union-attr]
                packed = None
                return first(args)
            empty = sizes.empty
            buffers = [empty(*spec) for spec in sizes.outputs]
            if sizes.arena:
                arena = acquire(sizes.arena)
                code = enter(known.address, args, buffers, arena, sizes.address)
                release(arena)
            else:
                code = enter(known.address, args, buffers, None, sizes.address)
            if code == NOT_AS_KNOWN:
                packed = None
                return first(args)
            self.calls += 1
            if code:
                self._fail(code)
            return buffers if plain else self._finish(args if pick is None else pick(args), buffers, sizes.values)

        def first(args: Sequence[Any]) -> list[Any]:
            results = slowly(args)
            if memory is not None and (packed := memory.current) is not None and packed.known is None:
                packed.known = entry.known(memory.guards, packed.where, packed.versions, packed.storages, packed.pointers, packed.fingerprint)
            return results

        return run

    def _in_python(self, native: NativeFunction) -> Callable[[Sequence[Any]], list[Any]]:
        """A program that is one call, run the same way as `_run_steps` does, with everything looked up beforehand."""
        count, pick, static, packed_memory = self._arg_count, self._pick, self._static, self._packed
        frames, fill, acquire, release = self._frames, self._fill, self.arenas.acquire, self.arenas.release
        plain = self._plain and not self._mutated

        def run(args: Sequence[Any]) -> list[Any]:
            if len(args) != count:
                raise self._wrong_count(args)
            tensors = args if pick is None else pick(args)
            pointers = [*map(_data_ptr, tensors)]
            if 0 in pointers:
                require_memory(tensors)
            sizes = static or self._sizes(self._symbol_values(args, tensors))
            if self._input_specs:
                self._check_inputs(tensors, sizes.values)
            empty = sizes.empty
            buffers = [empty(*spec) for spec in sizes.outputs]
            packed = None
            try:
                frame = frames.pop()
            except IndexError:
                frame = self._new_frame()
            if packed_memory is not None:
                packed = packed_memory.get(tensors, pointers, sizes.values, sizes.address)
                pointers += map(_data_ptr, buffers)
                pointers += packed.pointers
            else:
                pointers += map(_data_ptr, buffers)
            if sizes.arena:
                arena = acquire(sizes.arena)
                fill(frame[0], 0, *pointers, arena.data_ptr())
                code = native(frame[1], sizes.address)
                release(arena)
            else:
                fill(frame[0], 0, *pointers, 0)
                code = native(frame[1], sizes.address)
            frames.append(frame)
            self.calls += 1
            if code:
                self._fail(code)
            return buffers if plain else self._finish(tensors, buffers, sizes.values)

        return run

    def _run_steps(self, args: Sequence[Any], segments: Segments | None = None) -> list[Any]:
        """`segments` stands in for the program's own steps (a profiler's)."""
        tensors, sizes, buffers = self._begin(args)
        code, symbols = self._launch(tensors, buffers, sizes, segments)
        if code:
            self._fail(code)
        return self._finish(tensors, buffers, symbols)

    def _launch(self, tensors: Sequence[torch.Tensor], buffers: list[Any], sizes: _Sizes, segments: Segments | None) -> tuple[int, Sequence[int]]:
        """As `_walk`, with temporary memory of this call's own."""
        arena = self.arenas.acquire(sizes.arena) if sizes.arena else None
        result = self._walk(tensors, buffers, sizes, arena, segments)
        if arena is not None:  # after an exception it is simply freed
            self.arenas.release(arena)
        return result

    def _begin(self, args: Sequence[Any]) -> tuple[Sequence[torch.Tensor], _Sizes, list[Any]]:
        """What a call works on: tensors, sizes, and the buffers, of which those are made that exist from the start."""
        if len(args) != self._arg_count:
            raise self._wrong_count(args)
        tensors = args if self._pick is None else self._pick(args)
        sizes = self._static or self._sizes(self._symbol_values(args, tensors))
        if self._input_specs:
            self._check_inputs(tensors, sizes.values)
        buffers: list[Any] = [None] * self._buffer_count
        for i, spec in zip(self._early, sizes.outputs, strict=True):
            buffers[i] = sizes.empty(*spec)
        return tensors, sizes, buffers

    def _walk(self, tensors: Sequence[torch.Tensor], buffers: list[Any], sizes: _Sizes, arena: torch.Tensor | None,
              segments: Segments | None = None) -> tuple[int, list[int]]:
        """Runs the steps, filling in the buffers; an error code or 0, and the values of the symbols, which externs may define."""
        pointers = list(map(_data_ptr, tensors))
        if 0 in pointers:
            require_memory(tensors)
        packed = None if self._packed is None else self._packed.get(tensors, pointers, sizes.values, sizes.address)
        table, address = self._new_frame()
        self._fill(table, 0, *pointers, *[0 if b is None else b.data_ptr() for b in buffers],
                   *(packed.pointers if packed is not None else ()), arena.data_ptr() if arena is not None else 0)
        symbols = list(sizes.values)
        array = (ctypes.c_int64 * max(1, len(symbols)))(*symbols)  # of this call alone: externs may define symbols
        calls, externs, code = (segments or self._segments).run(tensors, buffers, packed, arena, table, address, symbols, array)
        self.calls += calls
        self.extern_calls += externs
        return code, symbols

    def _new_frame(self) -> tuple[Any, int]:
        """A pointer table and its address."""
        table = (ctypes.c_uint64 * (self._arena_slot + 1))()
        return table, ctypes.addressof(table)

    def _finish(self, tensors: Sequence[torch.Tensor], buffers: list[Any], symbols: Sequence[int]) -> list[Any]:
        for i in self._mutated:
            if not tensors[i].is_inference():
                _bump_version(tensors[i])
        if self._plain:
            return buffers
        results: list[Any] = []
        for make in self._results:
            results.append(make(tensors, buffers, symbols, results))
        return results

    def _wrong_count(self, args: Sequence[Any]) -> TypeError:
        return TypeError(f"'{self.name}' takes {self._arg_count} arguments, got {len(args)}")

    def _fail(self, code: int) -> None:
        message = self._errors.get(str(code), "index out of range")
        kind, _, rest = message.partition(": ")
        error, text = (RuntimeError, rest) if kind == "RuntimeError" else (OutOfRange, message)
        raise error(f"{text} (in the compiled graph '{self.name}', code {code})")

    def _symbol_values(self, args: Sequence[Any], tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
        values = [0] * len(self._positions)
        for position, symbol in self._symbol_args:
            value = args[position]
            values[symbol] = value if type(value) is int else _integer(value)
        for symbol, i, dimension, what in self._symbol_sources:
            values[symbol] = tensors[i].stride(dimension) if what else tensors[i].size(dimension)
        return tuple(values)

    def _sizes(self, values: tuple[int, ...]) -> _Sizes:
        found = self._memo.get(values)
        if found is None:
            specs = [self._specs[i] for i in self._early]
            outputs = [(spec.shape(values), spec.strides(values), spec.dtype) for spec in specs]
            large = self.device.type == "cpu" and any(is_large(*spec) for spec in outputs)
            found = _Sizes(values, outputs, evaluate_size(self._arena_size, values), shared_outputs().empty if large else self._empty)
            if len(self._memo) >= _MEMO_LIMIT:
                self._memo.clear()
            self._memo[values] = found
        return found

    def _check_inputs(self, tensors: Sequence[Any], symbols: Sequence[int]) -> None:
        for row, spec, t in zip(self.manifest["inputs"], self._input_specs, tensors, strict=True):
            shape, strides = spec.shape(symbols), spec.strides(symbols)
            same = t.dtype == spec.dtype and tuple(t.shape) == shape and t.device.type == self.device.type and (
                t.numel() == 0 or all(n == 1 or a == b for n, a, b in zip(shape, t.stride(), strides, strict=True)))
            if not same:
                raise ValueError(f"argument '{row['name']}' of '{self.name}' is {t.dtype} of shape {tuple(t.shape)}, strides {t.stride()} on "
                                 f"{t.device}; the graph was compiled for {spec.dtype} of shape {shape}, strides {strides} on {self.device.type}")

    # -- for those who look

    def invalidate(self) -> None:
        """Forgets packed parameters: needed after writes that torch does not count, such as through `p.data` or numpy."""
        if self._packed is not None:
            self._packed.invalidate()

    @property
    def packs(self) -> int:
        """How many times packing code ran."""
        return 0 if self._packed is None else self._packed.packs

    @property
    def memory(self) -> dict[str, int]:
        """Bytes: of the arena and the outputs (for the sizes seen last), and of what is packed now."""
        sizes = self._static or next(reversed(self._memo.values()), None)
        outputs = 0
        if sizes is not None:
            outputs = sum(strided_bytes(*spec) for spec in sizes.outputs)
        return {"arena": 0 if sizes is None else sizes.arena, "persistent": 0 if self._packed is None else self._packed.bytes,
                "outputs": outputs}


def _materialised(run: Callable[[Sequence[Any]], list[Any]], positions: list[int]) -> Callable[[Sequence[Any]], list[Any]]:
    """`run` with the conjugates and negatives that torch only notes on these arguments carried out: native code reads memory."""
    def resolved(args: Sequence[Any]) -> list[Any]:
        args = list(args)
        for p in positions:
            if p < len(args) and (args[p].is_conj() or args[p].is_neg()):
                args[p] = torch.empty_strided(args[p].size(), args[p].stride(), dtype=args[p].dtype, device=args[p].device).copy_(args[p])
        return run(args)
    return resolved


def _with_numbers(run: Callable[[Sequence[Any]], list[Any]], numbers: list[tuple[int, torch.dtype]],
                  device: torch.device) -> Callable[[Sequence[Any]], list[Any]]:
    """`run` with the Python numbers among its arguments made tensors."""
    def made(args: Sequence[Any]) -> list[Any]:
        args = list(args)
        for p, dtype in numbers:
            if p < len(args):
                args[p] = torch.scalar_tensor(args[p], dtype=dtype, device=device)
        return run(args)
    return made


def _integer(value: Any) -> int:
    """A size that is no plain int: a number of another type, or the length of a jagged dimension, which only has a name."""
    node = getattr(value, "node", None)
    return int(node.nested_int()) if node is not None and node.is_nested_int() else int(value)


def _index(i: Any, rows: Sequence[Any]) -> int:
    if type(i) is not int or not 0 <= i < len(rows):
        raise ValueError(f"{i!r} is no index into {len(rows)} entries")
    return i


# -- kinds of results: (manifest row, graph) -> function of (inputs, buffers, symbols, results so far)

def _result_int(row: dict[str, Any], graph: CompiledGraph) -> Callable[..., Any]:
    size = compile_size(row["expr"], graph._positions)
    return lambda tensors, buffers, symbols, results: evaluate_size(size, symbols)


def _result_view(row: dict[str, Any], graph: CompiledGraph) -> Callable[..., Any]:
    kind, place = ("input", 0) if "input" in row else ("buffer", 1)
    rows = graph.manifest[kind + "s"]
    at = _index(row[kind], rows)
    spec = TensorSpec({"dtype": rows[at]["dtype"], **row}, graph._positions)
    offset = compile_size(row["offset"], graph._positions)

    if spec.dtype != torch_dtype(rows[at]["dtype"]):
        return lambda *given: _in_memory_of(given[place][at], spec, given[2], evaluate_size(offset, given[2]))

    def view(*given: Any) -> torch.Tensor:
        base, symbols = given[place][at], given[2]
        return base.as_strided(spec.shape(symbols), spec.strides(symbols), base.storage_offset() + evaluate_size(offset, symbols))
    return view


def _in_memory_of(base: torch.Tensor, spec: TensorSpec, symbols: Sequence[int], offset: int) -> torch.Tensor:
    """A tensor of another element type in the memory of `base`, `offset` of its own elements on."""
    offset += base.storage_offset() * base.element_size() // spec.dtype.itemsize
    return torch.empty(0, dtype=spec.dtype, device=base.device).set_(base.untyped_storage(), offset, spec.shape(symbols), spec.strides(symbols))


def _from(place: int, key: str, rows: str) -> Callable[[dict[str, Any], CompiledGraph], Callable[..., Any]]:
    """A result that is one of the inputs (place 0), buffers (1) or earlier results (3)."""
    def make(row: dict[str, Any], graph: CompiledGraph) -> Callable[..., Any]:
        at = _index(row[key], graph.manifest[rows])
        return lambda *given: given[place][at]
    return make


def _result_item(row: dict[str, Any], graph: CompiledGraph) -> Callable[..., Any]:
    at = _index(row["buffer"], graph.manifest["buffers"])
    return lambda tensors, buffers, symbols, results: buffers[at].item()


_RESULT_KINDS: dict[str, Callable[[dict[str, Any], CompiledGraph], Callable[..., Any]]] = {
    "buffer": _from(1, "buffer", "buffers"), "input": _from(0, "input", "inputs"), "same": _from(3, "result", "results"),
    "int": _result_int, "item": _result_item, "view": _result_view,
    "none": lambda row, graph: lambda *given: None,
}
