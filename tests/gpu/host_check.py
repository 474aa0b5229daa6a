"""The host function on a real GPU, in one run: native launches, cuBLASLt and CUDA graphs; right first, then how fast.

    python tests/gpu/host_check.py [section ...]        # native products graphs costs speed choice

Sections go on after failures; a table is printed last and written to $OUT (or the current folder) as host_check.txt and host_check.json.
Truth is float64, inputs are fresh random numbers, and memory that results may land in holds NaN beforehand. Exit code 1 if anything failed.
"""

from __future__ import annotations

import cProfile
import io
import json
import os
import pstats
import statistics
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("AICC_STRICT", "1")
ROOT = Path(__file__).resolve().parents[2]
if ROOT.name == "aicc":
    sys.path.insert(0, str(ROOT.parent))
else:  # the checkout has another name here
    alias = Path(tempfile.mkdtemp()) / "aicc"
    alias.symlink_to(ROOT)
    sys.path.insert(0, str(alias.parent))
os.environ.setdefault("AICC_CACHE_DIR", tempfile.mkdtemp())

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from aicc.compiler import driver  # noqa: E402
from aicc.compiler.dynamo import aicc as aicc_backend  # noqa: E402
from aicc.passes import library  # noqa: E402

START = time.time()
LIMIT = float(os.environ.get("HOST_CHECK_SECONDS", "280"))
"""Seconds after which no further row is begun."""
ROWS: list[dict[str, Any]] = []
COMPILED: list[Any] = []
WATCH = driver.watching(compiled=COMPILED.append)
WATCH.__enter__()
Check = Callable[[], dict[str, Any]]


def row(section: str, name: str, ok: bool, **values: Any) -> None:
    ROWS.append({"section": section, "name": name, "ok": ok, **values})
    shown = "  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())
    print(f"{'ok  ' if ok else 'FAIL'} {section:9s} {name:30s} {shown}", flush=True)


def attempt(section: str, name: str, check: Check) -> None:
    if time.time() - START > LIMIT:
        return
    try:
        found = check()
        row(section, name, found.pop("ok"), **found)
    except Exception as e:
        traceback.print_exc()
        row(section, name, False, error=f"{type(e).__name__}: {str(e).splitlines()[0][:200]}")


def compiled(f: Callable[..., Any], *, graphs: bool = False, dynamic: bool | None = None) -> Callable[..., Any]:
    torch._dynamo.reset()
    COMPILED.clear()
    return torch.compile(f, backend=aicc_backend, dynamic=dynamic, options={"cudagraphs": graphs, "cache": False})


def poison() -> None:
    """Leaves NaN in memory that the allocator will hand out next."""
    junk = [torch.full((n,), float("nan"), device="cuda") for n in [32 << 20, *[1 << 18] * 16, *[1 << 12] * 64]]
    del junk


def error(got: torch.Tensor, true: torch.Tensor) -> float:
    found = float((got.double() - true.double()).abs().max() / true.double().abs().max().clamp_min(1e-30))
    return found if found == found else float("inf")


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def device_us(f: Callable[[], Any], repeats: int = 30, batch: int = 1) -> float:
    """Median microseconds by CUDA events."""
    for _ in range(3):
        f()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        for _ in range(batch):
            f()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b) * 1e3 / batch)
    return statistics.median(times)


def host_us(f: Callable[[], Any], calls: int = 50, rounds: int = 7) -> float:
    """Microseconds of the host per call, without waiting for the device: the median of rounds."""
    for _ in range(10):
        f()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            f()
        times.append((time.perf_counter() - start) * 1e6 / calls)
    torch.cuda.synchronize()
    return statistics.median(times)


# -- native -----------------------------------------------------------------------------------------------------------


def chain(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    for w in weights:
        x = torch.tanh(x @ w)
    return x


def _values() -> dict[str, Any]:
    x, w = rand(33, 65), [rand(65, 65) / 8 for _ in range(4)]
    run = compiled(lambda x: chain(x, w))
    poison()
    worst = max(error(run(x), chain(x.double(), [m.double() for m in w])) for _ in range(3))
    return {"ok": worst < 1e-5, "max_error": worst}


def _sizes() -> dict[str, Any]:
    run = compiled(lambda a, b: torch.softmax(a @ b, -1).sum(0), dynamic=True)
    worst = 0.0
    for m, k, n in ((5, 7, 9), (64, 64, 64), (129, 65, 200), (1000, 33, 31)):
        a, b = rand(m, k), rand(k, n)
        worst = max(worst, error(run(a, b), torch.softmax(a.double() @ b.double(), -1).sum(0)))
    return {"ok": worst < 1e-5, "max_error": worst, "compilations": len(COMPILED)}


def _misaligned(graphs: bool = False) -> dict[str, Any]:
    run = compiled(lambda a: a * 2 + 1, graphs=graphs)
    ok = True
    for _ in range(3):
        base = rand(1001)
        ok &= torch.equal(run(base[:1000].clone()), base[:1000] * 2 + 1) and torch.equal(run(base[1:]), base[1:] * 2 + 1)
    return {"ok": ok}


def _mutated() -> dict[str, Any]:
    def f(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a.mul_(2).add_(b)
        return a.sum()

    worst = 0.0
    run = compiled(f)
    for offset in (0, 1):
        a, b = rand(3001)[offset:3000 + offset], rand(3000)
        want = a * 2 + b
        run(a, b)
        worst = max(worst, error(a, want))
    return {"ok": worst < 1e-6, "max_error": worst}


def _stream(graphs: bool = False) -> dict[str, Any]:
    x = rand(1 << 20)
    run = compiled(lambda a: (a * 3).relu().sum(), graphs=graphs)
    first = [run(x) for _ in range(3)][-1]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        others = [run(x) for _ in range(3)]
    torch.cuda.synchronize()
    return {"ok": all(torch.equal(first, o) for o in others)}


def _threads(graphs: bool = False) -> dict[str, Any]:
    w = [rand(64, 64) / 8 for _ in range(6)]
    run = compiled(lambda x: chain(x, w), graphs=graphs)
    run(rand(64, 64))
    graph = COMPILED[-1].graph
    bad: list[str] = []

    def work() -> None:
        try:
            with torch.no_grad():
                for _ in range(50):
                    x = rand(64, 64)
                    (got,) = graph(*arguments(graph, x, w))
                    if error(got, chain(x, w)) > 1e-4:
                        bad.append("wrong")
        except Exception as e:
            bad.append(f"{type(e).__name__}: {e}")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return {"ok": not bad, "bad": bad[:2]}


def arguments(graph: Any, x: torch.Tensor, w: list[torch.Tensor]) -> list[torch.Tensor]:
    """x and the weights in the order in which the graph takes them (by value)."""
    return ORDER[id(graph)](x) if id(graph) in ORDER else _find_order(graph, x, w)


ORDER: dict[int, Callable[[torch.Tensor], list[torch.Tensor]]] = {}


def _find_order(graph: Any, x: torch.Tensor, w: list[torch.Tensor]) -> list[torch.Tensor]:
    """Records what Dynamo passes: runs are compared by address."""
    n = len(graph.manifest["inputs"])
    assert n == len(w) + 1
    for at in (0, n - 1, *range(1, n - 1)):
        given = [*w[:at], x, *w[at:]]
        (got,) = graph(*given)
        if error(got, chain(x, w)) < 1e-4:
            ORDER[id(graph)] = lambda y, at=at: [*w[:at], y, *w[at:]]  # type: ignore[misc]
            return given
    raise AssertionError("no order of the arguments gives the right result")


def _bad_index() -> dict[str, Any]:
    table = rand(10, 8)
    run = compiled(lambda w, i: F.embedding(i, w) * 2)
    run(table, torch.tensor([1, 2, 3], device="cuda"))
    run(table, torch.tensor([1, 2, 77], device="cuda"))
    torch.cuda.synchronize()
    try:
        run(table, torch.tensor([1, 2, 3], device="cuda"))
    except IndexError:
        again = run(table, torch.tensor([4, 0, 1], device="cuda"))
        return {"ok": bool(torch.equal(again, table[[4, 0, 1]] * 2))}
    return {"ok": False, "error": "no IndexError"}


def native() -> None:
    for name, check in {"values": _values, "new_sizes": _sizes, "misaligned": _misaligned, "mutated": _mutated, "second_stream": _stream,
                        "threads": _threads, "bad_index": _bad_index}.items():
        attempt("native", name, check)


# -- cuBLASLt ---------------------------------------------------------------------------------------------------------

SHAPES: list[tuple[str, int, int, int, torch.dtype]] = [
    (f"{str(d)[6:]}_{m}x{n}x{k}", m, n, k, d)
    for d, sizes in (
        (torch.bfloat16, [(4096, 4096, 4096), (8192, 8192, 8192), (2048, 11008, 4096), (16, 4096, 4096), (4096, 768, 768), (4096, 3072, 768),
                          (4096, 768, 3072), (128, 768, 768)]),
        (torch.float32, [(4096, 4096, 4096), (2048, 11008, 4096), (16, 4096, 4096), (4096, 768, 768), (4096, 3072, 768)]),
    )
    for m, n, k in sizes
]


def _product(m: int, n: int, k: int, dtype: torch.dtype) -> dict[str, Any]:
    a, b = rand(m, k, dtype=dtype), rand(k, n, dtype=dtype)
    with torch.no_grad():
        run = compiled(lambda a, b: a @ b)
        poison()
        run(a, b)
        worst = error(run(a, b)[:128], a[:128].double() @ b.double())
        graph = COMPILED[-1]
        ours, theirs = device_us(lambda: graph.graph(a, b), batch=10), device_us(lambda: torch.mm(a, b), batch=10)
        again = device_us(lambda: torch.mm(a, b), batch=10)
    flops = 2.0 * m * n * k
    return {"ok": worst < (1e-5 if dtype == torch.float32 else 8e-3), "max_error": worst, "library": graph.stats["library"], "aicc_us": ours,
            "torch_us": theirs, "torch_again_us": again, "aicc_tflops": flops / ours / 1e6, "torch_tflops": flops / theirs / 1e6}


@contextmanager
def forced() -> Iterator[None]:
    """The library takes whatever it can."""
    kept = library.MARGIN, library.SKINNY
    library.MARGIN, library.SKINNY = -1.0, 0
    try:
        yield
    finally:
        library.MARGIN, library.SKINNY = kept


def _forms() -> dict[str, Any]:
    """Every transposition, batches, offsets, bias, ReLU and residual, in each type."""
    worst: dict[str, float] = {}
    calls = 0

    def check(name: str, f: Callable[..., Any], *inputs: torch.Tensor) -> None:
        nonlocal calls
        run = compiled(f)
        poison()
        got = run(*inputs)
        calls += sum(c.stats["library"] for c in COMPILED)
        worst[name] = error(got, f(*[x.double() for x in inputs])) / {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3,
                                                                      torch.float64: 1e-12}[inputs[0].dtype]

    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            t = str(dtype)[6:]
            x, w, bias, r = rand(4, 512, 1024, dtype=dtype), rand(2048, 1024, dtype=dtype), rand(2048, dtype=dtype), rand(4, 512, 2048, dtype=dtype)
            check(f"linear {t}", F.linear, x, w)
            check(f"bias {t}", F.linear, x, w, bias)
            check(f"bias relu {t}", lambda x, w, b: F.linear(x, w, b).relu(), x, w, bias)
            check(f"bias residual {t}", lambda x, w, b, r: F.linear(x, w, b) + r, x, w, bias, r)
            check(f"gelu {t}", lambda x, w, b: F.gelu(F.linear(x, w, b)), x, w, bias)
            a, b = rand(1536, 1024, dtype=dtype), rand(1024, 2048, dtype=dtype)
            check(f"tn {t}", lambda a, b: a.t() @ b, a.t().contiguous(), b)
            check(f"tt {t}", lambda a, b: a.t() @ b.t(), a.t().contiguous(), b.t().contiguous())
            check(f"slices {t}", lambda a, b: a[:, 256:768] @ b[256:768], a, b)
            check(f"odd slices {t}", lambda a, b: a[:, 3:1003] @ b[3:1003], a, b)
            check(f"batch {t}", torch.bmm, rand(24, 512, 512, dtype=dtype), rand(24, 512, 640, dtype=dtype))
            check(f"ragged {t}", lambda a, b: a @ b, rand(1111, 1033, dtype=dtype), rand(1033, 2049, dtype=dtype))
            check(f"gradient {t}", lambda g, x: g.t() @ x, rand(2048, 1280, dtype=dtype), rand(2048, 1024, dtype=dtype))
    bad = {k: v for k, v in worst.items() if not v <= 1}
    return {"ok": not bad and calls > 30, "library_calls": calls, "cases": len(worst), "worst_over_tolerance": max(worst.values()), "bad": bad}


def _dynamic_product() -> dict[str, Any]:
    worst = 0.0
    run = compiled(lambda a, b: (a @ b).sum(-1), dynamic=True)
    for m, k, n in ((5, 7, 9), (64, 64, 64), (129, 65, 200), (1000, 33, 31), (3, 1025, 77), (2, 2, 2), (5, 7, 9)):  # a workspace at any offset
        a, b = rand(m, k), rand(k, n)
        worst = max(worst, 100 * error(run(a, b), (a.double() @ b.double()).sum(-1)))
    small = [c.stats["library"] for c in COMPILED]
    run = compiled(lambda x, w, b: F.linear(x, w, b).relu(), dynamic=True)
    w, b = rand(2048, 2048, dtype=torch.bfloat16), rand(2048, dtype=torch.bfloat16)
    with torch.no_grad():
        for n in (1024, 1500, 2048, 1500):
            x = rand(n, 2048, dtype=torch.bfloat16)
            worst = max(worst, error(run(x, w, b), F.linear(x.double(), w.double(), b.double()).relu()))
    return {"ok": worst < 8e-3, "max_error": worst, "library": [*small, *(c.stats["library"] for c in COMPILED)]}


def _relu_nan() -> dict[str, Any]:
    """NaN must come through the library's ReLU, as it does through torch's."""
    x, w, b = rand(1024, 1024, dtype=torch.bfloat16), rand(2048, 1024, dtype=torch.bfloat16), rand(2048, dtype=torch.bfloat16)
    x[5, 7] = float("nan")
    with torch.no_grad():
        got = compiled(lambda x, w, b: F.linear(x, w, b).relu())(x, w, b)
    return {"ok": bool(got[5].isnan().all()) and not bool(got[6].isnan().any()), "library": COMPILED[-1].stats["library"]}


def _tf32() -> dict[str, Any]:
    a, b = rand(2048, 2048), rand(2048, 2048)
    true = a.double() @ b.double()
    found: dict[str, Any] = {}
    with torch.no_grad():
        for name in ("highest", "high"):
            torch.set_float32_matmul_precision(name)
            try:
                run = compiled(lambda a, b: a @ b)
                found[name] = error(run(a, b), true)
                found[f"{name}_us"] = device_us(lambda run=run: run(a, b))
            finally:
                torch.set_float32_matmul_precision("highest")
    return {"ok": found["highest"] < 1e-5 < found["high"] < 3e-3, **found}


def _training() -> dict[str, Any]:
    """A step of an MLP: products of the backward graph by the library too."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1024, 4096), torch.nn.ReLU(), torch.nn.Linear(4096, 1024)).cuda()
    x = rand(2048, 1024)
    model(x).square().mean().backward()
    eager = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled(model)(x).square().mean().backward()
    worst = max(error(p.grad, e) for p, e in zip(model.parameters(), eager, strict=True))
    return {"ok": worst < 1e-4, "max_error": worst, "library": [c.stats["library"] for c in COMPILED]}


def products() -> None:
    for name, check in {"forms": _forms, "dynamic": _dynamic_product, "relu_nan": _relu_nan, "tf32": _tf32, "training": _training}.items():
        with forced():
            attempt("products", name, check)


def speed() -> None:
    for name, m, n, k, dtype in SHAPES:
        attempt("speed", name, lambda m=m, n=n, k=k, dtype=dtype: _product(m, n, k, dtype))


def choice() -> None:
    """Both ways of a product, with a GELU on top where the name says so: is the model's choice the faster one?"""
    shapes = [(4096, 4096, 4096, ""), (4096, 3072, 768, ""), (4096, 3072, 768, "gelu"), (4096, 768, 768, ""), (512, 3072, 768, "gelu"),
              (128, 768, 768, ""), (64, 4096, 4096, ""), (16, 4096, 4096, "")]
    for dtype, rows in ((torch.bfloat16, shapes), (torch.float32, shapes[3:6])):
        for m, n, k, act in rows:
            attempt("choice", f"{str(dtype)[6:]}_{m}x{n}x{k}{act}", lambda m=m, n=n, k=k, act=act, dtype=dtype: _both(m, n, k, act, dtype))


def _both(m: int, n: int, k: int, act: str, dtype: torch.dtype) -> dict[str, Any]:
    a, b = rand(m, k, dtype=dtype), rand(k, n, dtype=dtype)
    found: dict[str, float] = {}
    chosen = 0
    kept = library.MARGIN, library.SKINNY
    try:
        for name, (margin, skinny) in {"chosen": kept, "library": (-1.0, 0), "generated": (1.0, 1 << 30)}.items():
            library.MARGIN, library.SKINNY = margin, skinny
            torch._dynamo.reset()
            COMPILED.clear()
            run = torch.compile(lambda a, b: F.gelu(a @ b) if act else a @ b, backend=aicc_backend, options={"cache": False})
            with torch.no_grad():
                run(a, b)
                graph = COMPILED[-1].graph
                found[f"{name}_us"] = device_us(lambda graph=graph: graph(a, b), batch=10)
            if name == "chosen":
                chosen = COMPILED[-1].stats["library"]
    finally:
        library.MARGIN, library.SKINNY = kept
    best = min(found["library_us"], found["generated_us"])
    taken = found["library_us"] if chosen else found["generated_us"]
    return {"ok": True, "library": chosen, **found, "regret": taken / best - 1}


# -- CUDA graphs ------------------------------------------------------------------------------------------------------


def _replayed() -> dict[str, Any]:
    w = [rand(64, 64) / 8 for _ in range(20)]
    run = compiled(lambda x: chain(x, w), graphs=True)
    kept, worst = [], 0.0
    with torch.no_grad():
        for _ in range(12):
            x = rand(64, 64)
            kept.append((run(x), chain(x, w)))
            poison()
        worst = max(error(a, b) for a, b in kept)  # earlier outputs must not have been overwritten
    replay = COMPILED[-1].graph.replay
    return {"ok": worst < 1e-4 and replay.launches == 11 and replay.captures == 1, "max_error": worst, "captures": replay.captures,
            "launches": replay.launches, "patches": replay.patches}


def _replayed_products() -> dict[str, Any]:
    """Products hide the addresses that they use: one graph for each combination."""
    w, b, v = rand(4096, 1024, dtype=torch.bfloat16), rand(4096, dtype=torch.bfloat16), rand(1024, 4096, dtype=torch.bfloat16)
    run = compiled(lambda x: F.linear(F.gelu(F.linear(x, w, b)), v) + x, graphs=True)
    worst = 0.0
    with torch.no_grad():
        for _ in range(40):
            x = rand(1024, 1024, dtype=torch.bfloat16)
            worst = max(worst, error(run(x), F.linear(F.gelu(F.linear(x.double(), w.double(), b.double())), v.double()) + x))
    replay = COMPILED[-1].graph.replay
    return {"ok": worst < 1e-2 and replay.launches > 20, "max_error": worst, "captures": replay.captures, "launches": replay.launches,
            "patches": replay.patches, "library": COMPILED[-1].stats["library"]}


def _replayed_sizes() -> dict[str, Any]:
    run = compiled(lambda a: torch.softmax(torch.tanh(a), -1).sum(0), graphs=True, dynamic=True)
    worst = 0.0
    for m, n in ((5, 77), (64, 64), (5, 77), (64, 64), (1000, 33), (5, 77), (64, 64), (1000, 33)):
        a = rand(m, n)
        worst = max(worst, error(run(a), torch.softmax(torch.tanh(a.double()), -1).sum(0)))
    replay = COMPILED[-1].graph.replay
    return {"ok": worst < 1e-5 and replay.captures >= 2, "max_error": worst, "captures": replay.captures, "launches": replay.launches}


def _declined() -> dict[str, Any]:
    run = compiled(lambda a: torch.linalg.inv(a) * 2, graphs=True)
    a = rand(8, 8) + 8 * torch.eye(8, device="cuda")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        got = run(a)
        run(a)
    said = [str(w.message) for w in seen if "CUDA graphs" in str(w.message)]
    return {"ok": len(said) == 1 and error(got, torch.linalg.inv(a.double()) * 2) < 1e-4, "said": said[:1]}


def graphs() -> None:
    for name, check in {"values": _replayed, "products": _replayed_products, "sizes": _replayed_sizes, "misaligned": lambda: _misaligned(True),
                        "second_stream": lambda: _stream(True), "threads": lambda: _threads(True), "declined": _declined}.items():
        attempt("graphs", name, check)


# -- what a call costs ------------------------------------------------------------------------------------------------


def costs() -> None:
    """Programs of n small kernels (matrix products that do not fuse): microseconds of the host per call, and until the device is done."""
    with torch.no_grad():
        for n in (1, 40, 160):
            attempt("costs", f"{n} kernels", lambda n=n: _cost(n))
        attempt("costs", "profile of a call", _profile)


def _cost(n: int) -> dict[str, Any]:
    w = [rand(272, 272) / 16 for _ in range(n)]  # too wide for one kernel to hold two of them
    x = rand(16, 272)

    def f(x: torch.Tensor) -> torch.Tensor:
        return chain(x, w)

    found: dict[str, Any] = {}
    ways: dict[str, Callable[[], Any]] = {
        "eager": lambda: f,
        "aicc": lambda: compiled(f),
        "aicc_graphs": lambda: compiled(f, graphs=True),
        "inductor": lambda: torch.compile(f),
        "inductor_overhead": lambda: torch.compile(f, mode="reduce-overhead"),
    }
    want = f(x)
    ok = True
    for name, make in ways.items():
        if n != 40 and name.startswith("inductor"):
            continue  # its compilation takes its time
        torch._dynamo.reset()
        run = make()
        for _ in range(3):
            got = run(x)
        ok &= error(got, want) < 1e-3
        found[f"{name}_host"] = host_us(lambda run=run: run(x))
        found[f"{name}_total"] = device_us(lambda run=run: run(x), repeats=20, batch=5)
        if name.startswith("aicc"):
            graph = COMPILED[-1].graph
            given = _find_order(graph, x, w)
            ok &= COMPILED[-1].stats["launches"] == n and COMPILED[-1].stats["library"] == 0
            found[f"{name}_call_host"] = host_us(lambda graph=graph, given=given: graph(*given))
            if graph.replay is not None:  # new addresses in every call: kernels get new parameters
                at, others, turn = next(i for i, g in enumerate(given) if g is x), [rand(16, 272) for _ in range(16)], iter(range(1 << 30))
                found[f"{name}_moving_host"] = host_us(
                    lambda graph=graph, given=given, at=at, others=others, turn=turn: graph(*given[:at], others[next(turn) % 16], *given[at + 1:]))
                found[f"{name}_patches"] = graph.replay.patches
    return {"ok": ok, **found}


def _profile() -> dict[str, Any]:
    w = [rand(272, 272) / 16 for _ in range(40)]
    compiled(lambda x: chain(x, w))(rand(16, 272))
    graph = COMPILED[-1].graph
    given = _find_order(graph, rand(16, 272), w)
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(500):
        graph(*given)
    profile.disable()
    torch.cuda.synchronize()
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(12)
    print("\n".join(line for line in text.getvalue().splitlines() if line.strip())[:3000])
    return {"ok": True}


SECTIONS: dict[str, Callable[[], None]] = {"native": native, "products": products, "graphs": graphs, "costs": costs, "speed": speed, "choice": choice}


def main() -> int:
    import triton

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, python {sys.version.split()[0]}", flush=True)
    for name in sys.argv[1:] or SECTIONS:
        SECTIONS[name]()
    failed = [f"{r['section']}/{r['name']}" for r in ROWS if not r["ok"]]
    lines = []
    for r in ROWS:
        cells = "  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in r.items() if k not in ("section", "name", "ok"))
        lines.append(f"{'ok' if r['ok'] else 'FAIL':4s} {r['section']:9s} {r['name']:28s} {cells}")
    lines.append(f"{len(ROWS) - len(failed)} of {len(ROWS)} passed in {time.time() - START:.0f} s; failed: {', '.join(failed) or 'none'}")
    text = "\n".join(lines)
    print("\n" + text)
    out = Path(os.environ.get("OUT", "."))
    (out / "host_check.txt").write_text(text + "\n")
    (out / "host_check.json").write_text(json.dumps(ROWS, indent=1, default=str))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
