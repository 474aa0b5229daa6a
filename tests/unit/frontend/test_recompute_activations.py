"""What is kept for the backward pass of a feed-forward layer: the norm's result, but not GELU's, which its gradient's kernel writes along."""

import torch
from aicc.compiler.dynamo import aot_backend
from torch import nn
from torch._functorch.aot_autograd import make_boxed_func


def test_gelu_is_computed_again_and_a_norm_is_not():
    saved = []

    def compiler(role):
        def keep(gm, _):
            if role == "forward":
                saved.extend(str(n.target) for n in gm.graph.output_node().args[0])
            return make_boxed_func(gm.forward)
        return keep
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128))
    x = torch.randn(256, 128, requires_grad=True)
    torch._dynamo.reset()
    made = torch.compile(model, backend=aot_backend(compiler), dynamic=False)
    made(x).square().mean().backward()
    got, x.grad = x.grad, None
    model(x).square().mean().backward()
    torch.testing.assert_close(got, x.grad)
    graphs = [n for n in saved if n != "getitem"]
    assert sum("gelu" in n for n in graphs) == 0 and saved.count("<built-in function getitem>") == 3  # result, mean, deviation
