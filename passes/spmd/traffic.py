"""What the IR says is communicated: messages and bytes, per kind of collective and mesh axis.

The bytes of a collective are those of the operand of one rank, which is what the rank hands to torch.distributed.
"""

from __future__ import annotations

from collections import Counter

from ...ir.core import Operation
from .build import tensor_type

__all__ = ["traffic"]

_COLLECTIVES = ("dist.all_reduce", "dist.all_gather", "dist.reduce_scatter", "dist.all_to_all", "dist.shift")


def traffic(module: Operation) -> Counter[tuple[str, str]]:
    """(kind, axis) -> bytes of one run of the module, per rank."""
    found: Counter[tuple[str, str]] = Counter()
    for op in module.walk():
        if op.name in _COLLECTIVES:
            t = tensor_type(op.operands[0])
            found[op.name.removeprefix("dist."), op["axis"]] += int(t.numel) * t.dtype.bytes  # type: ignore[arg-type, call-overload]
    return found
