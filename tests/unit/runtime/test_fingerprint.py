"""What a fingerprint of tensors must see, and that it reads nothing but them."""

from __future__ import annotations

import pytest
import torch
from aicc.runtime.fingerprint import ROWS, WHOLE, Fingerprint


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 31, 32, 127, 128, 129, 255, 256, 391])
def test_any_byte_of_a_small_tensor(count: int) -> None:
    t = torch.randint(0, 256, (count,), dtype=torch.uint8)
    seen = Fingerprint([t])
    assert seen.unchanged() and Fingerprint([t.clone()]).hash == seen.hash
    for i in range(count):
        for other in (1, 128):
            t[i] ^= other
            assert not seen.unchanged(), i
            t[i] ^= other
    assert seen.unchanged()


def test_the_largest_that_is_read_whole() -> None:
    t = torch.randn(WHOLE // 4)
    seen = Fingerprint([t])
    for i in torch.randint(0, t.numel(), (200,)).tolist():
        kept = t[i].item()
        t[i] += 1
        assert not seen.unchanged()
        t[i] = kept
    assert seen.unchanged()


@pytest.mark.parametrize("make", [
    lambda: torch.randn(96, 500), lambda: torch.randn(96, 500, dtype=torch.float64), lambda: torch.randn(ROWS, 40).bfloat16(),
    lambda: torch.randn(64, 16, 7, 9), lambda: torch.randn(300, 200)[:, :150], lambda: torch.randn(300, 200)[10:290, 7:]])
def test_any_row_of_a_large_tensor(make: object) -> None:
    t = make()  # type: ignore[operator]
    seen = Fingerprint([t])
    for i in range(len(t)):
        kept = t[i].clone()
        t[i] += 1
        assert not seen.unchanged(), i
        t[i] = kept
    assert seen.unchanged()


def test_columns_of_a_transposed_tensor_and_expanded_ones() -> None:
    t = torch.randn(500, 96).t()
    e = torch.randn(400, 1, 80).expand(400, 6, 80)
    seen = Fingerprint([t, e])
    for i in range(500):
        kept = t[:, i].clone()
        t[:, i] *= 2
        assert not seen.unchanged(), i
        t[:, i] = kept
    e[399, 0] = 0
    assert not seen.unchanged()


def test_pruning_of_a_large_tensor() -> None:
    """Every fiftieth element: nothing that a handful of samples would see."""
    t = torch.randn(1000, 1000)
    seen = Fingerprint([t])
    t.view(-1)[torch.randperm(t.numel())[:t.numel() // 50]] = 0
    assert not seen.unchanged()


def test_of_each_tensor_alone() -> None:
    a, b = torch.randn(10), torch.randn(300, 200)
    seen = Fingerprint([a, torch.empty(0, 3), torch.empty(2, device="meta"), b])
    b[5] = 0
    now = Fingerprint([a, torch.empty(0, 3), torch.empty(2, device="meta"), b])
    assert seen.each[:3] == now.each[:3] and seen.each[2] == 0 and seen.each[3] != now.each[3] and seen.hash != now.hash


def test_more_rows_than_are_read() -> None:
    """A write to a run of rows is still seen where only every few rows are looked at."""
    t = torch.randn(5 * ROWS, 16)
    seen = Fingerprint([t])
    t[777:784] = 0
    assert not seen.unchanged()
