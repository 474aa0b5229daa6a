"""The layout pass in exact numbers: what copies it leaves in networks of convolutions, and on small graphs the least that any choice of layouts allows."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from aicc.compiler.driver import watching
from aicc.compiler.options import Options
from aicc.compiler.pipelines import pipeline
from aicc.frontend.decompositions import decomposition_table
from aicc.frontend.importer import import_graph
from aicc.ir import Operation, TensorType, Value
from aicc.ir.dialects.tensor import parallel_dims
from aicc.ir.expr import free_symbols
from aicc.ir.passes import PassContext, parse_pipeline, run_pipeline
from aicc.passes.layout import set_type, walk_order
from aicc.passes.structured import constant_values, in_order, is_contraction, is_identity_view
from aicc.passes.tiling.cpu_tiles import is_depthwise
from aicc.passes.tiling.window import find_window
from functorch.compile import aot_module_simplified, make_boxed_func
from models.networks import MobileNetV2, ResNet18
from support.stages import AVX2
from torch import Tensor, nn


def tensor_level(model: nn.Module, x: Tensor, last: str = "") -> Operation:
    """The main function after the tensor stage, or after its pass `last`."""
    made: list[Operation] = []

    def compiler(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        made.append(import_graph(gm, arg_kinds=["param"] * (len(inputs) - 1) + ["input"]))
        return make_boxed_func(gm.forward)

    with torch.no_grad():
        aot_module_simplified(model.eval(), (x,), fw_compiler=compiler, inference_compiler=compiler, decompositions=decomposition_table())
    module, = made
    options = Options(winograd=False)
    for stage in ("graph", "tensor"):
        text = pipeline(stage, AVX2, options)
        if last and stage == "tensor":
            text = text[:text.rindex(f",{last},") + len(last) + 1]
        run_pipeline(module, parse_pipeline(text), PassContext(AVX2))
    return next(op for op in module.body if op.name == "func")


def copies(func: Operation) -> tuple[int, int]:
    """Ops in every call that only move a tensor: to another layout, and into a frame of padding."""
    fixed = constant_values(func)
    moved = [op for op in func.walk() if op.name == "tensor.generic" and is_identity_view(op) and op.operands[0] not in fixed]
    padded = [op for op in moved if op.attributes.get("fills")]
    return len(moved) - len(padded), len(padded)


class Listed(nn.Module):
    """A model whose result comes in a list."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.model(x)]


class UNetBlock(nn.Module):
    """Down, across and up again: two levels with a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(64, 32, 2, 2), nn.Conv2d(64, 32, 3, padding=1)
        self.head = nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.down1(x))
        low = F.relu(self.down2(F.max_pool2d(skip, 2)))
        return self.head(F.relu(self.out(torch.cat([skip, self.up(low)], 1))))


@pytest.mark.parametrize("make,size,layouts,padded", [
    (ResNet18, 224, 0, 17), (MobileNetV2, 224, 0, 1), (UNetBlock, 64, 0, 3),
], ids=["resnet18", "mobilenetv2", "unet"])
def test_copies_left(make: Callable[[], nn.Module], size: int, layouts: int, padded: int) -> None:
    assert copies(tensor_level(Listed(make()), torch.randn(1, 3, size, size), "hoist-invariants")) == (layouts, padded)


class Small(nn.Module):
    """Some ops on earlier results, in random order; channels stay the same."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        pick = random.Random(seed)
        self.plan, self.layers = [], nn.ModuleList()
        for n in range(5):
            kind = pick.choice(["pointwise", "depthwise", "relu", "add", "pool", "scale"])
            layer = {"pointwise": nn.Conv2d(8, 8, 1), "depthwise": nn.Conv2d(8, 8, 3, padding=1, groups=8), "pool": nn.MaxPool2d(3, 1, 1)}.get(kind)
            self.layers.append(layer or nn.Identity())
            self.plan.append((kind, pick.randrange(n + 1), pick.randrange(n + 1)))
        self.returned = sorted({5, pick.randrange(1, 6)})

    def forward(self, x: Tensor) -> list[Tensor]:
        made = [x]
        for (kind, a, b), layer in zip(self.plan, self.layers, strict=True):
            y = made[a]
            made.append({"relu": lambda y=y: (y * 2).exp(), "add": lambda y=y, b=b: y + made[b].exp(),
                         "scale": lambda y=y: y / y.sum(1, keepdim=True)}.get(kind, lambda y=y, f=layer: f(y))())
        return [made[i] for i in self.returned]


def turns(func: Operation) -> int:
    """Accesses across the grain: operands of four dimensions that are not read along the dimension that is contiguous in the op's result, and products
    with a parameter whose output channels are not; a product reads its other operand in any order."""
    fixed, found = constant_values(func), 0
    for op in func.body:
        if op.name != "tensor.generic" or len(parallel_dims(op)) < 3 or all(v in fixed for v in op.operands):
            continue
        assert isinstance(op.result.type, TensorType)
        along = min(range(op.result.type.rank), key=lambda d: (op.result.type.layout[d], -d))  # type: ignore[union-attr]
        read = {s for v, m in zip(op.operands, op["maps"], strict=True) if v not in fixed and m is not None for e in m for s in free_symbols(e)}
        own = {str(e) for v, m in zip(op.operands, op["maps"], strict=True) if v in fixed and m is not None for e in m} - read
        if is_contraction(op) and own:
            found += f"d{along}" not in own
            continue
        for v, m in zip(op.operands, op["maps"], strict=True):
            if v not in fixed and m is not None and isinstance(v.type, TensorType) and v.type.rank == 4:
                order = walk_order(op, v.type, m)
                found += order is not None and order[-1] != along
    return found


def free_values(func: Operation) -> list[Value]:
    """Intermediate tensors whose layout is the pass's to choose."""
    fixed, returned = constant_values(func), set(func.body.terminator.operands)
    return [op.result for op in func.body if op.name == "tensor.generic" and op.result not in fixed and op.result not in returned
            and isinstance(op.result.type, TensorType) and op.result.type.rank == 4]


def test_few_choices_turn_less() -> None:
    """Every intermediate tensor channels-first or channels-last, in all combinations: two of the random graphs could do with a turn less. There a
    depthwise convolution has channels innermost, which makes it several times as fast, between readers and writers that have not."""
    excess = {}
    for seed in range(20):
        func = tensor_level(Small(seed), torch.randn(2, 8, 5, 6), "layout")
        found, values, best = turns(func), free_values(func), 1 << 30
        assert len(values) <= 10
        for orders in product(((0, 1, 2, 3), (0, 2, 3, 1)), repeat=len(values)):
            for v, order in zip(values, orders, strict=True):
                assert isinstance(v.type, TensorType)
                set_type(v, in_order(v.type, list(order)))
            best = min(best, turns(func))
        if found != best:
            excess[seed] = found - best
    assert excess == {5: 1, 18: 1}


def test_depthwise_of_many_channels_stays_in_registers() -> None:
    """Its taps are turned once so that channels are innermost, and a tile of channels keeps its sums for all taps."""
    kernels: list[Operation] = []

    def observe(stage: str, p: Any, module: Operation) -> None:
        if stage == "tile" and p is None:
            kernels[:] = [op.clone() for op in module.body if op.name == "tile.kernel"]
    layer = nn.Sequential(nn.Conv2d(192, 192, 3, padding=1, groups=192, bias=False), nn.BatchNorm2d(192), nn.ReLU6()).eval()
    x = torch.randn(1, 192, 14, 14).to(memory_format=torch.channels_last)
    torch._dynamo.reset()
    with watching(observe), torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend="aicc", options={"cache": False})(x), layer(x))
    (kernel,) = [k for k in kernels if "matmul" in str(k["sym_name"])]
    names = [op.name for op in kernel.walk()]
    loads = [str(op["offset"]) for op in kernel.walk() if op.name == "tile.load"]
    assert "tile.alloca" not in names and loads and not any("t1*" in offset for offset in loads)


def test_every_depthwise_layer_of_a_network_is_a_window() -> None:
    """Channels are innermost on both sides of each: products around them that will be no stream are not turned for one."""
    fused = [op for op in tensor_level(Listed(MobileNetV2()), torch.randn(1, 3, 224, 224)).body if op.name == "tensor.fused"]
    depthwise = [op for op in fused if any(is_contraction(m) and is_depthwise(m) for m in op.body)]
    assert len(depthwise) == 17
    assert not [op["kernel"] for op in depthwise if find_window(op, {}) is None]
