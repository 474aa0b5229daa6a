"""Panels of steps that data mask for a whole tile of rows are not computed on CPUs: NaN under such a mask stays there, which it does not where 0 * NaN is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from aicc.passes.mask_tree import UNKNOWN
from aicc.passes.tiling.conditions import _known
from torch import Tensor

NEVER = float("-inf")
S, D = 300, 32
ROWS, STEPS = torch.arange(S)[:, None], torch.arange(S)[None, :]


def _qkv(batch: int = 2) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randn(batch, S, D, generator=g) for _ in range(3)]


def _softmax(scores: Tensor, alive: Tensor, v: Tensor) -> Tensor:
    return scores.masked_fill(~alive, NEVER).softmax(-1) @ v


def by_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return _softmax(q @ k.mT / 6, mask, v)


def by_float_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT / 6 + mask).softmax(-1) @ v


def by_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], mask)[0]


def by_documents(q: Tensor, k: Tensor, v: Tensor, doc: Tensor) -> Tensor:
    return _softmax(q @ k.mT / 6, doc[:, None] == doc[None, :], v)


def by_documents_causal(q: Tensor, k: Tensor, v: Tensor, doc: Tensor) -> Tensor:
    i = torch.arange(S)
    return _softmax(q @ k.mT / 6, (doc[:, None] == doc[None, :]) & (i[None, :] <= i[:, None]), v)


def by_length(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    return _softmax(q @ k.mT / 6, torch.arange(S) < lengths[:, None, None], v)


def by_length_or_first(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    i = torch.arange(S)
    return _softmax(q @ k.mT / 6, (i < lengths[:, None, None]) | (i // 2 == 140), v)


def by_table(q: Tensor, k: Tensor, v: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """A gather decides: nothing is known of it beforehand."""
    return _softmax(q @ k.mT / 6, table[ids][None, :], v)


def summed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """No maximum, and 0 instead of -inf."""
    w = torch.where(mask, (q @ k.mT / 6).sigmoid(), 0.0)
    return (w / w.sum(-1, keepdim=True)) @ v


FLOATS = torch.where(ROWS >= STEPS, (ROWS - STEPS) * -0.01, NEVER)
DOC = (torch.arange(S) >= 150).long()
HOLE = (STEPS < 40) | (STEPS >= 200)
CASES: dict[str, tuple[Callable[..., Tensor], list[Tensor], Tensor, slice]] = {
    # function, what the mask is made of, the mask, the keys that are poison
    "tril": (by_mask, [ROWS >= STEPS], ROWS >= STEPS, slice(288, S)),
    "nothing_alive_at_the_end": (by_mask, [(STEPS < 17).expand(S, S).contiguous()], STEPS < 17, slice(32, S)),
    "nothing_alive_at_the_start": (by_mask, [(STEPS >= 40).expand(S, S).contiguous()], STEPS >= 40, slice(0, 32)),
    "documents": (by_documents, [DOC], DOC[:, None] == DOC[None, :], slice(160, S)),
    "documents_causal": (by_documents_causal, [DOC], (DOC[:, None] == DOC[None, :]) & (ROWS >= STEPS), slice(160, S)),
    "lengths": (by_length, [torch.tensor([50, 7])], torch.tensor([50, 7])[:, None, None] > STEPS, slice(64, S)),
    "lengths_or": (by_length_or_first, [torch.tensor([50, 7])], (torch.tensor([50, 7])[:, None, None] > STEPS) | (STEPS // 2 == 140), slice(288, S)),
    "float_mask": (by_float_mask, [FLOATS], ROWS >= STEPS, slice(288, S)),
    "float_mask_of_sdpa": (by_sdpa, [FLOATS], ROWS >= STEPS, slice(288, S)),
    "float_padding": (by_float_mask, [FLOATS[50:51].expand(2, 1, S).contiguous()], STEPS < 51, slice(64, S)),
    "sums": (summed, [ROWS >= STEPS], ROWS >= STEPS, slice(288, S)),
}


def _expected(function: Callable[..., Tensor], args: list[Tensor], extra: list[Tensor]) -> Tensor:
    return function(*(x.double() for x in [*args, *(x for x in extra if x.is_floating_point())]), *(x for x in extra if not x.is_floating_point()))


@pytest.mark.parametrize("name", CASES)
def test_masked_panels_are_left_out(name: str) -> None:
    function, extra, mask, poison = CASES[name]
    q, k, v = _qkv()
    expected = _expected(function, [q, k, v], extra)
    bad_k, bad_v = k.clone(), v.clone()
    bad_k[:, poison], bad_v[:, poison] = float("nan"), float("nan")
    compiled = torch.compile(function, backend="aicc", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, *extra).double(), expected, atol=1e-5, rtol=2e-6)
    # A tile has six rows with AVX2 and more elsewhere: rows whose neighbours see no poison either have none.
    sees = mask.expand(2, S, S)[..., poison].any(-1)
    clean = ~torch.nn.functional.max_pool1d(sees[:, None].float(), 63, 1, 31)[:, 0].bool()
    assert clean.any()
    torch.testing.assert_close(compiled(q, bad_k, bad_v, *extra).double()[clean], expected[clean], atol=1e-5, rtol=2e-6)


@pytest.mark.parametrize("mask", [HOLE.expand(S, S).contiguous(), torch.ones(S, S, dtype=torch.bool), (ROWS % 7 == STEPS % 5)],
                         ids=["hole", "everything", "scattered"])
def test_masks_with_nothing_to_leave_out(mask: Tensor) -> None:
    args = _qkv()
    found = torch.compile(by_mask, backend="aicc")(*args, mask)
    torch.testing.assert_close(found.double(), _expected(by_mask, args, [mask]), atol=1e-5, rtol=2e-6, equal_nan=True)


def test_rows_that_see_nothing() -> None:
    """NaN, as eager says; their neighbours in a tile are what they are."""
    args, mask = _qkv(), ROWS >= STEPS
    mask[100:103], mask[200:260] = False, False
    found = torch.compile(by_mask, backend="aicc")(*args, mask)
    torch.testing.assert_close(found.double(), _expected(by_mask, args, [mask]), atol=1e-5, rtol=2e-6, equal_nan=True)


def test_a_float_mask_that_is_nan_is_alive() -> None:
    args, mask = _qkv(), FLOATS.clone()
    mask[7, 200] = float("nan")
    found = torch.compile(by_float_mask, backend="aicc")(*args, mask)
    torch.testing.assert_close(found.double(), _expected(by_float_mask, args, [mask]), atol=1e-5, rtol=2e-6, equal_nan=True)
    assert found[:, 7].isnan().all()


def test_what_is_gathered_counts_as_alive() -> None:
    g = torch.Generator().manual_seed(5)
    args = _qkv()
    extra = [torch.rand(64, generator=g) > 0.5, torch.randint(0, 64, (S,), generator=g)]
    found = torch.compile(by_table, backend="aicc")(*args, *extra)
    torch.testing.assert_close(found.double(), _expected(by_table, args, extra), atol=1e-5, rtol=2e-6)


def test_positions_leave_out_panels_for_each_tile_of_rows() -> None:
    """Within a block of rows and steps that the mask crosses: rows 0 to 5 see no step past 15."""
    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(S)
        return _softmax(q @ k.mT / 6, i[None, :] <= i[:, None], v)
    q, k, v = _qkv()
    expected = causal(q.double(), k.double(), v.double())
    v[:, 64:] = float("nan")
    found = torch.compile(causal, backend="aicc")(q, k, v)
    torch.testing.assert_close(found.double()[:, :16], expected[:, :16], atol=1e-5, rtol=2e-6)


def test_gradients() -> None:
    q, k, v = (x.requires_grad_() for x in _qkv())
    mask = ROWS >= STEPS
    grads = []
    for f in (by_mask, torch.compile(by_mask, backend="aicc")):
        grads.append(torch.autograd.grad(f(q, k, v, mask).square().sum(), (q, k, v)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b, a, atol=2e-4, rtol=2e-4)


def test_what_a_tree_says() -> None:
    """An unknown side of "and" says nothing against the other one; of "or", it leaves nothing known."""
    some = ("holds", ("number", True, None))
    assert _known(("and", some, UNKNOWN), True) and not _known(("and", some, UNKNOWN), False)
    assert not _known(("or", some, UNKNOWN), True) and _known(("or", some, UNKNOWN), False)
    assert _known(("not", ("or", some, UNKNOWN)), True)
    divided = ("arith", "arith.floordiv", (), None, ("at", 1), ("load", None, ()))
    assert not _known(("eq", divided, ("number", 0, None)), True)
