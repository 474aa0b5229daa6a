"""The graphs that torch makes of a model, each with the arguments of its first call.

The model runs through ATen while it is captured: no code of aicc's can spoil the arguments of a later graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from functorch.compile import make_boxed_func

from ..capture import call_eager, call_model, prepare
from ..dynamo import aot_backend, arg_kinds
from ..errors import UserError
from ..model_file import LoadedModel

__all__ = ["CapturedGraph", "capture", "copied"]


@dataclass
class CapturedGraph:
    """One graph of AOTAutograd's: `role` is inference, forward or backward; `arguments` are tensors and sizes, as the graph takes them."""

    index: int
    role: str
    gm: torch.fx.GraphModule
    kinds: list[str]
    arguments: list[Any]

    @property
    def title(self) -> str:
        return f"graph{self.index}_{self.role}"


def copied(x: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy with the same strides (sizes may be read off these), floats in `dtype` if given; what is no tensor as it is."""
    if not isinstance(x, torch.Tensor):
        return x
    x = x.detach().resolve_conj().resolve_neg().cpu()
    wanted = dtype if dtype is not None and x.is_floating_point() else x.dtype
    once = x
    for d, stride in enumerate(x.stride()):  # elements that share a place are copied once
        once = once.narrow(d, 0, 1) if stride == 0 and x.shape[d] > 1 else once
    return torch.empty_strided(once.shape, once.stride(), dtype=wanted).copy_(once).expand(x.shape)


def capture(found: LoadedModel, *, train: bool = False, dynamic: bool | None = None) -> list[CapturedGraph]:
    """Captures the graphs of one call of a model (and of one step backward with `train`), in the order in which they were made.

    UserError when the model itself fails, or nothing in it is captured.
    """
    graphs: list[CapturedGraph] = []

    def compiler(role: str) -> Callable[..., Any]:
        def compile_one(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            graph = CapturedGraph(len(graphs), role, gm, arg_kinds(role, len(inputs)), [])
            graphs.append(graph)

            def run(*arguments: Any) -> Any:
                graph.arguments = graph.arguments or [copied(a) for a in arguments]
                return gm.forward(*arguments)
            return make_boxed_func(run)
        return compile_one

    prepare(found.model, train)
    call_eager(found, train)
    torch._dynamo.reset()
    call_model(torch.compile(found.model, backend=aot_backend(compiler), dynamic=dynamic), found, train)
    torch._dynamo.reset()
    called = [g for g in graphs if g.arguments or not any(n.op == "placeholder" for n in g.gm.graph.nodes)]
    if not called:
        raise UserError(f"nothing in '{found.name}' was compiled: its forward holds no tensor operation that torch captures")
    return called
