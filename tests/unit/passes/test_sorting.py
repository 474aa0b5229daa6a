"""Sorting and top-k: the levels agree with each other and with eager; the order of equal elements and of NaN; every type, axis and kind of size."""

from __future__ import annotations

import math

import pytest
import torch
from aicc.compiler.driver import Compilation, watching
from support.stages import AVX2, GENERIC, capture, check_levels
from torch import Tensor

INFINITY = math.inf


def compiled(function, *args: Tensor, **options) -> tuple[object, list[str]]:  # type: ignore[no-untyped-def]
    """(result, operators that are ATen's)."""
    found: list[Compilation] = []
    torch._dynamo.reset()
    f = torch.compile(function, backend="aicc", dynamic=options.pop("dynamic", False), options={"strict": True, "cache": False})
    with watching(compiled=found.append):
        result = f(*args)
    return result, [str(e) for c in found for e in c.stats["externs"]]


@pytest.mark.parametrize("target", [GENERIC, AVX2], ids=["generic", "avx2"])
def test_levels(target) -> None:  # type: ignore[no-untyped-def]
    check_levels(capture(lambda x: torch.topk(x.exp(), 4)[0], (torch.randn(3, 70),)), target)
    check_levels(capture(lambda x: torch.sort(x, 0), (torch.randn(3, 70),)), target)
    check_levels(capture(lambda x: x.kthvalue(9, 0), (torch.randn(40, 3),)), target)
    check_levels(capture(lambda x: x.exp().median(1, keepdim=True), (torch.randn(3, 70).sort().values,)), target)
    check_levels(capture(lambda x: torch.topk(x, 3, largest=False), (torch.randperm(140).reshape(2, 70),)), target)


@pytest.mark.product
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.uint8])
@pytest.mark.parametrize("largest", [True, False])
def test_stable_order(dtype: torch.dtype, largest: bool) -> None:
    """Values bit for bit as eager's; of equal ones the first; NaN is the largest, infinities are ordinary, even where all of a row are the worst."""
    for n, k in ((70, 1), (64, 2), (300, 16), (1103, 64)):
        x = (torch.randn(6, n) * 50).to(dtype)
        if dtype.is_floating_point:
            x[0, 3], x[1], x[2], x[3, 1:n - 3] = math.nan, math.nan, -INFINITY, math.nan
            x[4, ::2] = INFINITY
        (values, places), externs = compiled(lambda x, k=k: torch.topk(x, k, -1, largest), x)
        best = torch.sort(x, dim=-1, descending=largest, stable=True)
        torch.testing.assert_close(values, torch.topk(x, k, -1, largest).values, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(places, best.indices[:, :k])
        assert not externs


@pytest.mark.parametrize("order", ["ascending", "descending", "constant"])
def test_rows_in_order(order: str) -> None:
    x = {"ascending": torch.arange(4000.0), "descending": -torch.arange(4000.0), "constant": torch.zeros(4000)}[order].expand(3, 4000)
    (values, places), _ = compiled(lambda x: torch.topk(x, 10), x)
    assert torch.equal(values, torch.sort(x, dim=-1, descending=True, stable=True).values[:, :10])
    assert torch.equal(places, torch.sort(x, dim=-1, descending=True, stable=True).indices[:, :10])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_networks_of_every_size(dtype: torch.dtype) -> None:
    """One program for all sizes: blocks that end anywhere, merged or cut to the first few; rows with many equal elements, in order, and almost so."""
    sort = torch.compile(lambda x: torch.sort(x, stable=True), backend="aicc", dynamic=True, options={"strict": True})
    top = torch.compile(lambda x, k: torch.topk(x, k), backend="aicc", dynamic=True, options={"strict": True})
    for n in (2, 5, 8, 9, 13, 31, 32, 33, 63, 65, 96, 97, 127, 129, 160, 255, 257, 321, 480, 513, 777, 1024, 1025):
        x = torch.randint(-n, n, (8, n)).to(dtype)
        x[1], x[2], x[3] = x[1].sort().values, x[2].sort(descending=True).values, torch.arange(n, 0, -1)
        x[4] = torch.arange(n)
        x[4, n // 2] = -1
        x[5], x[6] = -x[3], 1
        x[7, n // 3] = math.nan
        true = torch.sort(x, dim=-1, stable=True)
        assert all(torch.equal(a.nan_to_num(1e9), b.nan_to_num(1e9)) for a, b in zip(sort(x), true, strict=True)), n
        true = torch.sort(x, dim=-1, descending=True, stable=True)
        for k in sorted({2, n // 7, n // 3, n // 2, n - 1, n} - {0, 1}):
            values, places = top(x, k)
            assert torch.equal(places, true.indices[:, :k]) and torch.equal(values.nan_to_num(1e9), true.values[:, :k].nan_to_num(1e9)), (n, k)


def test_in_order_needs_equal_ones_to_keep_their_places() -> None:
    """The other way round is not enough where two are equal: the later one would come first."""
    x = torch.arange(40.0, 0, -1).repeat(2, 1)
    x[1, 20] = x[1, 19]
    (values, places), _ = compiled(lambda x: torch.sort(x), x)
    assert torch.equal(places, torch.sort(x, stable=True).indices) and torch.equal(values, torch.sort(x).values)
    assert places[1].tolist().index(19) < places[1].tolist().index(20)


def test_one_program_for_all_sizes_and_views() -> None:
    f = torch.compile(lambda x: torch.topk(x, 4), backend="aicc", dynamic=True, options={"strict": True})
    for shape in ((3, 50), (7, 333), (1, 16), (40, 17)):
        x = torch.randn(*shape)
        assert all(torch.equal(a, b) for a, b in zip(f(x), torch.topk(x, 4), strict=True))
    x = torch.randn(80, 60)
    (values, places), externs = compiled(lambda x: torch.topk(x.t(), 3), x)
    assert torch.equal(values, torch.topk(x.t(), 3).values) and torch.equal(places, torch.topk(x.t(), 3).indices) and not externs


def test_gradient() -> None:
    x = torch.randn(5, 200, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    torch.topk(x, 6).values.square().sum().backward()
    compiled(lambda x: torch.topk(x, 6).values.square().sum(), y)[0].backward()
    torch.testing.assert_close(y.grad, x.grad)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", [pytest.param(t, marks=[pytest.mark.slow] * (t in (torch.float64, torch.float16, torch.int32, torch.int16, torch.int8))) for t in DTYPES], ids=str)
def test_sort_of_every_type(dtype: torch.dtype) -> None:
    """Short rows (counted) and long ones (by digits), both ways, in the order of torch's stable sort: NaN last, zeros of both signs equal. The values
    keep their bits."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for n in (1, 7, 97, 1500):
        x = (torch.randn(6, n) * 50).to(dtype)
        if dtype.is_floating_point and n > 5:
            x[0, 3], x[1], x[2], x[3, ::2], x[4, :3], x[4, 3:5] = math.nan, math.nan, -INFINITY, INFINITY, -0.0, 0.0
            x[5, :2] = -math.nan
        for descending in (False, True):
            got, externs = compiled(lambda x, down=descending: torch.sort(x, dim=-1, descending=down), x)
            true = torch.sort(x, dim=-1, descending=descending, stable=True)
            assert torch.equal(got.indices, true.indices) and not externs
            assert torch.equal(got.values.view(bits), x.view(bits).gather(1, true.indices))


@pytest.mark.product
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", [
    lambda x: torch.sort(x, 0), lambda x: torch.sort(x.t(), stable=True, descending=True), lambda x: torch.argsort(x, 0), lambda x: x.msort(),
    lambda x: torch.argsort(x[:, 5:77]), lambda x: torch.topk(x, 100), lambda x: torch.topk(x, 20), lambda x: torch.topk(x, 3, dim=0),
    lambda x: torch.topk(x, 0), lambda x: torch.kthvalue(x, 7), lambda x: torch.kthvalue(x, 2, 0, keepdim=True), lambda x: x.reshape(4, 10, 300).sort(1)])
def test_axes_views_and_sizes(function, dynamic: bool) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(40, 300)
    got, externs = compiled(function, x, dynamic=dynamic)
    torch.testing.assert_close(tuple(got) if isinstance(got, tuple) else got, tuple(function(x)) if isinstance(got, tuple) else function(x), rtol=0, atol=0)
    assert not externs


def test_median() -> None:
    """The lower of two; the first NaN of a row that has any."""
    x = torch.randperm(600).reshape(6, 100).float()
    x[1, 40], x[1, 70], x[2] = math.nan, math.nan, math.nan
    for f in (lambda x: torch.median(x, 1), lambda x: torch.median(x, 0, keepdim=True), lambda x: (torch.median(x), torch.median(x[3:]))):
        got, externs = compiled(f, x)
        torch.testing.assert_close(tuple(got), tuple(f(x)), rtol=0, atol=0, equal_nan=True)
        assert not externs


def test_gradient_of_a_sort() -> None:
    x = torch.randn(5, 200, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    weights = torch.arange(200.0)
    (x.sort(-1).values * weights).sum().backward()
    compiled(lambda x: (x.sort(-1).values * weights).sum(), y)[0].backward()
    torch.testing.assert_close(y.grad, x.grad)


def test_a_misleading_sample() -> None:
    """The sample holds nothing but the best elements, so that its bound is too tight: the row is read again."""
    x = torch.zeros(4, 6400)
    x[:, ::100] = 1 + torch.arange(64.0)
    for k in (100, 20):
        (values, places), _ = compiled(lambda x, k=k: torch.topk(x, k), x)
        true = torch.sort(x, dim=-1, descending=True, stable=True)
        assert torch.equal(values, true.values[:, :k]) and torch.equal(places, true.indices[:, :k])


def test_threads_share_rows() -> None:
    x = torch.randn(64, 3000)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        (values, places), _ = compiled(lambda x: torch.sort(x), x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(values, torch.sort(x).values) and torch.equal(places, torch.sort(x, stable=True).indices)


def test_keys_of_64_bits_in_one_word() -> None:
    """Rows whose keys fill 64 bits, lie close together, or in clusters far apart, of which the lowest bits do not fit beside the place."""
    sort = torch.compile(lambda x: torch.sort(x, stable=True), backend="aicc", dynamic=True, options={"strict": True})
    generator = torch.Generator().manual_seed(3)

    def some(low: int, high: int, n: int) -> Tensor:
        return torch.randint(low, high, (n,), generator=generator)

    for n in (17, 33, 97, 200, 513, 1023, 1024, 1025):
        clusters = some(0, 3, n) * (1 << 61) + some(0, 900, n)
        few = some(-(1 << 62), 1 << 62, n)
        few[n // 2:n // 2 + 3] = few[0] + torch.tensor([2, -1, 1])
        x = torch.stack([some(-(1 << 63), (1 << 63) - 1, n), some(0, 5, n), clusters, few, torch.tensor([(1 << 63) - 1, -(1 << 63)]).repeat(n)[:n]])
        y = torch.stack([torch.randn(n, dtype=torch.float64, generator=generator), (some(0, 2, n) * 2 - 1) * (1 + some(0, 99, n).double() * 2.0 ** -52),
                         torch.where(some(0, 2, n) > 0, 0.0, -0.0).double(), torch.where(some(0, 2, n) > 0, math.nan, -INFINITY).double()])
        for rows in (x, y):
            values, places = sort(rows)
            expected = torch.sort(rows, stable=True).indices
            assert torch.equal(places, expected), n
            assert torch.equal(values.view(torch.int64), rows.gather(1, expected).view(torch.int64))


def _rows(n: int, dtype: torch.dtype) -> Tensor:
    """Random; in order, the other way round, equal; two numbers; almost in order by two elements, by jitter, either way; a third equal; special ones."""
    x = torch.randn(14, n) * 50
    x[1], x[2], x[3], x[4] = x[1].sort().values, x[2].sort(descending=True).values, 3, (x[4] > 0).float()
    x[5] = x[5].sort().values
    x[5, [0, n // 2]] = x[5, [n // 2, 0]]
    x[6] = torch.arange(n) + torch.rand(n) * 5
    x[7], x[8] = -x[6], x[1]
    x[8, :max(1, n // 3)] = 7
    if dtype.is_floating_point:
        x[9, n // 3], x[10], x[11], x[12, n // 2], x[12, 0] = math.nan, math.nan, INFINITY, INFINITY, -INFINITY
        x[13, ::3], x[13, 1::3] = 0.0, -0.0
    return (x.abs() if dtype == torch.uint8 else x).to(dtype)


@pytest.mark.product
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("n", [1, 2, 15, 16, 65, 257, 1003, 4099])
def test_one_of_a_row(dtype: torch.dtype, n: int) -> None:
    """The element of a rank and its place are those of a stable sort; a median is a row's first NaN if it has one."""
    x = _rows(n, dtype)
    ordered = x.sort(dim=1, stable=True).indices
    for k in sorted({1, n // 4 + 1, n}):
        (values, places), externs = compiled(lambda x, k=k: x.kthvalue(k, 1), x)
        assert torch.equal(places, ordered[:, k - 1]) and not externs
        torch.testing.assert_close(values, x.gather(1, places.unsqueeze(1)).squeeze(1), rtol=0, atol=0, equal_nan=True)
    (values, places), externs = compiled(lambda x: x.median(1), x)
    want = ordered[:, (n - 1) // 2]
    if dtype.is_floating_point:
        want = torch.where(x.isnan().any(1), x.isnan().to(torch.uint8).argmax(1), want)
    assert torch.equal(places, want) and not externs
    torch.testing.assert_close(values, x.median(1).values, rtol=0, atol=0, equal_nan=True)


def test_one_of_a_row_of_any_size() -> None:
    """One program for all sizes, along another axis; a rank that the row does not have is an error as in eager."""
    f = torch.compile(lambda x: x.kthvalue(5, 0), backend="aicc", dynamic=True, options={"strict": True})
    for n in (5, 17, 300, 5000):
        x = torch.randn(n, 4)
        assert torch.equal(f(x).indices, x.sort(dim=0, stable=True).indices[4])
    with pytest.raises(RuntimeError):
        f(torch.randn(4, 4))
