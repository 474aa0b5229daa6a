"""Host functions -> lists of launches, as `runtime/cuda.py` runs them.

    program = build_program(module)         # a module at the host level
    program.functions["main_0"]             # [Launch | Copy | MatMul | Wait, ...] in order

Functions have the names and the table that every backend agrees on (`compiler/manifest.py`): each maximal run of launches
and copies between
externs is one function, NAME_0, NAME_1, ...; NAME_pack_ID has the cached launches that fill persistent buffer ID. The
table holds the function's
arguments, the persistent buffers by number, and the arena last. Constants are buffers of the library itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...ir.core import Block, IRError, Operation, Region, Value
from ...ir.expr import Dim, ceildiv, free_symbols, product, sym
from ...ir.expr_json import expr_to_json
from ...ir.ranges import delinearize
from ...ir.types import BufferType, TileType, element_type, index

__all__ = ["Copy", "Launch", "Loop", "MatMul", "Place", "Program", "Step", "Wait", "build_program"]

ALIGNMENT = 16
COPY_TILE = 1024


@dataclass(frozen=True)
class Place:
    """An address: `slot` of the table (or constant number `slot`) plus `offset` bytes. `aligned`: always a multiple of 16
    (an input, and what an operator gives, is taken to be)."""

    slot: int
    offset: Dim
    constant: bool = False
    aligned: bool = True

    def to_json(self) -> list[Any]:
        return ["constant" if self.constant else "table", self.slot, expr_to_json(self.offset)]


@dataclass(frozen=True)
class Launch:
    """A kernel on buffers; grid and symbols are those of the kernel. `line` is where in the user's program it comes from."""

    kernel: str
    buffers: tuple[Place, ...]
    line: str = ""
    stream: int = 0


@dataclass(frozen=True)
class Copy:
    """`bytes` bytes from one place to another: layouts agree."""

    source: Place
    target: Place
    bytes: Dim
    line: str = ""
    stream: int = 0


@dataclass(frozen=True)
class Wait:
    """What is launched on `stream` from here on waits for all that was launched on the other one before. 0 is the caller's stream."""

    stream: int


@dataclass(frozen=True)
class MatMul:
    """A matrix product by cuBLASLt: d = act(a @ b + bias + c). `shape` describes it (JSON data, see `host.library`)."""

    shape: Mapping[str, Any]
    a: Place
    b: Place
    d: Place
    workspace: Place
    bias: Place | None = None
    c: Place | None = None
    line: str = ""
    stream: int = 0

    @property
    def places(self) -> dict[str, Place]:
        """Those that there are, by name."""
        return {n: p for n in ("a", "b", "d", "bias", "c", "workspace") if (p := getattr(self, n)) is not None}


@dataclass(frozen=True)
class Loop:
    """`trips` calls of the function `body` (see `host.loop`), for programs that run on CPU memory (`steps.py`): a device has none.

    `types` are those of `buffers`. `results` says of each of the body's results what it is: ("buffer" or "input", its argument's number) or
    ("same", an earlier result's number). `arena`: bytes that the body needs.
    """

    body: str
    buffers: tuple[Place, ...]
    types: tuple[BufferType, ...]
    carried: int
    sliced: int
    reversed_operands: tuple[int, ...]
    reversed_results: tuple[int, ...]
    trips: Dim
    outputs: int
    results: tuple[tuple[str, int], ...]
    arena: Dim
    line: str = ""


Step = Launch | Copy | MatMul | Wait


@dataclass
class Program:
    """`kernels` are the `tile.kernel`s that are launched, copies between layouts included.

    By function: `functions` has its steps, `symbols` the size symbols in the order of their values, `inputs` the slots of the program's inputs
    that it uses and takes to be aligned.
    """

    kernels: dict[str, Operation] = field(default_factory=dict)
    functions: dict[str, list[Step]] = field(default_factory=dict)
    constants: list[bytes] = field(default_factory=list)
    symbols: dict[str, tuple[str, ...]] = field(default_factory=dict)
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def divisible(self, kernel: str) -> tuple[bool, ...]:
        """For each buffer of a kernel: whether every launch passes an address that is a multiple of 16."""
        rows = [s.buffers for steps in self.functions.values() for s in steps if isinstance(s, Launch) and s.kernel == kernel]
        return tuple(all(p.aligned for p in column) for column in zip(*rows, strict=True))


def build_program(module: Operation, loops: bool = False) -> Program:
    """IRError for host ops that are not fully planned, or unknown; `loops` allows `host.loop`."""
    kernels = {op["sym_name"]: op for op in module.body if op.name == "tile.kernel"}
    functions = {op["sym_name"]: op for op in module.body if op.name == "func"}
    program = Program()
    for func in functions.values():
        _Builder(func, kernels, program, functions if loops else {}).run()
    return program


class _Builder:
    def __init__(self, func: Operation, kernels: Mapping[str, Operation], program: Program, bodies: Mapping[str, Operation]):
        self.func, self.kernels, self.program, self.bodies = func, kernels, program, bodies
        self.places: dict[Value, Place] = {}
        ids = [int(op["id"]) for op in func.body if op.name == "host.persistent"]
        self.arguments, self.persistent = len(func.body.args), max(ids, default=-1) + 1
        self.copies: dict[tuple[BufferType, BufferType], str] = {}

    def run(self) -> None:
        func, name = self.func, self.func["sym_name"]
        kinds = [a.get("kind", "input") for a in func["arg_attrs"]] or ["input"] * self.arguments
        for a in func.body.args:
            self.places[a] = Place(a.index, 0)  # results of operators too: `runtime/segments.py` sees to it
        given = {a.index for a, kind in zip(func.body.args, kinds, strict=True) if kind not in ("output", "extern", "late")}
        functions: dict[str, list[Step]] = {}
        steps: list[Step] = []
        packs: dict[int, list[Step]] = {}
        for op in [*func.body]:
            if op.name in _PLACES:
                self.places[op.result] = _PLACES[op.name](self, op)
            elif op.name == "host.launch" and op["cached"]:
                packs.setdefault(self._packed_id(op), []).append(self._launch(op))
            elif op.name == "host.launch":
                steps.append(self._launch(op))
            elif op.name == "host.copy":
                steps.append(self._copy(op))
            elif op.name == "host.library":
                steps.append(self._product(op))
            elif op.name == "host.wait":
                steps.append(Wait(op["stream"]))
            elif op.name == "host.loop" and op["body"].name in self.bodies:
                steps.append(self._loop(op))  # type: ignore[arg-type]  # only where `loops` was asked for
            elif op.name == "host.extern":
                if steps:
                    functions[f"{name}_{len(functions)}"], steps = steps, []
            elif op.name != "return":
                raise IRError(f"'{op.name}' cannot stand in a planned host function")
        if steps:
            functions[f"{name}_{len(functions)}"] = steps
        functions |= {f"{name}_pack_{i}": launches for i, launches in packs.items()}
        for key, body in functions.items():
            self.program.functions[key] = body
            self.program.symbols[key] = tuple(func["symbols"])
            self.program.inputs[key] = tuple(sorted({p.slot for s in body for p in _places(s) if not p.constant} & given))

    # -- addresses

    def _slot(self, op: Operation) -> Place:
        return Place(self.arguments + self.persistent, op["offset"])

    def _persistent(self, op: Operation) -> Place:
        return Place(self.arguments + op["id"], 0)

    def _constant(self, op: Operation) -> Place:
        self.program.constants.append(op["value"].data)
        return Place(len(self.program.constants) - 1, 0, constant=True)

    def _view(self, op: Operation) -> Place:
        base = self.places[op.operands[0]]
        offset = op["offset"] * element_type(op.operands[0].type).bytes  # the offset counts elements of the source
        aligned = isinstance(offset, int) and offset % ALIGNMENT == 0
        return Place(base.slot, base.offset + offset, base.constant, base.aligned and aligned)

    def _packed_id(self, op: Operation) -> int:
        made = [v.defining_op["id"] for v in op.operands[len(op.operands) - op["outputs"] :] if v.defining_op is not None]
        if not made:
            raise IRError("a cached 'host.launch' must write a 'host.persistent'")
        return int(min(made))

    # -- steps

    def _launch(self, op: Operation) -> Launch:
        name = op["kernel"].name
        kernel = self.kernels.get(name)
        if kernel is None or len(kernel.body.args) != len(op.operands):
            raise IRError(
                f"'host.launch' of '@{name}' on {len(op.operands)} buffers, but there is no such kernel"
                if kernel is None
                else f"kernel '@{name}' takes {len(kernel.body.args)} buffers, but is launched on {len(op.operands)}"
            )
        self.program.kernels[name] = kernel
        return Launch(name, tuple(self.places[v] for v in op.operands), _line(op) or _line(kernel), op["stream"])

    def _product(self, op: Operation) -> MatMul:
        if op["library"] != "cublaslt":
            raise IRError(f"this backend cannot call the library '{op['library']}'")
        shape = op["shape"]
        places = dict(zip(op["roles"], (self.places[v] for v in op.operands), strict=True))
        sizes = {name: element_type(v.type).bytes for name, v in zip(op["roles"], op.operands, strict=True)}
        for name in ("a", "b"):
            p, moved = places[name], shape[f"offset_{name}"] * sizes[name]
            places[name] = Place(p.slot, p.offset + moved, p.constant, p.aligned and isinstance(moved, int) and moved % ALIGNMENT == 0)
        align = {name: ALIGNMENT if places[name].aligned else sizes[name] for name in ("a", "b", "d")}
        align["c"] = ALIGNMENT if "c" not in places or places["c"].aligned else sizes["c"]
        return MatMul({**_json(shape), "align": align}, **places, line=_line(op), stream=op["stream"])

    def _loop(self, op: Operation) -> Loop:
        body = self.bodies[op["body"].name]
        results = tuple((a["kind"], a["result"] if a["kind"] == "same" else a["arg"]) for a in body["result_attrs"])
        types = tuple(v.type for v in op.operands)
        return Loop(f"{body['sym_name']}_0", tuple(self.places[v] for v in op.operands), types, op["carried"], op["sliced"],  # type: ignore[arg-type]
                    tuple(op["reversed_operands"]), tuple(op["reversed_results"]), op["trips"], op["outputs"], results,
                    body["stats"].get("arena_bytes", 0), _line(op))

    def _copy(self, op: Operation) -> Launch | Copy:
        source, target = (v.type for v in op.operands)
        assert isinstance(source, BufferType) and isinstance(target, BufferType)
        places = self.places[op.operands[0]], self.places[op.operands[1]]
        if source.layout == target.layout == BufferType(source.shape, source.dtype).layout:
            return Copy(*places, source.numel * source.dtype.bytes, _line(op), op["stream"])
        if (source, target) not in self.copies:
            name = f"copy_layout{len(self.copies)}"
            while name in self.kernels or name in self.program.kernels:
                name += "_"
            self.copies[source, target] = name
            self.program.kernels[name] = copy_kernel(name, source, target, self.func["symbols"])
        return Launch(self.copies[source, target], places, _line(op), op["stream"])


def _places(step: Step | Loop) -> tuple[Place, ...]:
    """The addresses that a step uses."""
    if isinstance(step, Wait):
        return ()
    if isinstance(step, (Launch, Loop)):
        return step.buffers
    return (step.source, step.target) if isinstance(step, Copy) else tuple(step.places.values())


def _line(op: Operation) -> str:
    return str(op.location) if op.location.file else ""


def _json(value: Any) -> Any:
    """Size expressions within lists and dicts as JSON."""
    if isinstance(value, (tuple, list)):
        return [_json(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _json(v) for k, v in value.items()}
    return value if isinstance(value, (str, bool)) else expr_to_json(value)


_PLACES = {
    "host.slot": _Builder._slot,
    "host.persistent": _Builder._persistent,
    "host.constant": _Builder._constant,
    "host.view": _Builder._view,
}


def copy_kernel(name: str, source: BufferType, target: BufferType, ranges: Mapping[str, Any]) -> Operation:
    """A kernel that copies elements between two layouts of one shape."""
    block = Block([source, target], ["source", "target"])
    pid = block.append(Operation.create("tile.program_id", (), {"axis": 0}, [index])).result
    linear = sym("i0") * COPY_TILE + sym("t0")
    at = delinearize(linear, source.shape)
    mask = ((linear, source.numel),)

    def offset(strides: tuple[Dim, ...]) -> Dim:
        total: Dim = 0
        for i, s in zip(at, strides, strict=True):
            total = total + i * s
        return total

    attrs = {
        "offset": offset(source.layout),
        "shape": (COPY_TILE,),
        "mask": mask,
        "other": {"float": 0.0, "bool": False}.get(source.dtype.kind, 0),
    }
    tile = block.append(
        Operation.create("tile.load", [block.args[0], pid], attrs, [TileType((COPY_TILE,), source.dtype)])
    ).result
    block.append(Operation.create("tile.store", [block.args[1], tile, pid], {"offset": offset(target.layout), "mask": mask}))
    block.append(Operation.create("tile.yield"))
    symbols = sorted({s for e in (*source.shape, *source.layout, *target.layout) for s in free_symbols(e)})
    return Operation.create(
        "tile.kernel",
        (),
        {
            "sym_name": name,
            "grid": (ceildiv(product(source.shape), COPY_TILE),),
            "symbols": tuple(symbols),
            "outputs": 1,
            "bounds": {s: tuple(ranges[s]) for s in symbols if s in ranges},
        },
        (),
        [Region([block])],
    )
