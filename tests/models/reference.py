"""Running a model of the zoo in float64, the truth that float32 results are measured against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .zoo import MODELS, Inputs, ModelCase

__all__ = ["Float64Everywhere", "double", "true_output"]


class Float64Everywhere(TorchDispatchMode):
    """Turns requests for float32 into float64: models that say `.float()` would leave the reference in float32."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def double(inputs: Inputs) -> Inputs:
    """The inputs with floating tensors in float64."""
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


def true_output(case: ModelCase, inputs: Inputs, attention: str = "sdpa") -> Tensor:
    """The row's output in float64, inference."""
    model = MODELS[case.truth or case.name].model(attention).double()
    with torch.no_grad(), Float64Everywhere():
        return model(*double(inputs))
