"""`aicc dump-ir`: every stage, files that parse back, scripts, training, and refusals."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from aicc.ir.core import equivalent
from aicc.ir.parser import load, parse_module
from aicc.ir.printer import print_op, print_with_resources
from aicc.ir.verifier import verify

from .conftest import Aicc, refused

Write = Callable[..., Path]


def test_stages_go_to_standard_output_in_order_and_parse_back(aicc: Aicc, mlp: Path) -> None:
    result = aicc("dump-ir", mlp)
    assert result.exit_code == 0, result.stderr
    parts = re.split(r"^(?://|;|#) ===== (\S+): (\w+)\n", result.stdout, flags=re.M)
    assert parts[0] == "" and set(parts[1::3]) == {"graph0_inference"}
    text = dict(zip(parts[2::3], parts[3::3], strict=True))
    assert list(text) == ["graph", "tensor", "tile", "host", "llvm", "asm"]
    for stage in ("graph", "tensor", "tile", "host"):
        module = parse_module(text[stage])
        verify(module)
        assert print_op(module, locations=True).strip() == text[stage].strip()
    assert "graph.gelu" in text["graph"] and "tile.kernel" in text["tile"] and "host.launch" in text["host"]
    assert "define" in text["llvm"] and ".text" in text["asm"]


def test_files(aicc: Aicc, write: Write, tmp_path: Path) -> None:
    path = write("import torch\ntable = torch.arange(2000.)\ndef model(x):\n    return x * table.sin()\nexample_inputs = torch.ones(2000)\n")
    result = aicc("dump-ir", path, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    names = sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_file())
    assert names == sorted(f"graph0_inference.{s}" for s in ("graph.aicc", "tensor.aicc", "tile.aicc", "host.aicc", "llvm.ll", "asm.s"))
    for stage in ("graph", "tensor", "tile", "host"):
        module = load(tmp_path / "out" / f"graph0_inference.{stage}.aicc")
        verify(module)
        text, resources = print_with_resources(module)
        assert equivalent(module, parse_module(text, resources=resources), locations=True)


def test_after_a_pass(aicc: Aicc, mlp: Path) -> None:
    result = aicc("dump-ir", mlp, "--after", "decompose")
    assert result.exit_code == 0, result.stderr
    heads = [line for line in result.stdout.splitlines() if "=====" in line]
    assert len(heads) == 1 and heads[0].endswith("after decompose")
    assert "tensor.contract" in result.stdout or "tensor.generic" in result.stdout


def test_training_has_two_graphs(aicc: Aicc, mlp: Path) -> None:
    result = aicc("dump-ir", mlp, "--train", "--stage", "graph")
    assert result.exit_code == 0, result.stderr
    heads = [line for line in result.stdout.splitlines() if "=====" in line]
    assert heads == ["// ===== graph0_forward: graph", "// ===== graph1_backward: graph"]


def test_dynamic_keeps_the_symbol(aicc: Aicc, mlp: Path) -> None:
    assert "tensor<s" in aicc("dump-ir", mlp, "--dynamic", "--stage", "graph").stdout


def test_a_script_is_dumped_as_it_runs(aicc: Aicc, write: Write) -> None:
    path = write("""
import torch
with torch.no_grad():
    compiled = torch.compile(torch.nn.Linear(4, 4), backend="aicc")
    print("shape", tuple(compiled(torch.ones(2, 4)).shape))
""")
    result = aicc("dump-ir", path, "--stage", "host")
    assert result.exit_code == 0, result.stderr
    assert "shape (2, 4)" in result.stdout and "host.launch" in result.stdout


def test_refusals(aicc: Aicc, mlp: Path, write: Write, tmp_path: Path) -> None:
    refused(aicc("dump-ir", mlp, "--stage", "tensr"), "unknown stage 'tensr'", "graph, tensor, tile")
    refused(aicc("dump-ir", mlp, "--after", "canonicalise"), "unknown pass 'canonicalise'; did you mean canonicalize")
    refused(aicc("dump-ir", tmp_path / "none.py"), "no file")
    refused(aicc("dump-ir", write("def model(:\n", "bad.py")), "bad.py:1:11", "def model(:", "^")
    refused(aicc("dump-ir", write("x = 1\n", "empty.py")), "defines no model", "For example")
    refused(aicc("dump-ir", mlp, "-o", mlp), "is a file")
    refused(aicc("dump-ir", write("import torch\nmodel = torch.nn.Linear(3, 3)\ninputs = torch.ones(1, 4)\n", "shapes.py")), "shapes")
