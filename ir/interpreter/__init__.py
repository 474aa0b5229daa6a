"""The reference interpreter: what a module at the graph, tensor or tile level means, on torch tensors on the CPU.

    results = interpret(module, inputs)
    exact = interpret(module, inputs, precision=torch.float64)        # for error budgets
    (folded,) = interpret_op(op, constants)                           # constant folding of one pure op

A function may mix levels: graph ops, tensor ops, `tensor.fused` regions and `tile.launch` of kernels in the module.
Two levels of one program interpreted on the same inputs must agree: that is how a wrong pass is found.
Not part of `aicc.ir` proper (which does without torch): import `aicc.ir.interpreter`.

Invariants
- Values are torch tensors with the declared shape and element type (checked after every op). Layout has no meaning at the
  graph and tensor levels; `tile.launch` lays its operands out in memory as their types say.
- `graph.assign` / `tensor.assign` are carried out at the end, on the caller's tensors: results never alias them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..core import IRError, Operation
from ..expr import Expr, free_symbols
from ..types import TensorType
from . import arith, function, graph, tensor, tile
from .context import TORCH_DTYPES, Context, Handler, Numerics, bind_shape, failure

__all__ = ["interpret", "interpret_op"]

HANDLERS = {**arith.HANDLERS, **graph.HANDLERS, **tensor.HANDLERS, **tile.HANDLERS, **function.HANDLERS}


def _find_func(module: Operation, name: str | None) -> Operation:
    """The function called `name`, or the only one. `module` may be a function itself."""
    if module.name == "func":
        return module
    funcs = [op for op in module.body if op.name == "func" and (not op["private"] if name is None else op["sym_name"] == name)]
    if len(funcs) == 1:
        return funcs[0]
    known = ", ".join(f"@{op['sym_name']}" for op in module.body if op.name == "func")
    raise IRError(f"the module has no function @{name}; it has {known or 'none'}" if name is not None else
                  f"the module has {len(funcs)} functions ({known}); say which with `func`")


def _bind_inputs(func: Operation, inputs: Sequence[torch.Tensor], ctx: Context) -> None:
    """Learns the size symbols from the inputs and checks shapes and element types against the arguments."""
    args, name = func.body.args, func["sym_name"]
    if len(inputs) != len(args):
        raise IRError(f"@{name} takes {len(args)} arguments, got {len(inputs)}")
    for symbol, (arg, d, *kind) in func["symbol_sources"].items():
        ctx.symbols.setdefault(symbol, inputs[arg].stride(d) if kind == ["stride"] else inputs[arg].shape[d])
    for _ in range(2):  # a symbol may be learnt from a later argument than the one that needs it
        for i, (a, x) in enumerate(zip(args, inputs)):
            if not isinstance(a.type, TensorType):
                raise IRError(f"argument {i} of @{name} is a {a.type}: only functions on tensors can be interpreted")
            bind_shape(a.type.shape, x.shape, ctx.symbols, f"argument {i} of @{name}")
            known = (ctx.dtype(a.type), TORCH_DTYPES[a.type.dtype.name])
            if x.dtype not in known:
                raise IRError(f"argument {i} of @{name} is {a.type}, got a tensor of {x.dtype}")
    for a in args:
        missing = {s for e in a.type.shape for s in free_symbols(e)} - ctx.symbols.keys()  # type: ignore[attr-defined]
        if missing:
            raise IRError(f"the argument shapes do not determine {', '.join(sorted(missing))}; give `symbols`")


@torch.no_grad()
def interpret(module: Operation, inputs: Sequence[Any], *, symbols: Mapping[str, int] | None = None, func: str | None = None,
              precision: torch.dtype | None = None, exact: bool = False, check: bool = False,
              handlers: Mapping[str, Handler] | None = None) -> list[torch.Tensor]:
    """Runs a function of `module` (the only one, or `func`) on `inputs`; gives the operands of its `return`.

    inputs: one CPU tensor per argument, of the argument's element type (or `precision`, for floats); or the whole argument list
        of the compiled function, with the ints of `symbol_args` at their positions.
    symbols: size symbol -> value. Those not given are read off the inputs (`symbol_sources`, then the argument types).
    precision: hold all floats in this dtype (torch.float64), whatever the types say; results then have it too.
        Casts to narrower floats do not round unless `exact`.
    check: kernels also verify that no two programs write one element, and that all of every output is written.

    handlers: other semantics for some ops, by name (a backend that runs `tile.launch` itself, say).

    Tensors that the function assigns to are updated in place at the end, as a compiled function would: pass clones to
    keep them.
    Raises IRError with the op and its Python line for IR that is wrong; IndexError for indices (data) out of range.
    """
    function = _find_func(module, func)
    kernels = {op["sym_name"]: op for op in module.body if op.name == "tile.kernel"} if module.name == "module" else {}
    functions = {op["sym_name"]: op for op in module.body if op.name == "func"} if module.name == "module" else {}
    ctx = Context({**HANDLERS, **(handlers or {})}, Numerics(precision, exact), dict(symbols or {}), kernels, check, functions=functions)
    passed = {row["position"]: row["expr"] for row in function["symbol_args"]}
    if passed and len(inputs) == len(passed) + len(function.body.args):
        for position, expr in passed.items():
            if isinstance(expr, Expr) and free_symbols(expr) == {str(expr)}:  # a bare symbol; `s0*2` defines nothing
                ctx.symbols.setdefault(str(expr), int(inputs[position]))
        inputs = [x for i, x in enumerate(inputs) if i not in passed]
    _bind_inputs(function, inputs, ctx)
    args = function.body.args
    values = [ctx.to_type(x.detach(), a.type) for a, x in zip(args, inputs)]
    results = ctx.run_block(function.body, dict(zip(args, values)))
    results = [r.clone() if ctx.assignments else r for r in results]
    for target, value in ctx.assignments:
        found = next((i for i, a in enumerate(args) if a is target), None)
        if found is None:
            raise IRError("an assignment's target is not an argument of the function")
        inputs[found].copy_(value)
    return results


def interpret_op(op: Operation, operands: Sequence[Any], *, symbols: Mapping[str, int] | None = None) -> list[Any]:
    """The results of a single op of the graph, tensor or arith dialect on constant operands (torch tensors; Python numbers too
    for scalars). IRError if the op depends on sizes not in `symbols`, or has no value by itself.
    """
    ctx = Context(HANDLERS, symbols=dict(symbols or {}))
    values = [x if isinstance(x, torch.Tensor) else ctx.scalar(x, v.type.dtype)  # type: ignore[attr-defined]
              for x, v in zip(operands, op.operands, strict=True)]
    results = list(ctx.run_op(op, values))
    if ctx.assignments:
        raise failure(op, "an assignment has no value")
    return results
