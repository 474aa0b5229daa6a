"""The invariants of IR, checked at every boundary between passes.

Structure first (SSA dominance, isolation, operand and attribute lists against the op's definition), then the op's own
`verify`. An error says what is wrong, where in the Python program, and shows the IR around it.
"""

from __future__ import annotations

import difflib

from .attributes import check_attribute
from .core import Block, IRError, Operation, Value
from .opdef import OpDef, Trait
from .printer import print_op

__all__ = ["VerificationError", "verify"]

CONTEXT_LINES = 5


class VerificationError(IRError):
    """IR that breaks an invariant; `op` is the offending operation."""

    def __init__(self, message: str, op: Operation):
        self.op = op
        where = f"\n  at {op.location}" if op.location.file else ""
        super().__init__(f"'{op.name}': {message}{where}\n{_context(op)}")


def _context(op: Operation) -> str:
    """The op and the lines around it, marked with '>'."""
    before: list[str] = []
    after: list[str] = []
    p = op.prev
    while p is not None and len(before) < CONTEXT_LINES:
        before.append(_head(p))
        p = p.prev
    n = op.next
    while n is not None and len(after) < CONTEXT_LINES:
        after.append(_head(n))
        n = n.next
    return "\n".join([*("    " + x for x in reversed(before)), "  > " + _head(op), *("    " + x for x in after)])


def _head(op: Operation) -> str:
    try:
        text = print_op(op).split("\n", 1)[0]
    except Exception:  # a malformed op must still be reportable
        text = f"<unprintable {op.name}>"
    return text if len(text) <= 240 else text[:237] + "..."


def verify(op: Operation) -> None:
    """Checks `op` and everything inside. Raises VerificationError for the first violation."""
    _verify_op(op, set())


def _verify_op(op: Operation, visible: set[Value]) -> None:
    operands = op.operands
    for i, v in enumerate(operands):
        if v not in visible:
            raise VerificationError(f"operand {i} is not defined before its use (or not visible in this region)", op)
    d = op.opdef
    if len(operands) != len(d.operands) or len(op.results) != len(d.results) or len(op.regions) != d.regions:
        _check_counts(op, d)
    _check_attributes(op, d)
    if op.regions:
        inner = set() if Trait.IsolatedFromAbove in d.traits else visible
        for region in op.regions:
            for block in region.blocks:
                _verify_block(block, inner)
    if op.opdef.verify is not None:
        try:
            op.opdef.verify(op)
        except VerificationError:
            raise
        except (IRError, KeyError, TypeError, ValueError, AttributeError, IndexError, AssertionError) as e:
            raise VerificationError(str(e) or type(e).__name__, op) from e
    visible.update(op.results)


def _verify_block(block: Block, outside: set[Value]) -> None:
    visible = set(outside)
    visible.update(block.args)
    for op in block:
        if op.next is not None and op.has_trait(Trait.Terminator):
            raise VerificationError("a terminator must be the last op of its block", op)
        _verify_op(op, visible)


def _count_error(what: str, names: tuple[str, ...], n: int) -> str | None:
    if names and names[-1].endswith("*"):
        return None if n >= len(names) - 1 else f"needs at least {len(names) - 1} {what} ({', '.join(names)}), has {n}"
    return None if n == len(names) else f"has {n} {what}, its definition names {len(names)}: {', '.join(names) or 'none'}"


def _check_counts(op: Operation, d: OpDef) -> None:
    for what, names, n in (("operands", d.operands, len(op.operands)), ("results", d.results, len(op.results))):
        problem = _count_error(what, names, n)
        if problem:
            raise VerificationError(problem, op)
    if len(op.regions) != d.regions:
        raise VerificationError(f"has {len(op.regions)} regions, its definition {d.regions}", op)


def _check_attributes(op: Operation, d: OpDef) -> None:
    for key, value in op.attributes.items():
        if key not in d.attrs and not key.startswith("_"):
            near = difflib.get_close_matches(key, d.attrs, 1)
            raise VerificationError(f"unknown attribute '{key}'" + (f"; did you mean '{near[0]}'?" if near else
                                    f"; it has {', '.join(d.attrs) or 'none'}"), op)
        try:
            check_attribute(value)
        except TypeError as e:
            raise VerificationError(f"attribute '{key}': {e}", op) from e
    if not d.required <= op.attributes.keys():
        raise VerificationError(f"lacks the attribute {', '.join(k for k in d.attrs if k in d.required - op.attributes.keys())}", op)
