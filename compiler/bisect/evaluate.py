"""What a stage computes: FX graphs by ATen, modules on tensors by the reference interpreter.

    outputs = run_fx(gm, arguments, torch.float64)         # floats held in float64, whatever the graph says
    outputs = run_module(module, arguments, torch.float64)
    values = trace(module, arguments)                      # of every op

Outputs are the tensors that the graph returns, then the arguments that it writes to. Arguments themselves are never changed.
An operator that has no float64 form runs in its own types; one that draws random numbers does so too, from torch's generator with one seed per
run, so that all stages draw alike (passes keep the order of such operators).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ...ir.core import BlockArg, IRError, Operation, Value
from ...ir.interpreter import HANDLERS, interpret
from ...ir.interpreter.context import Context, Handler, Numerics
from ...ir.opdef import Trait
from ...ir.types import TensorType
from .capture import copied

__all__ = ["SEED", "Trace", "function_of", "run_fx", "run_module", "tensor_outputs", "trace", "written_arguments"]

Tensor = torch.Tensor
SEED = 20_240_613
_KEEP_TYPES = ("aten.view.dtype", "prims.view_element_type.default", "aten.randint", "aten.frexp")
"""Operators that look at bits: float64 would give them others."""
_WIDE = {torch.float32: torch.float64, torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.complex64: torch.complex128,
         torch.float8_e4m3fn: torch.float64, torch.float8_e5m2: torch.float64}


# -- FX graphs

def _widened(x: Any) -> Any:
    if isinstance(x, torch.dtype):
        return _WIDE.get(x, x)
    return x.to(_WIDE[x.dtype]) if isinstance(x, Tensor) and x.dtype in _WIDE else x


class _Wide(torch.fx.Interpreter):
    """Runs a graph with every float in float64; `see` is told of each node's value."""

    def __init__(self, gm: torch.fx.GraphModule, wide: bool, see: Callable[[torch.fx.Node, Any], None] | None):
        super().__init__(gm)
        self.wide, self.see = wide, see

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n) if not self.wide or n.op in ("placeholder", "output") else self._wide_node(n)
        if self.see is not None:
            self.see(n, value)
        return value

    def _wide_node(self, n: torch.fx.Node) -> Any:
        if n.op == "get_attr":
            return _widened(super().run_node(n))
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if not str(n.target).startswith(_KEEP_TYPES):
            try:
                return getattr(self, n.op)(n.target, *pytree.tree_map(_widened, (args, kwargs)))
            except (RuntimeError, NotImplementedError, TypeError):
                pass
        types = {id(node): node.meta["val"].dtype for node in n.all_input_nodes if isinstance(node.meta.get("val"), Tensor)}
        narrow = {id(self.env[node]): types[id(node)] for node in n.all_input_nodes if id(node) in types}
        args, kwargs = pytree.tree_map(lambda x: x.to(narrow[id(x)]) if isinstance(x, Tensor) and id(x) in narrow else x, (args, kwargs))
        return pytree.tree_map(_widened, getattr(self, n.op)(n.target, args, kwargs))


@torch.no_grad()
def run_fx(gm: torch.fx.GraphModule, arguments: Sequence[Any], precision: torch.dtype | None = None,
           see: Callable[[torch.fx.Node, Any], None] | None = None) -> list[Any]:
    """The outputs of an FX graph (tensors, ints, None, as it returns them) and its tensor arguments after the call.

    Not for graphs that draw random numbers in another precision: they would draw others.
    """
    given = [copied(a, precision) for a in arguments]
    torch.manual_seed(SEED)
    out = _Wide(gm, precision is not None, see).run(*given)
    return [*(out if isinstance(out, (tuple, list)) else [out]), *(a for a in given if isinstance(a, Tensor))]


# -- modules

def function_of(module: Operation) -> Operation:
    """The module's only function. IRError if it has none, or several."""
    funcs = [op for op in module.body if op.name == "func" and not op["private"]]
    if len(funcs) != 1:
        raise IRError(f"bisect needs a module with one function, this one has {len(funcs)}")
    return funcs[0]


def written_arguments(func: Operation) -> list[int]:
    """Block arguments that the function assigns to, in order."""
    return sorted({op.operands[0].index for op in func.body if op.name in ("graph.assign", "tensor.assign") and isinstance(op.operands[0], BlockArg)})


def tensor_outputs(func: Operation, returned: Sequence[Any]) -> list[Tensor]:
    """The tensors among what a compiled graph (or its FX graph) returns: those that `return` of a tensor-level function has operands for."""
    kinds = [a.get("kind", "tensor") for a in func["result_attrs"]] or ["tensor"] * len(returned)
    return [x if isinstance(x, Tensor) else torch.tensor(x) for x, kind in zip(returned, kinds) if kind != "none"]


@dataclass
class Trace:
    """Values of ops by SSA value, and of size symbols."""

    values: dict[Value, Tensor] = field(default_factory=dict)
    symbols: dict[str, int] = field(default_factory=dict)


def _in_own_types(ctx: Context, op: Operation, xs: list[Any], base: Handler) -> list[Any]:
    """Runs one op as `base` does in the declared types; results in the context's precision."""
    inner = replace(ctx, numerics=Numerics())
    given = [inner.to_type(x, v.type) if isinstance(v.type, TensorType) else x for x, v in zip(xs, op.operands)]
    results = base(inner, op, given)
    return [ctx.to_type(x, r.type) if isinstance(r.type, TensorType) else x for x, r in zip(results, op.results)]


def _extern_handler(base: Handler) -> Handler:
    def run(ctx: Context, op: Operation, xs: list[Any]) -> Sequence[Any]:
        if ctx.numerics.precision is None:
            return base(ctx, op, xs)
        if not op["random"] and not op["target"].startswith(_KEEP_TYPES):
            try:
                return base(ctx, op, xs)
            except (RuntimeError, TypeError, ValueError, IRError):
                pass  # it has no such form
        return _in_own_types(ctx, op, xs, base)
    return run


def _folded(ops: Iterable[Operation]) -> set[Operation]:
    """Ops that depend on constants alone: a pass may compute them in their own types."""
    found: set[Operation] = set()
    for op in ops:
        if op.has_trait(Trait.Pure) and all(v.defining_op in found for v in op.operands) and (op.operands or op.has_trait(Trait.ConstantLike)):
            found.add(op)
    return found


def run_module(module: Operation, arguments: Sequence[Any], precision: torch.dtype | None = None, *, fold: bool = False, check: bool = False,
               handlers: Mapping[str, Handler] | None = None, into: Trace | None = None) -> list[Tensor]:
    """The outputs of a module's function: what it returns, then the arguments that it assigns to.

    fold: what depends on constants alone is computed in its own types even with `precision`, as constant folding does.
    check: kernels are checked for races and elements that nobody writes.
    into: learns the value of every op, and of the symbols.
    """
    func = function_of(module)
    given = [copied(a, precision) for a in arguments]
    table: dict[str, Handler] = {n: _extern_handler(HANDLERS[n]) for n in ("graph.extern", "tensor.extern")}
    table |= handlers or {}
    constant = _folded(op for f in module.body if f.name == "func" for op in f.walk()) if fold and precision is not None else set()
    if constant:
        for name in {op.name for op in constant}:
            table[name] = _folding(table.get(name) or HANDLERS[name], constant)
    if into is not None:
        table = {n: _recording(table.get(n) or h, into) for n, h in HANDLERS.items()}
    torch.manual_seed(SEED)
    results = interpret(module, given, precision=precision, check=check, handlers=table)
    tensors = [a for a in given if isinstance(a, Tensor)]
    return [*results, *(tensors[i] for i in written_arguments(func))]


def _folding(base: Handler, constant: set[Operation]) -> Handler:
    return lambda ctx, op, xs: _in_own_types(ctx, op, xs, base) if op in constant else base(ctx, op, xs)


def _recording(base: Handler, into: Trace) -> Handler:
    def run(ctx: Context, op: Operation, xs: list[Any]) -> Sequence[Any]:
        results = base(ctx, op, xs)
        for r, x in zip(op.results, results):
            if isinstance(r.type, TensorType):
                into.values[r] = x
        into.symbols.update(ctx.symbols)
        return results
    return run


def trace(module: Operation, arguments: Sequence[Any], precision: torch.dtype | None = None) -> Trace:
    """The value of every argument and op of the module's function and of its fused groups, and of its size symbols."""
    func = function_of(module)
    found = Trace()
    run_module(module, arguments, precision, into=found)
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    found.values.update(zip(func.body.args, tensors, strict=True))
    for op in func.body:
        if op.name == "tensor.fused":
            found.values.update((a, found.values[v]) for a, v in zip(op.body.args, op.operands, strict=True))
    return found
