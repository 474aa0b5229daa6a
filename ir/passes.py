"""Passes and pipelines.

A pass is a frozen dataclass: its fields are its options, `name` is what pipelines call it, its docstring says what holds before and after.
`run` changes the module in place. Passes that decline an opportunity say so with `ctx.remark`; `aicc explain` shows these.

    @register
    @dataclass(frozen=True)
    class Fuse(Pass):
        '''...'''
        name: ClassVar[str] = "fuse"
        max_bytes: int = 0

    run_pipeline(module, parse_pipeline("canonicalize,cse,fuse{max-bytes=4096}"), PassContext(target))
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from .core import UNKNOWN, IRError, Location, Operation
from .target import GENERIC_CPU, Target
from .verifier import VerificationError, verify

__all__ = ["Pass", "PassContext", "PassError", "Remark", "parse_pipeline", "register", "registered_passes", "run_pipeline"]


class PassError(IRError):
    """A pass failed or left invalid IR. `pass_name` is the pass; `module_before` the text before it ran."""

    def __init__(self, pass_name: str, message: str):
        self.pass_name = pass_name
        super().__init__(f"in pass '{pass_name}': {message}")


@dataclass(frozen=True)
class Remark:
    """A decision worth knowing: kind is 'done', 'declined' or 'note'."""

    pass_name: str
    kind: str
    message: str
    location: Location = UNKNOWN


@dataclass
class PassContext:
    """What passes may consult and report to: the target, remarks, and seconds per pass."""

    target: Target = GENERIC_CPU
    remarks: list[Remark] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    current: str = ""

    def remark(self, kind: str, message: str, location: Location = UNKNOWN) -> None:
        self.remarks.append(Remark(self.current, kind, message, location))


@dataclass(frozen=True)
class Pass:
    """Base class; see the module docstring."""

    name: ClassVar[str] = ""

    def run(self, module: Operation, ctx: PassContext) -> None:
        raise NotImplementedError(f"pass '{self.name}' defines no run")

    def __str__(self) -> str:
        given = [f"{f.name.replace('_', '-')}={_option_text(getattr(self, f.name))}" for f in dataclasses.fields(self)
                 if getattr(self, f.name) != f.default]
        return self.name + (f"{{{' '.join(given)}}}" if given else "")


_PASSES: dict[str, type[Pass]] = {}
P = TypeVar("P", bound=type[Pass])


def register(cls: P) -> P:
    """Makes a pass available to textual pipelines."""
    if cls.name in _PASSES:
        raise IRError(f"pass '{cls.name}' is registered twice")
    _PASSES[cls.name] = cls
    return cls


def registered_passes() -> dict[str, type[Pass]]:
    """Name -> class of every pass, sorted."""
    return dict(sorted(_PASSES.items()))


def _option_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _convert(pass_name: str, f: dataclasses.Field, text: str) -> Any:
    kind = f.type if isinstance(f.type, str) else f.type.__name__
    try:
        if kind == "bool":
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return {"int": int, "float": float, "str": str}[kind](text)
    except (KeyError, ValueError):
        raise IRError(f"option '{f.name.replace('_', '-')}' of pass '{pass_name}' must be {kind}, got '{text}'") from None


_ITEM = re.compile(r"\s*([A-Za-z0-9_-]+)\s*(\{([^{}]*)\})?\s*(,|$)")


def parse_pipeline(text: str) -> list[Pass]:
    """Passes from "name,name{option=value option=value}". IRError for unknown names (with the nearest) and bad options."""
    passes: list[Pass] = []
    position = 0
    while position < len(text):
        m = _ITEM.match(text, position)
        if m is None:
            raise IRError(f"cannot read the pipeline at column {position + 1}: '{text[position:position + 30]}'; "
                          f"expected name or name{{option=value}}, separated by commas")
        name, options = m.group(1), m.group(3)
        cls = _PASSES.get(name)
        if cls is None:
            near = difflib.get_close_matches(name, _PASSES, 3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known passes: {', '.join(sorted(_PASSES))}"
            raise IRError(f"unknown pass '{name}'; {hint}")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        given = {}
        for item in (options or "").replace(",", " ").split():
            key, eq, value = item.partition("=")
            f = fields.get(key.replace("-", "_"))
            if f is None or not eq:
                known = ", ".join(n.replace("_", "-") for n in fields) or "no options"
                raise IRError(f"pass '{name}' has no option '{key}' (it has {known})" if eq else
                              f"option '{item}' of pass '{name}' needs the form key=value")
            given[f.name] = _convert(name, f, value)
        passes.append(cls(**given))
        position = m.end()
    return passes


def run_pipeline(module: Operation, passes: Sequence[Pass], ctx: PassContext, *, verify_each: bool = True,
                 after_each: Callable[[Pass, Operation], None] | None = None) -> None:
    """Runs the passes in order, verifying the module after each. Raises PassError naming the pass that failed."""
    for p in passes:
        ctx.current = p.name
        start = time.perf_counter()
        try:
            p.run(module, ctx)
        except PassError:
            raise
        except IRError as e:
            raise PassError(p.name, str(e)) from e
        ctx.timings[p.name] = ctx.timings.get(p.name, 0.0) + time.perf_counter() - start
        if verify_each:
            start = time.perf_counter()
            try:
                verify(module)
            except VerificationError as e:
                raise PassError(p.name, f"it left invalid IR: {e}") from e
            ctx.timings["verify"] = ctx.timings.get("verify", 0.0) + time.perf_counter() - start
        if after_each is not None:
            after_each(p, module)
    ctx.current = ""
