"""`aicc opt`: text in, passes, text out; refusals with line and column."""

from __future__ import annotations

from pathlib import Path

import pytest
from aicc.compiler.commands.opt import parse_target
from aicc.compiler.errors import UserError

from .conftest import Aicc, refused

IR = """\
module {level = "graph"} {
  func @main {arg_attrs = [{kind = "input"}], result_attrs = [{kind = "tensor"}]} {
    ^(%x: tensor<4xf32>):
      %a = graph.exp(%x) : tensor<4xf32>
      %b = graph.exp(%x) : tensor<4xf32>
      %c = graph.add(%a, %b) : tensor<4xf32>
      return(%c)
  }
}
"""


def test_passes_from_standard_input(aicc: Aicc) -> None:
    result = aicc("opt", "-", "--passes", "cse", "--verify-roundtrip", input=IR)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("graph.exp") == 1 and "graph.add(%a, %a)" in result.stdout


def test_no_passes_print_the_same(aicc: Aicc, tmp_path: Path) -> None:
    path = tmp_path / "a.aicc"
    path.write_text(IR)
    first = aicc("opt", path)
    assert first.exit_code == 0, first.stderr
    assert aicc("opt", "-", input=first.stdout).stdout == first.stdout


def test_print_after_each(aicc: Aicc) -> None:
    result = aicc("opt", "-", "--passes", "cse,dce", "--print-after-each", input=IR)
    assert [line for line in result.stderr.splitlines() if "=====" in line] == ["// ===== after cse", "// ===== after dce"]


def test_output_file(aicc: Aicc, tmp_path: Path) -> None:
    assert aicc("opt", "-", "-o", tmp_path / "b.aicc", input=IR).stdout == ""
    assert "graph.exp" in (tmp_path / "b.aicc").read_text()


def test_list_of_passes(aicc: Aicc) -> None:
    result = aicc("opt", "--list-passes")
    assert result.exit_code == 0
    assert "\ncse" in result.stdout and "\nfuse{" in result.stdout


def test_target() -> None:
    assert parse_target("cuda:90").capability == 90
    assert parse_target("cpu:avx2,fma").vector_bits == 256
    assert parse_target("generic").vector_bits == 128
    with pytest.raises(UserError, match="unknown target 'tpu'"):
        parse_target("tpu")


def test_refusals(aicc: Aicc, tmp_path: Path) -> None:
    refused(aicc("opt", "-", input=IR.replace("graph.add(%a, %b)", "graph.add(%a, %z)")), "<stdin>:6:", "%z is used before it is defined", "^")
    refused(aicc("opt", "-", input=IR.replace("graph.exp(%x)", "graph.exp(%x")), "<stdin>:4:", "unexpected")
    refused(aicc("opt", "-", input=IR.replace("graph.add", "graph.ad")), "<stdin>:6:12", "graph.add")
    refused(aicc("opt", "-", input=IR.replace("graph.add(%a, %b) : tensor<4xf32>", "graph.add(%a, %b) : tensor<5xf32>")), "invalid IR", "graph.add")
    refused(aicc("opt", "-", "--passes", "canonicalise,cse", input=IR), "unknown pass 'canonicalise'; did you mean canonicalize")
    refused(aicc("opt", "-", "--passes", "fuse{max-member=2}", input=IR), "no option 'max-member'", "max-members")
    refused(aicc("opt", "-", "--passes", "cse;dce", input=IR), "column")
    refused(aicc("opt", tmp_path / "none.aicc"), "cannot be read", "No such file")
    refused(aicc("opt", tmp_path), "is a folder")
    refused(aicc("opt"), "no FILE given")
    assert aicc("opt", "--nonsense").exit_code == 2
    (tmp_path / "binary.aicc").write_bytes(b"\xff\xfe\x00")
    refused(aicc("opt", tmp_path / "binary.aicc"), "binary.aicc:1:1", "not a text file")
    refused(aicc("opt", "-", "--target", "tpu", input=IR), "unknown target")


def test_debug_shows_the_traceback(aicc: Aicc) -> None:
    result = aicc("opt", "-", "--passes", "canonicalise", "--debug", input=IR)
    assert result.exit_code == 2 and "unknown pass" in result.stderr and "Traceback" in result.stderr
