"""Details of lowerings that a mutation check found untested (`make mutation`)."""

from __future__ import annotations

import pytest
import torch
from aicc.compiler.bisect.evaluate import run_module
from aicc.ir import DTYPES, Builder, Operation, TensorType, make_func, make_module, sym
from aicc.ir.expr import evaluate
from aicc.ir.parser import parse_module
from aicc.ir.passes import PassContext, parse_pipeline, run_pipeline
from aicc.ir.types import TileType
from support.stages import AVX2, CUDA, capture, check_levels, lowered

S0 = sym("s0")


@pytest.mark.parametrize(("start", "step"), [(1, 1), (1, 3), (0, 1), (-1, 2)])
def test_progressions_from_one(start: int, step: int) -> None:
    module = parse_module(f"""module {{
      func @main {{
        ^():
          %x = graph.iota() {{start = {start}, step = {step}}} : tensor<5xi64>
          return(%x)
      }}
    }}""")
    run_pipeline(module, parse_pipeline("decompose"), PassContext())
    assert torch.equal(run_module(module, [])[0], start + step * torch.arange(5))


def test_scattered_sums_of_16_bit_floats_are_accumulated_in_float32() -> None:
    """300 ones: bfloat16 alone would stop at 256."""
    module = parse_module("""module {
      func @main {
        ^(%x: tensor<2xbf16>, %at: tensor<300xi64>, %ones: tensor<300xbf16>):
          %y = graph.scatter(%x, %at, %ones) {dim = 0, reduce = "add"} : tensor<2xbf16>
          return(%y)
      }
    }""")
    run_pipeline(module, parse_pipeline("decompose"), PassContext())
    arguments = [torch.zeros(2, dtype=torch.bfloat16), torch.ones(300, dtype=torch.int64), torch.ones(300, dtype=torch.bfloat16)]
    assert run_module(module, arguments)[0].tolist() == [0, 300]
    (scatter,) = (op for op in module.walk() if op.name == "tensor.scatter")
    assert scatter.result.type == TensorType((2,), DTYPES["f32"])


@pytest.mark.parametrize("target", [AVX2, CUDA], ids=lambda t: t.kind)
def test_the_columns_of_a_scatter_run_side_by_side(target: object) -> None:
    """Rows are scattered, so that they must stay in order; columns need not."""
    program = capture(lambda x, at, v: x.index_add(0, at, v), (torch.randn(10, 600), torch.tensor([1, 1, 7]), torch.randn(3, 600)))
    kernels = [op for op in lowered(program, target).body if op.name == "tile.kernel" and any(o.name == "tile.load" for o in op.walk())]  # type: ignore[arg-type]
    programs = max(torch.Size([int(g) for g in k["grid"]]).numel() for k in kernels)
    assert programs > 1, [k["grid"] for k in kernels]


@pytest.mark.parametrize("sizes", [(5, 300), (700,), (33, 65)])
def test_tiles_of_gpu_kernels_are_powers_of_two(sizes: tuple[int, ...]) -> None:
    """Triton has no others."""
    program = capture(lambda x: (x.softmax(-1), x.exp().cumsum(-1), x.sum() + x.amax(0), x.index_add(0, torch.tensor([1, 1]), x[:2])),
                      (torch.randn(*sizes),))
    tiles = {v.type for op in lowered(program, CUDA).walk() for v in op.results if isinstance(v.type, TileType)}
    assert tiles and all(n & (n - 1) == 0 for t in tiles for n in t.shape), tiles


def test_a_diagonal_is_scattered_in_place_once() -> None:
    """Both indices are the one iteration dimension: only one of them may take it as its own."""
    module = parse_module("""module {level = "tensor"} {
      func @main {
        ^(%x: tensor<9x9xf32>, %v: tensor<9xf32>):
          %y = tensor.scatter(%x, %v) {dims = [9], maps = [[d0]], combine = "add"} : tensor<9x9xf32> {
            ^(%a: f32):
              %i = tensor.index() {dim = 0} : i64
              tensor.yield(%a, %i, %i)
          }
          return(%y)
      }
    }""")
    x, v = torch.randn(9, 9), torch.randn(9)
    run_pipeline(module, parse_pipeline("fuse,tile"), PassContext(AVX2))
    assert torch.equal(run_module(module, [x, v], check=True)[0], x + v.diag())


def _chain(sizes: list[object]) -> Operation:
    """A chain of kernels, each of which reads what the one before it wrote: buffers of `sizes` live two at a time."""
    module, top = make_module("tensor")
    first = TensorType((S0,), DTYPES["f32"])
    func, body = make_func(top, "main", [first], ["x"], symbols={"s0": (2, None)}, symbol_sources={"s0": (0, 0)})
    b = Builder.at_end(body)
    value = body.args[0]
    for size in sizes:
        value = b.generic([value], [(sym("d0") % S0,)], [size], lambda i, a: i.arith("add", a, 1.0)).result
    last = b.generic([value], [(sym("d0"),)], [S0], lambda i, a: i.arith("mul", a, 2.0)).result
    b.create("return", [last])
    func.attributes["result_attrs"] = ({"kind": "tensor"},)
    return module


def test_multiples_of_one_symbol_are_packed_together() -> None:
    """128*s0 takes the place of two dead buffers of 64*s0: in units of s0, not as sizes of their own."""
    module = _chain([64 * S0, 64 * S0, 32 * S0, 128 * S0])
    run_pipeline(module, parse_pipeline("fuse{max-members=1},tile,schedule,bufferize,plan-memory"), PassContext(AVX2))
    (func,) = (op for op in module.body if op.name == "func")
    arena, bound = (evaluate(func["stats"][k], {"s0": 64}) for k in ("arena_bytes", "lower_bound"))
    assert arena == bound == 160 * 64 * 4


@pytest.mark.parametrize("dtype", ["i8", "i16", "i32", "i64", "u8"])
def test_padding_never_wins_a_maximum_of_integers(dtype: str) -> None:
    """All elements are the lowest but one: what lies in the padding must be lower still."""
    kind = {"i8": torch.int8, "i16": torch.int16, "i32": torch.int32, "i64": torch.int64, "u8": torch.uint8}[dtype]
    x = torch.full((1, 1, 4, 4), torch.iinfo(kind).min + 1, dtype=kind)
    module = parse_module(f"""module {{
      func @main {{
        ^(%x: tensor<1x1x4x4x{dtype}>):
          %y, %at = graph.max_pool(%x) {{kernel = [3, 3], stride = [1, 1], padding = [1, 1], dilation = [1, 1]}} : tensor<1x1x4x4x{dtype}>, tensor<1x1x4x4xi64>
          return(%y)
      }}
    }}""")
    run_pipeline(module, parse_pipeline("decompose"), PassContext())
    assert torch.equal(run_module(module, [x])[0], x)


@pytest.mark.parametrize("target", [AVX2, CUDA], ids=lambda t: t.kind)
@pytest.mark.parametrize("rows", [1, 5])
def test_choices_by_position_behind_a_product(target: object, rows: int) -> None:
    """The position decides some of them while the kernel is made (a single row is row 0), and others at every element."""
    def f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        h, column, row = x @ w, torch.arange(16), torch.arange(x.shape[0])[:, None]
        h = torch.where(column == 3, h, h * 2)
        h = torch.where(row != 0, h, h + 1)
        return torch.where(column * row <= 3, h, -h) + torch.where(row == 0, 0.5, h)
    program = capture(f, (torch.randn(rows, 8), torch.randn(8, 16)))
    check_levels(program, target, levels=["tile"])  # type: ignore[arg-type]
