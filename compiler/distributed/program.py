"""One rank's compiled program of a partitioned joint module.

    program = build_program(joint, layout, mesh, rank, groups, options)
    outputs, saved = program.run_forward(arguments)
    gradients = program.run_backward(arguments, saved, tangents)

With `halves=True` the backward pass is two programs, for schedules that put the gradients of weights off:

    gradients, later = program.run_backward_inputs(arguments, saved, tangents)       # of the inputs
    gradients = later()                                                              # of the parameters
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ...backends.nccl import collective_order, lower_collectives
from ...ir.core import Operation
from ...ir.passes import PassContext, Remark, parse_pipeline, run_pipeline
from ...ir.printer import print_op
from ...ir.sharding import Mesh, Placement, local_shape
from ...passes.spmd import Partitioned, Policy, Split, partition, split
from ...runtime import collectives as _collectives  # registers aicc_dist.wait
from ...runtime.executor import CompiledGraph
from ..driver import compile_graph
from ..options import Options
from .joint import Joint

__all__ = ["COLLECTIVE_PASSES", "Layout", "ShardedProgram", "build_program", "local_size"]

COLLECTIVE_PASSES = "dist-simplify,dist-bucket,dist-overlap"
"""Run on the forward and on the backward function. Buckets form before overlap: a bucket starts when its last member is ready."""
assert _collectives is not None


@dataclass(frozen=True)
class Layout:
    """Placements of a joint module. arguments: per argument, axis -> placement; gradients: per gradient; outputs: per output (None:
    as it comes); policies: the axes in the order in which they cut; recompute: which forward values the backward pass makes again.
    """

    policies: tuple[Policy, ...]
    arguments: tuple[Mapping[str, Placement], ...]
    gradients: tuple[Mapping[str, Placement], ...]
    outputs: tuple[Mapping[str, Placement] | None, ...]
    recompute: str = "none"

    @property
    def order(self) -> tuple[str, ...]:
        return tuple(p.axis for p in self.policies)


def local_size(shape: Sequence[int], placement: Mapping[str, Placement], mesh: Mesh, order: Sequence[str]) -> tuple[int, ...]:
    """The shape of one rank's piece."""
    for axis in order:
        if axis in placement:
            shape = local_shape(shape, placement[axis], mesh.size(axis))
    return tuple(shape)


@dataclass
class ShardedProgram:
    """`partitioned` is the module with dist ops before they are lowered; `order` its collectives, forward then backward. `halves`: the backward
    function cut once more, with the gradients of inputs first.
    """

    joint: Joint
    layout: Layout
    mesh: Mesh
    partitioned: Partitioned
    cut: Split
    order: list[str]
    remarks: list[Remark] = field(default_factory=list)
    forward: CompiledGraph | None = None
    backward: CompiledGraph | None = None
    halves: Split | None = None
    backward_inputs: CompiledGraph | None = None
    backward_weights: CompiledGraph | None = None

    @property
    def parts(self) -> tuple[Operation, ...]:
        """The modules that run, with their dist ops."""
        return (self.cut.forward, *((self.cut.backward,) if self.halves is None else (self.halves.forward, self.halves.backward)))

    def which(self, kind: str) -> list[int]:
        """The positions among `joint.gradients` of those of inputs (kind 'input') or of parameters ('param')."""
        return [k for k, i in enumerate(self.joint.gradients) if (self.joint.arguments[i].kind == "input") == (kind == "input")]

    @property
    def digest(self) -> str:
        """The same on every rank, or the ranks would not run the same collectives."""
        return hashlib.sha256("\n".join(self.order).encode()).hexdigest()

    def run_forward(self, arguments: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(outputs, saved values) for this rank's pieces of all arguments."""
        assert self.forward is not None
        made = self.forward([x.detach() for x in arguments])
        return made[:self.joint.outputs], made[self.joint.outputs:]

    def run_backward(self, arguments: Sequence[torch.Tensor], saved: Sequence[torch.Tensor],
                     tangents: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """One gradient per entry of `joint.gradients`. `arguments`: those that `cut.saved_arguments` names."""
        assert self.backward is not None
        return self.backward([*(x.detach() for x in arguments), *saved, *tangents])

    def run_backward_inputs(self, arguments: Sequence[torch.Tensor], saved: Sequence[torch.Tensor],
                            tangents: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], Callable[[], list[torch.Tensor]]]:
        """The gradients of the inputs (in the order of `which("input")`), and what gives those of the parameters later."""
        assert self.halves is not None and self.backward_inputs is not None and self.backward_weights is not None
        given = [*(x.detach() for x in arguments), *saved, *tangents]
        made = self.backward_inputs(list(given))
        count, weights = len(self.which("input")), self.backward_weights
        kept = [*(given[i] for i in self.halves.saved_arguments), *made[count:]]
        return made[:count], lambda: weights(kept)


def partition_joint(joint: Joint, layout: Layout, mesh: Mesh) -> Partitioned:
    """The per-rank joint module, with dist ops."""
    tangents: list[Mapping[str, Placement]] = [{} if layout.outputs[i] is None else layout.outputs[i] or {} for i in joint.tangents]
    return partition(joint.module, mesh, layout.policies, [*layout.arguments, *tangents], [*layout.outputs, *layout.gradients])


def build_program(joint: Joint, layout: Layout, mesh: Mesh, rank: int, groups: Mapping[str, str], options: Options, *,
                  compiled: bool = True, halves: bool = False) -> ShardedProgram:
    """Partitions, cuts into forward and backward (with `halves`, that into two), and compiles the parts for `rank`. groups: axis -> name of
    its process group.

    IRError where the layout does not fit the module. With `compiled=False` nothing is compiled (for looking at what would run).
    """
    partitioned = partition_joint(joint, layout, mesh)
    cut = split(partitioned.module, joint.outputs, len(joint.tangents), recompute=layout.recompute)
    program = ShardedProgram(joint, layout, mesh, partitioned, cut, [])
    if halves:
        program.halves = _halves(program)
    names = ("forward", "backward") if program.halves is None else ("forward", "backward-inputs", "backward-weights")
    ctx = PassContext()
    for module, name in zip(program.parts, names, strict=True):
        run_pipeline(module, parse_pipeline(COLLECTIVE_PASSES), ctx)
        program.order += [f"{name} {line}" for line in collective_order(module)]
    program.remarks = ctx.remarks
    if compiled:
        program.forward, *rest = compile_rank(list(zip(program.parts, names, strict=True)), mesh, rank, groups, options)
        if program.halves is None:
            (program.backward,) = rest
        else:
            program.backward_inputs, program.backward_weights = rest
    return program


def _halves(program: ShardedProgram) -> Split:
    """The backward function, its results reordered: gradients of inputs first."""
    inputs, weights = program.which("input"), program.which("param")
    module = program.cut.backward.clone()
    terminator = next(op for op in module.body if op.name == "func").body.terminator
    terminator.set_operands([terminator.operands[k] for k in (*inputs, *weights)])
    return split(module, len(inputs), 0)


def compile_rank(modules: Sequence[tuple[Operation, str]], mesh: Mesh, rank: int, groups: Mapping[str, str],
                 options: Options) -> list[CompiledGraph]:
    """Lowers copies of the modules to this rank's programs and compiles them.

    Ranks of one host share the work: of equal programs each is compiled by one of the ranks that need it, and found in the artifact cache
    by the others. Every rank must call this the same number of times.
    """
    lowered = []
    for module, name in modules:
        mine = module.clone()
        lower_collectives(mine, mesh, rank, groups)
        lowered.append((mine, name))
    first = _mine([m for m, _ in lowered]) if options.cache and dist.is_initialized() and dist.get_world_size() > 1 else None
    made: dict[int, CompiledGraph] = {}
    for turn in (True, False):
        for i, (module, name) in enumerate(lowered):
            if i not in made and (first is None or not turn or i in first):
                graph = compile_graph(module, options, name=name).graph
                assert graph is not None
                made[i] = graph
        if first is not None and turn:
            dist.barrier()
    return [made[i] for i in range(len(lowered))]


def _mine(modules: Sequence[Operation]) -> set[int]:
    """Which of the modules this rank compiles for those that need the same ones."""
    digests = [hashlib.sha256(print_op(m).encode()).hexdigest() for m in modules]
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, (socket.gethostname(), digests))
    me = dist.get_rank()
    chosen = set()
    for i, digest in enumerate(digests):
        ranks = [r for r, (where, theirs) in enumerate(said) if where == said[me][0] and digest in theirs]
        if ranks[i % len(ranks)] == me:
            chosen.add(i)
    return chosen
