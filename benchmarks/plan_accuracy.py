"""Predicted against measured: time and peak memory of a training step, for plans of two models on one and two ranks of this host.

    aicc calibrate -o here.toml --ranks 2
    python benchmarks/plan_accuracy.py --cluster here.toml [--device cuda] [--models llama,gpt2] [--plans one,dp2,tp2] [--size small] [--jobs 4]

Per row: seconds and bytes that the planner predicts with the calibrated cluster (`passes/shard/step.py`), bytes that the compiled programs say
before they run (`compiler/distributed/memory.py`), and what was measured: the median step, and the allocator's peak on GPUs or the peak of
the process's resident memory on CPUs. Every plan runs in processes of its own. `--jobs` of them build side by side; they measure one after
another, on CPUs on the first cores that are allowed, which the others leave alone. With `--gate` nothing is measured before all rows are built
(or `--gate SECONDS` have passed): building keeps the host and the GPUs busy. `--detail` adds where memory goes, as the planner and as the programs
say, and on GPUs where the time of a step went.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import aicc
import torch
import torch.distributed as dist
from aicc.passes.shard import from_transformers, load_cluster, predict_step
from aicc.runtime.arena import shared_pool
from aicc.runtime.outputs import shared_outputs
from aicc.tests.gpu.two_gpu_check import covered
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

SIZES = {"tiny": (128, 2, 512, 64, 8), "small": (384, 4, 2048, 256, 8), "large": (2048, 4, 32000, 1024, 8),
         "wide": (3072, 4, 32000, 2048, 8)}
"""Width, layers, vocabulary, sequence length, batch. On GPUs a step of `large` passes mostly on the host, one of `wide` on the GPU."""
PLANS: dict[str, dict[str, Any]] = {
    "one": {}, "one full": {"recompute": "full"}, "one accumulated": {"micro_batch": 2},
    "dp2": {"dp": 2}, "zero2": {"dp": 2, "zero": 2}, "zero3": {"dp": 2, "zero": 3}, "tp2": {"tp": 2}, "tp2+sp": {"tp": 2, "sp": True},
    "pp2": {"pp": 2, "micro_batch": 2, "schedule": "1f1b"}, "dp2 full": {"dp": 2, "recompute": "full"}}


def config_of(model: str, size: str) -> Any:
    width, layers, vocabulary, length, _ = SIZES[size]
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if model == "gpt2":
        return GPT2Config(vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=width // 64, n_positions=length, use_cache=False,
                          resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
    return LlamaConfig(vocab_size=vocabulary, hidden_size=width, intermediate_size=width * 11 // 4 // 64 * 64, num_hidden_layers=layers,
                       num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=length, use_cache=False,
                       tie_word_embeddings=False, **ids)


def plan_of(name: str, batch: int) -> aicc.Plan:
    degrees = PLANS[name]
    return aicc.Plan(**{"micro_batch": batch // degrees.get("dp", 1), **degrees})


def resident(what: str) -> int:
    """Bytes: VmRSS now or VmHWM, the most since the mark was last reset."""
    row = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(row.split()[1]) * 1024


MEASURING = 2
"""CPU cores that are kept for measuring, where there are more than twice as many."""


def cores(measuring: bool, rank: int) -> set[int]:
    """The cores that a rank may use now."""
    allowed = ALLOWED
    if len(allowed) <= 2 * MEASURING:
        return set(allowed)
    return {allowed[rank % MEASURING]} if measuring else set(allowed[MEASURING:])


ALLOWED = sorted(os.sched_getaffinity(0))


def worker(model: str, name: str, size: str, device: str, steps: int, turn: str) -> None:
    """One rank; rank 0 prints the row."""
    rank, world = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = device == "cuda"
    torch.set_num_threads(1 if len(ALLOWED) > 2 * MEASURING else max(1, len(ALLOWED) // world))
    os.sched_setaffinity(0, cores(False, rank))
    if on_gpu:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=300))
    config, (_, _, vocabulary, length, batch) = config_of(model, size), SIZES[size]
    dtype = torch.bfloat16 if on_gpu else torch.float32
    with torch.device("meta"):
        whole = (GPT2LMHeadModel if model == "gpt2" else LlamaForCausalLM)(config).to(dtype)
    ids = torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
    plan = plan_of(name, batch)
    sharding = aicc.auto_shard(whole, {"input_ids": ids, "labels": ids}, mesh=plan.devices, plan=plan, optimizer=torch.optim.AdamW, device=device)

    def init(name: str, local: torch.Tensor) -> None:
        local.fill_(1.0) if local.dim() < 2 or not local.is_floating_point() else torch.nn.init.normal_(local, std=0.02)
    sharded = sharding.compile(whole, init=init)

    def step() -> float:
        began = time.perf_counter()
        sharded.step(input_ids=ids, labels=ids)
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began
    step()
    if on_gpu:
        torch.cuda.empty_cache()
    os.sched_setaffinity(0, cores(not on_gpu, rank))
    if rank == 0:
        Path(f"{turn}.built.{model}.{name}").touch()
    with open(turn, "w") as file:
        wait_for_turn(file)
        step()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(steps):
            dist.barrier()
            times.append(step())
        held = sum(x.numel() * x.element_size() for x in tensors(sharded))
        measured = torch.cuda.max_memory_allocated() if on_gpu else held + growth(step)
        where = spent(step) if on_gpu else {}
        dist.barrier()
    said = sharded.memory()
    row = torch.tensor([sorted(times)[len(times) // 2], float(measured), float(said.total)], dtype=torch.float64, device=device)
    dist.all_reduce(row, dist.ReduceOp.MAX)
    if rank == 0:
        kinds = {f.name: getattr(said, f.name) / 1e6 for f in fields(said)}
        print("ROW " + json.dumps([*row.tolist(), {"memory": kinds, "time": where, "held": held / 1e6}]), flush=True)
    dist.destroy_process_group()


def spent(step: Any) -> dict[str, float]:
    """Milliseconds of one step on this rank's GPU: computing, communicating, both at a time, neither."""
    dist.barrier()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
    events = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    compute, sent, either = (covered([e for e in events if keep("nccl" in e.name)]) for keep in (lambda x: not x, lambda x: x, lambda x: True))
    kinds = {"attention": ("attn", "attention", "flash", "fmha"), "products": ("gemm", "nvjet", "cutlass", "cublas", "mm")}
    by = {k: covered([e for e in events if any(w in e.name.lower() for w in words)]) for k, words in kinds.items()}
    span = max(e.time_range.end for e in events) - min(e.time_range.start for e in events)
    total: Counter[str] = Counter()
    for e in events:
        total[e.name[:60]] += e.device_time_total / 1e3
    by |= dict(total.most_common(5))
    return {"computing": compute, "communicating": sent, "both": compute + sent - either, "neither": span / 1e3 - either, **by,
            "kernels": float(len(events))}


def wait_for_turn(file: Any) -> None:
    """Returns when FILE.gate is not there and no other row measures; the lock goes with the file. The ranks wait on the host: a GPU that waits in a
    collective is busy.
    """
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 0:
        while Path(f"{file.name}.gate").exists():
            time.sleep(0.1)
        fcntl.flock(file, fcntl.LOCK_EX)
        store.set("our turn", "")
    else:
        store.wait(["our turn"], timedelta(seconds=600))


def tensors(sharded: Any) -> list[torch.Tensor]:
    """What lies there between steps: parameters, gradients, optimizer state."""
    state = sharded.state_dict()["optimizer"].values()
    parameters = [p for m in sharded.modules for p in m.parameters()]
    everything = [*parameters, *(p.grad for p in parameters if p.grad is not None), *(x for x in state if isinstance(x, torch.Tensor) and x.dim())]
    return [x.to_local() if hasattr(x, "to_local") else x for x in everything]


def growth(step: Any) -> int:
    """Bytes by which a step's peak of resident memory is above what lies there before it, once all freed memory is the system's again."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-3, 1 << 17)  # M_MMAP_THRESHOLD: what is large is the system's again as soon as it is freed
    step()
    gc.collect()
    shared_outputs().trim()
    shared_pool().trim()
    gc.collect()
    libc.malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step()
    return resident("VmHWM") - before


def row(model: str, name: str, a: argparse.Namespace, size: str, turn: str) -> str:
    _, _, _, length, batch = SIZES[size]
    plan = plan_of(name, batch)
    sizes = from_transformers(config_of(model, size), seq=length, dtype="bf16" if a.device == "cuda" else "fp32")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(plan.devices), __file__, "--device", a.device,
               "--size", size, "--steps", str(a.steps), "--worker", model, name, turn]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    Path(f"{turn}.built.{model}.{name}").touch()
    found = next((line for line in done.stdout.splitlines() if line.startswith("ROW ")), None)
    if found is None:
        lines = [x for x in done.stderr.splitlines() if "Error" in x and "ChildFailed" not in x] or done.stderr.strip().splitlines() or ["no message"]
        return f"| {model} | {name} | failed: {lines[-1][:200]} |"
    seconds, measured, said, detail = json.loads(found[4:])
    report = predict_step(sizes, plan, load_cluster(a.cluster, mesh=aicc.Mesh.parse(f"1x{plan.devices}")), batch, f"aicc-{sizes.dtype}")
    planned = report.peak_memory - report.memory[0].reserved
    parts = ", ".join(f"{k} {1e3 * v:.3g}" for k, v in report.breakdown().items() if v > 0.005 * report.seconds)
    text = (f"| {model} | {name} | {1e3 * report.seconds:.1f} | {1e3 * seconds:.1f} | {report.seconds / seconds - 1:+.0%} | {planned / 1e6:.0f} | "
            f"{said / 1e6:.0f} | {measured / 1e6:.0f} | {planned / measured - 1:+.0%} | {said / measured - 1:+.0%} | {parts} |")
    if a.detail:
        fullest = max(report.memory, key=lambda m: m.total)
        plain = {f.name: getattr(fullest, f.name) / 1e6 for f in fields(fullest)}
        for what, values in {"planner MB": plain, "programs MB": detail["memory"], "step ms": detail["time"]}.items():
            text += f"\n    {what}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items())
    return text


def open_gate(gate: Path, rows: list[tuple[str, str]], seconds: float) -> None:
    """Removes the gate once all rows are built, or after so many seconds."""
    end = time.monotonic() + seconds
    name = str(gate).removesuffix(".gate")
    while time.monotonic() < end and not all(Path(f"{name}.built.{m}.{p}").exists() for m, p in rows):
        time.sleep(0.2)
    gate.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", default="cpu-box")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--models", default="llama,gpt2")
    parser.add_argument("--plans", default=",".join(PLANS))
    parser.add_argument("--size", default="", choices=["", *SIZES])
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--jobs", type=int, default=1, help="rows that are built side by side")
    parser.add_argument("--turn", default="", help="a file that is locked while measuring; nothing is measured while FILE.gate is there")
    parser.add_argument("--gate", type=float, default=0.0, metavar="SECONDS", help="build all rows before any is measured, for so long at the most")
    parser.add_argument("--detail", action="store_true")
    parser.add_argument("--worker", nargs=3, metavar=("MODEL", "PLAN", "TURN"))
    a = parser.parse_args()
    size = a.size or ("wide" if a.device == "cuda" else "small")
    if a.worker:
        return worker(a.worker[0], a.worker[1], size, a.device, a.steps, a.worker[2])
    print("| model | plan | predicted ms | measured ms | error | planner MB | programs MB | measured MB | planner | programs | predicted, ms |")
    print("|---" * 11 + "|", flush=True)
    rows = [(model, name) for name in a.plans.split(",") for model in a.models.split(",")]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(rows) + 1 if a.gate else a.jobs) as pool:
        turn = a.turn or f"{folder}/turn"
        if a.gate:
            gate = Path(f"{turn}.gate")
            gate.touch()
            pool.submit(open_gate, gate, rows, a.gate)
        for made in as_completed([pool.submit(row, model, name, a, size, turn) for model, name in rows]):
            print(made.result(), flush=True)


if __name__ == "__main__":
    main()
