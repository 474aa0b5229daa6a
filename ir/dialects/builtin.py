"""`module`, `func` and `return`: what every level shares."""

from __future__ import annotations

from ..core import IRError, Operation
from ..opdef import Trait, attr, define, optional


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
                     "result_attrs": optional((), "one dictionary per result: {kind, strides, alias_of_arg}; see frontend/importer.py"),
                     "stats": optional({}, "facts recorded by passes, such as arena bytes")},
              traits=[Trait.IsolatedFromAbove, Trait.Symbol], verify=_verify_func)

RETURN = define("return", "Ends a function and gives its results.", operands="values*", results=(), traits=[Trait.Terminator])
