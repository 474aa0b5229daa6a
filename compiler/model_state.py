"""What of a model a program of `ahead.py` was compiled for, beside its tensors, and whether a call still has it.

Of every layer: its `training` flag, layers and hooks, all plain settings (`eps` of a norm as well as what users' layers hold), functions (an
activation), and lists, dicts and sets of plain values; whether it has got a `forward` of its own, or another class; and the hooks of all modules. The
plain variables of a function's closure, and those of a method's object, likewise. Of functions that are called by name, those of users' classes among
them: code and default values.
Not seen: what an empty list or dict is given later, and the insides of objects that are neither of these.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from operator import attrgetter, itemgetter
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn

from .ahead_checks import kind_of
from .held import Held, is_container, is_plain

__all__ = ["Modules"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_OWN = ("training", "_modules", *_HOOKS)
_BASE = frozenset(vars(nn.Module()))
_FUNCTIONS = (FunctionType, BuiltinFunctionType)
_METHODS = ("forward", "__call__")
"""What a layer may be given in place of its class's."""
_EVERYWHERE = (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)
_forward = attrgetter("forward")
_written = attrgetter("__code__", "__defaults__", "__kwdefaults__")


class Modules:
    """The layers of what was compiled, a module, or what a function, method or `partial` holds, and the plain values held beside them."""

    def __init__(self, model: Callable[..., Any]):
        held = Held()
        held.add(model)
        self.modules = list(dict.fromkeys(chain.from_iterable(m.modules() for m in held.modules)))
        self._all = [*self.modules, *held.objects]
        self._now = [m.__dict__ for m in self._all]
        self._names = [*map(_settings, self.modules), *map(_plain_names, held.objects)]
        # A name alone would be picked as itself, and none not at all.
        self._pick = [itemgetter(*names, *names[:1]) if names else _nothing for names in self._names]
        self._then = [tuple(dict(v) if isinstance(v, dict) else v for v in pick(d)) for pick, d in zip(self._pick, self._now, strict=True)]
        self._cells = [(cell, kind_of(cell.cell_contents), name) for cell, name in held.cells]
        read = [(partial(getattr, cell, "cell_contents"), f"variable '{name}' of the function") for cell, name in held.containers]
        for x, now in zip(self._all, self._now, strict=True):
            read += [(partial(now.get, n), f"'{n}' of {type(x).__name__}") for n in _containers(x)]
        self._containers = [(get, _frozen(get()), name) for get, name in read]
        self._lengths = self._sizes()
        self._classes = [*map(type, self._all)]
        self._methods = [*dict.fromkeys(c for c in self._classes if issubclass(c, nn.Module))]
        self._forwards = [*map(_forward, self._methods)]
        own = (v for now in self._now for v in now.values())
        self._functions = [*dict.fromkeys(f for f in (*held.functions, *self._forwards, *own)
                                          if isinstance(f, FunctionType) and not (f.__module__ or "").startswith("torch."))]
        self._written = [(code, values, named and dict(named)) for code, values, named in map(_written, self._functions)]
        self._everywhere = [dict(h) for h in _EVERYWHERE]

    def tensors(self) -> list[torch.Tensor]:
        return [t for m in self.modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]

    def check(self) -> None:
        """ValueError if a layer was replaced, a flag or setting changed, or a hook came or went."""
        for i, pick in enumerate(self._pick):
            try:
                same = pick(self._now[i]) == self._then[i]
            except KeyError:
                same = False
            if not same:
                raise ValueError(self._difference(i))
        if self._sizes() != self._lengths:
            self._look_for_methods()
        if ([*map(type, self._all)] != self._classes or [*map(_forward, self._methods)] != self._forwards
                or [*map(_written, self._functions)] != self._written):
            raise ValueError(self._other_code())
        if (_EVERYWHERE[0] or _EVERYWHERE[1] or any(self._everywhere)) and [*_EVERYWHERE] != self._everywhere:
            raise ValueError("hooks of all modules (register_module_forward_hook) came or went since the program was compiled; compile it again with "
                             "aicc.compile")
        for cell, then, name in self._cells:
            if kind_of(cell.cell_contents) != then:
                raise ValueError(f"variable '{name}' of the function is another one since the program was compiled; compile it again with "
                                 "aicc.compile")
        for get, before, name in self._containers:
            if _frozen(get()) != before:
                raise ValueError(f"{name} has got other values since the program was compiled; compile it again with aicc.compile")

    def _sizes(self) -> list[int]:
        """How many attributes there are: a new one may be a method."""
        return [*map(len, self._now)]

    def _look_for_methods(self) -> None:
        for i, (now, names) in enumerate(zip(self._now, self._names, strict=True)):
            if new := [n for n in _METHODS if n in now and n not in names]:
                raise ValueError(f"{type(self._all[i]).__name__} got another '{new[0]}' since the program was compiled; compile it again with "
                                 "aicc.compile")
        self._lengths = self._sizes()

    def _other_code(self) -> str:
        classes, forwards, written = (zip(self._all, self._classes, strict=True), zip(self._methods, self._forwards, strict=True),
                                      zip(self._functions, self._written, strict=True))
        changed = [f"{then.__name__} became {type(x).__name__}" for x, then in classes if type(x) is not then]
        changed += [f"class {c.__name__} got another 'forward'" for c, then in forwards if _forward(c) is not then]
        changed += [f"{f.__qualname__} got other code or default values" for f, then in written if _written(f) != then]
        return f"{changed[0]} since the program was compiled; compile it again with aicc.compile"

    def _difference(self, i: int) -> str:
        now = self._now[i]
        name = next((n for n, then in zip(self._names[i], self._then[i], strict=False) if n not in now or now[n] != then), "")
        what = {"training": "was switched between train() and eval()", "_modules": "got other layers"}.get(
            name, "got or lost hooks" if name in _HOOKS else f"got another '{name}'")
        return f"{type(self._all[i]).__name__} {what} since the program was compiled; compile it again with aicc.compile"


def _nothing(_: Any) -> tuple[Any, ...]:
    return ()


def _plain_names(x: Any) -> tuple[str, ...]:
    """Plain values, functions and methods of its own: those are the same object, or others."""
    return tuple(n for n, v in vars(x).items() if is_plain(v) or isinstance(v, _FUNCTIONS) or n in _METHODS)


def _settings(module: nn.Module) -> tuple[str, ...]:
    return (*_OWN, *(n for n in _plain_names(module) if n not in _BASE))


def _containers(x: Any) -> list[str]:
    """Lists and the like of plain values; those that torch's layers keep for themselves follow from their settings."""
    own = type(x).__module__.startswith("torch.nn.")
    return [n for n, v in vars(x).items() if n not in _BASE and is_container(v) and not is_plain(v) and not (own and n.startswith("_"))]


def _frozen(x: Any) -> Any:
    """A copy that compares by types and values."""
    if isinstance(x, dict):
        return type(x), *((k, _frozen(v)) for k, v in x.items())
    if isinstance(x, set):
        return type(x), frozenset(x)
    return (type(x), *map(_frozen, x)) if isinstance(x, (list, tuple)) else kind_of(x)
