"""Memory-bound operators on the CPU, as a percentage of the bandwidth of a copy measured in the same run.

    python -m aicc.benchmarks.memory_bound [--cases softmax,cat] [--threads 1 2] [--peers inductor,onnxruntime] [--json FILE] [--list]

A row per case: milliseconds per call (best block's median, see `timing.py`), the bytes that must move at least (every element of the
arguments and results once; of tables that are read by index, the rows that are read), and that many bytes per second as a percentage of the copy.
The copy is the fastest of `Tensor.copy_`, C's memmove and aicc's own `clone`, of 128 MiB, reading and writing counted.
A case whose data lies in the caches can pass 100 %. Peers beside eager as in `cpu.py`.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from . import contenders  # first: it names the caches before torch reads them

import torch  # isort: skip
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from . import networks
from .suite import parse
from .timing import environment, geometric_mean, measure_blocks

__all__ = ["CASES", "Case", "copy_bandwidth", "least_bytes", "measure"]

COPY_ELEMENTS = 32 << 20
TARGET = 90.0
Function = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """`build` makes the function and its arguments; `saved` are bytes of arguments that need not be read."""

    name: str
    build: Callable[[], tuple[Function, tuple[Any, ...]]]
    saved: Callable[[tuple[Any, ...]], int] = lambda args: 0


def _rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def _norm(normalise: Function, rows: int, width: int) -> tuple[Function, tuple[Any, ...]]:
    return normalise, (_rand(rows, width), _rand(width), _rand(width))


def _unread(args: tuple[Any, ...], table: int, indices: int) -> int:
    """Bytes of the rows of a table that no index names."""
    rows = args[indices].unique().numel()
    return (args[table].shape[0] - rows) * args[table][0].numel() * args[table].element_size()


CASES = {c.name: c for c in (
    Case("copy-32M", lambda: (lambda x: x.clone(), (_rand(32 << 20),))),
    Case("add-8M", lambda: (lambda x, y: x + y, (_rand(8 << 20), _rand(8 << 20)))),
    Case("add-64M", lambda: (lambda x, y: x + y, (_rand(64 << 20), _rand(64 << 20)))),
    Case("gelu-8M", lambda: (F.gelu, (_rand(8 << 20),))),
    Case("gelu-32M", lambda: (F.gelu, (_rand(32 << 20),))),
    Case("gelu-tanh-chain-8M", lambda: (networks.gelu_tanh, (_rand(8 << 20),))),
    Case("softmax-2048x4096", lambda: (lambda x: x.softmax(-1), (_rand(2048, 4096),))),
    Case("softmax-32768x1024", lambda: (lambda x: x.softmax(-1), (_rand(32768, 1024),))),
    Case("softmax-8192x1001", lambda: (lambda x: x.softmax(-1), (_rand(8192, 1001),))),
    Case("layernorm-8192x1024", lambda: _norm(lambda x, w, b: F.layer_norm(x, w.shape, w, b), 8192, 1024)),
    Case("layernorm-8192x4096", lambda: _norm(lambda x, w, b: F.layer_norm(x, w.shape, w, b), 8192, 4096)),
    Case("rmsnorm-8192x2048", lambda: (lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), (_rand(8192, 2048), _rand(2048)))),
    Case("add-rmsnorm-2048x4096", lambda: (networks.add_rms_norm, (_rand(2048, 4096), _rand(2048, 4096), _rand(4096)))),
    Case("cross-entropy-2048x8192", lambda: (F.cross_entropy, (_rand(2048, 8192), torch.randint(0, 8192, (2048,))))),
    Case("sum-inner-8192x2048", lambda: (lambda x: x.sum(1), (_rand(8192, 2048),))),
    Case("sum-outer-8192x1024", lambda: (lambda x: x.sum(0), (_rand(8192, 1024),))),
    Case("sum-all-16M", lambda: (lambda x: x.sum(), (_rand(16 << 20),))),
    Case("sum-both-64x256x1024", lambda: (lambda x: x.sum((0, 2)), (_rand(64, 256, 1024),))),
    Case("amax-outer-8192x1024", lambda: (lambda x: x.amax(0), (_rand(8192, 1024),))),
    Case("var-inner-8192x2048", lambda: (lambda x: x.var(1), (_rand(8192, 2048),))),
    Case("transpose-4096", lambda: (lambda x: x.t().contiguous(), (_rand(4096, 4096),))),
    Case("transpose-add-4096", lambda: (lambda x, y: x.t() + y, (_rand(4096, 4096), _rand(4096, 4096)))),
    Case("heads-16x512x16x64", lambda: (lambda x: x.transpose(1, 2).contiguous(), (_rand(16, 512, 16, 64),))),
    Case("nchw-to-nhwc-16x64x112", lambda: (lambda x: x.permute(0, 2, 3, 1).contiguous(), (_rand(16, 64, 112, 112),))),
    Case("embedding-16384x768", lambda: (lambda t, i: F.embedding(i, t), (_rand(32000, 768), torch.randint(0, 32000, (16384,)))),
         lambda a: _unread(a, 0, 1)),
    Case("embedding-bag-4096x32x256",
         lambda: (lambda t, i: F.embedding_bag(i, t, mode="sum"), (_rand(100000, 256), torch.randint(0, 100000, (4096, 32)))),
         lambda a: _unread(a, 0, 1)),
    Case("gather-8192x1024", lambda: (lambda x, i: x.gather(1, i), (_rand(8192, 1024), torch.randint(0, 1024, (8192, 1024))))),
    Case("scatter-add-rows-32768x256", lambda: (lambda x, i, s: x.index_add(0, i, s),
                                                (_rand(8192, 256), torch.randint(0, 8192, (32768,)), _rand(32768, 256)))),
    Case("scatter-8192x1024", lambda: (lambda x, i, s: x.scatter(1, i, s),
                                       (_rand(8192, 1024), torch.randint(0, 1024, (8192, 256)), _rand(8192, 256)))),
    Case("cat-inner-4096x2x1024", lambda: (lambda x, y: torch.cat([x, y], 1), (_rand(4096, 1024), _rand(4096, 1024)))),
    Case("cat-outer-2x8M", lambda: (lambda x, y: torch.cat([x, y], 0), (_rand(4096, 2048), _rand(4096, 2048)))),
    Case("cumsum-inner-8192x1024", lambda: (lambda x: x.cumsum(1), (_rand(8192, 1024),))),
    Case("cumsum-outer-8192x1024", lambda: (lambda x: x.cumsum(0), (_rand(8192, 1024),))),
)}


def least_bytes(case: Case, args: tuple[Any, ...], results: Any) -> int:
    """Bytes that any implementation moves: arguments read once, results written once."""
    tensors = [t for t in (*tree_leaves(args), *tree_leaves(results)) if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors) - case.saved(args)


def copy_bandwidth(seconds: float = 1.0) -> dict[str, float]:
    """Bytes per second, read and written, of each way to copy 128 MiB; memmove runs on one thread."""
    x, y = torch.randn(COPY_ELEMENTS), torch.empty(COPY_ELEMENTS)
    ours = torch.compile(lambda a: a.clone(), backend="aicc")
    ways = {"copy_": lambda: y.copy_(x), "aicc": lambda: ours(x), "memmove": lambda: ctypes.memmove(y.data_ptr(), x.data_ptr(), 4 * COPY_ELEMENTS)}
    times = measure_blocks(list(ways.values()), seconds)
    return {name: 2 * 4 * COPY_ELEMENTS / t.seconds for name, t in zip(ways, times, strict=True)}


def read_bandwidth(seconds: float = 1.0) -> float:
    """Bytes per second of the fastest way to read 128 MiB and write nothing: torch's sum and largest, and aicc's sums of all and over rows."""
    x = torch.randn(COPY_ELEMENTS)
    ours = torch.compile(lambda a: a.sum(), backend="aicc")
    rows, columns = torch.compile(lambda a: a.sum(0), backend="aicc"), x.view(-1, 4096)
    return 4 * COPY_ELEMENTS / min(t.seconds for t in measure_blocks([x.sum, x.amax, lambda: ours(x), lambda: rows(columns)], seconds))


@torch.no_grad()
def measure(case: Case, peers: Sequence[str], seconds: float) -> dict[str, Any]:
    """One row: milliseconds of each contender and the bytes that must move. A peer that cannot run the case is left out."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    function, args = case.build()
    expected = function(*args)
    calls: dict[str, Callable[[], Any]] = {"eager": lambda: function(*args)}
    row: dict[str, Any] = {"case": case.name, "bytes": least_bytes(case, args, expected)}
    path = ""
    for name in ["aicc", *peers]:
        try:
            if name in contenders.FROM_ONNX and not path:
                path = contenders.export(function, args)
            call = contenders.PEERS[name](path if name in contenders.FROM_ONNX else function, args, torch.get_num_threads())
            found = call()
        except Exception as e:
            if name == "aicc":
                raise
            row[f"{name}_failure"] = f"{type(e).__name__}: {e}".splitlines()[0]
            continue
        if name == "aicc":
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
            del found
        calls[name] = call
    for name, t in zip(calls, measure_blocks(list(calls.values()), seconds), strict=True):
        row[f"{name}_ms"] = t.seconds * 1e3
        row[f"{name}_spread"] = t.spread
    return row


def main() -> None:
    suite = parse(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter), CASES, "none", 0.5)
    peers = suite.peers
    for threads, names in suite.runs():
        ways = copy_bandwidth()
        copy = max(ways.values())
        about = environment()
        print(f"{about['cpu']}, torch {about['torch']}, {threads} of {about['cores']} cores, load {about['load']}; copy of 128 MiB, GB/s: "
              + ", ".join(f"{name} {v / 1e9:.1f}" for name, v in ways.items()))
        print(" ".join([f"{'case':<28}", *(f"{n + ' ms':>16}" for n in ["eager", *peers, "aicc"]), "   MB", "  % of copy  (eager)  best peer/aicc"]))
        here = []
        for name in names:
            try:
                row = measure(CASES[name], peers, suite.seconds)
            except Exception as e:  # one case that fails must not cost the table
                print(f"{name:<28} FAILED: {type(e).__name__}: {e}"[:200])
                continue
            row |= {"threads": threads, "copy": copy, "percent": 100 * row["bytes"] / (row["aicc_ms"] / 1e3) / copy}
            here.append(row)
            print(_line(row, peers), flush=True)
            suite.add(row, environment=about, copies=ways)
        if here:
            short = [r for r in here if r["percent"] < TARGET]
            print(f"{len(here) - len(short)} of {len(here)} cases at {TARGET:.0f} % of the copy or more; best peer over aicc: geometric mean "
                  f"{geometric_mean([_ratio(r, peers) for r in here]):.2f}x, below 0.95: "
                  + (", ".join(r["case"] for r in here if _ratio(r, peers) < 0.95) or "none") + "\n")


def _ratio(row: dict[str, Any], peers: Sequence[str]) -> float:
    return float(min(row[f"{p}_ms"] for p in ["eager", *peers] if f"{p}_ms" in row) / row["aicc_ms"])


def _line(row: dict[str, Any], peers: Sequence[str]) -> str:
    eager = 100 * row["bytes"] / (row["eager_ms"] / 1e3) / row["copy"]
    cells = [f"{row['case']:<28}", *(f"{row.get(f'{n}_ms', float('nan')):>16.3f}" for n in ["eager", *peers, "aicc"])]
    return " ".join(cells) + f" {row['bytes'] / 1e6:>6.0f} {row['percent']:>9.0f} % {eager:>6.0f} % {_ratio(row, peers):>10.2f}"


if __name__ == "__main__":
    main()
