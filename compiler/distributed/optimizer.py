"""The optimizer step of a plan: compiled, with its collectives, on sharded parameters, gradients and state.

An update rule is a function of one parameter written in PyTorch. It is traced once per different (shape, placements), partitioned with
the placements that the ZeRO stage gives parameter, gradient and state, and compiled. ZeRO 1 and 2 update the piece of the parameter that
the rank's state covers and gather the rest; with ZeRO 3 nothing is communicated. State tensors are DTensors. Under a plan with `offload`
they lie in pinned host memory and visit the device one parameter at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.fx.experimental.proxy_tensor import make_fx

from ...backends.nccl import collective_order
from ...frontend.decompositions import decomposition_table
from ...frontend.importer import import_graph
from ...ir.core import Operation
from ...ir.passes import PassContext, parse_pipeline, run_pipeline
from ...ir.sharding import Mesh, Placement
from ...passes.shard.plan import Plan
from ...passes.spmd import Policy, partition
from ...runtime.executor import CompiledGraph
from ..errors import UserError
from ..options import Options
from .layouts import DATA, TENSOR, state_placement
from .module import ShardedModule, to_placements
from .program import COLLECTIVE_PASSES, compile_rank, local_size

__all__ = ["OptimizerRule", "ShardedOptimizer", "rule_of", "update_module"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class OptimizerRule:
    """An optimizer's name and settings, and its update as a function.

    `update(parameter, gradient, *states, *numbers)` gives (new parameter, *new states); `numbers(step)` the values of its 0-d arguments at
    step 1, 2, ...; `states` the names of its state tensors, which have the parameter's shape and start at zero.
    """

    name: str
    settings: tuple[tuple[str, Any], ...]
    states: tuple[str, ...]
    update: Callable[..., tuple[Tensor, ...]]
    numbers: Callable[[int, float], tuple[float, ...]]

    @property
    def lr(self) -> float:
        return float(dict(self.settings)["lr"])


def _sgd(s: Mapping[str, Any]) -> OptimizerRule:
    momentum, decay, nesterov, dampening = s["momentum"], s["weight_decay"], s["nesterov"], s["dampening"]

    def update(p: Tensor, g: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        if decay:
            g = g + decay * p
        if not momentum:
            return (p - rest[-1] * g,)
        buffer, keep, lr = rest
        new = keep * buffer + (1 - dampening * (keep / momentum)) * g  # the first step takes the gradient as it is
        return (p - lr * (g + momentum * new if nesterov else new), new)

    def numbers(step: int, lr: float) -> tuple[float, ...]:
        return ((0.0 if step == 1 else float(momentum)), lr) if momentum else (lr,)
    return OptimizerRule("SGD", tuple(s.items()), ("momentum_buffer",) if momentum else (), update, numbers)


def _adam(decoupled: bool) -> Callable[[Mapping[str, Any]], OptimizerRule]:
    def make(s: Mapping[str, Any]) -> OptimizerRule:
        (beta1, beta2), eps, decay = s["betas"], s["eps"], s["weight_decay"]

        def update(p: Tensor, g: Tensor, m: Tensor, v: Tensor, shrink: Tensor, size: Tensor, root: Tensor) -> tuple[Tensor, ...]:
            if decoupled:
                p = p * shrink
            elif decay:
                g = g + decay * p
            m = m + (g - m) * (1 - beta1)
            v = v * beta2 + g * g * (1 - beta2)
            return p - size * (m / (v.sqrt() / root + eps)), m, v

        def numbers(step: int, lr: float) -> tuple[float, ...]:
            return 1 - lr * decay, lr / (1 - beta1 ** step), (1 - beta2 ** step) ** 0.5
        return OptimizerRule("AdamW" if decoupled else "Adam", tuple(s.items()), ("exp_avg", "exp_avg_sq"), update, numbers)
    return make


_RULES: dict[type, Callable[[Mapping[str, Any]], OptimizerRule]] = {
    torch.optim.SGD: _sgd, torch.optim.Adam: _adam(False), torch.optim.AdamW: _adam(True)}


def rule_of(optimizer: Any) -> OptimizerRule:
    """The rule of a torch optimizer: an instance, a class, or a function from parameters to an instance. UserError for others."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer([torch.nn.Parameter(torch.zeros(1))])
    make = _RULES.get(type(optimizer))
    defaults = optimizer.defaults
    if make is None or defaults.get("amsgrad") or defaults.get("maximize"):
        raise UserError(f"the optimizer {type(optimizer).__name__} with these settings cannot be sharded; known are "
                        f"{', '.join(c.__name__ for c in _RULES)}, without amsgrad and maximize")
    return make(defaults)


def _number_type(dtype: torch.dtype) -> torch.dtype:
    """Step sizes and the like are not rounded to 16 bits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def update_module(rule: OptimizerRule, shape: Sequence[int], dtype: torch.dtype, device: str) -> tuple[Operation, int]:
    """The update of one parameter as a graph module that assigns to its arguments; and how many 0-d numbers it takes."""
    count = len(rule.numbers(1, rule.lr))
    n = len(rule.states)

    def step(p: Tensor, g: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        made = rule.update(p, g, *rest)
        for target, value in zip((p, *rest[:n]), made, strict=True):
            target.copy_(value)
        return ()

    with FakeTensorMode(allow_non_fake_inputs=True):
        whole = [torch.empty(tuple(shape), dtype=dtype, device=device) for _ in range(2 + n)]
        numbers = [torch.empty((), dtype=_number_type(dtype), device=device) for _ in range(count)]
        gm = make_fx(step, decomposition_table())(*whole, *numbers)
    module = import_graph(gm)
    run_pipeline(module, parse_pipeline("canonicalize,cse,dce"), PassContext())
    return module, count


class ShardedOptimizer:
    """Updates the parameters of a `ShardedModule`. `step()` and `zero_grad()` as in torch; `lr` may be set between steps."""

    def __init__(self, modules: Sequence[ShardedModule], rule: OptimizerRule, plan: Plan, options: Options, groups: Mapping[str, str], rank: int):
        self.rule, self.lr, self.steps = rule, rule.lr, 0
        self.order: list[str] = []
        self._modules: dict[Any, Operation] = {}
        self._offload = plan.offload
        self._rows: list[tuple[torch.nn.Parameter, list[Tensor], Any]] = []
        self._whole: list[tuple[ShardedModule, list[Any]]] = []  # the mesh and the placements of a row's states
        self._names: list[str] = []
        for module in modules:
            self._add(module, plan)
        compiled = compile_rank([(m, "step") for m in self._modules.values()], modules[0].program.mesh, rank, groups, options)
        self._programs: dict[Any, CompiledGraph] = dict(zip(self._modules, compiled, strict=True))
        first = self._rows[0][0] if self._rows else None
        self._device = first.to_local().device if isinstance(first, DTensor) else torch.device("cpu")
        self._dtypes = {p.dtype for p, _, _ in self._rows}

    def _add(self, module: ShardedModule, plan: Plan) -> None:
        program = module.program
        parameters = dict(module.named_parameters())
        for i in program.joint.gradients:
            a = program.joint.arguments[i]
            if a.kind != "param":
                continue
            parameter, placement = parameters[a.name], program.layout.arguments[i]
            gradient = program.layout.gradients[program.joint.gradients.index(i)]
            state = state_placement(a, placement, plan)
            key = (a.shape, a.dtype, *(tuple(sorted((k, str(v)) for k, v in p.items())) for p in (placement, gradient, state)))
            if key not in self._modules:
                self._modules[key] = self._module(a.shape, a.dtype, placement, gradient, state, program.mesh, module.device_mesh.device_type)
            local = local_size(a.shape, state, program.mesh, program.layout.order)
            device = parameter.to_local().device  # type: ignore[attr-defined]
            away = self._offload and device.type == "cuda"
            states = [torch.zeros(local, dtype=a.dtype, device="cpu" if away else device, pin_memory=away) for _ in self.rule.states]
            self._rows.append((parameter, states, key))
            self._whole.append((module, to_placements(state, program.mesh)))
            self._names.append(a.name)

    def _module(self, shape: Sequence[int], dtype: torch.dtype, parameter: Mapping[str, Placement], gradient: Mapping[str, Placement],
                state: Mapping[str, Placement], mesh: Mesh, device: str) -> Operation:
        module, count = update_module(self.rule, shape, dtype, device)
        arguments = [parameter, gradient, *(state for _ in self.rule.states), *({} for _ in range(count))]
        done = partition(module, mesh, (Policy(TENSOR), Policy(DATA)), arguments, [])
        run_pipeline(done.module, parse_pipeline(COLLECTIVE_PASSES), PassContext())
        self.order += [f"step {line}" for line in collective_order(done.module)]
        return done.module

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        self.steps += 1
        values = self.rule.numbers(self.steps, self.lr)
        # Filled there: a copy from the host would wait until the device has done the backward pass.
        numbers = {d: [torch.full((), v, dtype=_number_type(d), device=self._device) for v in values] for d in self._dtypes}
        for parameter, states, key in self._rows:
            grad = parameter.grad
            if grad is None:
                continue
            assert isinstance(parameter, DTensor) and isinstance(grad, DTensor)
            here = [s.to(self._device, non_blocking=True) for s in states] if self._offload else states
            self._programs[key]([parameter.to_local(), grad.to_local().contiguous(), *here, *numbers[parameter.dtype]])
            if self._offload:
                for state, new in zip(states, here, strict=True):
                    state.copy_(new, non_blocking=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter, _, _ in self._rows:
            parameter.grad = None

    def state_bytes(self) -> int:
        """Bytes of this rank's state on its device."""
        here = [] if self._offload and self._device.type == "cuda" else [s for _, states, _ in self._rows for s in states]
        return sum(s.numel() * s.element_size() for s in here)

    def state_dict(self) -> dict[str, Any]:
        """DTensors by '<state>.<parameter>', and the number of steps. States in host memory come as copies: see `take_state`."""
        found: dict[str, Any] = {"steps": torch.tensor(self.steps)}
        if self._offload and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for name, (parameter, states, _), (module, placements) in zip(self._names, self._rows, self._whole, strict=True):
            for kind, state in zip(self.rule.states, states, strict=True):
                found[f"{kind}.{name}"] = DTensor.from_local(state, module.device_mesh, placements, run_check=False, shape=parameter.shape,
                                                             stride=torch.empty(parameter.shape, device="meta").stride())
        return found

    def take_state(self, given: Mapping[str, Any]) -> None:
        """Copies into place what `state_dict` gave, where those were copies."""
        for name, (_, states, _) in zip(self._names, self._rows, strict=True):
            for kind, state in zip(self.rule.states, states, strict=True):
                if given[f"{kind}.{name}"].to_local().data_ptr() != state.data_ptr():
                    state.copy_(given[f"{kind}.{name}"].to_local())

    def updates(self) -> Iterable[Operation]:
        """The update module of each parameter, with its dist ops."""
        return (self._modules[key] for _, _, key in self._rows)

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        return (p for p, _, _ in self._rows)
