"""Scatters on CPUs: what they start from is made in the result's memory where nobody else wants it, and copied where somebody does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from aicc.compiler.driver import watching
from torch import Tensor, nn
from torch.nn import functional as F


def host_text(f: Any, *args: Tensor) -> tuple[Any, str]:
    """The result, and the program as launches and copies."""
    torch._dynamo.reset()
    texts: list[str] = []

    def observe(stage: str, p: Any, module: Any) -> None:
        if stage == "host" and p is None:
            texts.append(str(module))
    with watching(observe=observe):
        result = torch.compile(f, backend="aicc", options={"cache": False})(*args)
        if isinstance(result, Tensor) and result.requires_grad:
            result.backward()
    return result, texts[-1]


class Tied(nn.Module):
    """Output logits from the embedding's own weight."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(200, 48)

    def forward(self, t: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(self.tokens(t), self.tokens.weight), t)


def test_gradient_of_a_tied_embedding_is_added_to_the_product() -> None:
    """No zeros, no sums of their own, no copy: the product of the output layer is written into the gradient and rows are added there."""
    torch.manual_seed(0)
    model, t = Tied(), torch.randint(0, 20, (60,))  # rows met several times
    model(t).backward()
    expected = model.tokens.weight.grad
    model.tokens.weight.grad = None
    _, text = host_text(model, t)
    torch.testing.assert_close(model.tokens.weight.grad, expected, rtol=1e-5, atol=1e-7)
    assert "host.copy" not in text and "updates" in text
    scatter = next(line for line in text.splitlines() if "host.launch" in line and "scatter" in line)
    operands = scatter.split("(")[1].split(")")[0].split(", ")
    assert operands[0] == operands[-1]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("f", [
    lambda x, i, v: (x.index_add(0, i, v), x + 1),                            # what it starts from lives on
    lambda x, i, v: (x.t().contiguous().t().index_add(0, i, v),),             # lies the other way around
    lambda x, i, v: ((x * 2).index_put((i,), v, accumulate=True),),
    lambda x, i, v: (torch.zeros_like(x).index_add(0, i, v) + x, x),
    lambda x, i, v: (x.index_add(0, i, v).index_add(0, i, v * 3),),
    lambda x, i, v: (x.index_copy(0, i[:1], v[:1]), x.index_copy(0, i[1:2], v[1:2])),
])
def test_scatters(f: Any, threads: int) -> None:
    torch.manual_seed(1)
    x, i, v = torch.randn(300, 130), torch.randint(0, 300, (500,)), torch.randn(500, 130)
    before, given = x.clone(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            result, _ = host_text(f, x, i, v)
    finally:
        torch.set_num_threads(given)
    for a, b in zip(result, f(before, i, v), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before)


def test_argument_is_updated_in_place() -> None:
    """A cache that is written into by its owner is neither copied nor written back."""
    def write(cache: Tensor, i: Tensor, v: Tensor) -> Tensor:
        cache.index_add_(0, i, v)
        return cache.sum()
    cache, i, v = torch.randn(64, 32), torch.tensor([3, 5, 3]), torch.randn(3, 32)
    expected = cache.clone().index_add_(0, i, v)
    with torch.no_grad():
        total, text = host_text(write, cache, i, v)
    torch.testing.assert_close(cache, expected)
    torch.testing.assert_close(total, expected.sum())
    assert "host.copy" not in text
