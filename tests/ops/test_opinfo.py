"""A representative list of OpInfo's operators, compiled and compared with eager. `benchmarks/opinfo_sweep.py` runs all of them."""

from __future__ import annotations

import pytest
import torch

from .harness import DTYPES, check, every_op, find, label
from .known import KINDS, KNOWN

FLOAT = """abs exp log1p tanh erf sigmoid sqrt round.decimals_0 nn.functional.gelu nn.functional.silu nn.functional.softplus
add sub mul div.floor_rounding pow remainder maximum where clamp lerp addcmul copysign atan2 xlogy nan_to_num
sum mean amax std argmax any cumsum logsumexp norm var_mean
softmax log_softmax nn.functional.layer_norm nn.functional.group_norm nn.functional.batch_norm nn.functional.rms_norm
mm bmm matmul addmm einsum nn.functional.linear nn.functional.conv2d nn.functional.conv_transpose2d
nn.functional.scaled_dot_product_attention nn.functional.max_pool2d nn.functional.avg_pool2d nn.functional.adaptive_avg_pool2d
nn.functional.interpolate.bilinear nn.functional.cross_entropy nn.functional.embedding
gather scatter scatter_add index_select index_put index_add masked_fill cat stack split permute expand roll flip tril
cdist nn.functional.pdist nn.functional.embedding_bag nn.functional.adaptive_avg_pool3d nn.functional.adaptive_max_pool2d put
index_reduce.mean round.decimals_3 masked_scatter as_strided_scatter take item fft.ifft diagonal nn.functional.pad.constant nn.functional.pad.reflect topk sort unfold nonzero linalg.svd""".split()
OTHERS = {
    "int64": "item fmax take nn.functional.avg_pool1d add floor_divide remainder bitwise_and bitwise_left_shift sum argmax cumsum scatter_add sort clamp".split(),
    "bool": "logical_and any all sum where cat eq".split(),
    "bfloat16": "add exp softmax mm nn.functional.layer_norm sum nn.functional.gelu cumsum".split(),
    "float64": "exp tanh matmul var sum".split(),
    "complex64": "prod mul matmul nn.functional.pad.constant permute scatter_add".split(),
}
GRADIENTS = """exp div pow softmax nn.functional.layer_norm nn.functional.batch_norm matmul nn.functional.conv2d nn.functional.max_pool2d
gather index_select cat nn.functional.cross_entropy nn.functional.embedding cumsum logsumexp norm amax where
nn.functional.scaled_dot_product_attention nn.functional.multi_head_attention_forward linalg.eig linalg.inv logcumsumexp
nn.functional.embedding_bag nn.functional.adaptive_avg_pool2d""".split()
REPEATED = """log1p tanh erf sigmoid sqrt nn.functional.silu sub mul maximum lerp addcmul copysign atan2 mean any logsumexp log_softmax nn.functional.group_norm mm bmm addmm
nn.functional.linear nn.functional.avg_pool2d stack split roll tril scatter index_select masked_fill flip nn.functional.adaptive_avg_pool3d index_reduce.mean round.decimals_3
masked_scatter permute norm""".split()
"""Of a kind that others of `FLOAT` have, and row for row in the tests of the frontend, of decompositions and of arithmetic."""
assert set(REPEATED) < set(FLOAT)
CASES = [pytest.param(op, "float32", marks=[pytest.mark.slow] * (op in REPEATED)) for op in FLOAT] + [(op, dtype) for dtype, ops in OTHERS.items() for op in ops]


def _resolved(name: str) -> str:
    """The first label of an operator that has variants only ("round.decimals_0") or that is written without one."""
    labels = [label(op) for op in every_op()]
    return name if name in labels else next(x for x in labels if x.startswith(f"{name}."))


@pytest.mark.parametrize(("op", "dtype"), CASES)
def test_forward(op: str, dtype: str) -> None:
    _agrees(op, dtype, samples=1, backward=False)


@pytest.mark.parametrize("op", GRADIENTS)
def test_backward(op: str) -> None:
    _agrees(op, "float32", samples=1, backward=True)


@pytest.mark.parametrize(("op", "dtype", "backward"), [
    ("baddbmm", "bfloat16", False), ("addmm", "float16", False), ("addmv", "bfloat16", False), ("fft.rfft", "float32", True),
    ("fft.ihfft", "float64", True), ("unique", "float32", False), ("narrow", "float32", True)])
def test_several_samples(op: str, dtype: str, backward: bool) -> None:
    """What the later samples of the database found."""
    _agrees(op, dtype, samples=4, backward=backward)


def _agrees(op: str, dtype: str, *, samples: int, backward: bool) -> None:
    outcome = check(find(_resolved(op)), DTYPES[dtype], samples=samples, backward=backward)
    assert outcome.status == "pass", f"{outcome.status}: {outcome.detail}"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", range(20))
def test_every_operator(dtype: str, part: int) -> None:
    """All of OpInfo, one sample each: `benchmarks/opinfo_sweep.py` without a process of their own for operators that may crash."""
    failures = {}
    for op in every_op()[part::20]:
        outcome = check(op, DTYPES[dtype], samples=1)
        if outcome.status not in ("pass", "nograph", "known", "eager"):
            failures[label(op)] = f"{outcome.status}: {outcome.detail}"
    assert not failures, "\n".join(f"{op}: {what}" for op, what in failures.items())


def test_a_wrong_result_is_noticed() -> None:
    """The harness itself: an operator that gives other results under the compiler fails."""
    op = find("exp")

    class Skewed:
        def __getattr__(self, name: str) -> object:
            return getattr(op, name)

        def get_op(self) -> object:
            return lambda x: torch.exp(x) + (1e-3 if torch.compiler.is_compiling() else 0)

    outcome = check(Skewed(), torch.float32)  # type: ignore[arg-type]
    assert outcome.status in ("wrong", "torch") and "not close" in outcome.detail


def test_rows_of_known_differences_name_operators() -> None:
    labels = {label(op) for op in every_op()}
    assert {op for op, _ in KNOWN} <= labels
    assert all(kind in KINDS and row.reason and set(row.dtypes) <= DTYPES.keys() for (_, kind), row in KNOWN.items())
