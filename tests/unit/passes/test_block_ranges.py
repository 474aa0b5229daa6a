"""Tiles of a stream that only the masks' data exclude: skipped, forward and backward, whatever the mask is made of, and never one too many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from aicc.ir import Operation
from aicc.ir.interpreter import interpret
from aicc.ir.interpreter import tile as tiles
from aicc.passes import block_ranges
from support.stages import CUDA, Program, capture, compare, copied, lowered
from torch import Tensor

N = 512
LENGTHS = (100, 37, 250, 125)
DOCUMENT = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))


@pytest.fixture(autouse=True)
def _small_streams_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_ranges, "LEAST_WORK", 0)
    monkeypatch.setattr(block_ranges, "WORK_OF_A_POINT", 0)


def masked(condition: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Attention where `condition(i, j, *data)` holds."""

    def f(q: Tensor, k: Tensor, v: Tensor, *data: Tensor) -> Tensor:
        s = q @ k.transpose(-1, -2) * 0.2
        i, j = torch.arange(s.shape[-2])[:, None], torch.arange(s.shape[-1])[None, :]
        return torch.softmax(torch.where(condition(i, j, *data), s, -math.inf), -1) @ v

    return f


def same(i: Tensor, j: Tensor, doc: Tensor) -> Tensor:
    return doc[:, None] == doc[None, :]


def same_causal(i: Tensor, j: Tensor, doc: Tensor) -> Tensor:
    return (j <= i) & (doc[:, None] == doc[None, :])


def same_window(i: Tensor, j: Tensor, doc: Tensor) -> Tensor:
    return (j <= i) & (i - j < 70) & (doc[i] == doc[j])


def per_batch(i: Tensor, j: Tensor, doc: Tensor) -> Tensor:
    return ~(doc[:, None, :, None] != doc[:, None, None, :])


def lengths(i: Tensor, j: Tensor, length: Tensor) -> Tensor:
    return j < length[:, None, None, None]


def padding(i: Tensor, j: Tensor, alive: Tensor) -> Tensor:
    return alive[:, None, None, :]


def prefix(i: Tensor, j: Tensor, length: Tensor) -> Tensor:
    return (j <= i) | (j < length[:, None, None, None])


def heads(n: int = N, batch: int = 2, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    g = torch.Generator().manual_seed(n)
    return [torch.randn(batch, 2, n, 64, generator=g).to(dtype) for _ in range(3)]


def alive_keys() -> Tensor:
    alive = torch.ones(2, N, dtype=torch.bool)
    alive[0, 200:], alive[1, :130] = False, False
    return alive


def given(i: Tensor, j: Tensor, mask: Tensor) -> Tensor:
    return mask


def given_causal(i: Tensor, j: Tensor, mask: Tensor) -> Tensor:
    return mask[:, None] & (j <= i)


def picture(batch: int) -> Tensor:
    """Documents, with holes."""
    same = (DOCUMENT[:, None] == DOCUMENT[None, :]) & (torch.rand(batch, N, N, generator=torch.Generator().manual_seed(3)) < 0.9)
    return same if batch > 1 else same[0]


MASKS = {
    "documents": (same, DOCUMENT),
    "documents_causal": (same_causal, DOCUMENT),
    "documents_gathered_in_a_window": (same_window, DOCUMENT),
    "documents_of_each_sequence": (per_batch, torch.stack([DOCUMENT, torch.arange(N) // 300])),
    "int32": (same_causal, DOCUMENT.int()),
    "unsorted": (same, torch.randint(0, 4, (N,), generator=torch.Generator().manual_seed(1))),
    "interleaved": (same, torch.arange(N) // 128 % 2),
    "lengths": (lengths, torch.tensor([90, 400])),
    "padding": (padding, alive_keys()),
    "prefix": (prefix, torch.tensor([70, 5])),
    "a_tensor": (given, picture(1)),
    "a_tensor_of_each_sequence": (given_causal, picture(2)),
}


@contextmanager
def counting() -> Iterator[list[int]]:
    """Products of tiles that are computed, each program's."""
    found = [0]
    plain = tiles._OPS["tile.dot"]

    def dot(p: tiles.Programs, op: Operation, xs: list[Tensor]) -> list[Tensor]:
        found[0] += len(p.ids) if p.active is None else int(p.active.sum())
        return plain(p, op, xs)

    tiles._OPS["tile.dot"] = dot
    try:
        yield found
    finally:
        tiles._OPS["tile.dot"] = plain


def products(program: Program) -> tuple[int, tuple[int, int]]:
    """Products of tiles that the program's streams compute, and the size of a tile of scores; the results are compared with eager's."""
    module = lowered(program, CUDA, "tile")
    kernel = next(op for op in module.body if op.name == "tile.kernel" and "stream" in op["sym_name"])
    scores = next(op for op in kernel.walk() if op.name == "tile.dot")
    with counting() as found:
        compare(interpret(module, [copied(x) for x in program.inputs], check=True), program, "tile")
    return found[0], scores.result.type.shape  # type: ignore[attr-defined]


def needed(condition: Callable[..., Tensor], data: Tensor, tile: tuple[int, int] = (64, 64), batch: int = 2, heads: int = 2) -> int:
    """Tiles from the first to the last of each block of rows in which the condition holds anywhere."""
    i, j = torch.arange(N)[:, None], torch.arange(N)[None, :]
    rows, steps = tile
    mask = condition(i, j, data).expand(batch, heads, N, N).reshape(batch * heads, N // rows, rows, N // steps, steps).any(4).any(2)
    return sum(int(row.nonzero().max() - row.nonzero().min()) + 1 for lot in mask for row in lot if bool(row.any()))


@pytest.mark.parametrize("name", MASKS)
def test_skipped_tiles_are_counted(name: str) -> None:
    condition, data = MASKS[name]
    found, tile = products(capture(masked(condition), [*heads(), data]))
    assert found == 2 * needed(condition, data, tile)


def test_what_is_skipped() -> None:
    """Of 8 x 8 tiles, four documents of 100, 37, 250 and 125 leave 34, up to the diagonal 21."""
    assert (needed(same, DOCUMENT, batch=1, heads=1), needed(same_causal, DOCUMENT, batch=1, heads=1)) == (34, 21)


@pytest.mark.parametrize("n", [500, 130])
def test_ragged_lengths(n: int) -> None:
    program = capture(masked(same_causal), [*heads(n), torch.arange(n) // 90])
    found, (rows, steps) = products(program)
    assert found < 2 * 2 * 2 * -(-n // rows) * -(-n // steps)


def test_rows_that_see_nothing() -> None:
    """Eager gives NaN. Where a block has both documents, either may be the one that counts."""
    def later(i: Tensor, j: Tensor, doc: Tensor) -> Tensor:
        return (doc[:, None] == doc[None, :]) & (doc[:, None] > 0)

    found, tile = products(capture(masked(later), [*heads(), DOCUMENT]))
    assert 2 * needed(later, DOCUMENT, tile) <= found < 2 * needed(same, DOCUMENT, tile)


def test_a_mask_that_can_hold_anywhere_skips_nothing() -> None:
    doc = torch.arange(N)
    f = masked(lambda i, j, doc: doc[:, None] + doc[None, :] != -1)
    found, (rows, steps) = products(capture(f, [*heads(), doc]))
    assert found == 2 * 4 * (N // rows) * (N // steps)


def gradients(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, doc: Tensor) -> tuple[Tensor, ...]:
    """What the backward pass of attention within documents computes."""
    i, j = torch.arange(N)[:, None], torch.arange(N)[None, :]
    p = torch.exp(torch.where(same_causal(i, j, doc), q @ k.transpose(-1, -2) * 0.2, -math.inf).float() - lse).to(q.dtype)
    ds = (p * (grad @ v.transpose(-1, -2) - delta) * 0.2).to(q.dtype)
    return ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad


def test_gradients_skip_too() -> None:
    """A stream over the keys for dQ, with three products a tile, and one over the queries for dK and dV, with four."""
    q, k, v, grad = *heads(), heads(N)[1].flip(2)
    i, j = torch.arange(N)[:, None], torch.arange(N)[None, :]
    s = torch.where(same_causal(i, j, DOCUMENT), q @ k.transpose(-1, -2) * 0.2, -math.inf)
    out = s.softmax(-1) @ v
    rows = [s.float().logsumexp(-1, keepdim=True), (grad.float() * out).sum(-1, keepdim=True)]
    found, tile = products(capture(gradients, [q, k, v, grad, *rows, DOCUMENT]))
    # tiles over the queries are as many: the picture is turned
    assert found == (3 + 4) * needed(same_causal, DOCUMENT, tile)


def test_a_mask_that_no_heads_share_is_not_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks' extremes would cost as much as what they save."""
    monkeypatch.setattr(block_ranges, "WORK_OF_A_POINT", 300)
    for mask, kernels in ((picture(1), 3), (picture(1).expand(2, 2, N, N).contiguous(), 1)):
        module = lowered(capture(masked(given), [*heads(), mask]), CUDA, "tile")
        assert sum(op.name == "tile.launch" for op in module.walk()) == kernels


def test_one_pass_over_the_numbers_serves_rows_and_steps() -> None:
    module = lowered(capture(masked(same), [*heads(), DOCUMENT]), CUDA, "tile")
    launches = [op["kernel"].name for op in module.walk() if op.name == "tile.launch"]
    assert len(launches) == 3, launches


def test_cpus_and_small_streams_have_no_such_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_ranges, "LEAST_WORK", 4e9)
    module = lowered(capture(masked(same), [*heads(), DOCUMENT]), CUDA, "tile")
    assert [op["kernel"].name for op in module.walk() if op.name == "tile.launch"] == ["stream"]
