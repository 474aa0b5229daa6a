"""The function around the ops: arguments, symbols, results, locations, effects and operators left to ATen."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from aicc.frontend.errors import UnsupportedError
from aicc.frontend.importer import externs, import_graph
from aicc.ir.interpreter import interpret
from aicc.ir.verifier import verify
from torch import nn
from torch._dynamo.backends.common import aot_autograd


def func_of(gm, **kwargs):
    module = import_graph(gm, **kwargs)
    verify(module)
    return module.body.first


def find(func, name):
    return next(op for op in func.body if op.name == f"graph.{name}")


def test_arguments(tools):
    gm = tools.trace(lambda x, w: x @ w, torch.randn(3, 4), torch.randn(5, 4).t())
    func = func_of(gm, name="f", arg_kinds=["input", "param"])
    assert func["sym_name"] == "f"
    assert [str(a.type) for a in func.body.args] == ["tensor<3x4xf32>", "tensor<4x5xf32, strides=[1, 4]>"]
    assert [(a["kind"], a["position"]) for a in func["arg_attrs"]] == [("input", 0), ("param", 1)]
    assert [a["name"] for a in func["arg_attrs"]] == [a.name for a in func.body.args]
    with pytest.raises(ValueError, match="1 entries for 2 placeholders"):
        import_graph(gm, arg_kinds=["input"])


def test_results(tools):
    func = func_of(tools.trace(lambda x: ((x + 1).t(), x * 2, (x * 2).clone()), torch.randn(3, 4)))
    assert func["result_attrs"] == ({"kind": "tensor", "strides": (1, 4)}, {"kind": "tensor"}, {"kind": "tensor"})


def test_same_value_twice_and_an_input(tools):
    x = torch.randn(3)
    module = import_graph(tools.trace(lambda x: (x, x + 1), x))
    assert torch.equal(interpret(module, [x])[0], x)


def test_size_arguments(tools):
    """Dynamo passes sizes as arguments: a bare symbol is defined there, and may be returned."""
    def double(x):
        return x * 2 + x.shape[0], x.shape[0] * 3

    x = torch.randn(6, 4)
    torch._dynamo.mark_dynamic(x, 0)
    gm, = tools.capture(double, x)
    func = func_of(gm)
    (entry,) = func["symbol_args"]
    name = str(entry["expr"])
    assert entry["position"] == 0 and func["arg_attrs"][0]["position"] == 1
    assert func["symbol_sources"] == {} and func["symbols"].keys() == {name}
    assert str(func.body.args[0].type) == f"tensor<{name}x4xf32>"
    kinds = [(a["kind"], str(a.get("expr"))) for a in func["result_attrs"]]
    assert ("tensor", "None") in kinds and all(k in ("tensor", "int") for k, _ in kinds)


def test_sizes_read_off_tensors(tools):
    func = func_of(tools.trace(lambda x, y: x.sum(0) + y, torch.randn(6, 4), torch.randn(4), dynamic=True))
    assert func["symbol_args"] == ()
    assert sorted(func["symbol_sources"].values()) == [(0, 0), (0, 1)]
    assert all(low >= 0 and high is None for low, high in func["symbols"].values())


def test_integer_result(tools):
    gm = tools.trace(lambda x: (x + 1, x.shape[0] * 2), torch.randn(6, 4), dynamic=True)
    func = func_of(gm)
    tensor, size = func["result_attrs"]
    assert tensor["kind"] == "tensor" and size["kind"] == "int" and str(size["expr"]).endswith("*2")
    assert [r.item() for r in interpret(func, [torch.randn(5, 4)])[1:]] == [10]


def test_locations(tools):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return F.gelu(self.linear(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Block()])

        def forward(self, x):
            return self.layers[0](x)

    forward, backward = tools.capture(Model(), torch.randn(2, 4))
    _, start = inspect.getsourcelines(Block.forward)
    gelu = find(func_of(forward), "gelu").location
    assert (gelu.file, gelu.line, gelu.module) == (__file__, start + 1, "layers.0")
    assert find(func_of(forward), "matmul").location.module == "layers.0.linear"
    erf = find(func_of(backward), "erf").location
    assert (erf.file, erf.line) == (__file__, start + 1) and erf.module.startswith("layers.0")


def test_mutation(tools):
    """A buffer that the graph writes becomes an assignment to the argument."""
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(3))

        def forward(self, x):
            self.count += x
            return self.count * 2

    graphs = []
    backend = aot_autograd(fw_compiler=lambda gm, _: graphs.append(gm) or gm, keep_inference_input_mutations=True)
    with torch.no_grad():
        torch.compile(Counter(), backend=backend)(torch.ones(3))
    module = import_graph(graphs[0])
    verify(module)
    assign = find(module.body.first, "assign")
    assert assign.operands[0] in module.body.first.body.args
    buffers = {a["name"]: torch.full((3,), 5.0) for a in module.body.first["arg_attrs"]}
    result, written = interpret(module, list(buffers.values()))
    assert module.body.first["result_attrs"][1]["alias_of_arg"] == assign.operands[0].index
    assert written.tolist() == [10.0] * 3
    assert result.tolist() == [20.0] * 3
    assert buffers[assign.operands[0].name].tolist() == [10.0] * 3


def test_constants(tools):
    module = tools.compare(lambda x: x + torch.tensor([[1, 2], [3, 4]]), torch.randn(2, 2))
    assert "constant" in tools.ops(module)


def test_extern(tools):
    module = tools.compare(lambda x: torch.mode(x.t(), dim=0, keepdim=True), torch.randn(3, 4), compiled=False)
    op, = externs(module)
    assert op["target"] == "aten.mode.default"
    assert op["args"] == ({"operand": 0}, 0, True)
    assert op["operand_strides"] == ((1, 4),)
    assert op["result_kinds"] == ("tensor", "tensor") and "no lowering" in op["reason"]
    assert [r.type.dtype.name for r in op.results] == ["f32", "i64"]


def test_extern_gives_only_what_is_read(tools):
    module = tools.compare(lambda x: torch.mode(x).indices, torch.randn(3, 4), compiled=False)
    op, = externs(module)
    assert op["result_kinds"] == ("none", "tensor") and len(op.results) == 1


def test_extern_arguments(tools):
    module = tools.load(lambda x: torch.rand_like(x, dtype=torch.float64), torch.randn(3, 4))
    op, = externs(module)
    assert op["random"] is True
    assert op["kwargs"]["dtype"] == {"dtype": "f64"}


def test_declined_row_leaves_nothing_behind(tools):
    """masked_fill by several values declines after it has begun; only the extern remains."""
    mask = torch.tensor([True, False, True, False])
    module = tools.load(lambda x, m, v: x.index_put((m,), v), torch.randn(4), mask, torch.randn(2))
    assert tools.ops(module) == ["extern"]
    assert "different values" in next(externs(module))["reason"]


def test_complex_numbers_go_to_aten(tools):
    module = tools.load(lambda x: torch.view_as_real(torch.view_as_complex(x) * 2.0), torch.randn(3, 2))
    assert {op["target"].split(".")[1] for op in externs(module)} >= {"view_as_complex", "view_as_real"}


def test_unsupported_graph_names_the_node(tools):
    gm = tools.trace(lambda x: x + 1, torch.randn(3))
    node = next(n for n in gm.graph.nodes if n.op == "call_function")
    node.target = lambda x, y: x
    with pytest.raises(UnsupportedError, match=r"add.*operator"):
        import_graph(gm)


def test_dropout_follows_the_generator(tools):
    """The mask comes from torch's generator, so that a seed gives eager's mask."""
    gm = tools.trace(lambda x: F.dropout(x, 0.3), torch.ones(1000))
    module = import_graph(gm)
    torch.manual_seed(7)
    expected = F.dropout(torch.ones(1000), 0.3)
    torch.manual_seed(7)
    (got,) = interpret(module, [torch.ones(1000)])
    torch.testing.assert_close(got, expected)
