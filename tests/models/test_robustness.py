"""Compiled programs in the hands of users: unusual inputs, mutation and aliasing, graph breaks, threads, errors, faults of the compiler.

Every function is compared with eager on inputs of its own: results, their strides, inputs afterwards, and which of them share memory.
"""

from __future__ import annotations

import copy
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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


def _shared(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """Pairs that live in one storage. Tensors without elements share nothing."""
    where = [t.untyped_storage().data_ptr() if t.numel() else None for t in tensors]
    return [(i, j) for i in range(len(where)) for j in range(i) if where[i] is not None and where[i] == where[j]]


def _check(f: Callable[..., Any], make: Callable[[], tuple[Tensor, ...]], *, shares: bool = True, **options: Any) -> int:
    """Calls f twice, compiled and eager, on equal inputs. Returns how many graphs were compiled."""
    compiled = _compile(f, **options)
    with compiled_graphs() as graphs:
        for seed in range(2):
            torch.manual_seed(seed)
            ours = make()
            torch.manual_seed(seed)
            plain = make()
            got, want = compiled(*ours), f(*plain)
            _close(got, want)
            _close(ours, plain)
            if shares:
                assert _shared([*ours, *_tensors(got)]) == _shared([*plain, *_tensors(want)])
    return len(graphs)


def _tensors(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


# -- mutation and aliasing

def _halve_in_place(x: Tensor) -> Tensor:
    y = x * 3
    x.mul_(0.5)
    return y + x


def _write_a_part(x: Tensor, y: Tensor) -> Tensor:
    x[1:3].add_(y)
    x[:, 0] = 7
    return x.sum(0)


def _write_after_a_view(x: Tensor) -> Tensor:
    v = x.t()
    x.add_(1)
    return v * 2


def _write_an_intermediate(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x + 1
    v = y[1:]
    y.mul_(2)
    return v, y


def _swap(x: Tensor, y: Tensor) -> None:
    old = x.clone()
    x.copy_(y)
    y.copy_(old)


def _overlapping() -> tuple[Tensor, ...]:
    base = torch.randn(5, 4)
    return base[:4], base[1:]


def _same_twice() -> tuple[Tensor, ...]:
    x = torch.randn(4, 4)
    return x, x


_MUTATION: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Tensor, ...]]]] = {
    "an input": (_halve_in_place, lambda: (torch.randn(4, 6),)),
    "a transposed input": (_halve_in_place, lambda: (torch.randn(4, 6).t(),)),
    "a slice of a larger tensor": (_halve_in_place, lambda: (torch.randn(8, 9)[::2, 1:7],)),
    "a part of an input": (_write_a_part, lambda: (torch.randn(5, 3), torch.randn(2, 3))),
    "an input with a view": (_write_after_a_view, lambda: (torch.randn(4, 6),)),
    "an intermediate with a view": (_write_an_intermediate, lambda: (torch.randn(4, 6),)),
    "two inputs, no output": (_swap, lambda: (torch.randn(4, 6), torch.randn(4, 6))),
    "overlapping inputs": (lambda x, y: (x.mul_(2), y + 1)[1], _overlapping),
    "one input twice": (lambda x, y: (x.mul_(2), y + 1)[1], _same_twice),
    "integers": (lambda x: x.add_(1).remainder(3), lambda: (torch.randint(0, 9, (7,)),)),
    "by index": (lambda x, i: x.index_add_(0, i, torch.ones(3, 2)), lambda: (torch.randn(4, 2), torch.tensor([3, 0, 3]))),
}


@pytest.mark.parametrize("name", _MUTATION)
def test_inputs_that_are_written_to(name: str) -> None:
    assert _check(*_MUTATION[name]) >= 1


_ALIASING: dict[str, Callable[[Tensor], Any]] = {
    "an input": lambda x: (x, x + 1),
    "only an input": lambda x: x,
    "a view of an input": lambda x: (x.t(), x[1:], x.view(-1), x * 2),
    "one value twice": lambda x: (lambda y: (y, y))(x + 1),
    "a value and its views": lambda x: (lambda y: (y, y.view(-1), y[:, 1:]))(x * 2),
    "views alone": lambda x: (lambda y: (y.t(), y[0]))(x * 2),
    "numbers and None": lambda x: (x + 1, 3, None, x.shape[0], "text"),
    "nested": lambda x: {"a": [x + 1, (x * 2,)], "b": x.sum()},
    "an expanded value": lambda x: x.sum(1, keepdim=True).expand(4, 6),
    "detached": lambda x: (x.detach(), x.exp()),
}


@pytest.mark.parametrize("name", _ALIASING)
def test_outputs_that_share_memory(name: str) -> None:
    _check(_ALIASING[name], lambda: (torch.randn(4, 6),))


def test_an_output_view_is_alive() -> None:
    """Writing to one of two outputs that share memory shows in the other."""
    a, b = _compile(lambda x: (lambda y: (y, y[0]))(x * 2))(torch.ones(3, 2))
    a.fill_(5)
    assert b.tolist() == [5, 5]


# -- layouts, no elements, no dimensions

def _mixed(x: Tensor) -> tuple[Tensor, ...]:
    return torch.relu(x) + 1, x.softmax(-1), x.sum(0), (x @ x.transpose(-1, -2)).tanh(), x.contiguous(), x.clone()


_LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: torch.randn(6, 5, 4).transpose(0, 2),
    "every second": lambda: torch.randn(4, 10, 12)[:, ::2, ::3],
    "expanded": lambda: torch.randn(1, 5, 1).expand(4, 5, 6),
    "expanded whole": lambda: torch.randn(()).expand(4, 5, 6),
    "with an offset": lambda: torch.randn(8, 5, 6)[3:7],
    "overlapping windows": lambda: torch.randn(40).as_strided((4, 5, 6), (5, 3, 1)),
    "a stride of its own": lambda: torch.randn(400).as_strided((4, 5, 6), (70, 13, 2)),
    "flipped": lambda: torch.randn(4, 5, 6).flip(1),
}


@pytest.mark.parametrize("name", _LAYOUTS)
def test_inputs_of_any_layout(name: str) -> None:
    assert _check(_mixed, lambda: (_LAYOUTS[name](),)) == 1


def test_channels_last() -> None:
    """Images and weights in either order, results in the order of eager's."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        for weights in (torch.contiguous_format, torch.channels_last):
            network = copy.deepcopy(model).to(memory_format=weights)
            for images in (torch.contiguous_format, torch.channels_last):
                _check(network, lambda images=images: (torch.randn(2, 3, 8, 8).to(memory_format=images),))


_EMPTY: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "pointwise": (lambda x: (x * 2 + 1).exp(), ((0, 5),)),
    "sum of nothing": (lambda x: (x.sum(0), x.sum(), x.prod(0)), ((0, 5),)),
    "mean of nothing": (lambda x: (x.mean(), x.mean(0)), ((0, 5),)),
    "reductions to nothing": (lambda x: (x.sum(1), x.amax(1), x.softmax(1)), ((0, 5),)),
    "softmax over nothing": (lambda x: x.softmax(1), ((5, 0),)),
    "matmul, no rows": (lambda x, y: torch.relu(x @ y), ((0, 5), (5, 3))),
    "matmul, no sum": (lambda x, y: x @ y + 1, ((4, 0), (0, 3))),
    "linear": (lambda x, w, b: F.linear(x, w, b), ((0, 5), (3, 5), (3,))),
    "batched matmul": (lambda x, y: x @ y, ((0, 4, 5), (0, 5, 3))),
    "cat": (lambda x, y: torch.cat([x, y, x]), ((0, 5), (3, 5))),
    "layer norm": (lambda x: F.layer_norm(x, (5,)), ((0, 5),)),
    "conv": (lambda x, w: F.conv2d(x, w), ((0, 3, 8, 8), (4, 3, 3, 3))),
    "attention": (lambda q: F.scaled_dot_product_attention(q, q, q), ((0, 2, 4, 8),)),
    "slices and views": (lambda x: (x[2:].reshape(-1), x.t(), x[:, 1:] + 1), ((2, 5),)),
    "broadcast": (lambda x, y: x + y, ((0, 5), (1, 5))),
}


@pytest.mark.parametrize("name", _EMPTY)
def test_no_elements(name: str) -> None:
    function, shapes = _EMPTY[name]
    _check(function, lambda: tuple(torch.randn(s) for s in shapes))


def test_embedding_of_nothing() -> None:
    _check(lambda i, w: F.embedding(i, w) * 2, lambda: (torch.zeros(0, 3, dtype=torch.int64), torch.randn(5, 4)))


def test_a_size_that_becomes_zero() -> None:
    """One dynamic graph, then no rows at all."""
    f = _compile(lambda x: (x.softmax(-1).sum(0), x * 2), dynamic=True)
    for rows in (7, 3, 0, 1, 5):
        x = torch.randn(rows, 6)
        _close(f(x), (x.softmax(-1).sum(0), x * 2))


_SCALARS: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Tensor, ...]]]] = {
    "pointwise": (lambda x: (x * 2, x.exp(), -x), lambda: (torch.randn(()),)),
    "reductions": (lambda x: (x.sum(), x.mean(), x.amax(), x.softmax(0)), lambda: (torch.randn(()),)),
    "with a vector": (lambda x, y: (x + y, y / x), lambda: (torch.randn(()), torch.randn(5))),
    "promotion": (lambda x, y: (x + y, x * 2.5, x / 2), lambda: (torch.tensor(3), torch.randn(5))),
    "a double does not promote a vector": (lambda x, y: x * y, lambda: (torch.tensor(3.0, dtype=torch.float64), torch.randn(5))),
    "as an index": (lambda i, y: y[i] * 2, lambda: (torch.tensor(2), torch.randn(5, 3))),
    "to a scalar": (lambda x: (x.sum(), x.argmax(), (x > 0).all()), lambda: (torch.randn(4, 5),)),
    "written to": (lambda x: x.add_(1) * 2, lambda: (torch.randn(()),)),
    "views": (lambda x: (x.view(1), x.expand(3), x[None]), lambda: (torch.randn(()),)),
}


@pytest.mark.parametrize("name", _SCALARS)
def test_no_dimensions(name: str) -> None:
    _check(*_SCALARS[name])


# -- training state

def test_batch_norm_statistics() -> None:
    """Running statistics after training steps, and the evaluation that uses them."""
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5), nn.BatchNorm1d(5, momentum=None))
    ours = copy.deepcopy(plain)
    compiled = _compile(ours)
    for _ in range(3):
        x = torch.randn(6, 3, 8, 8)
        _close(compiled(x), plain(x))
    _close(dict(ours.named_buffers()), dict(plain.named_buffers()))
    assert ours[1].num_batches_tracked == 3
    ours.eval(), plain.eval()
    x = torch.randn(2, 3, 8, 8)
    _close(compiled(x), plain(x))


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


def test_a_number_read_from_data() -> None:
    def f(x: Tensor) -> Tensor:
        return x / x.abs().max().item() + 1

    assert _check(f, lambda: (torch.randn(3, 4),)) >= 2


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


@pytest.mark.parametrize(("model", "good", "bad"), [
    pytest.param(nn.Linear(6, 3), (2, 6), (2, 5), id="linear, wrong width"),
    pytest.param(nn.Conv2d(3, 4, 3), (1, 3, 8, 8), (8, 8), id="conv, wrong rank"),
    pytest.param(nn.Conv2d(3, 4, 3), (1, 3, 8, 8), (1, 4, 8, 8), id="conv, wrong channels"),
    pytest.param(nn.LayerNorm(6), (2, 6), (6, 2), id="layer norm, wrong width"),
])
def test_a_bad_shape_errors_as_in_eager(model: nn.Module, good: tuple[int, ...], bad: tuple[int, ...]) -> None:
    compiled = _compile(model)
    x = torch.randn(good)
    _close(compiled(x), model(x))
    with pytest.raises(RuntimeError) as eager:
        model(torch.randn(bad))
    with pytest.raises(RuntimeError, match=re.escape(str(eager.value).splitlines()[0][:30])):
        compiled(torch.randn(bad))
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


# -- threads

@pytest.mark.parametrize("warm", [True, False])
def test_threads_that_share_a_compiled_function(warm: bool) -> None:
    """Each thread has inputs, results and an arena of its own; whoever comes first compiles."""
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8)).eval()
    compiled = _compile(model)
    if warm:
        with torch.no_grad():
            compiled(torch.randn(16, 32))
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for _ in range(100):
                    x = torch.randn(16, 32, generator=generator)
                    _close(compiled(x), model(x))
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures, failures


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
