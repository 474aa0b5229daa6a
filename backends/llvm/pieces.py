"""A module's code in pieces: another thread makes machine code of kernels while the next ones are being emitted.

    with Pieces(llvm, machine_code) as pieces:
        ... emit kernels into `llvm`, after each: pieces.add(functions, shared)
        objects = pieces.finish()

Emission is Python and LLVM is not, so that both run at once; the order and the bounds of pieces depend on the code alone. A function that other
pieces call (`shared`) is hidden instead of internal; the linker joins the objects. Text is made once per function.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from llvmlite import ir

__all__ = ["Pieces"]

TEXT = 100_000
"""Least characters of a piece: each costs about a millisecond, and waits for the other thread some twenty times."""
SWITCH_SECONDS = 2e-4
"""How long the emitting thread keeps the interpreter when LLVM's wants it: Python's own 5 ms would cost more than a small kernel takes."""


class Pieces:
    """See the module docstring."""

    def __init__(self, module: ir.Module, machine_code: Callable[[str], bytes]):
        self._module = module
        self._machine_code = machine_code
        self._given: set[str] = set()
        self._waiting: list[ir.Function] = []
        self._texts: list[str] = []
        self._bodies: list[str] = []
        self._made: list[Future[bytes] | bytes] = []
        self._threads = ThreadPoolExecutor(1, "aicc-llvm") if _cores() > 1 else None
        self._interval = sys.getswitchinterval()

    def __enter__(self) -> Pieces:
        if self._threads is not None:
            sys.setswitchinterval(min(self._interval, SWITCH_SECONDS))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            sys.setswitchinterval(self._interval)

    def add(self, functions: Iterable[ir.Function], shared: Iterable[ir.Function]) -> None:
        """Functions that are complete; `shared` of them are called from elsewhere."""
        for f in shared:
            f.linkage = "hidden"
        for f in functions:
            self._waiting.append(f)
            self._texts.append(str(f))
        if sum(map(len, self._texts)) >= TEXT:
            self._give()

    def finish(self) -> tuple[list[bytes], str]:
        """All objects, that of what nobody gave first, and the text of the whole as one module."""
        self._give()
        rest = [f for f in self._module.functions if f.blocks and f.name not in self._given]
        self._waiting, self._texts = rest, [str(f) for f in rest]
        self._texts += [str(g) for g in self._module.globals.values() if isinstance(g, ir.GlobalVariable)]
        self._give()
        found = [m if isinstance(m, bytes) else m.result() for m in self._made]
        whole = self._text([str(f) for f in self._module.functions if not f.blocks], "\n".join([self._bodies[-1], *self._bodies[:-1]]))
        return [found[-1], *found[:-1]], whole.replace("\ndefine hidden ", "\ndefine internal ")

    def _give(self) -> None:
        if not self._texts:
            return
        here = {f.name for f in self._waiting}
        body = "\n".join(self._texts)
        text = self._text([_declaration(f) for f in self._module.functions if f.name not in here and f.get_reference() in body], body)
        self._bodies.append(body)
        self._given |= here
        self._waiting, self._texts = [], []
        self._made.append(self._machine_code(text) if self._threads is None else self._threads.submit(self._machine_code, text))


    def _text(self, declarations: list[str], body: str) -> str:
        module = self._module
        return "\n".join([f'; ModuleID = "{module.name}"', f'target triple = "{module.triple}"', f'target datalayout = "{module.data_layout}"',
                          *declarations, body, *module._get_metadata_lines()])


def _declaration(f: ir.Function) -> str:
    """A function without its body."""
    if not f.blocks:
        return str(f)
    head: list[str] = []
    f.descr_prototype(head)
    text = "".join(head).replace("define", "declare", 1)
    return text.replace("declare internal", "declare hidden", 1)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
