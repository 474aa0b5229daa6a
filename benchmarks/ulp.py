"""Largest error of every unary float32 function of `backends/llvm/vecmath.py`, in ulps, over all 2^32 inputs.

    PYTHONPATH=<the folder above the checkout> python benchmarks/ulp.py [--stride N] [--features avx512f] [name ...]

Each function is compiled for this host, run over every float32 bit pattern (or every N-th), and compared with torch's
float64 function on the same inputs.  Printed per function: the largest error with its input and the time per element.
The pieces (`compile_elementwise`, `ulp_error`, `REFERENCES`) serve `tests/unit/test_vecmath.py` as well.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable

import llvmlite.binding as llvm
import torch
from aicc.backends.llvm.vecmath import BINARY, MAX_ULP, UNARY
from llvmlite import ir

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
) -> Kernel:
    """`name` of vecmath as a function of equally long 1-D contiguous tensors of `dtype`; length a multiple of `width`."""
    emitter = UNARY.get(name) or BINARY[name]
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


def _inverse_spacing() -> torch.Tensor:
    """1 / ulp for each of the 256 values of float32's exponent field, denormals and infinity like their neighbours."""
    field = torch.arange(256, dtype=torch.float64).clamp(1, 254)
    return torch.exp2(150 - field)


_INVERSE_SPACING = _inverse_spacing()
_LIMIT = 2.0**128


def ulp_error(got: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Error of float32 `got` against float64 `exact` in ulps of the rounded exact result; float64.

    Infinity counts as 2^128, so overflow is an ordinary error.  A NaN on one side only, and a zero of the wrong sign, are
    infinite errors.
    """
    bits = exact.float().view(torch.int32)
    inverse = _INVERSE_SPACING[bits.bitwise_right_shift(23).bitwise_and_(255)]
    error = got.double().clamp_(-_LIMIT, _LIMIT).sub_(exact.clamp(-_LIMIT, _LIMIT)).abs_().mul_(inverse)
    nan = torch.isnan(error)
    # Zeros of different sign are the only numbers whose patterns differ in the sign bit alone.
    error[((bits ^ got.view(torch.int32)) == -(1 << 31)) & ~nan] = torch.inf
    if nan.any():
        error[nan] = torch.where(torch.isnan(got[nan]) & torch.isnan(exact[nan]), 0.0, torch.inf).double()
    return error


def sweep(
    name: str, stride: int = 1, features: frozenset[str] = frozenset(), chunk: int = 1 << 16
) -> tuple[float, float, float]:
    """(largest error in ulps, its input, seconds per element) of unary `name` over every `stride`-th bit pattern."""
    kernel, reference = compile_elementwise(name, features=features), REFERENCES[name]
    worst, worst_input, elapsed, count = 0.0, 0.0, 0.0, 0
    steps = torch.arange(chunk, dtype=torch.int64) * stride
    for start in range(-(1 << 31), 1 << 31, chunk * stride):
        x = (steps + start).to(torch.int32).view(torch.float32)
        begin = time.perf_counter()
        got = kernel(x)
        elapsed += time.perf_counter() - begin
        count += chunk
        error = ulp_error(got, reference(x.double()))
        top = int(error.argmax())
        if float(error[top]) > worst:
            worst, worst_input = float(error[top]), float(x[top])
    return worst, worst_input, elapsed / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="functions (default: all that have a bound)")
    parser.add_argument("--stride", type=int, default=1, help="take every N-th input, N a power of two")
    parser.add_argument("--features", default="", help="comma-separated names handed to the emitters")
    options = parser.parse_args()
    features = frozenset(filter(None, options.features.split(",")))
    names = options.names or [name for name in UNARY if name in MAX_ULP]
    print(f"{'function':<12}{'max ulp':>9}  {'at':<24}{'bound':>6}{'ns/element':>12}")
    for name in names:
        worst, at, seconds = sweep(name, options.stride, features)
        print(f"{name:<12}{worst:>9.3f}  {at:<24.9g}{MAX_ULP.get(name, 0.5):>6}{seconds * 1e9:>12.2f}", flush=True)


if __name__ == "__main__":
    main()
