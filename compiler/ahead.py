"""Programs for fixed inputs, called without Dynamo.

    program = aicc.compile(model, x)         # inference, for inputs of the shapes, strides, types and devices of these
    y = program(x)

torch captures the model once (`fullgraph`) by its own ahead-of-time compilation; a call then runs the code that Dynamo made, without its guards
and without entering Dynamo. What the guards would notice is compared here (`ahead_checks.py`), in some microseconds: the inputs with their examples,
the model's layers, flags, classes and hooks, autocast and modes. Parameters
and buffers are read from the model in each call, so that changing them in place, or
replacing them by others of the same shape, stride and type, works as ever (packed copies are guarded by aicc itself).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo import disable as dynamo_disable
from torch._functorch import config as functorch_config
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from .ahead_checks import Inputs, Operands, Surroundings, unshared
from .dynamo import aicc, written_arguments
from .errors import UserError
from .forward_mode import any_tangent
from .model_state import Modules

try:
    from torch._dynamo.aot_compile_types import SerializableCallable
except ImportError:  # before torch 2.10
    from torch._dynamo.aot_compile import SerializableCallable  # type: ignore[assignment, no-redef]

__all__ = ["Program", "compile"]

_BUNDLES = ("bundled_autograd_cache", "force_autograd_cache", "strict_autograd_cache")
"""Settings of torch's ahead-of-time compilation under which it takes Inductor's artifacts alone."""
_ENABLED = ("enable_aot_compile",)
"""Off by default before torch 2.12."""


class _Compiled(SerializableCallable):
    """A backend's function as torch's ahead-of-time compilation wants it."""

    def __init__(self, function: Callable[..., Any], operands: Operands):
        self.function = function
        self.check = operands.check

    def __call__(self, *args: Any) -> Any:
        self.check(args)
        if forward_ad._current_level >= 0 and any_tangent(args):
            raise ValueError("a dual tensor (torch.autograd.forward_ad) was given to a program, which knows no forward-mode derivatives; call the "
                             "model itself or use torch.compile")
        return self.function(*args)

    @classmethod
    def serialize_compile_artifacts(cls, fn: Any) -> bytes:
        raise UserError("a program cannot be saved; compiling it again is quick, for the compiled code is in aicc's cache")

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> Any:
        raise UserError("a program cannot be loaded")


class Program:
    """A model compiled for inputs like its examples. Results carry no gradient."""

    def __init__(self, function: Callable[..., Any], inputs: Inputs, modules: Modules, surroundings: Surroundings):
        self._function = function
        self._inputs, self._modules, self._surroundings = inputs, modules, surroundings

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result. ValueError where something is not as it was when the program was compiled."""
        if torch.compiler.is_compiling():  # in a function that Dynamo traces a program is one call, not its inside
            return dynamo_disable(self._run, reason="a program is compiled already")(*args, **kwargs)
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        self._inputs.check(args, kwargs)
        self._modules.check()
        self._surroundings.check()
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._function(*args, **kwargs)
        return self._function(*args, **kwargs)


def compile(model: Callable[..., Any], *args: Any, mode: str | None = None, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Program:
    """The program that calls `model`, a function or module, on inputs like `args` and `kwargs`; see the module's docstring.

    `mode` and `options` are those of `torch.compile(model, backend="aicc")`; `guard_filter_fn` has no meaning here. UserError where this
    torch has no ahead-of-time compilation, and for inputs other than dense tensors, numbers and text; torch's `Unsupported` where Dynamo cannot
    capture the model whole.
    """
    inputs, modules = Inputs(args, kwargs), Modules(model)
    examples = unshared(args, kwargs, modules.tensors())
    leaves = pytree.tree_leaves(examples)

    def compile_graph(gm: torch.fx.GraphModule, operands: Sequence[Any]) -> Callable[..., Any]:
        with functorch_config.patch({name: False for name in _BUNDLES if hasattr(functorch_config, name)}):
            made = aicc(gm, operands, mode=mode, options=options)
        return _Compiled(made, Operands(operands, leaves, written_arguments()))

    function = model
    if not isinstance(model, FunctionType):  # a module, with its hooks; a method
        def function(*args: Any, **kwargs: Any) -> Any:
            return model(*args, **kwargs)
    with dynamo_config.patch({name: True for name in _ENABLED if hasattr(dynamo_config, name)}):
        # No guards: `ahead_checks.py` notices what they would, and torch would have to save them, which it cannot for classes made in functions.
        compiled = torch.compile(function, backend=compile_graph, fullgraph=True, dynamic=False,
                                 options={"guard_filter_fn": lambda guards: [False] * len(guards)})
        if not hasattr(compiled, "aot_compile"):
            raise UserError(f"torch {torch.__version__} has no ahead-of-time compilation (torch.compile(...).aot_compile); use torch.compile")
        with torch.no_grad():
            made = compiled.aot_compile(examples)
    devices = [x.device.type for x in (*leaves, *modules.tensors()) if isinstance(x, torch.Tensor)]
    return Program(made.fn, inputs, modules, Surroundings(devices or ["cpu"]))
