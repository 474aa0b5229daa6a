"""LLVM IR -> machine code: the pass pipeline and object emission.

Vectors are explicit in the IR, so the loop and SLP vectorisers are off, and so is loop unrolling: kernels unroll where their
IR says.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from llvmlite import binding, ir
from llvmlite.binding import ffi, newpassmanagers

from ...ir.core import IRError, Operation
from ...ir.target import Target
from .half import add_half_conversions
from .host import HostProgram, ModuleEmitter
from .target import target_machine

__all__ = ["CompiledObject", "compile_module", "emit_object", "optimize", "parse"]


@dataclass(frozen=True)
class CompiledObject:
    """Native code of a module.

    `symbols` are the exported functions, `programs` what the executor walks per host function, `errors` the meaning of each
    error word (0 is success). `llvm_ir` is the code before optimisation.
    """

    object_code: bytes
    llvm_ir: str
    symbols: tuple[str, ...]
    programs: dict[str, HostProgram]
    errors: dict[int, str]
    target: Target

    @cached_property
    def optimized_ir(self) -> str:
        """The LLVM IR that the object code was made from (compiles again)."""
        return str(self._optimized())

    @cached_property
    def asm(self) -> str:
        """The object code as assembly (compiles again)."""
        parsed = self._optimized()
        with _addresses_as_written():
            return target_machine(self.target).emit_assembly(parsed)

    def _optimized(self) -> binding.ModuleRef:
        parsed = _parsed(self.llvm_ir)
        optimize(parsed, self.target)
        return parsed


def compile_module(module: Operation, target: Target, *, stepwise: bool = False) -> CompiledObject:
    """Compiles a module at the host level: functions of host ops and the kernels that they launch. `stepwise`: every launch can be run by itself.

    NotImplementedError names an op without a lowering; IRError reports malformed input.
    """
    emitter = ModuleEmitter(module, target)
    programs = {op["sym_name"]: emitter.host(op, stepwise) for op in module.body if op.name == "func" and not op["private"]}
    add_half_conversions(emitter.llvm, target)
    parsed, text = parse(emitter.llvm, target)
    optimize(parsed, target)
    code = emit_object(parsed, target)
    return CompiledObject(code, text, tuple(emitter.exported), programs, dict(emitter.errors.messages), target)


def parse(module: ir.Module, target: Target) -> tuple[binding.ModuleRef, str]:
    """The module as LLVM's own object, verified, and its text. IRError if LLVM rejects it, which is a bug of the emitter."""
    machine = target_machine(target)
    module.triple = machine.triple
    module.data_layout = str(machine.target_data)
    text = str(module)
    try:
        parsed = _parsed(text)
        parsed.verify()
    except RuntimeError as e:
        raise IRError(f"LLVM rejects the generated code of '{module.name}': {str(e)[:2000]}") from e
    return parsed, text


def emit_object(parsed: binding.ModuleRef, target: Target) -> bytes:
    """Machine code of an optimised module."""
    with _addresses_as_written():
        return target_machine(target).emit_object(parsed)


@contextmanager
def _addresses_as_written() -> Iterator[None]:
    """Without loop strength reduction, which takes half of the time of code generation here and gains nothing: kernels step their own
    pointers. It is a switch of the whole process, so it is put back at once for others that use LLVM through llvmlite."""
    binding.set_option("aicc", "-disable-lsr=true")
    try:
        yield
    finally:
        binding.set_option("aicc", "-disable-lsr=false")


def _parsed(text: str) -> binding.ModuleRef:
    """A module in a context of its own: types, constants and attributes live as long as their context, and LLVM's global one for ever."""
    return binding.parse_assembly(text, binding.create_context())


def optimize(parsed: binding.ModuleRef, target: Target, level: int = 2) -> None:
    """Runs LLVM's standard pipeline in place."""
    options = binding.create_pipeline_tuning_options(speed_level=level)
    options.loop_vectorization = False
    options.slp_vectorization = False
    options.loop_interleaving = False
    options.loop_unrolling = False
    builder = binding.create_pass_builder(target_machine(target), options)
    passes = builder.getModulePassManager()
    passes.run(parsed, builder)
    _dispose(passes)


def _dispose(passes: binding.ModulePassManager) -> None:
    """Frees a pipeline, 140 KB. llvmlite 0.50's own `close` does nothing: the class that would is behind ObjectRef in the order of bases."""
    if type(passes)._dispose is ffi.ObjectRef._dispose:
        newpassmanagers.NewPassManager._dispose(passes)
    passes.close()
