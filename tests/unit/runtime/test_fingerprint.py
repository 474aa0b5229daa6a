"""What a fingerprint of tensors must see, and that it reads nothing but them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch
from aicc.runtime.fingerprint import PART, ROWS, WHOLE, Fingerprint, _split, look_address


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


SIGNS: dict[str, Callable[[torch.Tensor], object]] = {
    "all": lambda t: t.neg_(), "a row": lambda t: t[-1].neg_(), "a column": lambda t: t[:, 1].neg_(), "two rows": lambda t: t[2:4].neg_(),
    "every other row": lambda t: t[::2].neg_(), "every other column": lambda t: t[:, 1::2].neg_(), "half": lambda t: t[:len(t) // 2].neg_(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 32), (96, 96), (64, 33), (512, 512), (1000, 640)])
def test_changes_of_signs(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Differences of the top bits of words, in all the symmetric places: they must not cancel."""
    t = torch.randn(shape, dtype=dtype)
    seen = Fingerprint([t])
    changes = SIGNS if t.nbytes <= WHOLE else {k: v for k, v in SIGNS.items() if "column" not in k}  # of which not all need be read
    for name, change in changes.items():
        change(t)
        assert not seen.unchanged(), name
        change(t)
        assert seen.unchanged()


def test_equal_changes_of_two_words() -> None:
    """Whichever words and whichever bit."""
    t = torch.randint(0, 1 << 31, (256,), dtype=torch.int32)
    seen = Fingerprint([t])
    for bit in (1, 1 << 15, 1 << 16, -1 << 31):
        for first in (0, 1, 37, 64):
            for second in range(first + 1, 256):
                t[first] ^= bit
                t[second] ^= bit
                assert not seen.unchanged(), (bit, first, second)
                t[first] ^= bit
                t[second] ^= bit
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


def test_parts_hold_every_range_once() -> None:
    for lines in ([], [1], [PART], [PART + 1, 1], [1] * 700, [PART // 2, PART // 2, 1], [0, 0, 3 * PART, 0, 5]):
        parts = _split(lines)
        assert [i for first, count in parts for i in range(first, first + count)] == [*range(len(lines))]
        assert all(sum(lines[f:f + c]) <= PART or sum(n > 0 for n in lines[f:f + c]) == 1 for f, c in parts)
        assert all(sum(lines[f:f + c]) + lines[f + c] > PART for f, c in parts[:-1])  # no more parts than need be


def test_of_nothing() -> None:
    seen = Fingerprint([])
    assert seen.parts == 0 and seen.unchanged() and seen.block[2] == 0


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
def test_threads_share_the_parts_of_a_large_model(threads: int) -> None:
    """A change in any part is seen by whichever thread looks at it, in any call."""
    tensors = [torch.randn(n) for n in torch.randint(1, 3000, (150,)).tolist()] + [torch.randn(900, 40), torch.randn(1000, 30)]
    seen = Fingerprint(tensors)
    parts, count, memory = seen.block
    assert memory and count == seen.parts > 20
    look = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)(look_address())
    assert not any(look(parts, count, memory) for _ in range(200))
    for t in tensors:
        row = t[-1:]
        kept = row.clone()
        row += 1
        assert look(parts, count, memory) and look(parts, count, None), t.shape
        row.copy_(kept)
        assert not look(parts, count, memory) and seen.unchanged()


def test_few_lines_are_left_to_one_thread() -> None:
    assert Fingerprint([torch.randn(8, 8)]).block[2] == 0 and Fingerprint([torch.randn(1 << 13) for _ in range(8)]).block[2]
