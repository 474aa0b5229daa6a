"""The integer program over one block's ops: equal to brute force on small graphs, Megatron's cut on a transformer, and bounded by memory."""

from dataclasses import replace
from math import inf

import pytest
import torch
from aicc.compiler.model_file import LoadedModel
from aicc.compiler.planning.op_capture import capture
from aicc.passes.shard.cluster import load_cluster
from aicc.passes.shard.collectives import axis_group
from aicc.passes.shard.intra_op import IntraProblem, conversion, enumerate_all, solve
from aicc.passes.shard.model import ModelConfig
from aicc.passes.shard.op_graph import Loop, Operand, OpGraph, OpNode, Tensor, graph_hash, strategies
from aicc.passes.shard.plan import Plan
from aicc.passes.shard.step import predict_step
from aicc.passes.shard.traced import traced_config

CLUSTER = load_cluster("h100-sxm", nodes=2)
ROWS, WIDTH, INNER = 2048, 1024, 4096


def linear(name: str, x: int, out: int, n: int, k: int) -> OpNode:
    return OpNode(name, "gemm", (Loop(1, "parallel"), Loop(ROWS, "parallel"), Loop(n, "parallel"), Loop(k, "reduction")),
                  (Operand(x, (0, 1, 3), True), Operand(-1, (2, 3), False, Tensor((n, k)))), (out,), (0, 1, 2))


def pointwise(name: str, inputs: tuple[int, ...], out: int, n: int, saved: bool) -> OpNode:
    loops = (Loop(1, "parallel"), Loop(ROWS, "parallel"), Loop(n, "parallel"))
    return OpNode(name, "memory", loops, tuple(Operand(v, (0, 1, 2), saved) for v in inputs), (out,), (0, 1, 2))


def mlp() -> OpGraph:
    shapes = [(1, ROWS, WIDTH), (1, ROWS, INNER), (1, ROWS, INNER), (1, ROWS, WIDTH), (1, ROWS, WIDTH)]
    nodes = (linear("up", 0, 1, INNER, WIDTH), pointwise("gelu", (1,), 2, INNER, True), linear("down", 2, 3, WIDTH, INNER),
             pointwise("add", (0, 3), 4, WIDTH, False))
    return OpGraph(tuple(Tensor(s) for s in shapes), nodes, (0,), (4,))


def test_strategies_of_a_linear_layer():
    found = {s.loop: s for s in strategies(linear("l", 0, 1, 64, 32), 4)}
    assert set(found) == {-1, 1, 2, 3}  # the batch of one cannot be cut
    columns, rows = found[2], found[3]
    assert (columns.operands[0].value, columns.operands[0].gradient, columns.result.value) == ("R", "P", 2)
    assert (rows.operands[0].value, rows.result.value, rows.result.gradient) == (2, "P", "R")
    assert -1 in {s.loop for s in strategies(linear("l", 0, 1, 63, 31), 4)} and len(strategies(linear("l", 0, 1, 63, 31), 4)) == 2


def test_conversions():
    assert conversion("P", "R") == "all_reduce" and conversion("P", 1) == "reduce_scatter" and conversion(1, "R") == "all_gather"
    assert conversion(0, 1) == "all_to_all" and conversion("R", 1) == "" and conversion("R", "P") is None


@pytest.mark.parametrize("memory", [inf, 2.0e8, 1.2e8])
@pytest.mark.parametrize("zero", [(0,), (0, 1, 3)])
@pytest.mark.parametrize("residual", [None, "R", 1])
def test_equals_brute_force(memory, zero, residual):
    problem = IntraProblem(mlp(), CLUSTER.device, axis_group(CLUSTER, 1, 4), axis_group(CLUSTER, 4, 4), residual=residual, zero=zero,
                           memory=memory, micro_batches=4)
    allowed = [seconds for seconds, nbytes in enumerate_all(problem) if nbytes <= memory * (1 + 1e-9)]
    if not [s for s in allowed if s < inf]:
        with pytest.raises(ValueError, match="no assignment keeps"):
            solve(problem)
        return
    result = solve(problem)
    assert result.seconds == pytest.approx(min(allowed), rel=1e-9)
    assert result.nbytes <= memory * (1 + 1e-9)
    assert result.bound <= result.seconds * (1 + 1e-9)
    assert result.gap == 0.0


def test_memory_bound_changes_the_answer():
    problem = IntraProblem(mlp(), CLUSTER.device, axis_group(CLUSTER, 1, 4), axis_group(CLUSTER, 4, 4), zero=(0, 1, 3), micro_batches=64)
    free = solve(problem)
    tight = solve(replace(problem, memory=free.nbytes * 0.6))
    assert tight.nbytes <= free.nbytes * 0.6 and tight.seconds > free.seconds
    assert sum(c.nbytes for c in tight.choices) < sum(c.nbytes for c in free.choices)


class Block(torch.nn.Module):
    def __init__(self, d: int = 2048, heads: int = 16):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, torch.nn.LayerNorm(d), torch.nn.LayerNorm(d)
        self.q, self.k, self.v, self.out = (torch.nn.Linear(d, d) for _ in range(4))
        self.up, self.down = torch.nn.Linear(d, 4 * d), torch.nn.Linear(4 * d, d)

    def forward(self, x):
        b, t, d = x.shape
        h = self.norm1(x)
        q, k, v = (f(h).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.out(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d))
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))


class Net(torch.nn.Module):
    def __init__(self, layers: int = 6):
        super().__init__()
        self.embed, self.layers, self.head = torch.nn.Embedding(32000, 2048), torch.nn.ModuleList(Block() for _ in range(layers)), \
            torch.nn.Linear(2048, 32000, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return torch.nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


@pytest.fixture(scope="module")
def traced():
    with torch.device("meta"):
        return capture(LoadedModel("net", Net().to(torch.bfloat16), (torch.zeros(2, 2048, dtype=torch.long),)))


def test_equal_blocks_are_one_and_nothing_is_lost(traced):
    assert [(k.kind, k.count) for k in traced.blocks] == [("embedding", 1), ("block0", 6), ("head", 1)]
    assert traced.unknown == ()
    with torch.device("meta"):
        assert sum(k.count * k.graph.parameters() for k in traced.blocks) == sum(p.numel() for p in Net().parameters())
    assert traced.blocks[1].paths == tuple(f"layers.{i}" for i in range(6))
    gemms = [n for n in traced.blocks[1].graph.nodes if n.kind == "gemm"]
    assert [n.path.split(".")[-1] for n in gemms] == ["q", "k", "v", "out", "up", "down"]


def test_blocks_that_differ_are_told_apart():
    with torch.device("meta"):
        net = Net(3)
        net.layers[1] = Block(heads=8)
        found = capture(LoadedModel("net", net, (torch.zeros(1, 64, dtype=torch.long),)))
    assert [(k.kind, k.count) for k in found.blocks[1:-1]] == [("block0", 1), ("block1", 1), ("block0", 1)]
    assert len({graph_hash(k.graph) for k in found.blocks[1:-1]}) == 2


def test_the_program_finds_megatrons_cut_with_sequence_parallelism(traced):
    """Columns, then rows; reduce-scatter and all-gather around each pair (Korthikanti et al. 2022)."""
    graph = traced.blocks[1].graph
    result = solve(IntraProblem(graph, CLUSTER.device, axis_group(CLUSTER, 1, 8)))
    cut = {n.path.split(".")[-1]: n.loops[c.strategy.loop].kind for n, c in zip(graph.nodes, result.choices, strict=True) if n.kind == "gemm"}
    assert cut == {"q": "parallel", "k": "parallel", "v": "parallel", "out": "reduction", "up": "parallel", "down": "reduction"}
    assert result.residual == 1
    kinds = sorted(k for _, have, need, _ in result.conversions for k in (conversion(have.value, need.value),))
    assert kinds == ["all_gather", "all_gather", "reduce_scatter", "reduce_scatter"]
    assert result.bound == pytest.approx(result.seconds, rel=1e-6)  # the relaxation is integral here
    whole = solve(IntraProblem(graph, CLUSTER.device, axis_group(CLUSTER, 1, 8), residual="R"))
    assert whole.seconds > result.seconds


def test_traced_and_sized_models_agree(traced):
    """The same network by its ops and by its sizes: step time within 10 %, memory within 15 %, under one plan each way."""
    by_ops = traced_config("net", traced.blocks, traced.batch, CLUSTER, "bf16")
    by_size = ModelConfig("net", hidden=2048, layers=6, heads=16, vocab=32000, seq=2048, tied=False)
    assert by_ops.params() == pytest.approx(by_size.params(), rel=0.01)
    for plan in (Plan(dp=16, micro_batch=2), Plan(dp=4, tp=4, sp=True, micro_batch=2), Plan(dp=2, tp=4, pp=2, micro_batch=2, recompute="full")):
        a, b = (predict_step(c, plan, CLUSTER, 64) for c in (by_ops, by_size))
        assert a.seconds == pytest.approx(b.seconds, rel=0.10), plan.label
        assert a.peak_memory == pytest.approx(b.peak_memory, rel=0.15), plan.label
