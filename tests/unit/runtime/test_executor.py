from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from aicc.runtime import executor
from aicc.runtime.arena import ArenaPool
from aicc.runtime.artifact import ArtifactError
from aicc.runtime.executor import CompiledGraph

# table[out][i] = table[a][i] + table[b][i], or their product, for i < n
LIBRARY = """
define private void @elementwise(ptr %table, i64 %a, i64 %b, i64 %out, i64 %n, i1 %multiply) {
  %pa = getelementptr ptr, ptr %table, i64 %a
  %pb = getelementptr ptr, ptr %table, i64 %b
  %po = getelementptr ptr, ptr %table, i64 %out
  %xa = load ptr, ptr %pa
  %xb = load ptr, ptr %pb
  %xo = load ptr, ptr %po
  br label %head
head:
  %i = phi i64 [0, %0], [%next, %body]
  %more = icmp slt i64 %i, %n
  br i1 %more, label %body, label %end
body:
  %ea = getelementptr float, ptr %xa, i64 %i
  %eb = getelementptr float, ptr %xb, i64 %i
  %eo = getelementptr float, ptr %xo, i64 %i
  %va = load float, ptr %ea
  %vb = load float, ptr %eb
  %s = fadd float %va, %vb
  %m = fmul float %va, %vb
  %v = select i1 %multiply, float %m, float %s
  store float %v, ptr %eo
  %next = add i64 %i, 1
  br label %head
end:
  ret void
}
"""


def op(a: int, b: int, out: int, n: str = "8", multiply: bool = False) -> str:
    return f"  call void @elementwise(ptr %t, i64 {a}, i64 {b}, i64 {out}, i64 {n}, i1 {str(multiply).lower()})\n"


def function(name: str, *body: str, symbols: int = 0, code: int = 0) -> str:
    loads = "".join(f"  %p{i} = getelementptr i64, ptr %s, i64 {i}\n  %s{i} = load i64, ptr %p{i}\n" for i in range(symbols))
    return f"define i32 @{name}(ptr %t, ptr %s) {{\n{loads}{''.join(body)}  ret i32 {code}\n}}\n"


def f32(*shape: Any, strides: list[Any] | None = None, **more: Any) -> dict[str, Any]:
    if strides is None:
        strides = [1] if len(shape) == 1 else [shape[1], 1] if len(shape) == 2 else []
    return {"dtype": "f32", "shape": list(shape), "strides": strides, **more}


def manifest(inputs: list[dict[str, Any]], buffers: list[dict[str, Any]], steps: list[Any], **more: Any) -> dict[str, Any]:
    inputs = [{"name": f"x{i}", "position": i, **x} for i, x in enumerate(inputs)]
    outputs = [i for i, b in enumerate(buffers) if b.get("kind", "output") == "output"]
    return {"name": "main", "symbols": [], "inputs": inputs, "symbol_args": [], "symbol_sources": [],
            "buffers": [{"kind": "output", **b} for b in buffers],
            "results": [{"kind": "buffer", "buffer": i} for i in outputs],
            "persistent": [], "arena": 0, "steps": steps, "mutated": [], "constants": [], "errors": {}, **more}


@pytest.fixture
def build(compile_ir: Callable[..., bytes]) -> Callable[..., CompiledGraph]:
    def make(described: dict[str, Any], *functions: str, **options: Any) -> CompiledGraph:
        return CompiledGraph(described, compile_ir(LIBRARY + "".join(functions)), **{"arenas": ArenaPool(), **options})
    return make


# x0 + x1 into the arena, that times x1 into the output.
SIMPLE = manifest([f32(8), f32(8)], [f32(8)], [["call", "main_0"]], arena=64)
SIMPLE_CODE = function("main_0", op(0, 1, 3), op(3, 1, 2, multiply=True))


def test_static(build: Callable[..., CompiledGraph]) -> None:
    graph = build(SIMPLE, SIMPLE_CODE)
    a, b = torch.randn(8), torch.randn(8)
    first, = graph(a, b)
    second, = graph([b, a])
    torch.testing.assert_close(first, (a + b) * b)
    torch.testing.assert_close(second, (a + b) * a)
    assert graph.calls == 2 and graph.memory == {"arena": 64, "persistent": 0, "outputs": 32}


def test_boxed_arguments_are_released(build: Callable[..., CompiledGraph]) -> None:
    graph = build(SIMPLE, SIMPLE_CODE)
    assert graph._boxed_call
    args = [torch.randn(8), torch.randn(8)]
    alive = weakref.ref(args[0])
    graph(args)
    assert args == []
    gc.collect()
    assert alive() is None


def test_wrong_number_of_arguments(build: Callable[..., CompiledGraph]) -> None:
    with pytest.raises(TypeError, match="takes 2 arguments, got 1"):
        build(SIMPLE, SIMPLE_CODE)(torch.randn(8))


def test_strict_mode_checks_arguments(build: Callable[..., CompiledGraph]) -> None:
    graph = build(SIMPLE, SIMPLE_CODE, check_inputs=True)
    graph(torch.randn(8), torch.randn(8))
    for bad in (torch.randn(9), torch.randn(16)[::2], torch.randn(8).double(), torch.randn(8, 1)):
        with pytest.raises(ValueError, match="argument 'x1' of 'main'"):
            graph(torch.randn(8), bad)


def test_error_codes(build: Callable[..., CompiledGraph]) -> None:
    for code, message in ((1, "row 3 is out of range"), (2, "index out of range.*code 2")):
        graph = build(manifest([f32(8)], [f32(8)], [["call", "main_0"]], errors={"1": "row 3 is out of range"}),
                      function("main_0", code=code))
        for _ in range(2):  # frames and arenas are given back
            with pytest.raises(IndexError, match=message):
                graph(torch.randn(8))


def test_inference_mode_and_output_kind(build: Callable[..., CompiledGraph]) -> None:
    graph = build(SIMPLE, SIMPLE_CODE)
    with torch.inference_mode():
        out, = graph(torch.ones(8), torch.ones(8))
    assert out.is_inference() and out.tolist() == [2.0] * 8
    out, = graph(torch.ones(8, requires_grad=True), torch.ones(8))
    assert not out.is_inference() and not out.requires_grad


# -- results

def test_result_kinds(build: Callable[..., CompiledGraph]) -> None:
    described = manifest([f32(8), f32(8)], [f32(8), f32()], [["call", "main_0"]], results=[
        {"kind": "input", "input": 1}, {"kind": "buffer", "buffer": 0}, {"kind": "same", "result": 1}, {"kind": "none"},
        {"kind": "int", "expr": ["mul", 3, 4]}, {"kind": "view", "input": 0, "shape": [2, 2], "strides": [4, 1], "offset": 1},
        {"kind": "item", "buffer": 1}])
    graph = build(described, function("main_0", op(0, 1, 2), op(0, 1, 3, n="1")))
    base = torch.arange(20.0)
    a, b = base[2:10], torch.ones(8)
    got = graph(a, b)
    assert got[0] is b and got[2] is got[1] and got[3] is None and got[4] == 12
    torch.testing.assert_close(got[1], a + 1)
    torch.testing.assert_close(got[5], base[3:].as_strided((2, 2), (4, 1)))
    assert got[5].untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
    assert got[6] == 3.0


def test_output_strides(build: Callable[..., CompiledGraph]) -> None:
    graph = build(manifest([f32(8), f32(8)], [f32(2, 4, strides=[1, 2])], [["call", "main_0"]]),
                  function("main_0", op(0, 1, 2)))
    out, = graph(torch.arange(8.0), torch.zeros(8))
    assert out.stride() == (1, 2)
    torch.testing.assert_close(out, torch.arange(8.0).view(4, 2).t())


def test_written_inputs_get_a_new_version(build: Callable[..., CompiledGraph]) -> None:
    graph = build(manifest([f32(8), f32(8)], [], [["call", "main_0"]], mutated=[0]), function("main_0", op(0, 1, 0)))
    a = torch.ones(8)
    version = a._version
    assert graph(a, torch.ones(8)) == []
    assert a.tolist() == [2.0] * 8 and a._version > version
    with torch.inference_mode():
        a = torch.ones(8)
        graph(a, a)
        assert a.tolist() == [2.0] * 8


# -- symbols

SYMBOLIC = manifest([f32("s0", position=1), f32("s0", "s1", position=3)], [f32("s0"), f32(["add", "s0", "s1"], strides=[1])],
                    [["call", "main_0"]], symbols=["s1", "s0"], symbol_args=[[0, "s0"], [2, None]],
                    symbol_sources=[["s1", 1, 1, "size"]], arena=["mul", ["floordiv", ["add", ["mul", "s0", 4], 63], 64], 64])


def test_symbols(build: Callable[..., CompiledGraph]) -> None:
    graph = build(SYMBOLIC, function("main_0", op(0, 0, 4, n="%s1"), op(4, 0, 2, n="%s1"), symbols=2))
    for n, m in ((3, 2), (100, 1), (3, 2), (0, 4)):
        x = torch.randn(n)
        first, second = graph(n, x, None, torch.randn(n, m))
        torch.testing.assert_close(first, 3 * x)
        assert second.shape == (n + m,)
    assert len(graph._memo) == 3


def test_remembered_sizes_are_bounded(build: Callable[..., CompiledGraph]) -> None:
    graph = build(SYMBOLIC, function("main_0"))
    for n in range(1300):
        graph(n, torch.empty(n), None, torch.empty(n, 1))
    assert len(graph._memo) <= 512


def test_strides_as_symbols(build: Callable[..., CompiledGraph]) -> None:
    graph = build(manifest([f32(4, strides=["s0"])], [f32("s0")], [["call", "main_0"]], symbols=["s0"],
                           symbol_sources=[["s0", 0, 0, "stride"]]), function("main_0"))
    assert graph(torch.randn(40)[::7][:4])[0].shape == (7,)


# -- parameters

# persistent 0 = x1 + x1 (transient), persistent 1 = persistent 0 * x1; out = x0 + persistent 1
PACKED = manifest([f32(8), f32(8)], [f32(8)], [["call", "main_0"]], persistent=[
    {"bytes": 32, "guards": [1], "pack": "main_pack_0", "transient": True, "symbolic": False},
    {"bytes": 32, "guards": [1], "pack": "main_pack_1", "transient": False, "symbolic": False}])
PACKED_CODE = (function("main_0", op(0, 4, 2)) + function("main_pack_0", op(1, 1, 3)) + function("main_pack_1",
                                                                                                 op(3, 1, 4, multiply=True)))


@pytest.fixture(params=["native", "python"])
def packed(request: Any, monkeypatch: pytest.MonkeyPatch, build: Callable[..., CompiledGraph]) -> Iterator[tuple[CompiledGraph, Callable[..., None]]]:
    """With the native entry, and as it is where objects can't be read."""
    if request.param == "python":
        monkeypatch.setattr(executor, "make_entry", lambda *args: None)
    graph = build(PACKED, PACKED_CODE)

    def check(w: torch.Tensor, packs: int) -> None:
        x = torch.randn(8)
        torch.testing.assert_close(graph(x, w)[0], x + 2 * w.detach() * w.detach())
        assert graph.packs == packs

    yield graph, check


def test_parameters_are_packed_once(packed: Any) -> None:
    graph, check = packed
    w = torch.nn.Parameter(torch.randn(8))
    assert graph.memory["persistent"] == 0
    check(w, 2)
    check(w, 2)
    assert graph.memory["persistent"] == 32


def test_changed_parameters_are_packed_again(packed: Any) -> None:
    graph, check = packed
    w = torch.nn.Parameter(torch.randn(8))
    check(w, 2)
    with torch.no_grad():
        w.mul_(3)
    check(w, 4)
    check(w, 4)
    w.data = torch.randn(8)
    check(w, 6)
    check(torch.nn.Parameter(torch.randn(8)), 8)
    torch.optim.SGD([w], lr=0.1)
    w.grad = torch.ones(8)
    torch.optim.SGD([w], lr=0.1).step()
    check(w, 10)
    w.data.mul_(2)  # torch does not count this
    graph.invalidate()
    check(w, 12)
    with torch.inference_mode():  # a normal tensor keeps its counter here
        check(w, 12)
        w.add_(1)
        check(w, 14)
        check(w, 14)


def test_an_address_used_again_is_noticed(packed: Any) -> None:
    """A freed parameter's memory may go to the next one, whose version counter is the same."""
    _, check = packed
    memory = np.arange(8, dtype=np.float32)
    w = torch.from_numpy(memory)
    check(w, 2)
    check(w, 2)
    del w
    memory += 1
    w = torch.from_numpy(memory)
    assert w._version == 0
    check(w, 4)


def test_inference_tensors_are_packed_in_every_call(packed: Any) -> None:
    _, check = packed
    with torch.inference_mode():
        w = torch.nn.Parameter(torch.randn(8), requires_grad=False)
        with pytest.warns(RuntimeWarning, match="inference_mode") as caught:
            check(w, 2)
            w.mul_(2)
            check(w, 4)
        assert len(caught) == 1


def test_parameters_do_not_outlive_their_owner(packed: Any) -> None:
    _, check = packed
    w = torch.randn(8)
    alive = weakref.ref(w)
    check(w, 2)
    del w
    gc.collect()
    assert alive() is None


def test_only_what_changed_is_packed(build: Callable[..., CompiledGraph]) -> None:
    graph = build(manifest([f32(8), f32(8)], [f32(8)], [["call", "main_0"]], persistent=[
        {"bytes": 32, "guards": [0], "pack": "main_pack_0", "transient": False, "symbolic": False},
        {"bytes": 32, "guards": [1], "pack": "main_pack_1", "transient": False, "symbolic": False}]),
        function("main_0", op(3, 4, 2)) + function("main_pack_0", op(0, 0, 3)) + function("main_pack_1", op(1, 1, 4)))
    a, b = torch.randn(8), torch.randn(8)
    graph(a, b)
    a.add_(1)
    torch.testing.assert_close(graph(a, b)[0], 2 * (a + b))
    assert graph.packs == 3


def test_packing_depends_on_symbols(build: Callable[..., CompiledGraph]) -> None:
    graph = build(manifest([f32("s0"), f32(64)], [f32("s0")], [["call", "main_0"]], symbols=["s0"],
                           symbol_sources=[["s0", 0, 0, "size"]], persistent=[
        {"bytes": ["mul", "s0", 4], "guards": [1], "pack": "main_pack_0", "transient": False, "symbolic": True}]),
        function("main_0", op(0, 3, 2, n="%s0"), symbols=1) + function("main_pack_0", op(1, 1, 3, n="%s0"), symbols=1))
    w = torch.randn(64)
    for n, packs in ((8, 1), (8, 1), (50, 2), (8, 3)):
        x = torch.randn(n)
        torch.testing.assert_close(graph(x, w)[0], x + 2 * w[:n])
        assert graph.packs == packs


# -- threads

def test_threads_share_a_graph_while_its_parameter_changes(build: Callable[..., CompiledGraph]) -> None:
    """Every result comes from one state of the parameter, whichever thread packs."""
    n = 20_000
    graph = build(manifest([f32(n), f32(n)], [f32(n)], [["call", "main_0"]], arena=4 * n + 64, persistent=[
        {"bytes": 4 * n, "guards": [1], "pack": "main_pack_0", "transient": False, "symbolic": False}]),
        function("main_0", op(0, 3, 4, n=str(n)), op(4, 0, 2, n=str(n))) + function("main_pack_0", op(1, 1, 3, n=str(n))))
    weights = [torch.full((n,), float(k)) for k in range(4)]
    problems: list[Any] = []

    def work(k: int) -> None:
        try:
            for i in range(60):
                w = weights[(k + i) % 4]
                x = torch.full((n,), float(k))
                out, = graph(x, w)
                if not bool((out == 2 * k + 2 * w[0]).all()):
                    problems.append((k, i))
        except Exception as e:
            problems.append(e)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert problems == []


# -- operator calls

def extern(target: str, args: list[Any], operands: list[Any], results: list[Any], buffers: list[int], **more: Any) -> list[Any]:
    return ["extern", {"target": target, "args": args, "kwargs": {}, "operands": operands,
                       "operand_strides": [None] * len(operands),
                       "result_kinds": ["tensor"] * len(results), "results": results, "buffers": buffers, "defines": [],
                       **more}]


def place(space: str, index: int = 0, offset: Any = 0, **layout: Any) -> dict[str, Any]:
    return {"space": space, "index": index, "offset": offset, **(layout or f32(8))}


def test_operators_between_segments(build: Callable[..., CompiledGraph]) -> None:
    """arena = x0 + x1; t = sort(arena) (values, indices); out = t + x0; indices are returned as they come."""
    described = manifest([f32(8), f32(8)], [f32(8), {"dtype": "i64", "shape": [8], "strides": [1]}, f32(8, kind="extern")], [
        ["call", "main_0"],
        extern("aten.sort.default", [{"operand": 0}, 0, True], [place("arena", offset=64)],
               [f32(8), {"dtype": "i64", "shape": [8], "strides": [1]}], [2, 1]),
        ["call", "main_1"], ["drop", [2]]], arena=128)
    # the arena's base is the last entry: main_0 writes 64 bytes further on by way of a shifted table entry
    shift = ("  %q = getelementptr ptr, ptr %t, i64 5\n  %b = load ptr, ptr %q\n"
             "  %c = getelementptr i8, ptr %b, i64 64\n  store ptr %c, ptr %q\n")
    back = "  store ptr %b, ptr %q\n"
    graph = build(described, function("main_0", shift, op(0, 1, 5), back), function("main_1", op(4, 0, 2)))
    a, b = torch.randn(8, requires_grad=True), torch.randn(8)
    out, indices = graph(a, b)
    values, want = torch.sort(a + b, 0, True)
    torch.testing.assert_close(out, (values + a).detach())
    assert torch.equal(indices, want) and not out.requires_grad
    assert graph.calls == 2 and graph.extern_calls == 1


def test_results_that_share_memory_with_operands_are_copied(build: Callable[..., CompiledGraph]) -> None:
    graph = build(manifest([f32(8)], [f32(8)], [extern("aten.view.default", [{"operand": 0}, [8]], [place("input")], [f32(8)],
                                                       [0])]))
    x = torch.randn(8)
    out, = graph(x)
    assert torch.equal(out, x) and out.data_ptr() != x.data_ptr() and graph.calls == 0


def test_results_get_the_declared_strides(build: Callable[..., CompiledGraph]) -> None:
    spec = f32(2, 3, strides=[1, 2])
    graph = build(manifest([f32(2, 3)], [spec], [extern("aten.exp.default", [{"operand": 0}], [place("input", **f32(2, 3))],
                                                        [spec], [0])]))
    x = torch.randn(2, 3)
    out, = graph(x)
    assert out.stride() == (1, 2) and torch.equal(out, x.exp())


def test_operands_get_the_strides_of_eager(build: Callable[..., CompiledGraph]) -> None:
    """clone(preserve_format) shows the strides that it was given."""
    spec = f32(2, 3, strides=[1, 2])
    step = extern("aten.clone.default", [{"operand": 0}], [place("input", **f32(2, 3))], [spec], [0], operand_strides=[[1, 2]])
    x = torch.randn(2, 3)
    out, = build(manifest([f32(2, 3)], [spec], [step]))(x)
    assert out.stride() == (1, 2) and torch.equal(out, x)


def test_views_of_operands_and_constants(build: Callable[..., CompiledGraph]) -> None:
    import base64
    import struct
    constant = base64.b64encode(struct.pack("<6f", *range(6))).decode()
    step = extern("aten.add.Tensor", [{"operand": 0}, {"operand": 1}], [place("input", 0, 8, **f32(2, 2, strides=[3, 1])),
                                                                     place("constant", 0, 4, **f32(2, 2))], [f32(2, 2)], [0])
    x = torch.arange(10.0)
    out, = build(manifest([f32(10)], [f32(2, 2)], [step], constants=[constant]))(x)
    assert out.tolist() == [[2 + 1, 3 + 2], [5 + 3, 6 + 4]]


def test_encoded_arguments(build: Callable[..., CompiledGraph]) -> None:
    steps = [
        extern("aten.full.default", [[2, {"expr": ["add", "s0", 1]}], {"float": "-inf"}], [],
               [f32(2, ["add", "s0", 1], strides=[["add", "s0", 1], 1])],
               [0], kwargs={"dtype": {"dtype": "f32"}, "device": {"device": "cpu"}, "layout": {"layout": "torch.strided"},
                            "pin_memory": False}),
        extern("aten.clone.default", [{"operand": 0}], [place("input", **f32("s0"))], [f32("s0")], [1],
               kwargs={"memory_format": {"memory_format": "torch.contiguous_format"}}),
        extern("aten.add.Scalar", [{"operand": 0}, {"complex": [1.0, 2.0]}], [place("input", **f32("s0"))],
               [{"dtype": "c64", "shape": ["s0"], "strides": [1]}], [2])]
    graph = build(manifest([f32("s0")], [f32(2, ["add", "s0", 1], strides=[["add", "s0", 1], 1]), f32("s0"),
                                         {"dtype": "c64", "shape": ["s0"], "strides": [1]}], steps,
                           symbols=["s0"], symbol_sources=[["s0", 0, 0, "size"]]))
    x = torch.randn(5)
    filled, cloned, added = graph(x)
    assert torch.equal(filled, torch.full((2, 6), float("-inf"))) and torch.equal(cloned, x) and torch.equal(added,
                                                                                                             x + (1 + 2j))


def test_sizes_that_an_operator_decides(build: Callable[..., CompiledGraph]) -> None:
    """u = nonzero(x); out = a native buffer of u rows; the number of rows is returned too."""
    i64 = {"dtype": "i64", "shape": ["u0", 1], "strides": [1, 1]}
    described = manifest([f32(8)], [f32("u0"), {**i64, "kind": "extern"}, f32("u0", kind="late")], [
        extern("aten.nonzero.default", [{"operand": 0}], [place("input")], [i64], [1], defines=[["u0", 0, 0]]),
        ["allocate", [0, 2]], ["call", "main_1"], ["drop", [1, 2]]], symbols=["u0"],
        results=[{"kind": "buffer", "buffer": 0}, {"kind": "int", "expr": "u0"}])
    graph = build(described, function("main_1", op(0, 0, 3, n="%s0"), op(3, 0, 1, n="%s0"), symbols=1))
    for x in (torch.tensor([1.0, 0, 2, 3, 0, 0, 0, 1]), torch.zeros(8), torch.ones(8)):
        out, count = graph(x)
        n = int(x.count_nonzero())
        assert count == n and torch.equal(out, 3 * x[:n])


def test_integers_that_an_operator_returns(build: Callable[..., CompiledGraph]) -> None:
    scalar = {"dtype": "i64", "shape": [], "strides": []}
    graph = build(manifest([{"dtype": "i64", "shape": [], "strides": []}], [{**scalar, "kind": "extern"}, f32("u0")], [
        extern("aten._local_scalar_dense.default", [{"operand": 0}], [place("input", **scalar)], [scalar], [0],
               result_kinds=["int"],
               defines=[["u0", 0, -1]]), ["allocate", [1]]], symbols=["u0"], results=[{"kind": "buffer", "buffer": 1}]))
    assert graph(torch.tensor(13))[0].shape == (13,)


def test_a_size_of_a_later_result(build: Callable[..., CompiledGraph]) -> None:
    """`defines` counts the results that are used: here the counts, the third of three."""
    i64 = {"dtype": "i64", "shape": ["u0"], "strides": [1]}
    graph = build(manifest([f32(8)], [{**i64, "kind": "extern"}], [
        extern("aten._unique2.default", [{"operand": 0}, True, False, True], [place("input")], [i64], [0],
               result_kinds=["none", "none", "tensor"], defines=[["u0", 0, 0]])],
        symbols=["u0"], results=[{"kind": "buffer", "buffer": 0}, {"kind": "int", "expr": "u0"}]))
    counts, n = graph(torch.tensor([1.0, 2, 1, 1, 5, 2, 1, 1]))
    assert counts.tolist() == [5, 2, 1] and n == 3


def test_the_place_of_a_view(build: Callable[..., CompiledGraph]) -> None:
    graph = build(manifest([f32(8)], [f32(3)], [
        extern("aten.slice.Tensor", [{"operand": 0}, 0, 4, 7], [place("input")], [f32(3)], [0], defines=[["u0", 0, -2]])],
        symbols=["u0"], results=[{"kind": "buffer", "buffer": 0}, {"kind": "int", "expr": "u0"}]))
    part, at = graph(torch.arange(10.0)[2:])
    assert part.tolist() == [6, 7, 8] and at == 4


def test_an_operator_that_returns_something_else(build: Callable[..., CompiledGraph]) -> None:
    graph = build(manifest([f32(8)], [f32(9)], [extern("aten.exp.default", [{"operand": 0}], [place("input")], [f32(9)], [0])]))
    with pytest.raises(RuntimeError, match=r"aten.exp.default.*shape \(8,\).*compiled for.*\(9,\)"):
        graph(torch.randn(8))


def test_errors_of_segments_stop_the_program(build: Callable[..., CompiledGraph]) -> None:
    graph = build(manifest([f32(8)], [f32(8)], [["call", "main_0"], extern("aten.exp.default", [{"operand": 0}],
                                                                           [place("input")], [f32(8)], [0])]),
                  function("main_0", code=1))
    with pytest.raises(IndexError):
        graph(torch.randn(8))
    assert graph.extern_calls == 0


# -- manifests that are wrong

@pytest.mark.parametrize("change", [
    {"steps": [["call", "main_9"]]}, {"steps": [["jump", 1]]}, {"arena": ["pow", 2, 3]}, {"arena": "s7"}, {"symbols": None},
    {"inputs": [{"name": "x", "position": 3, **f32(8)}]}, {"buffers": [{"kind": "output", "dtype": "f99", "shape": [],
                                                                        "strides": []}]},
    {"results": [{"kind": "buffer",
                  "buffer": 5}]}, {"results": [{"kind": "what"}]}, {"mutated": [9]}, {"symbol_sources": [["s0", 0, 0, "size"]]},
    {"persistent": [{"bytes": 4, "guards": [7], "pack": None, "transient": False, "symbolic": False}]}, {"steps": [["drop",
                                                                                                                    [4]]]},
    {"steps": [["extern", {"target": "aten.nothing.default"}]]},
    {"steps": [extern("aten.no_such_operator.default", [], [], [], [])]}, {"steps": [extern("os.system", [], [], [], [])]},
    {"steps": [extern("aten.exp.default", [{"operand": 0, "x": 1}], [place("input")], [f32(8)], [0])]},
    {"steps": [extern("aten.exp.default", [{"dtype": "load"}], [place("input")], [f32(8)], [0])]},
    {"steps": [extern("aten.exp.default", [{"operand": 0}], [place("elsewhere")], [f32(8)], [0])]},
    {"steps": [extern("aten.exp.default", [{"operand": 0}], [place("input", 4)], [f32(8)], [0])]},
])
def test_malformed_manifests(build: Callable[..., CompiledGraph], change: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError):
        build({**SIMPLE, **change}, SIMPLE_CODE)


@pytest.mark.parametrize("key", sorted(SIMPLE))
def test_missing_fields(build: Callable[..., CompiledGraph], key: str) -> None:
    with pytest.raises(ArtifactError):
        build({k: v for k, v in SIMPLE.items() if k != key}, SIMPLE_CODE)


# -- the arena pool

def test_arenas_are_reused_and_trimmed() -> None:
    pool = ArenaPool(keep_bytes=1000)
    first = pool.acquire(100)
    second = pool.acquire(100)
    assert first.data_ptr() != second.data_ptr() and first.data_ptr() % 64 == 0
    pool.release(first)
    assert pool.acquire(64) is first
    pool.release(first)
    assert pool.acquire(600).nbytes >= 600
    pool.release(pool.acquire(5000))
    assert pool.idle_bytes == 0
    for a in [pool.acquire(400) for _ in range(4)]:
        pool.release(a)
    assert 0 < pool.idle_bytes <= 1000
    pool.trim()
    assert pool.idle_bytes == 0
