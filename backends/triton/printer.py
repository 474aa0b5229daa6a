"""`tile.kernel` -> Triton source, one self-contained file per kernel.

    source = print_kernel(kernel)
    source.text          # Python text that defines `source.name` and the helpers that it calls
    source.signature     # argument name -> type: buffers, size symbols (i64), then `err` (*i32) if an index is checked

Programs are numbered row-major over the grid, the last axis fastest, and launched on a one-dimensional grid. Index
arithmetic is 32 bits wide where sizes are constant and small, else 64. `err` points to one int32: a checked access that fails
stores 1 there.

Threads of a program see each other's writes to memory only after a barrier: one is put between a store and a load (or load
and store) of one buffer.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ...ir.core import IRError, Operation, Value
from ...ir.expr import Dim, as_int, free_symbols, product
from ...ir.ranges import lower_bound, upper_bound
from ...ir.types import BufferType, DType, TileType, element_type
from .arith import arith_text, literal, rounded_to_bf16
from .descriptors import TensorMap
from .dtypes import pointer, tl_type
from .expressions import IndexText, Range
from .helpers import HELPERS, used_helpers
from .narrow import Narrow
from .parts import Run, equal_runs, picked
from .reductions import KINDS, REDUCTIONS, SCANS

__all__ = ["KernelSource", "Printer", "identifier", "loaded_buffers", "print_kernel", "provenance", "stored_buffers"]

SMALL = 1 << 30
"""Sizes below this leave room for a tile's overhang in 32 bits."""
ERROR = "err"
GDC_IMPORT = "from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait\n"


@dataclass(frozen=True)
class KernelSource:
    """A kernel as Triton text. `tile` is the number of elements of its largest tile, `dot` whether it multiplies matrices;
    `num_warps` and `num_stages` are 0 where the compiler may choose. `descriptors` are the last parameters.
    `registers`, if not 0, says that it is Gluon, and bounds those of a thread; then `programs` of them are launched, whatever the grid.
    `dependent`: it may be launched before the kernel in front of it has ended (it waits by itself). `early`: it reads weights before it waits, so
    only behind a kernel of the same program."""

    name: str
    text: str
    signature: dict[str, str]
    buffers: int
    symbols: tuple[str, ...]
    checks: int
    tile: int
    dot: bool
    num_warps: int = 0
    num_stages: int = 0
    descriptors: tuple[TensorMap, ...] = ()
    registers: int = 0
    programs: int = 0
    dependent: bool = False
    early: bool = False


def print_kernel(kernel: Operation, aligned: Sequence[bool] = (), dependent: bool = False) -> KernelSource:
    """The Triton source of a `tile.kernel`. `aligned`: where the target reads matrices by tensor maps, which buffers always start at a multiple of
    16 bytes. `dependent`: for a programmatic launch, of targets that have those. IRError names an op that Triton cannot express."""
    return Printer(kernel, aligned=tuple(aligned), dependent=dependent).run()


@dataclass
class Printer:
    """The plain form of a kernel; `warp_groups.py` has another one for streams."""

    kernel: Operation
    lines: list[str] = field(default_factory=list)
    names: dict[Value, str] = field(default_factory=dict)
    ranges: dict[Value, Range] = field(default_factory=dict)
    taken: set[str] = field(default_factory=lambda: {ERROR, "tl", "triton", "libdevice", "float", "gdc_wait", "gdc_launch_dependents", *HELPERS})
    aranges: dict[tuple[int, int, int], str] = field(default_factory=dict)
    written: set[Value] = field(default_factory=set)  # buffers stored to since the last barrier
    read: set[Value] = field(default_factory=set)  # buffers loaded from since the last barrier
    narrow: Narrow = field(default_factory=Narrow)
    checks: int = 0
    indent: int = 1
    number: str = ""  # of a program within the part being printed, if there is one
    aligned: tuple[bool, ...] = ()
    dependent: bool = False
    maps: dict[tuple[object, ...], TensorMap] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kernel = self.kernel
        self.taken |= set(kernel["symbols"])
        self.sizes: dict[str, Range] = {s: tuple(r) for s, r in kernel["bounds"].items()}  # type: ignore[misc]
        self.wide = bool(kernel["symbols"]) or not _is_small(kernel)
        self.index_type = "tl.int64" if self.wide else "tl.int32"
        self.grid: Sequence[Dim] = kernel["grid"]
        self.both = stored_buffers(kernel.body) & loaded_buffers(kernel.body)
        self.waited = not self.dependent  # for the kernel in front: before the first access to memory
        self.runs = {run.parts[0]: run for run in equal_runs(kernel, self.aligned)}

    def run(self) -> KernelSource:
        kernel = self.kernel
        symbols: tuple[str, ...] = tuple(kernel["symbols"])
        name = identifier(kernel["sym_name"])
        self.taken.add(name)
        signature: dict[str, str] = {}
        for arg in kernel.body.args:
            signature[self._name(arg, "p")] = pointer(element_type(arg.type))
        signature |= dict.fromkeys(symbols, "i64")
        self._block(kernel)
        if self.checks:
            signature[ERROR] = "*i32"
        signature |= {m.name: m.triton_type for m in self.maps.values()}
        body = "\n".join([*self._prologue(symbols), *self.lines]) or "    pass"
        header = [f"# {line}" for line in provenance(kernel)]
        helpers = used_helpers(body)
        function = f"@triton.jit\ndef {name}({', '.join(signature)}):\n{body}\n"
        libdevice = "from triton.language.extra import libdevice\n" if "libdevice." in body + "".join(helpers) else ""
        imports = "import triton\nimport triton.language as tl\n" + libdevice + GDC_IMPORT * self.dependent
        text = "\n\n".join(["\n".join(header) + "\n" + imports, *(h.rstrip() + "\n" for h in helpers), function])
        tiles = [
            as_int(product(v.type.shape))
            for op in kernel.walk()
            for v in (*op.operands, *op.results)
            if isinstance(v.type, TileType)
        ]
        return KernelSource(
            name,
            text,
            signature,
            len(kernel.body.args),
            symbols,
            self.checks,
            max(tiles, default=1),
            any(op.name == "tile.dot" for op in kernel.walk()),
            kernel["num_warps"],
            kernel["num_stages"],
            tuple(self.maps.values()),
            dependent=self.dependent,
        )

    # -- names

    def _name(self, v: Value, prefix: str = "v") -> str:
        if v not in self.names:
            stem = identifier(v.name) if v.name else ""
            name, n = stem, 1
            if not stem:
                n = len(self.names)
                name = f"{prefix}{n}"
            while name in self.taken or keyword.iskeyword(name):
                n += 1
                name = f"{stem or prefix}{'_' if stem else ''}{n}"
            self.taken.add(name)
            self.names[v] = name
        return self.names[v]

    def _fresh(self, stem: str) -> str:
        name, n = stem, 1
        while name in self.taken:
            n += 1
            name = f"{stem}{n}"
        self.taken.add(name)
        return name

    def _arange(self, axis: int, size: int, rank: int) -> str:
        key = (axis, size, rank)
        if key not in self.aranges:
            stem = {(0, 2): "row", (1, 2): "col"}.get((axis, rank), f"t{axis}_{rank}d_")
            name = f"{stem}{size}"
            while name in self.taken:
                name += "_"
            self.taken.add(name)
            self.aranges[key] = name
        return self.aranges[key]

    def _prologue(self, symbols: Sequence[str]) -> list[str]:
        """Size symbols and position vectors, which the body turned out to need."""
        lines = [f"    {s} = {s}.to(tl.int64)" for s in symbols]
        for (axis, size, rank), name in self.aranges.items():
            place = f"[{', '.join(':' if k == axis else 'None' for k in range(rank))}]" if rank > 1 else ""
            lines.append(f"    {name} = tl.arange(0, {size}){'.to(tl.int64)' if self.wide else ''}{place}")
        return lines

    def _write(self, text: str) -> None:
        self.lines.append("    " * self.indent + text)

    def _define(self, op: Operation, text: str) -> None:
        self._write(f"{self._name(op.result)} = {text}")

    # -- blocks

    def _block(self, parent: Operation) -> None:
        for op in parent.body:
            if op.name == "tile.yield":
                return
            if not self.waited and op.name != "tile.part" and _touches_memory(op):
                self._wait_in_front()
            handler = _HANDLERS.get(op.name)
            if handler is not None:
                handler(self, op)
            elif op.name.startswith("arith."):
                self._arith(op)
            else:
                raise IRError(f"'{op.name}' has no lowering to Triton")

    def _wait_in_front(self) -> None:
        """A kernel that was launched early waits before it touches memory, and only then lets the next one come: so what is before the one in front
        of it has ended too, and no more than one waits (with several, programs of one kernel share a multiprocessor while others are idle)."""
        self._write("gdc_wait()")
        self._write("gdc_launch_dependents()")
        self.waited = True

    def _arith(self, op: Operation) -> None:
        small = self.narrow.takes(op)
        if op.name == "arith.constant":
            self._define(op, self._constant(literal(op["value"]), "tl.int32" if small else self._type(element_type(op.result.type))))
        elif small and op.name == "arith.cast" and op.result in self.narrow.known:
            self._define(op, self._name(op.operands[0]))
        elif (parts := self.narrow.split_cast(op)) is not None:
            a, sign, b = parts
            self._define(op, f"{self._name(a)}.to(tl.float32) {sign} {self._name(b)}.to(tl.float32)")
        elif (exact := rounded_to_bf16(op)) is not None:
            self._define(op, f"rounded_bf16({self._name(exact)})")
        else:
            read = self._name if small else self._use
            self._define(op, arith_text(op, [read(v) for v in op.operands], self.index_type))

    def _constant(self, value: str, kind: str) -> str:
        return f"tl.full((), {value}, {kind})"

    def _use(self, v: Value) -> str:
        """The value in the width that its type says."""
        return f"{self._name(v)}.to(tl.int64)" if v in self.narrow.known else self._name(v)

    def _type(self, dtype: DType) -> str:
        return self.index_type if dtype.kind == "index" else tl_type(dtype)

    def program_id(self, op: Operation) -> None:
        """The coordinate on one axis of the linear program number."""
        grid, axis = self.grid, op["axis"]
        below, size = product(grid[axis + 1 :]), grid[axis]
        text = IndexText({}, self.sizes, (), self._arange)
        if size == 1:
            self._define(op, "0")
            self.ranges[op.result] = (0, 0)
            return
        pid = self.number or ("tl.program_id(0).to(tl.int64)" if self.wide else "tl.program_id(0)")
        if below != 1:
            pid = f"{pid} // ({text(below)})"
        if any(n != 1 for n in grid[:axis]):
            pid = f"{pid} % ({text(size)})"
        self._define(op, pid)
        self.ranges[op.result] = (0, size - 1)

    def part(self, op: Operation) -> None:
        """Programs of its own. Its buffers are no other part's to write, and names are never used twice."""
        run = self.runs.get(op)
        if run is None:  # printed with the first that is like it
            return
        first, self.grid = op["first"], op["grid"]
        count = as_int(product(self.grid))
        self._write(f"{'elif' if first else 'if'} tl.program_id(0) < {first + count * len(run.parts)}:")
        self.indent += 1
        start = len(self.lines)
        self.written, self.read = set(), set()
        self.waited = not self.dependent  # in each part for itself
        outside = {b: self._name(b) for b in run.buffers}
        self._choose_part(run, first, count)
        self._block(op)
        self.names |= outside
        if len(self.lines) == start:
            self._write("pass")
        self.indent -= 1

    def _choose_part(self, run: Run, first: int, count: int) -> None:
        """Which program of which part this is, and that part's buffers."""
        number = "tl.program_id(0).to(tl.int64)" if self.wide else "tl.program_id(0)"
        self.number = number = f"({number} - {first})" if first else number
        if len(run.parts) == 1:
            return
        which = self._fresh("part")
        self._write(f"{which} = {number} // {count}")
        self.number = f"({number} % {count})"
        for buffer, choices in run.buffers.items():
            if len(set(choices)) > 1:
                name = self._fresh(f"{self._name(buffer)}_of")
                self._write(f"{name} = {picked([self._name(c) for c in choices], which)}")
                self.names[buffer] = name

    def for_loop(self, op: Operation) -> None:
        n = op["indices"]
        text = self._text(op.operands[:n], ())
        inits, (iv, *carried) = op.operands[n:], op.body.args
        touched_store, touched_load = stored_buffers(op.body), loaded_buffers(op.body)
        if (touched_load & self.written) or (touched_store & self.read & self.both):
            self._barrier()
        state: list[str] = []
        for init, arg, result in zip(inits, carried, op.results, strict=True):
            name = self._name(result, "acc")
            self.names[arg] = name
            state.append(name)
            self._write(f"{name} = {self._use(init)}")
        name = self._name(iv, "i")
        low = lower_bound(op["lower"], text.bounds)
        end = upper_bound(op["upper"], text.bounds)
        high = end - 1 if isinstance(end, int) else None
        self.ranges[iv] = (low, high)
        walked = f"{text(op['lower'])}, {text(op['upper'])}, {op['step']}"
        asked = [f"num_stages={op['ahead']}"] * bool(op["ahead"]) + [f"loop_unroll_factor={op['unroll']}"] * (op["unroll"] > 1)
        self._write(f"for {name} in {'tl.' * bool(asked)}range({', '.join([walked, *asked])}):")
        self.indent += 1
        start = len(self.lines)
        self._write(f"{name} = tl.cast({name}, {self.index_type})")  # in the interpreter it is a Python number
        self.written |= touched_store & touched_load  # by the iteration before
        self.read |= touched_store & touched_load
        self._block(op)
        yields = [self._use(v) for v in op.body.terminator.operands]
        changes = [(a, b) for a, b in zip(state, yields, strict=True) if a != b]
        if changes:
            self._write(f"{', '.join(a for a, _ in changes)} = {', '.join(b for _, b in changes)}")
        if len(self.lines) == start:
            self._write("pass")
        self.indent -= 1

    # -- positions and masks

    def _text(self, operands: Sequence[Value], shape: Sequence[int]) -> IndexText:
        return IndexText(
            {f"i{k}": (self._use(v) if self.wide else self._name(v), self.ranges.get(v, (None, None))) for k, v in enumerate(operands)},
            self.sizes,
            shape,
            self._arange,
        )

    def _spread(self, text: str, shape: Sequence[int], reached: Sequence[int] | None) -> str:
        """`text`, of a shape that is `shape` where `reached` has an axis and 1 elsewhere (None: a scalar), at the full
        shape."""
        if not shape or (reached is not None and tuple(reached) == tuple(shape)):
            return text
        if reached is None:
            text = f"tl.cast({text}, {self.index_type})"
        return f"tl.broadcast_to({text}, [{', '.join(map(str, shape))}])"

    def _reach(self, e: Dim, operands: Sequence[Value], text: IndexText) -> tuple[int, ...] | None:
        """The shape of the value of `e` as Triton sees it; None for a scalar."""
        used = free_symbols(e)
        axes = text.axes(e)
        tiles = [v.type.shape for k, v in enumerate(operands) if f"i{k}" in used and isinstance(v.type, TileType)]
        if not axes and not tiles:
            return None
        rank = len(text.shape)
        return tuple(max([text.shape[k] if k in axes else 1, *(int(s[k]) for s in tiles)]) for k in range(rank))  # type: ignore[arg-type]

    def _mask(
        self, pairs: Sequence[tuple[Dim, Dim]], low: Sequence[Dim], operands: Sequence[Value], text: IndexText
    ) -> tuple[str, tuple[int, ...] | None]:
        """(condition, its shape); ('', None) where there is none."""
        terms, shapes = [], []
        for a, b in pairs:
            terms.append(f"({text(a)} < {text(b)})")
            shapes += [self._reach(a, operands, text), self._reach(b, operands, text)]
        for e in low:
            terms.append(f"({text(e)} >= 0)")
            shapes.append(self._reach(e, operands, text))
        found = [s for s in shapes if s is not None]
        reach = tuple(max(sizes) for sizes in zip(*found, strict=True)) if found else None
        return " & ".join(terms), reach

    # -- memory

    def _barrier(self) -> None:
        self._write("tl.debug_barrier()")
        self.written.clear()
        self.read.clear()

    def load(self, op: Operation) -> None:
        buffer, operands, shape = op.operands[0], op.operands[1:], op["shape"]
        text = self._text(operands, shape)
        mask, _ = self._mask(op["mask"], op["mask_low"], operands, text)
        if op["check"]:
            self._check(op, mask, text)
        if not op.result.uses:
            return
        if buffer in self.written:
            self._barrier()
        if buffer in self.both:
            self.read.add(buffer)
        if op["matrix"] and self.aligned and self.aligned[buffer.index] and buffer not in self.both:  # type: ignore[attr-defined]
            self._define(op, self._block_of_matrix(op, text))
            return
        place = self._spread(text(op["offset"]), shape, self._reach(op["offset"], operands, text))
        masked = f", mask={mask}, other={literal(op['other'])}" if mask else ""
        kept = f', eviction_policy="evict_{op["evict"]}"' if op["evict"] else ""
        self._define(op, f"tl.load({self._name(buffer)} + {_term(place)}{masked}{kept})")

    def _block_of_matrix(self, op: Operation, text: IndexText) -> str:
        """A load by a tensor map."""
        buffer, (rows, columns, stride, flipped), shape = op.operands[0], op["matrix"], op["shape"]
        block = (shape[1], shape[0]) if flipped else (shape[0], shape[1])
        key = (buffer, rows, columns, stride, block)
        if key not in self.maps:
            name = f"{self._name(buffer)}_map"
            while name in self.taken:
                name += "_"
            self.taken.add(name)
            self.maps[key] = TensorMap(name, buffer.index, element_type(buffer.type).name, rows, columns, stride, block)  # type: ignore[attr-defined]
        at = ", ".join(f"({text(x)}).to(tl.int32)" if self.wide and free_symbols(x) else text(x) for x in op["corner"])
        return f"{self.maps[key].name}.load([{at}]){'.T' if flipped else ''}"

    def prefetch(self, op: Operation) -> None:
        """Into the L2 cache, by the bulk copy engine of devices that launch programmatically, which wants multiples of 16 bytes; others take no such
        hint, nor places in 64 bits."""
        shape, buffer = op["shape"], op.operands[0]
        if not self.dependent or self.wide or not shape or not self.aligned or not self.aligned[buffer.index]:  # type: ignore[attr-defined]
            return
        text = self._text(op.operands[1:], shape)
        mask, _ = self._mask(op["mask"], (), op.operands[1:], text)
        place = self._spread(text(op["offset"]), shape, self._reach(op["offset"], op.operands[1:], text))
        length = f"tl.full([{', '.join(map(str, shape))}], {op['bytes']}, tl.int32)"
        if mask:
            length = f"tl.where({mask}, {length}, 0)"
        self._write(f"fetch({self._name(buffer)} + {_term(place)}, {length})")

    def require(self, op: Operation) -> None:
        """The value: eager does not look either on a GPU."""
        self._define(op, self._name(op.operands[1]))

    def _check(self, op: Operation, mask: str, text: IndexText) -> None:
        self.checks += 1
        _, reach = self._mask(op["mask"], op["mask_low"], op.operands[1:], text)
        place = f"{ERROR} + tl.zeros([{', '.join(map(str, reach))}], tl.int32)" if reach is not None else ERROR
        self._write(f"tl.store({place}, 1, mask=~({mask}))")

    def store(self, op: Operation) -> None:
        buffer, value, operands = op.operands[0], op.operands[1], op.operands[2:]
        shape = value.type.shape if isinstance(value.type, TileType) else ()
        text = self._text(operands, shape)  # type: ignore[arg-type]
        mask, _ = self._mask(op["mask"], op.attributes.get("mask_low", ()), operands, text)
        if buffer in self.read:
            self._barrier()
        place = self._spread(text(op["offset"]), shape, self._reach(op["offset"], operands, text))  # type: ignore[arg-type]
        target = f"{self._name(buffer)} + {_term(place)}"
        masked = f", mask={mask}" if mask else ""
        if op["atomic"]:
            self._write(f'tl.atomic_{op["atomic"]}({target}, {self._use(value)}{masked}, sem="relaxed")')
        else:
            self._write(f"tl.store({target}, {self._use(value)}{masked})")
        if buffer in self.both:
            self.written.add(buffer)

    # -- values

    def index(self, op: Operation) -> None:
        text = self._text(op.operands, op["shape"])
        spread = self._spread(text(op["expr"]), op["shape"], self._reach(op["expr"], op.operands, text))
        small = not self.wide and self.narrow.learn(op.result, lower_bound(op["expr"], text.bounds), upper_bound(op["expr"], text.bounds))
        self._define(op, f"tl.cast({spread}, {'tl.int32' if small else self._type(element_type(op.result.type))})")
        if not op["shape"]:
            self.ranges[op.result] = (lower_bound(op["expr"], text.bounds), None)

    def mask(self, op: Operation) -> None:
        text = self._text(op.operands, op["shape"])
        mask, reach = self._mask(op["mask"], (), op.operands, text)
        partial = op["shape"] and (reach is None or tuple(reach) != tuple(op["shape"]))
        spread = f"tl.full([{', '.join(map(str, op['shape']))}], True, tl.int1) & " if partial else ""
        self._define(op, spread + mask)

    def full(self, op: Operation) -> None:
        self._define(op, f"tl.broadcast_to({self._use(op.operands[0])}, [{_dims(op.result)}])")

    def reshape(self, op: Operation) -> None:
        self._define(op, f"tl.reshape({self._use(op.operands[0])}, [{_dims(op.result)}])")

    def every(self, op: Operation) -> None:
        """Halves of halves: tl.split parts what alternates along the last axis."""
        rows, columns = op.operands[0].type.shape  # type: ignore[attr-defined]
        text, first, of = self._use(op.operands[0]), op["first"], op["of"]
        while of > 1:
            columns //= 2
            text = f"tl.split(tl.reshape({text}, [{rows}, {columns}, 2]))[{first % 2}]"
            first, of = first // 2, of // 2
        self._define(op, text)

    def transpose(self, op: Operation) -> None:
        self._define(op, f"tl.trans({self._use(op.operands[0])})")

    def reduce(self, op: Operation) -> None:
        x, dtype, axis = self._use(op.operands[0]), element_type(op.result.type), op["axis"]
        template = REDUCTIONS[op["kind"]][KINDS[dtype.kind]]
        if dtype.name == "f32":
            template = template.replace("_nan,", "_nan32,")  # one instruction; there is none for f64
        back = f".to({tl_type(dtype)})" if dtype.bits < 32 and dtype.kind != "bool" else ""
        self._define(op, template.format(x=x, axis=axis) + back)

    def scan(self, op: Operation) -> None:
        dtype = element_type(op.result.type)
        combine = SCANS[op["kind"]]["f" if dtype.is_float else "i"]
        self._define(op, f"tl.associative_scan({self._use(op.operands[0])}, {op['axis']}, {combine})")

    def dot(self, op: Operation) -> None:
        a, b, acc = (self._use(v) for v in op.operands)
        (m, k), n = op.operands[0].type.shape, op.operands[1].type.shape[1]  # type: ignore[attr-defined]
        dtype, out = element_type(op.operands[0].type), element_type(op.result.type)
        if k == 1:
            widen = f".to({tl_type(out)})" if dtype != out else ""
            self._define(op, f"{acc} + {a}{widen} * {b}{widen}")
        elif min(m, n, k) < 16 or not dtype.is_float:
            widen = f".to({tl_type(out)})" if dtype != out else ""
            self._define(op, f"{acc} + tl.sum({a}{widen}[:, :, None] * {b}{widen}[None, :, :], 1)")
        else:
            precision = f', input_precision="{op["precision"]}"' if dtype.name == "f32" else ""
            self._define(op, f"tl.dot({a}, {b}, {acc}{precision}, out_dtype={tl_type(out)})")


_HANDLERS = {
    "tile.program_id": Printer.program_id,
    "tile.part": Printer.part,
    "tile.for": Printer.for_loop,
    "tile.load": Printer.load,
    "tile.store": Printer.store,
    "tile.index": Printer.index,
    "tile.mask": Printer.mask,
    "tile.full": Printer.full,
    "tile.reshape": Printer.reshape,
    "tile.transpose": Printer.transpose,
    "tile.every": Printer.every,
    "tile.reduce": Printer.reduce,
    "tile.scan": Printer.scan,
    "tile.dot": Printer.dot,
    "tile.require": Printer.require,
    "tile.prefetch": Printer.prefetch,
}


def _dims(v: Value) -> str:
    return ", ".join(map(str, v.type.shape)) if isinstance(v.type, TileType) else ""


def _term(text: str) -> str:
    return f"({text})" if re.search(r" [-+] |^-", text) else text


def identifier(name: str) -> str:
    """A Python name that is none of the functions that kernels call: as a kernel's or a variable's it would hide that. A kernel of one `bitand` is
    called `and`, which is no name."""
    text = re.sub(r"\W", "_", name)
    hidden = not text or text[0].isdigit() or text in HELPERS or text in ("tl", "triton", "libdevice")
    return f"_{text}" if hidden or keyword.iskeyword(text) else text


def stored_buffers(block) -> set[Value]:  # type: ignore[no-untyped-def]
    return {o.operands[0] for op in block for o in op.walk() if o.name == "tile.store"}


def loaded_buffers(block) -> set[Value]:  # type: ignore[no-untyped-def]
    return {o.operands[0] for op in block for o in op.walk() if o.name == "tile.load" and o.result.uses}


def _touches_memory(op: Operation) -> bool:
    return any(x.name in ("tile.load", "tile.store") for x in op.walk())


def _is_small(kernel: Operation) -> bool:
    """All buffers, loops and grids have constant sizes that leave headroom in 32 bits."""
    for arg in kernel.body.args:
        t = arg.type
        assert isinstance(t, BufferType)
        reach = sum(((n - 1) * s for n, s in zip(t.shape, t.layout, strict=True)), 0)  # type: ignore[misc]
        if not isinstance(reach, int) or reach >= SMALL or any(not isinstance(n, int) or n >= SMALL for n in t.shape):
            return False
    programs = product(kernel["grid"])
    bounds = [b for op in kernel.walk() if op.name == "tile.for" for b in (op["lower"], op["upper"])]
    return isinstance(programs, int) and programs < SMALL and all(not isinstance(b, int) or b < SMALL for b in bounds)


def provenance(kernel: Operation) -> list[str]:
    lines = [f"aicc kernel '{kernel['sym_name']}', grid [{', '.join(map(str, kernel['grid']))}]"]
    lines += [f"  argument {a.index}: {a.type}" for a in kernel.body.args]
    lines += [f"  computes {p}" for p in kernel["provenance"]]
    return lines
