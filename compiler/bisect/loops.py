"""Programs of loops, for the reducer: what a loop needs of its module, and one trip of it as a program of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ...ir import make_module
from ...ir.core import IRError, Operation
from ...ir.expr import sym
from ...ir.interpreter import HANDLERS
from ...ir.interpreter.context import Context
from .evaluate import function_of, run_module

__all__ = ["called", "trips_of"]


def called(module: Operation, ops: Sequence[Operation]) -> set[Operation]:
    """The kernels and the bodies of loops that `ops` use, and those use."""
    symbols = {op["sym_name"]: op for op in module.body}
    found: set[Operation] = set()
    pending = list(ops)
    while pending:
        for op in pending.pop().walk():
            for key in ("kernel", "body"):
                name = getattr(op.attributes.get(key), "name", None)
                if name in symbols and symbols[name] not in found:
                    found.add(symbols[name])
                    pending.append(symbols[name])
    return found


def trips_of(module: Operation, arguments: Sequence[Any], loop: Operation) -> Iterator[tuple[Operation, list[Any]]]:
    """The body of a loop as a program, with what the first, the second and the last trip is given; nothing where the module does not run."""
    seen: list[tuple[Context, list[Any]]] = []

    def see(ctx: Context, op: Operation, xs: list[Any]) -> Sequence[Any]:
        if op is loop:
            seen.append((ctx, list(xs)))
        return HANDLERS["loop"](ctx, op, xs)
    try:
        run_module(module, arguments, handlers={"loop": see})
    except (IRError, IndexError, RuntimeError):
        return
    for ctx, xs in seen[:1]:
        n, m = loop["carried"], loop["sliced"]
        trips = xs[n].shape[0]

        def part(x: Any, j: int, first: int, end: int, trips: int = trips) -> Any:
            return x[trips - end:trips - first] if j in loop["reversed_operands"] else x[first:end]
        for t in sorted({0, 1, trips - 1} & set(range(trips))):
            before = [*xs[:n], *(part(x, j, 0, t) for j, x in enumerate(xs[n:n + m])), *xs[n + m:]]
            carried = list(HANDLERS["loop"](ctx, loop, before))[:n]
            given = [*carried, *(part(x, j, t, t + 1)[0] for j, x in enumerate(xs[n:n + m])), *xs[n + m:]]
            made = _body_module(module, loop)
            yield made, [*(x.clone() for x in given), *(ctx.symbols[s] for s in function_of(made)["symbols"])]


def _body_module(module: Operation, loop: Operation) -> Operation:
    """A module whose function is the body of `loop`; the size symbols are arguments at the end."""
    source = next(op for op in module.body if op.name == "func" and op["sym_name"] == loop["body"].name)
    made, top = make_module(module.attributes.get("level", ""))
    made.attributes.update(module.attributes)
    needed = called(module, [source]) - {source}
    func = source.clone()
    func.attributes["private"] = False
    count = len(func.body.args)
    func.attributes["arg_attrs"] = tuple({"name": a.name or f"a{i}", "kind": "input", "position": i} for i, a in enumerate(func.body.args))
    func.attributes["result_attrs"] = tuple({"kind": "tensor"} for _ in func.body.terminator.operands)
    if func["symbols"]:
        func.attributes["symbol_args"] = tuple({"position": count + i, "expr": sym(s)} for i, s in enumerate(func["symbols"]))
    for op in module.body:
        if op is source:
            top.append(func)
        elif op in needed:
            top.append(op.clone())
    return made
