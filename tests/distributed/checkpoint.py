"""Trains under one plan, saves with torch.distributed.checkpoint, loads into a model on meta under another plan, and goes on.

    checkpoint.py MODEL FROM TO FOLDER      FROM and TO are JSON; rank 0 prints LOSSES: [one process, resumed]
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

sys.path.insert(0, str(Path(__file__).parent))

import aicc
from networks import batches, build


def adam(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)  # type: ignore[arg-type]


def main() -> None:
    name, first, second, folder = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    model, data = build(name, 1), batches(4)

    def sharded(source: torch.nn.Module, plan: str) -> object:
        chosen = aicc.Plan(**json.loads(plan))
        return aicc.auto_shard(source, {"input_ids": data[0], "labels": data[0]}, mesh=chosen.devices, optimizer=adam, plan=chosen).compile(
            source, init=lambda name, local: local.copy_(buffers[name]) if name in buffers else local.fill_(float("nan")))
    buffers = dict(model.named_buffers())
    before = sharded(model, first)
    for ids in data[:2]:
        before.step(input_ids=ids, labels=ids)
    dcp.save(before.state_dict(), checkpoint_id=folder)
    dist.barrier()

    with torch.device("meta"):
        empty = build(name, 1)
    after = sharded(empty, second)
    state = after.state_dict()
    dcp.load(state, checkpoint_id=folder)
    after.load_state_dict(state)
    resumed = [after.step(input_ids=ids, labels=ids).item() for ids in data[2:]]

    update = adam(model.parameters())
    whole = []
    for ids in data:
        update.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        update.step()
        whole.append(loss.item())
    if dist.get_rank() == 0:
        print("LOSSES:", json.dumps([whole[2:], resumed]), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
