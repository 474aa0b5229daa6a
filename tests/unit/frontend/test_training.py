"""Forward and backward graphs of AOTAutograd against eager's gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from aicc.frontend.decompositions import decomposition_table
from aicc.frontend.importer import externs, import_graph
from aicc.ir.interpreter import interpret
from aicc.ir.verifier import verify
from torch._dynamo.backends.common import aot_autograd

TABLE = decomposition_table()


def interpreted(gm, _):
    """A compiler for AOTAutograd that imports the graph and interprets it."""
    module = import_graph(gm)
    verify(module)
    assert not [op["target"] for op in externs(module)]
    func = module.body.first
    sizes = {str(a["expr"]): a["position"] for a in func["symbol_args"] if a["expr"] is not None}

    def run(args):
        values = iter(interpret(module, [args[a["position"]] for a in func["arg_attrs"]],
                                symbols={s: args[i] for s, i in sizes.items() if s.isidentifier()}))
        out = [None if a["kind"] == "none" else next(values) for a in func["result_attrs"]]
        return [int(v) if a["kind"] == "int" else v for v, a in zip(out, func["result_attrs"], strict=True)]

    run._boxed_call = True
    return run


BACKEND = aot_autograd(fw_compiler=interpreted, decompositions=TABLE)
CASES = {
    "linear gelu": (lambda x, w, c: F.gelu(F.linear(x, w, c)), [(3, 4), (5, 4), (5,)]),
    "layer_norm": (lambda x, w, c: F.layer_norm(x, (8,), w, c), [(3, 8), (8,), (8,)]),
    "rms_norm": (lambda x, w: F.rms_norm(x, (8,), w), [(3, 8), (8,)]),
    "group_norm": (lambda x, w, c: F.group_norm(x, 2, w, c), [(2, 4, 3, 3), (4,), (4,)]),
    "batch_norm": (lambda x, w, c: F.batch_norm(x, None, None, w, c, training=True), [(4, 3, 5, 5), (3,), (3,)]),
    "softmax": (lambda x: x.softmax(-1).square(), [(3, 8)]),
    "silu glu": (lambda x: F.glu(F.silu(x)), [(3, 8)]),
    "conv": (lambda x, w, c: F.conv2d(x, w, c, stride=2, padding=1), [(2, 3, 8, 8), (4, 3, 3, 3), (4,)]),
    "conv groups": (lambda x, w: F.conv2d(x, w, padding=2, dilation=2, groups=2), [(2, 4, 8, 7), (6, 2, 3, 3)]),
    "conv stride 3": (lambda x, w: F.conv1d(x, w, stride=3), [(2, 3, 12), (4, 3, 2)]),
    "conv_transpose": (lambda x, w: F.conv_transpose2d(x, w, stride=2, padding=1, groups=2), [(2, 4, 5, 5), (4, 3, 3, 3)]),
    "max_pool": (lambda x: F.max_pool2d(x, 3, 2, 1), [(2, 3, 8, 8)]),
    "avg_pool": (lambda x: F.avg_pool2d(x, 2), [(2, 3, 8, 8)]),
    "avg_pool padded": (lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True), [(2, 3, 8, 8)]),
    "attention": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), [(2, 3, 8, 16), (2, 3, 6, 16), (2, 3, 6, 16)]),
    "attention causal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), [(2, 3, 8, 16)] * 3),
    "slices": (lambda x: x[:, 1:4] * x[:, ::2] + x[0, :3], [(4, 6)]),
    "gathers": (lambda x: x[torch.tensor([0, 2, 2])] * x.gather(0, torch.tensor([[1, 1, 0, 2]])), [(3, 4)]),
    "embedding": (lambda w: F.embedding(torch.tensor([[1, 2], [2, 0]]), w), [(5, 4)]),
    "cross_entropy": (lambda x: F.cross_entropy(x, torch.tensor([1, -100, 3])), [(3, 5)]),
    "norms": (lambda x: x.norm() + x.logsumexp(1).sum() + x.var(0).sum(), [(4, 6)]),
    "upsample": (lambda x: F.interpolate(x, scale_factor=2.0), [(1, 2, 3, 3)]),
    "cumulative": (lambda x: x.cumsum(1) * x.amax(1, keepdim=True), [(3, 5)]),
    "pads": (lambda x: F.pad(F.pad(x, (1, 2)), (1, 1), mode="reflect"), [(2, 3, 5)]),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("fn", "shapes"), CASES.values(), ids=CASES)
def test_gradients(fn, shapes, dynamic):
    torch.manual_seed(0)
    args = [torch.randn(*s, requires_grad=True) for s in shapes]
    expected = fn(*args)
    seed = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, args, seed)
    torch._dynamo.reset()
    got = torch.compile(fn, backend=BACKEND, dynamic=dynamic)(*args)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for g, w in zip(torch.autograd.grad(got, args, seed), wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)
