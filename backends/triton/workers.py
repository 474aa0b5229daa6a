"""Processes that compile kernels side by side. In threads Triton's passes run at once, but what it does in Python does not: half of a small kernel's
time, and eight of them take each five times as long.

    pool = start_workers(90, 8)                      # at once: they import Triton while the program is still traced
    kernel = pool.compile(source, target, divisible, folder)       # from several threads

The processes (`worker.py`) end when this one does. What they make is what `compile_kernel` makes here.
"""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path

from ...ir.core import IRError
from ...ir.target import Target
from .compile import CompiledKernel
from .printer import KernelSource

__all__ = ["Workers", "start_workers"]


class Workers:
    """`count` processes for a compute capability. OSError if they cannot be started."""

    def __init__(self, capability: int, count: int):
        if not sys.executable:
            raise OSError("there is no Python program to start")
        pairs = [socket.socketpair() for _ in range(count)]
        theirs = [b.fileno() for _, b in pairs]
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", f"{__package__}.worker", str(capability), *map(str, theirs)],
                pass_fds=theirs, stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)})
        except OSError:
            for a, _ in pairs:
                a.close()
            raise
        finally:
            for _, b in pairs:
                b.close()
        self.count = count
        self._lock = threading.Lock()
        self._idle: queue.SimpleQueue[Connection | None] = queue.SimpleQueue()
        for a, _ in pairs:
            self._idle.put(Connection(a.detach()))

    def compile(self, source: KernelSource, target: Target, divisible: Sequence[bool], folder: Path | None) -> CompiledKernel:
        """As `compile_kernel`, by the next process that is free. IRError if Triton rejects the kernel, or two processes die of it; OSError if there
        are no processes (any more)."""
        for _ in range(2):
            connection = self._idle.get()
            if connection is None:
                self._idle.put(None)
                raise OSError("all processes that compile kernels have ended")
            try:
                connection.send((source, target, tuple(divisible), folder))
                answer = connection.recv()
            except (EOFError, OSError):  # the process has died
                self._bury(connection)
                continue
            self._idle.put(connection)
            if isinstance(answer, str):
                raise IRError(answer)
            assert isinstance(answer, CompiledKernel)
            return answer
        raise IRError(f"Triton's compiler ends its process on kernel '{source.name}'\n{source.text}")

    def close(self) -> None:
        """Ends the processes that are idle; nothing may be compiled any more."""
        while not self._idle.empty():
            if (connection := self._idle.get()) is not None:
                connection.close()
        self._idle.put(None)

    def _bury(self, connection: Connection) -> None:
        """OSError if not one process has died but all: the first of them could not start."""
        connection.close()
        with self._lock:
            self.count -= 1
            if not self.count:
                self._idle.put(None)  # for all that wait
        try:
            code = self.process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            return
        raise OSError(f"the process that compiles kernels has ended with code {code}")


def start_workers(capability: int, count: int) -> Workers | None:
    """This process's workers; None where processes cannot be started. The first call decides on `count`."""
    return _start(capability, count, os.getpid())


@cache
def _start(capability: int, count: int, owner: int) -> Workers | None:
    """`owner`: a fork must not talk over its parent's sockets."""
    try:
        return Workers(capability, count)
    except OSError:
        return None
