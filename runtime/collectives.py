"""The operator that ends a collective: `aicc_dist::wait`. Importing this module registers it.

`wait(started, operand, where, group)` gives `started`, complete. `operand` is what the collective read: it stays alive, and its memory
untouched, until here. A collective that fails or times out raises CollectiveError, which names the op, its line of Python and the ranks
that did not arrive.

How missing ranks are found: a rank whose collective fails notes in the group's store which collective it failed at, waits a moment, and
reads what the others noted. Those without a note did not arrive. Nothing is written while all goes well.
"""

from __future__ import annotations

import json
import time
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["CollectiveError", "wait"]

GRACE_SECONDS = 5.0
_library = torch.library.Library("aicc_dist", "DEF")
_library.define("wait(Tensor(a) started, Tensor operand, str where, str group) -> Tensor(a)")


class CollectiveError(RuntimeError):
    """A collective that did not complete."""


def wait(started: torch.Tensor, operand: torch.Tensor, where: str, group: str) -> torch.Tensor:
    """See the module docstring. `where`: JSON with the op, the mesh axis, the type and the place in the program."""
    try:
        return torch.ops._c10d_functional.wait_tensor(started)
    except RuntimeError as error:
        raise CollectiveError(_explain(json.loads(where), group, error)) from error


def _explain(where: dict[str, Any], group: str, error: RuntimeError) -> str:
    first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    text = f"{where['op']} over mesh axis '{where['axis']}', giving {where['type']}, did not complete\n  at {where['at']}\n"
    missing = _missing(group)
    if missing is not None:
        text += f"  ranks that did not arrive: {', '.join(map(str, missing)) or 'none (all failed in the same group)'}\n"
    return text + f"  {first}"


def _missing(group: str) -> list[int] | None:
    """The ranks of the group that have not noted a failure; None if that cannot be found out."""
    try:
        ranks = dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(group))  # type: ignore[arg-type]
        store = dist.distributed_c10d._get_default_store()
        me = dist.get_rank()
        store.set(f"aicc/failed/{group}/{me}", "1")
        deadline = time.monotonic() + GRACE_SECONDS
        waiting = [r for r in ranks if r != me]
        while waiting and time.monotonic() < deadline:
            waiting = [r for r in waiting if not store.check([f"aicc/failed/{group}/{r}"])]
            time.sleep(0.1)
        return waiting
    except (RuntimeError, KeyError, ValueError):
        return None


_library.impl("wait", wait, "CompositeExplicitAutograd")
