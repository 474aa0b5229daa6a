"""Compiled programs in the hands of users: graph breaks, inputs of another kind, errors in the data, faults of the compiler.

What else a user may write is in `tests/language`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from aicc.ir import Operation
from aicc.ir.passes import PassContext
from aicc.passes.fuse import Fuse
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .observing import compiled_graphs


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def _compile(f: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(f, backend="aicc", **options)


def _close(got: Any, want: Any) -> None:
    """Values, dtypes, shapes and strides; numbers and None as they are."""
    got, want = tree_leaves(got), tree_leaves(want)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True, check_stride=b.numel() > 1)
        else:
            assert type(a) is type(b) and a == b


# -- graph breaks

class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        if h.sum() > 20:
            print("left")
            return self.left(h)
        return self.right(h * 2)


def test_a_branch_on_data(capsys: pytest.CaptureFixture[str]) -> None:
    model = _Branching()
    compiled = _compile(model)
    with compiled_graphs() as graphs, torch.no_grad():
        for scale in (0.01, 100.0, 0.02):
            x = torch.randn(4, 6) * scale
            printed = []
            for call in (model, compiled):
                result = call(x)
                printed.append((result, capsys.readouterr().out))
            _close(printed[1][0], printed[0][0])
            assert printed[1][1] == printed[0][1] == ("left\n" if scale > 1 else "")
    assert len(graphs) == 3


# -- inputs of another kind than those compiled for

def test_another_dtype_or_shape_compiles_again() -> None:
    def f(x: Tensor) -> Tensor:
        return (x * 2 + 1).sum(-1)

    compiled = _compile(f, dynamic=False)
    inputs = [torch.randn(3, 4), torch.randn(3, 4, dtype=torch.float64), torch.randint(0, 9, (3, 4)), torch.randn(5, 4),
              torch.randn(2, 3, 4), torch.randn(3, 4).bfloat16()]
    with compiled_graphs() as graphs:
        for x in inputs:
            _close(compiled(x), f(x))
        count = len(graphs)
        for x in inputs:
            _close(compiled(x), f(x))
    assert count == len(graphs) == len(inputs)


@pytest.mark.parametrize(("model", "good", "bad", "message"), [
    pytest.param(nn.Linear(6, 3), (2, 6), (2, 5), "shapes cannot be multiplied|same reduction dim", id="linear, wrong width"),
    pytest.param(nn.Conv2d(3, 4, 3), (1, 3, 8, 8), (8, 8), r"Expected 3D \(unbatched\) or 4D", id="conv, wrong rank"),
    pytest.param(nn.Conv2d(3, 4, 3), (1, 3, 8, 8), (1, 4, 8, 8), "expected input.* to have 3 channels", id="conv, wrong channels"),
    pytest.param(nn.LayerNorm(6), (2, 6), (6, 2), "normalized_shape", id="layer norm, wrong width"),
])
def test_a_bad_shape_errors_as_in_eager(model: nn.Module, good: tuple[int, ...], bad: tuple[int, ...], message: str) -> None:
    """The same kind of error, in torch's words (Dynamo's fake tensors may put them a little differently), and nothing broken by it."""
    compiled = _compile(model)
    x = torch.randn(good)
    _close(compiled(x), model(x))
    for call in (model, compiled):
        with pytest.raises(RuntimeError, match=message):
            call(torch.randn(bad))
    _close(compiled(x), model(x))


def test_an_index_out_of_range_is_survived() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3)).eval()
    compiled = _compile(model)
    with compiled_graphs() as graphs, torch.no_grad():
        for bad in (10, -1, 1 << 40):
            with pytest.raises(IndexError):
                model(torch.tensor([[1, bad]]))
            with pytest.raises(IndexError, match="out of range"):
                compiled(torch.tensor([[1, bad]]))
            x = torch.tensor([[9, 0]])
            _close(compiled(x), model(x))
    assert len(graphs) == 1


def test_an_index_out_of_range_in_training() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3))
    compiled = _compile(model)
    with pytest.raises(IndexError, match="out of range"):
        compiled(torch.tensor([[1, 10]]))
    compiled(torch.tensor([[1, 9]])).sum().backward()
    got = [p.grad for p in model.parameters()]
    model.zero_grad()
    model(torch.tensor([[1, 9]])).sum().backward()
    _close(got, [p.grad for p in model.parameters()])


# -- a fault of the compiler

@pytest.fixture
def broken_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Fuse, module: Operation, ctx: PassContext) -> None:
        raise KeyError("a fault that a test made")

    monkeypatch.setattr(Fuse, "run", fail)


def test_a_fault_of_the_compiler_raises_when_strict(broken_compiler: None) -> None:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="a fault that a test made"):
        _compile(lambda x: x.exp() * 3)(torch.randn(5))


def test_a_fault_of_the_compiler_loses_nothing(broken_compiler: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without AICC_STRICT: the program runs, forward and backward, with one warning per graph that names a file with the graph."""
    monkeypatch.setenv("AICC_STRICT", "0")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh()), torch.randn(3, 5)
    compiled = _compile(model)
    with pytest.warns(RuntimeWarning, match="could not compile this forward graph.*a fault that a test made") as caught:
        got = compiled(x)
    (message,) = [str(w.message) for w in caught if w.category is RuntimeWarning]
    _close(got, model(x))
    path = Path(re.search(r"A repro is in (\S+\.py)", message)[1])  # type: ignore[index]
    assert path.parent == tmp_path
    text = path.read_text()
    assert "KeyError" in text and "tanh" in text
    compile(text, str(path), "exec")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        got.sum().backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    _close(gradients, [p.grad for p in model.parameters()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _close(compiled(x), model(x))  # once compiled, it does not warn again
