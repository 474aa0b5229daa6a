"""Structured ops: generics, scans and scatters against torch."""

import time

import pytest
import torch
import torch.nn.functional as F
from aicc.ir import DTYPES, Builder, IRError, TensorType, make_func, make_module, sym
from aicc.ir.interpreter import interpret, tensor
from aicc.ir.parser import parse_module

torch.manual_seed(0)
D0, D1, D2, D3, D4, D5, D6 = (sym(f"d{i}") for i in range(7))
TYPES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32", torch.bool: "i1",
         torch.uint8: "u8", torch.uint32: "u32", torch.uint64: "u64"}


def typed(x: torch.Tensor) -> TensorType:
    return TensorType(tuple(x.shape), DTYPES[TYPES[x.dtype]])


def generic(inputs, maps, dims, body, **options):
    """The results of one `tensor.generic` on torch tensors."""
    module, top = make_module("tensor")
    _, block = make_func(top, "f", [typed(x) for x in inputs])
    b = Builder.at_end(block)
    b.create("return", b.generic(block.args, maps, dims, body, **options).results)
    return interpret(module, inputs)


def structured(text: str, inputs, **options):
    """The result %r of `text`, whose operands are %a, %b, ..."""
    args = ", ".join(f"%{chr(97 + i)}: {typed(x)}" for i, x in enumerate(inputs))
    return interpret(parse_module(f"module {{ func @f {{ ^({args}):\n {text}\n return(%r)\n }} }}"), inputs, **options)[0]


def product(b, x, y):
    return b.arith("mul", x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.int32])
def test_matmul(dtype):
    a, c = (torch.randn(5, 7) * 4).to(dtype), (torch.randn(7, 3) * 4).to(dtype)
    (got,) = generic([a, c], [(D0, D2), (D2, D1)], (5, 3, 7), product, reductions=1, combine=["sum"])
    torch.testing.assert_close(got, a @ c, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5 if dtype == torch.float32 else 1)


def test_matmul_with_prologue_and_unused_dimensions():
    a, c = torch.randn(4, 6), torch.randn(6)
    def body(b, x, y):
        return b.arith("mul", b.arith("exp", x), b.arith("add", y, 1.0))
    # d1 is parallel and unused: repeated; d3 is reduced and unused: counted 5 times
    (got,) = generic([a, c], [(D0, D2), (D2,)], (4, 3, 6, 5), body, reductions=2, combine=["sum"])
    torch.testing.assert_close(got, (5 * (a.exp() @ (c + 1)))[:, None].expand(4, 3))


def test_strided_padded_grouped_convolution():
    x, w = torch.randn(2, 4, 9, 8), torch.randn(6, 2, 3, 3)
    want = F.conv2d(x, w, None, 2, 1, 1, 2)
    b, o, h, v = want.shape  # space: batch, out channel, row, column | in channel, kernel row, kernel column
    maps = [(D0, D1 // 3 * 2 + D4, D2 * 2 + D5 - 1, D3 * 2 + D6 - 1), (D1, D4, D5, D6)]
    (got,) = generic([x, w], maps, (b, o, h, v, 2, 3, 3), product, reductions=3, combine=["sum"], fills=[0.0, None])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_max_pool_with_infinite_fill():
    x = torch.randn(2, 7)
    maps = [(D0, D1 * 2 + D2 - 1)]
    got, where = generic([x, x], maps * 2, (2, 4, 3), lambda b, v, w: (v, w), reductions=1, combine=["max", "argmax"],
                         fills=[-torch.inf, -torch.inf])
    want, index = F.max_pool1d(x[None], 3, 2, 1, return_indices=True)
    torch.testing.assert_close(got, want[0])
    torch.testing.assert_close(where + 2 * torch.arange(4) - 1, index[0])


def test_softmax_in_pieces():
    x = torch.randn(6, 9)
    (m,) = generic([x], [(D0, D1)], (6, 9), lambda b, v: v, reductions=1, combine=["max"])
    (s,) = generic([x, m], [(D0, D1), (D0,)], (6, 9), lambda b, v, w: b.arith("exp", b.arith("sub", v, w)), reductions=1, combine=["sum"])
    (got,) = generic([x, m, s], [(D0, D1), (D0,), (D0,)], (6, 9),
                     lambda b, v, w, z: b.arith("div", b.arith("exp", b.arith("sub", v, w)), z))
    torch.testing.assert_close(got, x.softmax(1))


@pytest.mark.parametrize("kind,function", [
    ("sum", lambda x: x.sum((1, 2))), ("prod", lambda x: x.flatten(1).prod(1)), ("max", lambda x: x.amax((1, 2))),
    ("min", lambda x: x.amin((1, 2))), ("argmax", lambda x: x.flatten(1).argmax(1)), ("argmin", lambda x: x.flatten(1).argmin(1))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.bfloat16, torch.uint32])
def test_reductions(kind, function, dtype):
    x = torch.tensor([[1, 3, 3], [2, 1, 3]]).repeat(2, 1, 1).to(dtype)
    (got,) = generic([x], [(D0, D1, D2)], (2, 2, 3), lambda b, v: v, reductions=2, combine=[kind])
    want = function(x.to(torch.int64) if dtype == torch.uint32 else x)
    assert torch.equal(got, want if kind.startswith("arg") else want.to(dtype))


def test_logical_reductions_and_extremes_of_bools():
    x = torch.tensor([[True, False], [False, False], [True, True]])
    got = generic([x] * 5, [(D0, D1)] * 5, (3, 2), lambda b, *v: v, reductions=1, combine=["any", "all", "max", "min", "argmax"])
    assert [g.tolist() for g in got] == [[True, False, True], [False, False, True], [True, False, True], [False, False, True], [0, 0, 0]]


def test_nan_beats_all_and_the_first_wins():
    x = torch.tensor([[1.0, torch.nan, 9.0, torch.nan], [9.0, 1.0, 9.0, 1.0]])
    got = generic([x] * 4, [(D0, D1)] * 4, (2, 4), lambda b, *v: v, reductions=1, combine=["argmax", "argmin", "max", "min"])
    assert got[0].tolist() == [1, 0] and got[1].tolist() == [1, 1]
    assert got[2].isnan().tolist() == got[3].isnan().tolist() == [True, False]


def test_empty_reductions_give_the_identity():
    x = torch.zeros(2, 0)
    got = generic([x] * 4, [(D0, D1)] * 4, (2, 0), lambda b, *v: v, reductions=1, combine=["sum", "prod", "max", "min"])
    assert [g.tolist() for g in got] == [[0.0] * 2, [1.0] * 2, [-torch.inf] * 2, [torch.inf] * 2]


def test_index_and_size_in_the_body():
    def causal(b, v):
        row, column = (b.op("tensor.index", type=b.constant(0, DTYPES["i64"]).type, dim=i) for i in (0, 1))
        return b.arith("select", b.arith("le", column, row), v, 0.0)
    x = torch.randn(4, 4)
    (got,) = generic([x], [(D0, D1)], (4, 4), causal)
    assert torch.equal(got, x.tril())


GATHER = """%r = tensor.generic(%a, %b) {dims = [2, 3, 4], maps = [none, [d0, d1]]} : tensor<2x3x4xf32> {
      ^(%w: tensor<10x4xf32>, %i: i64):
        %j = tensor.index() {dim = 2} : i64
        %v = tensor.extract(%w, %i, %j) : f32
        tensor.yield(%v)
    }"""


def test_gather():
    w, i = torch.randn(10, 4), torch.randint(0, 10, (2, 3))
    assert torch.equal(structured(GATHER, [w, i]), w[i])
    with pytest.raises(IndexError, match="index 10 is out of bounds for dimension 0 with size 10"):
        structured(GATHER, [w, i.fill_(10)])


def test_require():
    def checked(b, cond, v):
        return b.op("tensor.require", cond, v, type=v.type, message="a zero divisor")
    cond, x = torch.tensor([True, True]), torch.randn(2)
    (got,) = generic([cond, x], [(D0,), (D0,)], (2,), checked)
    assert torch.equal(got, x)
    with pytest.raises(IndexError, match="a zero divisor"):
        generic([torch.tensor([True, False]), x], [(D0,), (D0,)], (2,), checked)


def test_reads_out_of_bounds_without_a_fill_are_errors():
    x = torch.randn(4)
    with pytest.raises(IRError, match=r"map 0 \[d0 \+ 1\] reads outside"):
        generic([x], [(D0 + 1,)], (4,), lambda b, v: v)


@pytest.mark.parametrize("index,dims,view", [
    ((D1, D0), (5, 4), lambda x: x.t()), ((D0, 2), (4,), lambda x: x[:, 2]), ((D0, D2), (4, 3, 5), lambda x: x[:, None].expand(4, 3, 5)),
    ((3 - D0, D1 * 2), (4, 2), lambda x: x.flip(0)[:, :4:2]), ((D0 // 5, D0 % 5), (20,), lambda x: x.flatten()),
    ((D0, D0), (4,), lambda x: x.diagonal())])
def test_views(index, dims, view):
    x = torch.randn(4, 5)
    assert torch.equal(generic([x], [index], dims, lambda b, v: v)[0], view(x))


def test_symbolic_sizes():
    module = parse_module("""module { func @f { ^(%x: tensor<s0xs1xf32>):
        %r = tensor.generic(%x) {dims = [s0*s1], maps = [[d0 // s1, d0 % s1]]} : tensor<(s0*s1)xf32> {
          ^(%v: f32):
            %n = tensor.sym() {expr = s1} : i64
            %c = arith.cast(%n) : f32
            %y = arith.mul(%v, %c) : f32
            tensor.yield(%y)
        }
        return(%r)
      } }""")
    x = torch.randn(3, 5)
    torch.testing.assert_close(interpret(module, [x])[0], (x * 5).flatten())


def test_boxes_cover_large_spaces(monkeypatch):
    x, y = torch.randn(7, 6, 5), torch.randn(5, 3)
    monkeypatch.setattr(tensor, "LIMIT", 8)
    (got,) = generic([x], [(D0, D1, D2)], (7, 6, 5), lambda b, v: b.arith("exp", v))
    assert torch.equal(got, x.exp())
    (got,) = generic([x], [(D0, D1, D2)], (7, 6, 5), lambda b, v: v, reductions=1, combine=["argmax"])
    assert torch.equal(got, x.argmax(2))
    (got,) = generic([x, y], [(D0, D1, D3), (D3, D2)], (7, 6, 3, 5), product, reductions=1, combine=["sum"])
    torch.testing.assert_close(got, x @ y)
    (got,) = generic([x], [(D1, D0, D2)], (6, 7, 5), lambda b, v: b.op("tensor.index", type=b.constant(0, DTYPES["i64"]).type, dim=1))
    assert torch.equal(got, torch.arange(7)[None, :, None].expand(6, 7, 5))
    text = 'tensor.scan(%a) {dims = [7, 6, 5], maps = [[d0, d1, d2]], kind = "sum"} : tensor<7x6x5xf32>'
    got = structured(f"%r = {text} {{ ^(%v: f32): tensor.yield(%v) }}", [x])
    torch.testing.assert_close(got, x.cumsum(2))


@pytest.mark.parametrize("kind,function", [("sum", torch.cumsum), ("prod", torch.cumprod), ("max", lambda x, d: x.cummax(d).values),
                                           ("min", lambda x, d: x.cummin(d).values), ("logsumexp", torch.logcumsumexp)])
def test_scan(kind, function):
    x = torch.randn(4, 6)
    got = structured(f"""%r = tensor.scan(%a) {{dims = [6, 4], maps = [[d1, d0]], kind = "{kind}"}} : tensor<6x4xf32> {{
        ^(%v: f32):
          %n = arith.neg(%v) : f32
          tensor.yield(%n)
      }}""", [x])
    torch.testing.assert_close(got, function(-x.t(), 1))


def scatter(kind: str, init, index, values):
    return structured(f"""%r = tensor.scatter(%a, %b, %c) {{dims = [{len(index)}], maps = [[d0], [d0]], combine = "{kind}"}} : {typed(init)} {{
        ^(%i: i64, %v: {typed(init).dtype}):
          tensor.yield(%v, %i)
      }}""", [init, index, values])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.uint64])
def test_scatter(dtype):
    index = torch.tensor([2, 0, 2, 2, 4])
    init, values = torch.tensor([5, 4, 3, 2, 1]).to(dtype), torch.tensor([7, 2, 9, 1, 3]).to(dtype)
    want = {"set": [2, 4, 1, 2, 3], "add": [7, 4, 20, 2, 4], "mul": [10, 4, 189, 2, 3], "max": [5, 4, 9, 2, 3], "min": [2, 4, 1, 2, 1]}
    for kind, expected in want.items():
        assert scatter(kind, init, index, values).tolist() == expected, kind


def test_scatter_of_bools_and_out_of_bounds():
    init = torch.tensor([False, True])
    assert scatter("add", init, torch.tensor([0, 1]), torch.tensor([True, False])).tolist() == [True, True]
    with pytest.raises(IndexError, match=r"tensor\.scatter"):
        scatter("set", init, torch.tensor([2]), torch.tensor([True]))


def test_the_last_set_wins_over_a_large_space():
    index = torch.randint(0, 50, (3000,))
    values = torch.randn(3000)
    want = torch.zeros(50)
    for i, v in zip(index.tolist(), values.tolist()):
        want[i] = v
    assert torch.equal(scatter("set", torch.zeros(50), index, values), want)


def test_fused_constant_and_assign():
    module = parse_module("""module { func @f { ^(%x: tensor<3xf32>):
        %c = tensor.constant() {value = dense<f32, [3], [1.0, 2.0, 3.0]>} : tensor<3xf32>
        %r = tensor.fused(%x, %c) : tensor<3xf32> {
          ^(%p: tensor<3xf32>, %q: tensor<3xf32>):
            %s = tensor.generic(%p, %q) {dims = [3], maps = [[d0], [d0]]} : tensor<3xf32> {
              ^(%u: f32, %v: f32):
                %w = arith.add(%u, %v) : f32
                tensor.yield(%w)
            }
            tensor.yield(%s)
        }
        tensor.assign(%x, %r)
        return(%r, %x)
      } }""")
    x = torch.ones(3)
    got = interpret(module, [x])
    assert [g.tolist() for g in got] == [[2.0, 3.0, 4.0], [1.0] * 3] and x.tolist() == [2.0, 3.0, 4.0]


def test_unsigned_random_bits_multiply_and_reduce():
    x = torch.tensor([2**63, 2**63 + 5, 1], dtype=torch.uint64)
    (got, top) = generic([x, x], [(D0,), (D0,)], (3,), lambda b, v, w: (v, w), reductions=1, combine=["sum", "max"])
    assert got.item() == 6 and top.item() == 2**63 + 5


def test_precision_reaches_bodies():
    x = torch.randn(64, 64).bfloat16()
    text = """%r = tensor.generic(%a, %b) {dims = [64, 64, 64], reductions = 1, maps = [[d0, d2], [d2, d1]], combine = ["sum"]}
        : tensor<64x64xbf16> { ^(%x: bf16, %y: bf16):
          %p = arith.mul(%x, %y) : bf16
          tensor.yield(%p)
        }"""
    got = structured(text, [x, x], precision=torch.float64)
    torch.testing.assert_close(got, x.double() @ x.double(), rtol=1e-12, atol=1e-12)


def test_a_layer_sized_contraction_is_fast():
    x, w = torch.randn(512, 768), torch.randn(768, 3072)
    start = time.perf_counter()
    (got,) = generic([x, w], [(D0, D2), (D2, D1)], (512, 3072, 768), product, reductions=1, combine=["sum"])
    assert time.perf_counter() - start < 5  # 1.2e9 products: point by point this takes minutes
    torch.testing.assert_close(got, x @ w, rtol=1e-4, atol=1e-3)
