"""Kernels and models on one GPU against eager and Inductor, in one process: milliseconds, error, distance to the limit of memory or arithmetic.

    python benchmarks/gpu.py                             # all cases
    python benchmarks/gpu.py --only attention,gemm --peers eager,inductor --json out.json
    python benchmarks/gpu.py --tune attention            # aicc alone, with other tiles than the model's choice

Times are medians of CUDA events around batches of calls, contenders interleaved. `limit` is the measured copy bandwidth (on the bytes that must
move) or a 16-bit matrix product of 8192 (on the operations that must be done). Times ending in _gpu are of the call replayed as a CUDA graph:
without the host's part.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("AICC_STRICT", "1")

import torch
import torch.nn.functional as F
from aicc.compiler.dynamo import aicc as aicc_backend
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

BF16 = torch.bfloat16
Function = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """`build()` gives a function and its inputs; `bytes` must move, `flops` must be done at least. `error(result, inputs)` stands for the distance
    from eager's result where that is a random one. `trains`: timed with the backward pass, for the gradients of the first three inputs."""

    name: str
    group: str
    build: Callable[[], tuple[Function, tuple[Tensor, ...]]]
    bytes: float = 0
    flops: float = 0
    error: Callable[[Any, tuple[Tensor, ...]], float] | None = None
    trains: bool = False


def rand(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


# -- memory-bound ----------------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    wide = h.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(h.dtype) * weight, h


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True).float() / 448
    return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


DROPPED = 0.1


def dropout_error(got: Tensor, inputs: tuple[Tensor, ...]) -> float:
    """How far the share of zeros is from what was asked, in units of six standard deviations, where that is above 1; else the error of the rest."""
    x, = inputs
    kept = got != 0
    share = abs(float((~kept).double().mean()) - DROPPED) / (6 * (DROPPED * (1 - DROPPED) / x.numel()) ** 0.5)
    rest = (x.float() / (1 - DROPPED) - got.float())[kept].abs().max() / x.float().abs().max()
    return share if share > 1 else float(rest)


def norm_error(got: Tensor, inputs: tuple[Tensor, ...]) -> float:
    """How far the rows' mean squares are from those that the weights ask, on average."""
    wide = (got.float() / inputs[2].float()).square().mean()
    return abs(float(wide) - 1)


def _memory() -> Iterator[Case]:
    n, d = 16384, 4096
    mb = 2 * n * d
    yield Case("add-rmsnorm", "memory", lambda: (rms_norm, (rand(n, d), rand(n, d), rand(d))), 4 * mb)
    yield Case("layernorm", "memory", lambda: (lambda x, w, b: F.layer_norm(x, (d,), w, b), (rand(n, d), rand(d), rand(d))), 2 * mb)
    yield Case("softmax-8192", "memory", lambda: (lambda x: x.softmax(-1), (rand(n, 8192),)), 4 * mb)
    yield Case("bias-gelu-residual", "memory", lambda: (lambda x, b, r: F.gelu(x + b) + r, (rand(n, d), rand(d), rand(n, d))), 3 * mb)
    yield Case("swiglu", "memory", lambda: (lambda g, u: F.silu(g) * u, (rand(n, 11008), rand(n, 11008))), 6 * n * 11008)
    yield Case("rope", "memory", lambda: (rope, (rand(8, 32, 2048, 128), rand(2048, 128), rand(2048, 128))), 4 * 8 * 32 * 2048 * 128)
    yield Case("quantise-fp8", "memory", lambda: (quantise, (rand(n, d),)), 1.5 * mb)
    yield Case("cross-entropy", "memory", lambda: (F.cross_entropy, (rand(8192, 128256), torch.randint(0, 128256, (8192,), device="cuda"))),
               2 * 8192 * 128256)
    yield Case("transpose-add", "memory", lambda: (lambda x, y: x.t() + y, (rand(8192, 8192), rand(8192, 8192))), 6 * 8192**2)
    yield Case("column-sum", "memory", lambda: (lambda x: x.sum(0), (rand(65536, 1024),)), 2 * 65536 * 1024)
    yield Case("groupnorm-silu", "memory", lambda: (lambda x, w, b: F.silu(F.group_norm(x, 32, w, b)), (rand(16, 512, 64, 64), rand(512), rand(512))),
               4 * 16 * 512 * 64 * 64)
    yield Case("cumsum-f32", "memory", lambda: (lambda x: x.cumsum(-1), (rand(n, d, dtype=torch.float32),)), 8 * n * d)
    yield Case("full-sum", "memory", lambda: (lambda x: x.float().sum(), (rand(n, d),)), mb)
    yield Case("dropout", "memory", lambda: (lambda x: F.dropout(x, DROPPED), (rand(n, d),)), 2 * mb, error=dropout_error)
    yield Case("dropout-residual-norm", "memory", lambda: (
        lambda x, r, w: F.layer_norm(r + F.dropout(x, DROPPED), (d,), w), (rand(n, d), rand(n, d), rand(d))), 3 * mb, error=norm_error)


# -- attention -------------------------------------------------------------------------------------------------------------------


def _positions(s: Tensor) -> tuple[Tensor, Tensor]:
    return (torch.arange(s.shape[-2], device=s.device)[:, None], torch.arange(s.shape[-1], device=s.device)[None, :])


def plain_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    i, j = _positions(s)
    return s.masked_fill(j > i, float("-inf")).softmax(-1) @ v


def plain_full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    i, j = _positions(s)
    slopes = 2.0 ** (-8.0 / q.shape[1] * torch.arange(1, q.shape[1] + 1, device=q.device))
    s = s + slopes[:, None, None] * (j - i)
    return s.masked_fill(j > i, float("-inf")).softmax(-1).to(v.dtype) @ v


def soft_cap_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    s = 30 * torch.tanh(s / 30)
    i, j = _positions(s)
    return s.masked_fill((j > i) | (i - j >= 1024), float("-inf")).softmax(-1) @ v


def documents(b: int, s: int) -> Tensor:
    """The number of each position's document: eight of random length per sequence, the same ones every time [b, s]."""
    g = torch.Generator().manual_seed(0)
    cuts = [torch.randperm(s - 1, generator=g)[:7].add(1).sort().values for _ in range(b)]
    return torch.stack([torch.searchsorted(c, torch.arange(s), right=True) for c in cuts])


def pairs(doc: Tensor, causal: bool) -> float:
    """How many pairs of positions a mask of documents leaves."""
    n = torch.stack([torch.bincount(d, minlength=8) for d in doc]).double()
    return float((n * (n + 1) / 2 if causal else n * n).sum())


def within_documents(causal: bool) -> Function:
    """Plain attention within documents; `doc` [batch, positions]."""

    def attention(q: Tensor, k: Tensor, v: Tensor, doc: Tensor) -> Tensor:
        s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        i, j = _positions(s)
        alive = doc[:, None, :, None] == doc[:, None, None, :]
        return s.masked_fill(~(alive & (j <= i)) if causal else ~alive, float("-inf")).softmax(-1) @ v

    return attention


def sdpa_documents(q: Tensor, k: Tensor, v: Tensor, doc: Tensor) -> Tensor:
    """The same, causal, by name with a boolean mask."""
    i, j = _positions(doc.new_empty(doc.shape[1], doc.shape[1]))
    alive = (doc[:, None, :, None] == doc[:, None, None, :]) & (j <= i)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=alive)


def flex_documents(doc: Tensor) -> Function:
    """The same, causal, by flex_attention (its mask of blocks is made here, outside of what is timed)."""

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (doc[b, i] == doc[b, j]) & (j <= i)

    blocks = create_block_mask(mask, doc.shape[0], None, doc.shape[1], doc.shape[1], device=str(doc.device))
    return lambda q, k, v: flex_attention(q, k, v, block_mask=blocks)


def forward_and_backward(function: Function) -> Function:
    """The gradients of the first three inputs; that of the result is the result."""

    def step(*inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in inputs[:3]]
            out = function(*leaves, *inputs[3:])
            out.backward(out.detach())
        return tuple(x.grad for x in leaves)  # type: ignore[misc]

    return step


def sdpa(causal: bool) -> Function:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def _attention() -> Iterator[Case]:
    b, h, s, d = 4, 16, 4096, 128
    flops = 4 * b * h * s * s * d
    window = 4 * b * h * d * (1024 * s - 1024 * 1023 / 2)

    def qkv() -> tuple[Tensor, ...]:
        return rand(b, h, s, d), rand(b, h, s, d), rand(b, h, s, d)

    yield Case("plain-causal", "attention", lambda: (plain_causal, qkv()), flops=flops / 2)
    yield Case("plain-full", "attention", lambda: (plain_full, qkv()), flops=flops)
    yield Case("plain-alibi", "attention", lambda: (alibi, qkv()), flops=flops / 2)
    yield Case("softcap-window1024", "attention", lambda: (soft_cap_window, qkv()), flops=window)
    yield Case("sdpa-causal", "attention", lambda: (sdpa(True), qkv()), flops=flops / 2)
    yield Case("sdpa-full", "attention", lambda: (sdpa(False), qkv()), flops=flops)
    doc = documents(b, s)
    for name, causal in (("documents-causal", True), ("documents-full", False)):
        yield Case(name, "attention", lambda causal=causal: (within_documents(causal), (*qkv(), doc.cuda())), flops=4 * h * d * pairs(doc, causal))
    yield Case("documents-flex", "attention", lambda: (flex_documents(doc.cuda()), qkv()), flops=4 * h * d * pairs(doc, True))
    steps = 3.5 * 4 * h * d * pairs(doc, True)
    yield Case("plain-causal-step", "attention-training", lambda: (plain_causal, qkv()), flops=3.5 * flops / 2, trains=True)
    yield Case("documents-step", "attention-training", lambda: (within_documents(True), (*qkv(), doc.cuda())), flops=steps, trains=True)
    yield Case("documents-flex-step", "attention-training", lambda: (flex_documents(doc.cuda()), qkv()), flops=steps, trains=True)
    yield Case("sdpa-documents-step", "attention-training", lambda: (sdpa_documents, (*qkv(), doc.cuda())), flops=steps, trains=True)
    yield Case("sdpa-causal-hd64", "attention", lambda: (sdpa(True), tuple(rand(b, 32, s, 64) for _ in range(3))), flops=flops / 2)


# -- matrix products -------------------------------------------------------------------------------------------------------------


def _gemm() -> Iterator[Case]:
    for m, n, k in ((4096, 4096, 4096), (8192, 8192, 8192), (2048, 11008, 4096), (4096, 768, 768),
                    (16, 4096, 4096), (1, 11008, 4096), (16, 4096, 11008)):
        moved, done = 2 * (m * k + k * n + m * n), 2 * m * n * k
        yield Case(f"mm-{m}x{n}x{k}", "gemm", lambda m=m, n=n, k=k: (torch.mm, (rand(m, k), rand(k, n))), moved, done)
        if m <= 16:
            yield Case(f"linear-{m}x{n}x{k}", "gemm", lambda m=m, n=n, k=k: (F.linear, (rand(m, k), rand(n, k))), moved, done)
    yield Case("linear-gelu-4096x16384x4096", "gemm", lambda: (
        lambda x, w, b: F.gelu(F.linear(x, w, b)), (rand(4096, 4096), rand(16384, 4096), rand(16384))), flops=2 * 4096 * 16384 * 4096)
    yield Case("swiglu-4096x11008x4096", "gemm", lambda: (
        lambda x, g, u: F.silu(F.linear(x, g)) * F.linear(x, u), (rand(4096, 4096), rand(11008, 4096), rand(11008, 4096))),
        flops=4 * 4096 * 11008 * 4096)
    weight = lambda: torch.randint(-128, 128, (11008, 4096), device="cuda", dtype=torch.int8)  # noqa: E731
    yield Case("int8-linear-16x11008x4096", "gemm", lambda: (
        lambda x, w, s: F.linear(x, w.to(x.dtype)) * s, (rand(16, 4096), weight(), rand(11008))), 11008 * 4096, 2 * 16 * 11008 * 4096)


def int4_linear(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """Pairs of 4-bit numbers to a byte, and a scale for each group of 128 of a row."""
    low, high = (packed & 15).to(torch.int8) - 8, (packed >> 4).to(torch.int8) - 8
    numbers = torch.stack([low, high], -1).reshape(packed.shape[0], scale.shape[1], -1)
    return F.linear(x, (numbers.to(x.dtype) * scale[:, :, None]).reshape(packed.shape[0], -1))


def _packed() -> Iterator[Case]:
    for m in (1, 16):
        done = 2 * m * 11008 * 4096
        yield Case(f"int8-scaled-{m}x11008x4096", "packed", lambda m=m: (
            lambda x, w, s: F.linear(x, w.to(x.dtype) * s),
            (rand(m, 4096), rand(11008, 4096).mul(40).to(torch.int8), rand(11008, 1))), 11008 * 4096, done)
        yield Case(f"fp8-linear-{m}x11008x4096", "packed", lambda m=m: (
            lambda x, w, s: F.linear(x, w.to(x.dtype)) * s,
            (rand(m, 4096), rand(11008, 4096).to(torch.float8_e4m3fn), rand(11008))), 11008 * 4096, done)
        yield Case(f"int4-groups-{m}x11008x4096", "packed", lambda m=m: (
            int4_linear,
            (rand(m, 4096), torch.randint(0, 256, (11008, 2048), device="cuda", dtype=torch.uint8), rand(11008, 32))), 11008 * 2112, done)


def _scatter() -> Iterator[Case]:
    tokens, d, vocabulary = 16384, 1024, 32000
    index = lambda: torch.randint(0, vocabulary, (tokens,), device="cuda")  # noqa: E731
    yield Case("embedding-backward", "scatter", lambda: (
        lambda g, i: torch.ops.aten.embedding_dense_backward(g, i, vocabulary, -1, False), (rand(tokens, d), index())), 2 * d * (tokens + vocabulary))
    yield Case("index-add-f32", "scatter", lambda: (
        lambda g, i: torch.zeros(vocabulary, d, device="cuda").index_add(0, i, g),
        (rand(tokens, d, dtype=torch.float32), index())), 4 * d * (tokens + vocabulary))
    yield Case("cache-update", "scatter", lambda: (
        lambda c, i, k: c.index_copy(2, i, k),
        (rand(16, 8, 1024, 128), torch.tensor([77], device="cuda"), rand(16, 8, 1, 128))), 4 * 16 * 8 * 1024 * 128)


def adamw_step() -> tuple[Function, tuple[Tensor, ...]]:
    """One step over 96 float32 parameters of four shapes, as in a transformer: 100 million numbers."""
    shapes = [(1024, 4096), (1024, 1024), (1024,), (4096,)] * 24
    parameters = [torch.nn.Parameter(rand(*s, dtype=torch.float32)) for s in shapes]
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, foreach=True, capturable=True)
    return optimizer.step, ()


def _optimizer() -> Iterator[Case]:
    numbers = 24 * (1024 * 4096 + 1024 * 1024 + 1024 + 4096)
    yield Case("adamw-step", "optimizer", adamw_step, 28 * numbers)  # reads parameter, gradient and both moments; writes all but the gradient


CASES = [*_memory(), *_attention(), *_gemm(), *_packed(), *_scatter(), *_optimizer()]


# -- measuring -------------------------------------------------------------------------------------------------------------------


def milliseconds(calls: list[Callable[[], Any]], budget_ms: float = 60, least: int = 1) -> list[float]:
    """Median time of each call, in blocks of at least `least` calls that take turns, another one first each time: clocks sink while a GPU is busy, so
    who is always last has the lowest. In a block of one, the host's way to the first kernel counts."""
    counts = []
    for call in calls:
        call()
        torch.cuda.synchronize()
        counts.append(max(least, min(200, int(budget_ms / 5 / max(1e-3, _block(call, 1))))))
    times: list[list[float]] = [[] for _ in calls]
    contenders = list(zip(calls, counts, times, strict=True))
    for first in range(5):
        for i in range(len(calls)):
            call, n, found = contenders[(first + i) % len(calls)]
            found.append(_block(call, n))
    return [statistics.median(t) for t in times]


def captured(call: Callable[[], Any]) -> Callable[[], Any] | None:
    """The call as a replayed CUDA graph, whose time is the GPU's alone; None if it cannot be captured."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except Exception:
        torch.cuda.synchronize()
        return None
    return graph.replay


def _block(call: Callable[[], Any], n: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(n):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / n


def limits() -> tuple[float, float]:
    """(bytes per ms of a device copy, 16-bit floating point operations per ms)."""
    x, y = torch.empty(1 << 30, device="cuda", dtype=torch.uint8), torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    a, b = rand(8192, 8192), rand(8192, 8192)
    copy, gemm = milliseconds([lambda: y.copy_(x), lambda: a @ b])
    return 2 * (1 << 30) / copy, 2 * 8192**3 / gemm


def _error(got: Any, true: Any) -> float:
    worst = 0.0
    for g, t in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(true), strict=True):
        if t is None:  # an optimizer's step
            continue
        g, t = g.float(), t.float()
        worst = max(worst, float((g - t).abs().max() / t.abs().max().clamp(min=1e-20)))
    return worst


def compiled(function: Function, peer: str) -> Function:
    if peer == "eager":
        return function
    torch._dynamo.reset()
    if peer == "aicc":
        return torch.compile(function, backend=aicc_backend, dynamic=False)
    return torch.compile(function, dynamic=False, mode=None if peer == "inductor" else peer)


def run(case: Case, peers: list[str], copy: float, gemm: float) -> dict[str, Any]:
    function, inputs = case.build()
    row: dict[str, Any] = {"case": case.name, "group": case.group}
    calls: dict[str, Callable[[], Any]] = {}
    with torch.no_grad():
        timed = forward_and_backward if case.trains else lambda f: f
        true = timed(function)(*inputs)
        for peer in peers:
            try:
                start = time.perf_counter()
                made = timed(compiled(function, peer))
                got = made(*inputs)
                torch.cuda.synchronize()
                row[f"{peer}_compile_s"] = round(time.perf_counter() - start, 2)
                if peer == "aicc":
                    row["error"] = case.error(got, inputs) if case.error else _error(got, true)
                calls[peer] = lambda made=made: made(*inputs)
            except Exception as e:
                row[f"{peer}_failed"] = f"{type(e).__name__}: {str(e)[:300]}"
        for peer, ms in zip(calls, milliseconds(list(calls.values())), strict=True):
            row[peer] = ms
        graphs = {peer: g for peer, call in calls.items() if (g := captured(call)) is not None}
        for peer, ms in zip(graphs, milliseconds(list(graphs.values()), 30), strict=True):
            row[f"{peer}_gpu"] = ms
    limit = max(case.bytes / copy, case.flops / gemm)
    row["limit"] = limit
    others = [row[p] for p in peers if p != "aicc" and p in row]
    if "aicc" in row:
        row["of_limit"] = limit / row["aicc"]
        row["tflops"] = case.flops / row["aicc"] / 1e9
        if others:
            row["speedup"] = min(others) / row["aicc"]
        graphed = [row[f"{p}_gpu"] for p in peers if p != "aicc" and f"{p}_gpu" in row]
        if graphed and "aicc_gpu" in row:
            row["speedup_gpu"] = min(graphed) / row["aicc_gpu"]
    return row


def show(row: dict[str, Any]) -> None:
    values = "  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items() if k not in ("case", "group"))
    print(f"{row['case']:30s} {values}", flush=True)


@contextmanager
def forced_tile(kind: str, tile: tuple[int, ...]) -> Iterator[None]:
    """Contractions ("gemm") or streams ("attention") get this tile (rows, columns, step, warps, stages) for a while."""
    from aicc.passes.tiling import lower
    from aicc.passes.tiling.gpu_tiles import GpuTile

    name = "stream_tile" if kind == "attention" else "gemm_tile_gpu"
    saved = getattr(lower, name)
    setattr(lower, name, lambda *_, **__: GpuTile(*tile))
    try:
        yield
    finally:
        setattr(lower, name, saved)


TILES = {
    "attention": [(128, 64, 0, 8, 3), (128, 128, 0, 8, 3), (64, 64, 0, 4, 3), (128, 64, 0, 4, 3), (64, 128, 0, 4, 2)],
    "gemm": [(128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 4, 4), (128, 128, 64, 8, 4), (256, 128, 64, 8, 3), (64, 256, 64, 4, 4),
             (16, 32, 128, 4, 5), (16, 64, 128, 4, 4), (16, 32, 256, 4, 4), (16, 32, 64, 2, 6)],
}


def tune(case: Case, copy: float, gemm: float) -> None:
    """Each tile of the list that compiles; small products only get small tiles."""
    for tile in TILES[case.group]:
        if case.group == "gemm" and (tile[0] <= 16) != ("-16x" in case.name or "-1x" in case.name):
            continue
        with forced_tile(case.group, tile):
            row = run(case, ["aicc"], copy, gemm)
        show({"case": f"{case.name} {tile}", **{k: v for k, v in row.items() if k in ("aicc", "tflops", "of_limit", "error", "aicc_failed")}})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="groups or case names, separated by commas")
    parser.add_argument("--peers", default="eager,inductor")
    parser.add_argument("--tune", default="", help="attention or gemm: try other tiles")
    parser.add_argument("--seconds", type=float, default=500, help="no further case is begun after this")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 1
    begin = time.time()
    torch.manual_seed(0)
    copy, gemm = limits()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copy {copy / 1e9:.2f} TB/s, 8192^3 {gemm / 1e9:.0f} TFLOP/s")
    wanted = set(filter(None, options.only.split(",")))
    rows = []
    for case in CASES:
        if wanted and case.name not in wanted and case.group not in wanted:
            continue
        if time.time() - begin > options.seconds:
            print(f"{case.name}: out of time")
            continue
        if options.tune:
            tune(case, copy, gemm)
            continue
        rows.append(run(case, [*filter(None, options.peers.split(",")), "aicc"], copy, gemm))
        show(rows[-1])
        torch.cuda.empty_cache()
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))
    for key in ("speedup", "speedup_gpu"):
        ratios = [r[key] for r in rows if key in r]
        if ratios:
            print(f"{key}: geomean of best peer / aicc over {len(ratios)} cases {statistics.geometric_mean(ratios):.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
