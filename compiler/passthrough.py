"""Calls of a program without AOTAutograd's wrapper, where that only passes on.

Around an inference graph the wrapper restores what functionalisation took away: writes to inputs, results that are views of inputs or of each
other, subclasses, random states, equal inputs given once. It also sets grad mode and autocast for the operators inside. Most graphs have
nothing of the kind, and a program that is one native call asks for no mode; the wrapper's 7 microseconds, more behind kernels that have emptied
the caches, are a tenth of the call of a small model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._functorch._aot_autograd.schemas import OutputType, PlainTensorMeta, ViewAndMutationMeta
from torch._guards import TracingContext
from torch._subclasses import FakeTensor

from ..runtime.executor import CompiledGraph

__all__ = ["without_wrapper"]

_OWN = (OutputType.non_alias, OutputType.unsafe_view_alias)
"""Results that are memory of their own."""


def without_wrapper(wrapped: Callable[..., Any], made: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
    """`made` as a function of the captured graph's `inputs`, where that is all that `wrapped`, which AOTAutograd made of it, does; else `wrapped`."""
    metadata = getattr(TracingContext.try_get(), "fw_metadata", None)
    if type(made) is not CompiledGraph or not made.makes_all or not isinstance(metadata, ViewAndMutationMeta):
        return wrapped
    if made.argument_count != len(inputs) or made.result_count != len(metadata.output_info) or not _only_passes_on(metadata, inputs):
        return wrapped

    def call(*args: Any) -> list[Any]:
        return made._run(args)

    return call


def _only_passes_on(metadata: ViewAndMutationMeta, inputs: Sequence[Any]) -> bool:
    plain = (torch.Tensor, torch.nn.Parameter, FakeTensor)
    return (all(type(x) in plain for x in inputs if isinstance(x, torch.Tensor))
            and not any(i.mutates_data or i.mutates_metadata for i in metadata.input_info)
            and all(o.output_type in _OWN and not o.dynamic_dims and issubclass(o.raw_type, torch.Tensor) for o in metadata.output_info)
            and not metadata.num_intermediate_bases and not metadata.tokens and not metadata.is_rng_op_functionalized
            and not getattr(metadata, "num_graphsafe_rng_states", 0)
            and all(isinstance(m, PlainTensorMeta) for m in (*metadata.subclass_inp_meta, *metadata.subclass_fw_graph_out_meta)))
