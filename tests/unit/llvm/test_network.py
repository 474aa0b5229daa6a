"""Networks that sort: which instructions they come down to."""

from __future__ import annotations

import pytest
from aicc import passes  # noqa: F401  (registers them)
from aicc.backends.llvm.compile import compile_module
from aicc.backends.llvm.target import make_target
from aicc.compiler.options import Options
from aicc.compiler.pipelines import pipeline
from aicc.ir.parser import parse_module
from aicc.ir.passes import PassContext, parse_pipeline, run_pipeline

AVX2 = ["sse2", "sse4.1", "sse4.2", "avx", "avx2", "fma", "f16c", "bmi", "bmi2"]
TARGETS = {
    "avx2": make_target("x86_64-unknown-linux-gnu", "haswell", AVX2, (32 << 10, 1 << 20, 32 << 20)),
    "avx512": make_target("x86_64-unknown-linux-gnu", "skylake-avx512", [*AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl"], (32 << 10, 1 << 20, 32 << 20)),
}
SORT = """module {level = "graph"} { func @main { ^(%x: tensor<4x1000xf32>):
  %v, %p = graph.sort(%x) {dim = 1, keep = 1000} : tensor<4x1000xf32>, tensor<4x1000xi64>
  return(%v, %p)
} }"""


@pytest.mark.parametrize(("name", "smallest"), [("avx2", "vpcmpgtq"), ("avx512", "vpminsq")])
def test_instructions(name: str, smallest: str) -> None:
    """LLVM makes a masked store of min(x, y) written to where x came from; on AMD's processors that takes as long as 18 other operations."""
    module, target = parse_module(SORT), TARGETS[name]
    for stage in ("graph", "tensor", "tile", "host"):
        run_pipeline(module, parse_pipeline(pipeline(stage, target, Options())), PassContext(target))
    asm = compile_module(module, target).asm
    assert "maskmov" not in asm and asm.count(smallest) > 60
