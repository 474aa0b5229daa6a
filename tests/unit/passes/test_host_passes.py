"""schedule, bufferize and plan_memory on small programs: IR in, IR out."""

from __future__ import annotations

import re

import pytest
from aicc.ir import IRError, Operation
from aicc.ir.parser import parse_module
from aicc.ir.passes import PassContext, PassError, parse_pipeline, run_pipeline
from aicc.ir.printer import print_op
from aicc.ir.verifier import verify
from aicc.passes.check_plan import check_plan
from aicc.passes.plan_memory import PlanMemory
from aicc.passes.schedule import _Costs, _Dependences, _greedy, peak_bytes

# k1 reads one buffer, k2 two; f1 and f2 may write over their first input; n (any number of inputs) has two outputs.
KERNELS = "\n".join(f"""
  tile.kernel @{name} {{grid = [1], outputs = {outputs}{', inplace = [[0, ' + str(inputs) + ']]' if name[0] == 'f' else ''}}} {{
    ^({', '.join(f'%a{i}: buffer<16xf32>' for i in range(inputs + outputs))}):
      tile.yield()
  }}""" for name, inputs, outputs in (("k1", 1, 1), ("k2", 2, 1), ("f1", 1, 1), ("f2", 2, 1), ("n", 1, 2)))


def module(args: str, body: str, attrs: str = "") -> Operation:
    made = parse_module(f"""module {{level = "tile"}} {{
      ^():{KERNELS}
      func @main {'{' + attrs + '} ' if attrs else ''}{{
        ^({args}):
{body}
      }}
    }}""")
    verify(made)
    return made


def lowered(source: Operation, passes: str = "bufferize") -> list[str]:
    """The lines of the function's body after the passes."""
    run_pipeline(source, parse_pipeline(passes), PassContext())
    text = print_op(function(source))
    lines = [line.strip() for line in text.splitlines()[2:-1]]
    return [re.sub(r", outputs = \d+|, bytes = \d+", "", line) for line in lines if not line.startswith("return")]


def function(source: Operation) -> Operation:
    return next(op for op in source.body if op.name == "func")


T = "tensor<16xf32>"
B = ": buffer<16xf32>"


# -- bufferize: results

def test_a_result_is_written_where_it_is_returned() -> None:
    m = module(f"%x: {T}",
               f"%a = tile.launch(%x) {{kernel = @k1}} : {T}\n%b = tile.launch(%a) {{kernel = @k1}} : {T}\nreturn(%b)")
    assert lowered(m) == [f"%a = host.alloc() {{bytes = 64}} {B}", "host.launch(%x, %a) {kernel = @k1}",
                          "host.launch(%a, %b) {kernel = @k1}"]
    func = function(m)
    assert func["arg_attrs"] == ({"kind": "input"}, {"kind": "output"})
    assert func["result_attrs"] == ({"kind": "buffer", "arg": 1},)


def test_inputs_and_repeated_results_are_described() -> None:
    m = module(f"%x: {T}", f"%a = tile.launch(%x) {{kernel = @k1}} : {T}\nreturn(%x, %a, %a, %x)")
    assert lowered(m) == ["host.launch(%x, %a) {kernel = @k1}"]
    assert function(m)["result_attrs"] == ({"kind": "input", "arg": 0}, {"kind": "buffer", "arg": 1},
                                           {"kind": "same", "result": 1},
                                           {"kind": "input", "arg": 0})


def test_sizes_none_and_views_need_no_memory() -> None:
    m = module(f"%x: {T}",
               f"%n = tile.launch(%x) {{kernel = @k1}} : {T}\n%a = tile.launch(%x) {{kernel = @k1}} : {T}\nreturn(%n, %a)",
               'symbols = {s0 = [2, none]}, result_attrs = [{kind = "int", expr = s0*2}, {kind = "none"}, {kind = "tensor"}, '
               '{kind = "view", arg = 0, shape = [4, 4], strides = [1, 4], offset = 0}]')
    assert lowered(m) == ["host.launch(%x, %a) {kernel = @k1}"]
    assert [r["kind"] for r in function(m)["result_attrs"]] == ["int", "none", "buffer", "view"]


def test_an_int_without_expression_is_read_from_memory() -> None:
    m = module(f"%x: {T}", "%n = tile.launch(%x) {kernel = @k1} : tensor<i64>\nreturn(%n)", 'result_attrs = [{kind = "int"}]')
    lowered(m)
    assert function(m)["result_attrs"] == ({"kind": "item", "arg": 1},)


def test_described_results_share_memory_only_where_they_say_so() -> None:
    """A value returned twice, an argument returned as a value, and a view of another result that comes later."""
    m = module(f"%x: {T}", f"%a = tile.launch(%x) {{kernel = @k1}} : {T}\nreturn(%a, %a, %x, %x, %a, %a)",
               'result_attrs = [{kind = "tensor", base = 1, offset = 3}, {kind = "tensor"}, {kind = "tensor"}, '
               '{kind = "tensor", alias_of_arg = 0}, {kind = "tensor"}, {kind = "tensor", same = 4}]')
    assert lowered(m) == ["host.copy(%x, %x_1)", "host.launch(%x, %a) {kernel = @k1}", "host.copy(%a, %a_1)"]
    view, *others = function(m)["result_attrs"]
    assert (view["kind"], view["arg"], view["offset"]) == ("view", 1, 3)
    assert others == [{"kind": "buffer", "arg": 1}, {"kind": "buffer", "arg": 2}, {"kind": "input", "arg": 0}, {"kind": "buffer", "arg": 3},
                      {"kind": "same", "result": 4}]


def test_strides_of_eager_are_kept() -> None:
    square = "tensor<4x8xf32, strides=[1, 4]>"
    m = module("%x: tensor<4x8xf32>",
               f"%a = tile.launch(%x) {{kernel = @k1}} : {square}\n%b = tile.launch(%x) {{kernel = @k1}} : "
               "tensor<4x8xf32>\nreturn(%a, %b, %b, %x)",
               'result_attrs = [{kind = "tensor", strides = [1, 4]}, {kind = "tensor", strides = [1, 4]}, {kind = "tensor"}, '
               '{kind = "tensor", strides = [1, 4]}]')
    assert lowered(m) == ["host.copy(%x, %x_1)", "host.launch(%x, %a) {kernel = @k1}",
                          "host.launch(%x, %b_1) {kernel = @k1}", "host.copy(%b_1, %b)"]
    assert [str(a.type) for a in function(m).body.args[1:]] == ["buffer<4x8xf32, strides=[1, 4]>"] * 2 + [
        "buffer<4x8xf32>", "buffer<4x8xf32, strides=[1, 4]>"]


def test_strides_of_dimensions_of_size_one_need_no_copy() -> None:
    m = module(f"%x: {T}", "%a = tile.launch(%x) {kernel = @k1} : tensor<1x16xf32>\nreturn(%a)",
               'result_attrs = [{kind = "tensor", strides = [5, 1]}]')
    assert lowered(m) == ["host.launch(%x, %a) {kernel = @k1}"]
    assert str(function(m).body.args[1].type) == "buffer<1x16xf32, strides=[5, 1]>"


def test_constants_are_copied_into_results() -> None:
    m = module("", "%c = tensor.constant() {value = dense<f32, [2], [1.0, 2.0]>} : tensor<2xf32>\nreturn(%c)")
    assert [line.split("(")[0] for line in lowered(m)] == ["%0 = host.constant", "host.copy"]


def test_what_nobody_uses_is_dropped() -> None:
    m = module(f"%x: {T}",
               f"%a = tile.launch(%x) {{kernel = @k1}} : {T}\n%b = tile.launch(%a) {{kernel = @k1}} : {T}\nreturn(%x)")
    assert lowered(m) == []


def test_results_and_descriptions_must_agree() -> None:
    for attrs in ('result_attrs = [{kind = "none"}]', 'result_attrs = [{kind = "tensor"}, {kind = "tensor"}]',
                  'result_attrs = [{kind = "tensor", strides = [1, 2]}]'):
        with pytest.raises(PassError, match=r"result_attrs|strides"):
            lowered(module(f"%x: {T}", "return(%x)", attrs))


# -- bufferize: assignments

def test_an_assignment_writes_directly_after_the_last_read() -> None:
    m = module(f"%x: {T}", f"%a = tile.launch(%x) {{kernel = @k1}} : {T}\n%b = tile.launch(%a) {{kernel = @k1}} : {T}\n"
               "tensor.assign(%x, %b)\nreturn(%a)")
    assert lowered(m) == ["host.launch(%x, %a) {kernel = @k1}", "host.launch(%a, %x) {kernel = @k1}"]


def test_an_assignment_in_place() -> None:
    for kernel, want in (("f1", ["host.launch(%x, %x) {kernel = @f1}"]),
                         ("k1", [f"%a = host.alloc() {{bytes = 64}} {B}", "host.launch(%x, %a) {kernel = @k1}",
                                 "host.copy(%a, %x)"])):
        assert lowered(module(f"%x: {T}",
                              f"%a = tile.launch(%x) {{kernel = @{kernel}}} : {T}\ntensor.assign(%x, %a)\nreturn()")) == want


def test_an_assignment_waits_for_later_reads() -> None:
    m = module(f"%x: {T}", f"%a = tile.launch(%x) {{kernel = @f1}} : {T}\n%b = tile.launch(%x) {{kernel = @k1}} : {T}\n"
               "tensor.assign(%x, %a)\nreturn(%b)")
    assert lowered(m)[1:] == ["host.launch(%x, %a) {kernel = @f1}", "host.launch(%x, %b) {kernel = @k1}", "host.copy(%a, %x)"]


def test_both_operands_in_place_would_be_wrong() -> None:
    m = module(f"%x: {T}", f"%a = tile.launch(%x, %x) {{kernel = @f2}} : {T}\ntensor.assign(%x, %a)\nreturn()")
    assert lowered(m)[1:] == ["host.launch(%x, %x, %a) {kernel = @f2}", "host.copy(%a, %x)"]


def test_arguments_that_change_places() -> None:
    m = module(f"%x: {T}, %y: {T}", "tensor.assign(%x, %y)\ntensor.assign(%y, %x)\nreturn(%x)")
    assert lowered(m) == [f"%0 = host.alloc() {{bytes = 64}} {B}", f"%1 = host.alloc() {{bytes = 64}} {B}",
                          "host.copy(%x, %1)", "host.copy(%y, %0)", "host.copy(%x, %x_1)", "host.copy(%0, %x)",
                          "host.copy(%1, %y)"]


# -- bufferize: parameters and externs

def test_cached_launches_fill_persistent_buffers() -> None:
    m = module(f"%x: {T}, %w: {T}, %v: {T}", f"%p = tile.launch(%w) {{kernel = @k1, cached = true}} : {T}\n"
               f"%q = tile.launch(%p, %v) {{kernel = @k2, cached = true}} : {T}\n"
               f"%r = tile.launch(%q, %x) {{kernel = @k2, cached = true}} : {T}\nreturn(%r)",
               'arg_attrs = [{kind = "input"}, {kind = "param"}, {kind = "param"}]')
    assert lowered(m) == [
        f"%p = host.persistent() {{id = 0, guards = [1]}} {B}", "host.launch(%w, %p) {kernel = @k1, cached = true}",
        f"%q = host.persistent() {{id = 1, guards = [1, 2]}} {B}", "host.launch(%p, %v, %q) {kernel = @k2, cached = true}",
        "host.launch(%q, %x, %r) {kernel = @k2}"]


def test_a_parameter_that_the_program_changes_is_not_cached() -> None:
    m = module(f"%x: {T}, %w: {T}",
               f"%p = tile.launch(%w) {{kernel = @k1, cached = true}} : {T}\n%a = tile.launch(%p, %x) {{kernel = @k2}} : {T}\n"
               "tensor.assign(%w, %x)\nreturn(%a)", 'arg_attrs = [{kind = "input"}, {kind = "param"}]')
    assert not any("persistent" in line or "cached" in line for line in lowered(m))


def test_extern_results_are_arguments() -> None:
    m = module(f"%x: {T}", f"%a = tile.launch(%x) {{kernel = @k1}} : {T}\n"
               f'%s, %i = tensor.extern(%a) {{target = "aten.sort.default", args = [{{operand = 0}}], '
               f'operand_strides = [none]}} : {T}, '
               f"tensor<16xi64>\n%b = tile.launch(%s) {{kernel = @k1}} : {T}\nreturn(%b, %i)")
    lines = lowered(m)
    assert lines[1:] == ["host.launch(%x, %a) {kernel = @k1}",
                         'host.extern(%a, %s, %i) {target = "aten.sort.default", args = [{operand = 0}], '
                         'operand_strides = [none], inputs = 1}',
                         "host.launch(%s, %b) {kernel = @k1}"]
    assert function(m)["arg_attrs"] == ({"kind": "input"}, {"kind": "output"}, {"kind": "output", "extern": True},
                                        {"kind": "extern"})


# -- schedule

def test_the_order_with_the_smaller_peak_wins() -> None:
    """Three expansions, each consumed by a reduction: one at a time instead of all at once."""
    big = "tensor<1024xf32>"
    body = "\n".join([*(f"%e{i} = tile.launch(%x) {{kernel = @k1}} : {big}" for i in range(3)),
                      *(f"%r{i} = tile.launch(%e{i}) {{kernel = @k1}} : {T}" for i in range(3)),
                      f"%s = tile.launch(%r0, %r1) {{kernel = @k2}} : {T}",
                      f"%t = tile.launch(%s, %r2) {{kernel = @k2}} : {T}", "return(%t)"])
    m = module(f"%x: {T}", body)
    assert peak_bytes(m, function(m)) == 3 * 4096 + 64
    run_pipeline(m, parse_pipeline("schedule"), PassContext())
    assert peak_bytes(m, function(m)) == 4096 + 2 * 64
    run_pipeline(m, parse_pipeline("bufferize,plan-memory"), PassContext())
    assert function(m)["stats"]["arena_bytes"] == 4096 + 128


def test_the_last_user_of_a_large_value_comes_next() -> None:
    """Once one of two users is scheduled, the other one frees the value: before an op that frees a small one."""
    big = "tensor<1024xf32>"
    m = module(f"%x: {T}", "\n".join([
        f"%a = tile.launch(%x) {{kernel = @k1}} : {big}", f"%r = tile.launch(%a) {{kernel = @k1}} : {T}", f"%c = tile.launch(%r) {{kernel = @k1}} : {T}",
        f"%q = tile.launch(%a) {{kernel = @k1}} : {T}", f"%s = tile.launch(%c, %q) {{kernel = @k2}} : {T}", "return(%s)"]))
    order = _greedy(_Dependences([op for op in function(m).body if op.name == "tile.launch"]), _Costs(function(m), {}))
    assert [op.results[0].name for op in order] == ["a", "r", "q", "c", "s"]


def test_random_externs_keep_their_order() -> None:
    body = "\n".join([*(f'%e{i} = tensor.extern() {{target = "aten.rand.default", '
                        'args = [[1024]], random = true} : tensor<1024xf32>'
                        for i in range(3)),
                      *(f"%r{i} = tile.launch(%e{i}) {{kernel = @k1}} : {T}" for i in (2, 1, 0)), "return(%r0, %r1, %r2)"])
    m = module(f"%x: {T}", body)
    run_pipeline(m, parse_pipeline("schedule"), PassContext())
    drawn = [r.name for op in function(m).body for r in op.results if op.name == "tensor.extern"]
    assert drawn == ["e0", "e1", "e2"] and peak_bytes(m, function(m)) == 4096


# -- plan_memory

def chain(kernel: str, n: int, shape: str = "16", attrs: str = "") -> Operation:
    body = "\n".join(f"%v{i + 1} = tile.launch(%v{i}) {{kernel = @{kernel}}} : tensor<{shape}xf32>" for i in range(n))
    return module(f"%v0: tensor<{shape}xf32>", f"{body}\n%s = tile.launch(%v{n}) {{kernel = @k1}} : tensor<2xf32>\nreturn(%s)",
                  attrs)


@pytest.mark.parametrize(("kernel", "arena"), [("f1", 64), ("k1", 128)])
def test_a_chain(kernel: str, arena: int) -> None:
    m = chain(kernel, 20)
    run_pipeline(m, parse_pipeline("bufferize,plan-memory"), PassContext())
    stats = function(m)["stats"]
    assert stats["arena_bytes"] == stats["lower_bound"] == arena and stats["unplanned_bytes"] == 20 * 64


def test_symbolic_chain_uses_two_slots() -> None:
    m = chain("k1", 20, "(s0)x16", "symbols = {s0 = [2, none]}")
    run_pipeline(m, parse_pipeline("bufferize,plan-memory"), PassContext())
    stats = function(m)["stats"]
    assert str(stats["arena_bytes"]) == str(stats["lower_bound"]) == "s0*128" and str(stats["unplanned_bytes"]) == "s0*1280"


def test_sizes_in_one_unit_are_packed_together() -> None:
    """Sizes 1, 3 and 2 times s0*64, of which the first and the last share the place below or above the second."""
    m = module("%x: tensor<(s0)x16xf32>", "%a = tile.launch(%x) {kernel = @k1} : tensor<(s0)x16xf32>\n"
               "%b = tile.launch(%a) {kernel = @k1} : tensor<(s0)x48xf32>\n"
               "%c = tile.launch(%b) {kernel = @k1} : tensor<(s0)x32xf32>\n"
               "%d = tile.launch(%c) {kernel = @k1} : tensor<2xf32>\nreturn(%d)", "symbols = {s0 = [2, none]}")
    run_pipeline(m, parse_pipeline("bufferize,plan-memory"), PassContext())
    assert str(function(m)["stats"]["arena_bytes"]) == "s0*320"


def test_a_smaller_size_shares_a_slot_when_that_is_proved() -> None:
    for bound, arena in (("[0, 100]", 64 * 100 + 64), ("[0, none]", None)):
        m = module(f"%x: {T}",
                   "%a = tile.launch(%x) {kernel = @k1} : tensor<(s0)x16xf32>\n"
                   "%b = tile.launch(%a) {kernel = @k1} : tensor<16xf32>\n"
                   "%c = tile.launch(%b) {kernel = @k1} : tensor<100x16xf32>\n"
                   "%d = tile.launch(%c) {kernel = @k1} : tensor<2xf32>\nreturn(%d)",
                   f"symbols = {{s0 = {bound}}}")
        run_pipeline(m, parse_pipeline("bufferize,plan-memory"), PassContext())
        made = function(m)["stats"]["arena_bytes"]
        assert made == arena if arena else str(made) == "s0*64 + 6464"


def test_outputs_serve_as_scratch() -> None:
    """The input of the last launch lives in the output (in place), and what came before it beside it or in the arena."""
    m = module(f"%x: {T}",
               f"%a = tile.launch(%x) {{kernel = @k1}} : {T}\n%b = tile.launch(%a) {{kernel = @f1}} : {T}\nreturn(%b)")
    assert lowered(m, "bufferize,plan-memory") == [f"%a = host.view(%b) {B}", "host.launch(%x, %a) {kernel = @k1}",
                                                   "host.launch(%a, %b) {kernel = @f1}"]
    m = module(f"%x: {T}", f"%a = tile.launch(%x) {{kernel = @k1}} : {T}\n%b = tile.launch(%a) {{kernel = @k1}} : {T}\n"
               f"%c = tile.launch(%b) {{kernel = @k1}} : tensor<64xf32>\n"
               f"%d = tile.launch(%c, %x) {{kernel = @k2}} : tensor<64xf32>\n"
               "return(%d)")
    lines = lowered(m, "bufferize,plan-memory")
    assert lines[0] == f"%a = host.view(%d) {B}" and "%b = host.view(%d) {offset = 16} : buffer<16xf32>" in lines
    assert function(m)["stats"]["arena_bytes"] == 256 and function(m)["stats"]["placed_in_outputs"] == 2


def test_buffers_of_unknown_size_are_arguments() -> None:
    m = module(f"%x: {T}",
               '%n = tensor.extern(%x) {target = "aten.nonzero.default", args = [{operand = 0}], defines = {u0 = [0, 0]}} : '
               f"tensor<(u0)x1xi64>\n%a = tile.launch(%n) {{kernel = @k1}} : tensor<(u0)xf32>\n"
               f"%b = tile.launch(%a) {{kernel = @k1}} : {T}\n"
               "return(%b)", "symbols = {u0 = [0, none]}")
    run_pipeline(m, parse_pipeline("bufferize,plan-memory"), PassContext())
    assert [a["kind"] for a in function(m)["arg_attrs"]] == ["input", "output", "extern", "late"]
    assert function(m)["stats"]["arena_bytes"] == 0


# -- check_plan

PLANNED = """module {{level = "host"}} {{
  ^():{kernels}
  func @main {{arg_attrs = [{{kind = "input"}}, {{kind = "output"}}], stats = {{arena_bytes = 192}}}} {{
    ^(%x: buffer<16xf32>, %y: buffer<16xf32>):
      %a = host.slot() {{offset = {a}, bytes = 64}} : buffer<16xf32>
      %b = host.slot() {{offset = {b}, bytes = 64}} : buffer<16xf32>
      host.launch(%x, %a) {{kernel = @k1, outputs = 1}}
      host.launch(%a, %b) {{kernel = @{kernel}, outputs = 1}}
      host.launch({last}, %y) {{kernel = @k2, outputs = 1}}
      return()
  }}
}}"""


@pytest.mark.parametrize(("a", "b", "kernel", "last", "problem"), [
    (0, 64, "k1", "%a, %b", None), (0, 0, "f1", "%b, %b", None), (64, 128, "k1", "%b, %a", None),
    (0, 0, "k1", "%b, %b", "overwrites input"), (0, 0, "f1", "%a, %b", "holds something else"),
    (0, 32, "k1", "%b, %b", "misaligned"),
    (0, 192, "k1", "%b, %b", "outside the arena"), (0, -64, "k1", "%b, %b", "outside the arena")])
def test_wrong_plans_are_found(a: int, b: int, kernel: str, last: str, problem: str | None) -> None:
    m = parse_module(PLANNED.format(kernels=KERNELS, a=a, b=b, kernel=kernel, last=last))
    kernels = {op["sym_name"]: op for op in m.body if op.name == "tile.kernel"}
    if problem is None:
        check_plan(function(m), kernels)
        return
    with pytest.raises(IRError, match=problem):
        check_plan(function(m), kernels)


BESIDE = """module {{level = "host"}} {{
  ^():{kernels}
  func @main {{arg_attrs = [{{kind = "input"}}, {{kind = "output"}}], stats = {{arena_bytes = 192}}}} {{
    ^(%x: buffer<16xf32>, %y: buffer<16xf32>):
      %a = host.slot() {{offset = 0, bytes = 64}} : buffer<16xf32>
      %b = host.slot() {{offset = {b}, bytes = 64}} : buffer<16xf32>
      host.launch(%x, %a) {{kernel = @k1, outputs = 1, beside = 1}}
      host.launch({read}, %b) {{kernel = @k1, outputs = 1, beside = {second}}}
      host.launch(%x, %y) {{kernel = @k1, outputs = 1, beside = {third}}}
      return()
  }}
}}"""


@pytest.mark.parametrize(("b", "read", "second", "third", "problem"), [
    (64, "%x", 1, 1, None), (64, "%x", 1, 2, None), (0, "%x", 1, 0, "overlap and one is written"), (64, "%a", 1, 1, "overlap and one is written"),
    (64, "%x", 0, 1, "not next to each other")])
def test_wrong_groups_are_found(b: int, read: str, second: int, third: int, problem: str | None) -> None:
    m = parse_module(BESIDE.format(kernels=KERNELS, b=b, read=read, second=second, third=third))
    kernels = {op["sym_name"]: op for op in m.body if op.name == "tile.kernel"}
    if problem is None:
        check_plan(function(m), kernels)
        return
    with pytest.raises(IRError, match=problem):
        check_plan(function(m), kernels)


def test_wrong_symbolic_plans_are_found() -> None:
    m = chain("k1", 3, "(s0)x16", "symbols = {s0 = [2, none]}")
    run_pipeline(m, [*parse_pipeline("bufferize"), PlanMemory(outputs=False)], PassContext())
    func = function(m)
    kernels = {op["sym_name"]: op for op in m.body if op.name == "tile.kernel"}
    check_plan(func, kernels)
    slots = [op for op in func.body if op.name == "host.slot"]
    slots[0].attributes["offset"] = slots[1]["offset"]
    with pytest.raises(IRError, match="overwrites"):
        check_plan(func, kernels)


DIVIDED = """module {{level = "host"}} {{
  ^():{kernels}
  func @main {{arg_attrs = [{{kind = "input"}}, {{kind = "output"}}], symbols = {{s0 = [0, {most}]}}, stats = {{arena_bytes = (64 * (s0 // (s0 // {by})))}}}} {{
    ^(%x: buffer<16xf32>, %y: buffer<16xf32>):
      %a = host.slot() {{offset = 0, bytes = 64}} : buffer<16xf32>
      %b = host.slot() {{offset = {second}, bytes = 64}} : buffer<16xf32>
      host.launch(%x, %a) {{kernel = @k1, outputs = 1}}
      host.launch(%a, %b) {{kernel = @k1, outputs = 1}}
      host.launch(%a, %y) {{kernel = @k1, outputs = 1}}
      return()
  }}
}}"""


@pytest.mark.parametrize(("by", "most", "checked"), [(3, "none", 4), (3, "5", 2), (50, "none", 4), (5000, "none", 1)])
def test_sizes_that_small_symbols_do_not_have_are_raised(by: int, most: str, checked: int) -> None:
    """n // (n // 3) exists from 3 on: what would be tried at 0 and 1 is tried at 3, not left out."""
    m = parse_module(DIVIDED.format(kernels=KERNELS, by=by, most=most, second=64))
    kernels = {op["sym_name"]: op for op in m.body if op.name == "tile.kernel"}
    assert check_plan(function(m), kernels) == checked
    m = parse_module(DIVIDED.format(kernels=KERNELS, by=by, most=most, second=0))
    with pytest.raises(IRError, match="overwrites input"):
        check_plan(function(m), kernels)


def test_sizes_that_exist_for_large_symbols_only_are_planned() -> None:
    m = chain("k1", 3, "(s0 // (s0 // 5000))x16", "symbols = {s0 = [0, none]}")
    run_pipeline(m, [*parse_pipeline("bufferize"), PlanMemory(outputs=False)], PassContext())
    assert not any(op.name == "host.alloc" for op in function(m).body)
    m = chain("k1", 3, "(s0 // (s0 // 3))x16", "symbols = {s0 = [0, 2]}")
    with pytest.raises(ValueError, match="not defined for any value of its symbols"):
        run_pipeline(m, [*parse_pipeline("bufferize"), PlanMemory(outputs=False)], PassContext())
