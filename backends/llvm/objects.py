"""Several LLVM modules to object code at once, in threads.

    objects = Objects(target, threads=2)
    objects.add(module)              # parsed here and now; the rest by a thread that is free
    codes = objects.finish()         # one per module, in order

LLVM lets threads compile side by side what shares no context and no target machine. llvmlite has one lock for all of its calls, so the two long ones,
the passes and the emission, are made without it, through a handle of our own on its library. Python's lock is free meanwhile, so the modules that
follow are made at the same time. All short calls are made by the thread that adds, for each of them would wait for Python's lock.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from llvmlite import binding, ir
from llvmlite.binding import ffi, newpassmanagers

from ...ir.core import IRError
from ...ir.target import Target
from .target import new_target_machine, target_machine
from .text import module_text

__all__ = ["MOST_THREADS", "Objects", "addresses_as_written", "emit_object", "optimize", "parse", "parse_text", "usable_threads"]

MOST_THREADS = 8
"""More would wait for the modules, which are made by one thread."""


def usable_threads(most: int | None = None) -> int:
    """Threads to compile with: the processors that this process may use, at most `most`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, MOST_THREADS if most is None else most))


def parse(module: ir.Module, target: Target) -> tuple[binding.ModuleRef, str]:
    """The module as LLVM's own object, verified, and its text. IRError if LLVM rejects it, which is a bug of the emitter."""
    machine = target_machine(target)
    module.triple = machine.triple
    module.data_layout = str(machine.target_data)
    text = module_text(module)
    try:
        parsed = parse_text(text)
        parsed.verify()
    except RuntimeError as e:
        raise IRError(f"LLVM rejects the generated code of '{module.name}': {str(e)[:2000]}") from e
    return parsed, text


def parse_text(text: str) -> binding.ModuleRef:
    """A module in a context of its own: types, constants and attributes live as long as their context, and LLVM's global one for ever."""
    return binding.parse_assembly(text, binding.create_context())


def optimize(parsed: binding.ModuleRef, target: Target, level: int = 2) -> None:
    """Runs LLVM's standard pipeline in place."""
    builder, passes = _pipeline(target_machine(target), level)
    passes.run(parsed, builder)
    _dispose(passes)


def emit_object(parsed: binding.ModuleRef, target: Target) -> bytes:
    """Machine code of an optimised module."""
    with addresses_as_written():
        return target_machine(target).emit_object(parsed)


def _pipeline(machine: binding.TargetMachine, level: int) -> tuple[Any, Any]:
    """LLVM's standard passes. Vectors are explicit in the IR, so the loop and SLP vectorisers are off, and so is loop unrolling: kernels unroll
    where their IR says."""
    options = binding.create_pipeline_tuning_options(speed_level=level)
    options.loop_vectorization = False
    options.slp_vectorization = False
    options.loop_interleaving = False
    options.loop_unrolling = False
    builder = binding.create_pass_builder(machine, options)
    return builder, builder.getModulePassManager()


def _dispose(passes: binding.ModulePassManager) -> None:
    """Frees a pipeline, 140 KB. llvmlite 0.50's own `close` does nothing: the class that would is behind ObjectRef in the order of bases."""
    if type(passes)._dispose is ffi.ObjectRef._dispose:
        newpassmanagers.NewPassManager._dispose(passes)
    passes.close()


class _ReductionSwitch:
    """Loop strength reduction takes half of the time of code generation here and gains nothing: kernels step their own pointers.
    It is a switch of the whole process, so it is off only while somebody here emits code, for others that use LLVM through llvmlite."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0

    def take(self, count: int) -> None:
        """`count` more users, or fewer."""
        with self._lock:
            before, self._users = self._users, self._users + count
            if (before > 0) != (self._users > 0):
                binding.set_option("aicc", f"-disable-lsr={'true' if self._users else 'false'}")


_REDUCTION = _ReductionSwitch()


@contextmanager
def addresses_as_written() -> Iterator[None]:
    """Without loop strength reduction."""
    _REDUCTION.take(1)
    try:
        yield
    finally:
        _REDUCTION.take(-1)


class _Library:
    """The two long calls, without llvmlite's lock; Python's is free during both."""

    def __init__(self) -> None:
        library = ctypes.CDLL(ffi.lib._name)  # the library is loaded: this is another handle of it
        self.run = library.LLVMPY_RunNewModulePassManager
        self.run.argtypes, self.run.restype = [ffi.LLVMModulePassManagerRef, ffi.LLVMModuleRef, ffi.LLVMPassBuilderRef], None
        self.emit = library.LLVMPY_TargetMachineEmitToMemory
        self.emit.argtypes = [ffi.LLVMTargetMachineRef, ffi.LLVMModuleRef, ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
        self.emit.restype = ffi.LLVMMemoryBufferRef


_LIBRARY = _Library()


@dataclass
class _Job:
    """One module with a context, a target machine and passes of its own."""

    parsed: binding.ModuleRef
    machine: binding.TargetMachine
    builder: Any
    passes: Any
    memory: Any = None
    error: bytes | None = None

    def run(self) -> None:
        """The long calls: any thread, once."""
        _LIBRARY.run(self.passes, self.parsed, self.builder)
        message = ctypes.c_char_p()
        self.memory = _LIBRARY.emit(self.machine, self.parsed, 1, ctypes.byref(message))
        self.error = message.value

    def object_code(self) -> bytes:
        """What `run` made."""
        if not self.memory:
            raise IRError(f"LLVM makes no object code of '{self.parsed.name}': {(self.error or b'no message').decode(errors='replace')[:2000]}")
        code = ctypes.string_at(ffi.lib.LLVMPY_GetBufferStart(self.memory), ffi.lib.LLVMPY_GetBufferSize(self.memory))
        ffi.lib.LLVMPY_DisposeMemoryBuffer(self.memory)
        return code

    def free(self) -> None:
        """Everything, what uses the rest first. The cyclic collector, which may find what was emitted, knows no order: it would free a module's
        context in front of the module."""
        _dispose(self.passes)
        for part in (self.builder, self.parsed, self.machine):
            part.close()


class Objects:
    """Modules on their way to object code, by `threads` threads, the caller's among them. A context: at its end no thread is left."""

    def __init__(self, target: Target, threads: int = 1):
        self.target = target
        self.texts: list[str] = []
        self._jobs: list[tuple[_Job, Future[None] | None]] = []
        self._pool = ThreadPoolExecutor(threads - 1, "aicc-llvm") if threads > 1 else None

    def __enter__(self) -> Objects:
        _REDUCTION.take(1)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        for job, _ in self._jobs:
            job.free()
        self._jobs.clear()
        _REDUCTION.take(-1)

    def add(self, module: ir.Module, *, last: bool = False) -> None:
        """Takes the next module, which must not change any more. The last is left to `finish`: a new thread has to fetch memory of its own first.
        IRError if LLVM rejects it."""
        parsed, text = parse(module, self.target)
        self.texts.append(text)
        machine = new_target_machine(self.target)
        job = _Job(parsed, machine, *_pipeline(machine, level=2))
        self._jobs.append((job, None if last or self._pool is None else self._pool.submit(job.run)))

    def finish(self) -> list[bytes]:
        """The objects, in the order of the modules: what no thread has begun, this one does."""
        for job, future in reversed(self._jobs):
            if future is None or future.cancel():
                job.run()
        for _, future in self._jobs:
            if future is not None and not future.cancelled():
                future.result()
        return [job.object_code() for job, _ in self._jobs]
