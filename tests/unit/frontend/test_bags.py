"""Bags: one kernel that reads each row once, of one length or of any, the values, gradients and errors of eager."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch
from aicc.backends.llvm import CompiledObject
from aicc.compiler.driver import Compilation, watching
from support.stages import AVX2, GENERIC, capture, check_levels
from torch import Tensor

F = torch.nn.functional


def both(function: Any, *args: Tensor) -> Compilation:
    """Compares result and gradients with eager; the compilation of the inference graph."""
    found: list[Compilation] = []
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aicc", options={"strict": True, "cache": False})
    with watching(compiled=found.append), torch.no_grad():
        torch.testing.assert_close(compiled(*args), function(*args))
    theirs, ours = ([a.clone().requires_grad_() if a.is_floating_point() else a for a in args] for _ in range(2))
    function(*theirs).square().sum().backward()
    compiled(*ours).square().sum().backward()
    for a, b in zip(theirs, ours, strict=True):
        if a.is_floating_point():
            torch.testing.assert_close(b.grad, a.grad)
    return found[0]


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_matrix_of_indices(mode: str) -> None:
    found = both(lambda t, i: F.embedding_bag(i, t, mode=mode), torch.randn(50, 24), torch.randint(0, 50, (7, 5)))
    assert found.stats["kernels"] == 1 and not found.stats["externs"]
    both(lambda t, i, w: F.embedding_bag(i, t, mode="sum", per_sample_weights=w), torch.randn(50, 24), torch.randint(0, 50, (7, 5)), torch.randn(7, 5))


@pytest.mark.parametrize(("rows", "dynamic"), [(50, False), (5000, False), (5000, True)])
def test_weighted_rows_are_not_stored(rows: int, dynamic: bool) -> None:
    """A product of gathered rows by one weight each reads them from the table, be that smaller than what is gathered or larger."""
    def weighted(t: Tensor, i: Tensor, w: Tensor) -> Tensor:
        return F.embedding_bag(i, t, mode="sum", per_sample_weights=w)
    args = torch.randn(rows, 24), torch.randint(0, rows, (7, 5)), torch.randn(7, 5)
    if dynamic:
        for a in args[1:]:
            torch._dynamo.mark_dynamic(a, 0)
    found: list[Compilation] = []
    torch._dynamo.reset()
    with watching(compiled=found.append), torch.no_grad():
        compiled = torch.compile(weighted, backend="aicc", options={"strict": True, "cache": False})
        torch.testing.assert_close(compiled(*args), weighted(*args))
        with pytest.raises((IndexError, RuntimeError)):
            compiled(args[0], torch.full((7, 5), rows), args[2])
    assert found[0].stats["kernels"] == 1 and not found[0].stats["memory"]["arena_bytes"]


@pytest.mark.parametrize("function", [
    lambda t, i: F.embedding_bag(i, t, mode="max"), lambda t, i: F.embedding_bag(i, t, mode="sum", padding_idx=3),
    lambda t, i: F.embedding_bag(i.flatten(), t, torch.tensor([0, 4, 4, 20]), mode="mean")])
def test_others_are_the_operator(function: Any) -> None:
    both(function, torch.randn(50, 24), torch.randint(0, 50, (7, 5)))


def test_tables_that_are_computed() -> None:
    """Rows of table * scalar: the scalar is read where the row is, and has no row of its own."""
    for scale in (torch.tensor(2.0), torch.randn(64), torch.randn(90, 1)):
        found = both(lambda t, s, i: (t * s)[i].sum(1), torch.randn(90, 64), scale, torch.randint(0, 90, (11, 7)))
        assert found.stats["kernels"] == 1


def test_module_and_bad_index() -> None:
    module = torch.nn.EmbeddingBag(30, 8, mode="sum")
    compiled = torch.compile(module, backend="aicc", options={"strict": True})
    i = torch.randint(0, 30, (4, 6))
    torch.testing.assert_close(compiled(i), module(i))
    with pytest.raises((IndexError, RuntimeError)):
        compiled(torch.full((4, 6), 30))


@pytest.mark.parametrize(("columns", "length"), [(16, 30), (64, 100)])
def test_rows_are_read_side_by_side(columns: int, length: int) -> None:
    """The columns of a row are the vector, even where there are fewer of them than a bag has rows: nothing is gathered element by element."""
    def summed(t: Tensor, i: Tensor) -> Tensor:
        return F.embedding_bag(i, t, mode="sum")
    found: list[Compilation] = []
    torch._dynamo.reset()
    t, i = torch.randn(500, columns), torch.randint(0, 500, (7, length))
    with watching(compiled=found.append):
        result = torch.compile(summed, backend="aicc", options={"strict": True, "cache": False}, dynamic=False)(t, i)
    torch.testing.assert_close(result, summed(t, i))
    assert "gather" not in "".join(c.llvm_ir for c in found)


def inference(function: Any, *args: Tensor) -> tuple[Any, Compilation]:
    found: list[Compilation] = []
    torch._dynamo.reset()
    with watching(compiled=found.append), torch.no_grad():
        compiled = torch.compile(function, backend="aicc", options={"strict": True, "cache": False}, dynamic=False)
        torch.testing.assert_close(compiled(*args), function(*args))
    return compiled, found[0]


@pytest.mark.parametrize("columns", [1, 3, 24, 100])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_any_length(mode: str, columns: int) -> None:
    """One kernel; empty bags in front, between and behind, bags of nothing but padding, the end as an offset, weights."""
    t, i, o = torch.randn(9, columns), torch.randint(0, 9, (40,)), torch.tensor([0, 0, 4, 4, 5, 29, 40])
    i[4] = 3
    weighted = {"per_sample_weights": torch.rand(40)} if mode == "sum" else {}

    def bags(t: Tensor, i: Tensor, o: Tensor) -> Tensor:
        return F.embedding_bag(i, t, o, mode=mode, padding_idx=3, include_last_offset=True, **weighted)

    _, found = inference(bags, t, i, o)
    assert found.stats["kernels"] == 1 and not found.stats["externs"]
    _, found = inference(lambda t, i, o: F.embedding_bag(i, t, o, mode=mode), t, i, o)
    assert found.stats["kernels"] == 1


def test_bags_of_16_bits_and_gradients() -> None:
    t, i, o = torch.randn(50, 24), torch.randint(0, 50, (35,)), torch.tensor([0, 4, 4, 20])
    for dtype in (torch.bfloat16, torch.float16):
        inference(lambda t, i, o: F.embedding_bag(i, t, o, mode="mean"), t.to(dtype), i, o.int().long())
    both(lambda t, i, o: F.embedding_bag(i, t, o, mode="mean", padding_idx=2), t, i, o)
    both(lambda t, i, o, w: F.embedding_bag(i, t, o, mode="sum", per_sample_weights=w), t, i, o, torch.randn(35))


def test_bad_bags() -> None:
    t, i, o = torch.randn(50, 24), torch.randint(0, 50, (35,)), torch.tensor([0, 4, 4, 20])
    compiled, _ = inference(lambda t, i, o: F.embedding_bag(i, t, o, mode="sum"), t, i, o)
    with torch.no_grad():
        for bad in ([0, 4, 3, 20], [0, 4, 4, 36], [-1, 4, 4, 20]):
            with pytest.raises(RuntimeError, match="must not fall"):
                compiled(t, i, torch.tensor(bad))
        with pytest.raises((IndexError, RuntimeError)):
            compiled(t, i + 49, o)
        torch.testing.assert_close(compiled(t, i, o), F.embedding_bag(i, t, o, mode="sum"))


@pytest.mark.parametrize("target", [GENERIC, AVX2], ids=["generic", "avx2"])
def test_levels(target) -> None:  # type: ignore[no-untyped-def]
    args = torch.randn(9, 20), torch.randint(0, 9, (40,)), torch.tensor([0, 0, 4, 29, 30])
    for options in ({"mode": "mean", "padding_idx": 2}, {"mode": "max", "include_last_offset": True}, {"mode": "sum"}):
        check_levels(capture(lambda t, i, o, options=options: F.embedding_bag(i, t, o, **options), args), target)


def test_rows_are_tested_once_and_asked_for() -> None:
    """One test of an index for all columns of a tile; where the table is larger than the second cache, rows are asked for ahead."""
    i = torch.randint(0, 500, (7, 10))
    _, found = inference(lambda t, i: F.embedding_bag(i, t, mode="sum"), torch.randn(500, 32), i)
    kernel = found.llvm_ir.split("define internal void @\"kernel.")[1].split("\ndefine ")[0]
    assert kernel.count("store i32") <= 5 and "llvm.prefetch" not in kernel  # four steps of a round, and the rest
    _, found = inference(lambda t, i: F.embedding_bag(i, t, mode="sum"), torch.randn(300000, 32), i)
    assert "llvm.prefetch" in found.llvm_ir
    _, found = inference(lambda t, i, o: F.embedding_bag(i, t, o), torch.randn(300000, 32), i.flatten(), torch.tensor([0, 5]))
    assert "llvm.prefetch" in found.llvm_ir


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86 assembly")
def test_rows_are_added_from_memory() -> None:
    """A bad index makes another address, not another branch: LLVM would load all rows of a round in registers, and spill them."""
    _, found = inference(lambda t, i: F.embedding_bag(i, t, mode="sum"), torch.randn(500, 32), torch.randint(0, 500, (7, 12)))
    text = CompiledObject(b"", found.llvm_ir, (), {}, {}, found.target).asm
    kernel = text.split("\nkernel.", 1)[1].split(".Lfunc_end")[0]
    added = [line for line in kernel.splitlines() if "addps" in line]
    assert added and all("(" in line for line in added)
