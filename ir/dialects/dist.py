"""The dist dialect: meshes and collectives. Every rank of a mesh runs the same program; `dist` ops are where ranks differ or meet.

A sharding of a value is an annotation `_sharding` on its op (for arguments: in `arg_attrs`, key `sharding`): a dictionary from
axis names to placements, one per result; `ir/sharding.py` says what placements mean and how they print. Axes that are missing replicate.

All ops act among the `ranks` ranks that differ in the mesh axis `axis` alone. `stage` of a collective is empty, or "start": then
its result may be read after a `dist.wait` alone, and its operand must not be overwritten before.
"""

from __future__ import annotations

from ..core import IRError, Operation
from ..opdef import Trait, attr, define, optional
from ..types import TensorType

_C = [Trait.Communicates]
_AXIS = {"axis": attr("the mesh axis"), "ranks": attr("how many ranks it has"),
         "stage": optional("", "'start' when a dist.wait completes it")}
_REDUCE = optional("sum", "sum, max or min")
KINDS = ("sum", "max", "min")


def _types(op: Operation) -> tuple[TensorType, TensorType]:
    source, result = op.operands[0].type, op.result.type
    if not isinstance(source, TensorType) or not isinstance(result, TensorType) or source.dtype != result.dtype:
        raise IRError(f"'{op.name}' takes a tensor to one of its element type, not {source} to {result}")
    return source, result


def _verify_scaled(scale: str) -> object:
    """The result has the operand's shape, but `dim` is `ranks` times as long ('up') or short ('down')."""
    def verify(op: Operation) -> None:
        source, result = _types(op)
        n, d, parts = op["ranks"], op["dim"], op.attributes.get("parts", 1)
        if not 0 <= d < source.rank or result.rank != source.rank:
            raise IRError(f"'{op.name}' along dimension {d} of {source}")
        want = list(source.shape)
        if scale == "down":
            if source.shape[d] % (n * parts):
                raise IRError(f"'{op.name}' cannot cut dimension {d} of {source} into {n * parts} equal pieces")
            want[d] = source.shape[d] // n
        else:
            want[d] = source.shape[d] * n
        if tuple(want) != result.shape or op.attributes.get("kind", "sum") not in KINDS:
            raise IRError(f"'{op.name}' of {source} over {n} ranks cannot give {result}")
    return verify


def _verify_same(op: Operation) -> None:
    source, result = _types(op)
    if source.shape != result.shape or op.attributes.get("kind", "sum") not in KINDS:
        raise IRError(f"'{op.name}' of {source} cannot give {result}")


def _verify_all_to_all(op: Operation) -> None:
    source, result = _types(op)
    want = list(source.shape)
    if source.shape[op["split"]] % op["ranks"]:
        raise IRError(f"'dist.all_to_all' cannot cut dimension {op['split']} of {source} into {op['ranks']} equal pieces")
    want[op["split"]] //= op["ranks"]  # type: ignore[operator]
    want[op["concat"]] *= op["ranks"]
    if tuple(want) != result.shape:
        raise IRError(f"'dist.all_to_all' of {source} cannot give {result}")


define("dist.mesh", "the device mesh of the module", results=(), traits=[Trait.Symbol],
       attrs={"sym_name": attr(), "shape": attr("ranks per axis"), "axes": attr("names, outermost first")})
define("dist.coordinate", "a 0-d i64: where this rank is along `axis`", attrs={"axis": attr(), "ranks": attr()}, traits=[Trait.Pure])
define("dist.shard", "this rank's piece of a replicated tensor along `dim`; no communication", operands="x",
       attrs={"axis": attr(), "ranks": attr(), "dim": attr(), "parts": optional(1),
                                                        "shift": optional(0, "the piece of the rank so many places before")}, traits=[Trait.Pure],
       verify=_verify_scaled("down"))  # type: ignore[arg-type]
define("dist.all_reduce", "combines over `axis`; every rank gets the result", operands="x", traits=_C,
       attrs={**_AXIS, "kind": _REDUCE}, verify=_verify_same)
define("dist.all_gather", "joins the pieces along `dim`", operands="x", attrs={**_AXIS, "dim": attr(), "parts": optional(1)}, traits=_C,
       verify=_verify_scaled("up"))  # type: ignore[arg-type]
define("dist.reduce_scatter", "combines over `axis`; each rank keeps its piece along `dim`", operands="x", traits=_C,
       attrs={**_AXIS, "dim": attr(), "parts": optional(1), "kind": _REDUCE}, verify=_verify_scaled("down"))  # type: ignore[arg-type]
define("dist.all_to_all", "cuts along `split`, sends the r-th piece to rank r, joins what comes along `concat`", operands="x", traits=_C,
       attrs={**_AXIS, "split": attr(), "concat": attr()}, verify=_verify_all_to_all)
define("dist.shift", "what the rank one place before has (the first: the last one's); once for every rank of `axis`, it is home again", operands="x",
       attrs=_AXIS, traits=_C, verify=_verify_same)
define("dist.wait", "the result `started` of a collective on `operand`, complete", operands="started operand", traits=_C)
