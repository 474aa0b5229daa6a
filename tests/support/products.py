"""`@pytest.mark.product`: of a test's product of parameters, the default set runs each value of each parameter at least once; the rest is slow.

Values are spread evenly: of names x types x targets, every name runs with some type and target, and all of these come in turn. `make test-all` runs the product.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence

import pytest

__all__ = ["cover", "leave_to_slow"]


def cover(cases: Sequence[Mapping[str, Hashable]]) -> list[int]:
    """Indices of cases that have every value of every parameter among them, in order: each next one has the most new values, then the least used ones."""
    used: Counter[tuple[str, Hashable]] = Counter()
    missing = {pair for case in cases for pair in case.items()}
    left, chosen = list(range(len(cases))), []
    while missing:
        best = max(left, key=lambda i: (sum(pair in missing for pair in cases[i].items()), -sum(used[pair] for pair in cases[i].items()), -i))
        left.remove(best)
        chosen.append(best)
        used.update(cases[best].items())
        missing -= cases[best].items()
    return sorted(chosen)


def leave_to_slow(items: Sequence[pytest.Item]) -> None:
    """Marks as slow what `cover` leaves out of each test with the marker `product`."""
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("product") is not None and item.get_closest_marker("slow") is None:
            tests[item.nodeid.partition("[")[0]].append(item)
    for cases in tests.values():
        kept = set(cover([_values(item) for item in cases]))
        for i, item in enumerate(cases):
            if i not in kept:
                item.add_marker(pytest.mark.slow)


def _values(item: pytest.Item) -> dict[str, Hashable]:
    """Parameters by name; those that cannot be hashed by what object they are, for a product repeats the objects of its lists."""
    given = item.callspec.params  # type: ignore[attr-defined]
    return {name: (type(value), value) if isinstance(value, Hashable) else id(value) for name, value in given.items()}
