"""The planner's tables of docs/planner.md: search time, plans against published ones, plans against what one would do by hand.

    python benchmarks/planner.py search | published | by-hand        # any of them, or none for all

`search`: seconds, peak memory of the process and what was proved, for the three large models, each in a process of its own. `published`: for each row
of the published runs, that plan and the search's own in the same simulator, with the same software and a space of that time
(1F1B and interleaved) and with today's schedules. `by-hand`: DDP, FSDP and Megatron's TP8 x PP beside the search.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from resource import RUSAGE_SELF, getrusage

from aicc.passes.shard.cluster import load_cluster
from aicc.passes.shard.explain import by_hand
from aicc.passes.shard.layer_cost import SOFTWARE
from aicc.passes.shard.model import LatentAttention, MixtureOfExperts, ModelConfig
from aicc.passes.shard.planner import Problem, search
from aicc.passes.shard.published import PUBLISHED, load_cases, predict_case
from aicc.passes.shard.space import Space

GPT39 = ModelConfig("gpt-39b", hidden=8192, layers=48, heads=64, vocab=51200, seq=2048)
LLAMA = ModelConfig("llama-405b", hidden=16384, layers=126, heads=128, kv_heads=8, ffn=53248, vocab=128256, seq=8192, gated=True, rotary=True,
                    tied=False)
DEEPSEEK = ModelConfig("deepseek-v3-like", hidden=7168, layers=61, heads=128, ffn=18432, vocab=129280, seq=4096, gated=True, rotary=True, tied=False,
                       head_dim=128, moe=MixtureOfExperts(256, 8, 2048, 2048, 3), latent=LatentAttention(1536, 512, 64, 128, 128))
LARGE = ((GPT39, "a100-80gb-sxm", 8, 1536, 20), (LLAMA, "h100-sxm", 2048, 2048, 60), (DEEPSEEK, "h100-sxm", 256, 15360, 120))
"""Model, preset, nodes of eight, global batch, seconds that the search may take."""


def one_search(row: tuple[ModelConfig, str, int, int, int]) -> str:
    config, hardware, nodes, batch, limit = row
    began, work = time.perf_counter(), time.process_time()
    result = search(Problem(config, load_cluster(hardware, nodes=nodes), batch))
    return (f"| {config.name} on {8 * nodes} {hardware} | {time.perf_counter() - began:.1f} s (limit {limit}) | {time.process_time() - work:.1f} s | "
            f"{getrusage(RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB | {result.considered} | {result.best.seconds:.2f} s, MFU {result.best.mfu:.0%}: "
            f"{result.plan.label} | {'proved' if result.proved else 'open'}, {result.gap:.1%} above the bound |")


def show_search() -> None:
    print("| search | wall | processor | peak memory | combinations | plan | optimality |\n|---|---|---|---|---|---|---|", flush=True)
    for row in LARGE:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(pool.apply(one_search, (row,)), flush=True)


def show_published() -> None:
    print("| row | published plan | step | of that time | step | | with today's schedules | step | |\n" + "|---" * 9 + "|", flush=True)
    for case in [c for c in load_cases(PUBLISHED) if not c.layer]:
        there = predict_case(case)
        cells = [case.name, there.plan.label, f"{there.report.seconds:.2f} s"]
        for space in (Space(schedules=("1f1b", "interleaved"), max_context=1, max_micro_batch=16, max_interleave=6), Space(max_micro_batch=16)):
            found = search(Problem(case.config, case.cluster, case.global_batch, SOFTWARE[case.software], space))
            cells += [found.plan.label + ("" if found.proved else " (not proved)"), f"{found.best.seconds:.2f} s",
                      f"{found.best.seconds / there.report.seconds - 1:+.1%}"]
        print(f"| {' | '.join(cells)} |", flush=True)


def show_by_hand() -> None:
    models = ((ModelConfig("llama-7b", hidden=4096, layers=32, heads=32, ffn=11008, vocab=32000, seq=4096, gated=True, rotary=True, tied=False),
               "h100-sxm", 8, 512), (GPT39, "a100-80gb-sxm", 8, 1536), (LLAMA, "h100-sxm", 2048, 2048), (DEEPSEEK, "h100-sxm", 256, 15360))
    for config, hardware, nodes, batch in models:
        problem = Problem(config, load_cluster(hardware, nodes=nodes), batch)
        best = search(problem)
        print(f"\n{config.name} on {8 * nodes} {hardware}, batch {batch}\n\n| how | plan | step | MFU | memory | |\n" + "|---" * 6 + "|", flush=True)
        for how, report in {"aicc": best.best, **by_hand(problem)}.items():
            print(f"| {how} | does not fit | | | | |" if report is None else
                  f"| {how} | {report.plan.label} | {report.seconds:.2f} s | {report.mfu:.1%} | {report.peak_memory / 1e9:.0f} GB | "
                  f"{report.seconds / best.best.seconds:.2f} x |", flush=True)


TABLES = {"search": show_search, "published": show_published, "by-hand": show_by_hand}


def main() -> None:
    for name in sys.argv[1:] or list(TABLES):
        if name not in TABLES:
            raise SystemExit(f"'{name}': there are {', '.join(TABLES)}")
        print(f"\n## {name}\n")
        TABLES[name]()


if __name__ == "__main__":
    main()
