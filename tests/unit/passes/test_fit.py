from __future__ import annotations

import itertools
import random

import pytest
from aicc.passes.fit import Block, fit, peak
from hypothesis import given, settings
from hypothesis import strategies as st

blocks = st.lists(st.builds(lambda size, start, length: Block(size, start, start + length), st.integers(0, 12),
                            st.integers(0, 8),
                            st.integers(0, 4)), max_size=12)


def is_valid(found: list[Block], offsets: tuple[int, ...]) -> bool:
    return all(a.end < b.start or b.end < a.start or x + a.size <= y or y + b.size <= x or not a.size or not b.size
               for (a, x), (b, y) in itertools.combinations(zip(found, offsets, strict=True), 2))


@settings(max_examples=400, deadline=None)
@given(blocks)
def test_placements_are_valid_and_bounded(found: list[Block]) -> None:
    made = fit(found)
    assert is_valid(found, made.offsets) and all(o >= 0 for o in made.offsets)
    assert made.size == max((o + b.size for o, b in zip(made.offsets, found, strict=True)), default=0)
    assert peak(found) == made.lower_bound <= made.size <= sum(b.size for b in found)


def optimum(found: list[Block]) -> int:
    """By trying all offsets below the best known size (tiny cases only)."""
    best = sum(b.size for b in found)
    for limit in range(peak(found), best):
        for offsets in itertools.product(*[range(limit - b.size + 1) for b in found]):
            if is_valid(found, offsets):
                return limit
    return best


@settings(max_examples=60, deadline=None)
@given(st.lists(st.builds(lambda size, start, length: Block(size, start, start + length), st.integers(1, 3), st.integers(0, 4),
                          st.integers(0, 3)), max_size=5))
def test_small_programs_are_optimal(found: list[Block]) -> None:
    assert fit(found).size == optimum(found)


def test_the_gap_of_greedy_by_size_is_closed() -> None:
    """Greedy by size puts 10 and 8 at the bottom and cannot fit 7 under 3; the optimum is the lower bound."""
    found = [Block(10, 0, 1), Block(8, 3, 4), Block(7, 1, 3), Block(3, 2, 3), Block(5, 4, 5)]
    assert fit(found).size == peak(found)


def test_a_chain_needs_two_buffers() -> None:
    chain = [Block(64, i, i + 1) for i in range(500)]
    assert fit(chain).size == 128


@pytest.mark.parametrize("seed", range(3))
def test_large_random_programs_stay_near_the_bound(seed: int) -> None:
    choose = random.Random(seed)
    found = [Block(64 * choose.choice([1, 2, 4, 16, 64, 100]), start, start + choose.choice([1, 1, 2, 3, 8, 40]))
             for start in (choose.randrange(400) for _ in range(600))]
    made = fit(found)
    assert is_valid(found, made.offsets)
    assert made.size <= 1.06 * made.lower_bound


def test_the_result_depends_on_nothing_else() -> None:
    choose = random.Random(7)
    found = [Block(choose.randrange(1, 99), s, s + choose.randrange(9)) for s in range(40)]
    assert fit(found) == fit(list(found))


def greedy_by_size(found: list[Block]) -> int:
    """Larger blocks first, longer ones of the same size first, each in the smallest hole that takes it."""
    placed: list[tuple[Block, int]] = []
    for b in sorted(found, key=lambda b: (-b.size, b.start - b.end)):
        taken = sorted((at, at + other.size) for other, at in placed if other.start <= b.end and b.start <= other.end)
        holes, top = [], 0
        for low, high in taken:
            if low - top >= b.size:
                holes.append((low - top, top))
            top = max(top, high)
        placed.append((b, min(holes)[1] if holes else top))
    return max(at + b.size for b, at in placed)


def test_never_worse_than_greedy_by_size() -> None:
    """Where nothing is tried beyond the orders; in some of these programs no other order is as good."""
    choose = random.Random(5)
    for _ in range(60):
        starts = [choose.randrange(30) for _ in range(40)]
        found = [Block(choose.choice((1, 2, 3, 5, 8, 13, 64)), s, s + choose.randrange(8)) for s in starts]
        assert fit(found, effort=0).size <= greedy_by_size(found)
