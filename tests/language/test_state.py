"""State over time: threads, forks, many calls, many graphs, parameters that change, and code that is freed."""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aicc
import pytest
import torch
from aicc.compiler import driver
from aicc.compiler.driver import Compilation, watching
from aicc.runtime.executor import CompiledGraph
from aicc.runtime.loader import NativeLibrary, load_object
from torch import Tensor, nn

from .harness import TORCH


def _compile(f: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(f, backend="aicc", options={"cache": False, **options}, dynamic=False)


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8)).eval()


@pytest.fixture
def graphs() -> Iterator[list[Compilation]]:
    seen: list[Compilation] = []
    with watching(compiled=seen.append):
        yield seen


def _in_threads(work: Callable[[int], None], count: int = 3) -> None:
    failures: list[BaseException] = []

    def guarded(i: int) -> None:
        try:
            work(i)
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures, failures


def _rss() -> int:
    """Bytes of physical memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# -- threads and forks

@pytest.mark.parametrize("warm", [True, False])
def test_threads_that_share_a_compiled_function(warm: bool) -> None:
    """Each thread has inputs, results and an arena of its own; whoever comes first compiles."""
    if not warm and TORCH < (2, 12):
        pytest.skip("in torch 2.11 a thread that calls while another one traces may be told that it is being traced by FX")
    model = _model()
    compiled = _compile(model)
    if warm:
        with torch.no_grad():
            compiled(torch.randn(16, 32))

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _ in range(100):
                x = torch.randn(16, 32, generator=generator)
                torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)

    _in_threads(work)


def test_threads_that_compile_at_once() -> None:
    """Each thread its own function, forward and backward."""
    def work(i: int) -> None:
        w = torch.full((8, 8), float(i + 1), requires_grad=True)
        f = _compile(lambda x: ((x @ w) * (i + 2)).relu().sum())
        x = torch.ones(4, 8)
        f(x).backward()
        torch.testing.assert_close(w.grad, torch.full((8, 8), 4.0 * (i + 2)))

    _in_threads(work, 2)


def test_training_in_threads() -> None:
    """One compiled model, a backward pass in each thread."""
    model = _model()
    compiled = _compile(model)
    compiled(torch.randn(4, 32, requires_grad=True)).sum().backward()

    def work(seed: int) -> None:
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed), requires_grad=True)
        y = x.detach().clone().requires_grad_()
        for _ in range(10):
            g, = torch.autograd.grad(compiled(x).square().sum(), x)
            h, = torch.autograd.grad(model(y).square().sum(), y)
            torch.testing.assert_close(g, h, rtol=1e-4, atol=1e-4)

    _in_threads(work)


class _Squares(torch.utils.data.Dataset[Tensor]):
    """Its items come from a compiled function, which workers inherit by fork."""

    def __init__(self, f: Callable[[Tensor], Tensor]):
        self.f = f

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Tensor:
        return self.f(torch.full((4,), float(i)))


def test_data_loader_workers() -> None:
    f = _compile(lambda x: x * x + 1)
    f(torch.ones(4))
    loader = torch.utils.data.DataLoader(_Squares(f), batch_size=4, num_workers=2, multiprocessing_context="fork")
    rows = torch.cat(list(loader))
    assert rows[:, 0].tolist() == [i * i + 1 for i in range(8)]


def test_compiling_after_a_fork() -> None:
    """A child process runs what was compiled before, and compiles what was not."""
    f = _compile(lambda x: x * 2 + 1)
    f(torch.ones(4))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            g = _compile(lambda x: x.exp() - 1)
            x = torch.ones(4)
            code = 0 if torch.equal(f(x), x * 3) and torch.allclose(g(x), x.exp() - 1) else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


# -- memory

def test_ten_thousand_calls_leak_nothing() -> None:
    """Inference and training steps, with an ATen call and a symbolic size among them: no objects and no memory are left behind."""
    model = _model()
    infer, train = _compile(model), _compile(copy.deepcopy(model))
    mixed = torch.compile(lambda x: x.mode().values * 2, backend="aicc", dynamic=True)
    x = torch.randn(16, 32)

    def calls(n: int) -> None:
        for i in range(n):
            with torch.no_grad():
                infer(x)
                mixed(x[:2 + i % 8])
            if i % 10 == 0:
                train(x).sum().backward()

    calls(300)
    gc.collect()
    objects, memory = len(gc.get_objects()), _rss()
    calls(5000)
    gc.collect()
    assert len(gc.get_objects()) - objects < 100
    assert _rss() - memory < 4 << 20


def _fresh_function(i: int) -> Callable[..., Any]:
    """A function with code of its own: Dynamo keeps what it compiled with the code object."""
    scope: dict[str, Any] = {"torch": torch}
    text = f"def f(x):\n    return torch.tanh(x * {i + 1.25} + 1) * ({i} + x.sum(0))"
    exec(compile(text, __file__, "exec"), scope)  # of a file: around others, older Dynamo puts a function of its own, one for all
    return scope.pop("f")  # Dynamo's guards hold the globals: a function among them would keep itself


def _weakly(seen: list[weakref.ref[Any]]) -> Any:
    """Watches compilations, holding graphs and native libraries weakly."""
    def note(c: Compilation) -> None:
        assert c.graph is not None
        seen.extend([weakref.ref(c.graph), weakref.ref(c.graph.library)])
    return watching(compiled=note)


@pytest.mark.parametrize("train", [False, True])
def test_dropped_graphs_free_their_code(train: bool) -> None:
    """When Dynamo lets go of a function, the graph, its native code and its memory go. (Dynamo itself keeps what it compiled, whatever
    the backend, until torch._dynamo.reset, or remove_from_cache for one function.)"""
    f = _fresh_function(0)
    seen: list[weakref.ref[Any]] = []
    with _weakly(seen):
        y = _compile(f)(torch.randn(3, 4, requires_grad=train))
        if train:
            y.sum().backward()
    assert len(seen) == (4 if train else 2) and all(r() is not None for r in seen)
    del y
    torch._dynamo.eval_frame.remove_from_cache(f)
    gc.collect()
    assert [r() for r in seen] == [None] * len(seen)


def test_packed_parameters_go_with_the_module() -> None:
    """Dynamo keeps the graph of a module that is gone; the copy of its parameters goes as soon as another is made."""
    graphs: list[Any] = []
    with watching(compiled=lambda c: graphs.append(c.graph)), torch.no_grad():
        for width in (48, 96):
            model = nn.Linear(64, width)
            _compile(model)(torch.randn(8, 64))
            del model
            gc.collect()
    assert len(graphs) == 2
    assert [bool(g.memory["persistent"]) for g in graphs] == [False, True]


def _count(kind: type) -> int:
    return sum(type(o) is kind for o in gc.get_objects())


class _MallocInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_compiling_leaves_nothing_in_native_memory() -> None:
    """LLVM's pass pipelines stayed, 140 KB for each graph."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _MallocInfo
    made: list[tuple[Any, Any]] = []
    true = driver.compile_module
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "compile_module", lambda *given, **named: made.append(given) or true(*given, **named))
        _compile(_fresh_function(0))(torch.randn(8, 16))
    ((module, target),) = made

    def used() -> int:
        gc.collect()
        info = mallinfo2()
        return info.uordblks + info.hblkhd

    def compile_and_load(times: int) -> None:
        for _ in range(times):
            done = true(module, target)
            load_object(done.object_code, done.symbols)

    compile_and_load(5)
    before = used()
    compile_and_load(10)
    assert (used() - before) / 10 < 12 << 10


@pytest.mark.slow
def test_two_hundred_graphs_stay_small(capsys: pytest.CaptureFixture[str]) -> None:
    """Kept: what a graph takes. After a reset: it is given back, but for what torch itself keeps per compilation (memory that malloc has
    free does not count: it is trimmed)."""
    script = f"""
import ctypes, gc, sys, torch
from pathlib import Path
sys.path[:0] = {sys.path!r}
def rss():
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
for i in range(220):
    scope = {{"torch": torch}}
    exec(f"def f(x):\\n    return torch.tanh(x * {{i + 1.25}} + 1) * ({{i}} + x.sum(0))", scope)
    g = torch.compile(scope.pop("f"), backend=sys.argv[1], dynamic=False, **({{"options": {{"cache": False}}}} if sys.argv[1] == "aicc" else {{}}))
    g(torch.randn(8, 16))
    if sys.argv[2] == "reset":
        del g
        torch._dynamo.reset()
    if i == 19:
        first = rss()
print((rss() - first) / 200)
"""
    per_graph = {}
    for backend in ("aot_eager", "aicc"):
        for keep in ("kept", "reset"):
            done = subprocess.run([sys.executable, "-c", script, backend, keep], capture_output=True, text=True, check=True)
            per_graph[backend, keep] = float(done.stdout.split()[-1])
    with capsys.disabled():
        print("\nMB per graph:", {" ".join(k): round(v, 3) for k, v in per_graph.items()})
    assert per_graph["aicc", "kept"] < 1.0
    assert per_graph["aicc", "reset"] < per_graph["aot_eager", "reset"] + 0.07


def test_graphs_do_not_pile_up() -> None:
    """Twenty functions, then a reset: none of their graphs or native libraries is left."""
    gc.collect()
    before = _count(CompiledGraph), _count(NativeLibrary)
    for i in range(20):
        _compile(_fresh_function(i))(torch.randn(3, 4))
    assert _count(CompiledGraph) == before[0] + 20
    torch._dynamo.reset()
    gc.collect()
    assert (_count(CompiledGraph), _count(NativeLibrary)) == before


# -- parameters

def test_parameters_that_torch_sees_change() -> None:
    """In-place, through an optimizer, load_state_dict, `.data =`, and a swap of the parameter."""
    model = _model()
    compiled = _compile(model)
    x = torch.randn(8, 32)

    def agree() -> None:
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)

    agree()
    with torch.no_grad():
        model[0].weight.mul_(2)
    agree()
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
    agree()
    model[0].weight.data = torch.randn(64, 32)
    agree()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(x).sum().backward()
    optimizer.step()
    agree()
    model[3].weight = nn.Parameter(torch.randn(8, 64))
    agree()


def test_parameters_that_torch_does_not_see_change() -> None:
    """Through `.data` and numpy, between two calls: single elements of small parameters; rows and pruning of large ones."""
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 700)).eval()
    compiled = _compile(model)
    x = torch.randn(8, 64)
    small, large = model[0].weight, model[2].weight

    def agree() -> None:
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)

    agree()
    version = small._version, large._version
    small.data[17, 23] = 50
    agree()
    small.data[3:5] = 7
    agree()
    small.detach().numpy()[95, 63] = -40
    agree()
    large.data[333] = 0
    agree()
    large.data[large.data.abs() < 0.01] = 0
    large.data[5, 5] += 100
    agree()
    assert (small._version, large._version) == version


@pytest.mark.parametrize("what", ["module", "compiled", "tensor", "list", "everything", "compiled function"])
def test_invalidate(what: str, graphs: list[Compilation]) -> None:
    """A write that nobody can see is seen after `aicc.invalidate`; other models keep what they packed."""
    model, other = nn.Linear(64, 480).eval(), nn.Linear(64, 32).eval()
    compiled, beside = _compile(model), _compile(other)
    x = torch.randn(8, 64)
    with torch.no_grad():
        compiled(x), beside(x)
        kept, others = (c.graph for c in graphs)
        assert kept is not None and others is not None and kept.memory["persistent"] and others.memory["persistent"]
        model.weight.detach().numpy()[17, 23] += 100  # not counted, and beside the word of its row that is compared
        given = {"module": model, "compiled": compiled, "tensor": model.weight, "list": [model.weight], "everything": None, "compiled function": _compile(lambda x: x)}[what]
        several = what in ("everything", "compiled function")
        assert aicc.invalidate(given) >= 2 if several else aicc.invalidate(given) == 1
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
        assert kept.packs == 2
        beside(x)
        assert others.packs == (2 if several else 1)


def test_invalidate_refuses_nonsense() -> None:
    with pytest.raises(TypeError):
        aicc.invalidate(["weight"])  # type: ignore[list-item]


def test_without_packing(graphs: list[Compilation]) -> None:
    """pack_parameters=False: no copy is kept, and every write is seen at once."""
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48)).eval()
    lean, packed = _compile(model, pack_parameters=False), _compile(model)
    x = torch.randn(8, 64)
    with torch.no_grad():
        for call in (lean, packed):
            torch.testing.assert_close(call(x), model(x), rtol=1e-4, atol=1e-4)
            torch._dynamo.reset()
        model[0].weight.detach().numpy()[17, 23] += 100
        torch.testing.assert_close(lean(x), model(x), rtol=1e-4, atol=1e-4)
    held = [c.graph.memory["persistent"] for c in graphs if c.graph is not None]
    assert held[0] == 0 and held[1] > 0
