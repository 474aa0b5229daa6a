"""`torch.compile(model, backend="aicc", options={"plan": "plan.toml"})`: the model's computation shared by the ranks of a plan.

To the program nothing changes: every rank gives the whole batch and has whole parameters, and every rank gets whole outputs and gradients, the
same as one process would. What the plan cuts is the work in between: batch rows over `dp`, products over `tp` (with sequence parallelism).
Each rank computes on its pieces, and what is missing is gathered or summed. Whole parameters are what torch.compile is handed; a plan that
shards what a rank keeps (ZeRO, experts, a pipeline) needs `aicc.auto_shard`, which makes the parameters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ..errors import UserError
from ..options import Options
from .joint import Argument, Exported, make_joint
from .layouts import check_supported, layout_of, mesh_of, read_plan
from .program import ShardedProgram, build_program
from .ranks import agree, check_world, local_piece

__all__ = ["compile_planned"]


class _Shared(torch.autograd.Function):
    """One call: whole tensors in and out, pieces in between."""

    @staticmethod
    def forward(ctx: Any, shared: _Pieces, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        program, pieces = shared.program, shared.of(given)
        outputs, saved = program.run_forward(pieces)
        ctx.program = program
        ctx.save_for_backward(*(pieces[i] for i in program.cut.saved_arguments), *saved)
        ctx.mark_non_differentiable(*(x for i, x in enumerate(outputs) if i not in program.joint.tangents))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *tangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        program: ShardedProgram = ctx.program
        n = len(program.cut.saved_arguments)
        kept = ctx.saved_tensors
        gradients = program.run_backward(kept[:n], kept[n:], [tangents[i].contiguous() for i in program.joint.tangents])
        found = dict(zip(program.joint.gradients, gradients, strict=True))
        return (None, *(found.get(i) for i in range(len(program.joint.arguments))))


class _Pieces:
    """Cuts the arguments of each call. Pieces of parameters are kept while the parameter's version stands."""

    def __init__(self, program: ShardedProgram, rank: int):
        self.program, self.rank = program, rank
        self._kept: dict[int, tuple[int, int, torch.Tensor]] = {}

    def of(self, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        program = self.program
        found = []
        for i, (x, a, placement) in enumerate(zip(given, program.joint.arguments, program.layout.arguments, strict=True)):
            x = x.detach()
            if not placement:
                found.append(x.contiguous())
                continue
            kept = self._kept.get(i)
            if kept is not None and kept[:2] == (x.data_ptr(), x._version):
                found.append(kept[2])
                continue
            mine = local_piece(x, placement, program.mesh, program.layout.order, self.rank).contiguous()
            if a.kind == "param":
                self._kept[i] = (x.data_ptr(), x._version, mine)
            found.append(mine)
        return found


def compile_planned(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """What Dynamo calls with each captured graph. All ranks must capture the same graphs.

    UserError, the same on every rank, for plans that torch.compile cannot carry out and for worlds that do not fit.
    """
    plan = read_plan(options.plan)
    check_supported(plan)
    for what, wrong in {"a pipeline (pp)": plan.pp > 1, "expert parallelism (ep)": plan.ep > 1, "ZeRO": plan.zero > 0,
                        "offload": plan.offload}.items():
        if wrong:
            raise UserError(f"the plan {plan.label} has {what}, which shards what a rank keeps; torch.compile is handed whole parameters: "
                            "use aicc.auto_shard(model, ..., plan=...)")
    mesh = mesh_of(plan)
    check_world(mesh, plan)
    arguments = [_argument(node, x) for node, x in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True)]
    device = next((x.device.type for x in example_inputs if isinstance(x, torch.Tensor)), "cpu")
    first = next((a for a in arguments if a.kind == "input" and a.shape), None)
    batch = None if first is None else first.shape[0]
    agree("the plan and the graph", f"{plan.label} {hashlib.sha256(gm.code.encode()).hexdigest()}")
    wanted = [i for i, (a, x) in enumerate(zip(arguments, example_inputs, strict=True)) if a.kind == "input" and x.requires_grad]
    outputs = len(next(n for n in gm.graph.nodes if n.op == "output").args[0])
    joint = make_joint(Exported(gm, arguments, {}, outputs), differentiable_inputs=wanted, device=device, whole=plan.rings)
    layout = layout_of(joint, plan, mesh, batch=batch)
    layout = replace(layout, outputs=({},) * joint.outputs, gradients=({},) * len(joint.gradients))
    device_mesh = init_device_mesh(device, mesh.shape, mesh_dim_names=mesh.names)
    groups = {name: device_mesh.get_group(name).group_name for name in mesh.names}
    rank = dist.get_rank()
    program = build_program(joint, layout, mesh, rank, groups, replace(options, plan=""))
    agree("the order of collectives", program.digest)
    pieces = _Pieces(program, rank)
    return lambda *given: _Shared.apply(pieces, *given)


def _argument(node: torch.fx.Node, x: Any) -> Argument:
    if not isinstance(x, torch.Tensor):
        raise UserError(f"'{node.name}' is a {type(x).__name__}: plans need constant shapes; compile with dynamic=False")
    shape = tuple(x.shape)
    if not all(isinstance(s, int) for s in shape):
        raise UserError(f"'{node.name}' has the shape {list(shape)}: plans need constant shapes; compile with dynamic=False")
    static = "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})
    kind = "param" if isinstance(x, torch.nn.Parameter) else "buffer" if static else "input"
    return Argument(kind, node.name, shape, x.dtype, kind == "param" and x.requires_grad)
