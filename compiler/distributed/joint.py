"""Training graphs: a model's forward and backward pass in one graph-level module.

    exported = export_model(model, args, kwargs, loss)      # the forward pass; no weight is allocated, the model may be on meta
    joint = make_joint(exported)                            # forward and backward, for the SPMD partitioner

torch.export runs the model on fake tensors; AOTAutograd differentiates what it gives. Shapes are constants: those of the example
inputs. Ops keep the line of Python and the module they come from, backward ops those of their forward op.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from ... import passes  # noqa: F401  (registers the passes of `_CLEAN`)
from ...frontend.decompositions import decomposition_table
from ...frontend.importer import import_graph
from ...frontend.whole_attention import ATTENTION, whole_attention
from ...ir.core import Operation
from ...ir.passes import PassContext, parse_pipeline, run_pipeline
from ..errors import UserError
from .experts import dispatch_experts
from .masks import simplify_masks

__all__ = ["Argument", "Exported", "Joint", "export_model", "flatten_inputs", "make_joint", "model_tensors"]

_CLEAN = "canonicalize,cse,fold-constants,dce"


@dataclass(frozen=True)
class Argument:
    """One argument of a captured graph. kind: 'param', 'buffer', 'constant' or 'input'; name: as in the model's state."""

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool = False


@dataclass
class Exported:
    """A forward graph with parameters as arguments, and the constants that it needs."""

    graph: torch.fx.GraphModule
    arguments: list[Argument]
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: int = 1


@dataclass
class Joint:
    """`module` takes the arguments, then one tangent per differentiable output; it returns the outputs, then one gradient per entry of
    `gradients` (an index into `arguments`).
    """

    module: Operation
    arguments: list[Argument]
    outputs: int
    tangents: list[int]
    gradients: list[int]
    constants: dict[str, torch.Tensor]


class _WithLoss(torch.nn.Module):
    """A model and its loss as one module of flat tensor inputs."""

    def __init__(self, model: torch.nn.Module, spec: Any, leaves: Sequence[Any], positions: Sequence[int],
                 loss: Callable[..., torch.Tensor] | None, targets: int):
        super().__init__()
        self.model, self.spec, self.leaves, self.positions, self.loss, self.targets = model, spec, leaves, positions, loss, targets

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = list(self.leaves)
        given, targets = tensors[:len(tensors) - self.targets], tensors[len(tensors) - self.targets:]
        for position, tensor in zip(self.positions, given, strict=True):
            leaves[position] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        out = self.model(*args, **kwargs)
        if self.loss is not None:
            return (self.loss(out, *targets),)
        found = getattr(out, "loss", None)
        if found is None:
            found = out["loss"] if isinstance(out, Mapping) and "loss" in out else out[0] if isinstance(out, (tuple, list)) else out
        if not isinstance(found, torch.Tensor) or found.numel() != 1:
            raise UserError("the model gives no scalar loss: pass loss_fn=, or inputs with which the model computes one (labels=...)")
        return (found.reshape(()) if found.dim() else found,)


def flatten_inputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], Any, list[int]]:
    """The leaves of (args, kwargs), their tree, and which leaves are tensors."""
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    return leaves, spec, [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]


def model_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, each tensor once (tied ones under their first name)."""
    found: dict[int, str] = {}
    result: dict[str, torch.Tensor] = {}
    for name, tensor in chain(model.named_parameters(remove_duplicate=True), model.named_buffers(remove_duplicate=True)):
        if id(tensor) not in found:
            found[id(tensor)] = name
            result[name] = tensor
    return result


def export_model(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, loss: Callable[..., torch.Tensor] | None = None,
                 targets: Sequence[torch.Tensor] = (), device: str = "cpu",
                 expert_parallel: bool = False) -> Exported:
    """The loss of `model(*args, **kwargs)` as a graph of tensors on `device`. UserError if there is no scalar loss or a buffer is changed."""
    leaves, spec, positions = flatten_inputs(args, kwargs)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, Any] = {}
    tensors = model_tensors(model)
    with mode:
        for tensor in tensors.values():
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            memo[id(tensor)] = torch.nn.Parameter(made, requires_grad=tensor.requires_grad) if is_parameter else made
        fake_model = copy.deepcopy(model, memo)
        dispatch_experts(fake_model, expert_parallel)
        given = tuple(torch.empty(x.shape, dtype=x.dtype, device=device) for x in (*(leaves[i] for i in positions), *targets))
        wrapped = _WithLoss(fake_model, spec, leaves, positions, loss, len(targets))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(wrapped, given, strict=False)
    simplify_masks(program.graph_module)
    arguments, constants = _arguments(program, model, tensors)
    changed = [s.target for s in program.graph_signature.output_specs if s.kind.name in ("BUFFER_MUTATION", "USER_INPUT_MUTATION")]
    if changed:
        raise UserError(f"the forward pass changes {', '.join(map(str, changed))}: only models without running statistics can be sharded")
    program.graph_module.recompile()
    return Exported(program.graph_module, arguments, constants)


def _named(model: torch.nn.Module, name: str) -> Any:
    found: Any = model
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _arguments(program: Any, model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> tuple[list[Argument], dict[str, torch.Tensor]]:
    """What the placeholders are. Names lose the wrapper's prefix."""
    arguments, constants = [], {}
    nodes = [n for n in program.graph.nodes if n.op == "placeholder"]
    names = {id(t): name for name, t in tensors.items()}
    seen: dict[str, torch.fx.Node] = {}
    for node, spec in zip(nodes, program.graph_signature.input_specs, strict=True):
        val, kind = node.meta["val"], spec.kind.name
        name = str(spec.target or node.name).removeprefix("model.")
        if kind in ("PARAMETER", "BUFFER"):
            name = names[id(_named(model, name))]
            if name in seen:  # tied: one argument
                node.replace_all_uses_with(seen[name])
                program.graph.erase_node(node)
                continue
            seen[name] = node
        if not isinstance(val, torch.Tensor):
            raise UserError(f"input '{node.name}' is no tensor")
        shape = tuple(int(s) for s in val.shape)
        if kind == "PARAMETER":
            arguments.append(Argument("param", name, shape, val.dtype, program.state_dict[spec.target].requires_grad))
        elif kind == "BUFFER":
            arguments.append(Argument("buffer", name, shape, val.dtype))
        elif kind == "CONSTANT_TENSOR":
            constants[name] = program.constants[spec.target]
            arguments.append(Argument("constant", name, shape, val.dtype))
        else:
            arguments.append(Argument("input", node.name, shape, val.dtype))
    return arguments, constants


class _WholeAttention(torch.fx.Interpreter):
    """Runs a graph with attention as one operator (`frontend/whole_attention.py`)."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return whole_attention(*args, **kwargs) if target in ATTENTION else super().call_function(target, args, kwargs)


def make_joint(exported: Exported, *, differentiable_inputs: Sequence[int] = (), device: str = "cpu", whole: bool = False) -> Joint:
    """Differentiates the graph with respect to its trained parameters and the inputs named (indices into the arguments). whole: attention and its
    gradient stay one operator each. UserError if the graph changes an argument.
    """
    trained = {i for i, a in enumerate(exported.arguments) if a.trained} | set(differentiable_inputs)

    def run(*flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with fx_traceback.preserve_node_meta():
            made = (_WholeAttention if whole else torch.fx.Interpreter)(exported.graph).run(*flat)
            return tuple(x.clone() for x in made)  # no output is a view, or an argument

    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        primals = tuple(torch.empty(a.shape, dtype=a.dtype, device=device, requires_grad=i in trained)
                        for i, a in enumerate(exported.arguments))
        try:
            gm: Any = aot_export_joint_simple(run, primals, trace_joint=True, decompositions=decomposition_table())
        except RuntimeError as e:
            if "mutation" not in str(e):
                raise
            raise UserError("the forward pass changes one of its arguments (running statistics, a cache): only models that change nothing can be "
                            "sharded, as what the backward pass reads of arguments must be what the forward pass read") from e
    kinds = [a.kind for a in exported.arguments]
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    tangents = len(placeholders) - len(kinds)
    module = import_graph(gm, arg_kinds=[*kinds, *["input"] * tangents])
    func = next(op for op in module.body if op.name == "func")
    if len(func.body.args) != len(placeholders):
        raise UserError("the captured graph has sizes among its arguments; only constant shapes can be sharded")
    results = func["result_attrs"]
    outputs = len(results) - len(kinds)
    gradients = [i for i, r in enumerate(results[outputs:]) if r["kind"] != "none"]
    if any(r["kind"] not in ("tensor", "none") for r in results):
        raise UserError("the captured graph returns something that is no tensor")
    if any("view" in r for r in results):
        raise UserError("the captured graph returns a view of an argument")
    func.attributes["result_attrs"] = ({"kind": "tensor"},) * (outputs + len(gradients))
    names = [*(a.name for a in exported.arguments), *(f"tangent_{i}" for i in range(tangents))]
    func.attributes["arg_attrs"] = tuple({**attrs, "name": name} for attrs, name in zip(func["arg_attrs"], names, strict=True))
    run_pipeline(module, parse_pipeline(_CLEAN), PassContext())
    float_outputs = [i for i, v in enumerate(func.body.terminator.operands[:outputs]) if v.type.dtype.is_float]  # type: ignore[attr-defined]
    return Joint(module, exported.arguments, outputs, float_outputs[:tangents], gradients, exported.constants)
