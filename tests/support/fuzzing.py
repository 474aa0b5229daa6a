"""What the fuzzers share: a budget of time, and a note of the example at hand for when the process dies with it.

`AICC_FUZZ_UNTIL` (seconds since the epoch) ends the search: later examples pass at once. `AICC_FUZZ_NOTE` names the file of the note.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import settings

_UNTIL = float(os.environ.get("AICC_FUZZ_UNTIL", "inf"))
_NOTE = os.environ.get("AICC_FUZZ_NOTE", "")


def attempt(example: Any, check: Callable[[], None]) -> None:
    """Runs `check`, unless the time is up. A failure is written down; from then on the time does not count, for hypothesis shrinks it."""
    global _failed
    if time.time() > _UNTIL and not _failed:
        return
    if _NOTE:
        Path(_NOTE).write_text(str(example))
    try:
        check()
    except Exception as e:
        _failed = True
        if _NOTE:
            Path(_NOTE + ".failed").write_text(f"{example}\n{type(e).__name__}: {str(e)[:4000]}\n")
        raise


_failed = False


def scaled(examples: int) -> settings:
    """`examples` in the default profile; profiles with more run that many times as many."""
    return settings(max_examples=max(examples, examples * settings.default.max_examples // 100))


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in Python code that takes longer (in the main thread)."""
    def expired(*_: Any) -> None:
        raise TimeoutError(f"it takes more than {seconds} seconds")
    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


_RUNS_CODE = ("exec", "compile", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "ctypes.dlopen", "pickle.find_class",
              "open", "shutil.rmtree", "os.remove")
_heard: list[str] | None = None


def _listen(event: str, _: Any) -> None:
    if _heard is not None and event in _RUNS_CODE:
        _heard.append(event)


@contextmanager
def runs_no_code() -> Iterator[None]:
    """AssertionError when Python's audit hears of code, processes, files or libraries meanwhile."""
    global _heard
    if _listen not in _installed:
        sys.addaudithook(_listen)
        _installed.append(_listen)
    _heard = []
    try:
        yield
        assert not _heard, f"it did {', '.join(dict.fromkeys(_heard))}"
    finally:
        _heard = None


_installed: list[Any] = []
