"""Parts of a merged kernel that differ in their buffers alone are printed once.

    for run in equal_runs(kernel):      # neighbouring `tile.part`s, in order
        run.parts                       # the first is printed
        run.buffers                     # for each buffer that it uses: the buffers that the parts have in its place

Sixty-four sums of bias gradients are five loops, not sixty-four: a program picks its buffers by its number (`picked`), and Triton, some of whose
passes take longer than linear time in the length of a kernel, has a tenth of the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...ir.core import Block, Operation, Value, equivalent

__all__ = ["LONGEST", "Run", "equal_runs", "picked"]

LONGEST = 16
"""Parts of a run: a program selects among the addresses of all, two instructions each for every buffer."""


@dataclass(frozen=True)
class Run:
    """Neighbouring parts of one structure. `buffers`: first's buffer -> those of all parts."""

    parts: tuple[Operation, ...]
    buffers: dict[Value, tuple[Value, ...]]


def equal_runs(kernel: Operation, aligned: Sequence[bool] = ()) -> Iterator[Run]:
    """The parts of a kernel in runs of equal ones. `aligned` says of each buffer that its address is a multiple of 16 bytes, where that is known:
    it is the same in a run. Where it is, matrices are read by tensor maps, which are parameters each: such parts stay by themselves."""
    run: list[Operation] = []
    for part in [op for op in kernel.body if op.name == "tile.part"]:
        if run and len(run) < LONGEST and _alike(run[0], part, aligned):
            run.append(part)
            continue
        if run:
            yield _run(run)
        run = [part]
    if run:
        yield _run(run)


def _run(parts: Sequence[Operation]) -> Run:
    places = [_buffers(p.body) for p in parts]
    return Run(tuple(parts), {first: tuple(p[k] for p in places) for k, first in enumerate(places[0])})


def _alike(a: Operation, b: Operation, aligned: Sequence[bool]) -> bool:
    if a["grid"] != b["grid"] or len(a.body) != len(b.body):
        return False
    if aligned and any(o.name == "tile.load" and o["matrix"] for o in a.walk()):
        return False
    ours, theirs = _buffers(a.body), _buffers(b.body)
    if [v.type for v in ours] != [v.type for v in theirs]:
        return False
    if aligned and any(aligned[x.index] != aligned[y.index] for x, y in zip(ours, theirs, strict=True)):  # type: ignore[attr-defined]
        return False
    same = dict(zip(ours, theirs, strict=True))
    return all(equivalent(x, y, same=same) for x, y in zip(a.body, b.body, strict=True))


def _buffers(body: Block) -> list[Value]:
    """What a part uses from outside, in order of first use."""
    inside: set[Value] = set()
    found: dict[Value, None] = {}
    for top in body:
        for op in top.walk():
            inside.update(op.results)
            inside.update(a for region in op.regions for block in region.blocks for a in block.args)
            found.update(dict.fromkeys(v for v in op.operands if v not in inside))
    return list(found)


def picked(names: Sequence[str], which: str) -> str:
    """The name of number `which` of several, as an expression: by halves, so that few selections wait for each other."""
    def part(low: int, high: int) -> str:
        if high - low == 1 or len(set(names[low:high])) == 1:
            return names[low]
        middle = (low + high) // 2
        return f"tl.where({which} < {middle}, {part(low, middle)}, {part(middle, high)})"
    return part(0, len(names))
