"""Predicted against measured: time and peak memory of a training step, for plans of two models on two ranks of this host.

    aicc calibrate -o here.toml --ranks 2
    python benchmarks/plan_accuracy.py --cluster here.toml [--device cuda] [--models llama,gpt2] [--plans dp2,tp2] [--size small]

Per row: seconds and bytes that the planner predicts with the calibrated cluster (`passes/shard/step.py`), bytes that the compiled programs say
before they run (`compiler/distributed/memory.py`), and what was measured: the median step, and the allocator's peak on GPUs or the growth of
the process's resident memory on CPUs. Every plan runs in processes of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import aicc
import torch
import torch.distributed as dist
from aicc.passes.shard import from_transformers, load_cluster, predict_step
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

SIZES = {"tiny": (128, 2, 512, 64, 8), "small": (384, 4, 2048, 256, 8), "large": (2048, 4, 32000, 1024, 8)}
"""Width, layers, vocabulary, sequence length, batch."""
PLANS: dict[str, dict[str, Any]] = {
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


def worker(model: str, name: str, size: str, device: str, steps: int) -> None:
    """One rank; rank 0 prints the row."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["WORLD_SIZE"])))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=120))
    config, (_, _, vocabulary, length, batch) = config_of(model, size), SIZES[size]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device("meta"):
        whole = (GPT2LMHeadModel if model == "gpt2" else LlamaForCausalLM)(config).to(dtype)
    ids = torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
    plan = plan_of(name, batch)
    sharding = aicc.auto_shard(whole, {"input_ids": ids, "labels": ids}, mesh=2, plan=plan, optimizer=torch.optim.AdamW, device=device)
    gc.collect()
    before = resident("VmRSS")

    def init(name: str, local: torch.Tensor) -> None:
        local.fill_(1.0) if local.dim() < 2 or not local.is_floating_point() else torch.nn.init.normal_(local, std=0.02)
    sharded = sharding.compile(whole, init=init)
    compiled = resident("VmRSS") - before
    sharded.step(input_ids=ids, labels=ids)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    times = []
    for _ in range(steps):
        dist.barrier()
        began = time.perf_counter()
        sharded.step(input_ids=ids, labels=ids)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    said = sharded.memory()
    code = compiled - said.parameters - said.optimizer if device == "cpu" else 0  # machine code and the compiler's own
    measured = torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM") - before - code
    row = torch.tensor([sorted(times)[len(times) // 2], float(measured), float(said.total)], dtype=torch.float64, device=device)
    dist.all_reduce(row, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        print("ROW " + json.dumps(row.tolist()), flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", default="cpu-box")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--models", default="llama,gpt2")
    parser.add_argument("--plans", default=",".join(PLANS))
    parser.add_argument("--size", default="", choices=["", *SIZES])
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--worker", nargs=2, metavar=("MODEL", "PLAN"))
    a = parser.parse_args()
    size = a.size or ("large" if a.device == "cuda" else "small")
    if a.worker:
        return worker(a.worker[0], a.worker[1], size, a.device, a.steps)
    _, _, _, length, batch = SIZES[size]
    cluster = load_cluster(a.cluster, mesh=aicc.Mesh.parse("1x2"))
    print("| model | plan | predicted ms | measured ms | error | planner MB | programs MB | measured MB | planner | programs |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for model in a.models.split(","):
        sizes = from_transformers(config_of(model, size), seq=length, dtype="bf16" if a.device == "cuda" else "fp32")
        for name in a.plans.split(","):
            report = predict_step(sizes, plan_of(name, batch), cluster, batch)
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, "--device", a.device,
                       "--size", size, "--steps", str(a.steps), "--worker", model, name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            found = next((line for line in done.stdout.splitlines() if line.startswith("ROW ")), None)
            if found is None:
                print(f"| {model} | {name} | failed: {(done.stderr.strip().splitlines() or ['no message'])[-1][:100]} |", flush=True)
                continue
            seconds, measured, said = json.loads(found[4:])
            planned = report.peak_memory - report.memory[0].reserved
            print(f"| {model} | {name} | {1e3 * report.seconds:.1f} | {1e3 * seconds:.1f} | {report.seconds / seconds - 1:+.0%} | "
                  f"{planned / 1e6:.0f} | {said / 1e6:.0f} | {measured / 1e6:.0f} | {planned / measured - 1:+.0%} | "
                  f"{said / measured - 1:+.0%} |", flush=True)


if __name__ == "__main__":
    main()
