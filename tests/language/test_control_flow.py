"""Control flow: torch's operators for it are compiled piece by piece, Python's own parts the function (or is unrolled)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from aicc.compiler.driver import Compilation, watching
from functorch.experimental.control_flow import map as control_map
from torch import Tensor, nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from .harness import Row, check


def _x() -> tuple[Tensor, ...]:
    return (torch.randn(4, 6),)


def _cond(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda x: x.sin() + 1, lambda x: x.cos() * 2, (x,))


def _nested_cond(x: Tensor) -> Tensor:
    def positive(x: Tensor) -> Tensor:
        return torch.cond(x.amax() > 1, lambda x: x / 2, lambda x: x * 2, (x,)) + 1

    y = x * 3
    return torch.cond(y.sum() > 0, positive, lambda x: x.exp(), (y,)).relu() * 2


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, self.left, self.right, (x,)).tanh()


def _while(x: Tensor) -> tuple[Tensor, Tensor]:
    return while_loop(lambda i, x: i < 5, lambda i, x: (i + 1, (x * 1.1 + 1).relu()), (torch.tensor(0), x))


def _never(x: Tensor) -> tuple[Tensor, Tensor]:
    i, y = while_loop(lambda i, x: i < 0, lambda i, x: (i + 1, x * 2), (torch.tensor(0), x))
    return i, y + 1


def _while_on_data(x: Tensor) -> Tensor:
    return while_loop(lambda x: x.abs().amax() > 0.1, lambda x: ((x @ x.t() @ x) * 0.01,), (x,))[0]


def _scan(c: Tensor, xs: Tensor) -> Any:
    return scan(lambda c, x: (c * 0.5 + x, (c * x).tanh()), c, xs)


def _scan_over_weights(c: Tensor, xs: Tensor, w: Tensor) -> Any:
    return scan(lambda c, x: ((c @ w + x).tanh(), (c + x).clone()), c, xs)


def _map(xs: Tensor, y: Tensor) -> Tensor:
    return control_map(lambda x, y: (x * y).sin(), xs, y) * 2


def _qkv(heads: int = 2, groups: int = 2) -> tuple[Tensor, ...]:
    return torch.randn(1, heads, 128, 16), torch.randn(1, groups, 128, 16), torch.randn(1, groups, 128, 16)


def _relative(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score + (i - j) * 0.01 * (h + 1))


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 128, 128, device="cpu")
    return flex_attention(q, k, v, block_mask=mask)


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: torch.where(i >= j, score, -float("inf")), enable_gqa=True)


def _with_table(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
    out, lse = flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score + bias[h, i - j + 127], return_lse=True)
    return out, lse


def _loop(x: Tensor) -> Tensor:
    for i in range(4):
        x = (x + i).sin()
    return x


def _generator(x: Tensor) -> Tensor:
    return sum((row * 2 for row in x), torch.zeros(6))


def _early(x: Tensor) -> Tensor:
    if x.shape[0] > 3:
        return x * 2
    return x * 3


def _branch(x: Tensor) -> Tensor:
    y = x * 2
    if y.sum() > 0:
        return y.sin()
    return y.cos() + 1


def _try(x: Tensor) -> Tensor:
    try:
        y = x @ x
    except RuntimeError:
        y = x * 2
    return y + 1


ROWS: dict[str, Row] = {
    "cond": Row(_cond, _x),
    "cond, training": Row(_cond, _x, train=True),
    "cond within cond": Row(_nested_cond, _x),
    "cond over modules": Row(_Experts(), _x),
    "cond over modules, training": Row(_Experts(), _x, train=True),
    "while_loop": Row(_while, _x),
    "while_loop without a trip": Row(_never, _x),
    "while_loop on data": Row(_while_on_data, lambda: (torch.randn(3, 3) * 0.1,)),
    "scan": Row(_scan, lambda: (torch.randn(5), torch.randn(7, 5))),
    "scan, training": Row(_scan, lambda: (torch.randn(5), torch.randn(7, 5)), train=True),
    "scan over weights, training": Row(_scan_over_weights, lambda: (torch.randn(5), torch.randn(7, 5), torch.randn(5, 5)), train=True, tolerance=1e-4),
    "map": Row(_map, lambda: (torch.randn(7, 5), torch.randn(5))),
    "associative_scan": Row(lambda x: associative_scan(lambda a, b: a * b, x, 0, combine_mode="generic"), lambda: (torch.randn(7, 5),)),
    "flex_attention, score_mod": Row(_relative, _qkv, note="streams; gradients on the CPU are refused by torch"),
    "flex_attention, block mask": Row(_causal, _qkv, note="what comparisons of positions mask is skipped"),
    "flex_attention, grouped heads": Row(_grouped, lambda: _qkv(4, 2)),
    "flex_attention, a captured table": Row(_with_table, lambda: (*_qkv(), torch.randn(2, 255))),
    "a Python loop": Row(_loop, _x, note="unrolled"),
    "a loop over a tensor": Row(_generator, _x, note="unrolled"),
    "a branch on a shape": Row(_early, _x),
    "a branch on data": Row(_branch, _x, breaks=True, note="Dynamo parts the function there; torch.cond does not"),
    "a print": Row(lambda x: (print("", end=""), x * 2)[1], _x, breaks=True),
    "an assertion": Row(lambda x: _asserted(x) * 2, _x),
    "try and except": Row(_try, lambda: (torch.randn(4, 4),)),
}


def _asserted(x: Tensor) -> Tensor:
    assert x.shape[1] == 6, "a width"
    return x + 1


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str) -> None:
    check(ROWS[name])


def _window(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (i >= j) & (i - j < 40)


@pytest.mark.parametrize("mask", [None, _window], ids=["score_mod", "score_mod and mask"])
def test_flex_attention_holds_no_scores(mask: Any) -> None:
    length = 320
    blocks = create_block_mask(mask, None, None, length, length, device="cpu") if mask else None

    def f(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: 5 * torch.tanh((s + (i - j) * 0.01 * (h + 1)) / 5), block_mask=blocks)

    q, k, v = (torch.randn(1, 2, length, 32) for _ in range(3))
    seen: list[Compilation] = []
    torch._dynamo.reset()
    with watching(compiled=seen.append), torch.no_grad():
        torch.testing.assert_close(torch.compile(f, backend="aicc")(q, k, v), f(q, k, v), rtol=1e-5, atol=1e-5)
    assert any("streams 1 + 1 contractions" in r.message for r in seen[0].remarks)
    assert seen[0].stats["memory"]["arena_bytes"] < 2 * length * length * 4 / 2


def test_gradients_of_flex_attention_on_cpus_are_refused_by_torch() -> None:
    """When torch takes them, docs/language.md has a row to change: the backward pass streams as it is (`test_stream.py`)."""
    q, k, v = (torch.randn(1, 2, 128, 16, requires_grad=True) for _ in range(3))
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        _relative(q, k, v)


def test_both_branches() -> None:
    """One compiled function, either way; nothing compiles twice."""
    from aicc.compiler.driver import watching
    seen: list[Any] = []
    f = torch.compile(_cond, backend="aicc")
    with watching(compiled=seen.append):
        for x in (torch.ones(4), -torch.ones(4), torch.ones(4)):
            torch.testing.assert_close(f(x), _cond(x))
    assert [c.name for c in seen] == ["inference_part0", "inference_true_graph_0", "inference_false_graph_0"]


def test_loops_of_symbolic_size() -> None:
    f = torch.compile(lambda x: while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, x * 2), (torch.tensor(0), x))[1] + x.shape[0],
                      backend="aicc", dynamic=True)
    for n in (5, 7, 2):
        torch.testing.assert_close(f(torch.ones(n, 3)), torch.full((n, 3), 8.0 + n))


def test_flex_gradients_are_refused_by_torch() -> None:
    q, k, v = (t.requires_grad_() for t in _qkv())
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        torch.compile(_relative, backend="aicc")(q, k, v)
