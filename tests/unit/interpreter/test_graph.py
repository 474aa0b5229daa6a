"""Graph ops against torch on hand-written cases."""

import pytest
import torch
import torch.nn.functional as F
from aicc.ir import IRError
from aicc.ir.interpreter import interpret
from aicc.ir.parser import parse_module

torch.manual_seed(0)


def run(ops: str, inputs: dict[str, tuple[str, torch.Tensor]], returns: str = "%r", **options):
    """Interprets a function whose arguments are `inputs` (name -> (type, value)) and whose body is `ops`."""
    args = ", ".join(f"%{n}: {t}" for n, (t, _) in inputs.items())
    module = parse_module(f"module {{\n func @f {{\n ^({args}):\n {ops}\n return({returns})\n }}\n}}")
    return interpret(module, [x for _, x in inputs.values()], **options)


def close(got, *want, **tolerance):
    assert len(got) == len(want)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, **tolerance)


X = torch.randn(3, 4)
ON_X = {"x": ("tensor<3x4xf32>", X)}


@pytest.mark.parametrize("op,want", [
    ("graph.relu(%x)", F.relu(X)), ("graph.silu(%x)", F.silu(X)), ("graph.gelu(%x)", F.gelu(X)),
    ('graph.gelu(%x) {approximate = "tanh"}', F.gelu(X, approximate="tanh")), ("graph.exp(%x)", X.exp()), ("graph.neg(%x)", -X),
    ("graph.flip(%x) {dims = [0, 1]}", X.flip(0, 1)), ("graph.scan(%x) {dim = 1, kind = \"sum\"}", X.cumsum(1)),
    ("graph.scan(%x) {dim = 0, kind = \"prod\"}", X.cumprod(0)), ("graph.scan(%x) {dim = 1, kind = \"max\"}", X.cummax(1).values),
    ("graph.scan(%x) {dim = 1, kind = \"min\"}", X.cummin(1).values),
    ("graph.scan(%x) {dim = 1, kind = \"logsumexp\"}", X.logcumsumexp(1)),
    ("graph.softmax(%x) {dim = 0}", X.softmax(0)), ("graph.log_softmax(%x) {dim = 1}", X.log_softmax(1)),
])
def test_same_shape(op, want):
    close(run(f"%r = {op} : tensor<3x4xf32>", ON_X), want)


@pytest.mark.parametrize("op,type,want", [
    ("graph.reshape(%x)", "2x6xf32", X.reshape(2, 6)), ("graph.permute(%x) {perm = [1, 0]}", "4x3xf32", X.t()),
    ("graph.expand(%x)", "2x3x4xf32", X.expand(2, 3, 4)), ("graph.slice(%x) {starts = [1, 0], steps = [1, 3]}", "2x2xf32", X[1:, ::3]),
    ("graph.slice(%x) {starts = [2, 3], steps = [-1, -2]}", "3x2xf32", X.flip(0, 1)[:, ::2]),
    ("graph.remap(%x) {map = [d1, d0 // 2]}", "8x3xf32", X.t().repeat_interleave(2, 0)),
    ("graph.cat(%x, %x) {dim = 1}", "3x8xf32", torch.cat([X, X], 1)),
    ("graph.pad(%x) {low = [1, -1], high = [0, 2], value = 2.5}", "4x5xf32", F.pad(X, (-1, 2, 1, 0), value=2.5)),
    ("graph.sum(%x) {dims = [0, 1]}", "f32", X.sum()), ("graph.sum(%x) {dims = []}", "3x4xf32", X),
    ("graph.prod(%x) {dims = [0, 1], keepdim = true}", "1x1xf32", X.prod().reshape(1, 1)),
    ("graph.mean(%x) {dims = [1], keepdim = true}", "3x1xf32", X.mean(1, True)), ("graph.amax(%x) {dims = [1]}", "3xf32", X.amax(1)),
    ("graph.amin(%x) {dims = [0]}", "4xf32", X.amin(0)), ("graph.argmax(%x) {dims = [1]}", "3xi64", X.argmax(1)),
    ("graph.argmin(%x) {dims = [0], keepdim = true}", "1x4xi64", X.argmin(0, True)),
    ("graph.argmax(%x) {dims = [0, 1]}", "i64", X.argmax()), ("graph.any(%x) {dims = [1]}", "3xi1", (X != 0).any(1)),
    ("graph.all(%x) {dims = [0, 1]}", "i1", (X != 0).all()), ("graph.cast(%x)", "3x4xi32", X.to(torch.int32)),
    ("graph.gt(%x, %x)", "3x4xi1", torch.zeros(3, 4, dtype=torch.bool)),
])
def test_other_type(op, type, want):
    close(run(f"%r = {op} : tensor<{type}>", ON_X), want)


def test_constants():
    ops = """%a = graph.full() {value = -inf} : tensor<2x2xf32>
      %b = graph.iota() {start = 3, step = -2} : tensor<4xi64>
      %c = graph.iota() {start = 0.5, step = 0.25} : tensor<3xf32>
      %d = graph.sym() {expr = s0*2 + 1} : tensor<i64>
      %e = graph.full() {value = s0} : tensor<1xi64>"""
    got = run(ops, {"x": ("tensor<s0xf32>", torch.zeros(5))}, "%a, %b, %c, %d, %e")
    close(got, torch.full((2, 2), -torch.inf), torch.tensor([3, 1, -1, -3]), torch.tensor([0.5, 0.75, 1.0]), torch.tensor(11), torch.tensor([5]))


def test_broadcast_and_select():
    c = torch.tensor([True, False, True, False])
    y = torch.randn(3, 1)
    got = run("%s = graph.add(%x, %y) : tensor<3x4xf32>\n %r = graph.select(%c, %s, %y) : tensor<3x4xf32>",
              {**ON_X, "y": ("tensor<3x1xf32>", y), "c": ("tensor<4xi1>", c)})
    close(got, torch.where(c, X + y, y))


def test_nan_is_an_extreme():
    x = torch.tensor([1.0, torch.nan, 5.0, torch.nan])
    got = run("%a = graph.argmax(%x) {dims = [0]} : tensor<i64>\n %b = graph.argmin(%x) {dims = [0]} : tensor<i64>\n"
              "%c = graph.amax(%x) {dims = [0]} : tensor<f32>", {"x": ("tensor<4xf32>", x)}, "%a, %b, %c")
    close(got, torch.tensor(1), torch.tensor(1), torch.tensor(torch.nan), equal_nan=True)


def test_matmul_accumulates_bf16_in_f32():
    a, b = torch.randn(2, 3, 64).bfloat16(), torch.randn(2, 64, 5).bfloat16()
    got = run("%r = graph.matmul(%a, %b) : tensor<2x3x5xbf16>", {"a": ("tensor<2x3x64xbf16>", a), "b": ("tensor<2x64x5xbf16>", b)})
    close(got, (a.float() @ b.float()).bfloat16(), rtol=0, atol=0)


CONVS = [((2, 4, 9), (6, 2, 3), (2,), (1,), (1,), 2), ((2, 3, 8, 7), (5, 3, 3, 2), (2, 1), (1, 0), (1, 2), 1),
         ((1, 4, 5, 6, 5), (4, 1, 2, 3, 1), (1, 2, 1), (0, 1, 0), (1, 1, 1), 4)]


def text(shape) -> str:
    return "x".join(map(str, shape)) + "xf32"


@pytest.mark.parametrize("xs,ws,stride,padding,dilation,groups", CONVS)
def test_convolution_and_its_gradients(xs, ws, stride, padding, dilation, groups):
    x, w = torch.randn(xs, requires_grad=True), torch.randn(ws, requires_grad=True)
    y = torch.convolution(x, w, None, stride, padding, dilation, False, (0,) * len(stride), groups)
    g = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x, w), g)
    attrs = f"{{stride = {list(stride)}, padding = {list(padding)}, dilation = {list(dilation)}, groups = {groups}}}"
    got = run(f"""%y = graph.conv(%x, %w) {attrs} : tensor<{text(y.shape)}>
        %dx = graph.conv_transpose(%g, %w) {attrs} : tensor<{text(xs)}>
        %dw = graph.conv_weight_grad(%g, %x) {attrs} : tensor<{text(ws)}>""",
              {"x": (f"tensor<{text(xs)}>", x), "w": (f"tensor<{text(ws)}>", w), "g": (f"tensor<{text(y.shape)}>", g)}, "%y, %dx, %dw")
    close(got, y.detach(), dx, dw, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", ["none", "float", "bool", "causal"])
def test_attention(mask):
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    m = {"none": None, "causal": None, "float": torch.randn(2, 1, 5, 7), "bool": torch.rand(5, 7) > 0.4}[mask]
    if mask == "bool":
        m[2] = False  # a row that sees nothing
    want = F.scaled_dot_product_attention(q, k, v, m, is_causal=mask == "causal", scale=0.3, enable_gqa=True)
    inputs = {"q": ("tensor<2x4x5x8xf32>", q), "k": ("tensor<2x2x7x8xf32>", k), "v": ("tensor<2x2x7x8xf32>", v)}
    if m is not None:
        inputs["m"] = ("tensor<2x1x5x7xf32>" if mask == "float" else "tensor<5x7xi1>", m)
    got, lse = run(f"%r, %l = graph.attention({', '.join('%' + n for n in inputs)}) {{scale = 0.3, causal = {str(mask == 'causal').lower()}}}"
                   " : tensor<2x4x5x8xf32>, tensor<2x4x5xf32>", inputs, "%r, %l")
    torch.testing.assert_close(got, want)
    if mask == "none":
        torch.testing.assert_close(lse, torch.logsumexp(q @ k.repeat_interleave(2, 1).mT * 0.3, -1))


def test_norms():
    x, w, b = torch.randn(2, 6, 4), torch.randn(4), torch.randn(4)
    c, e = torch.randn(6), torch.randn(6)
    got = run("""%a, %am, %as = graph.layer_norm(%x, %w, %b) {ndims = 1, eps = 1e-05} : tensor<2x6x4xf32>, tensor<2x6x1xf32>, tensor<2x6x1xf32>
        %n, %ns = graph.rms_norm(%x, %w) {ndims = 1, eps = 1e-06} : tensor<2x6x4xf32>, tensor<2x6x1xf32>
        %g, %gm, %gs = graph.group_norm(%x, %c, %e) {groups = 3, eps = 1e-05} : tensor<2x6x4xf32>, tensor<2x3xf32>, tensor<2x3xf32>
        %v, %m = graph.var_mean(%x) {dims = [1], correction = 1.0} : tensor<2x4xf32>, tensor<2x4xf32>""",
              {"x": ("tensor<2x6x4xf32>", x), "w": ("tensor<4xf32>", w), "b": ("tensor<4xf32>", b), "c": ("tensor<6xf32>", c),
               "e": ("tensor<6xf32>", e)}, "%a, %am, %as, %n, %ns, %g, %gm, %gs, %v, %m")
    layer = torch.native_layer_norm(x, (4,), w, b, 1e-5)
    group = torch.native_group_norm(x, c, e, 2, 6, 4, 3, 1e-5)
    rms = F.rms_norm(x, (4,), w, 1e-6)
    close(got, *layer, rms, torch.rsqrt(x.square().mean(-1, True) + 1e-6), *group, *torch.var_mean(x, 1))


@pytest.mark.parametrize("ceil", [False, True])
def test_pools(ceil):
    x, z = torch.randn(2, 3, 8, 7), torch.randn(2, 3, 9)
    p, i = F.max_pool2d(x, (3, 2), (2, 2), (1, 1), (1, 1), ceil, return_indices=True)
    a = F.avg_pool2d(x, (3, 2), (2, 2), (1, 1), ceil, False)
    d = F.avg_pool2d(x, (3, 2), (2, 2), (1, 1), ceil, True, 5)
    o = F.avg_pool1d(z, 3, 2, 1, ceil)
    attrs = f"kernel = [3, 2], stride = [2, 2], padding = [1, 1], ceil_mode = {str(ceil).lower()}"
    got = run(f"""%p, %i = graph.max_pool(%x) {{{attrs}, dilation = [1, 1]}} : tensor<{text(p.shape)}>, tensor<{text(p.shape)[:-3]}i64>
        %a = graph.avg_pool(%x) {{{attrs}, count_include_pad = false}} : tensor<{text(a.shape)}>
        %d = graph.avg_pool(%x) {{{attrs}, divisor = 5}} : tensor<{text(d.shape)}>
        %o = graph.avg_pool(%z) {{kernel = [3], stride = [2], padding = [1], ceil_mode = {str(ceil).lower()}}} : tensor<{text(o.shape)}>""",
              {"x": ("tensor<2x3x8x7xf32>", x), "z": ("tensor<2x3x9xf32>", z)}, "%p, %i, %a, %d, %o")
    close(got, p, i, a, d, o)


def test_indexing():
    w, ids = torch.randn(10, 4), torch.randint(0, 10, (2, 3))
    i, j = torch.tensor([[0], [-1]]), torch.tensor([1, 3, 0])
    g = torch.randint(0, 10, (5, 4))
    src = torch.randn(5, 4)
    put = torch.randn(2, 3)
    got = run("""%a = graph.embedding(%w, %ids) : tensor<2x3x4xf32>
        %b = graph.gather(%w, %g) {dim = 0} : tensor<5x4xf32>
        %c = graph.take(%w, %j) {dim = 1} : tensor<10x3xf32>
        %d = graph.index(%w, %i, %j) {dims = [0, 1]} : tensor<2x3xf32>
        %e = graph.index(%w, %j) {dims = [1]} : tensor<10x3xf32>
        %p = graph.index_put(%w, %put, %i, %j) {dims = [0, 1], accumulate = true} : tensor<10x4xf32>
        %s = graph.scatter(%w, %g, %src) {dim = 0, reduce = "add"} : tensor<10x4xf32>
        %t = graph.scatter(%w, %g, %src) {dim = 0, reduce = "amax"} : tensor<10x4xf32>""",
              {"w": ("tensor<10x4xf32>", w), "ids": ("tensor<2x3xi64>", ids), "i": ("tensor<2x1xi64>", i), "j": ("tensor<3xi64>", j),
               "g": ("tensor<5x4xi64>", g), "src": ("tensor<5x4xf32>", src), "put": ("tensor<2x3xf32>", put)},
              "%a, %b, %c, %d, %e, %p, %s, %t")
    close(got, w[ids], w.gather(0, g), w[:, j], w[i, j], w[:, j], w.index_put((i, j), put, accumulate=True), w.scatter_add(0, g, src),
          w.scatter_reduce(0, g, src, "amax"))


def test_extern_decodes_arguments():
    got = run("""%v, %i = graph.extern(%x) {target = "aten.topk.default", args = [{operand = 0}, {expr = s0 - 1}, 1]}
            : tensor<3x(s0 - 1)xf32>, tensor<3x(s0 - 1)xi64>
        %h = graph.extern(%x) {target = "aten._to_copy.default", args = [{operand = 0}], kwargs = {dtype = {dtype = "f16"}}} : tensor<3xs0xf16>
        %n = graph.extern(%x) {target = "aten.nonzero.default", args = [{operand = 0}]} : tensor<u0x2xi64>
        %m = graph.sym() {expr = u0} : tensor<i64>
        %o = graph.extern(%x) {target = "aten.native_batch_norm.default", args = [{operand = 0}, none, none, none, none, true, 0.1, 1e-05],
            result_kinds = ["tensor", "none", "none"]} : tensor<3xs0xf32>""",
              {"x": ("tensor<3xs0xf32>", X)}, "%v, %i, %h, %n, %m, %o")
    close(got, *X.topk(3), X.half(), X.nonzero(), torch.tensor(12), torch.native_batch_norm(X, None, None, None, None, True, 0.1, 1e-5)[0])


def test_extern_returns_ints_and_sees_strides():
    got = run("""%n = graph.extern(%x) {target = "aten.sym_size.int", args = [{operand = 0}, 0], result_kinds = ["int"]} : tensor<i64>
        %c = graph.extern(%x) {target = "aten._local_scalar_dense.default", args = [{operand = 1}], operand_strides = [[1, 3], none],
            result_kinds = ["int"], defines = {u1 = [0, -1]}} : tensor<i64>
        %m = graph.sym() {expr = u1*2} : tensor<i64>
        %s = graph.extern(%x) {target = "aten.as_strided.default", args = [{operand = 0}, [12], [1]], operand_strides = [[1, 3]],
            result_kinds = ["tensor"]} : tensor<12xf32>""".replace("(%x) {target = \"aten._local", "(%x, %k) {target = \"aten._local"),
              {**ON_X, "k": ("tensor<i64>", torch.tensor(21))}, "%n, %c, %m, %s")
    close(got, torch.tensor(3), torch.tensor(21), torch.tensor(42), X.t().flatten())


def test_assign_updates_the_callers_tensor_at_the_end():
    x = torch.ones(2)
    got = run("%y = graph.add(%x, %x) : tensor<2xf32>\n graph.assign(%x, %y)\n %r = graph.neg(%x) : tensor<2xf32>",
              {"x": ("tensor<2xf32>", x)}, "%r, %x")
    close(got, -torch.ones(2), torch.ones(2))
    assert x.tolist() == [2.0, 2.0]


def test_precision_ignores_narrow_casts_unless_exact():
    x = torch.tensor([1.001])
    ops = "%h = graph.cast(%x) : tensor<1xbf16>\n %r = graph.cast(%h) : tensor<1xf32>"
    given = {"x": ("tensor<1xf32>", x)}
    assert run(ops, given)[0].item() == 1.0
    (free,) = run(ops, given, precision=torch.float64)
    assert free.dtype == torch.float64 and free.item() == x.double().item()
    (rounded,) = run(ops, given, precision=torch.float64, exact=True)
    assert rounded.dtype == torch.float64 and rounded.item() == 1.0


def test_errors_name_the_op():
    with pytest.raises(IRError, match=r"graph\.reshape"):
        run("%r = graph.reshape(%x) : tensor<s1xf32>", {"x": ("tensor<s0xf32>", torch.zeros(4))})
    with pytest.raises(IndexError, match=r"graph\.embedding"):
        run("%r = graph.embedding(%w, %i) : tensor<1x2xf32>",
            {"w": ("tensor<3x2xf32>", torch.zeros(3, 2)), "i": ("tensor<1xi64>", torch.tensor([3]))})
    with pytest.raises(IRError, match=r"argument 0 .* size 5 in dimension 0"):
        run("%r = graph.neg(%x) : tensor<4xf32>", {"x": ("tensor<4xf32>", torch.zeros(5))})
    with pytest.raises(IRError, match="torch has no operator"):
        run('%r = graph.extern(%x) {target = "aten.nonsense.default", args = []} : tensor<4xf32>', {"x": ("tensor<4xf32>", torch.zeros(4))})


def test_symbols_are_solved_from_linear_sizes():
    (got,) = run("%r = graph.sym() {expr = s0} : tensor<i64>", {"x": ("tensor<(s0*2 + 1)xf32>", torch.zeros(9))})
    assert got.item() == 4
    with pytest.raises(IRError, match="do not determine s0"):
        run("%r = graph.sym() {expr = s0} : tensor<i64>", {"x": ("tensor<(s0 // 2)xf32>", torch.zeros(9))})
    assert run("%r = graph.sym() {expr = s0} : tensor<i64>", {"x": ("tensor<(s0 // 2)xf32>", torch.zeros(9))}, symbols={"s0": 19})[0].item() == 19
