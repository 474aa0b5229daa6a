"""Two GPUs: plans of a Llama-like model are right, and how fast they are beside torch's own.

    NCCL_NVLS_ENABLE=0 torchrun --nproc-per-node 2 tests/gpu/two_gpu_check.py                 # correctness, then speed
    ... two_gpu_check.py --only correct | --only speed   --layers 16 --width 2048 --steps 10  --peers fsdp2,dtensor-tp  --plans tp2,zero3,pp2

Correctness: a small float32 model, three steps of SGD under every plan of `plans` (tensor parallelism with and without sequences, ZeRO-3, pipelines of
four schedules, context parallelism of two kinds, offload), losses and parameters compared with eager PyTorch on one GPU. Speed: bfloat16, AdamW, tokens per second over
both GPUs, peak memory per GPU and milliseconds until the host has enqueued a step, for aicc's plans and for FSDP2 and DTensor tensor parallelism compiled
with Inductor, all in this run. With `--turn FILE` several of these may run at a time: they build side by side and measure one after another.
Plain torch; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import fcntl
import gc
import io
import json
import os
import pstats
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import aicc
import torch
import torch.distributed as dist
import torch.nn.functional as F
from aicc.compiler.distributed.module import gathered
from torch import nn
from torch.profiler import ProfilerActivity, profile


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.head = width // heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q, k, v = (p(x).view(b, s, -1, self.head).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(b, s, -1))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.attention = Attention(width, heads)
        self.gate, self.up, self.down = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x), cos, sin)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """Decoder with rotary positions, RMS norms and a gated MLP; gives logits."""

    def __init__(self, vocabulary: int, width: int, heads: int, inner: int, layers: int):
        super().__init__()
        self.head_size = width // heads
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads, inner) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width, eps=1e-5), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        half = torch.arange(0, self.head_size, 2, device=tokens.device, dtype=torch.float32)
        angle = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float32)[:, None] * 10000.0 ** (-half / self.head_size)
        angle = torch.cat([angle, angle], -1)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


def loss_of(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten())


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def attempt(name: str, what: Callable[[], str]) -> bool:
    """Runs one measurement; a failure is reported (of the first rank) and does not end the run."""
    began = time.perf_counter()
    try:
        say(f"{name:28s} {what()}  ({time.perf_counter() - began:.0f} s in all)")
        return True
    except Exception as e:
        say(f"{name:28s} FAILED: {type(e).__name__}: {str(e).splitlines()[0][:300]}")
        if dist.get_rank() == 0:
            traceback.print_exc(limit=-6)
        return False
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def plans(batch: int) -> dict[str, aicc.Plan]:
    quarter, half = max(1, batch // 4), batch // 2
    return {"tp2": aicc.Plan(tp=2, micro_batch=batch), "tp2+sp": aicc.Plan(tp=2, sp=True, micro_batch=batch),
            "zero3": aicc.Plan(dp=2, zero=3, micro_batch=half), "zero2": aicc.Plan(dp=2, zero=2, micro_batch=half),
            "pp2": aicc.Plan(pp=2, micro_batch=quarter, schedule="1f1b"), "zb-h1": aicc.Plan(pp=2, micro_batch=quarter, schedule="zb-h1"),
            "zb-v": aicc.Plan(pp=2, micro_batch=quarter, schedule="zb-v"),
            "dualpipe-v": aicc.Plan(pp=2, micro_batch=quarter, schedule="dualpipe-v"), "cp2": aicc.Plan(cp=2, micro_batch=1),
            "ring2": aicc.Plan(cp=2, context="ring", micro_batch=max(1, batch // 4)),
            "offload": aicc.Plan(dp=2, zero=2, micro_batch=half, offload=True),
            "full": aicc.Plan(dp=2, zero=1, micro_batch=half, recompute="full")}


def data(vocabulary: int, batch: int, length: int, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(3)
    for _ in range(count):
        rows = torch.randint(0, vocabulary, (batch, length + 1), generator=random).cuda()
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


# -- correctness -------------------------------------------------------------------------------------------------------


def correct(plan: aicc.Plan, device: str) -> str:
    torch.manual_seed(0)
    model = Llama(512, 128, 4, 256, 4)
    batches = list(data(512, 8, 64, 3))

    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    sharding = aicc.auto_shard(model, (batches[0][0],), targets=(batches[0][1],), loss_fn=loss_of, mesh=2, plan=plan, optimizer=sgd)
    sharded = sharding.compile(model)
    whole = copy.deepcopy(model).to(device)
    update = sgd(whole.parameters())
    worst = 0.0
    for tokens, target in batches:
        got = sharded.step(tokens, target).item()
        update.zero_grad()
        want = loss_of(whole(tokens), target)
        want.backward()
        update.step()
        worst = max(worst, abs(got - want.item()))
    parameters = dict(whole.named_parameters())
    mine = max((float((gathered(p) - parameters[n]).abs().max()), n) for m in sharded.modules for n, p in m.named_parameters())
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, (worst, *mine))
    worst, (apart, name) = max(w for w, _, _ in said), max((a, n) for _, a, n in said)
    assert worst < 5e-6 and apart < 5e-6, f"losses differ by {worst:.2e}, parameters by {apart:.2e} ({name}); per rank {said}"
    return f"correct: losses within {worst:.1e}, parameters within {apart:.1e}"


# -- speed -------------------------------------------------------------------------------------------------------------


def measure(step: Callable[[torch.Tensor, torch.Tensor], Any], a: argparse.Namespace, built: float) -> str:
    batches = list(data(a.vocabulary, a.batch, a.length, 2))
    take_turn(a.turn)
    torch.cuda.reset_peak_memory_stats()
    for k in range(3):
        step(*batches[k % 2])
    torch.cuda.synchronize()
    dist.barrier()
    times, host = [], []
    for k in range(a.steps):
        began = time.perf_counter()
        step(*batches[k % 2])
        host.append(time.perf_counter() - began)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    middle = torch.tensor(sorted(times)[len(times) // 2], device="cuda")
    peak = torch.tensor(torch.cuda.max_memory_allocated() / 2 ** 30, device="cuda")
    dist.all_reduce(middle, dist.ReduceOp.MAX)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    row = {"tokens_per_s": round(a.batch * a.length / middle.item()), "ms": round(1000 * middle.item(), 1), "fastest_ms": round(1000 * min(times), 1),
           "host_ms": round(1000 * sorted(host)[len(host) // 2], 1), "peak_GiB": round(peak.item(), 2), "build_s": round(built, 1)}
    if a.profile:
        profiled(step, batches[0], a.profile)
    if a.host_profile:
        host_profiled(step, batches[0], a.host_profile)
    if a.turn is not None:
        dist.barrier()
        fcntl.flock(a.turn, fcntl.LOCK_UN)
    return json.dumps(row)


def take_turn(file: Any) -> None:
    """Waits while FILE.gate exists (until everything is built: collectives that wait for a rank that compiles keep a GPU busy) and until no other run
    measures. The other rank waits on the host: a barrier of NCCL would keep its GPU busy, too.
    """
    if file is None:
        return
    store = dist.distributed_c10d._get_default_store()
    turn = f"turn {store.add(f'turns of rank {dist.get_rank()}', 1)}"
    if dist.get_rank() == 0:
        while Path(f"{file.name}.gate").exists():
            time.sleep(0.1)
        fcntl.flock(file, fcntl.LOCK_EX)
        store.set(turn, "")
    else:
        store.wait([turn], timedelta(seconds=600))


def profiled(step: Callable[[torch.Tensor, torch.Tensor], Any], batch: Any, top: int) -> None:
    """Where one step's time goes on the first rank: computing, communicating, neither; and the longest kernels."""
    dist.barrier()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step(*batch)
        torch.cuda.synchronize()
    events = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    rows: dict[str, list[float]] = {}
    for e in events:
        row = rows.setdefault(e.name, [0, 0.0])
        row[0] += 1
        row[1] += e.device_time_total / 1e3
    nccl = covered([e for e in events if "nccl" in e.name])
    compute, both = covered([e for e in events if "nccl" not in e.name]), covered(events)
    span = (max(e.time_range.end for e in events) - min(e.time_range.start for e in events)) / 1e3
    say(f"    span {span:.1f} ms: computing {compute:.1f}, communicating {nccl:.1f}, of that beside computation {compute + nccl - both:.1f}, "
        f"neither {span - both:.1f}")
    for name, (count, ms) in sorted(rows.items(), key=lambda r: -r[1][1])[:top]:
        say(f"    {ms:8.3f} ms {int(count):4d} x {name[:90]}")


def host_profiled(step: Callable[[torch.Tensor, torch.Tensor], Any], batch: Any, top: int) -> None:
    """The Python functions that the first rank's host spends its time in, over five steps."""
    profiler = cProfile.Profile()
    dist.barrier()
    torch.cuda.synchronize()
    profiler.enable()
    for _ in range(5):
        step(*batch)
    profiler.disable()
    torch.cuda.synchronize()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(top)
    say("\n".join(line for line in text.getvalue().splitlines() if line.strip()))


def covered(events: list[Any]) -> float:
    """Milliseconds during which at least one of the kernels ran."""
    total, end = 0.0, float("-inf")
    for e in sorted(events, key=lambda e: e.time_range.start):
        total += max(0.0, e.time_range.end - max(end, e.time_range.start))
        end = max(end, e.time_range.end)
    return total / 1e3


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, fused=False)


def big(a: argparse.Namespace, device: str = "cpu") -> Llama:
    torch.manual_seed(0)
    with torch.device(device):
        return Llama(a.vocabulary, a.width, a.width // 64, a.width * 11 // 4 // 64 * 64, a.layers).to(torch.bfloat16)


def ours(plan: aicc.Plan, a: argparse.Namespace) -> str:
    began = time.perf_counter()
    model = big(a, "meta")
    tokens, target = next(data(a.vocabulary, a.batch, a.length, 1))

    def init(name: str, local: torch.Tensor) -> None:
        torch.nn.init.ones_(local) if local.dim() == 1 else torch.nn.init.normal_(local, std=0.02)
    sharding = aicc.auto_shard(model, (tokens,), targets=(target,), loss_fn=loss_of, mesh=2, plan=plan, optimizer=adamw, device="cuda")
    sharded = sharding.compile(model, init=init)
    text = measure(sharded.step, a, time.perf_counter() - began)
    return f"{text} programs say {sharded.memory().total / 2 ** 30:.2f} GiB"


def eager_step(model: nn.Module, update: torch.optim.Optimizer, rows: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    def step(tokens: torch.Tensor, target: torch.Tensor) -> Any:
        update.zero_grad()
        loss = loss_of(model(rows(tokens)), rows(target))
        loss.backward()
        update.step()
        return loss
    return step


def fsdp2(a: argparse.Namespace) -> str:
    from torch.distributed.fsdp import fully_shard
    began = time.perf_counter()
    model = big(a, "cuda")
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block)
    rank = dist.get_rank()
    step = eager_step(model, adamw(model.parameters()), lambda x: x.chunk(2)[rank])
    step(*next(data(a.vocabulary, a.batch, a.length, 1)))
    return measure(step, a, time.perf_counter() - began)


def dtensor_tp(a: argparse.Namespace) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    began = time.perf_counter()
    model, mesh = big(a, "cuda"), init_device_mesh("cuda", (2,))
    for block in model.blocks:
        parallelize_module(block, mesh, {"attention.q": ColwiseParallel(), "attention.k": ColwiseParallel(), "attention.v": ColwiseParallel(),
                                         "attention.o": RowwiseParallel(), "gate": ColwiseParallel(), "up": ColwiseParallel(),
                                         "down": RowwiseParallel()})
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block)
    step = eager_step(model, adamw(model.parameters()), lambda x: x)
    step(*next(data(a.vocabulary, a.batch, a.length, 1)))
    return measure(step, a, time.perf_counter() - began)


PEERS: dict[str, Callable[[argparse.Namespace], str]] = {"fsdp2": fsdp2, "dtensor-tp": dtensor_tp}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["correct", "speed"])
    parser.add_argument("--plans", default="tp2,tp2+sp,zero3,pp2")
    parser.add_argument("--profile", type=int, default=0, help="print where a step's time goes, with so many kernels")
    parser.add_argument("--host-profile", type=int, default=0, help="print where the host's time goes, with so many functions")
    parser.add_argument("--peers", default="fsdp2,dtensor-tp")
    parser.add_argument("--turn", type=argparse.FileType("w"), help="a file that is locked while measuring")
    for name, value in {"layers": 16, "width": 2048, "vocabulary": 32000, "batch": 8, "length": 1024, "steps": 10}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    a = parser.parse_args()
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    say(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    chosen = [p for p in a.plans.split(",") if p]
    good = True
    if a.only != "speed":
        torch.backends.cuda.matmul.allow_tf32 = False
        for name in chosen:
            good &= attempt(f"aicc {name}", lambda name=name: correct(plans(8)[name], "cuda"))  # type: ignore[misc]
    if a.only != "correct":
        size = sum(p.numel() for p in big(a, "meta").parameters())
        say(f"speed: {size / 1e9:.2f}B parameters, batch {a.batch} x {a.length}, bfloat16, AdamW; both GPUs together")
        for name in chosen:
            good &= attempt(f"aicc {name}", lambda name=name: ours(plans(a.batch)[name], a))  # type: ignore[misc]
        for name in filter(None, a.peers.split(",")):
            good &= attempt(name, lambda name=name: PEERS[name](a))  # type: ignore[misc]
    dist.destroy_process_group()
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
