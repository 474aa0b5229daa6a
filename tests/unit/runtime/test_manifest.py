from __future__ import annotations

import json

import pytest
from aicc.compiler.manifest import build_manifest
from aicc.ir import IRError, Operation
from aicc.ir.parser import parse_module

KERNEL = """tile.kernel @k {grid = [1], outputs = 1} {
    ^(%a: buffer<16xf32>, %b: buffer<16xf32>):
      tile.yield()
  }"""


def host(attrs: str, body: str, args: str = "%x: buffer<16xf32>, %y: buffer<16xf32>") -> Operation:
    return parse_module(f"module {{level = \"host\"}} {{\n  ^():\n  {KERNEL}\n"
                        f"  func @main {{{attrs}}} {{\n    ^({args}):\n{body}\n"
                        "      return()\n  }\n}")


PLAIN = 'arg_attrs = [{kind = "input"}, {kind = "output"}], result_attrs = [{kind = "buffer", arg = 1}]'


def test_segments_are_counted_as_the_backend_does() -> None:
    """Consecutive externs leave no empty segment between them; the number of a segment counts those before it."""
    extern = 'host.extern(%x, %e{0}) {{target = "aten.exp.default", args = [{{operand = 0}}], inputs = 1}}'
    m = host('arg_attrs = [{kind = "input"}, {kind = "output"}, {kind = "extern"}, {kind = "extern"}], '
             'result_attrs = [{kind = "buffer", arg = 1}]',
             f"{extern.format(0)}\n{extern.format(1)}\nhost.launch(%e0, %y) {{kernel = @k, outputs = 1}}",
             "%x: buffer<16xf32>, %y: buffer<16xf32>, %e0: buffer<16xf32>, %e1: buffer<16xf32>")
    made = build_manifest(m, errors={3: "row out of range"})
    assert [s[0] for s in made["steps"]] == ["extern", "extern", "drop", "call"]
    assert made["steps"][2][1] == [2] and made["steps"][3][1] == "main_0"
    assert made["steps"][0][1]["buffers"] == [1] and made["steps"][0][1]["operand_strides"] == [None]
    assert made["errors"] == {"3": "row out of range"}
    assert json.loads(json.dumps(made)) == made


def test_only_constants_that_externs_read_are_kept() -> None:
    dense = "dense<f32, [2], [1.0, 2.0]>"
    m = host(PLAIN, f"""%c = host.constant() {{value = {dense}}} : buffer<2xf32>
      %d = host.constant() {{value = dense<f32, [1], [3.0]>}} : buffer<1xf32>
      %v = host.view(%c) {{offset = 1}} : buffer<1xf32>
      host.extern(%v, %y) {{target = "aten.exp.default", args = [{{operand = 0}}], inputs = 1}}""")
    made = build_manifest(m)
    operand, = made["steps"][0][1]["operands"]
    assert len(made["constants"]) == 1 and operand["space"] == "constant" and operand["offset"] == 4


def test_written_arguments_and_packing() -> None:
    m = host('arg_attrs = [{kind = "input"}, {kind = "param"}], result_attrs = [{kind = "input", arg = 0}]',
             """%p = host.persistent() {id = 0, bytes = 64, guards = [1]} : buffer<16xf32>
      host.launch(%y, %p) {kernel = @k, outputs = 1, cached = true}
      %q = host.persistent() {id = 1, bytes = 64, guards = [1]} : buffer<16xf32>
      host.launch(%p, %q) {kernel = @k, outputs = 1, cached = true}
      host.launch(%q, %x) {kernel = @k, outputs = 1}""")
    made = build_manifest(m)
    assert made["mutated"] == [0] and made["steps"] == [["call", "main_0"]] and made["results"] == [{"kind": "input",
                                                                                                     "input": 0}]
    assert [(p["pack"], p["transient"], p["guards"]) for p in made["persistent"]] == [
        ("main_pack_0", True, [1]), ("main_pack_1", False, [1])]


@pytest.mark.parametrize(("attrs", "body", "problem"), [
    (PLAIN, "%a = host.alloc() {bytes = 64} : buffer<16xf32>", "plan-memory"),
    ('arg_attrs = [{kind = "output"}, {kind = "input"}]', "", "before its outputs"),
    ('arg_attrs = [{kind = "input", device = "cuda:0"}, {kind = "output"}]', "", "cuda:0"),
    ('arg_attrs = [{kind = "input"}, {kind = "output"}], result_attrs = [{kind = "tensor"}]', "", "unknown kind"),
])
def test_programs_that_are_not_ready(attrs: str, body: str, problem: str) -> None:
    with pytest.raises(IRError, match=problem):
        build_manifest(host(attrs, body))


def test_the_function_must_exist() -> None:
    with pytest.raises(IRError, match="no function 'other'"):
        build_manifest(host(PLAIN, ""), "other")
