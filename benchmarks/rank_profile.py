"""Where the time of one rank goes, on one GPU: the rank's own program with collectives that move nothing.

    python benchmarks/rank_profile.py --plan tp2 | tp2+sp | zero3 | ddp | single | inductor     --layers 4 --top 20

The process group is torch's fake one: collectives return at once, whatever is in their result, so that what is left is the rank's
compute and the host's part. `single` is the whole model on this GPU, `inductor` the same compiled by torch. Model, sizes and optimizer are those of
`tests/gpu/two_gpu_check.py`. Prints milliseconds per step (wall, GPU busy, host until everything is enqueued), and kernels by time.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aicc
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore


def two_gpu_check() -> Any:
    """The module of the two-GPU check: its model, loss and plans."""
    path = Path(__file__).parent.parent / "tests" / "gpu" / "two_gpu_check.py"
    spec = importlib.util.spec_from_file_location("two_gpu_check", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pretend(world: int) -> None:
    """A process group of `world` ranks of which this is the first and the only one."""
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    dist.get_backend = lambda *a: "nccl"  # what is asked is whether ranks compute on GPUs

    def all_gather_object(into: list[Any], mine: Any, *a: Any, **k: Any) -> None:
        into[:] = [mine] * len(into)
    dist.all_gather_object = all_gather_object


def our_step(two: Any, name: str, a: argparse.Namespace) -> Callable[..., Any]:
    plan = aicc.Plan(micro_batch=a.batch) if name == "single" else {**two.plans(a.batch), "ddp": aicc.Plan(dp=2, micro_batch=a.batch // 2)}[name]
    pretend(plan.devices)
    model = two.big(a, "meta")
    tokens, target = next(two.data(a.vocabulary, a.batch, a.length, 1))
    sharding = aicc.auto_shard(model, (tokens,), targets=(target,), loss_fn=two.loss_of, mesh=plan.devices, plan=plan, optimizer=two.adamw,
                               device="cuda")

    def init(name: str, local: torch.Tensor) -> None:
        torch.nn.init.ones_(local) if local.dim() == 1 else torch.nn.init.normal_(local, std=0.02)
    sharded = sharding.compile(model, init=init)
    for module in sharded.modules:
        for what, graph in (("forward", module.program.forward), ("backward", module.program.backward)):
            kinds = Counter(step[0] if step[0] != "extern" else step[1]["target"] for step in graph.manifest["steps"])
            print(f"{name} {what}: {graph.manifest['stats']['launches']} launches, {graph.manifest['stats']['library']} products, "
                  f"steps {dict(kinds)}, arena {graph.manifest['stats']['memory']}", flush=True)
    return sharded.step


def inductor_step(two: Any, a: argparse.Namespace) -> Callable[..., Any]:
    model = two.big(a, "cuda")
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block)
    return two.eager_step(model, two.adamw(model.parameters()), lambda x: x)  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", default="tp2")
    for name, value in {"layers": 4, "width": 2048, "vocabulary": 32000, "batch": 8, "length": 1024, "steps": 5, "top": 20}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--turn", type=argparse.FileType("w"), help="a file that is locked while measuring: several of these can compile at once")
    a = parser.parse_args()
    two = two_gpu_check()
    torch.cuda.set_device(0)
    began = time.perf_counter()
    step = inductor_step(two, a) if a.plan == "inductor" else our_step(two, a.plan, a)
    batch = next(two.data(a.vocabulary, a.batch, a.length, 1))
    step(*batch)
    torch.cuda.synchronize()
    built = time.perf_counter() - began
    if a.turn is not None:
        fcntl.flock(a.turn, fcntl.LOCK_EX)
    for _ in range(2):
        step(*batch)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    wall, host = [], []
    for _ in range(a.steps):
        began = time.perf_counter()
        step(*batch)
        host.append(time.perf_counter() - began)
        torch.cuda.synchronize()
        wall.append(time.perf_counter() - began)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step(*batch)
        torch.cuda.synchronize()
    rows: dict[str, list[float]] = {}
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            row = rows.setdefault(event.name, [0, 0.0])
            row[0] += 1
            row[1] += event.device_time_total / 1e3
    busy = sum(ms for _, ms in rows.values())
    middle = len(wall) // 2
    print(json.dumps({"plan": a.plan, "wall_ms": round(1e3 * sorted(wall)[middle], 2), "host_ms": round(1e3 * sorted(host)[middle], 2),
                      "gpu_ms": round(busy, 2), "kernels": int(sum(n for n, _ in rows.values())),
                      "peak_GiB": round(torch.cuda.max_memory_allocated() / 2 ** 30, 2), "build_s": round(built, 1)}), flush=True)
    for kernel, (count, ms) in sorted(rows.items(), key=lambda r: -r[1][1])[:a.top]:
        print(f"    {ms:8.3f} ms {int(count):4d} x {kernel[:110]}")


if __name__ == "__main__":
    main()
