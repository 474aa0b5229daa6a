"""LLVM IR -> machine code: the pass pipeline and object emission.

Vectors are explicit in the IR, so the loop and SLP vectorisers are off, and so is loop unrolling: kernels unroll where their IR says.
"""

from __future__ import annotations

from llvmlite import binding, ir

from ...ir.core import IRError
from ...ir.target import Target
from .target import target_machine

__all__ = ["optimize", "parse"]


def parse(module: ir.Module, target: Target) -> binding.ModuleRef:
    """The module as LLVM's own object, verified. IRError if LLVM rejects it, which is a bug of the emitter."""
    machine = target_machine(target)
    module.triple = machine.triple
    module.data_layout = str(machine.target_data)
    text = str(module)
    try:
        parsed = binding.parse_assembly(text)
        parsed.verify()
    except RuntimeError as e:
        raise IRError(f"LLVM rejects the generated code of '{module.name}': {str(e)[:2000]}") from e
    return parsed


def optimize(parsed: binding.ModuleRef, target: Target, level: int = 2) -> None:
    """Runs LLVM's standard pipeline in place."""
    options = binding.create_pipeline_tuning_options(speed_level=level)
    options.loop_vectorization = False
    options.slp_vectorization = False
    options.loop_interleaving = False
    options.loop_unrolling = False
    builder = binding.create_pass_builder(target_machine(target), options)
    builder.getModulePassManager().run(parsed, builder)
