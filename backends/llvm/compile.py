"""Modules at the host level -> object code.

Kernels are spread over several LLVM modules, which threads compile while the next ones are made (`objects.py`). Where the cuts are does not
depend on the number of threads, so the code does not either.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from llvmlite import binding

from ...ir.core import Operation
from ...ir.target import Target
from ...runtime.artifact import archive
from .host import HostProgram, ModuleEmitter
from .objects import Objects, addresses_as_written, optimize, parse_text, usable_threads
from .target import target_machine

__all__ = ["CompiledObject", "compile_module"]


@dataclass(frozen=True)
class CompiledObject:
    """Native code of a module.

    `symbols` are the exported functions, `programs` what the executor walks per host function, `errors` the meaning of each
    error word (0 is success). `llvm_ir` is the code before optimisation: one LLVM module after the other.
    """

    object_code: bytes
    llvm_ir: str
    symbols: tuple[str, ...]
    programs: dict[str, HostProgram]
    errors: dict[int, str]
    target: Target

    @property
    def modules(self) -> list[str]:
        """The texts of the LLVM modules."""
        return re.split(r"^(?=; ModuleID)", self.llvm_ir, flags=re.MULTILINE)[1:]

    @cached_property
    def optimized_ir(self) -> str:
        """The LLVM IR that the object code was made from (compiles again)."""
        return "".join(str(m) for m in self._optimized())

    @cached_property
    def asm(self) -> str:
        """The object code as assembly (compiles again)."""
        with addresses_as_written():
            return "".join(target_machine(self.target).emit_assembly(m) for m in self._optimized())

    def _optimized(self) -> list[binding.ModuleRef]:
        parsed = [parse_text(text) for text in self.modules]
        for module in parsed:
            optimize(module, self.target)
        return parsed


def compile_module(module: Operation, target: Target, *, stepwise: bool = False, threads: int | None = None) -> CompiledObject:
    """Compiles a module at the host level: functions of host ops and the kernels that they launch. `stepwise`: every launch can be run by itself.
    `threads`: at most so many compile (default: as the machine allows).

    NotImplementedError names an op without a lowering; IRError reports malformed input.
    """
    with Objects(target, usable_threads(threads)) as objects:
        emitter = ModuleEmitter(module, target, objects.add)
        programs = {op["sym_name"]: emitter.host(op, stepwise) for op in module.body if op.name == "func" and not op["private"]}
        objects.add(emitter.finish(), last=True)
        code = archive(objects.finish())
    return CompiledObject(code, "".join(objects.texts), tuple(emitter.exported), programs, dict(emitter.errors.messages), target)
