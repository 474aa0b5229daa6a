"""What is the same in every trip of a loop is computed once, in front of it.

Before: the body of a `loop` may compute values from its invariant arguments alone (the packed form of a weight, say). After: it is
handed them, no argument of a body is unused, and bodies have no `arg_attrs`: nothing in them is cached between calls of the program.
Inner loops first, so that a value can leave several. Values that need no operand stay where they are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir import Builder, Operation, Trait, Value
from ..ir.passes import Pass, PassContext, register

__all__ = ["HoistInvariants"]


@register
@dataclass(frozen=True)
class HoistInvariants(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "hoist-invariants"

    def run(self, module: Operation, ctx: PassContext) -> None:
        functions = {op["sym_name"]: op for op in module.body if op.name == "func"}
        moved = 0
        done: set[str] = set()

        def visit(func: Operation) -> None:
            nonlocal moved
            if func["sym_name"] in done:
                return
            done.add(func["sym_name"])
            for op in [op for op in func.body if op.name == "loop"]:
                body = functions[op["body"].name]
                visit(body)
                moved += _hoist(op, body)
                _drop_unused(op, body)

        for func in functions.values():
            visit(func)
            if func["private"]:
                func.attributes.pop("arg_attrs", None)
        ctx.remark("done", f"{moved} ops moved in front of loops")


def _hoist(loop: Operation, body: Operation) -> int:
    first = loop["carried"] + loop["sliced"]
    outside: dict[Value, Value] = {a: loop.operands[a.index] for a in body.body.args[first:]}
    free: set[Value] = set()  # values that need no operand
    moved: list[Operation] = []
    b = Builder.before_op(loop)

    def here(v: Value) -> Value:
        """The value of the body, in front of the loop."""
        if v not in outside:
            made = v.defining_op
            assert made is not None
            outside.update(zip(made.results, b.insert(made.clone({})).results, strict=True))
        return outside[v]

    for op in body.body:
        if not op.has_trait(Trait.Pure) or op.has_trait(Trait.Terminator) or not all(v in outside or v in free for v in op.operands):
            continue
        if all(v in free for v in op.operands):
            free.update(op.results)
            continue
        with b.at(op.location):
            copy = b.insert(op.clone({v: here(v) for v in op.operands}))
        outside.update(zip(op.results, copy.results, strict=True))
        moved.append(op)
    gone = set(moved)
    for op in moved:
        for r in op.results:
            if any(user not in gone for user in r.users):
                arg = body.body.add_arg(r.type, r.name)
                r.replace_uses_if(arg, lambda user: user not in gone)
                loop.add_operand(outside[r])
    for op in reversed(moved):
        op.erase()
    return len(moved)


def _drop_unused(loop: Operation, body: Operation) -> None:
    """Invariant arguments that nothing in the body reads."""
    first = loop["carried"] + loop["sliced"]
    block = body.body
    unused = {a.index for a in block.args[first:] if not a.uses}
    loop.set_operands([v for i, v in enumerate(loop.operands) if i not in unused])
    for i in sorted(unused, reverse=True):
        block.erase_arg(i)
