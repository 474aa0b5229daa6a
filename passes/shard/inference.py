"""Plans for inference: forward passes only, prefill and decode apart, with the cache of keys and values in the memory model.

Entry points: `InferenceProblem`, `predict_inference(problem, plan)` -> `InferenceReport`, `plan_inference(problem)` -> the best plan for
the first token, for further tokens, and for whole requests.

Prefill runs `prompt` tokens of one sequence after another through the stages; it is bound by compute. Decode runs one token of every
sequence at hand; it is bound by reading weights and the cache. With pp stages the sequences at hand are dealt into pp groups that follow each
other round, so a token takes pp times the slowest stage. Every replica holds the whole batch's share of the cache at full length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

from .cluster import Cluster
from .collectives import collective_time
from .kernels import memory_time
from .layer_cost import SOFTWARE, Placement, block_cost
from .model import ELEMENT, ModelConfig, Shard, block_params
from .partition import even_split, part_blocks
from .plan import Plan
from .planner import Infeasible
from .space import divisors

__all__ = ["InferenceProblem", "InferenceReport", "InferenceResult", "cache_bytes_per_token", "plan_inference", "predict_inference"]


@dataclass(frozen=True)
class InferenceProblem:
    """batch: sequences served at a time, over all replicas. prompt and output: tokens of a request. memory_limit: bytes per device. pins:
    plan fields that are given.
    """

    config: ModelConfig
    cluster: Cluster
    batch: int
    prompt: int
    output: int
    memory_limit: float | None = None
    pins: tuple[tuple[str, int], ...] = ()

    @property
    def context(self) -> int:
        return self.prompt + self.output


@dataclass(frozen=True)
class InferenceReport:
    """first_token_s: of a prompt alone. token_s: between tokens of a sequence, whole batch at work. request_s: prompt and all output tokens.
    tokens_per_second: output tokens, all replicas. Bytes are of the fullest device.
    """

    plan: Plan
    first_token_s: float
    token_s: float
    request_s: float
    tokens_per_second: float
    prefill_tokens_per_second: float
    weights: float
    cache: float
    activations: float
    reserved: float
    capacity: float

    @property
    def peak_memory(self) -> float:
        return self.weights + self.cache + self.activations + self.reserved

    @property
    def fits(self) -> bool:
        return self.peak_memory <= self.capacity


@dataclass(frozen=True)
class InferenceResult:
    """The best plan for each objective (and the most tokens per second), and how many were looked at."""

    first_token: InferenceReport
    token: InferenceReport
    request: InferenceReport
    throughput: InferenceReport
    considered: int


def cache_bytes_per_token(config: ModelConfig, tp: int) -> float:
    """Bytes that one token of one sequence keeps in one layer on one device. Latent attention keeps its latent, whole on every rank."""
    unit = ELEMENT[config.dtype]
    if config.latent is not None:
        return unit * (config.latent.kv_rank + config.latent.rope_dim)
    return unit * max(1.0, config.kv_heads / tp) * 2 * config.head_dim


def _stage_seconds(problem: InferenceProblem, plan: Plan, sequences: int, tokens: int, context: int) -> tuple[list[float], float]:
    """(seconds per stage, seconds of a message between stages) for `tokens` tokens each of `sequences` sequences."""
    config = replace(problem.config, seq=tokens)
    place = Placement.of(plan, problem.cluster, SOFTWARE["aicc"])
    layout = part_blocks(config, plan, plan.split)
    seconds = []
    for runs in layout.runs:
        total = 0.0
        for kind, count in runs:
            cost = block_cost(config, kind, sequences, "none", place).forward
            if kind == "head":  # one row per sequence is needed, not one per token
                cost = block_cost(replace(config, seq=1), kind, sequences, "none", place).forward
            elif kind != "embedding" and tokens == 1:
                cost += memory_time(place.device, sequences * context * cache_bytes_per_token(config, plan.tp))
            total += count * cost
        seconds.append(total)
    size = ELEMENT[config.dtype] * sequences * tokens * config.hidden / plan.tp
    return seconds, collective_time("p2p", size, place.pipeline) if plan.pp > 1 else 0.0


def predict_inference(problem: InferenceProblem, plan: Plan) -> InferenceReport:
    """Latency, throughput and memory of a plan (dp replicas of tp x pp; ep over a replica's ranks)."""
    config = problem.config
    own = -(-problem.batch // plan.dp)
    group = -(-own // plan.pp)
    prefill, message = _stage_seconds(problem, plan, 1, problem.prompt, problem.prompt)
    decode, hop = _stage_seconds(problem, plan, group, 1, problem.prompt + problem.output // 2)
    first = sum(prefill) + (plan.pp - 1) * message
    rounds = min(plan.pp, own)
    token = max(sum(decode) + plan.pp * hop, rounds * (max(decode) + hop))
    # The replica's prompts follow each other through the stages before the batch decodes.
    request = first + (own - 1) * (max(prefill) + message) + problem.output * token
    layout, unit = part_blocks(config, plan, plan.split), ELEMENT[config.dtype]
    weights = cache = 0.0
    for runs in layout.runs:
        local = [(kind, count, sum(block_params(config, kind).local(Shard(tp=plan.tp, ep=plan.ep)))) for kind, count in runs]
        weights = max(weights, unit * sum(count * n for _, count, n in local))
        layers = sum(count for kind, count, _ in local if kind not in ("embedding", "head"))
        cache = max(cache, layers * own * problem.context * cache_bytes_per_token(config, plan.tp))
    # Working set: a block's widest activations for one prompt, and logits of the batch.
    wide = max(config.ffn, config.heads * config.head_dim) * (2 if config.gated else 1) / plan.tp + 2 * config.hidden
    activations = unit * (problem.prompt * wide) + 4 * group * config.vocab / plan.tp
    device = problem.cluster.device
    capacity = min(device.memory_bytes, problem.memory_limit or device.memory_bytes)
    return InferenceReport(plan, first, token, request, problem.batch / token, plan.dp * problem.prompt / (max(prefill) + message), weights, cache,
                           activations, device.reserved_bytes, capacity)


def plan_inference(problem: InferenceProblem) -> InferenceResult:
    """Look at every dp, tp, pp and ep that divides; the space is small. Raises Infeasible with the smallest memory found."""
    config, size, pins = problem.config, problem.cluster.size, dict(problem.pins)
    experts = config.moe.experts if config.moe else 1
    found: list[InferenceReport] = []
    smallest: InferenceReport | None = None
    considered = 0
    for tp, pp in product(divisors(config.heads), divisors(size)):
        replica = tp * pp
        if tp > problem.cluster.node_size or size % replica or pp > config.layers or size // replica > problem.batch:
            continue
        for ep in [e for e in divisors(experts) if tp % e == 0 or e % tp == 0 and size // pp % e == 0]:
            plan = Plan(dp=size // replica, tp=tp, pp=pp, ep=ep, split=even_split(config.layers, pp))
            if any(getattr(plan, name) != value for name, value in pins.items()):
                continue
            considered += 1
            report = predict_inference(problem, plan)
            if smallest is None or report.peak_memory < smallest.peak_memory:
                smallest = report
            if report.fits:
                found.append(report)
    if smallest is None:
        raise Infeasible(f"no plan exists for {size} devices and a batch of {problem.batch}"
                         + (f" with {', '.join(f'{k}={v}' for k, v in pins.items())}" if pins else ""))
    if not found:
        parts = {"weights": smallest.weights, "the cache of keys and values": smallest.cache, "activations": smallest.activations}
        binding = max(parts, key=lambda k: parts[k])
        raise Infeasible(f"{config.name} does not fit on {size} x {problem.cluster.device.name} for inference under any plan: the smallest found "
                         f"needs {smallest.peak_memory / 1e9:.1f} GB per device, {smallest.capacity / 1e9:.1f} GB are there "
                         f"({smallest.plan.label}); most of it is {binding} ({parts[binding] / 1e9:.1f} GB)")
    return InferenceResult(min(found, key=lambda r: (r.first_token_s, r.token_s)), min(found, key=lambda r: (r.token_s, r.first_token_s)),
                           min(found, key=lambda r: r.request_s), max(found, key=lambda r: r.tokens_per_second), considered)
