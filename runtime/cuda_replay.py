"""CUDA graphs: the launches of a native function captured once and replayed, with new addresses patched in.

    replay = Replay(function, inputs)                   # function: a `cuda.CudaFunction` that is a whole program
    code = replay(pointers, sizes)                      # addresses of inputs and outputs; as the native function's result

What a call means does not change: inputs are read where they are (no copies), outputs are fresh tensors of their own. For that, the kernels
whose parameters hold an address that is another one than last time get new parameters in the instantiated graph
(`cuGraphExecKernelNodeSetParams`): parameters are our own, so their places are known. A changed graph costs the driver more to launch, and
torch's allocator hands out the same few addresses in turn: so up to VARIANTS instantiated graphs stay, and only the one used longest ago is
changed. A matrix product by cuBLASLt hides the addresses it uses, and so does a tensor map: one graph is captured for each combination of the
addresses that products, copies and kernels with tensor maps use, and up to LIMIT are kept.

The first call for new sizes runs as usual (libraries load their kernels lazily, which a capture forbids), the second one captures.
Temporary memory is one block per device and stream, as large as the largest graph needs, for all graphs: those on one stream run one
after the other. It stays allocated.

When captures are not reused, or one fails, the program goes on without CUDA graphs and a warning says why.
"""

from __future__ import annotations

import ctypes
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from operator import itemgetter
from typing import Any

import torch

from .cuda import MISALIGNED, CudaFunction
from .cuda_driver import CudaError, KernelNode
from .sizes import compile_size, evaluate_size

__all__ = ["GraphMemory", "Replay", "graph_memory"]

VARIANTS = 4
"""Instantiated graphs of one captured graph, with different addresses."""
LIMIT = 32
"""Captured graphs kept per program."""
PATIENCE = 3 * LIMIT
"""Captures without reuse after which the program goes on without."""


class GraphMemory:
    """One block of temporary memory per device and stream. An address is good until the next call for a larger block there."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[torch.device, int], torch.Tensor] = {}

    def get(self, device: torch.device, stream: int, size: int) -> int:
        """The address of `size` bytes, aligned to 512."""
        return self.block(device, stream, size).data_ptr()

    def block(self, device: torch.device, stream: int, size: int) -> torch.Tensor:
        """At least `size` bytes, aligned to 512."""
        block = self._blocks.get((device, stream))
        if block is None or block.nbytes < size:
            self._blocks.pop((device, stream), None)
            block = None  # given back first; work that is under way on this stream comes before whatever gets it next
            block = self._blocks[device, stream] = torch.empty(size, dtype=torch.uint8, device=device)
        return block

    def release(self) -> None:
        """Gives all blocks back to torch's allocator."""
        self._blocks.clear()


@cache
def graph_memory() -> GraphMemory:
    """That of the process."""
    return GraphMemory()


class _Node:
    """A kernel of an instantiated graph, and its parameters as they are there now."""

    def __init__(self, node: int, cells: Sequence[int], places: Sequence[tuple[int, int, int]], like: KernelNode, extent: int, row: Any):
        self.node, self.places, self.like, self.extent, self.row = node, places, like, extent, row  # places: (cell, table slot, offset)
        self.cells = (ctypes.c_uint64 * len(cells))(*cells)
        base = ctypes.addressof(self.cells)
        self.pointers = (ctypes.c_void_p * len(cells))(*[base + 8 * i for i in range(len(cells))])
        self.params = KernelNode(like.function, (extent, 1, 1), (row["threads"], 1, 1), row["shared"], ctypes.addressof(self.pointers), None,
                                 like.kernel, like.context)

    def copy(self) -> _Node:
        return _Node(self.node, self.cells[:], self.places, self.like, self.extent, self.row)

    def update(self, table: Sequence[int]) -> bool:
        """Brings the parameters up to date; False if they are."""
        changed = False
        for cell, slot, offset in self.places:
            address = table[slot] + offset
            if self.cells[cell] != address:
                self.cells[cell], changed = address, True
        return changed


class _Variant:
    """An instantiated graph. `table` has the addresses that are in it."""

    def __init__(self, executable: int, nodes: list[_Node], table: list[int]):
        self.executable, self.nodes, self.table = executable, nodes, table


class _Captured:
    """A captured graph, its kernels with the parameters that they were captured with, and its variants, the one used last first."""

    def __init__(self, graph: int, nodes: list[_Node], first: _Variant):
        self.graph, self.nodes, self.variants = graph, nodes, [first]
        self.lock = threading.Lock()
        self.gone = False


class Replay:
    """See the module docstring. `captures`, `patches` and `launches` count."""

    def __init__(self, function: CudaFunction, inputs: int):
        self.function, self.inputs = function, inputs
        self.on = function.library.on
        self.captures = self.patches = self.launches = 0
        self.off = ""  # why graphs are not used any more
        self._captured: dict[Any, _Captured] = {}
        self._warm: set[Any] = set()
        self._lock = threading.Lock()
        self._error = ctypes.c_int32.from_address(self.on.error.data_ptr())
        self._mapped = {name for name, row in function.library.program["kernels"].items() if row.get("descriptors")}
        rigid = sorted({slot for step in function.steps if step[0] != "launch" or step[1] in self._mapped for slot in _slots(step)})
        self._rigid: Callable[[list[int]], Any] = itemgetter(*rigid) if rigid else lambda table: None

    def __call__(self, pointers: list[int], sizes: Any) -> int:
        """Launches the program on the current stream. 0, or a code as the native function gives; CudaError if the driver fails."""
        if self._error.value:
            return self.function.library.take_error()
        stream = self.function.stream()
        if self.off or self.on.capturing():  # into a graph of the user's: its addresses are the user's business
            return self._native(pointers, sizes, stream)
        table = [*pointers, graph_memory().get(self.on.device, stream, sizes.arena) if sizes.arena else 0]
        key = (sizes.values, stream, self._rigid(table))
        captured = self._captured.get(key)
        if captured is None:
            if (sizes.values, stream) not in self._warm:
                self._warm.add((sizes.values, stream))
                return self._native(pointers, sizes, stream)
            if any(p & 15 for p in table[:self.inputs]):
                return MISALIGNED
            try:
                captured = self._capture(key, table, sizes)
            except CudaError as error:
                self._give_up(str(error))
            if captured is None:
                return self._native(pointers, sizes, stream)
        with captured.lock:
            if captured.gone:
                return self._native(pointers, sizes, stream)
            variant = captured.variants[0]
            if variant.table != table:
                if any(p & 15 for p in table[:self.inputs]):
                    return MISALIGNED
                variant = self._variant(captured, table)
            code = self.on.launch_graph(variant.executable, stream)
        if code:  # this thread has no context, for one: the native code sees to that
            return self._native(pointers, sizes, stream)
        self.launches += 1
        return 0

    def _variant(self, captured: _Captured, table: list[int]) -> _Variant:
        """The graph with these addresses: one that has them, a new one, or the one used longest ago with new parameters. It is the first then."""
        variants = captured.variants
        at = next((i for i, v in enumerate(variants) if v.table == table), None)
        if at is not None:
            variant = variants.pop(at)
        elif len(variants) < VARIANTS:
            variant = _Variant(self.on.instantiate(captured.graph), [n.copy() for n in captured.nodes], [])
            self._patch(variant, table)
        else:
            variant = variants.pop()
            self._patch(variant, table)
        variants.insert(0, variant)
        return variant

    def _patch(self, variant: _Variant, table: list[int]) -> None:
        for node in variant.nodes:
            if node.update(table):
                self.on.set_node(variant.executable, node.node, node.params)
                self.patches += 1
        variant.table = list(table)

    def _native(self, pointers: Sequence[int], sizes: Any, stream: int) -> int:
        """As without graphs: temporary memory of this call alone, since launches of several threads may mix."""
        arena = torch.empty(sizes.arena, dtype=torch.uint8, device=self.on.device) if sizes.arena else None
        return self._run([*pointers, 0 if arena is None else arena.data_ptr()], sizes, stream)

    def _run(self, table: Sequence[int], sizes: Any, stream: int) -> int:
        array = (ctypes.c_uint64 * len(table))(*table)
        side = self.function.borrow()
        code = self.function.native(ctypes.addressof(array), sizes.address, stream, self.function.plan(sizes.address),
                                    side.address if side else 0, 0, self.function.count)
        self.function.give_back(side)
        return code

    def _give_up(self, reason: str) -> None:
        self.off = reason
        warnings.warn(f"'{self.function.name}' goes on without CUDA graphs: {reason}", RuntimeWarning, stacklevel=4)

    # -- making a graph

    def _capture(self, key: Any, table: list[int], sizes: Any) -> _Captured | None:
        with self._lock:
            if key in self._captured:
                return self._captured[key]
            if self.captures >= PATIENCE and self.launches < 4 * self.captures:
                self._give_up(f"{self.captures} captures for {self.launches} replays; the addresses of what its matrix products use keep changing")
                return None
            found: dict[int, int] = {}
            graph = self.on.capture(lambda stream: self._launch_into(table, sizes, stream, found))
            nodes = self._nodes(found, table, sizes.values)
            made = _Captured(graph, nodes, _Variant(self.on.instantiate(graph), [n.copy() for n in nodes], list(table)))
            self.captures += 1
            if len(self._captured) >= LIMIT:
                self._destroy(self._captured.pop(next(iter(self._captured))))
            self._captured[key] = made
            return made

    def _destroy(self, captured: _Captured) -> None:
        with captured.lock:
            captured.gone = True
            self.on.destroy_graph(captured.graph, [v.executable for v in captured.variants])

    def _launch_into(self, table: Sequence[int], sizes: Any, stream: int, found: dict[int, int]) -> None:
        """Launches step by step, and notes for each of our kernels that takes addresses as they are which node it became."""
        function = self.function
        array = (ctypes.c_uint64 * len(table))(*table)
        side = function.borrow()
        streams = (stream, side.stream if side else stream)
        plan = function.plan(sizes.address)
        for i, step in enumerate(function.steps):
            code = function.native(ctypes.addressof(array), sizes.address, stream, plan, side.address if side else 0, i, i + 1)
            if code:  # a stream whose capture has failed is of no use any more
                raise function.failure(code) if code >= MISALIGNED else CudaError("a check in a kernel failed")
            if self._is_flexible(step) and self._extent(step, sizes.values) > 0:
                found[i] = self.on.captured_node(streams[step[3]])
        function.give_back(side)

    def _is_flexible(self, step: Sequence[Any]) -> bool:
        return step[0] == "launch" and step[1] not in self._mapped

    def _extent(self, step: Sequence[Any], values: Sequence[int]) -> int:
        """Programs of a launch."""
        extent = 1
        for g in self.function.library.program["kernels"][step[1]]["grid"]:
            extent *= evaluate_size(compile_size(g, self.function.library.positions), values)
        return extent

    def _nodes(self, found: Mapping[int, int], table: Sequence[int], values: Sequence[int]) -> list[_Node]:
        """Our own kernels among the graph's, from the nodes that steps became."""
        library, nodes = self.function.library, []
        for i, node in found.items():
            step = self.function.steps[i]
            params = self.on.node_params(node)
            if params.function != library.entries[step[1]]:
                raise CudaError(f"the captured graph has another node in the place of '{step[1]}'")
            row = library.program["kernels"][step[1]]
            cells, places = self._cells(row, step[2], table, values)
            nodes.append(_Node(node, cells, places, params, self._extent(step, values), row))
        return nodes

    def _cells(self, row: Any, buffers: Sequence[Any], table: Sequence[int], values: Sequence[int]) -> tuple[list[int], Any]:
        """The parameters of a launch, and which of them are addresses from the table: (cell, slot, offset)."""
        library = self.function.library
        cells: list[int] = []
        places: list[tuple[int, int, int]] = []
        for kind, slot, offset in buffers:
            moved = evaluate_size(compile_size(offset, library.positions), values)
            if kind == "table":
                places.append((len(cells), slot, moved))
            base = table[slot] if kind == "table" else library.constants[slot].data_ptr()
            cells.append(base + moved)
        cells += [values[library.positions[s]] for s in row["symbols"]]
        cells += [self.on.error.data_ptr()] if row["checks"] else []
        return cells + [0] * (row["parameters"] - len(cells)), places

    def __del__(self) -> None:
        for captured in self.__dict__.get("_captured", {}).values():
            try:
                self._destroy(captured)
            except CudaError:  # the context may be gone at exit
                return


def _slots(step: Sequence[Any]) -> list[int]:
    """The table slots that a copy, a product or a kernel uses."""
    if step[0] == "wait":
        return []
    places = step[1].values() if step[0] == "product" else step[2] if step[0] == "launch" else step[1:3]
    return [slot for kind, slot, _ in places if kind == "table"]
