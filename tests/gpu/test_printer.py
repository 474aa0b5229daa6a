"""The text of kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from aicc.backends.triton import may_begin
from aicc.backends.triton.printer import KernelSource, print_kernel
from aicc.ir import Operation
from aicc.ir.core import IRError
from aicc.ir.parser import parse_module as parse

from .cases import CASES, SM80, SM90, capture


def kernels_of(name: str) -> list[Operation]:
    case = CASES[name]
    found: list[Operation] = []

    def run(module: Operation, gm: torch.fx.GraphModule, args: list[Any]) -> Any:
        found.extend(op for op in module.body if op.name == "tile.kernel")
        return gm.forward(*args)

    function, inputs = case.build()
    capture(function, inputs, run, dynamic=case.dynamic, backward=case.backward)
    return found


@pytest.mark.parametrize(("programs", "early"), [(16 * 132, True), (16 * 132 + 1, False), (32000, False)])
def test_kernels_of_many_programs_start_when_the_one_in_front_has_ended(programs: int, early: bool) -> None:
    (kernel,) = kernels_of("pointwise")
    kernel.attributes["grid"] = (programs,)
    assert may_begin(kernel, SM90) == early and not may_begin(kernel, SM80)
    (sums,) = kernels_of("one_row")
    sums.attributes["grid"] = (programs,)
    assert may_begin(sums, SM90), "programs that run through a loop"


def text_of(source: str) -> KernelSource:
    module = parse(source)
    return print_kernel(next(op for op in module.walk() if op.name == "tile.kernel"))


COPY = """module {{
  tile.kernel @k {{grid = [{grid}], symbols = [{symbols}], outputs = 1}} {{
    ^(%x: buffer<{shape}xf32>, %y: buffer<{shape}xf32>):
      %p = tile.program_id() {{axis = 0}} : index
      %v = tile.load(%x, %p) {{offset = i0*64 + t0, shape = [64], mask = [[i0*64 + t0, {size}]], other = 0.0}} : tile<64xf32>
      %e = arith.{op}(%v) : tile<64xf32>
      tile.store(%y, %e, %p) {{offset = i0*64 + t0, mask = [[i0*64 + t0, {size}]]}}
      tile.yield()
  }}
}}"""


def test_pointwise_text() -> None:
    source = text_of(COPY.format(grid="2", symbols="", shape="100", size="100", op="exp"))
    assert source.signature == {"x": "*fp32", "y": "*fp32"}
    assert (
        source.text.split("@triton.jit\n")[1]
        == """def k(x, y):
    t0_1d_64 = tl.arange(0, 64)
    p = tl.program_id(0)
    v = tl.load(x + (p*64 + t0_1d_64), mask=(p*64 + t0_1d_64 < 100), other=0.0)
    e = libdevice.exp(v)
    tl.store(y + (p*64 + t0_1d_64), e, mask=(p*64 + t0_1d_64 < 100))
"""
    )


def test_symbolic_sizes_are_64_bit_arguments() -> None:
    source = text_of(COPY.format(grid="((s0 + 63) // 64)", symbols='"s0"', shape="s0", size="s0", op="neg"))
    assert source.signature == {"x": "*fp32", "y": "*fp32", "s0": "i64"}
    assert "tl.program_id(0).to(tl.int64)" in source.text and "< s0" in source.text
    assert "libdevice" not in source.text  # nothing is imported that is not used


def test_names_of_the_language_are_not_taken() -> None:
    source = text_of(COPY.format(grid="2", symbols="", shape="100", size="100", op="digamma"))
    assert "def digamma(x):" in source.text and "e = digamma(v)" in source.text


def test_a_kernel_is_not_named_like_the_helper_that_it_calls() -> None:
    text = text_of(COPY.format(grid="2", symbols="", shape="100", size="100", op="sigmoid").replace("@k ", "@sigmoid ")).text
    assert "def sigmoid(" in text and "def _sigmoid(" in text


def test_a_kernel_is_not_named_like_a_keyword() -> None:
    """`x & 6` is a kernel of one `bitand`."""
    text = text_of(COPY.format(grid="2", symbols="", shape="100", size="100", op="sigmoid").replace("@k ", "@and ")).text
    assert "def _and(" in text
    compile(text, "kernel", "exec")


@pytest.mark.parametrize("name", ["softmax", "nan"])
def test_maxima_propagate_nan(name: str) -> None:
    text = "".join(print_kernel(k).text for k in kernels_of(name))
    assert "tl.PropagateNan.ALL" in text and "max_nan" in text and "tl.max(" not in text


def test_float32_products_are_exact() -> None:
    (kernel,) = kernels_of("gemm")
    assert 'input_precision="ieee"' in print_kernel(kernel).text


def test_bfloat16_goes_to_the_dot_unwidened() -> None:
    (kernel,) = kernels_of("gemm_bf16")
    text = print_kernel(kernel).text
    dot = next(line for line in text.splitlines() if "tl.dot(" in line)
    assert "out_dtype=tl.float32" in dot and ".to(tl.float32)" not in text.split("tl.dot(")[0]


def test_checked_indices_set_the_error_word() -> None:
    (kernel,) = kernels_of("embedding")
    source = print_kernel(kernel)
    assert list(source.signature)[-1] == "err" and source.checks and "tl.store(err" in source.text


def test_barrier_between_a_write_and_a_read_of_one_buffer() -> None:
    text = "".join(print_kernel(k).text for k in kernels_of("scatter_prod"))  # in order: there are no atomic products
    body = text.split("@triton.jit")[-1]
    assert body.index("tl.store") < body.index("tl.debug_barrier()")


@pytest.mark.parametrize("name", ["layer_norm", "gemm_gelu", "conv", "pointwise_symbolic"])
def test_printing_is_deterministic(name: str) -> None:
    assert [print_kernel(k).text for k in kernels_of(name)] == [print_kernel(k).text for k in kernels_of(name)]


def test_kernels_are_shared_whatever_their_arguments_are_called() -> None:
    from aicc.tests.models.zoo import MODELS

    model, inputs = MODELS["bert"].build()
    kernels: list[int] = []

    def run(module: Operation, gm: torch.fx.GraphModule, args: list[Any]) -> Any:
        kernels.append(sum(op.name == "tile.kernel" for op in module.body))
        return gm.forward(*args)

    capture(model, inputs, run)
    assert sum(kernels) <= 16  # three layers, one set of kernels


def test_what_triton_cannot_say_is_an_error() -> None:
    kernel = """module {
      tile.kernel @k {grid = [1], symbols = [], outputs = 1} {
        ^(%y: buffer<4xf32>):
          %s = tile.alloca() : buffer<4xf32>
          tile.yield()
      }
    }"""
    with pytest.raises(IRError, match=r"tile\.alloca"):
        text_of(kernel)
