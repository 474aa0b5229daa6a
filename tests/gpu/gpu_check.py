"""Everything that needs a real GPU, in one run: numerics per kernel family, models, training, errors, timings.

    python tests/gpu/gpu_check.py [section ...]        # kernels models training behaviour gemm; no network needed
    python tests/gpu/gpu_check.py kernels --part 3/8   # every eighth kernel family, from the third: eight processes share the compiling

Sections go on after failures. A table is printed last and written to $OUT (or the current folder) as gpu_check.txt and
gpu_check.json.
Truth is float64. Inputs are fresh random numbers; memory that results may land in is filled with NaN beforehand. Exit code
1 if anything failed.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("AICC_STRICT", "1")
ROOT = Path(__file__).resolve().parents[2]
if ROOT.name == "aicc":
    sys.path.insert(0, str(ROOT.parent))
else:  # the checkout has another name here
    alias = Path(tempfile.mkdtemp()) / "aicc"
    alias.symlink_to(ROOT)
    sys.path.insert(0, str(alias.parent))
sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("AICC_CACHE_DIR", tempfile.mkdtemp())

import torch  # noqa: E402
from aicc.compiler import driver  # noqa: E402
from aicc.compiler.dynamo import aicc as aicc_backend  # noqa: E402
from aicc.passes import block_ranges  # noqa: E402
from aicc.runtime import cuda_record  # noqa: E402
from torch import nn  # noqa: E402

from gpu.cases import CASES, Case, error, tensors  # noqa: E402
from gpu.hopper_cases import HOPPER_CASES, SMALL_CASES  # noqa: E402

START = time.time()
LIMIT: dict[str, float] = {"seconds": 330}
"""Seconds after which no further row is begun."""
PART: list[int] = [1, 1]
"""Which of how many parts of the kernel families to run."""
CHOSEN: list[str] = []
"""The kernel families to run; empty: all."""
ROWS: list[dict[str, Any]] = []
STATS: list[Any] = []
WATCH = driver.watching(compiled=STATS.append)
WATCH.__enter__()


def late() -> bool:
    return time.time() - START > LIMIT["seconds"]


def row(section: str, name: str, ok: bool, **values: Any) -> None:
    ROWS.append({"section": section, "name": name, "ok": ok, **values})
    shown = "  ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())
    print(f"{'ok  ' if ok else 'FAIL'} {section:10s} {name:24s} {shown}", flush=True)


def poison() -> None:
    """Leaves NaN in memory that the allocator will hand out next."""
    junk = [torch.full((n,), float("nan"), device="cuda") for n in [64 << 20, *[1 << 18] * 16, *[1 << 12] * 64]]
    del junk


def on_gpu(value: Any, dtype: torch.dtype | None = None) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    moved = value.detach().to("cuda")
    if dtype is not None and moved.is_floating_point():
        moved = moved.to(dtype)
    return moved.requires_grad_(value.requires_grad)


def compiled(function: Callable[..., Any], dynamic: bool | None = None) -> Callable[..., Any]:
    torch._dynamo.reset()
    STATS.clear()
    return torch.compile(function, backend=aicc_backend, dynamic=dynamic)


def listed(out: Any) -> list[torch.Tensor]:
    return tensors(list(out)) if isinstance(out, (tuple, list)) else [out]


def median_ms(f: Callable[[], Any], repeats: int = 30) -> float:
    """Median milliseconds by CUDA events."""
    for _ in range(5):
        f()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        f()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b))
    return statistics.median(times)


def counts() -> dict[str, int]:
    return {
        "kernels": sum(c.stats.get("kernels", 0) for c in STATS),
        "launches": sum(c.stats.get("launches", 0) for c in STATS),
        "externs": sum(len(c.stats.get("externs", ())) for c in STATS),
    }


# -- sections ---------------------------------------------------------------------------------------------------------


NOT_IN_EAGER = {"gemm_i64"}
"""What torch cannot do on CUDA devices: there is nothing to compare with."""


def kernels() -> None:
    for name, case in list((CASES | HOPPER_CASES | (SMALL_CASES if CHOSEN else {})).items())[PART[0] - 1 :: PART[1]]:
        if name in NOT_IN_EAGER or (CHOSEN and name not in CHOSEN):
            continue
        if late():
            print(f"out of time before {name}", flush=True)
            return
        try:
            with _as_if(case.multiprocessors):
                _kernel(name, case)
        except Exception as e:
            traceback.print_exc()
            row("kernels", name, False, error=f"{type(e).__name__}: {str(e).splitlines()[0][:150]}")


def _gradients(function: Any, inputs: Sequence[Any], out: torch.Tensor) -> list[torch.Tensor]:
    wanted = [
        t
        for t in [*inputs, *(function.parameters() if isinstance(function, torch.nn.Module) else ())]
        if isinstance(t, torch.Tensor) and t.requires_grad
    ]
    weights = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).reshape(out.shape)
    return list(torch.autograd.grad(out, wanted, weights))


@contextmanager
def _as_if(multiprocessors: int) -> Iterator[None]:
    """Programs are compiled for a GPU of so many multiprocessors (0: of those that there are), and skip by data whatever their size."""
    real = driver.cuda_target
    if not multiprocessors:
        yield
        return
    with (patch.object(driver, "cuda_target", lambda device: replace(real(device), multiprocessors=multiprocessors)),
          patch.object(block_ranges, "LEAST_WORK", 0)):
        yield


def _kernel(name: str, case: Case) -> None:
    seed = int.from_bytes(os.urandom(3), "little")
    function, inputs = case.build(seed)
    if isinstance(function, torch.nn.Module):
        function = function.cuda()
    given = [on_gpu(x) for x in inputs]
    run = compiled(function, case.dynamic)
    exact = function
    # Exact cases are compared in their own type, others with float64.
    floats = [x.dtype for x in tensors(inputs) if x.is_floating_point()]
    wide = torch.float64 if case.wide or case.tolerance and all(d == torch.float32 for d in floats) else None
    if isinstance(function, torch.nn.Module):
        exact = copy.deepcopy(function).to(wide)
    poison()
    if case.backward:
        got_out = run(*given)
        got = [got_out, *_gradients(function, given, got_out)]
        upcast = [on_gpu(x, wide) for x in inputs]
        true_out = exact(*upcast)
        true = [true_out, *_gradients(exact, upcast, true_out)]
    else:
        with torch.no_grad():
            got = [x.clone() for x in listed(run(*given))]
            true = listed(exact(*[on_gpu(x, wide) for x in inputs]))
    worst = max(error(a, b) for a, b in zip(got, true, strict=True))
    bound, beside = max(case.tolerance, 0.0), {}
    if case.beside_eager:
        eager = function(*given)
        beside["eager_error"] = max(error(a, b) for a, b in zip([eager, *_gradients(function, given, eager)], true, strict=True))
        bound = 2 * beside["eager_error"]
    row("kernels", name, worst <= bound, max_error=worst, seed=seed, **beside, **counts())


def models() -> None:
    import transformers
    from aicc.tests.models.zoo import MODELS, PlainTensors

    def wide_bert() -> Any:
        config = transformers.BertConfig(hidden_size=768, num_hidden_layers=6, num_attention_heads=12, intermediate_size=3072)
        return PlainTensors(transformers.BertModel(config), ("input_ids",), "last_hidden_state").eval(), (
            torch.randint(0, 30000, (8, 128)),
        )

    def wide_llama() -> Any:
        config = transformers.LlamaConfig(
            hidden_size=768,
            num_hidden_layers=6,
            num_attention_heads=12,
            num_key_value_heads=12,
            intermediate_size=2048,
            vocab_size=32000,
        )
        return PlainTensors(transformers.LlamaForCausalLM(config), ("input_ids",), "logits").eval(), (
            torch.randint(0, 32000, (4, 128)),
        )

    builders: dict[str, Callable[[], Any]] = {n: MODELS[n].build for n in ("bert", "llama", "gpt2", "resnet18")}
    for name, build in {**builders, "bert_768x6": wide_bert, "llama_768x6": wide_llama}.items():
        if late():
            return
        try:
            torch.manual_seed(1)
            model, inputs = build()
            _model(name, model.cuda(), [on_gpu(x) for x in inputs])
        except Exception as e:
            traceback.print_exc()
            row("models", name, False, error=f"{type(e).__name__}: {str(e).splitlines()[0][:150]}")


@torch.no_grad()
def _model(name: str, model: torch.nn.Module, inputs: list[torch.Tensor]) -> None:
    eager = model(*inputs)
    truth = copy.deepcopy(model).double()(*[on_gpu(x, torch.float64) for x in inputs])
    start = time.time()
    run = compiled(model)
    got = run(*inputs)
    seconds = time.time() - start
    poison()
    again = run(*inputs)
    ours, theirs = error(again, truth), error(eager, truth)
    row(
        "models",
        name,
        ours <= 4 * theirs + 2e-6 and error(got, truth) <= 4 * theirs + 2e-6,
        max_error=ours,
        eager_error=theirs,
        eager_ms=median_ms(lambda: model(*inputs)),
        aicc_ms=median_ms(lambda: run(*inputs)),
        compile_s=seconds,
        **counts(),
    )


def training() -> None:
    from aicc.tests.models.zoo import MODELS

    for name in ("gpt2", "llama"):
        if late():
            return
        try:
            case = MODELS[name]
            model, inputs = case.build()
            model, given = model.cuda().train(), [on_gpu(x) for x in inputs]
            exact = copy.deepcopy(model).double()

            def step(m: Any, f: Any, xs: Any, case: Any = case) -> tuple[float, list[torch.Tensor]]:
                m.zero_grad()
                loss = case.loss(f(*xs), tuple(xs))
                loss.backward()
                return float(loss), [p.grad for p in m.parameters() if p.grad is not None]

            loss, got = step(model, compiled(model), given)
            got = [g.clone() for g in got]
            true_loss, true = step(exact, exact, given)
            _, eager = step(model, model, given)
            scale = max(float(g.abs().max()) for g in true)
            ours = max(float((a.double() - b).abs().max()) for a, b in zip(got, true, strict=True)) / scale
            theirs = max(float((a.double() - b).abs().max()) for a, b in zip(eager, true, strict=True)) / scale
            row(
                "training",
                name,
                ours <= 4 * theirs + 2e-6,
                gradient_error=ours,
                eager_error=theirs,
                loss_error=abs(loss - true_loss),
                **counts(),
            )
        except Exception as e:
            traceback.print_exc()
            row("training", name, False, error=f"{type(e).__name__}: {str(e).splitlines()[0][:150]}")


def behaviour() -> None:
    checks: dict[str, Callable[[], dict[str, Any]]] = {
        "misaligned_input": _misaligned,
        "second_stream": _stream,
        "new_sizes": _sizes,
        "mutation": _mutation,
        "launch_cost": _launch_cost,
        "bad_index": _bad_index,
        "recorded": _recorded,
        "recording_that_fails": _recording_fails,
    }
    for name, check in checks.items():
        try:
            found = check()
            row("behaviour", name, found.pop("ok"), **found)
        except Exception as e:
            traceback.print_exc()
            row("behaviour", name, False, error=f"{type(e).__name__}: {str(e).splitlines()[0][:150]}")


def _recorded() -> dict[str, Any]:
    """Training steps whose convolutions' gradients are ATen calls: in CUDA graphs they give the losses that they give without."""
    layers = [nn.Conv2d(3, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64), nn.ReLU()]
    first = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).cuda()
    batches = [(torch.randn(16, 3, 32, 32, device="cuda"), torch.randint(0, 10, (16,), device="cuda")) for _ in range(8)]

    def losses(mode: str) -> list[float]:
        torch._dynamo.reset()
        model = copy.deepcopy(first)
        run = torch.compile(model, backend="aicc", mode=mode)
        optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), []
        for x, y in batches:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(run(x), y)
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        return torch.stack(found).tolist()

    plain = losses("default")
    replays: list[int] = []
    replay = torch.cuda.CUDAGraph.replay
    torch.cuda.CUDAGraph.replay = lambda graph: (replays.append(1), replay(graph))[1]  # type: ignore[assignment, method-assign]
    try:
        recorded = losses("reduce-overhead")
    finally:
        torch.cuda.CUDAGraph.replay = replay  # type: ignore[method-assign]
    worst = max(abs(a - b) for a, b in zip(plain, recorded, strict=True))
    return {"ok": worst < 1e-3 and len(replays) >= 4, "max_error": worst, "replays": len(replays)}


def _recording_fails() -> dict[str, Any]:
    """An operator that waits for the device ends a recording: a warning, the right result, and the allocator is as before."""
    allowed = cuda_record.RECORDABLE
    cuda_record.RECORDABLE = allowed | {"aten.linalg_eig.default"}
    try:
        run = torch.compile(lambda a: torch.linalg.eigvals(a).abs() * 2, backend="aicc", mode="reduce-overhead")
        a = torch.eye(6, device="cuda") * 3
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = [run(a) for _ in range(4)]
    finally:
        cuda_record.RECORDABLE = allowed
    torch.cuda.empty_cache()
    again = torch.empty(1 << 20, device="cuda").fill_(1).sum().item() == 1 << 20
    told = [str(w.message) for w in said if "CUDA graphs" in str(w.message)]
    return {"ok": all(torch.allclose(f, torch.full_like(f, 6)) for f in found) and again and len(told) == 1, "said": (told or [""])[0][:120]}


def _misaligned() -> dict[str, Any]:
    base = torch.randn(1001, device="cuda")
    run = compiled(lambda a: a * 2 + 1)
    run(base[:1000].clone())
    return {"ok": bool(torch.equal(run(base[1:]), base[1:] * 2 + 1))}


def _stream() -> dict[str, Any]:
    x = torch.randn(1 << 20, device="cuda")
    run = compiled(lambda a: (a * 3).relu().sum())
    first = run(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        second = run(x)
    torch.cuda.synchronize()
    return {"ok": bool(torch.equal(first, second))}


def _sizes() -> dict[str, Any]:
    run = compiled(lambda a, b: torch.softmax(a @ b, -1), dynamic=True)
    worst = 0.0
    for m, k, n in ((5, 7, 9), (64, 64, 64), (129, 65, 200), (1000, 33, 1)):
        a, b = torch.randn(m, k, device="cuda"), torch.randn(k, n, device="cuda")
        worst = max(worst, error(run(a, b), torch.softmax(a.double() @ b.double(), -1)))
    return {"ok": worst < 1e-5, "max_error": worst, "compilations": len(STATS)}


def _mutation() -> dict[str, Any]:
    def f(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a.mul_(2).add_(b)
        return a.sum()

    a, b = torch.randn(100, 30, device="cuda"), torch.randn(30, device="cuda")
    expected = a * 2 + b
    compiled(f)(a, b)
    return {"ok": error(a, expected) < 1e-6}


def _launch_cost() -> dict[str, Any]:
    """Python microseconds per call and per launch of a program of 40 small kernels (matrix products, which do not fuse)."""
    w = [torch.randn(32, 32, device="cuda") / 6 for _ in range(40)]

    def f(x: torch.Tensor) -> torch.Tensor:
        for m in w:
            x = torch.tanh(x @ m)
        return x

    x = torch.randn(32, 32, device="cuda")
    run = compiled(f)
    with torch.no_grad():
        ok = error(run(x), f(x)) < 1e-4
        times = {}
        for name, g in (("aicc_us", run), ("eager_us", f)):
            for _ in range(10):
                g(x)
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(100):
                g(x)
            times[name] = (time.perf_counter() - start) * 1e4
            torch.cuda.synchronize()
    return {"ok": ok, **times, **counts()}


def _bad_index() -> dict[str, Any]:
    """An index out of range is reported by a later call, without harm to the process."""
    table = torch.randn(10, 8, device="cuda")
    run = compiled(lambda w, i: torch.nn.functional.embedding(i, w) * 2)
    run(table, torch.tensor([1, 2, 3], device="cuda"))
    run(table, torch.tensor([1, 2, 77], device="cuda"))
    torch.cuda.synchronize()
    try:
        run(table, torch.tensor([1, 2, 3], device="cuda"))
    except IndexError:
        again = run(table, torch.tensor([4], device="cuda"))
        return {"ok": bool(torch.equal(again, table[4:5] * 2))}
    return {"ok": False, "error": "no IndexError"}


@torch.no_grad()
def gemm() -> None:
    """Speed of generated matrix products beside torch's; nothing is expected of it yet."""
    for dtype, n in ((torch.float32, 2048), (torch.bfloat16, 4096)):
        name = f"{str(dtype)[6:]}_{n}"
        try:
            a, b = torch.randn(n, n, device="cuda").to(dtype), torch.randn(n, n, device="cuda").to(dtype)
            run = compiled(lambda x, y: x @ y)
            true = a[:64].double() @ b.double()
            worst = error(run(a, b)[:64], true)
            ms, theirs = median_ms(partial(run, a, b), 10), median_ms(partial(torch.matmul, a, b), 10)
            row(
                "gemm",
                name,
                worst < (1e-5 if dtype == torch.float32 else 1e-2),
                max_error=worst,
                aicc_tflops=2e-9 * n**3 / ms,
                torch_tflops=2e-9 * n**3 / theirs,
            )
        except Exception as e:
            traceback.print_exc()
            row("gemm", name, False, error=f"{type(e).__name__}: {str(e).splitlines()[0][:150]}")


SECTIONS = {"kernels": kernels, "models": models, "training": training, "behaviour": behaviour, "gemm": gemm}


def main() -> int:
    import triton

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", default=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=LIMIT["seconds"], help="no further row is begun after this")
    parser.add_argument("--part", default="1/1", help="of the kernel families, as 3/8")
    parser.add_argument("--case", action="append", default=[], help="only this kernel family")
    parser.add_argument("--names", action="store_true", help="print the kernel families, those for checkers among them, and nothing else")
    options = parser.parse_args()
    if options.names:
        print(*SMALL_CASES, *HOPPER_CASES, *CASES)
        return 0
    CHOSEN.extend(options.case)
    LIMIT["seconds"], PART[:] = options.seconds, [int(n) for n in options.part.split("/")]
    versions = f"torch {torch.__version__}, triton {triton.__version__}, python {sys.version.split()[0]}"
    print(f"{torch.cuda.get_device_name()}, {versions}", flush=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for name in options.sections:
        try:
            SECTIONS[name]()
        except Exception:
            traceback.print_exc()
            row(name, "(section)", False)
    return report()


def report() -> int:
    keys = ("max_error", "eager_error", "eager_ms", "aicc_ms", "compile_s", "kernels", "launches", "externs")
    lines = [f"{'':4s} {'section':10s} {'name':22s} " + " ".join(f"{k:>11s}" for k in keys)]
    for r in ROWS:
        cells = " ".join(f"{r[k]:11.3g}" if isinstance(r.get(k), float) else f"{r.get(k, '')!s:>11s}" for k in keys)
        others = " ".join(
            f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}"
            for k, v in r.items()
            if k not in (*keys, "section", "name", "ok")
        )
        lines.append(f"{'ok' if r['ok'] else 'FAIL':4s} {r['section']:10s} {r['name']:22s} {cells} {others}")
    failed = [f"{r['section']}/{r['name']}" for r in ROWS if not r["ok"]]
    lines.append(
        f"{len(ROWS) - len(failed)} of {len(ROWS)} passed in {time.time() - START:.0f} s; failed: {', '.join(failed) or 'none'}"
    )
    text = "\n".join(lines)
    print("\n" + text)
    out = Path(os.environ.get("OUT", "."))
    (out / "gpu_check.txt").write_text(text + "\n")
    (out / "gpu_check.json").write_text(json.dumps(ROWS, indent=1, default=str))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
