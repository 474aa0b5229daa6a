"""One rank of a training run that is compared with the same run in one process. Started by torchrun from test_train.py.

    worker.py MODEL PLAN STEPS LAYERS OUT ...       PLAN is JSON; rank r writes OUT.r.json; several runs may follow one another
"""

from __future__ import annotations

import copy
import faulthandler
import json
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))

import aicc
from aicc.compiler.distributed.module import gathered
from networks import batches, build


class CountBytes(TorchDispatchMode):
    """Bytes handed to torch's functional collectives, by operator."""

    NAMES = {"all_reduce": "all_reduce", "all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter",
             "all_to_all_single": "all_to_all"}

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space == "_c10d_functional" and name in self.NAMES:
            to_one = name == "all_to_all_single" and sum(n > 0 for n in args[2]) == 1  # how a shift is sent
            self.bytes["shift" if to_one else self.NAMES[name]] += args[0].numel() * args[0].element_size()
        return func(*args, **(kwargs or {}))


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def reached(phase: str) -> None:
    """Says where this rank is, so that the end of a process that dies without an error has a place."""
    print(f"rank {dist.get_rank()} reached {phase}", file=sys.stderr, flush=True)


def main() -> None:
    faulthandler.enable()
    torch._C._set_print_stack_traces_on_fatal_signal(True)  # of threads that run no Python too
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    for name, plan, steps, layers, out in zip(*[iter(sys.argv[1:])] * 5, strict=True):
        train(name, plan, int(steps), int(layers), out)
        reached("its results")
        dist.barrier()  # none leaves while another is at work
    reached("the barrier")
    rank = dist.get_rank()
    dist.destroy_process_group()
    print(f"rank {rank} left its groups", file=sys.stderr, flush=True)


def train(name: str, plan_text: str, steps: int, layers: int, out: str) -> None:
    """Trains by the plan and in this process alone, and writes what came of both."""
    rank = dist.get_rank()
    model, data = build(name, layers), batches(steps)
    plan = aicc.Plan(**{k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(plan_text).items()})
    sharding = aicc.auto_shard(model, {"input_ids": data[0], "labels": data[0]}, mesh=plan.devices, optimizer=optimizer, plan=plan)
    sharded = sharding.compile(model)
    reached("training")
    whole, initial = copy.deepcopy(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    update = optimizer(whole.parameters())
    losses, expected, counted = [], [], CountBytes()
    for k, ids in enumerate(data):
        if k == 1:
            with counted:
                losses.append(sharded.step(input_ids=ids, labels=ids).item())
        else:
            losses.append(sharded.step(input_ids=ids, labels=ids).item())
        update.zero_grad()
        loss = whole(input_ids=ids, labels=ids).loss
        loss.backward()
        update.step()
        expected.append(loss.item())
    reached("the end of training")
    parameters = dict(whole.named_parameters())
    worst = max((float((gathered(p) - parameters[n].detach()).abs().max()) for m in sharded.modules for n, p in m.named_parameters()), default=0.0)
    moved = max(float((p.detach() - initial[n]).abs().max()) for n, p in parameters.items())
    said: Counter[str] = Counter()
    for (kind, _), size in sharded.traffic().items():
        said[kind] += size
    result = {"losses": losses, "expected": expected, "worst": worst, "moved": moved, "bytes": dict(counted.bytes), "said": dict(said),
              "held": sum(p.to_local().numel() for m in sharded.modules for p in m.parameters()), "all": sum(p.numel() for p in whole.parameters())}
    Path(f"{out}.{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
