"""The order of a stream's programs: each is there once, long ones first, and lots that are dealt out in rounds are even."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from aicc.ir import Block, Builder, Value
from aicc.ir.expr import evaluate
from aicc.ir.types import index
from aicc.passes.tiling.emit import Emitter
from aicc.passes.tiling.program_order import full_length, place_in_order


def window(blocks: int, length: int) -> list[int]:
    """Steps of 128 of blocks of 128 rows, the last rows first."""
    return [block + 1 - max(0, 128 * block + 1 - length) // 128 for block in reversed(range(blocks))]


def places(elements: int, blocks: int, full: int) -> list[tuple[int, int]]:
    """(element, block) of each program, by what the kernel would compute."""
    e = Emitter(Builder.at_end(Block()), (1, 1), {})
    x = e.fresh(e.builder.op("tile.program_id", type=index, axis=0), 0, elements * blocks - 1)
    found = place_in_order(e, x, elements, blocks, full)

    def value(v: Value, number: int) -> int:
        op = v.defining_op
        assert op is not None
        return number if op.name == "tile.program_id" else int(evaluate(op["expr"], {f"i{k}": value(o, number) for k, o in enumerate(op.operands)}))

    element, block = (e.variables[str(d)] for d in found)
    return [(value(element, n), value(block, n)) for n in range(elements * blocks)]


@pytest.mark.parametrize(("elements", "blocks", "length"), [(64, 32, 1024), (2, 5, 200), (1, 16, 512)])
def test_each_program_is_there_once_and_long_ones_come_first(elements: int, blocks: int, length: int) -> None:
    steps = window(blocks, length)
    full = full_length(steps)
    assert full == steps.count(max(steps)) > blocks / 2
    found = places(elements, blocks, full)
    assert sorted(found) == [(x, y) for x in range(elements) for y in range(blocks)]
    order = [steps[block] for _, block in found]
    assert order == sorted(order, reverse=True)
    assert found[:full] == [(0, block) for block in range(full)], "neighbours of one element stay together"


def test_lots_are_more_even() -> None:
    """132 multiprocessors, every other round backwards: steps of the longest lot over the mean."""
    def longest(order: Sequence[int]) -> float:
        lots = [0] * 132
        for turn in range(-(-len(order) // 132)):
            for p in range(132):
                number = 132 * turn + (p if turn % 2 == 0 else 131 - p)
                lots[p] += order[number] if number < len(order) else 0
        return max(lots) / (sum(lots) / 132)

    steps = window(32, 1024)
    before, after = longest(steps * 64), longest([steps[block] for _, block in places(64, 32, full_length(steps))])
    assert before > 1.03 > 1.016 > after


@pytest.mark.parametrize("steps", [[], [4], [4, 4, 4], [4, 3, 2, 1], [2, 1], [1, 4, 4, 4], [4, 4, 4, 1, 2]])
def test_other_streams_keep_the_order_of_their_rows(steps: list[int]) -> None:
    assert full_length(steps) == 0
