"""Small kernels that do not depend on each other become one launch, each with programs of its own (GPUs).

A launch that keeps few multiprocessors busy, or that is over in microseconds, costs more than its work: the next one waits for its last program,
and for the device to start it. The query, key and value products of a decoder's token, the two of its gate, the folded statistics of fifty batch
norms, the second halves of split sums: kernels that run side by side. Merged, their programs share the device, and one start and one end are
left of several.

Two launches are merged if neither needs the other's results, even by way of others, if both are small (SMALL bytes; products, which
keep their registers for a long loop, PRODUCT bytes, of which they make MADE, and only with products of the same warps), and if at most WINDOW
launches lie between them. What is written in place, a cache, no other part of a kernel reads. Launches of long chains that are to run on two
streams are merged within their chain alone.
Elementwise kernels that read nothing but arguments (and a few numbers) and make nothing but what the caller gets are merged whatever their size: the
steps of an optimizer over a hundred parameters. Nobody waits for them within the program, so that no cached result and no memory is lost by
moving them, and every launch saved is a device that does not run empty (two to four microseconds). Large ones and small ones stay apart: a merged
kernel holds as many registers as its hungriest part needs (a step's powers, beside four thousand numbers of a bias: 113 for a loop that wants 40),
and the loads of a large one need the programs that would not fit.
Before: `tile` has made kernels. After: the merged ones have a `tile.part` for each of theirs; kernels that nobody launches are gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..ir import Block, Builder, Operation, Region, SymbolRef, Value
from ..ir.expr import product
from ..ir.passes import Pass, PassContext, register
from .tiling.lower import KernelNames
from .topology import topological_sort
from .two_streams import lanes

__all__ = ["MergeLaunches"]

SMALL = 2 << 20
"""Bytes that a kernel moves which is over before the device is busy."""
PRODUCT = 64 << 20
"""Bytes for products: at 3 TB/s, 20 microseconds."""
ROWS = 16 << 20
"""Bytes for kernels whose programs reduce a row each (products with a vector)."""
MADE = 4 << 20
"""Bytes that such a kernel makes: results of a merged launch are all alive at once."""
WINDOW = 48
PARTS = 64
"""Most kernels in one, and most buffers that one takes."""
BUFFERS = 160


@register
@dataclass(frozen=True)
class MergeLaunches(Pass):
    """See the module docstring. `streams`: 2 if chains may run on two (`two_streams.py`); `replayed`: from CUDA graphs."""

    name: ClassVar[str] = "merge-launches"
    streams: int = 1
    replayed: bool = False

    def run(self, module: Operation, ctx: PassContext) -> None:
        kernels = {op["sym_name"]: op for op in module.body if op.name == "tile.kernel"}
        names = KernelNames.of(module)
        merged = 0
        for func in [f for f in module.body if f.name == "func"]:
            apart = lanes(func, kernels, ctx.target, self.replayed) if self.streams > 1 else {}
            groups = [g for g in _Finder(func, kernels, ctx.target.multiprocessors, apart).groups() if len(g.members) > 1]
            for g in groups:
                _merge(func, g.members, kernels, names)
                merged += len(g.members)
            if groups:
                topological_sort(func.body)
        launched = {op["kernel"].name for op in module.walk() if op.name == "tile.launch"}
        for op in list(module.body):
            if op.name == "tile.kernel" and op["sym_name"] not in launched:
                op.erase()
        ctx.remark("done", f"{merged} launches merged into fewer")


@dataclass(eq=False)
class _Group:
    """Launches that may be one; `kind` says which others may join."""

    kind: tuple[object, ...]
    members: list[Operation]
    last: int


class _Finder:
    def __init__(self, func: Operation, kernels: dict[str, Operation], multiprocessors: int,
                 lanes: Mapping[Operation, tuple[int, int]]):
        self.func, self.kernels, self.room, self.lanes = func, kernels, max(1, multiprocessors), lanes
        self.of: dict[Operation, _Group] = {}

    def groups(self) -> list[_Group]:
        """Greedily, in program order: each launch joins the nearest group that it does not depend on."""
        found: list[_Group] = []
        position = {op: i for i, op in enumerate(self.func.body)}
        for op, at in position.items():
            kind = self._kind(op)
            if kind is None:
                continue
            kind = (*kind, self.lanes.get(op))
            home = next((g for g in self._near(found, kind, at) if self._fits(g, op) and not self._depends(op, g, position)), None)
            if home is None:
                home = _Group(kind, [], at)
                found.append(home)
            home.members.append(op)
            home.last = at
            self.of[op] = home
        return found

    def _kind(self, op: Operation) -> tuple[object, ...] | None:
        """What a launch can be merged with; None: nothing."""
        kernel = self.kernels.get(op["kernel"].name) if op.name == "tile.launch" and not op["cached"] else None
        if kernel is None or kernel["symbols"] or not all(isinstance(n, int) for n in kernel["grid"]):
            return None
        if any(o.name in ("tile.part", "tile.alloca") for o in kernel.walk()) or not isinstance(kernel["bytes"], int):
            return None
        made = sum(r.type.numel * r.type.dtype.bytes for r in op.results)  # type: ignore[attr-defined]
        little = isinstance(made, int) and made <= MADE
        if any(o.name == "tile.dot" for o in kernel.walk()):
            few = little and product(kernel["grid"]) <= 2 * self.room  # type: ignore[operator]
            return ("product", kernel["num_warps"], kernel["num_stages"]) if kernel["bytes"] <= PRODUCT and few else None
        if _is_elementwise(kernel) and self._on_arguments(op):
            return ("arguments", kernel["num_warps"], kernel["bytes"] <= SMALL)
        if kernel["bytes"] <= SMALL:
            return ("loops", kernel["num_warps"])
        rows = any(o.name == "tile.reduce" for o in kernel.walk()) and not any(o.name == "tile.for" for o in kernel.walk())
        return ("rows", kernel["num_warps"]) if rows and little and kernel["bytes"] <= ROWS else None

    def _on_arguments(self, op: Operation) -> bool:
        """It reads arguments and single numbers, and makes what is returned or written to arguments."""
        reads = all(v.defining_op is None or v.type.numel == 1 for v in op.operands)  # type: ignore[attr-defined]
        return reads and all(u.name in ("tensor.assign", "return") for r in op.results for u in r.users)

    def _near(self, groups: Sequence[_Group], kind: tuple[object, ...], at: int) -> Iterator[_Group]:
        return (g for g in reversed(groups) if g.kind == kind and at - g.last <= WINDOW and len(g.members) < PARTS)

    def _fits(self, g: _Group, op: Operation) -> bool:
        """Buffers enough, and nobody reads what another one writes to in place."""
        given = [(set(m.operands), {m.operands[i] for i, _ in self.kernels[m["kernel"].name]["updates"]}) for m in (*g.members, op)]
        if any(given[-1][0] & written or given[-1][1] & read for read, written in given[:-1]):
            return False
        return len({v for m in (*g.members, op) for v in (*m.operands, *m.results)}) <= BUFFERS

    def _depends(self, op: Operation, g: _Group, position: dict[Operation, int]) -> bool:
        """Some operand of `op` is made from a result of `g`, groups counting as one op."""
        first = min(position[m] for m in g.members)
        stack, seen = [op], {op}
        while stack:
            for v in stack.pop().operands:
                maker = v.defining_op
                if maker is None or maker in seen:
                    continue
                home = self.of.get(maker)
                if home is g:
                    return True
                around = home.members if home is not None else [maker]
                seen.update(around)
                if max(position[m] for m in around) > first:  # nothing before the group depends on it
                    stack += around
        return False


def _is_elementwise(kernel: Operation) -> bool:
    return not any(o.name in ("tile.for", "tile.reduce", "tile.scan") for o in kernel.walk())


def _merge(func: Operation, launches: list[Operation], kernels: dict[str, Operation], names: KernelNames) -> None:
    """One launch of one kernel in the place of several. Launches of equal kernels become neighbours: backends print them once."""
    kinds = list(dict.fromkeys(op["kernel"].name for op in launches))
    launches = sorted(launches, key=lambda op: kinds.index(op["kernel"].name))
    operands = list(dict.fromkeys(v for op in launches for v in op.operands))
    results = [r for op in launches for r in op.results]
    kernel = _merged_kernel(launches, kernels, operands, results)
    name = names.intern(kernel, func)
    kernels.setdefault(name, kernel)
    position = {op: i for i, op in enumerate(func.body)}
    ready = max((position[v.defining_op] for v in operands if v.defining_op is not None), default=-1)
    place = max(launches, key=position.__getitem__) if ready > position[launches[0]] else launches[0]
    made = Builder(func.body, place, launches[0].location).create("tile.launch", operands, {"kernel": SymbolRef(name)}, [r.type for r in results])
    for old, new in zip(results, made.results, strict=True):
        new.name = old.name
        old.replace_all_uses_with(new)
    for op in launches:
        op.erase()


def _merged_kernel(launches: Sequence[Operation], kernels: dict[str, Operation], operands: Sequence[Value], results: Sequence[Value]) -> Operation:
    parts = [kernels[op["kernel"].name] for op in launches]
    types: dict[Value, object] = {}
    for op, kernel in zip(launches, parts, strict=True):
        types.update(zip((*op.operands, *op.results), (a.type for a in kernel.body.args), strict=True))
    block = Block([types[v] for v in (*operands, *results)],  # type: ignore[misc]
                  [f"in{i}" for i in range(len(operands))] + [f"out{i}" for i in range(len(results))])
    argument = dict(zip((*operands, *results), block.args, strict=True))
    first, inplace, updates = 0, [], []
    readers = [set(op.operands) for op in launches]
    for k, (op, kernel) in enumerate(zip(launches, parts, strict=True)):
        outer = (*op.operands, *op.results)
        body = Block()
        renamed: dict[Value, Value] = {a: argument[v] for a, v in zip(kernel.body.args, outer, strict=True)}
        for inner in kernel.body:
            body.append(inner.clone(renamed))
        count = product(kernel["grid"])
        assert isinstance(count, int)
        Builder(block, None, kernel.location).create("tile.part", [], {"first": first, "grid": kernel["grid"]}, [], [Region([body])])
        first += count
        for i, j in kernel["inplace"]:  # unless another part reads the old contents
            if not any(outer[i] in reads for n, reads in enumerate(readers) if n != k):
                inplace.append((argument[outer[i]].index, argument[outer[j]].index))  # type: ignore[attr-defined]
        updates += [(argument[outer[i]].index, argument[outer[j]].index) for i, j in kernel["updates"]]  # type: ignore[attr-defined]
    builder = Builder(block, None, launches[0].location)
    builder.create("tile.yield")
    shared = sorted({str(k["sym_name"]) for k in parts})
    attrs = {"sym_name": f"{shared[0]}_and_{len(parts) - 1}_more", "grid": (first,), "symbols": (), "outputs": len(results),
             "num_warps": max(k["num_warps"] for k in parts), "num_stages": max(k["num_stages"] for k in parts),
             "flops": sum(k["flops"] for k in parts), "bytes": sum(k["bytes"] for k in parts)}
    if inplace:
        attrs["inplace"] = tuple(inplace)
    if updates:
        attrs["updates"] = tuple(updates)
    attrs["provenance"] = tuple(dict.fromkeys(line for k in parts for line in k["provenance"]))
    return Operation.create("tile.kernel", (), attrs, (), [Region([block])], launches[0].location)
