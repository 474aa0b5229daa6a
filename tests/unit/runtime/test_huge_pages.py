"""Large pages are asked for inside a range only, and asking harms nothing."""

from __future__ import annotations

import sys

import pytest
import torch
from aicc.runtime.huge_pages import HUGE_PAGE, prefer_huge_pages, whole_pages


@pytest.mark.parametrize("address,size,first,length", [
    (0, HUGE_PAGE, 0, HUGE_PAGE), (64, HUGE_PAGE, HUGE_PAGE, 0), (64, 2 * HUGE_PAGE, HUGE_PAGE, HUGE_PAGE),
    (HUGE_PAGE, 3 * HUGE_PAGE - 1, HUGE_PAGE, 2 * HUGE_PAGE), (HUGE_PAGE + 1, 10, 2 * HUGE_PAGE, 0),
])
def test_whole_pages_lie_inside(address: int, size: int, first: int, length: int) -> None:
    assert whole_pages(address, size) == (first, length)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux asks by madvise")
def test_memory_is_usable_afterwards() -> None:
    memory = torch.empty(5 * HUGE_PAGE, dtype=torch.uint8)
    prefer_huge_pages(memory.data_ptr(), memory.nbytes)
    memory.fill_(7)
    assert int(memory.sum()) == 7 * memory.numel()
    assert not prefer_huge_pages(memory.data_ptr(), 100)  # no whole page
