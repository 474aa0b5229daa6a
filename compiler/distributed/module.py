"""What runs a plan on torch.distributed: a module whose parameters are sharded DTensors, and its optimizer.

`ShardedModule` is called like the model it was made from and gives the loss (the mean over the whole batch, on every rank);
`loss.backward()` fills the parameters' gradients, which are DTensors too. Forward and backward are one compiled program each, collectives
included (see `program.py`). State dictionaries have the model's names and hold DTensors, so that torch.distributed.checkpoint
saves and loads them. Parameters of a model on meta are allocated at their local size and are undefined until they are loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from ...ir.interpreter.dist import piece
from ...ir.sharding import Mesh, Placement
from ..errors import UserError
from .joint import Argument, flatten_inputs, model_tensors
from .layouts import DATA
from .program import ShardedProgram, local_size
from .ranks import local_piece

__all__ = ["ShardedModule", "gathered", "portable", "shard_model", "take_back", "to_placements"]


def to_placements(placement: Mapping[str, Placement], mesh: Mesh) -> list[Any]:
    """DTensor placements, one per mesh axis."""
    made: list[Any] = []
    for name in mesh.names:
        p = placement.get(name)
        if p is None or p.kind == "replicate":
            made.append(Replicate())
        elif p.parts > 1:
            made.append(_StridedShard(p.dim, split_factor=p.parts))
        else:
            made.append(Shard(p.dim))
    return made


def gathered(x: DTensor, axes: Sequence[int] | None = None) -> torch.Tensor:
    """This rank's piece of `x` once the mesh axes `axes` (default: all, which gives the whole tensor) cut it no more. All ranks must call it.

    torch's `full_tensor` is the same, but refuses tensors that are cut part by part before 2.13.
    """
    local = x.to_local().detach()
    for axis in range(x.device_mesh.ndim) if axes is None else axes:
        placement: Any = x.placements[axis]
        ranks = int(x.device_mesh.size(axis))
        if ranks == 1 or not placement.is_shard() and not isinstance(placement, _StridedShard):
            continue
        pieces = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(ranks)]
        dist.all_gather(pieces, local.contiguous(), group=x.device_mesh.get_group(axis))
        dim, parts = placement.dim, int(placement.split_factor) if isinstance(placement, _StridedShard) else 1
        chunks = [p.chunk(parts, dim) for p in pieces]
        local = torch.cat([chunks[r][k] for k in range(parts) for r in range(ranks)], dim)
    return local


def portable(x: Any) -> Any:
    """A DTensor that torch.distributed.checkpoint can write: one that is cut part by part is gathered along those axes, others are as they are."""
    if not isinstance(x, DTensor) or not any(isinstance(p, _StridedShard) for p in x.placements):
        return x
    strided = [i for i, p in enumerate(x.placements) if isinstance(p, _StridedShard)]
    left = [Replicate() if i in strided else p for i, p in enumerate(x.placements)]
    return DTensor.from_local(gathered(x, strided), x.device_mesh, left, run_check=False, shape=x.shape, stride=x.stride())


def take_back(x: Any, loaded: Any) -> None:
    """Copies what was loaded into `portable(x)` back into `x`."""
    if loaded is x or not isinstance(x, DTensor):
        return
    local = loaded.to_local() if isinstance(loaded, DTensor) else loaded
    for axis, (mine, theirs) in enumerate(zip(x.placements, loaded.placements, strict=True)):
        if isinstance(mine, _StridedShard) and not isinstance(theirs, _StridedShard):
            local = piece(local, x.device_mesh.get_local_rank(axis), int(x.device_mesh.size(axis)), mine.dim, int(mine.split_factor))
    with torch.no_grad():
        x.to_local().copy_(local)


class _Step(torch.autograd.Function):
    """The program as one autograd node."""

    @staticmethod
    def forward(ctx: Any, module: ShardedModule, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        program = module.program
        arguments = [x.to_local() if isinstance(x, DTensor) else x for x in given]
        outputs, saved = program.run_forward(arguments)
        ctx.module, ctx.whole = module, [x if isinstance(x, DTensor) else None for x in given]
        ctx.save_for_backward(*(arguments[i] for i in program.cut.saved_arguments), *saved)
        ctx.mark_non_differentiable(*(x for i, x in enumerate(outputs) if i not in program.joint.tangents))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *tangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        module: ShardedModule = ctx.module
        program = module.program
        kept = ctx.saved_tensors
        n = len(program.cut.saved_arguments)
        given = [tangents[i].contiguous() for i in program.joint.tangents]
        found: dict[int, torch.Tensor] = {}
        if program.halves is None:
            made = program.run_backward(kept[:n], kept[n:], given)
            left: Sequence[torch.Tensor | None] = module.fold(made) if module.folds else made
            for k, (i, gradient) in enumerate(zip(program.joint.gradients, left, strict=True)):
                if gradient is not None:
                    found[i] = gradient if ctx.whole[i] is None else module.gradient(k, ctx.whole[i], gradient)
        else:
            gradients, later = program.run_backward_inputs(kept[:n], kept[n:], given)
            found.update(zip((program.joint.gradients[k] for k in program.which("input")), gradients, strict=True))
            module.deferred.append(later)
        return (None, *(found.get(i) for i in range(len(program.joint.arguments))))


class ShardedModule(torch.nn.Module):
    """See the module docstring. `skeleton` has the structure of the model, with DTensors for parameters; `program` what runs."""

    def __init__(self, skeleton: torch.nn.Module, program: ShardedProgram, device_mesh: DeviceMesh, rank: int | None = None):
        super().__init__()
        self.program, self.device_mesh = program, device_mesh
        self._skeleton = [skeleton]  # not registered: names carry no prefix
        tensors = model_tensors(skeleton)
        self._tensors: list[Any] = [None if a.kind == "input" else tensors.get(a.name, program.joint.constants.get(a.name))
                                    for a in program.joint.arguments]
        self.inputs = [i for i, a in enumerate(program.joint.arguments) if a.kind == "input"]
        self._rank = dist.get_rank() if rank is None else rank
        self.folds = False  # whether backward passes add to the parameters' gradients themselves, past autograd
        self.deferred: list[Callable[[], list[torch.Tensor]]] = []  # backward passes whose second half is still to run
        self._placements = [to_placements(p, program.mesh) for p in program.layout.gradients]
        self._specs: dict[int, Any] = {}

    @property
    def skeleton(self) -> torch.nn.Module:
        return self._skeleton[0]

    # -- the module interface, with the model's own names

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return self.skeleton.named_parameters(*args, **kwargs)

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        return self.skeleton.parameters(recurse)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        return self.skeleton.named_buffers(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.skeleton.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.skeleton.load_state_dict(*args, **kwargs)

    # -- running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The loss. Tensors have the sizes of the global batch (of which this rank takes its part) or of this rank's part."""
        leaves, _, positions = flatten_inputs(args, kwargs)
        return self.run_flat([leaves[i] for i in positions])

    def run_flat(self, tensors: Sequence[torch.Tensor]) -> Any:
        """`forward` of the flat list of tensor inputs."""
        if len(tensors) != len(self.inputs):
            raise UserError(f"{len(tensors)} tensors given; the model was planned with {len(self.inputs)}")
        given: list[Any] = list(self._tensors)
        for i, x in zip(self.inputs, tensors, strict=True):
            given[i] = self._input(i, x)
        outputs = _Step.apply(self, *given)
        return outputs[0] if len(outputs) == 1 else outputs

    def gradient(self, k: int, parameter: DTensor, local: torch.Tensor) -> DTensor:
        """This rank's piece of the k-th gradient of the program as a DTensor."""
        spec = self._specs.get(k)
        if spec is None:  # made once: a DTensor from its parts costs the host a tenth of what from_local does
            made = DTensor.from_local(local, parameter.device_mesh, self._placements[k], run_check=False, shape=parameter.shape,
                                      stride=parameter.stride())
            self._specs[k] = made._spec
            return made
        return DTensor(local, spec, requires_grad=False)  # type: ignore[call-arg]

    def take_deferred(self) -> Callable[[], None]:
        """The second half of the last backward pass: run, it adds to the parameters' gradients."""
        later, program = self.deferred.pop(), self.program

        def run() -> None:
            self._add(dict(zip(program.which("param"), later(), strict=True)))
        return run

    def fold(self, gradients: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """Adds the gradients of parameters to theirs; what is left is for autograd."""
        own = {k: gradients[k] for k in self.program.which("param")}
        self._add(own)
        return [None if k in own else g for k, g in enumerate(gradients)]

    def _add(self, gradients: Mapping[int, torch.Tensor]) -> None:
        """Adds to `.grad`: all in one call, and local tensors, for each DTensor operation costs the host as much as ten of them."""
        sums: list[torch.Tensor] = []
        terms: list[torch.Tensor] = []
        for k, local in gradients.items():
            parameter = self._tensors[self.program.joint.gradients[k]]
            if parameter.grad is None:
                parameter.grad = self.gradient(k, parameter, local)
            else:
                sums.append(parameter.grad.to_local())
                terms.append(local)
        if sums:
            torch._foreach_add_(sums, terms)

    def _input(self, i: int, x: torch.Tensor) -> torch.Tensor:
        argument, placement = self.program.joint.arguments[i], self.program.layout.arguments[i]
        program = self.program
        if isinstance(x, DTensor):
            x = x.to_local()
        rows = {k: p for k, p in placement.items() if k == DATA}
        if tuple(x.shape) == argument.shape:
            x = local_piece(x, placement, program.mesh, program.layout.order, self._rank)
        elif len(rows) < len(placement) and tuple(x.shape) == local_size(argument.shape, rows, program.mesh, program.layout.order):
            rest = {k: p for k, p in placement.items() if k != DATA}  # this data rank's rows
            x = local_piece(x, rest, program.mesh, program.layout.order, self._rank)
        func = next(op for op in program.cut.forward.body if op.name == "func")
        want = tuple(func.body.args[i].type.shape)  # type: ignore[attr-defined]
        if tuple(x.shape) != want or x.dtype != argument.dtype:
            raise UserError(f"input '{argument.name}' is {x.dtype} of shape {list(x.shape)}; the plan takes {argument.dtype} of shape "
                            f"{list(argument.shape)} (all ranks together) or {list(want)} (this rank)")
        return x.to(self.device_mesh.device_type, non_blocking=True).contiguous()


def shard_model(model: torch.nn.Module, arguments: Sequence[Argument], placements: Sequence[Mapping[str, Placement]], mesh: Mesh,
                order: Sequence[str], device_mesh: DeviceMesh, init: Callable[[str, torch.Tensor], None] | None = None, *,
                rank: int | None = None, only: bool = False) -> torch.nn.Module:
    """A copy of the model with DTensors for parameters and plain tensors for buffers, on this rank's device.

    Values are taken from the model; where it is on meta, `init(name, local tensor)` fills them, or they stay undefined. rank: this
    rank's place in `mesh`. With `only`, tensors that are not among the arguments are left out (a pipeline part).
    """
    rank = dist.get_rank() if rank is None else rank
    device = torch.device(device_mesh.device_type, torch.cuda.current_device()) if (
        device_mesh.device_type == "cuda") else torch.device("cpu")
    where = {a.name: p for a, p in zip(arguments, placements, strict=True)}
    memo: dict[int, Any] = {}
    for name, tensor in model_tensors(model).items():
        if only and name not in where:
            memo[id(tensor)] = None
            continue
        placement = where.get(name, {})
        whole = tensor.detach()
        mine = local_piece(whole, placement, mesh, order, rank)
        local = torch.empty(mine.shape, dtype=mine.dtype, device=device)
        if not whole.is_meta:
            local.copy_(mine)
        elif init is not None:
            init(name, local)
        if isinstance(tensor, torch.nn.Parameter):
            made = DTensor.from_local(local, device_mesh, to_placements(placement, mesh), run_check=False, shape=whole.shape,
                                      stride=torch.empty(whole.shape, device="meta").stride())
            memo[id(tensor)] = torch.nn.Parameter(made, requires_grad=tensor.requires_grad)
        else:
            memo[id(tensor)] = local
    return copy.deepcopy(model, memo)
