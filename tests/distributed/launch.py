"""Starts a script on several processes with torchrun and gives back what they printed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def torchrun(ranks: int, script: Path, *args: str, timeout: int = 500, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs `script` on `ranks` processes of this host, with this checkout's aicc."""
    paths = [str(ROOT.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false", **(environment or {})}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(script), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, check=False)
