"""What training a transformer computes, moves and keeps: a layer-level model of dense and mixture-of-experts decoders.

Entry points: `block_work(config, kind, micro_batch, shard)`, which lists one block's kernels, collectives and saved
activations on one device, and `model_flops`. Times are put on them by `layer_cost.py`.

A model is a run-length list of block kinds (`embedding`, `dense`, `moe`, `head`): equal blocks are described once,
whatever their number. Activation bytes follow Korthikanti et al. 2022 (arXiv 2205.05198): for a GPT block the items
below add up exactly to s*b*h*(10 + 24/t + 5*a*s/(h*t)) with tensor parallelism and to s*b*h/t*(34 + 5*a*s/h) with
sequence parallelism.

Units: bytes, FLOPs, elements. `s` sequence, `b` micro-batch, `h` hidden, `t` tensor-parallel degree.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil

from .model import ELEMENT, ModelConfig, Shard

__all__ = ["BlockWork", "Comm", "Kernel", "Saved", "block_work", "model_flops"]

WRITTEN_OUT = 4096
"""Classes from which a loss keeps its logits and not their log-softmax (`frontend/formulas.py`)."""


@dataclass(frozen=True)
class Kernel:
    """One kernel of the forward pass and what its backward does.

    gemm: (batch, m, n, k), empty for a memory-bound kernel. forward/backward: bytes through memory besides the GEMM's own
    operands. weight: the GEMM's second operand is a parameter, so backward has a weight-gradient GEMM. core: run again by
    selective recomputation (the attention core; norms and activations where attention streams). fused: a streaming
    attention kernel. scale: the share of the GEMM's FLOPs that is really done (a causal mask skips half).
    """

    name: str
    gemm: tuple[float, float, float, float] | tuple[()] = ()
    forward: float = 0.0
    backward: float = 0.0
    weight: bool = False
    core: bool = False
    fused: bool = False
    scale: float = 1.0

    @property
    def flops(self) -> float:
        if not self.gemm:
            return 0.0
        batch, m, n, k = self.gemm
        return 2 * batch * m * n * k * self.scale


@dataclass(frozen=True)
class Comm:
    """One collective of a block per micro-batch. `hide` names the compute of the same pass it may overlap: none, weight,
    dgrad, attention, experts."""

    name: str
    kind: str
    axis: str
    nbytes: float
    phase: str
    hide: str = "none"


@dataclass(frozen=True)
class Saved:
    """Activation bytes kept for backward. `core` ones go under selective recomputation. again: bytes that are kept by a program that makes with
    element-wise ops again what they give (None: all of them)."""

    name: str
    nbytes: float
    core: bool = False
    again: float | None = None


@dataclass(frozen=True)
class BlockWork:
    """One block on one device for one micro-batch. `input_bytes` is all that full recomputation keeps."""

    kernels: tuple[Kernel, ...]
    comms: tuple[Comm, ...]
    saved: tuple[Saved, ...]
    input_bytes: float

    @cached_property
    def forward_flops(self) -> float:
        """FLOPs of the forward pass."""
        return sum(k.flops for k in self.kernels)

    @cached_property
    def counted_flops(self) -> float:
        """FLOPs of the forward pass as utilisation counts them: the whole score matrix, masked or not."""
        return sum(k.flops / k.scale for k in self.kernels)

    def saved_bytes(self, recompute: str, elementwise_again: bool = False) -> float:
        """Bytes kept per micro-batch under `none`, `selective` or `full` recomputation. elementwise_again: by a program that keeps nothing that
        element-wise ops make of what else is kept (`passes/spmd/recompute.py`)."""
        def kept(s: Saved) -> float:
            return s.again if elementwise_again and s.again is not None else s.nbytes
        if recompute == "full":
            loss = [s for s in self.saved if s.name == "softmax" and s.again is not None] if elementwise_again else []
            return self.input_bytes - sum(s.nbytes - kept(s) for s in loss)
        return sum(kept(s) for s in self.saved if recompute == "none" or not s.core)


@lru_cache(maxsize=1 << 14)
def block_work(config: ModelConfig, kind: str, micro_batch: int, shard: Shard) -> BlockWork:
    """Kernels, collectives and saved activations of one `kind` block for `micro_batch` sequences on one device of
    `shard`.
    """
    if config.custom is not None:
        work: BlockWork = config.custom.work(kind, micro_batch, shard)
        return work
    return _BUILDERS[kind](_Sizes.of(config, micro_batch, shard))


@dataclass(frozen=True)
class _Sizes:
    """Shapes on one device: `rows` tokens of this context shard, `thin` the tokens of the sequence-parallel regions."""

    config: ModelConfig
    shard: Shard
    micro_batch: int
    rows: float
    thin: float
    unit: int

    @classmethod
    def of(cls, config: ModelConfig, micro_batch: int, shard: Shard) -> _Sizes:
        rows = micro_batch * config.seq / shard.cp
        return cls(config, shard, micro_batch, rows, rows / shard.tp if shard.sp else rows, ELEMENT[config.dtype])

    @property
    def streaming(self) -> bool:
        """Attention streams, so selective recomputation takes the next cheapest: norms and the MLP's activation."""
        return self.config.attention == "flash"

    @property
    def hidden_bytes(self) -> float:
        """The residual stream of all rows."""
        return self.rows * self.config.hidden * self.unit


def _embedding(z: _Sizes) -> BlockWork:
    h = z.config.hidden
    kernels = [Kernel("embedding", forward=2 * z.unit * z.rows * h, backward=3 * z.unit * z.rows * h)]
    saved = []
    if z.config.dropout:
        kernels.append(Kernel("embedding_dropout", forward=5 * z.thin * h, backward=5 * z.thin * h))
        saved.append(Saved("embedding_dropout_mask", z.thin * h))
    comms: tuple[Comm, ...] = ()
    if z.shard.tp > 1:
        kind = "reduce_scatter" if z.shard.sp else "all_reduce"
        comms = (Comm("embedding_out", kind, "tp", z.hidden_bytes, "forward"),)
    return BlockWork(tuple(kernels), comms, tuple(saved), 0.0)


def _head(z: _Sizes) -> BlockWork:
    h, vocab = z.config.hidden, ceil(z.config.vocab / z.shard.tp)
    u, logits = z.unit, z.rows * vocab
    kernels = (
        Kernel("final_norm", forward=2 * u * z.thin * h, backward=3 * u * z.thin * h),
        Kernel("logits", (1, z.rows, vocab, h), weight=True),
        # Cross-entropy in fp32. Fused: cast, row maximum, exponent and sum. Unfused: cast, maximum, subtract, exponent,
        # sum,
        # divide, each its own pass. Backward scales, subtracts one, and casts back.
        Kernel("cross_entropy", forward=(u + 12) * logits, backward=(8 + u) * logits) if z.config.fused_loss else
        Kernel("cross_entropy", forward=(u + 36) * logits, backward=(12 + u) * logits))
    # Vocabulary-parallel: the input is gathered (sp) or there already, the output stays cut.
    comms = [c for c in _tp_pair(z, "head") if c.name not in ("head_out", "head_dy")]
    # Kept: norm input, GEMM input, 16-bit logits and their fp32 softmax.
    saved = (Saved("norm_input", u * z.thin * h), Saved("logits_input", u * z.thin * h, again=_normed(z)),
             Saved("softmax", (4 + u) * logits, again=(u if z.config.vocab >= WRITTEN_OUT else 4) * logits))
    return BlockWork(kernels, tuple(comms), saved, u * z.thin * h + (4 + u) * logits)


def _tp_pair(z: _Sizes, name: str) -> list[Comm]:
    """Tensor-parallel collectives around one column-then-row pair of GEMMs, forward output first, then the
    backward ones.
    """
    if z.shard.tp == 1:
        return []
    size = z.hidden_bytes
    if not z.shard.sp:
        return [Comm(f"{name}_out", "all_reduce", "tp", size, "forward"),
                Comm(f"{name}_dx", "all_reduce", "tp", size, "backward", "weight")]
    return [Comm(f"{name}_out", "reduce_scatter", "tp", size, "forward"),
            Comm(f"{name}_in", "all_gather", "tp", size, "forward"),
            Comm(f"{name}_dy", "all_gather", "tp", size, "backward"),
            Comm(f"{name}_x", "all_gather", "tp", size, "backward", "dgrad"),
            Comm(f"{name}_dx", "reduce_scatter", "tp", size, "backward", "weight")]


def _bias(z: _Sizes, elements: float) -> float:
    """Bytes that the gradient of a GEMM's bias reads (gated models have no biases)."""
    return 0.0 if z.config.gated else z.unit * elements


def _norm(z: _Sizes, name: str) -> tuple[Kernel, Saved]:
    width = z.unit * z.thin * z.config.hidden
    return Kernel(name, forward=2 * width, backward=3 * width, core=z.streaming), Saved(f"{name}_input", width)


def _normed(z: _Sizes) -> float:
    """Bytes of a norm's result that are kept beside its input: layer norm is one op, RMS norm is made of element-wise ones."""
    return 0.0 if z.config.gated else z.unit * z.thin * z.config.hidden


def _residual(z: _Sizes, name: str) -> tuple[Kernel, tuple[Saved, ...]]:
    """Bias, dropout and residual addition, in one kernel forward; backward adds the two gradients of the residual
    stream.
    """
    elements, u = z.thin * z.config.hidden, z.unit
    if not z.config.dropout:
        return Kernel(name, forward=3 * u * elements, backward=3 * u * elements), ()
    return (Kernel(name, forward=(3 * u + 1) * elements, backward=(5 * u + 1) * elements),
            (Saved(f"{name}_mask", elements),))


def _attention(z: _Sizes) -> tuple[list[Kernel], list[Comm], list[Saved]]:
    """Norm, QKV, scores, softmax, context, output projection, residual."""
    c, u, t = z.config, z.unit, z.shard.tp
    norm, norm_saved = _norm(z, "attention_norm")
    residual, mask = _residual(z, "attention_residual")
    heads, kv_heads = c.heads / t, max(1.0, c.kv_heads / t)
    score_dim, value_dim, projections, latents = _projections(z, heads, kv_heads)
    context = c.seq  # keys that one query row meets, over all steps of the ring
    core = _core(z, heads, score_dim, value_dim, context)
    output = Kernel("attention_out", (1, z.rows, c.hidden, heads * value_dim), backward=_bias(z, z.rows * c.hidden),
                    weight=True)
    kv_width = kv_heads * (score_dim + value_dim)
    rotary = 2 * u * z.rows * (heads + kv_heads) * score_dim if c.rotary else 0.0
    # Splitting the packed projection into contiguous q, k, v (and turning them, with rotary) is one pass over them.
    layout = Kernel("qkv_layout", forward=2 * u * z.rows * (heads * score_dim + kv_width) + rotary,
                    backward=2 * u * z.rows * (heads * score_dim + kv_width) + rotary)
    saved = [norm_saved, Saved("qkv_input", u * z.thin * c.hidden, core=z.streaming, again=_normed(z)), *latents,
             Saved("q", u * z.rows * heads * score_dim), Saved("k", u * z.rows * kv_heads * score_dim),
             Saved("v", u * z.rows * kv_heads * value_dim), Saved("projection_input", u * z.rows * heads * value_dim), *mask]
    if c.attention == "flash":
        saved.append(Saved("log_sum_exp", 4 * z.rows * heads))
    else:
        scores = z.micro_batch * heads * (c.seq / z.shard.cp) * context
        saved.append(Saved("softmax", u * scores, core=True))
        if c.dropout:
            saved += [Saved("softmax_mask", scores, core=True), Saved("softmax_dropped", u * scores, core=True)]
    comms = _tp_pair(z, "attention")
    if z.shard.cp > 1 and not z.shard.ring:
        # Heads for the sequence and back: q, k, v before attention, its result after it; backward the same with gradients.
        there, back = u * z.rows * (heads * score_dim + kv_width), u * z.rows * heads * value_dim
        for phase in ("forward", "backward"):
            comms += [Comm("heads_for_sequence", "all_to_all", "cp", there, phase), Comm("sequence_for_heads", "all_to_all", "cp", back, phase)]
    elif z.shard.cp > 1:
        # Ring attention: keys and values go round once forward; backward they go round again with their gradients, in fp32, which go home.
        block, steps = z.rows * kv_width, z.shard.cp - 1
        comms += [Comm("ring_kv", "p2p", "cp", u * block * steps, "forward", "attention"),
                  Comm("ring_kv_grad", "p2p", "cp", block * (u * steps + 4 * z.shard.cp), "backward", "attention")]
    return [norm, *projections, layout, *core, output, residual], comms, saved


def _projections(z: _Sizes, heads: float, kv_heads: float) -> tuple[int, int, list[Kernel], list[Saved]]:
    """(score head dim, value head dim, projection GEMMs, saved latents)."""
    c = z.config
    if c.latent is None:
        width = (heads + 2 * kv_heads) * c.head_dim
        return c.head_dim, c.head_dim, [
            Kernel("qkv", (1, z.rows, width, c.hidden), backward=_bias(z, z.rows * width), weight=True)], []
    m, rows, u = c.latent, z.rows, z.unit
    score = m.nope_dim + m.rope_dim
    down = m.q_rank + m.kv_rank + m.rope_dim
    query_k = m.q_rank or c.hidden
    kernels = [Kernel("latent_down", (1, rows, down, c.hidden), weight=True),
               Kernel("latent_norm", forward=2 * u * rows * down, backward=3 * u * rows * down),
               Kernel("query_up", (1, rows, heads * score, query_k), weight=True),
               Kernel("kv_up", (1, rows, heads * (m.nope_dim + m.value_dim), m.kv_rank), weight=True)]
    return score, m.value_dim, kernels, [Saved("latents", 2 * u * rows * down)]


def _core(z: _Sizes, heads: float, score_dim: int, value_dim: int, context: float) -> list[Kernel]:
    c, u = z.config, z.unit
    batch, queries = z.micro_batch * heads, c.seq / z.shard.cp
    if c.attention == "flash":  # a causal mask skips half; in a ring all wait for the last rank, which meets every block, its own by half
        scale = 1 - 0.5 / z.shard.cp if z.shard.ring else 0.5
        return [Kernel("flash_attention", (batch, queries, context, score_dim + value_dim), fused=True, scale=scale)]
    scores = batch * queries * context
    kernels = [Kernel("scores", (batch, queries, context, score_dim), core=True),
               Kernel("softmax", forward=2 * u * scores, backward=3 * u * scores, core=True)]
    if c.dropout:
        kernels.append(Kernel("softmax_dropout", forward=(2 * u + 1) * scores, backward=(2 * u + 1) * scores, core=True))
    return [*kernels, Kernel("context", (batch, queries, value_dim, context), core=True)]


def _dense(z: _Sizes) -> BlockWork:
    kernels, comms, saved = _attention(z)
    mlp_kernels, mlp_saved = _mlp(z, z.config.ffn / z.shard.tp, z.rows, "mlp")
    norm, norm_saved = _norm(z, "mlp_norm")
    residual, mask = _residual(z, "mlp_residual")
    saved += [norm_saved, Saved("mlp_input", z.unit * z.thin * z.config.hidden, core=z.streaming, again=_normed(z)), *mlp_saved, *mask]
    return BlockWork((*kernels, norm, *mlp_kernels, residual), (*comms, *_tp_pair(z, "mlp")), tuple(saved),
                     z.unit * z.thin * z.config.hidden)


def _mlp(z: _Sizes, width: float, rows: float, name: str, batch: float = 1.0) -> tuple[list[Kernel], list[Saved]]:
    """Up (and gate), activation, down. `rows` per GEMM, `batch` GEMMs side by side (experts)."""
    c, u, elements = z.config, z.unit, batch * rows * width
    fan = 2 if c.gated else 1
    kernels = [Kernel(f"{name}_up", (batch, rows, fan * width, c.hidden), backward=_bias(z, elements), weight=True),
               Kernel(f"{name}_act", forward=(fan + 1) * u * elements, backward=(2 * fan + 1) * u * elements,
                      core=z.streaming),
               Kernel(f"{name}_down", (batch, rows, c.hidden, width), backward=_bias(z, batch * rows * c.hidden), weight=True)]
    return kernels, [Saved(f"{name}_up", fan * u * elements), Saved(f"{name}_act", u * elements, core=z.streaming, again=0.0)]


def _experts(z: _Sizes) -> BlockWork:
    """A mixture-of-experts block. Tokens are sequence-parallel before dispatch, so each device sends its thin rows."""
    c, u, moe = z.config, z.unit, z.config.experts()
    kernels, comms, saved = _attention(z)
    norm, norm_saved = _norm(z, "mlp_norm")
    residual, mask = _residual(z, "mlp_residual")
    own = z.rows / z.shard.tp  # tokens each device routes; without sp a device still routes its slice only
    sent = own * moe.top_k
    local = moe.experts / z.shard.ep
    per_expert = sent * moe.imbalance / local
    received = per_expert * local
    routed, routed_saved = _mlp(z, moe.ffn, per_expert, "expert", local)
    wide = 2 * u * c.hidden * (sent + received)
    kernels += [norm, Kernel("router", (1, own, moe.experts, c.hidden), weight=True),
                Kernel("permute", forward=wide, backward=wide), *routed,
                Kernel("unpermute", forward=wide, backward=wide), residual]
    saved += [norm_saved, Saved("mlp_input", u * z.thin * c.hidden, core=z.streaming, again=_normed(z)),
              Saved("expert_input", u * received * c.hidden), *routed_saved, Saved("combine_input", u * sent * c.hidden), *mask]
    if moe.shared_ffn:
        shared, shared_saved = _mlp(z, moe.shared_ffn / z.shard.tp, z.rows, "shared")
        kernels += shared
        saved += shared_saved
        comms += _tp_pair(z, "shared")
    if z.shard.ep > 1:
        size = u * sent * moe.imbalance * c.hidden
        comms += [Comm(f"{step}_{phase}", "all_to_all", "ep", size, phase, "experts")
                  for phase in ("forward", "backward") for step in ("dispatch", "combine")]
    return BlockWork(tuple(kernels), tuple(comms), tuple(saved), u * z.thin * c.hidden)


_BUILDERS = {"embedding": _embedding, "head": _head, "dense": _dense, "moe": _experts}


def model_flops(config: ModelConfig, tokens: float) -> float:
    """FLOPs of forward and backward on `tokens` tokens with no recomputation: what MFU counts. The whole score matrix
    counts, masked or not, as in the published figures.
    """
    per_sequence = 0.0
    for kind, count in config.runs:
        work = block_work(config, kind, 1, Shard())
        per_sequence += count * work.counted_flops
    return 3 * per_sequence * tokens / config.seq
