"""Streams on Hopper in Gluon: which kernels take the form, what it computes (on a model of the machine), and that it compiles."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from aicc.backends.triton import compile_gpu, group_schedule, print_kernel, stream_shape, warp_groups
from aicc.backends.triton.printer import KernelSource
from aicc.backends.triton.warp_groups import print_warp_groups
from aicc.frontend.attention import attention
from aicc.ir import Operation
from aicc.ir.interpreter import interpret
from aicc.passes import block_ranges
from torch import Tensor

from . import gluon_model
from .cases import SM80, SM90, capture, error
from .gluon_model import launcher

FEW = dataclasses.replace(SM90, multiprocessors=3)
"""Programs of several rounds, also for small inputs."""


def positions(s: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(s.shape[-2])[:, None], torch.arange(s.shape[-1])[None, :]


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(-1) @ v


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    i, j = positions(s)
    return s.masked_fill(j > i, -math.inf).softmax(-1) @ v


def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    s = scores(q, k)
    i, j = positions(s)
    return (s + slopes[:, None, None] * (j - i)).masked_fill(j > i, -math.inf).softmax(-1).to(v.dtype) @ v


def soft_cap_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = 30 * torch.tanh(scores(q, k) / 30)
    i, j = positions(s)
    return s.masked_fill((j > i) | (i - j >= 200), -math.inf).softmax(-1) @ v


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))


def turned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def documents(q: Tensor, k: Tensor, v: Tensor, doc: Tensor) -> Tensor:
    s = scores(q, k)
    i, j = positions(s)
    return s.masked_fill((j > i) | (doc[:, None, :, None] != doc[:, None, None, :]), -math.inf).softmax(-1) @ v


def documents_by_name(q: Tensor, k: Tensor, v: Tensor, doc: Tensor) -> Tensor:
    i, j = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])[None, :]
    return attention(q, k, v, (doc[:, None, :, None] == doc[:, None, None, :]) & (j <= i))


def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (scores(q, k) + bias).softmax(-1) @ v


def heads(*shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(7)
    return tuple(torch.randn(shape, generator=g).to(dtype) for _ in range(3))


def _grouped() -> tuple[Tensor, ...]:
    q, k, v = heads(1, 4, 256, 64)
    return q, k[:, :2].contiguous(), v[:, :2].contiguous()


FORMS: dict[str, tuple[Callable[..., Tensor], Callable[[], tuple[Tensor, ...]]]] = {
    "full": (full, lambda: heads(1, 3, 384, 128)),
    "causal": (causal, lambda: heads(2, 2, 384, 128)),
    "alibi": (alibi, lambda: (*heads(1, 2, 384, 128), torch.tensor([0.3, 0.01]))),
    "soft_cap_window": (soft_cap_window, lambda: heads(1, 2, 640, 128)),
    "grouped": (grouped, _grouped),
    "turned": (turned, lambda: heads(1, 256, 4, 64)),
    "half": (causal, lambda: heads(1, 3, 256, 64, dtype=torch.float16)),
    "documents": (documents, lambda: (*heads(2, 2, 256, 128), torch.arange(256).div(100, rounding_mode="floor").expand(2, 256).contiguous())),
    "biased": (biased, lambda: (*heads(1, 3, 256, 128), torch.randn(256, 256).bfloat16())),
}


def module_of(f: Callable[..., Tensor], inputs: tuple[Tensor, ...], until: str = "tile", target: Any = FEW, *,
              computes: bool = True) -> tuple[Operation, list[Tensor]]:
    """The module and its arguments. computes: eager's result is wanted too."""
    found: list[Any] = []

    def run(module: Operation, gm: torch.fx.GraphModule, args: list[Any]) -> Any:
        found.append((module, args))
        return gm.forward(*args) if computes else [torch.empty_like(inputs[0])]

    capture(f, inputs, run, until=until, target=target)
    return found[0]


def stream_of(module: Operation) -> Operation:
    return next(op for op in module.body if op.name == "tile.kernel" and "stream" in op["sym_name"])


def run(f: Callable[..., Tensor], inputs: tuple[Tensor, ...], change: Callable[[str], str] = str) -> tuple[Tensor, str]:
    """The result with the stream's kernel in Gluon, and its text. `change` is made to the text before it runs."""
    module, args = module_of(f, inputs)
    taken: list[KernelSource] = []

    def changed(kernel: Operation) -> KernelSource | str:
        source = print_warp_groups(kernel, FEW, [True] * len(kernel.body.args))
        return source if isinstance(source, str) else dataclasses.replace(source, text=change(source.text))

    out, = interpret(module, args, handlers={"tile.launch": launcher(changed, taken)})
    assert len(taken) == 1, "no kernel took the form"
    return out, taken[0].text


@pytest.mark.product
@pytest.mark.parametrize("ahead", [0, 3], ids=["in order", "ahead"])
@pytest.mark.parametrize("name", FORMS)
def test_what_it_computes(name: str, ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warp_groups, "ROLLING", ahead)
    f, make = FORMS[name]
    inputs = make()
    got, text = run(f, inputs)
    true = f(*(x.double() if x.is_floating_point() else x for x in inputs))
    assert error(got, true) < (6e-3 if inputs[0].dtype == torch.bfloat16 else 2e-3)
    assert ("done = program" in text) == (ahead > 0), "the order that was asked for"


def _without(line: str, part: str) -> Callable[[str], str]:
    """One line less in a part of the text, and as many as there are of it."""
    def change(text: str) -> str:
        head, at, rest = text.partition(f"_{part}(")
        body, end, tail = rest.partition("\n\n\n@gluon.jit")
        changed = re.sub(rf"\n *{line}[^\n]*", "", body)
        assert changed != body
        return head + at + changed + end + tail

    return change


def _early(line: str) -> Callable[[str], str]:
    """A line of a group stands before the wait for a product that it follows."""
    def change(text: str) -> str:
        changed = re.sub(rf"(\n[\w, ]+ = warpgroup_mma_wait[^\n]*)(\n *{line}[^\n]*)", r"\2\1", text)
        assert changed != text
        return changed

    return change


PLANTED: dict[str, tuple[Callable[[str], str], str]] = {
    "the loader does not wait for k": (_without(r"mbarrier\.wait\(k_free", "loader"), "overwritten"),
    "the loader does not wait for v": (_without(r"mbarrier\.wait\(v_free", "loader"), "overwritten"),
    "the loader does not wait for q": (_without(r"mbarrier\.wait\(q_free", "loader"), "overwritten"),
    "a group does not wait for k": (_without(r"mbarrier\.wait\(k_full", "group"), "not have come"),
    "a group does not wait for q": (_without(r"mbarrier\.wait\(q_full", "group"), "not have come"),
    "k is given back before it is read": (_early(r"mbarrier\.arrive\(k_free"), "overwritten"),
    "v is given back before it is read": (_early(r"mbarrier\.arrive\(v_free"), "overwritten"),
}


IMPLIED = {"the loader does not wait for k", "the loader does not wait for q", "k is given back before it is read"}
"""What takes no part in the rolling order: who has given v back has read k before, and the q of two programs before."""


@pytest.mark.parametrize(("planted", "name"), [(p, name) for p in PLANTED for name in ("causal", "soft_cap_window") if name != "causal" or p not in IMPLIED])
def test_a_race_is_found_by_the_model(planted: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both orders of products: a wait or an arrival that is needed is missed."""
    monkeypatch.setattr(gluon_model, "PATIENCE", 5.0)
    change, said = PLANTED[planted]
    f, make = FORMS[name]
    with pytest.raises((AssertionError, RuntimeError), match=f"{said}|more arrivals"):
        run(f, make(), change)


@pytest.mark.parametrize(("why", "f", "inputs", "target"), [
    ("masked", causal, heads(1, 4, 250, 64), FEW),
    ("not Hopper", causal, heads(1, 4, 256, 64), dataclasses.replace(SM80, multiprocessors=3)),
    ("other sizes", causal, heads(1, 4, 256, 32), FEW),
])
def test_other_streams_are_printed_plainly(why: str, f: Callable[..., Tensor], inputs: tuple[Tensor, ...], target: Any) -> None:
    module, _ = module_of(f, inputs, target=target)
    kernel = stream_of(module)
    said = print_warp_groups(kernel, target, [True] * len(kernel.body.args))
    assert isinstance(said, str) and (why in said or "128 rows" in said)
    assert "tl.dot(" in print_kernel(kernel).text


def test_an_operand_that_may_start_anywhere_is_not_copied_by_the_engine() -> None:
    module, _ = module_of(causal, heads(1, 4, 256, 64))
    assert print_warp_groups(stream_of(module), FEW, [True, False, True, True]) == "an operand may start anywhere"


@pytest.mark.parametrize("target", [FEW, dataclasses.replace(SM80, multiprocessors=3)], ids=["sm_90", "sm_80"])
def test_it_compiles(target: Any, tmp_path: Path) -> None:
    module, _ = module_of(causal, heads(2, 2, 256, 128), until="host", target=target)
    made = compile_gpu(module, target, cache_dir=tmp_path)
    kernel, = (k for name, k in made.kernels.items() if "stream" in name)
    assert kernel.cubin[:4] == b"\x7fELF" and kernel.global_scratch == 0
    row = made.program["kernels"][kernel.name]
    if target is not FEW:
        assert not kernel.descriptors and row["threads"] in (128, 256)
        return
    assert row["threads"] == 12 * 32 and row["grid"] == [3] and kernel.spills <= 128 and kernel.registers == 168
    assert [d["sizes"] for d in kernel.descriptors] == [[128, 1024]] * 3 and [d["box"] for d in kernel.descriptors] == [[64, 64], [64, 128], [64, 128]]
    assert all(d["type"] == 9 and d["strides"] == [256] and d["swizzle"] == 3 for d in kernel.descriptors)
    assert "cuTensorMapEncodeTiled" in made.host.imports


def test_the_programs_are_all_taken_once_and_evenly() -> None:
    """Every other round of a persistent program runs backwards: the longest and the shortest lot differ by little."""
    module, _ = module_of(causal, heads(2, 4, 512, 64))
    text = print_warp_groups(stream_of(module), FEW, [True] * 4)
    assert not isinstance(text, str)
    taken: list[list[int]] = []
    for p in range(3):
        rounds = 32 // 3 + (p < 32 % 3)
        taken.append([turn * 3 + (p if turn % 2 == 0 else 2 - p) for turn in range(rounds)])
    assert sorted(x for lot in taken for x in lot) == list(range(32))
    assert "program = turn*3 + gl.where((turn & 1) == 0, gl.program_id(0), 2 - gl.program_id(0))" in text.text
    assert "range(0, 10 + (gl.program_id(0) < 2).to(gl.int32))" in text.text


def test_one_round_stays_a_loop(tmp_path: Path) -> None:
    """As many programs as multiprocessors: Triton 3.6 rejected the rolling order where the loop over rounds had a constant length of one."""
    target = dataclasses.replace(SM90, multiprocessors=4)
    module, _ = module_of(causal, heads(1, 2, 256, 64), until="host", target=target)
    made = compile_gpu(module, target, cache_dir=tmp_path)
    assert made.sources["stream"].count("for turn in range(0, 1 + (gl.program_id(0) < 0).to(gl.int32)):") == 2 and made.kernels["stream"].descriptors


def test_what_gluon_rejects_is_compiled_plainly_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_shape, "SHARED_LAYOUT", stream_shape.SHARED_LAYOUT.replace("128", "48"))
    module, _ = module_of(full, heads(2, 2, 256, 64), until="host")
    with pytest.warns(RuntimeWarning, match="plain, slower form"):
        made = compile_gpu(module, FEW, cache_dir=tmp_path)
    assert "tl.dot(" in made.sources["stream"] and not made.kernels["stream"].descriptors
    assert made.program["kernels"]["stream"]["grid"] == [2, 2, 2]


def test_masked_tiles_are_skipped_where_the_mask_is_a_member_of_its_own() -> None:
    """Two heads read one mask of documents: still nothing beyond the diagonal is computed."""
    module, _ = module_of(documents, FORMS["documents"][1]())
    loops = [op for op in stream_of(module).body if op.name == "tile.for"]
    assert [str(loop["upper"]) for loop in loops] == ["-i0*128 + 256", "-i0*128 + 128"], "masked steps first"


@pytest.mark.parametrize("turns", [False, True], ids=["free", "in turns"])
def test_what_data_exclude_is_neither_computed_nor_copied(turns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader and both groups read the same ranges of steps, or they would wait for each other for ever."""
    monkeypatch.setattr(block_ranges, "LEAST_WORK", 0)
    monkeypatch.setattr(warp_groups, "TURNS", turns)
    f, make = FORMS["documents"]
    got, text = run(f, make())
    assert error(got, f(*(x.double() if x.is_floating_point() else x for x in make()))) < 6e-3
    loader = text[text.index("_loader("):text.index("_group(")]
    assert loader.count("gl.load(") == text[text.index("_group("):].count("gl.load(") - 3 == 8, "four ranges of two blocks; groups read documents too"
    assert ("bar.sync" in text) == turns


MASKS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "window": (lambda i, j: (j <= i) & (i - j < 256), 2),
    "causal": (lambda i, j: j <= i, 1),
    "ahead": (lambda i, j: (j >= i) & (j - i < 256), 1),
    "odd window": (lambda i, j: (j <= i) & (i - j < 200), 1),
    "odd on both sides": (lambda i, j: (j <= i + 90) & (j + 150 > i), 0),
    "on both sides": (lambda i, j: (j <= i + 128) & (j + 128 > i), 2),
    "all but the near": (lambda i, j: i - j >= 64, 0),
}
"""Which scores count, and at how many ends a group has half steps."""


@pytest.mark.parametrize("cap", [True, False], ids=["capped", "plain"])
@pytest.mark.parametrize("name", MASKS)
def test_a_group_leaves_out_the_half_steps_that_are_masked_for_its_rows(name: str, cap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Less is multiplied, and never what counts is left out; with a running maximum and without."""
    mask, ends = MASKS[name]

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = 30 * torch.tanh(scores(q, k) / 30) if cap else scores(q, k)
        return torch.where(mask(*positions(s)), s, -math.inf).softmax(-1) @ v

    monkeypatch.setattr(warp_groups, "ROLLING", 0)
    inputs = heads(1, 2, 640, 64)
    blocks: list[tuple[int, int]] = []
    read = gluon_model.Tile.read
    monkeypatch.setattr(gluon_model.Tile, "read", lambda tile: (blocks.append(tile.memory.shape[0] // 64) if tile.turned else None, read(tile))[1])
    results, counts = [], []
    for halves in (False, True):
        monkeypatch.setattr(group_schedule, "HALVES", halves)
        blocks.clear()
        got, text = run(f, inputs)
        results.append(got)
        counts.append(sum(blocks))
        assert text.count("zero_part, use_acc") == (ends if halves else 0)
    seen = mask(torch.arange(640)[:, None], torch.arange(640)[None, :])
    rows = seen.any(1)
    assert error(results[1][:, :, rows], f(*(x.double() for x in inputs))[:, :, rows]) < 6e-3
    assert error(results[1][:, :, rows], results[0][:, :, rows]) < 1e-3
    alive = 2 * int(seen.reshape(10, 64, 10, 64).any(3).any(1).sum())
    assert alive <= counts[1] and (counts[1] < counts[0]) == (ends > 0)
    assert counts[1] == alive or name.startswith("odd") or name in ("ahead", "all but the near")


def test_a_mask_asks_only_what_the_bounds_of_its_loop_leave_open() -> None:
    """Steps at the end of a window know that they are before the diagonal, and those on the diagonal that they are in the window."""
    def group(length: int) -> str:
        def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            s = scores(q, k)
            i, j = positions(s)
            return s.masked_fill((j > i) | (i - j >= length), -math.inf).softmax(-1) @ v

        return run(window, heads(1, 2, 640, 64))[1].partition("_group(")[2]

    both = re.compile(r"= v\d+ [&|] v\d+")
    assert not both.search(group(256)) and both.search(group(100)), "a window of less than a step needs both in one tile"


@pytest.mark.parametrize("form", ["plain", "by name"])
def test_masks_of_documents_keep_the_form_and_skip(form: str) -> None:
    """Nothing set aside for small inputs: what a GPU of 64 multiprocessors runs for four heads of 2048."""
    target = dataclasses.replace(SM90, multiprocessors=64)
    q, k, v = heads(1, 4, 2048, 128)
    doc = torch.arange(2048).div(300, rounding_mode="floor").expand(1, 2048).contiguous()
    f = documents if form == "plain" else documents_by_name
    module, _ = module_of(f, (q, k, v, doc), target=target, computes=False)
    kernel = stream_of(module)
    source = print_warp_groups(kernel, target, [True] * len(kernel.body.args))
    assert not isinstance(source, str), source
    assert source.programs == 64 and source.text.count("tma_load(k_map") == 3, "a loop without masks between two with"
    loader = source.text[source.text.index("_loader("):source.text.index("_group(")]
    assert loader.count("gl.load(") == 8, "the steps that the data leave"


def test_positions_become_numbers_by_rows_and_columns() -> None:
    """A conversion of each element of a tile takes as long as an exponential; those of its sides do as well, exactly."""
    module, _ = module_of(alibi, FORMS["alibi"][1]())
    source = print_warp_groups(stream_of(module), FEW, [True] * 5)
    assert not isinstance(source, str)
    assert source.text.count(".to(tl.float32) - ") == 2 == source.text.count(".to(tl.float32)") - 2, "a loop with the mask, and one without"


def test_a_row_is_divided_once() -> None:
    """Where the division by the sum is written out after the product, as flex_attention's is."""
    def divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = scores(q, k).float()
        weights = torch.exp(s - s.amax(-1, keepdim=True))
        out = (weights.to(v.dtype) @ v).float()
        return torch.where(s.amax(-1, keepdim=True) == -math.inf, 0.0, out / weights.sum(-1, keepdim=True)).to(v.dtype)

    inputs = heads(1, 2, 256, 64)
    got, text = run(divided, inputs)
    assert error(got, full(*(x.double() for x in inputs))) < 6e-3
    assert text.count("div_rn(") == 2 and text.count("= gl.cast(1.0, tl.float32)") == 2, "the reciprocal of a row, where results are stored"


def test_a_program_without_a_step_gets_one_that_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that see nothing: their result is NaN, as in eager, and nothing waits for a tile that does not come."""
    monkeypatch.setattr(block_ranges, "LEAST_WORK", 0)
    q, k, v = heads(1, 2, 256, 64)
    blind = torch.arange(256).ge(128).long()[None].expand(1, 256).contiguous()
    lone = lambda q, k, v, d: (scores(q, k).masked_fill((d[:, None, :, None] == 1) | (d[:, None, None, :] == 7), -math.inf)).softmax(-1) @ v  # noqa: E731
    got, _ = run(lone, (q, k, v, blind))
    true = full(q.double(), k.double(), v.double())
    assert got[:, :, 128:].isnan().all() and error(got[:, :, :128], true[:, :, :128]) < 6e-3


def test_exponentials_are_one_instruction(tmp_path: Path) -> None:
    """Not the four that keep subnormal results."""
    module, _ = module_of(causal, heads(2, 2, 256, 64), until="host")
    text = compile_gpu(module, FEW, cache_dir=tmp_path).sources["stream"]
    assert "exp2_approx(" in text and "ex2.approx.ftz.f32" in text and "gl.exp2(" not in text
