"""Seconds and bytes of one block on one device: compute by kernel, collectives, and what overlaps what.

Entry points: `Placement` (a cluster with the groups of every axis) and `block_cost(config, kind, micro_batch, recompute,
placement)`.

A block's forward, input-gradient and weight-gradient times are sums of its kernels plus the communication that is not
hidden. A collective hides behind the compute that its row names (`Comm.hide`) if the software overlaps it at all; what
does not fit is exposed. Hidden communication still slows compute a little: it takes `Software.overlap_loss` of its time
(it uses cores and memory bandwidth).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from operator import attrgetter

from .cluster import Cluster, Device
from .collectives import Group, axis_group, collective_time
from .hashing import hash_once
from .kernels import attention_time, gemm_time, memory_time
from .model import ELEMENT, ModelConfig, Shard, block_params
from .plan import Plan
from .workload import BlockWork, Kernel, block_work

__all__ = ["SOFTWARE", "BlockCost", "Placement", "Software", "block_cost", "kernel_seconds", "with_gather"]


@dataclass(frozen=True)
class Working:
    """Memory of a compiled step beside parameters, gradients, state and kept values; fitted to what programs of Llama and GPT-2 say.

    loss: bytes per logit of a micro-batch. streams: tensors of the size of the residual stream at the peak; tensor, sequence: how many more under
    tensor parallelism without and with sequence parallelism, and again more where MLPs are not gated; pipeline: how many more in a pipeline.
    in_flight: the share of a rank's gradients (under ZeRO-3 of its gathered parameters too) that is in collectives at the peak; the largest
    parameter at the least.
    """

    loss: float
    streams: float
    tensor: tuple[float, float]
    sequence: tuple[float, float]
    pipeline: float
    in_flight: float


@hash_once
@dataclass(frozen=True)
class Software:
    """What the training program overlaps and fuses. Facts about a code base, not fitted numbers.

    overlap_tensor: backward tensor-parallel collectives run beside weight gradients. overlap_gradients: data-parallel
    reduction beside backward. overlap_parameters: ZeRO gathers beside compute. overlap_p2p: pipeline messages beside
    compute. overlap_ring: ring attention beside attention. fused_accumulation: weight-gradient GEMMs add into the
    gradient buffer themselves. gradient_bytes: per parameter in that buffer. gather_rails: network ports that one node
    uses for ZeRO-3 collectives (0: all). overlap_loss: share of hidden communication time that compute loses.

    optimizer_bytes: state per parameter (master copy and two moments, all fp32; of a model in fp32 the master is the parameter).
    optimizer_traffic: bytes per parameter through memory in an update: read gradient, unscale and norm (10), read and write master and two
    moments (24), write the 16-bit parameter (2), clear the gradient (2).

    elementwise_again: nothing is kept that element-wise ops make again. working: what a program needs beside what is kept; None: the formulas of
    Megatron-LM and DeepSpeed (one block's recomputed activations, two blocks' gathered parameters).
    """

    name: str = "aicc"
    overlap_tensor: bool = True
    overlap_gradients: bool = True
    overlap_parameters: bool = True
    overlap_p2p: bool = True
    overlap_ring: bool = True
    fused_accumulation: bool = True
    gradient_bytes: int = 4
    gather_rails: int = 0
    overlap_loss: float = 0.15
    optimizer_bytes: int = 12
    optimizer_traffic: int = 38
    elementwise_again: bool = False
    working: Working | None = None


SOFTWARE: dict[str, Software] = {s.name: s for s in (
    Software(),
    # `ShardingPlan.compile` with torch's AdamW: gradients and both moments have the parameters' type, an update reads four tensors and writes three.
    Software("aicc-bf16", gradient_bytes=2, optimizer_bytes=4, optimizer_traffic=14, elementwise_again=True,
             working=Working(loss=2, streams=3, tensor=(5, 3.5), sequence=(9, 11), pipeline=8, in_flight=0.0)),
    Software("aicc-fp32", gradient_bytes=4, optimizer_bytes=8, optimizer_traffic=28, elementwise_again=True,
             working=Working(loss=12, streams=0, tensor=(7.5, 0), sequence=(15, 0), pipeline=0, in_flight=0.9)),
    # Megatron-LM as of SC'21: everything in sequence, fp16 gradients added by a separate kernel.
    Software("megatron-2021", overlap_tensor=False, overlap_gradients=False, overlap_parameters=False, overlap_p2p=False,
             fused_accumulation=False, gradient_bytes=2),
    # The same with torch's DDP around the model, which reduces gradients beside backward.
    Software("megatron-2021-ddp", overlap_tensor=False, overlap_parameters=False, overlap_p2p=False, fused_accumulation=False,
             gradient_bytes=2),
    # Megatron-LM as of Korthikanti et al. 2022: tensor-parallel collectives beside weight gradients, fused accumulation.
    Software("megatron-2022", overlap_gradients=False, overlap_parameters=False, overlap_p2p=False),
    # DeepSpeed ZeRO-3 as of SC'21: gradients scattered beside backward, parameters fetched when needed, over one port a
    # node.
    Software("deepspeed-2021", overlap_tensor=False, overlap_parameters=False, overlap_p2p=False, fused_accumulation=False,
             gradient_bytes=2, gather_rails=1),
)}


@hash_once
@dataclass(frozen=True)
class Placement:
    """Axes of a plan laid on a cluster: the group of each axis, and the device that a stage runs on."""

    device: Device
    shard: Shard
    tensor: Group
    context: Group
    expert: Group
    data: Group
    expert_data: Group
    pipeline: Group
    software: Software

    @staticmethod
    def of(plan: Plan, cluster: Cluster, software: Software, device: Device | None = None) -> Placement:
        stage = plan.tp * plan.cp * plan.dp
        device = device or cluster.device
        if device.overlap_loss > software.overlap_loss:
            software = replace(software, overlap_loss=device.overlap_loss)
        return Placement(
            device=device, shard=plan.shard, tensor=axis_group(cluster, 1, plan.tp),
            context=axis_group(cluster, plan.tp, plan.cp), expert=axis_group(cluster, 1, plan.ep),
            data=axis_group(cluster, plan.tp, plan.cp * plan.dp), expert_data=axis_group(cluster, plan.ep, stage // plan.ep),
            pipeline=axis_group(cluster, stage, plan.pp), software=software)


@dataclass(frozen=True)
class BlockCost:
    """Seconds per micro-batch and bytes of one block on one device.

    forward, backward_input (recomputation included) and backward_weight contain exposed communication; the *_comm fields
    say how much, and alltoall_* how much of that an overlapped (DualPipe) schedule can hide. saved: activation bytes kept
    per micro-batch. working: activation bytes alive while the block runs backward. flops and hfu_flops: as utilisation counts
    them (a masked score matrix whole), without and with recomputation.
    """

    forward: float
    backward_input: float
    backward_weight: float
    forward_comm: float
    backward_comm: float
    alltoall_forward: float
    alltoall_backward: float
    recompute: float
    saved: float
    working: float
    flops: float
    hfu_flops: float

    @property
    def total(self) -> float:
        return self.forward + self.backward_input + self.backward_weight

    def hideable(self, software: Software) -> tuple[float, float]:
        """All-to-all seconds of forward and of backward that disappear when a forward and a backward overlap (DualPipe): no
        more than the other one's compute, less what compute loses."""
        compute_forward = self.forward - self.forward_comm
        compute_backward = self.backward_input + self.backward_weight - self.backward_comm
        keep = 1 - software.overlap_loss
        return (keep * min(self.alltoall_forward, compute_backward), keep * min(self.alltoall_backward, compute_forward))

    @staticmethod
    def sum(runs: Iterable[tuple[int, BlockCost]]) -> BlockCost:
        """Costs of blocks in a row: everything adds up but the working set, which is the largest one's."""
        rows = [(n, _values(cost)) for n, cost in runs]
        added = [sum(n * row[i] for n, row in rows) for i in range(len(_FIELDS))]
        added[_WORKING] = max((row[_WORKING] for _, row in rows), default=0.0)
        return BlockCost(*added)


_FIELDS = tuple(f.name for f in fields(BlockCost))
_WORKING = _FIELDS.index("working")
_values = attrgetter(*_FIELDS)


def _forward(kernel: Kernel, device: Device, dtype: str) -> float:
    seconds = memory_time(device, kernel.forward)
    if kernel.fused:
        return seconds + attention_time(device, dtype, kernel.flops)
    return seconds + (gemm_time(device, dtype, *kernel.gemm, unit=ELEMENT[dtype]) if kernel.gemm else 0.0)


def _backward_input(kernel: Kernel, device: Device, dtype: str) -> float:
    seconds = memory_time(device, kernel.backward)
    if kernel.fused:
        return seconds + attention_time(device, dtype, kernel.flops, backward=True)
    if kernel.gemm:
        batch, m, n, k = kernel.gemm
        seconds += gemm_time(device, dtype, batch, m, k, n, unit=ELEMENT[dtype])
        if not kernel.weight:  # both operands are activations
            seconds += gemm_time(device, dtype, batch, k, n, m, unit=ELEMENT[dtype])
    return seconds


def _backward_weight(kernel: Kernel, device: Device, software: Software, dtype: str) -> float:
    if not kernel.gemm or not kernel.weight:
        return 0.0
    batch, m, n, k = kernel.gemm
    unit = ELEMENT[dtype]
    if software.fused_accumulation:
        return gemm_time(device, dtype, batch, k, n, m, 2 * software.gradient_bytes - unit, unit)
    # A separate kernel reads the new gradient and the buffer, and writes the buffer.
    add = (unit + 2 * software.gradient_bytes) * batch * k * n
    return gemm_time(device, dtype, batch, k, n, m, unit=unit) + memory_time(device, add)


@dataclass(frozen=True)
class _Pools:
    """Compute seconds that communication may hide behind, by `Comm.hide`."""

    weight: float
    dgrad: float
    attention: float
    experts: float = 0.0


_COMPUTE = ("qkv", "latent", "query", "kv", "mlp_up", "shared_up", "logits")  # first GEMMs of a tensor-parallel pair


def _communication(work: BlockWork, placement: Placement, phase: str, pools: _Pools) -> tuple[float, float, float]:
    """(exposed seconds, all-to-all seconds within them, compute seconds lost to what is hidden) of one pass."""
    software = placement.software
    groups = {"tp": placement.tensor, "cp": placement.context, "ep": placement.expert}
    wanted: dict[str, float] = {}
    for comm in work.comms:
        if comm.phase == phase:
            overlaps = {"weight": software.overlap_tensor, "dgrad": software.overlap_tensor,
                        "attention": software.overlap_ring}.get(comm.hide, False)
            key = comm.hide if overlaps or comm.hide == "experts" else "none"
            wanted[key] = wanted.get(key, 0.0) + collective_time(comm.kind, comm.nbytes, groups[comm.axis])
    alltoall = wanted.pop("experts", 0.0)
    exposed, lost = wanted.pop("none", 0.0) + alltoall, 0.0
    for target, seconds in wanted.items():
        hidden = min(seconds, getattr(pools, target))
        exposed += seconds - hidden
        lost += hidden * software.overlap_loss
    return exposed, alltoall, lost


@dataclass(frozen=True)
class _KernelSeconds:
    """Per kernel of a block: forward, input-gradient and weight-gradient seconds."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    weight: tuple[float, ...]


@lru_cache(maxsize=1 << 14)
def _kernel_seconds(config: ModelConfig, kind: str, micro_batch: int, shard: Shard, device: Device,
                    software: Software) -> _KernelSeconds:
    dtype, kernels = config.dtype, block_work(config, kind, micro_batch, shard).kernels
    return _KernelSeconds(tuple(_forward(k, device, dtype) for k in kernels),
                          tuple(_backward_input(k, device, dtype) for k in kernels),
                          tuple(_backward_weight(k, device, software, dtype) for k in kernels))


def kernel_seconds(config: ModelConfig, kind: str, micro_batch: int, shard: Shard, device: Device, software: Software,
                   kernel: str) -> tuple[float, float, float]:
    """(forward, input-gradient, weight-gradient) seconds of one kernel of a block, by its name. Raises ValueError if there is none."""
    times = _kernel_seconds(config, kind, micro_batch, shard, device, software)
    index = [k.name for k in block_work(config, kind, micro_batch, shard).kernels].index(kernel)
    return times.forward[index], times.backward[index], times.weight[index]


def block_cost(config: ModelConfig, kind: str, micro_batch: int, recompute: str, placement: Placement,
               gather: bool = False) -> BlockCost:
    """The cost of one block. `gather`: parameters are sharded over the data group (ZeRO-3) and gathered for forward and
    backward, gradients scattered after it.
    """
    work = block_work(config, kind, micro_batch, placement.shard)
    times = _kernel_seconds(config, kind, micro_batch, placement.shard, placement.device, placement.software)
    first = sum(w for k, w in zip(work.kernels, times.weight, strict=True) if k.name.startswith(_COMPUTE))
    core = [i for i, k in enumerate(work.kernels) if k.fused or (k.core and k.gemm)]
    ahead, back = sum(times.forward), sum(times.backward)
    sent, alltoall, lost = _communication(work, placement, "forward", _Pools(0.0, 0.0, sum(times.forward[i] for i in core)))
    sent_back, alltoall_back, lost_back = _communication(
        work, placement, "backward", _Pools(first, back / 2, sum(times.backward[i] for i in core)))
    forward = ahead + sent + lost
    again = resent = flops_again = alltoall_again = 0.0
    if recompute == "full" and kind not in ("embedding", "head"):
        again, resent, flops_again, alltoall_again = forward, sent, work.counted_flops, alltoall
    elif recompute == "selective":
        again = sum(f for k, f in zip(work.kernels, times.forward, strict=True) if k.core)
        flops_again = sum(k.flops / k.scale for k in work.kernels if k.core)
    backward_input, backward_weight = back + sent_back + lost_back + again, sum(times.weight)
    sent_back += resent
    kept, most = (work.saved_bytes(r, placement.software.elementwise_again) for r in (recompute, "none"))
    flops = 3 * work.counted_flops
    cost = BlockCost(forward, backward_input, backward_weight, sent, sent_back, alltoall, alltoall_back + alltoall_again,
                     again - resent, kept, max(0.0, most - kept), flops, flops + flops_again)
    return with_gather(cost, config, kind, placement) if gather else cost


def with_gather(cost: BlockCost, config: ModelConfig, kind: str, placement: Placement) -> BlockCost:
    """The cost of a block whose parameters are sharded over the data group (ZeRO-3)."""
    ahead, back = _gather_exposed(config, kind, placement, cost.forward, cost.backward_input + cost.backward_weight)
    return replace(cost, forward=cost.forward + ahead, backward_input=cost.backward_input + back,
                   forward_comm=cost.forward_comm + ahead, backward_comm=cost.backward_comm + back)


def _gather_exposed(config: ModelConfig, kind: str, placement: Placement, forward: float,
                    backward: float) -> tuple[float, float]:
    """Exposed seconds of ZeRO-3 collectives: one gather forward; one gather and one reduce-scatter backward."""
    software = placement.software
    unit = ELEMENT[config.dtype]
    dense, expert = block_params(config, kind).local(placement.shard)
    gather = scatter = 0.0
    for count, group in ((dense, placement.data), (expert, placement.expert_data)):
        if count and group.size > 1:
            slow = _rail_limit(group, software.gather_rails)
            gather += collective_time("all_gather", unit * count, slow)
            scatter += collective_time("reduce_scatter", software.gradient_bytes * count, slow)
    keep = 1 - software.overlap_loss
    ahead = gather - keep * min(gather, forward) if software.overlap_parameters else gather
    # Backward hides its own gather first, then the scatter in what compute is left.
    gathered = min(gather, backward) if software.overlap_parameters else 0.0
    scattered = min(scatter, backward - gathered) if software.overlap_gradients else 0.0
    return ahead, gather + scatter - keep * (gathered + scattered)


@lru_cache(maxsize=1024)
def _rail_limit(group: Group, rails: int) -> Group:
    """The group with its network stages cut to `rails` ports per node, when the software cannot use all of them."""
    if not rails or len(group.stages) < 2:
        return group
    inner = group.stages[0].extent
    stages = [group.stages[0]]
    for stage in group.stages[1:]:
        stages.append(type(stage)(stage.extent, stage.alpha, stage.rate * min(1.0, rails / inner), stage.topology))
    return Group(tuple(stages))
