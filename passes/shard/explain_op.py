"""Why one op of one layer lies where it lies: its stage, how its weight is cut, what it computes, moves and keeps, and what other
choices would cost.

Entry point: `why_op(problem, report, "layer.7.mlp.down")`. Names are `layer.N.PART.OP` in the words of the table below or of common
checkpoints (`model.layers.7.mlp.down_proj`), `embedding` and `head`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import prod

from .collectives import collective_cost
from .layer_cost import Placement, block_cost, kernel_seconds
from .model import ELEMENT
from .partition import even_split, part_blocks
from .plan import Plan, plan_problems
from .planner import Problem
from .step import StepReport, predict_step, rank_devices
from .tables import ConfigError, nearest
from .workload import Comm, Kernel, block_work

__all__ = ["OpName", "resolve_op", "why_op"]

# What people call an op (after the layer's number) -> kernels of `workload.py`.
_ALIASES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"(qkv|[qkv]_proj|c_attn|query_key_value|wqkv|w[qkv]|query|key|value)$", ("qkv", "query_up", "latent_down")),
    (r"(attn|attention).*(out|o_proj|out_proj|c_proj|dense|wo)$", ("attention_out",)),
    (r"(o_proj|out_proj|wo)$", ("attention_out",)),
    (r"(sdpa|flash|core|attention|attn|self_attn)$", ("flash_attention", "scores")),
    (r"(mlp|ffn|feed_forward).*(down|down_proj|fc2|c_proj|w2)$", ("mlp_down", "expert_down")),
    (r"(mlp|ffn|feed_forward).*(up|gate|up_proj|gate_proj|gate_up_proj|fc1|c_fc|w1|w3)$", ("mlp_up", "expert_up")),
    (r"experts?.*(down|down_proj|w2)$", ("expert_down",)), (r"experts?.*(up|gate|up_proj|gate_proj|w1|w3)$", ("expert_up",)),
    (r"(mlp|ffn|feed_forward)$", ("mlp_down", "expert_down")), (r"experts?$", ("expert_down",)),
    (r"(router|gate)$", ("router",)), (r"(down|down_proj|fc2|c_proj)$", ("mlp_down", "expert_down")),
    (r"(up|up_proj|gate_proj|fc1|c_fc)$", ("mlp_up", "expert_up")),
    (r"(input_layernorm|ln_1|norm1|attention_norm)$", ("attention_norm",)),
    (r"(post_attention_layernorm|ln_2|norm2|mlp_norm|norm)$", ("mlp_norm",)),
)
# Kernel -> (how its weight is cut over tp, the collective pair around it).
_CUTS = {
    "qkv": ("columns (whole heads)", "attention"), "query_up": ("columns (whole heads)", "attention"),
    "kv_up": ("columns (whole heads)", "attention"), "attention_out": ("rows (the contraction)", "attention"),
    "mlp_up": ("columns", "mlp"), "mlp_down": ("rows (the contraction)", "mlp"), "shared_up": ("columns", "shared"),
    "shared_down": ("rows (the contraction)", "shared"), "logits": ("columns (the vocabulary)", "head"),
    "embedding": ("rows (the vocabulary)", "embedding"),
}
_ROWS = ("attention_out", "mlp_down", "shared_down")


@dataclass(frozen=True)
class OpName:
    """A block by its index among all blocks (0: embedding), its kind, and one of its kernels."""

    block: int
    kind: str
    kernel: str


def resolve_op(problem: Problem, text: str) -> OpName:
    """The op that `text` names. Raises ConfigError that lists what there is."""
    config = problem.config
    if re.fullmatch(r"(.*\.)?(embedding|embed|wte|embed_tokens|tok_embeddings)(\.weight)?", text):
        return _end(problem, 0, "embedding")
    if re.fullmatch(r"(.*\.)?(head|lm_head|logits|output)(\.weight)?", text):
        return _end(problem, len(config.blocks) - 1, "head")
    found = re.search(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)(?:\.(.+))?$", text)
    if not found:
        raise ConfigError(f"'{text}': write layer.N.OP (such as layer.7.mlp.down), embedding or head")
    number, rest = int(found[1]), (found[2] or "").removesuffix(".weight").lower()
    if number >= config.layers:
        raise ConfigError(f"'{text}': {config.name} has layers 0 to {config.layers - 1}")
    kind = config.blocks[number + 1]
    names = [k.name for k in block_work(config, kind, 1, Placement.of(Plan(), problem.cluster, problem.software).shard).kernels]
    flat = rest.replace(".", "_")
    if config.custom is not None:  # kernels are named by module and op
        short = {re.sub(r"^.*?\d+\.", "", name): name for name in reversed(names)}
        for key, name in short.items():
            if key == rest or key.startswith(f"{rest}.") or key.rsplit(".", 1)[0].endswith(f".{rest}"):
                return OpName(number + 1, kind, name)
        raise ConfigError(f"'{text}': a {kind} layer has no op '{rest}'; {nearest(rest, short)}")
    wanted = [flat] + [k for pattern, kernels in _ALIASES if re.search(rf"(?:^|\.){pattern}", rest) for k in kernels]
    for name in wanted:
        if name in names:
            return OpName(number + 1, kind, name)
    raise ConfigError(f"'{text}': a {kind} layer has no op '{rest}'; {nearest(flat, names)}")


def _end(problem: Problem, block: int, kind: str) -> OpName:
    """The matrix at one end of the model."""
    if problem.config.custom is None:
        return OpName(block, kind, "embedding" if kind == "embedding" else "logits")
    kernels = block_work(problem.config, kind, 1, Placement.of(Plan(), problem.cluster, problem.software).shard).kernels
    if not kernels:
        raise ConfigError(f"{problem.config.name} has no {kind}: it begins and ends with its layers")
    return OpName(block, kind, next((k.name for k in kernels if k.gemm), kernels[0].name))


def why_op(problem: Problem, report: StepReport, text: str) -> str:
    """The explanation, some twenty lines. Raises ConfigError for an unknown op."""
    op, plan, config = resolve_op(problem, text), report.plan, problem.config
    stage, part = _where(problem, plan, op)
    device = rank_devices(plan, problem.cluster)[stage]
    place = Placement.of(plan, problem.cluster, problem.software, device)
    work = block_work(config, op.kind, plan.micro_batch, plan.shard)
    kernel = next(k for k in work.kernels if k.name == op.kernel)
    width = plan.devices // plan.pp
    name = "embedding" if op.kind == "embedding" else "head" if op.kind == "head" else f"layer {op.block - 1}"
    lines = [f"{op.kernel} of {name} ({op.kind}) under {plan.label}",
             f"  where: pipeline stage {stage} of {plan.pp} (part {part}), devices {stage * width} to {stage * width + width - 1}, "
             f"{device.name}"]
    lines += _cut_lines(problem, plan, op, kernel)
    ahead, back, weight = kernel_seconds(config, op.kind, plan.micro_batch, plan.shard, device, problem.software, op.kernel)
    block = block_cost(config, op.kind, plan.micro_batch, plan.recompute, place)
    lines.append(f"  time per micro-batch: forward {_us(ahead)}, input gradient {_us(back)}, weight gradient {_us(weight)}: "
                 f"{(ahead + back + weight) / block.total:.1%} of its layer")
    if kernel.gemm:
        batch, m, n, k = kernel.gemm
        of_peak = kernel.flops / ahead / device.flops(config.dtype)
        lines.append(f"  GEMM on one device: {batch:g} x [{m:g} x {k:g}] [{k:g} x {n:g}], {of_peak:.0%} of the device's peak")
    pair = _CUTS.get(op.kernel, ("", op.kernel))[1]
    for comm in work.comms:
        mine = op.kernel in comm.name if config.custom is not None else comm.name.rsplit("_", 1)[0] == pair
        if mine or (comm.axis == "ep" and op.kernel.startswith("expert")):
            lines.append(_comm_line(comm, place))
    saved = [s for s in work.saved if s.name.startswith(op.kernel) or s.name == f"{op.kernel.split('_')[0]}_act" and "down" in op.kernel]
    for item in saved:
        gone = plan.recompute == "full" or (plan.recompute == "selective" and item.core)
        lines.append(f"  keeps for backward: {item.name}, {item.nbytes / 1e6:.1f} MB per micro-batch"
                     + (", recomputed instead" if gone else ""))
    lines.append("  if the plan were changed in one place:")
    lines += [f"    {label}: {text}" for label, text in _alternatives(problem, report)]
    return "\n".join(lines)


def _where(problem: Problem, plan: Plan, op: OpName) -> tuple[int, int]:
    split = plan.split or even_split(problem.config.layers, plan.parts)
    layout, first = part_blocks(problem.config, plan, split), 0
    for part, (runs, rank) in enumerate(zip(layout.runs, layout.ranks, strict=True)):
        first += sum(n for _, n in runs)
        if op.block < first:
            return rank, part
    raise AssertionError("every block lies on a part")


def _cut_lines(problem: Problem, plan: Plan, op: OpName, kernel: Kernel) -> list[str]:
    config = problem.config
    if not kernel.weight and (op.kind != "embedding" or config.custom is not None):
        return ["  weight: none" if kernel.gemm or kernel.fused else "  weight: none, or a vector that every tensor rank holds whole"]
    if op.kind == "embedding" and config.custom is None:
        k, n = config.vocab / plan.tp, float(config.hidden)
        batch = 1.0
    else:
        batch, _, n, k = kernel.gemm  # type: ignore[misc]
    local = prod((batch, k, n))
    lines = []
    if op.kernel.startswith("expert"):
        lines.append(f"  weight: {config.experts().experts} experts, {batch:g} whole ones on each of {plan.ep} expert ranks: "
                     f"{local * ELEMENT[config.dtype] / 1e6:.1f} MB")
        replicas = plan.devices // plan.pp // plan.ep
    elif config.custom is not None:
        words = config.custom.cut(op.kind, op.kernel, plan.shard)
        lines.append(f"  weight: {words}{f' over tp {plan.tp}' if plan.tp > 1 else ''}, as the integer program says; {k:g} x {n:g} on each device, "
                     f"{local * ELEMENT[config.dtype] / 1e6:.1f} MB")
        replicas = plan.dp * plan.cp
    else:
        cut = _CUTS.get(op.kernel, ("nothing", ""))[0] if plan.tp > 1 else "nothing"
        lines.append(f"  weight: cut over tp {plan.tp} by {cut}; {k:g} x {n:g} on each device, {local * ELEMENT[config.dtype] / 1e6:.1f} MB")
        if plan.tp > 1 and op.kernel == "embedding":
            lines.append("    why rows: each rank looks up the words that it has and has zeros for the others; the sum is "
                         + ("scattered over the sequence" if plan.sp else "an all-reduce"))
        elif plan.tp > 1 and op.kernel in _ROWS:
            lines.append("    why rows: its input comes cut in columns from the op before, so it needs no exchange; its output is a partial "
                         "sum, " + ("scattered over the sequence" if plan.sp else "added up by an all-reduce"))
        elif plan.tp > 1 and op.kernel in _CUTS:
            lines.append("    why columns: its output is then cut as the next op wants it, with no exchange between the two")
        replicas = plan.dp * plan.cp
    states = ("optimizer state", "gradients", "parameters")
    sharded = [s for s, since in zip(states, (1, 2, 3), strict=True) if plan.zero >= since]
    lines.append(f"    {replicas} replicas; " + (f"{', '.join(sharded)} sharded over them (ZeRO-{plan.zero})" if sharded
                                                 else "every one keeps its optimizer state"))
    return lines


def _comm_line(comm: Comm, place: Placement) -> str:
    group = {"tp": place.tensor, "cp": place.context, "ep": place.expert}[comm.axis]
    cost = collective_cost(comm.kind, comm.nbytes, group)
    hidden = "" if comm.hide == "none" else f", beside {comm.hide} compute"
    return (f"  {comm.phase}: {comm.kind} {comm.name} over {comm.axis} ({group.size} devices), {comm.nbytes / 1e6:.1f} MB, {cost.algorithm}, "
            f"{_us(cost.seconds)}{hidden}")


def _alternatives(problem: Problem, report: StepReport) -> list[tuple[str, str]]:
    """The step under plans that differ in one choice (dp makes up for tp and cp)."""
    plan, rows = report.plan, []
    trials: list[tuple[str, Plan]] = []
    for tp in (1, 2, 4, 8, 16):
        other = plan.dp * plan.tp
        if tp != plan.tp and other % tp == 0 and tp <= problem.cluster.node_size:
            trials.append((f"tp={tp}", replace(plan, tp=tp, dp=other // tp, sp=tp > 1, split=())))
    if plan.tp > 1:
        trials.append((f"sp={'off' if plan.sp else 'on'}", replace(plan, sp=not plan.sp)))
    trials += [(f"recompute={r}", replace(plan, recompute=r)) for r in ("none", "selective", "full") if r != plan.recompute]
    trials += [(f"zero={z}", replace(plan, zero=z)) for z in (0, 1, 2, 3) if z != plan.zero]
    for label, trial in trials:
        problems = plan_problems(trial, problem.config, problem.cluster, problem.global_batch)
        if problems:
            rows.append((label, "not possible: " + problems[0]))
            continue
        found = predict_step(problem.config, trial, problem.cluster, problem.global_batch, problem.software, exact=False)
        full = "" if found.fits else ", does not fit"
        rows.append((label, f"step {found.seconds / report.seconds - 1:+.1%}, {found.peak_memory / 1e9:.1f} GB{full}"))
    return rows


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"
