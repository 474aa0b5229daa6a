"""A process that compiles kernels for another one: what `workers.py` starts.

    python -m aicc.backends.triton.worker CAPABILITY FD [FD ...]

It imports Triton, compiles a kernel of one line (the first takes ten times as long as those after it) and only then forks, once for each of the
sockets. Each child answers jobs until the other end is closed. It imports no torch.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

from ...ir.core import IRError
from ...ir.target import Target
from .compile import CompiledKernel, compile_kernel, triton_cache
from .printer import KernelSource

__all__ = ["main", "serve"]

_FIRST = KernelSource("first", """import triton
import triton.language as tl


@triton.jit
def first(x, y):
    i = tl.arange(0, 128)
    tl.store(y + i, tl.sum(tl.load(x + i) + i, 0))
""", {"x": "*fp32", "y": "*fp32"}, 2, (), 0, 128, False)


def main(arguments: list[str]) -> None:
    """See the module docstring."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's: the other process has it too, and closes the sockets when it ends
    capability, places = int(arguments[0]), [int(a) for a in arguments[1:]]
    with tempfile.TemporaryDirectory() as folder, triton_cache(Path(folder)):
        compile_kernel(_FIRST, Target(kind="cuda", name=f"sm_{capability}", capability=capability), cache_dir=Path(folder))
    for place in places:
        if os.fork() == 0:
            for other in places:
                if other != place:
                    os.close(other)
            serve(Connection(socket.socket(fileno=place).detach()))
            os._exit(0)
    for place in places:
        os.close(place)
    for _ in places:
        os.wait()


def serve(connection: Connection) -> None:
    """Answers jobs (source, target, divisible, cache folder) with a `CompiledKernel`, or with the text of an IRError, until the other end closes."""
    while True:
        try:
            source, target, divisible, folder = connection.recv()
        except (EOFError, OSError):
            return
        answer: CompiledKernel | str
        try:
            with triton_cache(folder):
                answer = compile_kernel(source, target, divisible=divisible, cache_dir=folder)
        except IRError as error:
            answer = str(error)
        connection.send(answer)


if __name__ == "__main__":
    main(sys.argv[1:])
