"""`mode="max-autotune"`: which of cuBLASLt's algorithms computes a large product is measured instead of left to the library's first guess.

    tune_products(module, ctx, device, cache_dir)       # a tensor-level module, after `library-operands`

The number of the fastest guess is written to the product's attribute `guess`. Equal products are measured once, and winners are kept on disk by
the product, the library's version and the device: the next process measures nothing, and gets the same kernels. Another guess than the
first has to be MARGIN faster, so that noise changes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..ir import Operation
from ..ir.expr import as_int
from ..ir.passes import PassContext
from ..passes.library import library_shape
from ..runtime.cublaslt import load_cublaslt
from ..runtime.cuda_driver import CudaError
from ..runtime.product_choice import guess_seconds

__all__ = ["LEAST_FLOPS", "tune_products"]

LEAST_FLOPS = 4e9
"""Operations of a product from which it is measured: some 10 us on a large device."""
MARGIN = 0.015
ALIGNMENT = 16
"""Bytes: what operands are nearly always aligned to."""
Measure = Callable[[Mapping[str, Any]], list[float]]


def tune_products(module: Operation, ctx: PassContext, device: torch.device, directory: Path | None, measure: Measure | None = None) -> None:
    """Gives every large product of known sizes the guess that is fastest. `directory`: where winners are kept (None: nowhere); `measure` is
    replaced in tests."""
    known: dict[str, int] = {}
    for op in [op for func in module.body if func.name == "func" for op in func.body if op.name == "tensor.library"]:
        shape = library_shape(op, ctx.target)
        if not all(isinstance(n, int) for key in ("sizes", "a", "b", "c", "d") for n in shape[key]) or 2.0 * _product(shape["sizes"]) < LEAST_FLOPS:
            continue
        row = {**{key: list(map(as_int, shape[key])) for key in ("sizes", "a", "b", "c", "d")},
               **{key: shape[key] for key in ("types", "compute", "bias", "act", "workspace")}, "align": dict.fromkeys("abcd", ALIGNMENT)}
        key = _key(row, device, measure)
        if key not in known:
            known[key] = _chosen(row, key, ctx, op, device, directory, measure)
        if known[key]:
            op.attributes["guess"] = known[key]


def _chosen(row: Mapping[str, Any], key: str, ctx: PassContext, op: Operation, device: torch.device, directory: Path | None,
            measure: Measure | None) -> int:
    path = directory / "products" / f"{key}.json" if directory is not None else None
    try:
        found = json.loads(path.read_text()) if path is not None else None
    except (OSError, ValueError):
        found = None
    if isinstance(found, int):
        return found
    try:
        times = measure(row) if measure is not None else guess_seconds(load_cublaslt(), row, device)
    except (CudaError, torch.OutOfMemoryError) as error:
        ctx.remark("note", f"a product is not measured: {str(error)[:200]}", op.location)
        return 0
    best = fastest(times)
    ctx.remark("done", f"a product measured with each of the library's guesses: {', '.join(f'{t * 1e6:.1f}' for t in times)} us", op.location)
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{id(row)}.tmp")
            temporary.write_text(json.dumps(best))
            temporary.replace(path)
        except OSError:
            pass  # measured again by the next process
    return best


def fastest(times: Sequence[float]) -> int:
    """The number of the least, but 0 if the first is nearly as little."""
    best = min(range(len(times)), key=lambda i: (times[i], i))
    return best if times[best] < times[0] * (1 - MARGIN) else 0


def _product(sizes: Sequence[int]) -> float:
    batch, m, n, k = sizes
    return float(batch * m * n * k)


def _key(row: Mapping[str, Any], device: torch.device, measure: Measure | None) -> str:
    where = "" if measure is not None else f"{torch.cuda.get_device_name(device)}, cuBLASLt {load_cublaslt().version}"
    return hashlib.sha256(f"{json.dumps(row, sort_keys=True)}\n{where}".encode()).hexdigest()
