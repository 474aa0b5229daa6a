"""Steps on two streams: which are moved, what memory planning makes of it, and which plans are refused."""

from __future__ import annotations

from typing import Any

import pytest
from aicc.ir import IRError, Operation, Target
from aicc.ir.parser import parse_module
from aicc.ir.passes import PassContext, parse_pipeline, run_pipeline
from aicc.passes.check_plan import check_plan
from aicc.passes.stream_order import concurrent
from aicc.passes.two_streams import StepCost, region_gain

GPU = Target(kind="cuda", name="sm_90", capability=90, multiprocessors=132)
# `small` keeps 10 of 132 multiprocessors for 12 microseconds, `large` all of them, `tiny` is over at once; `join` reads two.
KERNELS = "\n".join(f"""
  tile.kernel @{name} {{grid = [{grid}], outputs = 1, bytes = {moved}, flops = 0}} {{
    ^({', '.join(f'%a{i}: buffer<1024xf32>' for i in range(inputs + 1))}):
      tile.yield()
  }}""" for name, inputs, grid, moved in (("small", 1, 10, 3_000_000), ("large", 1, 1000, 40_000_000), ("tiny", 1, 1, 100), ("join", 2, 10, 3_000_000)))
T, B = "tensor<1024xf32>", "buffer<1024xf32>"


def planned(body: str, passes: str = "bufferize,two-streams{replayed=true},plan-memory") -> tuple[Operation, PassContext]:
    """The function after the passes."""
    m = parse_module(f"""module {{level = "tile"}} {{
      ^():{KERNELS}
      func @main {{
        ^(%x: {T}, %y: {T}):
{body}
      }}
    }}""")
    ctx = PassContext(target=GPU)
    run_pipeline(m, parse_pipeline(passes), ctx)
    return next(op for op in m.body if op.name == "func"), ctx


def launch(name: str, kernel: str, *operands: str) -> str:
    return f"%{name} = tile.launch({', '.join('%' + o for o in operands)}) {{kernel = @{kernel}}} : {T}\n"


def steps(func: Operation) -> list[tuple[Any, ...]]:
    return [("wait", op["stream"]) if op.name == "host.wait" else (op["kernel"].name, op["stream"]) for op in func.body
            if op.name in ("host.launch", "host.wait")]


def chains(kernel: str) -> str:
    """Two chains of two launches that meet."""
    return (launch("a", kernel, "x") + launch("b", kernel, "a") + launch("c", kernel, "y") + launch("d", kernel, "c")
            + launch("z", "join", "b", "d") + "return(%z)")


def test_chains_of_small_kernels_run_on_two_streams_and_meet() -> None:
    func, ctx = planned(chains("small"))
    assert steps(func) == [("wait", 1), ("small", 0), ("small", 1), ("small", 0), ("small", 1), ("wait", 0), ("join", 0)]
    assert "2 and 2 steps on two streams: modelled to gain" in " ".join(r.message for r in ctx.remarks)


@pytest.mark.parametrize("kernel", ["large", "tiny"])
def test_kernels_that_fill_the_device_or_are_over_at_once_stay_on_one(kernel: str) -> None:
    func, ctx = planned(chains(kernel))
    assert all(step[1] == 0 for step in steps(func)) and ("wait", 0) not in steps(func)
    assert any(r.message == "nothing gains by running on a second stream" for r in ctx.remarks)


def test_a_chain_stays_on_one() -> None:
    func, _ = planned(launch("a", "small", "x") + launch("b", "small", "a") + launch("c", "join", "b", "a") + "return(%c)")
    assert steps(func) == [("small", 0), ("small", 0), ("join", 0)]


def test_what_is_written_is_not_what_the_other_stream_touches() -> None:
    """Two updates of one argument are ordered by memory, not by data flow."""
    body = (launch("a", "small", "x") + "tensor.assign(%x, %a)\n" + launch("b", "small", "y") + launch("c", "small", "b")
            + launch("d", "small", "c") + "return(%d)")
    func, _ = planned(body)
    assert ("small", 1) in steps(func)
    again, _ = planned(launch("a", "small", "x") + "tensor.assign(%y, %a)\n" + "return(%a)")
    assert all(step[1] == 0 for step in steps(again))


def test_memory_is_not_shared_across_streams() -> None:
    """One after the other, five temporaries fit into two places; beside each other, each chain needs its own."""
    one, _ = planned(chains("small"), "bufferize,plan-memory")
    two, _ = planned(chains("small"))
    assert two["stats"]["arena_bytes"] > one["stats"]["arena_bytes"]


def test_regions_end_at_operator_calls() -> None:
    """An operator runs on the caller's stream: the second stream is waited for before."""
    body = (launch("a", "small", "x") + launch("b", "small", "a") + launch("c", "small", "y") + launch("d", "small", "c")
            + f'%e = tensor.extern(%b, %d) {{target = "test.op.default", args = [{{operand = 0}}, {{operand = 1}}]}} : {T}\n' + "return(%e)")
    func, _ = planned(body)
    names = [op.name for op in func.body if op.name in ("host.wait", "host.extern")]
    assert names == ["host.wait", "host.wait", "host.extern"]


PLANNED = """module {{level = "host"}} {{
  ^():{kernels}
  func @main {{arg_attrs = [{{kind = "input"}}, {{kind = "input"}}, {{kind = "output"}}], stats = {{arena_bytes = 8192}}}} {{
    ^(%x: {B}, %y: {B}, %z: {B}):
      %a = host.slot() {{offset = 0, bytes = 4096}} : {B}
      %b = host.slot() {{offset = {b}, bytes = 4096}} : {B}
      host.wait() {{stream = 1, on = 0}}
      host.launch(%x, %a) {{kernel = @small, outputs = 1}}
      host.launch({read}, %b) {{kernel = @small, outputs = 1, stream = 1}}
      {wait}
      host.launch(%a, %b, %z) {{kernel = @join, outputs = 1}}
      {end}
      return()
  }}
}}"""
JOINED = "host.wait() {stream = 0, on = 1}"


@pytest.mark.parametrize(("b", "read", "wait", "end", "problem"), [
    (4096, "%y", JOINED, "", None),
    (0, "%y", JOINED, "", "may run at the same time, but .* overlap and one is written"),
    (4096, "%a", JOINED, "", "may run at the same time, but .* overlap and one is written"),
    (4096, "%y", "", JOINED, "may run at the same time, but .* overlap and one is written"),
    (4096, "%y", JOINED, "host.launch(%x, %y) {kernel = @small, outputs = 1, stream = 1}", "may still run at the end"),
])
def test_wrong_plans_are_found(b: int, read: str, wait: str, end: str, problem: str | None) -> None:
    m = parse_module(PLANNED.format(kernels=KERNELS, B=B, b=b, read=read, wait=wait, end=end))
    func = next(op for op in m.body if op.name == "func")
    kernels = {op["sym_name"]: op for op in m.body if op.name == "tile.kernel"}
    if problem is None:
        check_plan(func, kernels)
        return
    with pytest.raises(IRError, match=problem):
        check_plan(func, kernels)


def test_what_may_run_at_the_same_time() -> None:
    """Two steps on each stream between waits, and one on either side."""
    lines = ["host.launch(%x, %z) {kernel = @small, outputs = 1, stream = STREAM}".replace("STREAM", str(s)) if isinstance(s, int) else s
             for s in (0, "host.wait() {stream = 1, on = 0}", 0, 1, 0, 1, JOINED, 0)]
    m = parse_module(f"""module {{level = "host"}} {{
      ^():{KERNELS}
      func @main {{
        ^(%x: {B}, %z: {B}):
{chr(10).join(lines)}
          return()
      }}
    }}""")
    func = next(op for op in m.body if op.name == "func")
    assert concurrent(func) == [(0, 0), (1, 1), (2, 5), (2, 4), (3, 5), (2, 5), (6, 6), (7, 7), (8, 8)]


def test_the_model_counts_the_device_the_host_and_the_waits() -> None:
    half, whole = StepCost(20e-6, 0.5), StepCost(20e-6, 1.0)
    assert region_gain([[half], [half]], replayed=True) == pytest.approx(22e-6 - 3e-6)
    assert region_gain([[whole], [whole]], replayed=True) == pytest.approx(2e-6 - 3e-6), "only one launch is hidden"
    short = StepCost(1e-6, 0.1)
    assert region_gain([[short] * 4, [short] * 4], replayed=False) < 0, "the host is what everything waits for"


def long_chains(n: int) -> str:
    """Two chains of n launches of one kernel, one after the other."""
    body = launch("a0", "small", "x") + launch("b0", "small", "y")
    first = "".join(launch(f"a{i}", "small", f"a{i - 1}") for i in range(1, n))
    second = "".join(launch(f"b{i}", "small", f"b{i - 1}") for i in range(1, n))
    a0, b0 = body.splitlines(keepends=True)
    return a0 + first + b0 + second + launch("z", "join", f"a{n - 1}", f"b{n - 1}") + "return(%z)"


def test_long_chains_are_not_tied_together_by_merging() -> None:
    """The first launch of the second chain could be one kernel with the last of the first chain; then the chains would follow each other."""
    small = KERNELS.replace("bytes = 3000000", "bytes = 2000000")
    counts = {}
    for merge in ("merge-launches{replayed=true}", "merge-launches{streams=2 replayed=true}"):
        m = parse_module(f"""module {{level = "tile"}} {{
          ^():{small}
          func @main {{
            ^(%x: {T}, %y: {T}):
{long_chains(10)}
          }}
        }}""")
        run_pipeline(m, parse_pipeline(f"{merge},bufferize,two-streams{{replayed=true}},plan-memory"), PassContext(target=GPU))
        func = next(op for op in m.body if op.name == "func")
        counts[merge] = [sum(step == ("small", s) for step in steps(func)) for s in (0, 1)]
    tied, apart = counts.values()
    assert apart == [10, 10] and min(tied) < 9
