"""Greedy pattern rewriting, driven to a fixed point by a worklist.

A pattern is a function `(op, rewriter) -> None` that looks at one op and may change IR through the rewriter. When the worklist is still
not empty after `max_steps` per op, `rewrite_greedily` raises: a loop that does not converge is a bug in a pattern, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .builder import Builder
from .core import IRError, Operation, Value

__all__ = ["ConvergenceError", "Pattern", "Rewriter", "rewrite_greedily"]

Pattern = Callable[[Operation, "Rewriter"], None]


class ConvergenceError(IRError):
    """Patterns undo each other, or grow the IR without end."""


class Rewriter:
    """Changes IR and notes what must be looked at again."""

    def __init__(self) -> None:
        self._worklist: dict[Operation, None] = {}
        self.erased: set[Operation] = set()
        self.changed = False

    def builder(self, op: Operation) -> Builder:
        """Builds before `op`, with its location. Call `touch` on new ops that patterns should see."""
        return Builder.before_op(op)

    def touch(self, op: Operation) -> None:
        if op not in self.erased:
            self._worklist[op] = None

    def replace(self, op: Operation, values: Sequence[Value]) -> None:
        """Replaces the results of `op` by `values` and erases it."""
        if len(values) != len(op.results):
            raise IRError(f"'{op.name}' has {len(op.results)} results, {len(values)} replacements given")
        for r, v in zip(op.results, values, strict=True):
            for user in r.users:
                self.touch(user)
            r.replace_all_uses_with(v)
            if v.defining_op is not None:
                self.touch(v.defining_op)
        self.erase(op)

    def erase(self, op: Operation) -> None:
        for v in op.operands:
            if v.defining_op is not None:
                self.touch(v.defining_op)
        for inner in op.walk():
            self.erased.add(inner)
            self._worklist.pop(inner, None)
        op.erase()
        self.changed = True

    def modified(self, op: Operation) -> None:
        """`op` was changed in place."""
        self.changed = True
        self.touch(op)
        for r in op.results:
            for user in r.users:
                self.touch(user)


def rewrite_greedily(root: Operation, patterns: Mapping[str, Sequence[Pattern]], *, max_steps: int = 64) -> bool:
    """Applies patterns until none fires. `patterns` maps an op name, or "*" for every op, to its patterns.

    Returns whether anything changed. Raises ConvergenceError after `max_steps` visits per initial op.
    """
    rewriter = Rewriter()
    initial = [op for op in root.walk() if op is not root]
    for op in initial:
        rewriter.touch(op)
    budget = max_steps * (len(initial) + 1)
    anywhere = patterns.get("*", ())
    while rewriter._worklist:
        op = next(iter(rewriter._worklist))
        del rewriter._worklist[op]
        for pattern in (*patterns.get(op.name, ()), *anywhere):
            pattern(op, rewriter)
            if op in rewriter.erased:
                break
        budget -= 1
        if budget < 0:
            raise ConvergenceError(f"rewriting does not converge after {max_steps} visits per op; still changing '{op.name}' at {op.location}")
    return rewriter.changed
