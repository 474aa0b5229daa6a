"""Rows by index, bags of rows, sorting and products with one column on the CPU, against eager, with data in the caches and not.

    python -m aicc.benchmarks.lookups [--cases bag,sort] [--threads 1 2] [--seconds 0.3] [--json FILE] [--list]

A row per case: milliseconds per call of eager and of aicc (best block's median, in turns, see `timing.py`) and their ratio; at the end the cases
in which aicc is slower than 0.95 of eager.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from .memory_bound import Case, measure
from .suite import parse
from .timing import environment, geometric_mean

import torch  # isort: skip
import torch.nn.functional as F

__all__ = ["CASES"]

LEAST = 0.95
Built = tuple[Callable[..., Any], tuple[Any, ...]]


def _bag(table: int, columns: int, bags: int, length: int, mode: str = "sum", form: str = "matrix", **options: Any) -> Built:
    """Bags of `length` indices, or on average so many where `form` is "ragged"; `weights` among the options: one per index."""
    weighted = options.pop("weights", False)
    t, i = torch.randn(table, columns), torch.randint(0, table, (bags, length))
    w = torch.rand(bags, length)
    if form == "matrix":
        if weighted:
            return (lambda t, i, w: F.embedding_bag(i, t, mode=mode, per_sample_weights=w, **options)), (t, i, w)
        return (lambda t, i: F.embedding_bag(i, t, mode=mode, **options)), (t, i)
    cuts = torch.randint(0, bags * length + 1, (bags - 1,)).sort().values
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), cuts])
    if weighted:
        return (lambda t, i, o, w: F.embedding_bag(i, t, o, mode=mode, per_sample_weights=w, **options)), (t, i.flatten(), offsets, w.flatten())
    return (lambda t, i, o: F.embedding_bag(i, t, o, mode=mode, **options)), (t, i.flatten(), offsets)


def _rows(table: int, columns: int, count: int) -> tuple[Any, ...]:
    return torch.randn(table, columns), torch.randint(0, table, (count,))


def _numbers(rows: int, length: int, dtype: torch.dtype, kind: str = "random") -> tuple[Any, ...]:
    x = torch.randn(rows, length, dtype=dtype) if dtype.is_floating_point else torch.randint(-1 << 62, 1 << 62, (rows, length), dtype=dtype)
    if kind == "small":
        x = torch.randint(0, 100000, (rows, length), dtype=dtype)
    if kind == "nearly":
        x = x.sort().values
        for _ in range(max(1, length // 50)):
            j, k = torch.randint(0, length, (2,)).tolist()
            x[:, [j, k]] = x[:, [k, j]]
    return (x,)


def _embedding_gradient(table: int, columns: int, count: int) -> Built:
    def gradient(g: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.embedding_dense_backward(g, i, table, -1, False)
    return gradient, (torch.randn(count, columns), torch.randint(0, table, (count,)))


HOT, COLD = 1000, 200000
CASES = {c.name: c for c in (
    *(Case(f"bag-sum-{where}-{columns}x{length}", lambda t=table, c=columns, n=length: _bag(t, c, max(64, (1 << 21) // (c * n)), n))
      for where, table in (("hot", HOT), ("cold", COLD)) for columns, length in ((16, 30), (64, 10), (64, 100), (128, 32), (256, 32), (1024, 20))),
    *(Case(f"bag-{mode}-{where}-{columns}x{length}", lambda t=table, c=columns, n=length, m=mode: _bag(t, c, max(64, (1 << 21) // (c * n)), n, m))
      for mode in ("mean", "max") for where, table in (("hot", HOT), ("cold", COLD)) for columns, length in ((64, 10), (128, 32))),
    *(Case(f"bag-ragged-{mode}-{where}-{columns}x{length}",
           lambda t=table, c=columns, n=length, m=mode: _bag(t, c, max(64, (1 << 21) // (c * n)), n, m, "ragged"))
      for mode in ("sum", "mean", "max") for where, table in (("hot", HOT), ("cold", COLD)) for columns, length in ((64, 10), (128, 32))),
    *(Case(f"bag-{form}-weights-{where}-64x30", lambda t=table, f=form: _bag(t, 64, 4096, 30, "sum", f, weights=True))
      for form in ("matrix", "ragged") for where, table in (("hot", HOT), ("cold", COLD))),
    Case("bag-matrix-padding-hot-64x30", lambda: _bag(HOT, 64, 1024, 30, "sum", padding_idx=3)),
    Case("bag-sum-4096x32x256", lambda: _bag(100000, 256, 4096, 32)),
    *(Case(f"embedding-{where}-{columns}", lambda t=table, c=columns: (lambda t, i: F.embedding(i, t), _rows(t, c, (1 << 21) // c)))
      for where, table in (("hot", HOT), ("cold", 50000)) for columns in (16, 64, 768)),
    *(Case(f"embedding-gradient-{where}-{columns}", lambda t=table, c=columns: _embedding_gradient(t, c, (1 << 21) // c))
      for where, table in (("hot", HOT), ("cold", 50000)) for columns in (64, 768)),
    *(Case(f"index-select-1-{columns}",
           lambda c=columns: (lambda x, i: x.index_select(1, i), (torch.randn(1024, c), torch.randint(0, c, (c // 2,)))))
      for columns in (64, 1024)),
    *(Case(f"gather-{columns}", lambda c=columns: (lambda x, i: x.gather(1, i), (torch.randn(1024, c), torch.randint(0, c, (1024, c)))))
      for columns in (64, 1024)),
    *(Case(f"index-add-{columns}", lambda c=columns: (lambda x, i, s: x.index_add(0, i, s),
                                                      (torch.randn(4096, c), torch.randint(0, 4096, (8192,)), torch.randn(8192, c))))
      for columns in (16, 64, 256)),
    Case("scatter-1024x1024", lambda: (lambda x, i, s: x.scatter(1, i, s),
                                       (torch.randn(1024, 1024), torch.randint(0, 1024, (1024, 256)), torch.randn(1024, 256)))),
    *(Case(f"sort-{str(dtype).split('.')[1]}-{kind}-{length}",
           lambda n=length, d=dtype, k=kind: (lambda x: x.sort(stable=True), _numbers((1 << 17) // n, n, d, k)))
      for dtype in (torch.int64, torch.float64) for kind in ("random", "small", "nearly") for length in (50, 100, 200, 400, 1000)
      if dtype == torch.int64 or kind != "small"),
    *(Case(f"{name}-{str(dtype).split('.')[1]}-{kind}-{length}",
           lambda n=length, d=dtype, k=kind, f=function: (f, _numbers((1 << 18) // n, n, d, k)))
      for name, function in (("median", lambda x: x.median(1)), ("kthvalue", lambda x: x.kthvalue(x.shape[1] // 4, 1)))
      for dtype in (torch.float32, torch.int64) for kind in ("random", "nearly") for length in (100, 1000, 16384)),
    *(Case(f"bmm-column-{b}x{m}x{k}", lambda b=b, m=m, k=k: (torch.bmm, (torch.randn(b, m, k), torch.randn(b, k, 1))))
      for b, m, k in ((8, 512, 512), (64, 128, 64), (256, 64, 64), (16, 1024, 1024), (1000, 16, 16))),
    *(Case(f"bmm-row-{b}x{k}x{n}", lambda b=b, k=k, n=n: (torch.bmm, (torch.randn(b, 1, k), torch.randn(b, k, n))))
      for b, k, n in ((8, 512, 512), (64, 64, 128))),
    *(Case(f"matmul-vector-{b}x{m}x{k}", lambda b=b, m=m, k=k: (torch.matmul, (torch.randn(b, m, k), torch.randn(k))))
      for b, m, k in ((8, 512, 512), (64, 128, 64))),
)}


def main() -> None:
    suite = parse(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter), CASES, "none", 0.3)
    for threads, names in suite.runs():
        about = environment()
        print(f"{about['cpu']}, torch {about['torch']}, {threads} of {about['cores']} cores, load {about['load']}")
        print(f"{'case':<36} {'eager ms':>10} {'aicc ms':>10} {'eager/aicc':>10}")
        ratios: dict[str, float] = {}
        for name in names:
            try:
                row = measure(CASES[name], suite.peers, suite.seconds)
            except Exception as e:  # one case that fails must not cost the table
                print(f"{name:<36} FAILED: {type(e).__name__}: {e}"[:200])
                continue
            ratios[name] = row["eager_ms"] / row["aicc_ms"]
            print(f"{name:<36} {row['eager_ms']:>10.4f} {row['aicc_ms']:>10.4f} {ratios[name]:>10.2f}", flush=True)
            suite.add(row | {"threads": threads}, environment=about)
        print(f"geometric mean {geometric_mean(list(ratios.values())):.2f}; below {LEAST}: "
              + (", ".join(f"{n} {r:.2f}" for n, r in ratios.items() if r < LEAST) or "none") + "\n")


if __name__ == "__main__":
    main()
