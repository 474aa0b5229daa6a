"""What whole models become on GPUs: which ops share a kernel, and what crosses memory in which type."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from aicc.compiler.dynamo import aot_backend
from aicc.compiler.options import Options
from aicc.compiler.pipelines import STAGES, pipeline
from aicc.frontend.importer import import_graph
from aicc.ir import BufferType, Operation, element_type
from aicc.ir.passes import PassContext, parse_pipeline, run_pipeline
from aicc.tests.gpu.cases import SM90
from torch import Tensor, nn
from torch._functorch.aot_autograd import make_boxed_func

BF16 = torch.bfloat16


def lowered(f: Any, *inputs: Tensor, backward: bool = False) -> list[Operation]:
    """The modules of `f`'s graphs at the tile level, partitioned as aicc's backend does."""
    found: list[Operation] = []

    def compiler(role: str) -> Any:
        def compile_one(gm: torch.fx.GraphModule, _: Any) -> Any:
            module = import_graph(gm)
            for stage in STAGES[:STAGES.index("tile") + 1]:
                run_pipeline(module, parse_pipeline(pipeline(stage, SM90, Options())), PassContext(SM90))
            found.append(module)
            return make_boxed_func(gm.forward)
        return compile_one

    torch._dynamo.reset()
    out = torch.compile(f, backend=aot_backend(compiler), dynamic=False)(*inputs)
    if backward:
        out.float().sum().backward()
    return found


def launches(module: Operation) -> list[str]:
    return [op["kernel"].name for op in module.walk() if op.name == "tile.launch"]


def wide_buffers(module: Operation, elements: int) -> list[str]:
    """Kernels that read or write at least so many float32 numbers in one tensor."""
    return [op["sym_name"] for op in module.body if op.name == "tile.kernel" and any(
        isinstance(a.type, BufferType) and element_type(a.type).name == "f32" and a.type.numel >= elements for a in op.body.args)]


def rand(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape).to(BF16).requires_grad_(grad)


def test_a_product_that_norms_read_is_stored_in_16_bits() -> None:
    """Its sum is float32; two kernels pass it on."""
    def f(x: Tensor, w: Tensor, n: Tensor) -> Tensor:
        h = x @ w
        return F.rms_norm(h, (256,), n)

    (module,) = lowered(f, rand(64, 320), rand(320, 256), rand(256))
    assert len(launches(module)) == 2 and not wide_buffers(module, 64 * 256)


def test_a_pointwise_op_of_channels_joins_the_convolution_and_not_their_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()).to(BF16).eval()
    with torch.no_grad():
        (module,) = lowered(model, rand(2, 16, 12, 12))
    first, second = launches(module)
    assert "matmul" in second and "max" in second and "matmul" not in first and not wide_buffers(module, 2 * 32 * 144)


def last(*shape: int) -> Tensor:
    return rand(*shape).to(memory_format=torch.channels_last).requires_grad_()


def made_of_size(module: Operation, elements: int) -> int:
    """Tensors of so many elements that launches write."""
    return sum(r.type.numel == elements for op in module.walk() if op.name == "tile.launch" for r in op.results)  # type: ignore[attr-defined]


def test_the_mask_of_a_gradient_that_two_kernels_read_is_not_stored() -> None:
    """ReLU's gradient, for a batch norm's statistics and for the norm's input: to read both operands twice is less than to write it and read it
    twice."""
    def f(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, None, None, w, b, training=True))

    _, module = lowered(f, last(16, 64, 32, 32), rand(64, grad=True), rand(64, grad=True), backward=True)
    assert made_of_size(module, 16 * 64 * 32 * 32) == 1 and len(launches(module)) == 3


def test_a_gradient_that_a_scatter_and_a_sum_read_compiles() -> None:
    """An embedding's gradient, where a pointwise op has readers of another kind than loops."""
    def f(t: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.tanh(F.embedding(t, w) + b)

    lowered(f, torch.randint(0, 500, (64, 32)), rand(500, 64, grad=True), rand(64, grad=True), backward=True)


def test_a_masked_gradient_that_also_goes_to_a_shortcut_is_not_stored() -> None:
    def f(x: Tensor, w: Tensor, b: Tensor, s: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, None, None, w, b, training=True) + s * s)

    inputs = last(16, 64, 32, 32), rand(64, grad=True), rand(64, grad=True), last(16, 64, 32, 32)
    _, module = lowered(f, *inputs, backward=True)
    assert made_of_size(module, 16 * 64 * 32 * 32) == 2 and len(launches(module)) == 3


def test_a_scatter_lies_as_what_it_adds() -> None:
    """Channels last: the scatter's additions and what reads them walk memory along channels."""
    def f(x: Tensor, i: Tensor) -> Tensor:
        return torch.zeros(4, 64, 3136).scatter_add(2, i.flatten(2), x.flatten(2).float()) * 2

    places = torch.zeros(4, 64, 28, 28, dtype=torch.int64).to(memory_format=torch.channels_last)
    with torch.no_grad():
        (module,) = lowered(f, last(4, 64, 28, 28), places)
    (scatter,) = [op for op in module.walk() if op.name == "tile.launch" and "scatter" in op["kernel"].name]
    assert scatter.results[0].type.layout == (64 * 3136, 1, 64)  # type: ignore[attr-defined]
    kernel = next(op for op in module.body if op.name == "tile.kernel" and op["sym_name"] == scatter["kernel"].name)
    (store,) = [op for op in kernel.walk() if op.name == "tile.store"]
    assert store["atomic"] == "add" and str(store["offset"]).endswith("+ t1")


def test_sizes_of_one_do_not_part_a_product_from_its_readers() -> None:
    (module,) = lowered(lambda x, w, b: F.gelu(F.linear(x, w, b)), rand(1, 64, 320), rand(256, 320), rand(256))
    assert len(launches(module)) == 1


def test_the_parts_of_a_long_product_of_few_rows_are_added_up_by_the_norm() -> None:
    """As in an encoder's second linear layer at batch 1: too few tiles for the device, so the sum is taken in parts, and the library is not asked."""
    def f(x: Tensor, w: Tensor, b: Tensor, r: Tensor, n: Tensor) -> Tensor:
        return F.rms_norm(F.linear(x, w, b) + r, (768,), n)

    (module,) = lowered(f, rand(128, 3072), rand(768, 3072), rand(768), rand(128, 768), rand(768))
    assert len(launches(module)) == 2 and not any(op.name == "tensor.library" for op in module.walk())
    parts, _ = [op for op in module.body if op.name == "tile.kernel"]
    assert math.prod(parts["grid"]) > 64


def test_the_backward_of_a_norm_reads_its_gradient_twice() -> None:
    """Once along rows, for the input's gradient, and once along columns, for the weights'."""
    def f(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
        return F.layer_norm(x, (256,), w, b) @ v

    inputs = rand(2048, 256, grad=True), rand(256, grad=True), rand(256, grad=True), rand(256, 256, grad=True)
    _, module = lowered(f, *inputs, backward=True)
    heavy = [op for op in module.body if op.name == "tile.kernel" and not any(o.name == "tile.dot" for o in op.walk()) and any(
        isinstance(a.type, BufferType) and a.type.numel >= 2048 * 256 for a in op.body.args)]
    assert len(heavy) == 2 and not wide_buffers(module, 2048 * 256)


def test_the_logits_of_a_large_vocabulary_are_saved_as_they_are() -> None:
    """Neither direction holds them in float32: log-probabilities are computed again."""
    def f(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy((x @ w).float(), labels)

    forward, backward = lowered(f, rand(64, 128, grad=True), rand(128, 8192, grad=True), torch.randint(0, 8192, (64,)), backward=True)
    assert not wide_buffers(forward, 64 * 8192) and not wide_buffers(backward, 64 * 8192)
    assert not any("scatter" in name for name in launches(backward))
