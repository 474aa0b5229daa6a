"""The compilers that the suites compare, and a cold cache for both.

Import this before torch: the caches are named by environment variables that are read early.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

_ROOT = tempfile.mkdtemp(prefix="aicc-bench-")
atexit.register(shutil.rmtree, _ROOT, ignore_errors=True)
# A cache of this run alone: compile times are those of a first call, and nobody's own cache is touched.
os.environ["AICC_CACHE_DIR"] = os.path.join(_ROOT, "aicc")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(_ROOT, "inductor")
os.environ["AICC_STRICT"] = "1"

import torch  # noqa: E402

__all__ = ["warm_up"]


def warm_up(backends: list[str]) -> None:
    """Compiles something tiny with each, so that imports, worker processes and compiler probes are not charged to the first case."""
    for name in backends:
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(lambda x: x * 2 + 1, backend=name)(torch.ones(8))
    torch._dynamo.reset()
