"""From fused groups of tensors to kernels on tiles.

`emit.py` writes tile ops at symbolic positions; `frame.py` finds a group's loop nest; `loops.py`, `contraction.py` and `ordered.py` are
the kernel families; `lower.py` is the pass.
"""

from .lower import Tile

__all__ = ["Tile"]
