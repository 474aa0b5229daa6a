"""The rewriter (worklist, convergence), the structure of IR (uses, erasing), and textual pipelines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
from aicc import passes  # noqa: F401  (registers them)
from aicc.ir import Builder, IRError, Operation
from aicc.ir.parser import parse_module
from aicc.ir.passes import Pass, PassContext, PassError, parse_pipeline, register, registered_passes, run_pipeline
from aicc.ir.printer import print_op
from aicc.ir.rewriter import ConvergenceError, Rewriter, rewrite_greedily

TEXT = """module { func @f { ^(%x: tensor<4xf32>):
  %a = graph.neg(%x) : tensor<4xf32>
  %b = graph.neg(%a) : tensor<4xf32>
  %c = graph.exp(%b) : tensor<4xf32>
  return(%c)
} }"""


def ops(module: Operation) -> list[str]:
    return [op.name for op in module.body.first.body]  # type: ignore[union-attr]


def double_negation(op: Operation, rewriter: Rewriter) -> None:
    inner = op.operands[0].defining_op
    if inner is not None and inner.name == "graph.neg":
        rewriter.replace(op, [inner.operands[0]])
        if not inner.result.uses:
            rewriter.erase(inner)


def test_rewriting_reaches_a_fixed_point() -> None:
    module = parse_module(TEXT)
    assert rewrite_greedily(module, {"graph.neg": [double_negation]}) is True
    assert ops(module) == ["graph.exp", "return"]
    assert rewrite_greedily(module, {"graph.neg": [double_negation]}) is False


def test_patterns_that_undo_each_other_raise() -> None:
    def flip(to: str):  # type: ignore[no-untyped-def]
        def pattern(op: Operation, rewriter: Rewriter) -> None:
            made = rewriter.builder(op).op(to, op.operands[0], type=op.result.type)
            rewriter.touch(made.defining_op)  # type: ignore[arg-type]
            rewriter.replace(op, [made])
        return pattern
    with pytest.raises(ConvergenceError, match="does not converge after 64 visits per op; still changing 'graph"):
        rewrite_greedily(parse_module(TEXT), {"graph.exp": [flip("graph.neg")], "graph.neg": [flip("graph.exp")]})


def test_growth_without_end_raises() -> None:
    def grow(op: Operation, rewriter: Rewriter) -> None:
        made = rewriter.builder(op).op("graph.exp", op.operands[0], type=op.result.type)
        op.set_operand(0, made)
        rewriter.modified(op)
    with pytest.raises(ConvergenceError):
        rewrite_greedily(parse_module(TEXT), {"*": [lambda op, r: grow(op, r) if op.name == "graph.exp" else None]}, max_steps=8)


def test_replacing_with_the_wrong_number_of_values() -> None:
    module = parse_module(TEXT)
    with pytest.raises(IRError, match="'graph.neg' has 1 results, 0 replacements given"):
        rewrite_greedily(module, {"graph.neg": [lambda op, r: r.replace(op, [])]})


def test_uses_follow_edits() -> None:
    module = parse_module(TEXT)
    block = module.body.first.body  # type: ignore[union-attr]
    x, (a, b, c, end) = block.args[0], block.ops
    with pytest.raises(IRError, match="'graph.neg' is erased while result 0 is used by 'graph.neg'"):
        a.erase()
    b.result.replace_all_uses_with(x)
    assert not b.result.uses and x.users == [a, c]
    b.erase()
    a.erase()
    assert x.users == [c] and len(block) == 2 and block.ops == [c, end] and list(block.reversed()) == [end, c]
    clone = c.clone()
    assert x.users == [c, clone] and clone.parent is None
    clone.move_before(c)
    assert block.ops == [clone, c, end] and clone.prev is None and end.next is None
    with pytest.raises(IRError, match="block argument 0 is erased while in use"):
        block.erase_arg(0)
    with pytest.raises(IRError, match="'return' has 0 results, not one"):
        _ = end.result
    with pytest.raises(KeyError, match="has no attribute 'dim'"):
        _ = c["dim"]
    with pytest.raises(TypeError, match="operand 1 of 'graph.exp' is a int, not a Value"):
        c.add_operand(3)  # type: ignore[arg-type]


def test_two_uses_by_one_op() -> None:
    module = parse_module(TEXT)
    block = module.body.first.body  # type: ignore[union-attr]
    x = block.args[0]
    op = Builder.before_op(block.terminator).create("graph.add", [x, x], types=[x.type])
    assert x.users.count(op) == 1 and sum(u is op for u, _ in x.uses) == 2
    op.set_operand(0, block.first.result)  # type: ignore[union-attr]
    assert sum(u is op for u, _ in x.uses) == 1


@register
@dataclass(frozen=True)
class Probe(Pass):
    """For these tests: breaks IR, fails, or counts, as told."""

    name: ClassVar[str] = "test-probe"
    mode: str = "ok"
    max_things: int = 3
    fast: bool = False
    ratio: float = 0.5

    def run(self, module: Operation, ctx: PassContext) -> None:
        if self.mode == "fail":
            raise IRError("cannot do this")
        if self.mode == "break":
            module.body.first.body.first.attributes["nonsense"] = 1  # type: ignore[union-attr]
        ctx.remark("done", "probed")


def test_pipelines_parse() -> None:
    got = parse_pipeline(" canonicalize, test-probe{max-things=7 fast=true,ratio=2.5} ,cse")
    assert [type(p).name for p in got] == ["canonicalize", "test-probe", "cse"]
    assert got[1] == Probe(max_things=7, fast=True, ratio=2.5)
    assert str(got[1]) == "test-probe{max-things=7 fast=true ratio=2.5}" and parse_pipeline(str(got[1])) == [got[1]]
    assert parse_pipeline("") == [] and parse_pipeline("cse{}") == parse_pipeline("cse")
    assert {"canonicalize", "cse", "dce", "decompose", "fuse", "tile", "layout", "pack", "inline"} <= registered_passes().keys()


@pytest.mark.parametrize(("text", "message"), [
    ("canonicalise", "unknown pass 'canonicalise'; did you mean canonicalize"),
    ("zzz", "unknown pass 'zzz'; known passes: absorb-views, "),
    ("cse,,dce", "cannot read the pipeline at column 5: ',dce'"),
    ("cse dce", "cannot read the pipeline at column 1"),
    ("cse{", "cannot read the pipeline at column 1"),
    ("test-probe{max-thing=1}", "pass 'test-probe' has no option 'max-thing' \\(it has mode, max-things, fast, ratio\\)"),
    ("test-probe{fast}", "option 'fast' of pass 'test-probe' needs the form key=value"),
    ("test-probe{max-things=many}", "option 'max-things' of pass 'test-probe' must be int, got 'many'"),
    ("test-probe{fast=perhaps}", "must be bool, got 'perhaps'"),
    ("cse{a=1}", "pass 'cse' has no option 'a' \\(it has no options\\)"),
])
def test_pipelines_that_do_not_parse(text: str, message: str) -> None:
    with pytest.raises(IRError, match=message):
        parse_pipeline(text)


def test_a_trailing_comma_is_an_error_or_nothing() -> None:
    assert len(parse_pipeline("cse,")) == 1


def test_running_reports() -> None:
    ctx, seen = PassContext(), []
    run_pipeline(parse_module(TEXT), parse_pipeline("test-probe,dce"), ctx, after_each=lambda p, m: seen.append(p.name))
    assert seen == ["test-probe", "dce"] and ctx.timings.keys() == {"test-probe", "dce", "verify"}
    assert [(r.pass_name, r.kind, r.message) for r in ctx.remarks] == [("test-probe", "done", "probed"), ("dce", "done", "0 ops erased")]


def test_failures_name_the_pass() -> None:
    with pytest.raises(PassError, match="in pass 'test-probe': cannot do this") as e:
        run_pipeline(parse_module(TEXT), [Probe("fail")], PassContext())
    assert e.value.pass_name == "test-probe"
    with pytest.raises(PassError, match="in pass 'test-probe': it left invalid IR: .*unknown attribute 'nonsense'"):
        run_pipeline(parse_module(TEXT), [Probe("break")], PassContext())
    broken = parse_module(TEXT)
    run_pipeline(broken, [Probe("break")], PassContext(), verify_each=False)
    assert "nonsense" in print_op(broken)


def test_a_pass_name_is_registered_once() -> None:
    with pytest.raises(IRError, match="pass 'test-probe' is registered twice"):
        register(Probe)
