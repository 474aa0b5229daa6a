"""Programs for fixed inputs, called without Dynamo.

    program = aicc.compile(model, x)         # inference, for inputs of the shapes, strides, types and devices of these
    y = program(x)

torch captures the model once (`fullgraph`) by its own ahead-of-time compilation; a call then runs the code that Dynamo made, without its guards
and without entering Dynamo. What the guards would notice is noticed here for the inputs alone: each is compared with its example, in some tenths
of a microsecond. Parameters and buffers are read from the model in each call, so that changing them in place, or replacing them by others of
the same shape, stride and type, works as ever (packed copies are guarded by aicc itself); a model whose layers, flags (`training`) or shapes
change must be compiled again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config
from torch.utils import _pytree as pytree

from .dynamo import aicc
from .errors import UserError

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

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    @classmethod
    def serialize_compile_artifacts(cls, fn: Any) -> bytes:
        raise UserError("a program cannot be saved; compiling it again is quick, for the compiled code is in aicc's cache")

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> Any:
        raise UserError("a program cannot be loaded")


class Program:
    """A model compiled for inputs like its examples. Results carry no gradient."""

    def __init__(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]):
        self._function = function
        self._count, self._names = len(args), frozenset(kwargs)
        self._flat = not kwargs and all(isinstance(a, torch.Tensor) for a in args)
        leaves, self._structure = pytree.tree_flatten((tuple(args), dict(kwargs)))
        self._examples = [_kind_of(x) for x in leaves]
        self._quick = [e for e in self._examples if self._flat]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result. ValueError for inputs that are unlike the examples."""
        if self._flat and len(args) == self._count and not kwargs:
            for x, (shape, stride, dtype, device) in zip(args, self._quick, strict=True):
                if type(x) is not torch.Tensor or x.shape != shape or x.dtype is not dtype or x.stride() != stride or x.device != device:
                    self._refuse(args, kwargs)
        elif not self._fits(args, kwargs):
            self._refuse(args, kwargs)
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._function(*args, **kwargs)
        return self._function(*args, **kwargs)

    def _fits(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        leaves, structure = pytree.tree_flatten((tuple(args), dict(kwargs)))
        return structure == self._structure and all(_kind_of(x) == e for x, e in zip(leaves, self._examples, strict=True))

    def _refuse(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        leaves, structure = pytree.tree_flatten((tuple(args), dict(kwargs)))
        if structure != self._structure:
            raise ValueError(f"the program was compiled for inputs {self._structure}, not {structure}; compile it for these with aicc.compile")
        for i, (x, e) in enumerate(zip(leaves, self._examples, strict=True)):
            if _kind_of(x) != e:
                raise ValueError(f"input {i} is {_text(_kind_of(x))}, but the program was compiled for {_text(e)}; compile it for these inputs with "
                                 "aicc.compile, or use torch.compile, which does so by itself")


def _kind_of(x: Any) -> Any:
    """What of an input is fixed: a tensor's shape, strides, type and device; anything else itself."""
    return (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, torch.Tensor) else x


def _text(kind: Any) -> str:
    if isinstance(kind, tuple) and len(kind) == 4 and isinstance(kind[2], torch.dtype):
        shape, stride, dtype, device = kind
        return f"{str(dtype).removeprefix('torch.')} {list(shape)} with strides {list(stride)} on {device}"
    return repr(kind)


def compile(model: Callable[..., Any], *args: Any, mode: str | None = None, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Program:
    """The program that calls `model`, a function or module, on inputs like `args` and `kwargs`; see the module's docstring.

    `mode` and `options` are those of `torch.compile(model, backend="aicc")`; `guard_filter_fn` has no meaning here. UserError where this torch has no
    ahead-of-time compilation; torch's `Unsupported` where Dynamo cannot capture the model whole.
    """
    def compile_graph(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        with functorch_config.patch({name: False for name in _BUNDLES if hasattr(functorch_config, name)}):
            return _Compiled(aicc(gm, inputs, mode=mode, options=options))

    function = model
    if not isinstance(model, FunctionType):  # a module, with its hooks; a method
        def function(*args: Any, **kwargs: Any) -> Any:
            return model(*args, **kwargs)
    with dynamo_config.patch({name: True for name in _ENABLED if hasattr(dynamo_config, name)}):
        compiled = torch.compile(function, backend=compile_graph, fullgraph=True, dynamic=False)
        if not hasattr(compiled, "aot_compile"):
            raise UserError(f"torch {torch.__version__} has no ahead-of-time compilation (torch.compile(...).aot_compile); use torch.compile")
        with torch.no_grad():
            made = compiled.aot_compile((tuple(args), dict(kwargs)))
    return Program(made.fn, args, kwargs)
