"""Products of gathered weights, as in mixtures of experts: the gathered copies are never in memory."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from aicc.compiler.driver import Compilation, watching
from torch import Tensor, nn

TOKENS, WIDTH, HIDDEN, EXPERTS, CHOSEN = 96, 32, 48, 4, 2
GATHERED = TOKENS * CHOSEN * WIDTH * HIDDEN * 4
"""Bytes of one expert's second weight for every token that goes there."""


class Experts(nn.Module):
    """The experts of a Mixtral with `experts_implementation="batched_mm"`: tokens `[t, width]`, a product of one column per token and expert."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, 2 * HIDDEN, WIDTH) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / HIDDEN**0.5)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = F.softmax(self.router(x), -1).topk(CHOSEN, -1)
        expert = chosen.reshape(-1)
        rows = x[torch.arange(len(x)).repeat_interleave(CHOSEN)].unsqueeze(-1)
        gate, up = torch.bmm(self.gate_up[expert], rows).squeeze(-1).chunk(2, -1)
        out = torch.bmm(self.down[expert], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        return (out * weights.reshape(-1, 1)).view(len(x), CHOSEN, -1).sum(1)


@pytest.fixture(name="model")
def experts() -> Experts:
    torch.manual_seed(0)
    return Experts()


def test_gathered_weights_are_never_stored(model: Experts) -> None:
    seen: list[Compilation] = []
    torch._dynamo.reset()
    with watching(compiled=seen.append):
        torch.compile(model, backend="aicc", options={"cache": False})(torch.randn(TOKENS, WIDTH)).square().mean().backward()
    assert len(seen) == 2
    for made in seen:
        assert made.graph is not None
        planned = made.stats["memory"]["unplanned_bytes"]
        assert isinstance(planned, int) and planned + made.graph.memory["outputs"] < GATHERED


def test_experts_gradients(model: Experts) -> None:
    x = torch.randn(TOKENS, WIDTH)
    truth = copy.deepcopy(model).double()
    truth(x.double()).square().mean().backward()
    torch._dynamo.reset()
    torch.compile(model, backend="aicc", options={"cache": False})(x).square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), truth.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert (p.grad.double() - q.grad).abs().max() <= 3e-6 * q.grad.abs().max(), name


def test_a_gather_that_several_columns_read_is_stored() -> None:
    """Each gathered element is used eight times: picking it as often would be slower, and so it stays a product."""
    def several(w: Tensor, expert: Tensor, x: Tensor) -> Tensor:
        return torch.bmm(w[expert], x)

    w, expert, x = torch.randn(4, 48, 32), torch.randint(0, 4, (64,)), torch.randn(64, 32, 8)
    seen: list[Compilation] = []
    torch._dynamo.reset()
    with watching(compiled=seen.append):
        made = torch.compile(several, backend="aicc", options={"cache": False})(w, expert, x)
    torch.testing.assert_close(made, several(w, expert, x), rtol=1e-4, atol=1e-4)
    assert seen[0].stats["memory"]["unplanned_bytes"] >= 64 * 48 * 32 * 4
