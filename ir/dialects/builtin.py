"""`module`, `func`, `return` and `loop`: what every level of value semantics shares."""

from __future__ import annotations

from ..core import IRError, Operation
from ..opdef import Trait, attr, define, optional
from ..types import TensorType


def _verify_func(op: Operation) -> None:
    last = op.body.last
    if last is None or last.name != "return":
        raise IRError("the body of a function must end with 'return'")
    for key in ("arg_attrs",):
        given = op[key]
        if given and len(given) != len(op.body.args):
            raise IRError(f"'{key}' has {len(given)} entries for {len(op.body.args)} arguments")


MODULE = define("module", "A compilation unit: functions and kernels.", results=(), regions=1,
                attrs={"sym_name": optional("", "the name of the unit"),
                       "level": optional("", "graph, tensor, tile or host: what the functions hold"),
                       "target": optional("", "what it is compiled for, such as 'cpu' or 'cuda:90'")},
                traits=[Trait.IsolatedFromAbove, Trait.Symbol])

FUNC = define("func", "A function; arguments are the block arguments, results the operands of its return.", results=(), regions=1,
              attrs={"sym_name": attr("its name"),
                     "symbols": optional({}, "size symbol -> [smallest, largest or none]; both inclusive"),
                     "symbol_args": optional((), "ints among the arguments: one {position, expr} each; a bare symbol is defined there"),
                     "symbol_sources": optional({}, "symbol -> [argument index, dimension]: where a size symbol is read off"),
                     "arg_attrs": optional((), "one dictionary per argument: {name, kind='param'|'buffer'|'input'|'constant', position}"),
                     "result_attrs": optional((), "one dictionary per result: {kind, strides, ...}; see frontend/importer.py"),
                     "private": optional(False, "the body of a `loop`: called from within the module only"),
                     "stats": optional({}, "facts recorded by passes, such as arena bytes")},
              traits=[Trait.IsolatedFromAbove, Trait.Symbol], verify=_verify_func)

RETURN = define("return", "Ends a function and gives its results.", operands="values*", results=(), traits=[Trait.Terminator])


def _verify_loop(op: Operation) -> None:
    carried, sliced = op["carried"], op["sliced"]
    if not (carried >= 0 and sliced >= 1 and carried + sliced <= len(op.operands) and carried <= len(op.results)):
        raise IRError(f"'loop' carries {carried} and slices {sliced} of its {len(op.operands)} operands, and has {len(op.results)} results")
    for i in range(carried):
        before, after = op.operands[i].type, op.results[i].type
        if not (isinstance(before, TensorType) and isinstance(after, TensorType)) or (before.shape, before.dtype) != (after.shape, after.dtype):
            raise IRError(f"carried value {i} is {before} before and {after} after the loop")
    trips = {v.type.shape[:1] for v in (*op.operands[carried:carried + sliced], *op.results[carried:])}  # type: ignore[attr-defined]
    if len(trips) != 1 or () in trips:
        raise IRError(f"the sliced operands and stacked results of 'loop' must agree in dimension 0; found {sorted(map(str, trips))}")


LOOP = define("loop", "For t = 0, 1, ... along dimension 0 of the sliced operands: (carried, y) = body(carried, each sliced[t], invariant). "
              "Results: the last carried values, then each y stacked along dimension 0. Without trips the carried values stay.",
              operands="carried_sliced_invariant*", results="carried_stacked*",
              attrs={"body": attr("@name of a private function"), "carried": attr("how many values go from trip to trip"),
                     "sliced": attr("how many operands each trip gets a slice of"),
                     "reversed_operands": optional((), "which of the sliced are read from the last slice to the first"),
                     "reversed_results": optional((), "which of the stacked are written from the last slice to the first")},
              traits=[Trait.Pure], verify=_verify_loop)
