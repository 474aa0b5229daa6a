"""The tile dialect: kernels. A grid of independent programs, loops, and loads, stores and arithmetic on tiles.

    tile.kernel {sym_name = "k0", grid = [((s0 + 63) // 64)], symbols = ["s0"], outputs = 1} {
      ^(%x: buffer<s0xf32>, %y: buffer<s0xf32>):
        %p = tile.program_id {axis = 0} : index
        %v = tile.load(%x, %p) {offset = i0*64 + t0, shape = [64], mask = [[i0*64 + t0, s0]]} : tile<64xf32>
        %e = arith.exp(%v) : tile<64xf32>
        tile.store(%y, %e, %p) {offset = i0*64 + t0, mask = [[i0*64 + t0, s0]]}
        tile.yield()
    }

Expressions in attributes see: size symbols named in the kernel's `symbols`; `i0, i1, ...`, the op's index operands (index scalars, or tiles
of integers, for gathers); and `t0, t1, ...`, the position within the tile. `offset` counts elements from the start of the buffer.
`mask` is a conjunction of [a, b] meaning a < b (and a >= 0 where `mask_low` lists a): outside it a load gives `other` and a store does nothing.
Programs of one launch run in any order and in parallel; two never write the same element, except by `atomic` stores.
The same kernel compiles through LLVM, where a tile is a group of vector registers, and prints as Triton, where it is a block.
"""

from __future__ import annotations

from ..core import IRError, Operation
from ..expr import Dim, free_symbols
from ..opdef import Trait, attr, define, optional
from ..types import DTYPES, BufferType, ScalarType, TileType, element_type, index

ATOMICS = ("", "add", "max", "min")
REDUCE_KINDS = ("sum", "prod", "max", "min", "any", "all")


def _check_symbols(op: Operation, what: str, e: Dim, operands: int, rank: int) -> None:
    for s in free_symbols(e):
        if s[0] == "i" and s[1:].isdigit() and int(s[1:]) >= operands:
            raise IRError(f"'{what}' of '{op.name}' uses {s}, but the op has {operands} index operands")
        if s[0] == "t" and s[1:].isdigit() and int(s[1:]) >= rank:
            raise IRError(f"'{what}' of '{op.name}' uses {s}, but the tile has rank {rank}")


def _check_access(op: Operation, operands: int, rank: int) -> None:
    _check_symbols(op, "offset", op["offset"], operands, rank)
    for pair in op["mask"]:
        if len(pair) != 2:
            raise IRError(f"a mask of '{op.name}' must be a pair [a, b] meaning a < b, got {pair}")
        for e in pair:
            _check_symbols(op, "mask", e, operands, rank)


def _tile_type(shape: tuple[int, ...], dtype: object) -> object:
    return TileType(shape, dtype) if shape else ScalarType(dtype)  # type: ignore[arg-type]


def _verify_load(op: Operation) -> None:
    buffer = op.operands[0].type
    if not isinstance(buffer, BufferType):
        raise IRError(f"'tile.load' reads a buffer, got {buffer}")
    if op.result.type != _tile_type(op["shape"], buffer.dtype):
        raise IRError(f"'tile.load' of shape {op['shape']} from {buffer} cannot give {op.result.type}")
    _check_access(op, len(op.operands) - 1, len(op["shape"]))


def _verify_store(op: Operation) -> None:
    buffer, value = op.operands[0].type, op.operands[1].type
    if not isinstance(buffer, BufferType) or buffer.dtype != element_type(value):
        raise IRError(f"'tile.store' writes {value} into {buffer}: element types differ")
    if op["atomic"] not in ATOMICS:
        raise IRError(f"atomic '{op['atomic']}' is not one of {ATOMICS[1:]}")
    _check_access(op, len(op.operands) - 2, value.rank if isinstance(value, TileType) else 0)


def _verify_kernel(op: Operation) -> None:
    last = op.body.last
    if last is None or last.name != "tile.yield" or last.operands:
        raise IRError("a kernel must end with an empty 'tile.yield'")
    for a in op.body.args:
        if not isinstance(a.type, BufferType):
            raise IRError(f"kernel argument {a.index} must be a buffer, got {a.type}")
    known = set(op["symbols"])
    for e in op["grid"]:
        missing = free_symbols(e) - known
        if missing:
            raise IRError(f"the grid uses {', '.join(sorted(missing))}, not listed in 'symbols'")


def _verify_part(op: Operation) -> None:
    last = op.body.last
    if op.body.args or last is None or last.name != "tile.yield" or last.operands:
        raise IRError("a 'tile.part' takes no values and ends with an empty 'tile.yield'")
    if not isinstance(op["first"], int) or op["first"] < 0 or not all(isinstance(n, int) and n >= 0 for n in op["grid"]):
        raise IRError(f"the programs of a 'tile.part' must be constant, got {op['first']} and {op['grid']}")


def _verify_for(op: Operation) -> None:
    n = op["indices"]
    inits = op.operands[n:]
    args = op.body.args
    if not args or args[0].type != index or len(args) != 1 + len(inits):
        raise IRError(f"the body of 'tile.for' takes an index and {len(inits)} carried values")
    last = op.body.last
    if last is None or last.name != "tile.yield" or [v.type for v in last.operands] != [v.type for v in inits]:
        raise IRError("the body of 'tile.for' must yield its carried values, with their types")
    if [r.type for r in op.results] != [v.type for v in inits] or [a.type for a in args[1:]] != [v.type for v in inits]:
        raise IRError("'tile.for': initial values, body arguments, yields and results must agree in type")
    for key in ("lower", "upper"):
        _check_symbols(op, key, op[key], n, 0)
    if not isinstance(op["step"], int) or op["step"] <= 0:
        raise IRError(f"the step of 'tile.for' must be a positive constant, got {op['step']}")


def _verify_dot(op: Operation) -> None:
    a, b, acc = (v.type for v in op.operands)
    if not all(isinstance(t, TileType) and t.rank == 2 for t in (a, b, acc)):
        raise IRError("'tile.dot' takes three tiles of rank 2")
    if (a.shape[0], b.shape[1]) != acc.shape or a.shape[1] != b.shape[0] or op.result.type != acc:  # type: ignore[attr-defined]
        raise IRError(f"'tile.dot' of {a} and {b} onto {acc} cannot give {op.result.type}")


def _verify_every(op: Operation) -> None:
    t = op.operands[0].type
    if not isinstance(t, TileType) or t.rank != 2 or t.shape[1] % op["of"] or not 0 <= op["first"] < op["of"]:
        raise IRError(f"'tile.every' takes every {op['of']}-th column from {op['first']} on of a tile of rank 2, got {t}")
    if op.result.type != TileType((t.shape[0], t.shape[1] // op["of"]), t.dtype):
        raise IRError(f"'tile.every' of {t} cannot give {op.result.type}")


def _verify_reduce(op: Operation) -> None:
    t = op.operands[0].type
    if not isinstance(t, TileType) or not 0 <= op["axis"] < t.rank or op["kind"] not in REDUCE_KINDS:
        raise IRError(f"'tile.reduce' by '{op['kind']}' along axis {op['axis']} of {t}; kinds: {', '.join(REDUCE_KINDS)}")
    shape = tuple(1 if i == op["axis"] else s for i, s in enumerate(t.shape))
    if op.result.type != TileType(shape, t.dtype):
        raise IRError(f"'tile.reduce' keeps the axis with size 1: {t} gives {TileType(shape, t.dtype)}, not {op.result.type}")


def _verify_sort(op: Operation) -> None:
    source, *rest = (v.type for v in op.operands)
    wanted = [*([element_type(source)] if op["values"] else []), *([DTYPES["i64"]] if op["places"] else [])]
    n = len(wanted)
    if not isinstance(source, BufferType) or [t.dtype if isinstance(t, BufferType) else None for t in rest[:n]] != wanted:
        raise IRError(f"'tile.sort' of {source} writes to buffers of {', '.join(map(str, wanted))}")
    if rest[n:] != [index] * (3 + 2 * n):
        raise IRError(f"'tile.sort' takes {3 + 2 * n} index scalars after its buffers: start, length, keep, and offset and step of each result")


def _verify_scan(op: Operation) -> None:
    t = op.operands[0].type
    if not isinstance(t, TileType) or not 0 <= op["axis"] < t.rank or op["kind"] not in REDUCE_KINDS or op.result.type != t:
        raise IRError(f"'tile.scan' by '{op['kind']}' along axis {op['axis']} of {t} cannot give {op.result.type}")


_ACCESS = {"offset": attr("Expr, in elements"), "mask": optional((), "pairs [a, b]: a < b"),
           "mask_low": optional((), "expressions that must be >= 0")}
define("tile.kernel", "a kernel: a grid of programs that all run the body", results=(), regions=1,
       attrs={"sym_name": attr(), "grid": attr("number of programs per axis"), "symbols": optional((), "size symbols used, in argument order"),
              "outputs": optional(1, "how many trailing arguments are written"),
              "inplace": optional((), "pairs [input, output] (argument numbers) that may share memory"),
              "updates": optional((), "pairs [input, output]: the output starts with the elements of the input"),
              "bounds": optional({}, "symbol -> [smallest, largest or none]"),
              "num_warps": optional(0, "GPUs: warps per program; 0: the backend's choice"),
              "num_stages": optional(0, "GPUs: iterations of a loop whose loads are in flight; 0: the backend's choice"),
              "flops": optional(0), "bytes": optional(0), "provenance": optional((), "the Python lines that it computes")},
       traits=[Trait.IsolatedFromAbove, Trait.Symbol], verify=_verify_kernel)
define("tile.launch", "runs a kernel on tensors, giving its outputs as new tensors (value semantics; `host.launch` has buffers)",
       operands="inputs*", results="results*", attrs={"kernel": attr("@name"), "cached": optional(False, "depends on parameters alone: run once")},
       traits=[Trait.Pure])
define("tile.program_id", "this program's coordinate on grid axis `axis`", attrs={"axis": attr()}, traits=[Trait.Pure])
define("tile.part", "a kernel of its own, that programs first, first + 1, ... of a one-dimensional grid run as those of `grid`", results=(),
       attrs={"first": attr(), "grid": attr("number of programs per axis, constant")}, regions=1, traits=[], verify=_verify_part)
define("tile.for", "for (iv = lower; iv < upper; iv += step) with carried values; lower and upper see the first `indices` operands as i0, ...",
       operands="indices_and_inits*", results="results*",
       attrs={"lower": attr(), "upper": attr(), "step": optional(1), "indices": optional(0), "unroll": optional(1),
              "ahead": optional(0, "GPUs: iterations whose loads are under way at a time, where that is more than one"),
              "part": optional("", "loops with it follow each other along a stream; 'any': the body is right for any step, 'some': for its own")},
       regions=1, verify=_verify_for)
define("tile.yield", "ends a kernel or a loop body", operands="values*", results=(), traits=[Trait.Terminator])
define("tile.load", "a tile (a scalar when shape is []) read from a buffer", operands="buffer indices*",
       attrs={**_ACCESS, "shape": attr(), "other": optional(0, "value outside the mask"),
              "check": optional(False, "the masks of this load are user indices: report IndexError where they fail"),
              "matrix": optional((), "[rows, columns, stride, flipped]: the tile (its transpose, if flipped) is a block of such a matrix at the "
                                     "start of the buffer, 0 outside of it, which a tensor map can read"),
              "corner": optional((), "row and column of the block's first element"),
              "evict": optional("", "a hint to GPUs: leave the cache 'last' (it is read again) or 'first'"),
              "streamed": optional(False, "a hint to CPUs: this is the first reading of what only memory holds")},
       traits=[Trait.ReadsMemory], verify=_verify_load)
define("tile.store", "writes a tile or scalar", operands="buffer value indices*",
       attrs={**_ACCESS, "atomic": optional("", "combine with what is there, atomically")}, results=(), traits=[Trait.WritesMemory],
       verify=_verify_store)
define("tile.prefetch", "a hint: the cache line at `offset` (which may be out of bounds) will be read soon (once per unrolled round, unless `each`); "
       "or `bytes` from each place of a tile on (which lie within the buffer, at multiples of 16 bytes)",
       operands="buffer indices*", attrs={"offset": attr("Expr, in elements"), "mask": optional((), "pairs [a, b]: a < b"),
                                          "shape": optional((), "of the tile"), "bytes": optional(0, "a multiple of 16; 0: one line"),
                                          "each": optional(False, "in every step of an unrolled round"),
                                          "once": optional(False, "nothing reads the line again")},
       results=(), traits=[Trait.ReadsMemory])
define("tile.index", "the value of an index expression: a tile of `shape`, or a scalar when shape is []; element type of the result",
       operands="indices*", attrs={"expr": attr(), "shape": optional(())}, traits=[Trait.Pure])
define("tile.mask", "an i1 tile (a scalar when shape is []): where all pairs of `mask` hold, as for loads; backends fold it where it is proved",
       operands="indices*", attrs={"mask": attr("pairs [a, b]: a < b"), "shape": attr()}, traits=[Trait.Pure])
define("tile.require", "`value`; a false element of `cond` makes the call fail with RuntimeError", operands="cond value",
       attrs={"message": attr()}, traits=[Trait.Pure])
define("tile.full", "a tile of one scalar", operands="value", traits=[Trait.Pure])
define("tile.reduce", "combines along `axis`, which keeps size 1", operands="x", attrs={"axis": attr(), "kind": attr()}, traits=[Trait.Pure],
       verify=_verify_reduce)
define("tile.scan", "running combination along `axis`, each element included (GPUs)", operands="x", attrs={"axis": attr(), "kind": attr()},
       traits=[Trait.Pure], verify=_verify_scan)
define("tile.reshape", "the same elements in row-major order", operands="x", traits=[Trait.Pure])
define("tile.every", "of rank 2: every `of`-th column from column `first` on", operands="x", attrs={"first": attr(), "of": attr()},
       traits=[Trait.Pure], verify=_verify_every)
define("tile.transpose", "rank 2, swapped", operands="x", traits=[Trait.Pure])
define("tile.dot", "acc + a @ b, accumulated in acc's type", operands="a b acc", attrs={"precision": optional("ieee", "ieee or tf32")},
       traits=[Trait.Pure], verify=_verify_dot)
define("tile.sort", "writes the first `keep` of `length` elements, from element `start` of a buffer on, in stable sorted order: their values, their "
       "places in the row (i64), or both, each to a buffer; the scalars then name the offset of its first element there and the step from one to the "
       "next. NaN is the largest",
       operands="source results_start_length_keep_layouts*", results=(),
       attrs={"values": optional(True), "places": optional(True), "largest": optional(True, "the largest come first"),
              "pick": optional("", "last: of those the last alone; median: the same, but the first NaN if there is one")},
       traits=[Trait.ReadsMemory, Trait.WritesMemory], verify=_verify_sort)
define("tile.alloca", "scratch memory private to the program", operands="", traits=[Trait.ReadsMemory])

