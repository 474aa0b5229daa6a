"""Kernels: grids, loops, masks, memory and the mistakes that the interpreter finds."""

import time

import pytest
import torch
from aicc.ir import (
    DTYPES,
    Block,
    BufferType,
    Builder,
    IRError,
    Operation,
    Region,
    SymbolRef,
    TensorType,
    TileType,
    make_func,
    make_module,
    sym,
)
from aicc.ir.interpreter import interpret, loops, tile
from aicc.ir.parser import parse_module
from aicc.ir.types import index

torch.manual_seed(0)
F32 = DTYPES["f32"]
I0, I1, I2, T0, T1 = (sym(n) for n in ("i0", "i1", "i2", "t0", "t1"))


def launch(kernel: str, arguments: str, results: str, inputs, **options):
    """Interprets a function that launches @k on all its arguments. `arguments` and `results` are lists of tensor types."""
    types = arguments.split(";")
    names = [f"%a{i}" for i in range(len(types))]
    outs = [f"%r{i}" for i in range(len(results.split(";")))]
    module = parse_module(f"""module {{
      {kernel}
      func @f {{ ^({', '.join(f'{n}: {t}' for n, t in zip(names, types))}):
        {', '.join(outs)} = tile.launch({', '.join(names)}) {{kernel = @k}} : {results.replace(';', ', ')}
        return({', '.join(outs)})
      }}
    }}""")
    return interpret(module, inputs, **options)


def pointwise(mask: str) -> str:
    return f"""tile.kernel @k {{grid = [(s0 + 63) // 64], symbols = ["s0"]}} {{
      ^(%x: buffer<s0xf32>, %y: buffer<s0xf32>):
        %p = tile.program_id() {{axis = 0}} : index
        %v = tile.load(%x, %p) {{offset = i0*64 + t0, shape = [64], mask = [[i0*64 + t0, {mask}]]}} : tile<64xf32>
        %one = arith.constant() {{value = 1.0}} : f32
        %e = arith.exp(%v) : tile<64xf32>
        %s = arith.add(%e, %one) : tile<64xf32>
        tile.store(%y, %s, %p) {{offset = i0*64 + t0, mask = [[i0*64 + t0, s0]]}}
        tile.yield()
    }}"""


@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000])
def test_ragged_pointwise(n):
    x = torch.randn(n)
    (got,) = launch(pointwise("s0"), "tensor<s0xf32>", "tensor<s0xf32>", [x], check=True)
    torch.testing.assert_close(got, x.exp() + 1)


def test_grids_run_in_pieces(monkeypatch):
    monkeypatch.setattr(tile, "LANES", 128)
    x = torch.randn(1000)
    (got,) = launch(pointwise("s0"), "tensor<s0xf32>", "tensor<s0xf32>", [x], check=True)
    torch.testing.assert_close(got, x.exp() + 1)


def test_a_wrong_mask_is_found():
    with pytest.raises(IRError, match=r"(?s)kernel @k: offset 100 is out of bounds of 100 elements, at position \[36\].*program 1.*tile.load"):
        launch(pointwise("s0 + 1"), "tensor<s0xf32>", "tensor<s0xf32>", [torch.randn(100)])


def row_softmax(b: Builder, x, y, block: int = 4):
    """Max and sum in one streaming loop over blocks of columns, then a second loop that writes."""
    row = b.op("tile.program_id", type=index, axis=0)
    scalar = TileType((1,), F32)
    size = {"mask": ((I0 * block + T0, sym("s1")),), "shape": (block,)}
    start = [b.op("tile.full", b.constant(v, F32), type=scalar) for v in (float("-inf"), 0.0)]

    def loop(inits, types, body):
        inner = Block([index, *types])
        ib = Builder.at_end(inner)
        ib.create("tile.yield", body(ib, *inner.args))
        return b.create("tile.for", inits, {"lower": 0, "upper": (sym("s1") + block - 1) // block}, types, [Region([inner])]).results

    def load(ib, j):
        return ib.op("tile.load", x, j, row, type=TileType((block,), F32), offset=I1 * sym("s1") + I0 * block + T0, other=float("-inf"), **size)

    def stream(ib, j, m, s):
        v = load(ib, j)
        new = ib.arith("max", m, ib.op("tile.reduce", v, type=scalar, axis=0, kind="max"))
        terms = ib.op("tile.reduce", ib.arith("exp", ib.arith("sub", v, new)), type=scalar, axis=0, kind="sum")
        return new, ib.arith("add", ib.arith("mul", s, ib.arith("exp", ib.arith("sub", m, new))), terms)

    m, s = loop(start, [scalar, scalar], stream)

    def write(ib, j):
        out = ib.arith("div", ib.arith("exp", ib.arith("sub", load(ib, j), m)), s)
        ib.create("tile.store", [y, out, j, row], {"offset": I1 * sym("s1") + I0 * block + T0, "mask": size["mask"]})
        return ()

    loop([], [], write)


def test_streaming_softmax():
    module, top = make_module("tile")
    kind = BufferType((sym("s0"), sym("s1")), F32)
    body = Block([kind, kind])
    b = Builder.at_end(body)
    row_softmax(b, *body.args)
    b.create("tile.yield")
    top.append(Operation.create("tile.kernel", (), {"sym_name": "k", "grid": (sym("s0"),), "symbols": ("s0", "s1")}, (), [Region([body])]))
    t = TensorType(kind.shape, F32)
    _, block = make_func(top, "f", [t])
    fb = Builder.at_end(block)
    fb.create("return", [fb.op("tile.launch", block.args[0], type=t, kernel=SymbolRef("k"))])
    x = torch.randn(5, 11)
    torch.testing.assert_close(interpret(module, [x], check=True)[0], x.softmax(1))
    got = interpret(module, [x], precision=torch.float64)[0]
    torch.testing.assert_close(got, x.double().softmax(1), rtol=1e-14, atol=0)


def gemm(dtype: str, acc: str, m: int = 16, n: int = 8, k: int = 8) -> str:
    zero = "0.0" if acc[0] == "f" else "0"
    return f"""tile.kernel @k {{grid = [(s0 + {m - 1}) // {m}, (s1 + {n - 1}) // {n}], symbols = ["s0", "s1", "s2"]}} {{
      ^(%a: buffer<s0xs2x{dtype}>, %b: buffer<s2xs1x{dtype}>, %c: buffer<s0xs1x{acc}>):
        %p = tile.program_id() {{axis = 0}} : index
        %q = tile.program_id() {{axis = 1}} : index
        %z = arith.constant() {{value = {zero}}} : {acc}
        %zero = tile.full(%z) : tile<{m}x{n}x{acc}>
        %sum = tile.for(%zero) {{lower = 0, upper = s2, step = {k}}} : tile<{m}x{n}x{acc}> {{
          ^(%i: index, %acc: tile<{m}x{n}x{acc}>):
            %x = tile.load(%a, %p, %i) {{offset = (i0*{m} + t0)*s2 + i1 + t1, shape = [{m}, {k}],
                mask = [[i0*{m} + t0, s0], [i1 + t1, s2]]}} : tile<{m}x{k}x{dtype}>
            %y = tile.load(%b, %q, %i) {{offset = (i1 + t0)*s1 + i0*{n} + t1, shape = [{k}, {n}],
                mask = [[i0*{n} + t1, s1], [i1 + t0, s2]]}} : tile<{k}x{n}x{dtype}>
            %d = tile.dot(%x, %y, %acc) : tile<{m}x{n}x{acc}>
            tile.yield(%d)
        }}
        tile.store(%c, %sum, %p, %q) {{offset = (i0*{m} + t0)*s1 + i1*{n} + t1, mask = [[i0*{m} + t0, s0], [i1*{n} + t1, s1]]}}
        tile.yield()
    }}"""


@pytest.mark.parametrize("dtype,acc,kind", [("f32", "f32", torch.float32), ("bf16", "f32", torch.bfloat16), ("i8", "i32", torch.int8)])
def test_gemm(dtype, acc, kind):
    a, b = (torch.randn(37, 21) * 8).to(kind), (torch.randn(21, 19) * 8).to(kind)
    (got,) = launch(gemm(dtype, acc), f"tensor<s0xs2x{dtype}>;tensor<s2xs1x{dtype}>", f"tensor<s0xs1x{acc}>", [a, b], check=True)
    wide = torch.float32 if acc == "f32" else torch.int64
    torch.testing.assert_close(got, (a.to(wide) @ b.to(wide)).to(got.dtype), rtol=1e-5, atol=1e-4)


def test_gemm_of_transposed_memory():
    """The strides of a tensor type are where its elements lie: a kernel for a transposed operand reads it with swapped offsets."""
    kernel = """tile.kernel @k {grid = [3]} {
      ^(%x: buffer<3x4xf32, strides=[1, 3]>, %y: buffer<3x4xf32>):
        %p = tile.program_id() {axis = 0} : index
        %v = tile.load(%x, %p) {offset = i0 + t0*3, shape = [4]} : tile<4xf32>
        tile.store(%y, %v, %p) {offset = i0*4 + t0}
        tile.yield()
    }"""
    x = torch.randn(3, 4)
    (got,) = launch(kernel, "tensor<3x4xf32, strides=[1, 3]>", "tensor<3x4xf32>", [x])
    assert torch.equal(got, x)
    broadcast = kernel.replace("strides=[1, 3]", "strides=[1, 0]").replace("i0 + t0*3", "i0")
    (got,) = launch(broadcast, "tensor<3x4xf32, strides=[1, 0]>", "tensor<3x4xf32>", [x[:, :1].expand(3, 4)])
    assert torch.equal(got, x[:, :1].expand(3, 4))


def test_loop_bounds_that_differ_per_program():
    """Program i sums the elements up to i: shorter loops must not read or add further."""
    kernel = """tile.kernel @k {grid = [s0], symbols = ["s0"]} {
      ^(%x: buffer<s0xf32>, %y: buffer<s0xf32>, %n: buffer<s0xi64>):
        %p = tile.program_id() {axis = 0} : index
        %z = arith.constant() {value = 0.0} : f32
        %c = arith.constant() {value = 0} : i64
        %s, %m = tile.for(%p, %z, %c) {lower = 0, upper = i0 + 1, indices = 1} : f32, i64 {
          ^(%i: index, %acc: f32, %count: i64):
            %v = tile.load(%x, %i) {offset = i0, shape = []} : f32
            %t = arith.add(%acc, %v) : f32
            %k = arith.cast(%i) : i64
            tile.store(%n, %k, %p) {offset = i0}
            tile.yield(%t, %k)
        }
        tile.store(%y, %s, %p) {offset = i0}
        tile.yield()
    }""".replace("@k {", "@k {outputs = 2, ")
    x = torch.randn(9)
    got, count = launch(kernel, "tensor<s0xf32>", "tensor<s0xf32>;tensor<s0xi64>", [x], check=True)
    torch.testing.assert_close(got, x.cumsum(0))
    assert count.tolist() == list(range(9))


def copy_to(offset: str, n: int = 8, extra: str = "") -> str:
    return f"""tile.kernel @k {{grid = [2]{extra}}} {{
      ^(%x: buffer<{n}xf32>, %y: buffer<{n}xf32>):
        %p = tile.program_id() {{axis = 0}} : index
        %v = tile.load(%x, %p) {{offset = i0*4 + t0, shape = [4]}} : tile<4xf32>
        tile.store(%y, %v, %p) {{offset = {offset}}}
        tile.yield()
    }}"""


def test_programs_that_write_one_element_are_found():
    x = torch.randn(8)
    for together in (1, 100):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tile, "LANES", together)
            with pytest.raises(IRError, match="written by program"):
                launch(copy_to("i0*3 + t0"), "tensor<8xf32>", "tensor<8xf32>", [x], check=True)


def test_elements_that_nobody_writes_are_found():
    x = torch.randn(8)
    kernel = copy_to("i0*4 + t0").replace("grid = [2]", "grid = [1]")
    with pytest.raises(IRError, match=r"leaves element \[4\] of output 0 unwritten"):
        launch(kernel, "tensor<8xf32>", "tensor<8xf32>", [x], check=True)
    (got,) = launch(kernel, "tensor<8xf32>", "tensor<8xf32>", [x])
    assert torch.equal(got[:4], x[:4]) and bool(got[4:].isnan().all())


def test_reading_what_another_program_writes_is_found():
    kernel = """tile.kernel @k {grid = [2]} {
      ^(%x: buffer<2xf32>, %y: buffer<2xf32>):
        %p = tile.program_id() {axis = 0} : index
        %v = tile.load(%x, %p) {offset = i0, shape = []} : f32
        tile.store(%y, %v, %p) {offset = i0}
        %w = tile.load(%y, %p) {offset = 1 - i0, shape = []} : f32
        tile.store(%y, %w, %p) {offset = i0}
        tile.yield()
    }"""
    with pytest.raises(IRError, match="is read by one program and written by another"):
        launch(kernel, "tensor<2xf32>", "tensor<2xf32>", [torch.randn(2)], check=True)


@pytest.mark.parametrize("kind,want", [("add", [11.0, 6.0]), ("max", [8.0, 3.0]), ("min", [0.0, 1.0])])
def test_atomics_on_an_output_in_place(kind, want):
    kernel = f"""tile.kernel @k {{grid = [2], inplace = [[0, 2]]}} {{
      ^(%x: buffer<2xf32>, %i: buffer<2x2xi64>, %y: buffer<2xf32>):
        %p = tile.program_id() {{axis = 0}} : index
        %j = tile.load(%i, %p) {{offset = i0*2 + t0, shape = [2]}} : tile<2xi64>
        %v = tile.index(%p) {{expr = i0*2 + t0, shape = [2]}} : tile<2xf32>
        tile.store(%y, %v, %j) {{offset = i0, atomic = "{kind}"}}
        tile.yield()
    }}"""
    (got,) = launch(kernel, "tensor<2xf32>;tensor<2x2xi64>", "tensor<2xf32>", [torch.tensor([8.0, 3.0]), torch.tensor([[0, 0], [0, 1]])],
                    check=True)
    # 0, 1 and 2 go to element 0, 3 to element 1
    assert got.tolist() == {"add": [11.0, 6.0], "max": [8.0, 3.0], "min": [0.0, 3.0]}[kind] and want[0] == got[0].item()


def test_user_indices_are_checked():
    kernel = """tile.kernel @k {grid = [1], symbols = ["s0"]} {
      ^(%w: buffer<s0x4xf32>, %i: buffer<3xi64>, %y: buffer<3x4xf32>):
        %j = tile.load(%i) {offset = t0, shape = [3, 1]} : tile<3x1xi64>
        %v = tile.load(%w, %j) {offset = i0*4 + t1, shape = [3, 4], mask = [[i0, s0]], mask_low = [i0], check = true} : tile<3x4xf32>
        tile.store(%y, %v) {offset = t0*4 + t1}
        tile.yield()
    }"""
    w = torch.randn(5, 4)
    args = ("tensor<s0x4xf32>;tensor<3xi64>", "tensor<3x4xf32>")
    (got,) = launch(kernel, *args, [w, torch.tensor([4, 0, 2])])
    assert torch.equal(got, w[[4, 0, 2]])
    for bad in (5, -1):
        with pytest.raises(IndexError, match=r"(?s)index given by the user.*tile.load"):
            launch(kernel, *args, [w, torch.tensor([0, bad, 2])])


def test_scratch_masks_reductions_and_reshapes():
    kernel = """tile.kernel @k {grid = [2]} {
      ^(%x: buffer<2x3x4xf32>, %y: buffer<2x4x3xf32>):
        %p = tile.program_id() {axis = 0} : index
        %s = tile.alloca() : buffer<12xf32>
        %v = tile.load(%x, %p) {offset = i0*12 + t0*4 + t1, shape = [3, 4]} : tile<3x4xf32>
        tile.store(%s, %v) {offset = t0*4 + t1}
        %w = tile.load(%s) {offset = t0, shape = [12]} : tile<12xf32>
        %u = tile.reshape(%w) : tile<3x4xf32>
        %m = tile.mask() {mask = [[t0, t1 + 1]], shape = [3, 4]} : tile<3x4xi1>
        %z = arith.constant() {value = 0.0} : f32
        %k = arith.select(%m, %u, %z) : tile<3x4xf32>
        %r = tile.reduce(%k) {axis = 1, kind = "sum"} : tile<3x1xf32>
        %d = arith.sub(%k, %r) : tile<3x4xf32>
        %t = tile.transpose(%d) : tile<4x3xf32>
        tile.store(%y, %t, %p) {offset = i0*12 + t0*3 + t1}
        tile.yield()
    }"""
    x = torch.randn(2, 3, 4)
    (got,) = launch(kernel, "tensor<2x3x4xf32>", "tensor<2x4x3xf32>", [x], check=True)
    kept = x.triu()
    torch.testing.assert_close(got, (kept - kept.sum(2, keepdim=True)).mT)


def test_wide_unsigned_and_bool_memory():
    kernel = """tile.kernel @k {grid = [1], outputs = 2} {
      ^(%x: buffer<3xu64>, %y: buffer<3xu64>, %z: buffer<3xi1>):
        %v = tile.load(%x) {offset = t0, shape = [4], mask = [[t0, 3]], other = 1} : tile<4xu64>
        %c = arith.constant() {value = 6364136223846793005} : u64
        %m = arith.mul(%v, %c) : tile<4xu64>
        %g = arith.gt(%m, %c) : tile<4xi1>
        tile.store(%y, %m) {offset = 2 - t0, mask = [[t0, 3]]}
        tile.store(%z, %g) {offset = t0, mask = [[t0, 3]]}
        tile.yield()
    }"""
    x = [1, 2**63 + 1, 3]
    got, greater = launch(kernel, "tensor<3xu64>", "tensor<3xu64>;tensor<3xi1>", [torch.tensor(x, dtype=torch.uint64)], check=True)
    want = [v * 6364136223846793005 % 2**64 for v in x]
    assert got.tolist() == want[::-1] and greater.tolist() == [v > 6364136223846793005 for v in want]


def test_launches_name_what_is_wrong():
    with pytest.raises(IRError, match="no kernel @k"):
        launch("", "tensor<8xf32>", "tensor<8xf32>", [torch.zeros(8)])
    with pytest.raises(IRError, match="argument 0 of @k is buffer<9xf32>, launched with 8 elements"):
        launch(copy_to("i0", 9), "tensor<8xf32>", "tensor<8xf32>", [torch.zeros(8)])


@pytest.fixture(params=[1, 64, 1 << 20], ids=["in order", "in parts", "together"])
def loop_lanes(request, monkeypatch):
    """How many iterations of a loop the interpreter takes at once."""
    monkeypatch.setattr(loops, "LANES", request.param)
    if request.param == 1:
        monkeypatch.setattr(loops, "_independent", lambda op, written: set())
        monkeypatch.setattr(loops, "_commutes", lambda op, written: False)


def test_loops_taken_together_agree_with_loops_in_order(loop_lanes):
    test_streaming_softmax()
    a, b = torch.randn(20, 21), torch.randn(21, 19)
    (got,) = launch(gemm("f32", "f32"), "tensor<s0xs2xf32>;tensor<s2xs1xf32>", "tensor<s0xs1xf32>", [a, b], check=True)
    torch.testing.assert_close(got, a @ b, rtol=1e-5, atol=1e-5)


def test_stores_of_later_iterations_win(loop_lanes):
    kernel = """tile.kernel @k {grid = [3]} {
      ^(%x: buffer<3x7xf32>, %y: buffer<3x2xf32>):
        %p = tile.program_id() {axis = 0} : index
        tile.for {lower = 0, upper = 7} {
          ^(%i: index):
            %v = tile.load(%x, %p, %i) {offset = i0*7 + i1, shape = []} : f32
            tile.store(%y, %v, %p, %i) {offset = i0*2 + i1 % 2}
            tile.yield()
        }
        tile.yield()
    }"""
    x = torch.randn(3, 7)
    (got,) = launch(kernel, "tensor<3x7xf32>", "tensor<3x2xf32>", [x], check=True)
    assert torch.equal(got, torch.stack([x[:, 6], x[:, 5]], 1))


def test_triangular_loops(loop_lanes):
    """Program p handles columns p to 6: bounds differ, nothing is carried, and reads past the end must not happen."""
    kernel = """tile.kernel @k {grid = [7]} {
      ^(%x: buffer<7x7xf32>, %y: buffer<7x7xf32>):
        %p = tile.program_id() {axis = 0} : index
        tile.for(%p) {lower = i0, upper = min(7, i0*2 + 2), indices = 1} {
          ^(%i: index):
            %v = tile.load(%x, %p, %i) {offset = i0*7 + i1, shape = []} : f32
            tile.store(%y, %v, %p, %i) {offset = i0*7 + i1}
            tile.yield()
        }
        tile.yield()
    }"""
    x = torch.randn(7, 7)
    (got,) = launch(kernel, "tensor<7x7xf32>", "tensor<7x7xf32>", [x])
    row, column = torch.arange(7)[:, None], torch.arange(7)
    written = (column >= row) & (column < 2 * row + 2)
    assert torch.equal(got.isnan(), ~written) and torch.equal(got[written], x[written])


def test_loops_that_read_what_they_wrote_run_in_order(loop_lanes):
    """A running sum through memory, and a counter of another kind carried beside it."""
    kernel = """tile.kernel @k {grid = [3], outputs = 2} {
      ^(%x: buffer<3x7xf32>, %y: buffer<3x8xf32>, %m: buffer<3xf32>):
        %p = tile.program_id() {axis = 0} : index
        %z = arith.constant() {value = 0.0} : f32
        tile.store(%y, %z, %p) {offset = i0*8}
        %r = tile.for(%z) {lower = 0, upper = 7} : f32 {
          ^(%i: index, %acc: f32):
            %v = tile.load(%x, %p, %i) {offset = i0*7 + i1, shape = []} : f32
            %e = arith.exp(%v) : f32
            %o = tile.load(%y, %p, %i) {offset = i0*8 + i1, shape = []} : f32
            %s = arith.add(%o, %e) : f32
            tile.store(%y, %s, %p, %i) {offset = i0*8 + i1 + 1}
            %n = arith.max(%acc, %e) : f32
            tile.yield(%n)
        }
        tile.store(%m, %r, %p) {offset = i0}
        tile.yield()
    }"""
    x = torch.randn(3, 7)
    got, most = launch(kernel, "tensor<3x7xf32>", "tensor<3x8xf32>;tensor<3xf32>", [x], check=True)
    torch.testing.assert_close(got[:, 1:], x.exp().cumsum(1))
    torch.testing.assert_close(most, x.exp().amax(1))


def test_several_accumulators_share_what_they_read(loop_lanes):
    """x @ y, x @ (2 y) and the sum of x in one loop, inside a loop over blocks of rows that carries nothing."""
    kernel = """tile.kernel @k {grid = [2], outputs = 3} {
      ^(%x: buffer<8x6xf32>, %y: buffer<6x4xf32>, %a: buffer<8x4xf32>, %b: buffer<8x4xf32>, %c: buffer<8xf32>):
        %p = tile.program_id() {axis = 0} : index
        %z = arith.constant() {value = 0.0} : f32
        %two = arith.constant() {value = 2.0} : f32
        %t = tile.full(%z) : tile<2x4xf32>
        %s = tile.full(%z) : tile<2x1xf32>
        tile.for {lower = 0, upper = 4, step = 2} {
          ^(%j: index):
            %u, %v, %w = tile.for(%t, %t, %s) {lower = 0, upper = 6, step = 3} : tile<2x4xf32>, tile<2x4xf32>, tile<2x1xf32> {
              ^(%i: index, %f: tile<2x4xf32>, %g: tile<2x4xf32>, %h: tile<2x1xf32>):
                %l = tile.load(%x, %p, %j, %i) {offset = (i0*4 + i1 + t0)*6 + i2 + t1, shape = [2, 3]} : tile<2x3xf32>
                %r = tile.load(%y, %i) {offset = (i0 + t0)*4 + t1, shape = [3, 4]} : tile<3x4xf32>
                %d = arith.mul(%r, %two) : tile<3x4xf32>
                %f1 = tile.dot(%l, %r, %f) : tile<2x4xf32>
                %g1 = tile.dot(%l, %d, %g) : tile<2x4xf32>
                %q = tile.reduce(%l) {axis = 1, kind = "sum"} : tile<2x1xf32>
                %h1 = arith.add(%q, %h) : tile<2x1xf32>
                tile.yield(%f1, %g1, %h1)
            }
            tile.store(%a, %u, %p, %j) {offset = (i0*4 + i1 + t0)*4 + t1}
            tile.store(%b, %v, %p, %j) {offset = (i0*4 + i1 + t0)*4 + t1}
            tile.store(%c, %w, %p, %j) {offset = i0*4 + i1 + t0}
            tile.yield()
        }
        tile.yield()
    }"""
    x, y = torch.randn(8, 6), torch.randn(6, 4)
    got = launch(kernel, "tensor<8x6xf32>;tensor<6x4xf32>", "tensor<8x4xf32>;tensor<8x4xf32>;tensor<8xf32>", [x, y], check=True)
    for g, w in zip(got, (x @ y, 2 * x @ y, x.sum(1))):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


def test_a_large_gemm_takes_seconds():
    a, b = torch.randn(256, 512), torch.randn(512, 256)
    start = time.perf_counter()
    (got,) = launch(gemm("f32", "f32", 32, 32, 32), "tensor<s0xs2xf32>;tensor<s2xs1xf32>", "tensor<s0xs1xf32>", [a, b])
    assert time.perf_counter() - start < 10
    torch.testing.assert_close(got, a @ b, rtol=1e-4, atol=1e-4)
