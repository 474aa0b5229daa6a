"""Arguments that have elements and no memory, which native code must not be given: it would read at address zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["require_memory"]


def require_memory(tensors: Sequence[torch.Tensor]) -> None:
    """RuntimeError for a tensor with elements whose address is zero; to be asked where an address is, for empty tensors have none either."""
    for i, t in enumerate(tensors):
        if t.numel() and not t.data_ptr():
            why = ("it is wrapped by torch.func.functionalize, which must be inside of what is compiled" if torch._is_functional_tensor(t) else
                   "it is on the meta device" if t.is_meta else
                   "its storage was resized to nothing" if not t.untyped_storage().nbytes() else "its storage holds no data")
            raise RuntimeError(f"tensor argument {i}, {str(t.dtype).removeprefix('torch.')} {list(t.shape)}, has no memory: {why}")
