"""Cuts a joint module (forward and backward in one function) into two that run at different times.

    cut = split(module, outputs, tangents, recompute="selective")
    cut.forward     arguments: those of the joint function but for the tangents; results: `outputs`, then the saved values
    cut.backward    arguments: saved arguments, saved values, tangents; results: the gradients

An op that the outputs need is forward; all others are backward. What the backward ops read of the forward ones is saved, or made again,
as `recompute.py` says. What is made again is made where it is first read, not before: only then do the blocks' values not all live at once.

A backward function can be cut once more, into what the gradients of its inputs need and what only the gradients of weights do: zero-bubble
schedules put the second off.

    halves = split(backward, inputs, 0)       # the first `inputs` results are the gradients that others wait for
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...ir.core import Block, BlockArg, Operation, Region, Value
from ...ir.types import TensorType
from ...ir.verifier import verify
from .recompute import cheaper_roots, derivation, recomputable
from .seeds import forward_ops

__all__ = ["Split", "split"]


@dataclass(frozen=True)
class Split:
    """saved_arguments: which arguments of the joint function come first in the backward function."""

    forward: Operation
    backward: Operation
    saved_arguments: tuple[int, ...]
    saved_values: int


def split(module: Operation, outputs: int, tangents: int, *, recompute: str = "none") -> Split:
    """See the module docstring. The last `tangents` arguments are the gradients of the outputs, the first `outputs` results the outputs."""
    func = next(op for op in module.body if op.name == "func")
    args = func.body.args
    primals, returned = args[:len(args) - tangents], func.body.terminator.operands
    forward = forward_ops(func, outputs)
    inside, remade = set(forward), recomputable(forward, recompute)
    kept: dict[Value, None] = {}
    again: dict[Operation, None] = {}
    wanted = list(returned[outputs:])
    backward: set[Operation] = set()
    while wanted:
        v = wanted.pop()
        op = v.defining_op
        if op is None or v in kept:
            if isinstance(v, BlockArg) and v in primals:
                kept[v] = None
            continue
        if op in backward or op in again:
            continue
        if op not in inside:
            backward.add(op)
        elif remade(op):
            again[op] = None
        else:
            kept[v] = None
            continue
        wanted.extend(op.operands)
    kept.update(dict.fromkeys(cheaper_roots([v for v in kept if not isinstance(v, BlockArg)])))
    order: dict[Value, int] = {r: i for i, r in enumerate(r for op in func.body for r in op.results)}
    for v in sorted((v for v in kept if not isinstance(v, BlockArg)), key=lambda v: -order[v]):
        del kept[v]
        chain = derivation(v, kept)
        if chain is None:
            kept[v] = None
            continue
        again.update(dict.fromkeys(chain))
        kept.update(dict.fromkeys(x for op in chain for x in op.operands if isinstance(x, BlockArg)))
    arguments = tuple(a.index for a in primals if a in kept)
    values = sorted((v for v in kept if not isinstance(v, BlockArg)), key=lambda v: order[v])
    attrs: Any = func["arg_attrs"] or ({},) * len(args)
    first = _function(module, func, primals, [attrs[a.index] for a in primals], forward, [*returned[:outputs], *values])
    body = _late([op for op in func.body if op in backward], set(again))
    inputs: list[Value] = [*(args[i] for i in arguments), *values, *args[len(args) - tangents:]]
    second_attrs = [*(dict(attrs[i]) for i in arguments), *({"kind": "input", "name": v.name} for v in values),
                    *(dict(attrs[a.index]) for a in args[len(args) - tangents:])]
    second = _function(module, func, inputs, second_attrs, body, returned[outputs:])
    verify(first)
    verify(second)
    return Split(first, second, arguments, len(values))


def _late(backward: Sequence[Operation], again: set[Operation]) -> list[Operation]:
    """The backward ops in order, and each op that is made again before the first that needs it."""
    order: list[Operation] = []
    visited: set[Operation] = set()
    for op in backward:
        stack: list[tuple[Operation, bool]] = [(op, False)]
        while stack:
            current, ready = stack.pop()
            if ready:
                order.append(current)
            elif current not in visited:
                visited.add(current)
                stack.append((current, True))
                stack.extend((v.defining_op, False) for v in reversed(current.operands) if v.defining_op in again)
    return order


def _function(module: Operation, func: Operation, inputs: Sequence[Value], attrs: Sequence[dict], ops: Sequence[Operation],
              results: Sequence[Value]) -> Operation:
    """A module with one function of `ops`, and the other ops of `module` as they are."""
    block = Block()
    mapping: dict[Value, Value] = {}
    for v in inputs:
        mapping[v] = block.add_arg(v.type, v.name)
    for op in ops:
        block.append(op.clone(mapping))
    block.append(Operation.create("return", [mapping[v] for v in results]))
    # Row-major, if their types say nothing: the other function takes them so, and a pass that chooses layouts sees only one of the two.
    layouts = tuple({"kind": "tensor", "strides": tuple(v.type.layout)} if isinstance(v.type, TensorType) else {"kind": "tensor"} for v in results)
    numbered = tuple({**{k: v for k, v in a.items() if k != "position"}, "position": i} for i, a in enumerate(attrs))
    made = Operation.create("func", (), {"sym_name": func["sym_name"], "arg_attrs": numbered,
                                         "result_attrs": layouts}, (), [Region([block])], func.location)
    outer = Block()
    for op in module.body:
        outer.append(made if op is func else op.clone())
    return Operation.create("module", (), dict(module.attributes), (), [Region([outer])], module.location)
