"""The pass `tile`: every `tensor.fused` becomes a `tile.kernel` and a `tile.launch`.

Before: all structured ops are inside `tensor.fused`. After: none are left; functions hold launches, constants, externs and assigns.
Kernels with the same body are shared: twelve transformer layers launch the same few kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from ...ir import DTYPES, Block, BufferType, Builder, DType, IRError, Operation, Region, SymbolRef, Target, TensorType, TileType, Value, element_type
from ...ir.expr import Dim, free_symbols, product
from ...ir.passes import Pass, PassContext, register
from ...ir.printer import print_op
from ..nontemporal import cache_bytes
from ..storage import storage_bytes
from ..stream import analyse as analyse_stream
from ..stream_access import packed as is_packed
from ..structured import BESIDE, PARTIAL, constant_values, is_contraction, is_pointwise
from .caching import mark_second_readings
from .contraction import emit_contraction
from .contraction_gpu import emit_gpu_contraction
from .cpu_candidates import CpuTile, contraction_candidates, loop_candidates, stream_candidates
from .cpu_tiles import contraction_tile, is_depthwise, square_tile
from .emit import COARSE, FAST, NARROW, Emitter
from .equal_groups import Lowered
from .frame import Frame, analyse, is_expensive, traffic, work
from .gpu_tiles import GpuTile, gemm_tiles_gpu, packed_bytes, product_bytes
from .loop_tiles import choose_tile, loop_tiles, resized
from .loops import emit_loops
from .ordered import emit_parallel_scatter, emit_scan, emit_scatter, scatters_in_parallel, starts_as_copy
from .roles import is_row_major, roles_of
from .row_columns import emit_row_columns, row_columns_tile
from .row_pipeline import in_pipeline
from .segments import emit_segments
from .sort import OPS_PER_ELEMENT, emit_sort
from .stream import GpuStream, stream_tile, stream_tiles, suits_warp_groups
from .stream_cpu import CpuStream
from .tile_choice import TileChoice
from .window import emit_window, find_window, window_shape
from .window_tiles import window_candidates, window_tile

FEW = 64
"""So many times smaller than the largest tensor of a kernel is what does not decide how precise its functions need to be."""


@register
@dataclass(frozen=True)
class Tile(Pass):
    """See the module docstring. `relax_casts`: within a stream, a value rounded to 16 bits and widened again keeps its precision.
    `fast_math`: functions may be a few ulp off."""

    name: ClassVar[str] = "tile"
    relax_casts: bool = True
    fast_math: bool = False

    def run(self, module: Operation, ctx: PassContext) -> None:
        names = KernelNames()
        launches = 0
        for func in [f for f in module.body if f.name == "func"]:
            constant = constant_values(func)
            seen = Lowered()
            for op in list(func.body):
                if op.name == "tensor.fused":
                    name = seen.kernel_of(op, ctx)
                    if name is None:
                        entry, said = seen.remember(op), len(ctx.remarks)
                        name = names.intern(lower(op, func["symbols"], ctx, self.relax_casts, self.fast_math), func)
                        entry.kernel, entry.remarks = name, tuple(ctx.remarks[said:])
                    attrs: dict = {"kernel": SymbolRef(name)}
                    # GPUs: changed parameters could not be noticed without waiting for the device, and nothing is packed there.
                    if not ctx.target.is_gpu and op.operands and all(v in constant for v in op.operands):
                        attrs["cached"] = True
                    launch = Builder.before_op(op).create("tile.launch", op.operands, attrs, [r.type for r in op.results])
                    if "cached" in attrs:
                        constant.update(launch.results)
                    for old, new in zip(op.results, launch.results, strict=True):
                        new.name = old.name
                        old.replace_all_uses_with(new)
                    op.erase()
                    launches += 1
            seen.forget()
        module.attributes["level"] = "tile"
        ctx.remark("done", f"{launches} launches of {len(names.taken)} kernels")


@dataclass
class KernelNames:
    """The kernels of a module: equal ones are there once, and every one has a name of its own."""

    known: dict[str, str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    @staticmethod
    def of(module: Operation) -> KernelNames:
        """Those that a module has already; an equal one made later gets a name of its own."""
        return KernelNames(taken={op["sym_name"] for op in module.body if op.name == "tile.kernel"})

    def intern(self, kernel: Operation, func: Operation) -> str:
        """Adds the kernel before the function unless an equal one is there already; returns its name."""
        wanted = kernel.attributes.pop("sym_name")
        provenance = kernel.attributes.pop("provenance", ())
        text = _anonymous_text(kernel)
        if text in self.known:
            kernel.drop_references()
            return self.known[text]
        name, n = wanted, 1
        while name in self.taken:
            n += 1
            name = f"{wanted}_{n}"
        self.taken.add(name)
        self.known[text] = name
        kernel.attributes = {"sym_name": name, **kernel.attributes}
        if provenance:
            kernel.attributes["provenance"] = provenance
        assert func.parent is not None
        func.parent.insert_before(func, kernel)
        return name


def _anonymous_text(kernel: Operation) -> str:
    """The kernel as text without the names of its arguments, which say where it is used."""
    names = [a.name for a in kernel.body.args]
    for a in kernel.body.args:
        a.name = ""
    text = print_op(kernel)
    for a, name in zip(kernel.body.args, names, strict=True):
        a.name = name
    return text


def lower(fused: Operation, symbol_ranges: dict, ctx: PassContext, relaxed: bool = True, fast: bool = False) -> Operation:
    """A detached `tile.kernel` that computes the group: arguments are the group's operands, then its results."""
    target = ctx.target
    ranges: dict[str, tuple[Dim, Dim | None]] = {s: (r[0], r[1]) for s, r in symbol_ranges.items()}
    outputs = list(fused.body.terminator.operands)
    # Names by position, not by layer: equal kernels of different layers must have equal text.
    block = Block([_buffer(v) for v in fused.operands] + [_buffer(r) for r in fused.results],
                  [f"in{i}" for i in range(len(fused.operands))] + [f"out{i}" for i in range(len(fused.results))])
    buffers: dict[Value, Value] = {}
    for v, arg in zip([*fused.body.args, *outputs], block.args, strict=True):
        buffers[v] = arg
    members = [op for op in fused.body if op.name != "tensor.yield"]
    for inner, outer in zip(outputs, fused.results, strict=True):
        if inner.type.shape == outer.type.shape:  # type: ignore[attr-defined]  # else the same elements in the same order
            inner.type = outer.type  # a later pass may have given the result another layout
    lanes = target.lanes(32) if not target.is_gpu else 256
    builder = Builder(block, None, members[0].location)
    flops: Dim = 0
    bytes_moved: Dim = sum((v.type.numel * element_type(v.type).bytes for v in [*fused.operands, *fused.results]), 0)  # type: ignore[attr-defined]
    inplace: tuple = ()
    updates: tuple = ()
    warps = 0
    narrow = target.is_gpu and all(t.bits <= 16 for t in _bulk([*fused.operands, *fused.results]) if t.is_float)
    coarse = FAST if fast and not target.is_gpu else NARROW if narrow else COARSE if fast else frozenset()
    hint: GpuTile | None = None
    first = members[0]
    if first.name == "tensor.scatter":
        parallel = scatters_in_parallel(first, target)
        there = parallel or starts_as_copy(first)
        if parallel:
            grid = emit_parallel_scatter(first, Emitter(builder, (1, lanes), ranges, coarse=coarse), buffers, buffers[first.result])
        else:
            grid = emit_scatter(first, Emitter(builder, (1, lanes), ranges, coarse=coarse), buffers, buffers[first.result], lanes, there)
        if there:
            inplace = updates = _of_init(first, fused)
            t = first.result.type
            assert isinstance(t, TensorType)
            bytes_moved = bytes_moved - 2 * (t.numel - product(first["dims"])) * t.dtype.bytes
    elif first.name == "tensor.segments":
        grid = emit_segments(first, Emitter(builder, (1, lanes), ranges, coarse=coarse), buffers, buffers[first.result], target.l2)
        flops = 2 * product(first["dims"])
        bytes_moved = product(first["dims"]) * element_type(first.result.type).bytes
    elif first.name == "tensor.sort":
        grid = emit_sort(first, Emitter(builder, (1, 4 * lanes), ranges, coarse=coarse), buffers, [buffers.get(r) for r in first.results])
        flops = product(first["dims"]) * OPS_PER_ELEMENT
    elif first.name == "tensor.scan":
        # As torch does: on CPUs the error of a running sum does not grow with its length.
        grid = emit_scan(first, Emitter(builder, (1, lanes), ranges, coarse=coarse), buffers, buffers[first.result], lanes,
                         accumulate=None if target.is_gpu else DTYPES["f64"], by_tiles=target.is_gpu)
    elif fused["part"]:
        sums = [m for m in members if m.attributes.get(BESIDE)]
        frame = analyse(fused, ranges, [m for m in members if m not in sums])
        choice = row_columns_tile(frame, sums[0]["dims"][1])
        grid = emit_row_columns(frame, sums, choice, Emitter(builder, choice.shape, ranges, coarse=coarse), buffers, fused["part"])
        warps = choice.warps
        made = sum((v.type.numel * element_type(v.type).bytes for v in outputs if v.defining_op in sums), 0)  # type: ignore[attr-defined]
        flops, bytes_moved = work(frame) + sum((product(m["dims"]) * len(m.body) for m in sums), 0), traffic(frame) + made
    elif (stream := analyse_stream(members) if len(members) > 1 else None) is not None:
        flops = sum((2 * _product(m, range(len(m["dims"]))) for m in (*stream.firsts, *stream.seconds)), 0)  # type: ignore[arg-type]
        if target.is_gpu:
            hint = GpuTile(*fused["tile"]) if fused["tile"] else stream_tile(stream, target)
            tile = (hint.rows, hint.columns)
            groups = ", for a loader and two groups of warps" if suits_warp_groups(stream, target) else ""
            ctx.remark("note", f"a stream in tiles of {hint.rows} rows by {hint.columns} steps{groups}", members[0].location)
            given = [buffers[a] for a in fused.body.args[fused["ranges"][0]:]] if fused["ranges"] else []
            grid = GpuStream(stream, outputs, Emitter(builder, tile, ranges, coarse=coarse), buffers, tile, relaxed, given).emit()
        else:
            chosen = CpuTile(*(fused["tile"] or square_tile(target, stream.row_count, stream.length)))
            tile = (chosen.rows, chosen.columns)
            lowering = CpuStream(stream, outputs, Emitter(builder, tile, ranges, coarse=coarse), buffers, tile, relaxed)
            lowering.row_tiles = chosen.block_rows // tile[0] or lowering.row_tiles
            lowering.panels = chosen.block_steps // tile[1] or lowering.panels
            grid = lowering.emit(target)
    elif fused["why"].startswith("streams"):
        raise IRError(f"the members of '{fused['kernel']}' no longer form a stream")
    elif (contraction := next((m for m in members if is_contraction(m)), None)) is not None and _worth_gemm(
            contraction, members, not target.is_gpu):
        roles = roles_of(contraction)
        assert roles is not None
        products = [m for m in members if is_contraction(m)]
        flops = sum((2 * _product(m, range(len(m["dims"]))) for m in products), 0)  # type: ignore[arg-type]
        prologue = [m for m in members if m not in products and any(u in products for r in m.results for u in r.users)]
        epilogue = [m for m in members if m not in products and m not in prologue]
        if target.is_gpu:
            hint = GpuTile(*fused["tile"]) if fused["tile"] else candidate_tiles(fused, target)[0]
            at = Emitter(builder, (hint.rows, hint.columns), ranges, coarse=coarse)
            settled = [inner for inner, outer in zip(fused.body.args, fused.operands, strict=False) if outer.defining_op is None]
            grid = emit_gpu_contraction(products, prologue, epilogue, outputs, at, buffers, hint, maps=target.capability == 90, settled=settled)
        else:
            gemm, limits = contraction_tile(contraction, roles, target), (0, 0, 0)
            if fused["tile"]:
                chosen = CpuTile(*fused["tile"])
                gemm, limits = (chosen.rows, chosen.columns, gemm[2]), (chosen.block_rows, chosen.block_steps, chosen.block_columns)
            grid = emit_contraction(products, epilogue, outputs, target, Emitter(builder, gemm[:2], ranges, coarse=coarse), buffers, gemm, limits,
                                    prologue)
    elif not target.is_gpu and (window := find_window(fused, ranges)) is not None:
        flops = 2 * _product(window.op, range(len(window.op["dims"])))
        bits = element_type(window.op.result.type).bits
        shape = tuple(fused["tile"][:2]) if fused["tile"] else window_tile(target, window_shape(window), bits)
        ctx.remark("note", f"windows in tiles of {shape[0]} positions by {shape[1]} channels", members[0].location)
        grid = emit_window(window, outputs, target, Emitter(builder, shape, ranges, coarse=coarse), buffers, shape)
    else:
        frame = analyse(fused, ranges)
        choice = _loop_tile(frame, members, target)
        if fused["tile"] and not target.is_gpu:
            chosen = CpuTile(*fused["tile"])
            choice = replace(choice, shape=(1, chosen.columns), chunk=chosen.block_columns, rows=chosen.rows)
        if fused["tile"] and target.is_gpu:
            choice = resized(frame, choice, GpuTile(*fused["tile"]))
        grid = emit_loops(frame, choice, Emitter(builder, choice.shape, ranges, coarse=coarse), buffers, gpu=target.is_gpu,
                          private_bytes=0 if target.is_gpu else target.l2 // 4, cache=None if target.is_gpu else cache_bytes(target),
                          near="sse4a" in target.features)
        warps = choice.warps
        if target.is_gpu:
            mark_second_readings(block)
        flops, bytes_moved = work(frame), traffic(frame)
        inplace = _inplace_pairs(frame, fused) if choice.rows == 1 else ()  # a pipeline makes the numbers of its last row twice
    builder.create("tile.yield")
    # The launch decides by flops and bytes whether to run in parallel: their sizes are arguments too.
    symbols = sorted({s for op in block for s in _symbols(op)} | {s for g in (*grid, flops, bytes_moved) for s in free_symbols(g)})
    attrs = {"sym_name": fused["kernel"] or "kernel", "grid": tuple(grid), "symbols": tuple(symbols), "outputs": len(outputs)}
    if hint is not None:
        attrs |= {"num_warps": hint.warps, "num_stages": hint.stages}
    elif warps:
        attrs["num_warps"] = warps
    if inplace:
        attrs["inplace"] = inplace
    if updates:
        attrs["updates"] = updates
    if symbols:
        attrs["bounds"] = {s: ranges.get(s, (0, None)) for s in symbols}
    attrs |= {"flops": flops, "bytes": bytes_moved, "provenance": tuple(dict.fromkeys(str(m.location) for m in members if m.location.file))}
    return Operation.create("tile.kernel", (), attrs, (), [Region([block])], members[0].location)


def candidate_tiles_cpu(fused: Operation, target: Target, *, few: bool = True) -> list[CpuTile]:
    """What a group of constant sizes can be computed by on a CPU, the model's choice first: the few that are likely, or all. Empty where there is no
    choice."""
    members = [op for op in fused.body if op.name != "tensor.yield"]
    if members[0].name in ("tensor.scatter", "tensor.scan", "tensor.sort", "tensor.segments"):
        return []
    stream = analyse_stream(members) if len(members) > 1 else None
    if stream is not None:
        panels = any(is_packed(op, i) for op in stream.firsts for i in range(len(op.operands)))
        return stream_candidates(square_tile(target, stream.row_count, stream.length), panels, few=few)
    contraction = next((m for m in members if is_contraction(m)), None)
    if contraction is not None and _worth_gemm(contraction, members, True):
        roles = roles_of(contraction)
        assert roles is not None
        if any(PARTIAL in m.attributes for m in members):
            return []  # what a part is, the merging knows
        return contraction_candidates(contraction, contraction_tile(contraction, roles, target), target, few=few)
    window = find_window(fused, {})
    if window is not None:
        tiles = window_candidates(target, window_shape(window), element_type(window.op.result.type).bits)
        return [CpuTile(*tile) for tile in tiles[:4 if few else None]]
    frame = analyse(fused, {})
    return loop_candidates(frame, _loop_tile(frame, members, target), _loop_lanes(members, target), few=few)


def _loop_tile(frame: Frame, members: list[Operation], target: Target) -> TileChoice:
    choice = choose_tile(frame, _loop_lanes(members, target), gpu=target.is_gpu, target=target)
    if target.is_gpu:
        return choice
    return in_pipeline(frame, choice, first_cache=target.l1, cache=cache_bytes(target), private_bytes=target.l2 // 4)


def _loop_lanes(members: list[Operation], target: Target) -> int:
    """Elements of a vector of the widest type that a loop computes with."""
    widest = max((element_type(v.type).bits for op in members for v in [*op.operands, *op.results]), default=32)
    return 32 if target.is_gpu else max(1, target.vector_bits // min(max(widest, 32), 64))


def candidate_tiles(fused: Operation, target: Target) -> list[GpuTile]:
    """Of a stream, or a group of contractions, pointwise ops or reductions, for a GPU: tiles, the best by the model first. None for other groups."""
    members = [op for op in fused.body if op.name != "tensor.yield"]
    stream = analyse_stream(members) if target.is_gpu and fused["why"].startswith("streams") else None
    if stream is not None:
        return stream_tiles(stream, target)
    products = [m for m in members if is_contraction(m)]
    if not target.is_gpu or fused["why"].startswith("streams") or any(m.name != "tensor.generic" for m in members):
        return []
    if fused["part"]:
        return []
    if not products or not _worth_gemm(products[0], members, False):
        frame = analyse(fused, {})
        return loop_tiles(frame, choose_tile(frame, 32, gpu=True, target=target))
    first = products[0]
    roles = roles_of(first)
    assert roles is not None
    prologue = [m for m in members if m not in products and any(u in products for r in m.results for u in r.users)]
    epilogue = [m for m in members if m not in products and m not in prologue]
    batch, m, n, k = (_product(first, d) for d in (roles.batch, roles.m, roles.n, roles.k))
    return gemm_tiles_gpu(target, batch, m, n, k, product_bytes(first), exact=not element_type(first.result.type).is_float,
                          heavy=any(is_expensive(m) or len(m.operands) > 2 for m in epilogue), products=len(products),
                          stored=packed_bytes(first, prologue), row_major=is_row_major(first, roles),
                          settled=_is_settled(first.operands[roles.right], fused))


def _is_settled(v: Value, fused: Operation) -> bool:
    """No kernel makes this operand of the group."""
    return any(inner is v and outer.defining_op is None for inner, outer in zip(fused.body.args, fused.operands, strict=False))


def _worth_gemm(op: Operation, members: list[Operation], on_cpu: bool) -> bool:
    """Contractions with a real M, N and K; matrix-vector products and depthwise windows run as reductions."""
    roles = roles_of(op)
    if roles is None or not roles.k or (on_cpu and is_depthwise(op)):
        return False
    has_epilogue = len(members) > 1
    n, k = _product(op, roles.n), _product(op, roles.k)
    return has_epilogue or (not (isinstance(n, int) and n < 4) and not (isinstance(k, int) and k < 4))


def _product(op: Operation, dims) -> Dim:  # type: ignore[no-untyped-def]
    total: Dim = 1
    for d in dims:
        total = total * op["dims"][d]
    return total


def _buffer(v: Value) -> BufferType:
    t = v.type
    assert isinstance(t, TensorType)
    return BufferType(t.shape, t.dtype, t.strides)


def _symbols(op: Operation) -> set[str]:
    """Size symbols in the attributes of an op and all that it holds."""
    found: set[str] = set()
    for inner in op.walk():
        for key in ("offset", "mask", "mask_low", "lower", "upper", "expr"):
            if key in inner.attributes:
                found |= _attribute_symbols(inner.attributes[key])
        for v in (*inner.operands, *inner.results):
            assert not isinstance(v.type, TileType) or all(isinstance(d, int) for d in v.type.shape)
    return {s for s in found if not (s[0] in "it" and s[1:].isdigit())}


def _attribute_symbols(value: Any) -> frozenset[str]:
    if isinstance(value, tuple):
        return frozenset().union(*map(_attribute_symbols, value))
    return free_symbols(value)


def _of_init(scatter: Operation, fused: Operation) -> tuple[tuple[int, int], ...]:
    """What the result of a scatter starts from, and the result."""
    return ((next(i for i, v in enumerate(fused.body.args) if v is scatter.operands[0]), len(fused.operands)),)


def _bulk(values: Sequence[Value]) -> list[DType]:
    """The element types of nearly all of the memory that a kernel touches: not of numbers for each of many elements, a row's statistics say."""
    sizes = [v.type.numel if isinstance(v.type, TensorType) else 1 for v in values]
    most = max((n for n in sizes if isinstance(n, int)), default=1)
    return [element_type(v.type) for v, n in zip(values, sizes, strict=True) if not isinstance(n, int) or n * FEW >= most]


def _inplace_pairs(frame: Frame, fused: Operation) -> tuple[tuple[int, int], ...]:
    """[input, output] argument numbers that may share memory: in a one-stage kernel, where the input is read only where the output is written; and in
    others, of numbers of a row that one member makes from their old ones, if nothing else reads either (a running mean)."""
    n = len(fused.operands)
    pairs = []
    one_stage = max(frame.stage.values()) == 0 and all(is_pointwise(m) for m in frame.members)
    whole = {v for m in frame.members for v, mp in zip(m.operands, m["maps"], strict=True) if mp is None}
    for i, v in enumerate(fused.body.args):
        reads = [x.offset for x in frame.accesses if x.value is v and not x.is_store]
        for j, out in enumerate(frame.outputs):
            maker = out.defining_op
            assert maker is not None
            alone = not maker["reductions"] and len(out.uses) == 1 and all(m is maker for m in frame.members if v in m.operands)
            if not (one_stage and frame.is_full(maker)) and (frame.is_full(maker) or not alone):
                continue  # stored once, before the loops that may read the input again
            writes = [x.offset for x in frame.accesses if x.value is out and x.is_store]
            same = storage_bytes(v.type) == storage_bytes(out.type) and v.type.dtype.bytes == out.type.dtype.bytes  # type: ignore[arg-type,attr-defined]
            # A padded read walks the offsets of the whole result, but its tensor is smaller: hence the sizes.
            if v not in whole and reads and writes and all(r == writes[0] for r in reads) and same:
                pairs.append((i, n + j))
    return tuple(pairs)
