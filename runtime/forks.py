"""A forked child has none of its parent's threads: OpenMP's pool is gone there, and a parallel region would wait for it forever.

    Forks(library).watch()  # once per process, with the OpenMP runtime that torch has loaded

In a child whose parent had threads, regions get one thread (`omp_set_max_active_levels(0)`): torch's own operators and compiled programs run
serially instead of hanging. A child of a process without threads starts OpenMP's pool too and is left alone.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

__all__ = ["Forks"]


@dataclass
class Forks:
    """Watches the forks of this process. `threads` is how many it had at the last one."""

    library: ctypes.CDLL
    threads: int = 1

    def watch(self) -> None:
        if hasattr(os, "register_at_fork") and hasattr(self.library, "omp_set_max_active_levels"):
            os.register_at_fork(before=self._before, after_in_child=self._in_child)

    def _before(self) -> None:
        try:
            self.threads = len(os.listdir("/proc/self/task"))
        except OSError:
            self.threads = 2  # not known: as if there were some

    def _in_child(self) -> None:
        if self.threads > 1:
            self.library.omp_set_max_active_levels(0)
