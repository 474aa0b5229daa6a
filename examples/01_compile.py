"""Compile a small network for inference and for training, and compare with eager. Run it: python examples/01_compile.py"""

import torch

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.LayerNorm(128), torch.nn.Linear(128, 10))
x = torch.randn(8, 64)

compiled = torch.compile(model, backend="aicc")  # found by name: nothing to import

with torch.no_grad():
    print("inference: largest difference from eager", (compiled(x) - model(x)).abs().max().item())

compiled(x).square().mean().backward()  # forward and backward are compiled, each to one native function
gradients = [p.grad.clone() for p in model.parameters()]
model.zero_grad()
model(x).square().mean().backward()
print("training: largest difference of a gradient", max((g - p.grad).abs().max().item() for g, p in zip(gradients, model.parameters(), strict=True)))

x = torch.randn(5, 64)  # another batch size: torch asks for a second graph, with a symbol for the batch
with torch.no_grad():
    print("another batch: largest difference", (compiled(x) - model(x)).abs().max().item())
