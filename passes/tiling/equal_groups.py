"""Groups that have a kernel already: the layers of a model are alike, and making kernels is most of the time of the pass `tile`.

    seen = Lowered()
    name = seen.kernel_of(group, ctx)        # None: nothing like it was there before
    entry = seen.remember(group)             # before it is lowered, which changes it; then fill in entry.kernel and entry.remarks
    seen.forget()                            # in the end

What a kernel depends on besides its group is which of the operands are the function's own arguments.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ...ir import UNKNOWN, Operation, equivalent
from ...ir.attributes import attribute_equal
from ...ir.passes import PassContext, Remark

__all__ = ["Entry", "Lowered"]


@dataclass
class Entry:
    """A copy of a group as it was, the name of its kernel, and what was said while that was made."""

    group: Operation
    kernel: str = ""
    remarks: tuple[Remark, ...] = ()


@dataclass
class Lowered:
    """The groups of one function that were lowered."""

    known: dict[tuple[object, ...], list[Entry]] = field(default_factory=dict)

    def kernel_of(self, group: Operation, ctx: PassContext) -> str | None:
        """The kernel of an equal group, whose remarks are made about this one too."""
        for entry in self.known.get(_key(group), ()):
            if _alike(entry.group, group):
                first = group.body.first
                assert first is not None
                for r in entry.remarks:
                    ctx.remark(r.kind, r.message, first.location if r.location != UNKNOWN else UNKNOWN)
                return entry.kernel
        return None

    def remember(self, group: Operation) -> Entry:
        """An entry for a group that is about to be lowered."""
        made = Entry(group.clone())
        self.known.setdefault(_key(group), []).append(made)
        return made

    def forget(self) -> None:
        """Copies use values of the function no more."""
        for entries in self.known.values():
            for entry in entries:
                entry.group.drop_references()
        self.known.clear()


def _alike(a: Operation, b: Operation) -> bool:
    """Structurally equal but for the name that the kernel would have."""
    ours, theirs = ({k: v for k, v in op.attributes.items() if k != "kernel"} for op in (a, b))
    if not attribute_equal(ours, theirs) or [x.type for x in a.body.args] != [x.type for x in b.body.args]:
        return False
    same = dict(zip((*a.operands, *a.body.args), (*b.operands, *b.body.args), strict=True))
    return all(equivalent(x, y, same=same) for x, y in zip(a.body, b.body, strict=True))


def _key(group: Operation) -> tuple[object, ...]:
    operands = group.operands
    return (len(group.body), *[(v.type, v.defining_op is None) for v in operands], *[operands.index(v) for v in operands],
            *[r.type for r in group.results])
