"""Which products a library gets, and that it is told the right thing: descriptions are carried out on CPU memory and compared with eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from aicc import passes  # noqa: F401  (registers them)
from aicc.backends.triton.simulate import SimulatedLibrary
from aicc.compiler.manifest import build_manifest
from aicc.compiler.options import Options
from aicc.compiler.pipelines import STAGES, pipeline
from aicc.frontend.importer import import_graph
from aicc.ir import Operation, Target
from aicc.ir.interpreter import interpret
from aicc.ir.parser import parse_module
from aicc.ir.passes import PassContext, Remark, parse_pipeline, run_pipeline
from aicc.ir.printer import print_op
from aicc.runtime.executor import CompiledGraph
from torch.fx.experimental.proxy_tensor import make_fx

SM90 = Target(kind="cuda", name="sm_90", capability=90, multiprocessors=132, l2=50 << 20)


def lowered(f: Callable[..., Any], *inputs: torch.Tensor, upto: str = "host", always: bool = True, target: Target = SM90,
            dynamic: bool = False, options: Options | None = None) -> tuple[Operation, list[Remark]]:
    gm = make_fx(f, tracing_mode="symbolic" if dynamic else "fake")(*inputs)
    module = import_graph(gm, name="main")
    ctx = PassContext(target)
    for stage in STAGES[:STAGES.index(upto) + 1]:
        text = pipeline(stage, target, options or Options())
        if always:
            text = text.replace(",library,", ",library{always=true},")
        run_pipeline(module, parse_pipeline(text), ctx)
    return module, [r for r in ctx.remarks if r.pass_name == "library"]


def calls(module: Operation) -> list[Operation]:
    return [op for op in module.walk() if op.name in ("tensor.library", "host.library")]


def kernels(module: Operation) -> int:
    return sum(op.name == "tile.kernel" for op in module.walk())


def roles(module: Operation) -> list[tuple[str, ...]]:
    return [tuple(r for r in op["roles"] if r not in ("d", "workspace")) + ((op["shape"]["act"],) if op["shape"]["act"] != "none" else ())
            for op in calls(module)]


def normal(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [torch.randn(s, generator=g).to(dtype) for s in shapes]


def check(f: Callable[..., Any], *inputs: torch.Tensor, expect: list[tuple[str, ...]], dynamic: bool = False) -> Operation:
    """Every product is a call, nothing else is a kernel, and the result is eager's at three levels."""
    tensor, _ = lowered(f, *inputs, upto="tensor", dynamic=dynamic)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 4e-3}[inputs[0].dtype]
    want = f(*[x.double() for x in inputs])
    scale = float(want.abs().max())

    def close(got: torch.Tensor) -> None:
        assert got.shape == want.shape and float((got.double() - want).abs().max()) <= tolerance * scale

    close(interpret(tensor, list(inputs))[0])
    module, _ = lowered(f, *inputs, dynamic=dynamic)
    for made in (tensor, module):
        text = print_op(made)
        assert print_op(parse_module(text)) == text
    assert roles(module) == expect and kernels(module) == 0, str(module)
    if not dynamic:
        manifest = build_manifest(module)
        close(CompiledGraph(manifest, library=SimulatedLibrary(module))(*inputs)[0])
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_plain_products(dtype: torch.dtype) -> None:
    check(lambda a, b: a @ b, *normal((20, 24), (24, 36), dtype=dtype), expect=[("a", "b")])


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("right", [False, True])
def test_transposed_operands(left: bool, right: bool) -> None:
    a, b = normal((24, 20) if left else (20, 24), (36, 24) if right else (24, 36))

    def f(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.t() if left else a) @ (b.t() if right else b)
    module = check(f, a, b, expect=[("a", "b")])
    shape = calls(module)[0]["shape"]
    assert shape["a"] == ((0, 1, 20) if left else (0, 24, 1)) and shape["b"] == ((0, 1, 24) if right else (0, 36, 1))


def test_batches_share_or_repeat_their_operands() -> None:
    check(torch.bmm, *normal((3, 20, 24), (3, 24, 36)), expect=[("a", "b")])
    check(lambda a, b: a @ b.transpose(-1, -2), *normal((2, 3, 20, 24), (2, 3, 36, 24)), expect=[("a", "b")])
    module = check(lambda a, b: a @ b, *normal((2, 3, 20, 24), (24, 36)), expect=[("a", "b")])
    assert calls(module)[0]["shape"]["sizes"] == (1, 120, 36, 24)


def test_a_slice_of_an_operand_is_an_offset() -> None:
    module = check(lambda a, b: a[:, 32:56] @ b[24:48], *normal((20, 64), (100, 36)), expect=[("a", "b")])
    shape = calls(module)[0]["shape"]
    assert (shape["offset_a"], shape["offset_b"], shape["a"]) == (32, 24 * 36, (0, 64, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_layers(dtype: torch.dtype) -> None:
    x, w, bias, other = normal((2, 10, 24), (36, 24), (36,), (2, 10, 36), dtype=dtype)
    check(F.linear, x, w, bias, expect=[("a", "b", "bias")])
    check(lambda x, w, b: F.linear(x, w, b).relu(), x, w, bias, expect=[("a", "b", "bias", "relu")])
    check(lambda x, w, r: F.linear(x, w) + r, x, w, other, expect=[("a", "b", "c")])
    check(lambda x, w, b, r: r + F.linear(x, w, b), x, w, bias, other, expect=[("a", "b", "bias", "c")])
    check(lambda x, w: F.linear(x, w).relu(), x, w, expect=[("a", "b", "relu")])


def test_the_sum_of_two_products_adds_in_the_second_call() -> None:
    check(lambda a, b, c, d: a @ b + c @ d, *normal((20, 24), (24, 36), (20, 28), (28, 36)), expect=[("a", "b"), ("a", "b", "c")])


def test_gradients_of_a_linear_layer() -> None:
    check(lambda g, x: g.t() @ x, *normal((30, 20), (30, 24)), expect=[("a", "b")])
    check(lambda g, w: g @ w, *normal((30, 20), (20, 24)), expect=[("a", "b")])


def test_symbolic_sizes_stay_symbolic() -> None:
    module = check(lambda a, b: a @ b, *normal((20, 24), (24, 36)), expect=[("a", "b")], dynamic=True)
    assert any(not isinstance(s, int) for s in calls(module)[0]["shape"]["sizes"])


@pytest.mark.parametrize(("f", "kept"), [
    (lambda x, w, r: F.gelu(F.linear(x, w)), 1),                         # no GELU of the library is torch's
    (lambda x, w, r: F.linear(x, w).relu() + r, 1),                      # nothing after the activation
    (lambda x, w, r: F.linear(x, w) * r, 1),
    (lambda x, w, r: (F.linear(x, w), F.linear(x, w) + r), 1),           # both values are needed
    (lambda x, w, r: F.linear(x, w) + r[:1], 1),                         # no row for each row
])
def test_other_readers_stay_kernels(f: Callable[..., Any], kept: int) -> None:
    module, _ = lowered(f, *normal((20, 24), (36, 24), (20, 36)))
    assert roles(module)[0][:2] == ("a", "b") and len(calls(module)) == 1 and kernels(module) == kept


def test_a_summand_must_have_the_type_of_the_result() -> None:
    x, w = normal((20, 24), (36, 24), dtype=torch.bfloat16)
    wide, _ = lowered(lambda x, w, b: F.linear(x, w) + b, x, w, torch.randn(36))
    assert roles(wide) == [("a", "b", "bias")] and calls(wide)[0]["shape"]["types"]["d"] == "f32" and not kernels(wide)
    narrow, _ = lowered(lambda x, w, b: F.linear(x, w) + b, *normal((20, 24), (36, 24)), torch.randn(36).bfloat16())
    assert calls(narrow)[0]["shape"]["types"]["bias"] == "f32" and kernels(narrow) == 1, "a kernel converts it"


def test_products_that_no_library_can_read_are_generated() -> None:
    g = normal((20, 24), (24, 36))
    for f, why in ((lambda a, b: a[:, ::2] @ b[:12], "contiguous neither"), (lambda a, b: (a.long() @ b.long()).float(), None),
                   (lambda a, b: torch.einsum("bshd,bthd->bhst", a, b), "fixed strides")):
        inputs = normal((2, 8, 3, 16), (2, 8, 3, 16)) if why == "fixed strides" else g
        module, remarks = lowered(f, *inputs)
        assert not calls(module) and kernels(module) >= 1
        assert why is None or any(why in r.message for r in remarks), [r.message for r in remarks]


def test_attention_is_left_to_stream() -> None:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.softmax(q @ k.transpose(-1, -2), -1) @ v
    shape = (2, 16, 2048, 128)
    module, remarks = lowered(attention, *(torch.empty(shape, dtype=torch.bfloat16),) * 3, always=False, upto="tensor")
    assert not calls(module) and sum("part of attention" in r.message for r in remarks) == 2


@pytest.mark.parametrize(("m", "k", "n", "dtype", "library"), [
    (4096, 4096, 4096, torch.bfloat16, True), (4096, 4096, 4096, torch.float32, True), (16, 4096, 4096, torch.bfloat16, False),
    (1, 4096, 11008, torch.bfloat16, False), (4096, 768, 768, torch.bfloat16, False), (128, 768, 768, torch.bfloat16, False), (64, 64, 64, torch.float32, False), (2048, 4096, 11008, torch.bfloat16, True)])
def test_large_products_go_to_the_library_and_skinny_ones_do_not(m: int, k: int, n: int, dtype: torch.dtype, library: bool) -> None:
    module, remarks = lowered(lambda a, b: a @ b, torch.empty(m, k, dtype=dtype), torch.empty(k, n, dtype=dtype), always=False, upto="tensor")
    assert bool(calls(module)) == library
    assert any(("by cuBLASLt" if library else "generated") in r.message for r in remarks)


def test_a_cheap_reader_that_would_fuse_counts() -> None:
    m, k, n = 8192, 256, 4096  # short sums: writing and reading the result once more costs as much as the product
    inputs = torch.empty(m, k, dtype=torch.bfloat16), torch.empty(k, n, dtype=torch.bfloat16)
    plain, _ = lowered(lambda a, b: a @ b, *inputs, always=False, upto="tensor")
    fused, remarks = lowered(lambda a, b: (a @ b).abs(), *inputs, always=False, upto="tensor")
    assert calls(plain) and not calls(fused), [r.message for r in remarks]


def test_replayed_launches_cost_the_host_nothing() -> None:
    inputs = torch.empty(512, 3072, dtype=torch.bfloat16), torch.empty(3072, 768, dtype=torch.bfloat16)
    for cudagraphs in (False, True):
        module, _ = lowered(lambda a, b: a @ b, *inputs, always=False, upto="tensor", options=Options(cudagraphs=cudagraphs))
        assert bool(calls(module)) == cudagraphs


def test_programs_that_keep_the_device_busy_hide_the_host() -> None:
    """A product that the library computes faster, but whose call takes the host longer than the device, is the library's where others are long."""
    x, w, a, b = (torch.empty(s, dtype=torch.bfloat16) for s in ((512, 3072), (3072, 768), (4096, 4096), (4096, 4096)))
    alone, _ = lowered(lambda x, w: x @ w, x, w, always=False, upto="tensor")
    among, remarks = lowered(lambda x, w, a, b: (x @ w, a @ b), x, w, a, b, always=False, upto="tensor")
    assert not calls(alone) and len(calls(among)) == 2, [r.message for r in remarks]


def test_a_heavy_epilogue_is_better_off_alone() -> None:
    inputs = torch.empty(4096, 768, dtype=torch.bfloat16), torch.empty(768, 3072, dtype=torch.bfloat16)
    module, _ = lowered(lambda a, b: F.gelu(a @ b), *inputs, always=False, upto="tensor")
    assert calls(module)


def test_float32_is_exact_unless_the_target_says_tf32() -> None:
    inputs = normal((20, 24), (24, 36))
    exact, _ = lowered(lambda a, b: a @ b, *inputs)
    loose, _ = lowered(lambda a, b: a @ b, *inputs, target=Target(**{**vars(SM90), "features": ("tf32",)}))
    assert [calls(x)[0]["shape"]["compute"] for x in (exact, loose)] == ["f32", "tf32"]


def test_emulated_casts_keep_every_rounding() -> None:
    x, w, bias = normal((20, 24), (36, 24), (36,), dtype=torch.bfloat16)
    module, _ = lowered(lambda x, w, b: F.linear(x, w) + b, x, w, bias, always=False, options=Options(emulate_precision_casts=True), upto="tensor")
    assert not any("bias" in op["roles"] for op in calls(module))


def test_old_and_other_targets_have_no_library() -> None:
    big = torch.empty(4096, 4096)
    old = Target(kind="cuda", name="sm_75", capability=75, multiprocessors=40)
    module, remarks = lowered(lambda a, b: a @ b, big, big, always=False, target=old, upto="tensor")
    assert not calls(module) and any("no library" in r.message for r in remarks)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_chains_of_small_products_compile(count: int) -> None:
    """Two of them stream through one kernel; a third one cannot share the second."""
    def f(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        for w in weights:
            x = torch.tanh(x @ w)
        return x
    x, *weights = normal((33, 65), *[(65, 65)] * count)
    module, _ = lowered(f, x, *weights, always=False, upto="tensor")
    torch.testing.assert_close(interpret(module, [x, *weights])[0], f(x, *weights), rtol=1e-4, atol=1e-4)


def test_an_operand_in_another_layout_is_copied() -> None:
    """Convolutions give channels-last tensors, which are settled after the library was chosen: flattened, they are no matrix any more."""
    def f(x: torch.Tensor, w: torch.Tensor, m: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.relu(F.conv2d(x, w, padding=1)).flatten(1), m, bias)
    inputs = normal((20, 3, 4, 4), (8, 3, 3, 3), (48, 128), (48,))
    module = import_graph(make_fx(f, tracing_mode="fake")(*inputs), name="main", arg_kinds=["input", "param", "param", "param"])
    ctx = PassContext(SM90)
    for stage in STAGES:
        run_pipeline(module, parse_pipeline(pipeline(stage, SM90, Options()).replace(",library,", ",library{always=true},")), ctx)
        if stage == "tile":
            torch.testing.assert_close(interpret(module, inputs)[0], f(*inputs), rtol=1e-4, atol=1e-4)
    assert any("1 operands copied" in r.message for r in ctx.remarks)
    assert calls(module)[0]["shape"]["a"] == (0, 128, 1)


def test_moved_heads_are_copied_for_the_gradient_of_a_weight() -> None:
    """[b, h, s, d] summed over b and s is no matrix in memory and contiguous along what is not summed: copied; along d it is read as it is."""
    def weight_gradient(x: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        return heads.transpose(1, 2).reshape(4096, 1024).t() @ x

    def input_gradient(w: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        return heads.transpose(1, 2).reshape(4096, 1024) @ w
    x, heads, w = (torch.empty(s, dtype=torch.bfloat16, device="meta") for s in ((4096, 1024), (4, 16, 1024, 64), (1024, 1024)))
    module, remarks = lowered(weight_gradient, x, heads, always=False)
    assert len(calls(module)) == 1
    assert any("copied into its order" in r.message for r in remarks)
    module, _ = lowered(input_gradient, w, heads, always=False)
    assert not calls(module)
    small = [torch.randn(s).to(torch.bfloat16) for s in ((64, 32), (2, 4, 32, 8))]

    def same(x: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        return heads.transpose(1, 2).reshape(64, 32).t() @ x
    module, _ = lowered(same, *small, upto="tensor", always=False)
    torch.testing.assert_close(interpret(module, small)[0], same(*small))
