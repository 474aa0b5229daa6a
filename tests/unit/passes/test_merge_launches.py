"""Independent small kernels as one launch: which are merged, and that the numbers stay."""

from __future__ import annotations

from typing import Any

import torch
from aicc.backends.triton.parts import LONGEST, equal_runs, picked
from aicc.backends.triton.printer import print_kernel
from aicc.ir import Operation
from aicc.ir.parser import parse_module
from aicc.ir.printer import print_op
from aicc.tests.gpu.cases import SM90, capture
from torch import Tensor


def lowered(f: Any, *inputs: Tensor) -> Operation:
    found: list[Operation] = []

    def keep(module: Operation, gm: torch.fx.GraphModule, args: list[Any]) -> Any:
        found.append(module)
        return gm.forward(*args)

    capture(f, inputs, keep, until="tile", target=SM90)
    (made,) = found
    return made


def launches(module: Operation) -> list[Operation]:
    return [op for op in module.walk() if op.name == "tile.launch"]


def parts(module: Operation) -> list[int]:
    """For each kernel that is launched, in order: how many it was merged from."""
    kernels = {op["sym_name"]: op for op in module.body if op.name == "tile.kernel"}
    return [max(1, sum(o.name == "tile.part" for o in kernels[op["kernel"].name].body)) for op in launches(module)]


def test_products_of_one_row_with_several_weights_are_one_launch() -> None:
    def f(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return x @ q, x @ k, x @ v

    module = lowered(f, *(torch.randn(*s) for s in ((1, 256), (256, 512), (256, 256), (256, 256))))
    assert parts(module) == [3]


def test_query_key_and_value_of_few_rows_are_not_split_as_each_would_be_alone() -> None:
    """Together they are programs enough; their readers would have to add parts up first."""
    def qkv(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return x @ q.T, x @ k.T, x @ v.T

    x, q, k, v = (torch.randn(s).bfloat16() for s in ((16, 2048), (2048, 2048), (1024, 2048), (1024, 2048)))
    assert parts(lowered(qkv, x, q, k, v)) == [3]
    assert len(launches(lowered(lambda x, k: x @ k.T, x, k))) == 2, "alone: parts, and what adds them"


def test_what_depends_on_another_waits_for_it() -> None:
    def f(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = x.softmax(-1)
        b = y.softmax(-1)
        return a, b, (a.sum(0) * b.sum(0)).cumsum(0)

    module = lowered(f, torch.randn(64, 300), torch.randn(64, 300))
    assert parts(module)[0] == 2 and all(n <= 2 for n in parts(module)) and len(launches(module)) >= 3


def test_groups_do_not_wait_for_each_other_in_a_circle() -> None:
    def f(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        p = a.softmax(-1)  # p -> q, r -> s: merging p with s and q with r would be a circle
        q = p.cumsum(-1)
        r = b.cumsum(-1)
        s = r.softmax(-1)
        return q, s

    module = lowered(f, torch.randn(8, 300), torch.randn(8, 300))
    order = {op: i for i, op in enumerate(module.walk())}
    for op in launches(module):
        assert all(order[v.defining_op] < order[op] for v in op.operands if v.defining_op is not None)


def test_two_caches_are_written_in_one_launch_unless_they_are_one() -> None:
    """Whose elements a result starts with, no other part reads."""
    def two(a: Tensor, b: Tensor, i: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return a.index_copy(1, i, x), b.index_copy(1, i, y)

    def one(a: Tensor, i: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return a.index_copy(1, i, x), a.index_copy(1, i, y)

    a, b, x, y, i = torch.randn(2, 4096, 64), torch.randn(2, 4096, 64), torch.randn(2, 3, 64), torch.randn(2, 3, 64), torch.tensor([7, 1, 4000])
    module = lowered(two, a, b, i, x, y)
    (kernel,) = (op for op in module.body if op.name == "tile.kernel" and op["updates"])
    assert max(parts(module)) == 2 and len(kernel["updates"]) == 2 and kernel["bytes"] < 100_000
    assert max(parts(lowered(one, a, i, x, y))) == 1


def test_large_kernels_stay_alone() -> None:
    module = lowered(lambda x, y: (x.softmax(-1), y.softmax(-1)), torch.randn(4096, 512), torch.randn(4096, 512))
    assert parts(module) == [1, 1]


def test_a_merged_kernel_prints_and_parses_and_branches_on_its_program() -> None:
    module = lowered(lambda x, y, z: (x.softmax(-1), y.log_softmax(-1), z.logsumexp(-1)), *torch.randn(3, 40, 300))
    text = print_op(module)
    assert print_op(parse_module(text)) == text
    merged = next(op for op in module.body if op.name == "tile.kernel" and any(o.name == "tile.part" for o in op.body))
    source = print_kernel(merged).text
    assert "if tl.program_id(0) < " in source and "elif tl.program_id(0) < " in source


def test_an_optimizers_step_is_one_launch_of_all_large_parameters_and_one_of_the_small() -> None:
    """Apart, for a kernel takes as many registers as its hungriest part."""
    def step(*given: Tensor) -> None:
        for p, g, m in zip(given[:4], given[4:8], given[8:], strict=True):
            m.mul_(0.9).add_(g, alpha=0.1)
            p.sub_(m / (m * m + 1).sqrt())

    shapes = ((1024, 2048), (300, 7), (1024, 2048), (5,))
    module = lowered(step, *(torch.randn(s) for _ in range(3) for s in shapes))
    assert parts(module) == [2, 2]
    wide = [{v.type.numel > 2100 for v in op.results} for op in launches(module)]  # type: ignore[attr-defined]
    assert wide == [{True}, {False}]


def test_large_elementwise_kernels_on_temporaries_stay_alone() -> None:
    def f(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        a, b = x.cumsum(0), y.cumsum(0)
        return a.tanh() * a.sum(), b.tanh() * b.sum()

    module = lowered(f, torch.randn(2048, 1024), torch.randn(2048, 1024))
    assert max(parts(module)) <= 2 and sum(n == 1 for n in parts(module)) >= 4


def test_equal_kernels_are_neighbours_and_printed_once() -> None:
    """Triton's time to compile goes with the text, some of its passes more than linearly."""
    shapes = [(40, 300), (3, 500), (40, 300)] * 7
    module = lowered(lambda *xs: tuple(x.softmax(-1) for x in xs), *(torch.randn(s) for s in shapes))
    assert parts(module) == [21]
    (merged,) = (op for op in module.body if op.name == "tile.kernel")
    runs = [len(run.parts) for run in equal_runs(merged)]
    assert runs == [14, 7]
    assert print_kernel(merged).text.count("tl.program_id(0) < ") == len(runs)


def test_runs_end_where_a_kernel_picks_among_many_buffers() -> None:
    module = lowered(lambda *xs: tuple(x.softmax(-1) for x in xs), *(torch.randn(40, 300) for _ in range(LONGEST + 3)))
    (merged,) = (op for op in module.body if op.name == "tile.kernel")
    assert [len(run.parts) for run in equal_runs(merged)] == [LONGEST, 3]


def test_buffers_in_known_places_and_others_are_no_run() -> None:
    module = lowered(lambda *xs: tuple(x.softmax(-1) for x in xs), *(torch.randn(40, 300) for _ in range(4)))
    (merged,) = (op for op in module.body if op.name == "tile.kernel")
    aligned = [True] * len(merged.body.args)
    aligned[1] = False
    assert [len(run.parts) for run in equal_runs(merged, aligned)] == [1, 1, 2]


def test_a_buffer_is_picked_by_halves() -> None:
    assert picked(["a", "b", "c"], "n") == "tl.where(n < 1, a, tl.where(n < 2, b, c))"
    assert picked(["a", "a"], "n") == "a"
