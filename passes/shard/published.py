"""Published training runs against the simulator.

Entry points: `load_cases(path)` turns a file of published runs into cases, `predict_case(case)` predicts one,
`validate(path)` all of them, `format_report(rows)` prints predicted against published with signed errors.

What a publication does not say (micro-batch, interleave) is chosen by the simulator as its fastest setting that fits in
memory; each row says so. Software of the time (what overlapped, what was fused) follows from the source of the row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from .cluster import Cluster, load_cluster
from .layer_cost import SOFTWARE, Placement, block_cost
from .model import ModelConfig
from .plan import Plan, plan_problems
from .step import StepReport, predict_step
from .tables import ConfigError

__all__ = ["FITTED", "PUBLISHED", "Case", "Row", "format_report", "load_cases", "predict_case", "validate"]

PUBLISHED = Path(__file__).parent / "data" / "published_runs.json"

# Rows that the A100 constants were fitted on; every other row is held out.
# They span the regimes: one block alone, the smallest and the largest model, and a run bound by the network.
FITTED = frozenset({"gpt-22B one layer / baseline forward", "gpt-22B one layer / baseline backward", "gpt-1.7B", "gpt-529.6B",
                    "gpt-174.6B / zero3 768"})


@dataclass(frozen=True)
class Case:
    """One published figure. unit is `tflops` (per device, recomputation counted), `s` or `ms`.

    plan has the published settings; free lists the settings that the publication does not give, with the values to try.
    layer: `forward` or `backward` when the figure is one block's.
    """

    name: str
    config: ModelConfig
    cluster: Cluster
    plan: Plan
    global_batch: int
    software: str
    published: float
    unit: str
    free: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    layer: str = ""

    @property
    def fitted(self) -> bool:
        return self.name in FITTED


@dataclass(frozen=True)
class Row:
    """A case with its prediction. error is signed, relative to the published figure. report is None for single blocks."""

    case: Case
    predicted: float
    plan: Plan
    report: StepReport | None = None

    @property
    def error(self) -> float:
        return self.predicted / self.case.published - 1.0


def _config(run: dict[str, Any]) -> ModelConfig:
    return ModelConfig(run["model"], run["hidden"], max(1, run["layers"]), run["heads"], run["vocab"], run["seq"], dropout=True,
                       learned_positions=True, attention="unfused", fused_loss=False, dtype="fp16")


def load_cases(path: str | Path = PUBLISHED) -> list[Case]:
    """Cases of a published-runs file (default: the shipped one). Raises ConfigError for a file that is none."""
    cases: list[Case] = []
    try:
        runs = json.loads(Path(path).read_text(encoding="utf-8"))["runs"]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    except (KeyError, TypeError):
        raise ConfigError(f'{path}: a file of published runs is an object with a list "runs"') from None
    for index, run in enumerate(runs):
        try:
            cases += _cases(run)
        except (KeyError, StopIteration) as error:
            raise ConfigError(f"{path}: runs[{index}] ({run.get('model', 'no model')}): {error} is missing") from None
    return cases


def _cases(run: dict[str, Any]) -> list[Case]:
    if "rows" in run:
        return _against_zero3(run)
    if run["layers"] == 1:
        return _one_layer(run)
    return _korthikanti(run) if "reported" in run else [_narayanan(run)]


def _cluster(run: dict[str, Any], gpus: int) -> Cluster:
    return load_cluster(run["gpu"], nodes=-(-gpus // 8))


def _interleaves(layers: int, pp: int) -> tuple[int, ...]:
    per = layers // pp
    return tuple(v for v in range(1, per + 1) if per % v == 0)


def _pipelined(plan: Plan, layers: int) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    return (("micro_batch", (1, 2, 4, 8)), ("interleave", _interleaves(layers, plan.pp) if plan.pp > 1 else (1,)))


# Settings of Narayanan et al.'s Table 1 that the table omits but the authors' script gives (NVIDIA/Megatron-LM,
# examples/sc21/run_table_1.sh): (hidden, blocks) -> micro-batch, blocks per virtual stage (0: no interleaving), torch DDP.
SC21_SETTINGS: dict[tuple[int, int], tuple[int, int, bool]] = {
    (2304, 24): (16, 0, True), (3072, 30): (16, 0, True), (4096, 36): (16, 0, True), (6144, 40): (8, 0, True),
    (8192, 48): (4, 0, False), (10240, 60): (2, 5, False), (12288, 80): (2, 5, False), (16384, 96): (1, 3, False),
    (20480, 105): (1, 1, False), (25600, 128): (1, 0, False),
}


def _narayanan(run: dict[str, Any]) -> Case:
    plan = Plan(dp=run["dp"], tp=run["tp"], pp=run["pp"], recompute=run["recompute"])
    free = _pipelined(plan, run["layers"])
    software = "megatron-2021"
    known = SC21_SETTINGS.get((run["hidden"], run["layers"]))
    if known:
        micro_batch, per_chunk, torch_ddp = known
        interleave = run["layers"] // run["pp"] // per_chunk if per_chunk else 1
        plan, free = replace(plan, micro_batch=micro_batch, interleave=interleave), ()
        software = "megatron-2021-ddp" if torch_ddp else software
    return Case(run["model"], _config(run), _cluster(run, run["gpus"]), plan, run["global_batch"], software,
                run["reported_tflops_per_gpu"], "tflops", free)


def _korthikanti(run: dict[str, Any]) -> list[Case]:
    schedule = "interleaved" if run["interleave"] > 1 else "1f1b"
    full = Plan(dp=run["dp"], tp=run["tp"], pp=run["pp"], micro_batch=run["micro_batch"], recompute="full", schedule=schedule,
                interleave=run["interleave"])
    thin = replace(full, sp=True, recompute="selective")
    config, cluster = _config(run), _cluster(run, run["gpus"])
    return [Case(f"{run['model']} / {name}", config, cluster, plan, run["global_batch"], "megatron-2022",
                 run["reported"][key], "s")
            for name, plan, key in (("full recompute", full, "full_recompute_s"),
                                    ("sp + selective", thin, "sequence_parallel_selective_recompute_s"))]


def _one_layer(run: dict[str, Any]) -> list[Case]:
    base = Plan(tp=run["tp"], micro_batch=run["micro_batch"])
    full, thin = replace(base, recompute="full"), replace(base, sp=True, recompute="selective")
    config, cluster = _config(run), _cluster(run, run["gpus"])
    rows = (("baseline forward", base, "baseline_fwd_ms", "forward"),
            ("baseline backward", base, "baseline_bwd_ms", "backward"),
            ("full recompute backward", full, "full_recompute_bwd_ms", "backward"),
            ("sp + selective forward", thin, "sp_selective_fwd_ms", "forward"),
            ("sp + selective backward", thin, "sp_selective_bwd_ms", "backward"))
    return [Case(f"{run['model']} / {name}", config, cluster, plan, run["micro_batch"], "megatron-2022",
                 run["reported"][key], "ms", layer=layer) for name, plan, key, layer in rows]


def _against_zero3(run: dict[str, Any]) -> list[Case]:
    cases = []
    config = _config(run)
    width = next(row["ptd_model_parallel"] for row in run["rows"] if "ptd_model_parallel" in row)
    micro = next(row["ptd_micro_batch"] for row in run["rows"] if "ptd_micro_batch" in row)
    for row in run["rows"]:
        cluster = _cluster(run, row["gpus"])
        # The text gives model parallelism 96: tensor 8 within a node, so pipeline 12.
        ptd = Plan(dp=row["gpus"] // width, tp=8, pp=width // 8, micro_batch=micro, recompute="full")
        zero = Plan(dp=row["gpus"], zero=3, micro_batch=row["zero3_micro_batch"], recompute="full")
        cases += [
            Case(f"{run['model']} / ptd {row['gpus']}", config, cluster, ptd, run["global_batch"], "megatron-2021",
                 row["ptd_tflops"], "tflops", _pipelined(ptd, run["layers"])[1:]),
            Case(f"{run['model']} / zero3 {row['gpus']}", config, cluster, zero, run["global_batch"], "deepspeed-2021",
                 row["zero3_tflops"], "tflops")]
    return cases


def published_flops(config: ModelConfig, global_batch: int) -> float:
    """FLOPs per iteration as Narayanan et al. count them, full recomputation included (their equation 3)."""
    h, layers, s, v = config.hidden, config.layers, config.seq, config.vocab
    return 96 * global_batch * s * layers * h * h * (1 + s / (6 * h) + v / (16 * layers * h))


def candidates(case: Case) -> Iterable[Plan]:
    """The published plan with every combination of what the publication leaves open."""
    plans = [case.plan]
    for field, values in case.free:
        plans = [replace(p, **{field: v}) for p in plans for v in values]
    for plan in plans:
        plan = replace(plan, schedule="interleaved" if plan.interleave > 1 else plan.schedule)
        if not plan_problems(plan, case.config, case.cluster, case.global_batch):
            yield plan


def predict_case(case: Case) -> Row:
    """The prediction for one case. Raises ValueError when no setting of the free knobs fits in memory."""
    software = SOFTWARE[case.software]
    if case.layer:
        cost = block_cost(case.config, "dense", case.plan.micro_batch, case.plan.recompute,
                          Placement.of(case.plan, case.cluster, software))
        seconds = cost.forward if case.layer == "forward" else cost.backward_input + cost.backward_weight
        return Row(case, seconds * 1e3, case.plan)
    reports = [predict_step(case.config, plan, case.cluster, case.global_batch, software, exact=False) for plan in candidates(case)]
    fitting = [r for r in reports if r.fits] or ([] if case.free else reports)
    if not fitting:
        raise ValueError(f"{case.name}: no setting fits in memory")
    fastest = min(fitting, key=lambda r: r.seconds).plan
    best = predict_step(case.config, fastest, case.cluster, case.global_batch, software)  # the answer is run in full
    if case.unit == "tflops":
        rate = published_flops(case.config, case.global_batch) / best.seconds / best.plan.devices / 1e12
        return Row(case, rate, best.plan, best)
    return Row(case, best.seconds, best.plan, best)


def validate(path: str | Path = PUBLISHED) -> list[Row]:
    """Predict every case of a published-runs file (default: the shipped one)."""
    return [predict_case(case) for case in load_cases(path)]


def held_out_errors(rows: Iterable[Row]) -> tuple[float, float]:
    """(median, worst) absolute relative error of the rows that were not fitted."""
    errors = [abs(r.error) for r in rows if not r.case.fitted]
    return median(errors), max(errors)


def format_report(rows: list[Row]) -> str:
    """A table of all rows, and the held-out summary."""
    lines = [f"{'row':42} {'fit':4} {'published':>10} {'predicted':>10} {'error':>7}  plan"]
    for row in rows:
        case = row.case
        open_knobs = f"  (open: {', '.join(name for name, _ in case.free)})" if case.free else ""
        lines.append(f"{case.name:42} {'fit' if case.fitted else 'held':4} {case.published:>8.4g} {case.unit[:2]:2}"
                     f"{row.predicted:>10.4g} {row.error:>+7.1%}  {row.plan.label}{open_knobs}")
    middle, worst = held_out_errors(rows)
    lines.append(f"held out: {sum(not r.case.fitted for r in rows)} rows, median |error| {middle:.1%}, worst {worst:.1%}")
    return "\n".join(lines)
