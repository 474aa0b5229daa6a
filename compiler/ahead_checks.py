"""What a program of `ahead.py` was compiled for, and whether a call still has it.

    Inputs          the structure of the arguments; of each tensor shape, strides, type and device, of anything else type and value
    Surroundings    autocast, the default type, and modes of `__torch_function__` and `__torch_dispatch__`
    Operands        shapes, strides and types of all that the captured graph is given, parameters and buffers among them, and that nothing it
                    writes to overlaps anything else

and `Modules` of `model_state.py`. Each is made once, from the examples, and asked in every call; that together takes some microseconds, most of it
per parameter and layer. What none of them sees: globals, and objects that a function reaches by other ways than as a layer, a closure's variable
or an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .errors import UserError

__all__ = ["PLAIN", "Inputs", "Operands", "Surroundings", "kind_of", "unshared"]

_TENSORS = frozenset({torch.Tensor, nn.Parameter})
PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, Enum, range, slice)
"""What is compared by value. Others may change inside without being another object."""


def _never(*args: Any) -> bool:
    return False


def _quick_check(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    """Whether tensors are like these: torch's own comparison of shapes, strides, types, devices and dispatch keys, a fifth of the time in Python.

    It also refuses tensors that require a gradient where these don't, or with other dispatch keys, so who is refused is looked at again.
    """
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    make = getattr(guards, "TensorGuards", None)
    if make is None:
        return _never
    sizes, strides = [[*t.shape] for t in tensors], [[*t.stride()] for t in tensors]
    check: Callable[..., bool] = make(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    return check


class Inputs:
    """The arguments of the examples. UserError for examples that no call could be compared with."""

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any]):
        self.count = len(args)
        self.names = sorted(kwargs)
        leaves, self.structure = self._flatten(args, kwargs)
        for i, x in enumerate(leaves):
            _check_example(i, x)
        self.examples = [kind_of(x) for x in leaves]
        self._flat = not kwargs and len(leaves) == len(args) and all(isinstance(x, torch.Tensor) for x in leaves)
        self._quick: Callable[..., bool] = _never

    def check(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """ValueError unless the arguments are like the examples."""
        if self._flat and len(args) == self.count and not kwargs and self._quick(*args):
            return
        leaves, structure = self._flatten(args, kwargs)
        if structure != self.structure:
            raise ValueError(f"the program was compiled for inputs {self.structure}, not {structure}; compile it for these with aicc.compile")
        for i, (x, e) in enumerate(zip(leaves, self.examples, strict=True)):
            if torch.is_grad_enabled() and isinstance(x, torch.Tensor) and x.requires_grad:
                raise ValueError(f"input {i} requires a gradient, and a program's results carry none; call it under torch.no_grad(), pass "
                                 "input.detach(), or use torch.compile")
            if (kind := kind_of(x)) != e:
                raise ValueError(f"input {i} is {_text(kind)}, but the program was compiled for {_text(e)}; compile it for these inputs with "
                                 "aicc.compile, or use torch.compile, which does so by itself")
        if self._flat and not any(x.requires_grad for x in leaves):  # one that does is looked at in every call
            self._quick = _quick_check(leaves)

    def _flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], Any]:
        return pytree.tree_flatten((tuple(args), dict(sorted(kwargs.items()))))


def _check_example(i: int, x: Any) -> None:
    if isinstance(x, torch.Tensor):
        if type(x) not in _TENSORS or x.layout is not torch.strided or x.is_neg():
            raise UserError(f"input {i} is {_text(kind_of(x))}; a program takes plain dense tensors (resolve_neg() makes one of a negated view)")
    elif not isinstance(x, PLAIN):
        raise UserError(f"input {i} is a {type(x).__qualname__}, which a program cannot compare with the example in each call; pass tensors, "
                        "numbers and text (in lists, tuples and dicts), and let a function around the model hold the rest")


def kind_of(x: Any) -> Any:
    """What of an input is fixed: a dense tensor's shape, strides, type and device; of anything else type and value."""
    if not isinstance(x, torch.Tensor):
        return type(x), x.hex() if isinstance(x, float) else x  # so that nan is nan, and -0.0 is not 0.0
    if x.layout is not torch.strided:
        return type(x), f"{x.layout} {list(x.shape)}"
    if torch._C._functorch.is_functorch_wrapped_tensor(x) or torch._is_functional_tensor(x):
        return type(x), "inside of a transform of torch.func"
    kind = (x.shape, x.stride(), x.dtype, x.device)
    return kind if type(x) in _TENSORS and not x.is_neg() else (type(x), "negated view" if x.is_neg() else str(list(x.shape)))


def _text(kind: Any) -> str:
    if len(kind) == 4:
        shape, stride, dtype, device = kind
        return f"{str(dtype).removeprefix('torch.')} {list(shape)} with strides {list(stride)} on {device}"
    made, value = kind
    if made is float:
        value = float.fromhex(value)
    return f"{value!r} ({made.__name__})" if not issubclass(made, torch.Tensor) else f"a {made.__name__} ({value})"


def unshared(args: Sequence[Any], kwargs: Mapping[str, Any], others: Iterable[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The examples, with copies of tensors that share memory with earlier ones or `others`: capture would take the two for one in every call."""
    seen = {_storage(t) for t in others}

    def apart(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if (storage := _storage(x)) not in seen:
            seen.add(storage)
            return x
        copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        if all(n > 0 for s, n in zip(x.shape, x.stride(), strict=True) if s > 1):
            copy.copy_(x.detach())
        return copy.requires_grad_(x.requires_grad)

    return pytree.tree_map(apart, (tuple(args), dict(kwargs)))


def _storage(x: torch.Tensor) -> Any:
    return x.untyped_storage()._cdata if x.layout is torch.strided and x.device.type != "meta" else id(x)


_function_modes: Callable[[], int] = torch._C._len_torch_function_stack
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack


def _modes() -> list[Any]:
    return [*map(torch._C._get_function_stack_at, range(_function_modes())), *map(torch._C._get_dispatch_stack_at, range(_dispatch_modes()))]


class Surroundings:
    """What of the process decides results: autocast for the kinds of devices, the default type, and modes that see every operator."""

    def __init__(self, devices: Iterable[str]):
        self._devices = sorted(set(devices))
        self._then = self._now()
        self._modes = _modes()

    def check(self) -> None:
        """ValueError if a call is in other surroundings."""
        if (self._modes or _function_modes() or _dispatch_modes()) and _modes() != self._modes:
            names = [", ".join(type(m).__name__ for m in modes) or "none" for modes in (_modes(), self._modes)]
            raise ValueError(f"a program runs no operators that a mode of __torch_function__ or __torch_dispatch__ could see, and is called with "
                             f"other modes ({names[0]}) than it was compiled with ({names[1]}); call it outside of them, or the model itself inside")
        now = self._now()
        if now != self._then:
            raise ValueError(f"the program was compiled with {self._text(self._then)}, but is called with {self._text(now)}; compile it where it "
                             "is called")

    def _now(self) -> tuple[Any, ...]:
        cast = [torch.get_autocast_dtype(d) if torch.is_autocast_enabled(d) else None for d in self._devices]
        return torch.get_default_dtype(), *cast

    def _text(self, state: tuple[Any, ...]) -> str:
        casts = [f"autocast to {c} on {d}" for d, c in zip(self._devices, state[1:], strict=True) if c is not None]
        return " and ".join([f"default type {state[0]}", *(casts or ["no autocast"])])


class Operands:
    """The captured graph's own arguments. Native code knows their shapes and reads memory by address, so nothing unlike them may reach it.

    `inputs` are the examples, which `Inputs` has compared already; `written` the numbers of the arguments that the graph writes to.
    """

    def __init__(self, examples: Sequence[Any], inputs: Iterable[Any], written: Sequence[int]):
        given = {id(x) for x in inputs}
        self._all = all(isinstance(x, torch.Tensor) for x in examples)
        self._quick: Callable[..., bool] = _never
        self._expected = [(i, x.shape, x.stride(), x.dtype, x.device) for i, x in enumerate(examples)
                          if isinstance(x, torch.Tensor) and id(x) not in given]
        self._written = tuple(written)
        self._extents = [_extent(x) if isinstance(x, torch.Tensor) else 0 for x in examples]
        self._allowed = self._overlaps(examples)

    def check(self, args: Sequence[Any]) -> None:
        """ValueError for a parameter or buffer of another shape, type or device, or memory that is written to and read as something else."""
        if not (self._all and self._quick(*args)):
            self._check_each(args)
        if self._written and not self._overlaps(args) <= self._allowed:
            raise ValueError("the program writes to an input that shares memory with another one, and was compiled for inputs that do not; "
                             "pass copies, or use torch.compile")

    def _check_each(self, args: Sequence[Any]) -> None:
        for i, shape, stride, dtype, device in self._expected:
            x = args[i]
            if type(x) not in _TENSORS or x.shape != shape or x.dtype is not dtype or x.stride() != stride or x.device != device:
                raise ValueError(f"a parameter or buffer is {_text(kind_of(x))}, but the program was compiled for "
                                 f"{_text((shape, stride, dtype, device))}; compile it again with aicc.compile")
        if self._all:
            self._quick = _quick_check(args)

    def _overlaps(self, args: Sequence[Any]) -> set[tuple[int, int]]:
        """Pairs of arguments, one of them written to, whose ranges of memory meet."""
        starts = [x.data_ptr() if isinstance(x, torch.Tensor) else 0 for x in args] if self._written else []
        return {(w, i) for w in self._written for i, start in enumerate(starts)
                if i != w and start < starts[w] + self._extents[w] and starts[w] < start + self._extents[i]}


def _extent(x: torch.Tensor) -> int:
    """Bytes from the first to behind the last element."""
    return (1 + sum((s - 1) * n for s, n in zip(x.shape, x.stride(), strict=True))) * x.element_size() if x.numel() else 0
