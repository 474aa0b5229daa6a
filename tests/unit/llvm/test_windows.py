"""Depthwise convolutions in register tiles (`passes/tiling/window.py`), against float64: windows of every kind over ragged sizes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from aicc.backends.llvm import host_target, make_target
from aicc.compiler.driver import watching
from aicc.ir import Operation
from aicc.passes.tiling.window_tiles import Shape, window_candidates, window_tile
from torch import nn

HOST = frozenset(host_target().features)
FEATURES = {"host": HOST, "generic": frozenset()}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def run(model: nn.Module, inputs: Sequence[torch.Tensor], features: frozenset[str] = HOST, dynamic: bool = False) -> list[Operation]:
    """Compares with float64, for all inputs with one compiled program if `dynamic`; returns the kernels."""
    kernels: list[Operation] = []

    def observe(stage: str, p: object, module: Operation) -> None:
        if stage == "tile" and p is None:
            kernels[:] = [op.clone() for op in module.body if op.name == "tile.kernel"]
    torch._dynamo.reset()
    with torch.no_grad(), watching(observe):
        compiled = torch.compile(model, backend="aicc", dynamic=dynamic, options={"features": sorted(features)})
        for x in inputs:
            truth = model.double()(x.double())
            model.float()
            for _ in range(2):  # the second result lies in used memory
                found = compiled(x)
                torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=2e-6 * truth.abs().max().item())
                found.fill_(float("nan"))
                del found
    return [k for k in kernels if "matmul" in str(k["sym_name"])]


def is_in_registers(kernel: Operation) -> bool:
    """No access is masked, the sums never go to memory, and at least one tile has several positions."""
    ops = list(kernel.walk())
    accesses = [op for op in ops if op.name in ("tile.load", "tile.store")]
    tiles = [op.result.type.shape for op in ops if op.name in ("arith.fma", "arith.add") and hasattr(op.result.type, "shape")]
    return (not any(op.attributes.get("mask") or op.attributes.get("mask_low") for op in accesses) and max(t[0] for t in tiles) > 1
            and not any(op.name in ("tile.alloca", "tile.reduce") for op in ops))


CASES = {  # channels, kernel, stride, padding, dilation, sizes
    "ragged": (37, (3, 3), (1, 1), (1, 1), (1, 1), (13, 11)),
    "fewer than a vector": (5, (3, 3), (1, 1), (1, 1), (1, 1), (9, 10)),
    "stride two": (144, (3, 3), (2, 2), (1, 1), (1, 1), (14, 15)),
    "five": (40, (5, 5), (2, 1), (2, 2), (1, 1), (11, 19)),
    "seven": (16, (7, 7), (1, 1), (3, 3), (1, 1), (12, 21)),
    "wider than the image": (16, (7, 7), (1, 1), (3, 3), (1, 1), (3, 4)),
    "dilated": (24, (3, 3), (1, 2), (2, 3), (2, 3), (12, 23)),
    "gaps": (24, (3, 3), (3, 5), (0, 0), (2, 2), (12, 23)),
    "no padding": (24, (3, 2), (1, 1), (0, 0), (1, 1), (8, 17)),
    "more padding than taps": (24, (3, 3), (2, 2), (5, 4), (1, 1), (6, 9)),
    "a row": (24, (1, 5), (1, 1), (0, 2), (1, 1), (4, 15)),
    "a column": (24, (5, 1), (1, 1), (2, 0), (1, 1), (9, 15)),
    "one position": (24, (4, 4), (1, 1), (0, 0), (1, 1), (4, 4)),
    "sequence": (20, (5,), (2,), (2,), (1,), (35,)),
    "volume": (12, (3, 3, 3), (1, 2, 1), (1, 1, 1), (1, 1, 1), (4, 7, 12)),
}


def layer(case: str) -> tuple[nn.Module, torch.Tensor]:
    """A depthwise convolution between two pointwise ones, which put channels innermost, and an input."""
    channels, kernel, stride, padding, dilation, sizes = CASES[case]
    torch.manual_seed(0)
    convolution = CONVOLUTIONS[len(kernel)]
    model = nn.Sequential(convolution(3, channels, 1), nn.ReLU6(), convolution(channels, channels, kernel, stride, padding, dilation, groups=channels),
                          nn.SiLU(), convolution(channels, 6, 1))
    return model.eval(), torch.randn(2, 3, *sizes)


@pytest.mark.product
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case: str, features: str) -> None:
    model, x = layer(case)
    run(model, [x], FEATURES[features])


@pytest.mark.parametrize("case", ["ragged", "stride two", "seven", "dilated", "sequence", "volume"])
def test_in_registers(case: str) -> None:
    if not host_target().multiplies_and_adds:
        pytest.skip("told from products by its multiply-adds")
    model, x = layer(case)
    (kernel,) = [k for k in run(model, [x]) if any(op.name == "arith.fma" for op in k.walk())]
    assert is_in_registers(kernel)


class Block(nn.Module):
    """Of ConvNeXt (Liu et al. 2022): a window on an image with channels outermost, a norm and two layers along channels, and the image added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.window, self.norm = nn.Conv2d(channels, channels, 7, padding=3, groups=channels), nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.window(x).permute(0, 2, 3, 1))
        return x + self.down(nn.functional.gelu(self.up(y))).permute(0, 3, 1, 2)


@pytest.mark.parametrize("model", [nn.Conv2d(24, 24, 5, padding=2, groups=24), Block(24), nn.Sequential(Block(24), Block(24))])
def test_channels_outermost(model: nn.Module) -> None:
    """An image that lies so is turned first, and a result that is wanted so after: the window itself has channels innermost."""
    if not host_target().multiplies_and_adds:
        pytest.skip("told from products by its multiply-adds")
    torch.manual_seed(0)
    kernels = [k for k in run(model.eval(), [torch.randn(2, 24, 13, 17)]) if any(op.name == "arith.fma" for op in k.walk())]
    assert kernels and all(is_in_registers(k) for k in kernels)


def test_gradients() -> None:
    """The window's own gradients, and those through it, with the image turned for the forward pass."""
    torch.manual_seed(0)
    model, x = Block(16), torch.randn(2, 16, 9, 10)
    truth = torch.autograd.grad(model.double()(x.double()).square().sum(), list(model.parameters()))
    model.float()
    torch._dynamo.reset()
    found = torch.autograd.grad(torch.compile(model, backend="aicc")(x).square().sum(), list(model.parameters()))
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def test_sizes_unknown_at_compile_time() -> None:
    model, _ = layer("seven")
    run(model, [torch.randn(2, 3, 12, 21), torch.randn(3, 3, 9, 30), torch.randn(1, 3, 2, 3)], dynamic=True)


def test_the_end_of_a_row_sums_as_its_middle_does() -> None:
    """One value everywhere in the image gives every position with all taps inside the same bits, and the tile does not matter."""
    torch.manual_seed(0)
    model = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False).eval()
    x = torch.randn(1, 24, 1, 1).expand(1, 24, 6, 29).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        y = torch.compile(model, backend="aicc")(x)
    middle = y[:, :, 1:-1, 1:-1]
    assert torch.equal(middle, middle[:, :, :1, :1].expand_as(middle))


def test_tiles_fit_the_registers() -> None:
    """Sums, a tap and what is read again: the tile of a 3 x 3 window on 16 registers has seven positions, and none uses the last register."""
    avx2 = make_target("x86_64-unknown-linux-gnu", features=["avx2", "fma"])
    assert window_tile(avx2, Shape(54, 144, 3, 3, 1, 1)) == (7, 8)
    assert window_tile(avx2, Shape(5, 960, 3, 3, 1, 1)) == (5, 8), "no more positions than there are"
    assert window_tile(avx2, Shape(27, 40, 5, 5, 2, 1))[0] < 7, "with stride two, positions of two kinds wait for their next tap"
    for target in (avx2, make_target("x86_64-unknown-linux-gnu", features=["avx512f"]), make_target("aarch64-unknown-linux-gnu", features=["neon"])):
        for shape in (Shape(54, 144, 3, 3, 1, 1), Shape(27, 40, 5, 5, 2, 1), Shape(0, 96, 7, 7, 1, 2)):
            for rows, columns in window_candidates(target, shape):
                vectors = columns // target.lanes(32)
                assert vectors * (rows + 2) < target.vector_registers
