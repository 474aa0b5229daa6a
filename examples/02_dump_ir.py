"""Watch the passes at work: how many ops of each kind there are after each pass.

Run it: python examples/02_dump_ir.py. The text itself: aicc dump-ir examples/02_dump_ir.py
"""

from collections import Counter

import torch
from aicc.compiler.driver import watching


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One head, written in plain PyTorch."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return torch.softmax(scores, dim=-1) @ v


def show(stage, after, module):
    """Called after every pass, and with None at the end of a stage."""
    if after is not None:
        counts = Counter(op.name for op in module.walk() if op.name.startswith(("graph.", "tensor.", "tile.kernel", "host.")))
        print(f"{stage:7} {after!s:16}", ", ".join(f"{name} x{n}" for name, n in sorted(counts.items())))


with watching(show), torch.no_grad():
    compiled = torch.compile(attention, backend="aicc")
    compiled(*(torch.randn(2, 16, 32) for _ in range(3)))
