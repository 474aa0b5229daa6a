"""One function of `backends/llvm/vecmath.py`, compiled for this host and called on tensors.

    kernel = compile_elementwise("exp")
    y = kernel(x)                       # x: 1-D, contiguous, float32, a multiple of 16 elements

`ulp.py` and the tests of the vector math measure with it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import llvmlite.binding as llvm
import torch
from aicc.backends.llvm.vecmath import BINARY, UNARY
from aicc.backends.llvm.vecmath_fast import FAST
from llvmlite import ir

__all__ = ["REFERENCES", "compile_elementwise", "compile_function", "emit_loop", "host_features"]

Kernel = Callable[..., torch.Tensor]

_ELEMENTS: dict[torch.dtype, ir.Type] = {torch.float32: ir.FloatType(), torch.float64: ir.DoubleType()}
_ENGINES: list[llvm.ExecutionEngine] = []  # compiled code lives as long as its engine

REFERENCES: dict[str, Callable[..., torch.Tensor]] = {
    name: getattr(torch, name) for name in (*UNARY, *BINARY)
}


def target_machine(cpu: str = "") -> llvm.TargetMachine:
    """Of the CPU named as LLVM does, by default this one with all its features."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = "" if cpu else llvm.get_host_cpu_features().flatten()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=cpu or llvm.get_host_cpu_name(), features=features, opt=3
    )


def host_features() -> frozenset[str]:
    """The names of the instruction sets that this machine has."""
    return frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)


def compile_function(module: ir.Module, name: str, arguments: int, cpu: str = "") -> Callable[..., None]:
    """The function `name` of `module`, taking `arguments` pointers and an i64, optimised at O2 and loaded."""
    machine = target_machine(cpu)
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    builder.getModulePassManager().run(parsed, builder)
    engine = llvm.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    _ENGINES.append(engine)
    prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments, ctypes.c_int64)
    return prototype(engine.get_function_address(name))


def emit_loop(
    emit: Callable[..., ir.Value], sources: list[ir.Type], result: ir.Type, width: int | None
) -> ir.Module:
    """A module whose `kernel(inputs..., output, n)` applies `emit(builder, *values)` to `width` elements a step.

    n must be a multiple of the width; width None works on scalars.  i1 results are stored as i8.
    """
    module = ir.Module()
    arguments = [ir.PointerType()] * (len(sources) + 1)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [*arguments, ir.IntType(64)]), "kernel")
    entry, body, done = (function.append_basic_block(name) for name in ("entry", "body", "done"))
    i64 = ir.IntType(64)
    ir.IRBuilder(entry).branch(body)
    b = ir.IRBuilder(body)
    index = b.phi(i64)
    index.add_incoming(i64(0), entry)

    def shaped(element: ir.Type) -> ir.Type:
        return element if width is None else ir.VectorType(element, width)

    values = []
    for pointer, element in zip(function.args, sources):
        address = b.gep(pointer, [index], source_etype=element)
        values.append(b.load(address, typ=shaped(element), align=element_bytes(element)))
    value = emit(b, *values)
    if value.type == shaped(ir.IntType(1)):
        value = b.zext(value, shaped(ir.IntType(8)))
    b.store(value, b.gep(function.args[-2], [index], source_etype=result), align=element_bytes(result))
    following = b.add(index, i64(width or 1))
    index.add_incoming(following, b.block)
    b.cbranch(b.icmp_signed("<", following, function.args[-1]), body, done)
    ir.IRBuilder(done).ret_void()
    return module


def element_bytes(element: ir.Type) -> int:
    return element.width // 8 if isinstance(element, ir.IntType) else {"half": 2, "float": 4, "double": 8}[str(element)]


def compile_elementwise(
    name: str,
    dtype: torch.dtype = torch.float32,
    width: int | None = 16,
    features: frozenset[str] = frozenset(),
    cpu: str = "",
    fast: bool = False,
) -> Kernel:
    """`name` of vecmath as a function of equally long 1-D contiguous tensors of `dtype`; length a multiple of `width`. `fast`: of the fast set."""
    emitter = FAST[name] if fast else UNARY.get(name) or BINARY[name]
    arity = 1 if name in UNARY else 2
    element = _ELEMENTS[dtype]
    mask = name in ("isnan", "isinf")
    module = emit_loop(
        lambda b, *x: emitter(b, *x, features), [element] * arity, ir.IntType(8) if mask else element, width
    )
    function = compile_function(module, "kernel", arity + 1, cpu)

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        if inputs[0].numel() % (width or 1):
            raise ValueError(f"{inputs[0].numel()} elements are not a multiple of the width {width}")
        output = torch.empty_like(inputs[0], dtype=torch.bool if mask else dtype)
        function(*[x.data_ptr() for x in inputs], output.data_ptr(), output.numel())
        return output

    return run
