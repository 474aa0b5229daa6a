"""Compiling what the user named, and keeping what went by.

    recorder = Recorder(keep=...)
    with recorder.watching():
        compile_and_run(found, options, train=False, dynamic=None)
    recorder.graphs          # a GraphRecord per compiled graph, in the order of compilation
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..ir.core import Operation
from ..ir.passes import Pass
from .driver import Compilation, watching
from .dynamo import backend
from .errors import UserError
from .model_file import LoadedModel, Script
from .options import Options

__all__ = ["GraphRecord", "Recorder", "call_eager", "call_model", "compile_and_run", "float_outputs", "prepare", "scalar_loss"]


@dataclass
class GraphRecord:
    """One compiled graph: the module after each stage, and after the passes that were asked for."""

    index: int
    stages: dict[str, Operation] = field(default_factory=dict)
    after: list[tuple[str, str, Operation]] = field(default_factory=list)  # (stage, pass, module)
    compilation: Compilation | None = None

    @property
    def role(self) -> str:
        """'inference', 'forward' or 'backward'; 'unfinished' when compilation stopped."""
        return self.compilation.name if self.compilation is not None else "unfinished"

    @property
    def title(self) -> str:
        return f"graph{self.index}_{self.role}"


class Recorder:
    """Keeps copies of modules as they pass by. `after` names passes whose results to keep; `stages=False` keeps no stage."""

    def __init__(self, *, stages: bool = True, after: tuple[str, ...] = ()):
        self.stages = stages
        self.after = after
        self.graphs: list[GraphRecord] = []
        self._open: GraphRecord | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Records every graph that is compiled while it is open."""
        with watching(self._observe if self.stages or self.after else None, self._compiled):
            yield

    def _record(self) -> GraphRecord:
        if self._open is None:
            self._open = GraphRecord(len(self.graphs))
            self.graphs.append(self._open)
        return self._open

    def _observe(self, stage: str, p: Pass | None, module: Operation) -> None:
        record = self._record()
        if p is None and self.stages:
            record.stages[stage] = module.clone()
        elif p is not None and p.name in self.after:
            record.after.append((stage, str(p), module.clone()))

    def _compiled(self, compilation: Compilation) -> None:
        self._record().compilation = compilation
        self._open = None


def compile_and_run(found: LoadedModel | Script, options: Options, *, train: bool = False, dynamic: bool | None = None) -> Any:
    """Compiles by calling once (and, for training, going backward once). Returns the output; None for a script."""
    if isinstance(found, Script):
        found.run()
        return None
    prepare(found.model, train)
    compiled = torch.compile(found.model, backend=backend(options), dynamic=dynamic)
    try:
        return call_model(compiled, found, train)
    except torch._dynamo.exc.BackendCompilerFailed:
        raise
    except Exception:
        call_eager(found, train)  # a fault of the model is told in eager's words
        raise


def call_eager(found: LoadedModel, train: bool) -> Any:
    """Calls the model as it is. UserError if that fails."""
    try:
        return call_model(found.model, found, train)
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"'{found.name}' itself fails, without any compiler: {type(e).__name__}: {e}") from e


def prepare(model: Callable[..., Any], train: bool) -> None:
    """Evaluation mode, or training mode, for a module."""
    if isinstance(model, torch.nn.Module):
        model.train(train)


def call_model(model: Callable[..., Any], found: LoadedModel, train: bool) -> Any:
    """One call; for training also a backward pass from the sum of squares of all floating outputs."""
    if not train:
        with torch.no_grad():
            return model(*found.args, **found.kwargs)
    out = model(*found.args, **found.kwargs)
    scalar_loss(out).backward()
    return out


def scalar_loss(out: Any) -> torch.Tensor:
    """The mean square of all floating outputs that depend on something that can be trained. UserError if there is none."""
    leaves = [t for t in float_outputs(out) if t.requires_grad]
    if not leaves:
        raise UserError("--train: no floating output of the model depends on a parameter")
    return torch.stack([t.square().mean() for t in leaves]).sum()


def float_outputs(out: Any) -> list[torch.Tensor]:
    """The floating tensors in a nest of tuples, lists, dicts and model outputs."""
    return [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor) and t.is_floating_point()]
