"""Trains a small language model on several processes, one line to start it:

    torchrun --nproc-per-node 2 examples/train_sharded.py
    torchrun --nproc-per-node 2 examples/train_sharded.py --plan "tp=2,sp=True"
    torchrun --nproc-per-node 2 examples/train_sharded.py --plan "pp=2,micro_batch=4,schedule='1f1b'"
    torchrun --nproc-per-node 4 examples/train_sharded.py --plan "dp=2,tp=2,zero=3"

The model is plain PyTorch and knows nothing of ranks. `aicc.auto_shard` says where its tensors lie (here from the degrees given; without
--plan, pure data parallelism with ZeRO 1); `plan.compile` gives each rank its program, collectives included. The text is this file.
"""

from __future__ import annotations

import argparse
import ast
import os
import time

import aicc
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Causal attention and an MLP, each behind a norm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, w = x.shape
        q, k, v = (t.view(b, s, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).split(w, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, s, w))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class LanguageModel(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2, length: int = 32):
        super().__init__()
        self.embed, self.position = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def next_byte_loss(logits: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over all positions."""
    return F.cross_entropy(logits.flatten(0, 1), following.flatten())


def degrees(text: str, batch: int) -> aicc.Plan:
    """A plan from "dp=2,sp=True,..."; without micro_batch, the whole batch at once."""
    given = {key.strip(): ast.literal_eval(value) for key, value in (item.split("=") for item in text.split(","))}
    return aicc.Plan(**{"micro_batch": batch // given.get("dp", 1), **given})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", default="", help='degrees such as "dp=2,zero=3" or "tp=2,sp=True", or the path of a plan file')
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("WORLD_SIZE", "1"))))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)

    with open(__file__, "rb") as f:
        text = torch.frombuffer(bytearray(f.read()), dtype=torch.uint8).long()
    length = 32
    torch.manual_seed(0)  # the same weights and batches on every rank
    random = torch.Generator().manual_seed(1)
    model = LanguageModel(length=length)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        starts = torch.randint(0, len(text) - length - 1, (args.batch,), generator=random)
        rows = torch.stack([text[s:s + length + 1] for s in starts])
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    tokens, following = batch()
    if args.plan.endswith((".toml", ".json")):
        plan = args.plan
    else:
        plan = degrees(args.plan, args.batch) if args.plan else aicc.Plan(dp=world, zero=1, micro_batch=args.batch // world)
    sharding = aicc.auto_shard(model, (tokens,), targets=(following,), loss_fn=next_byte_loss, mesh=world, plan=plan,
                               optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3))
    started = time.perf_counter()
    sharded = sharding.compile(model)
    if rank == 0:
        held = sum(p.to_local().numel() for p in sharded.module.parameters())
        print(f"plan {sharding.plan.label}: compiled in {time.perf_counter() - started:.1f} s; rank 0 holds {held} of "
              f"{sum(p.numel() for p in model.parameters())} parameters; {len(sharded.collectives)} collectives", flush=True)
    for step in range(args.steps):
        loss = sharded.step(*batch())
        if rank == 0 and (step % 10 == 0 or step == args.steps - 1):
            print(f"step {step:3d}  loss {loss.item():.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
