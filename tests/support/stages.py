"""A PyTorch function through every level of the compiler, each compared with eager by the reference interpreter.

    program = capture(lambda x: x.softmax(-1), (torch.randn(3, 70),))
    check_levels(program, GENERIC)

Captured without Dynamo: AOTAutograd traces the function, which is what the backend sees too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from aicc import passes  # noqa: F401  (registers them)
from aicc.compiler.options import Options
from aicc.compiler.pipelines import pipeline
from aicc.frontend.decompositions import decomposition_table
from aicc.frontend.importer import import_graph
from aicc.ir import Operation, Target
from aicc.ir.interpreter import interpret
from aicc.ir.parser import parse_module
from aicc.ir.passes import PassContext, parse_pipeline, run_pipeline
from aicc.ir.printer import print_with_resources
from aicc.ir.verifier import verify
from functorch.compile import aot_function, make_boxed_func
from torch._subclasses import FakeTensorMode

GENERIC = Target()
AVX2 = Target(name="haswell", vector_bits=256)
AVX512 = Target(name="skylake-avx512", vector_bits=512, vector_registers=32)
CUDA = Target(kind="cuda", name="sm_90", capability=90, multiprocessors=132)
TARGETS = {"generic": GENERIC, "avx2": AVX2, "avx512": AVX512, "cuda": CUDA}
OPTIONS = Options()
EXACT_CASTS = Options(emulate_precision_casts=True)


# How far a level may be from f64, as a multiple of the element type's epsilon times the largest magnitude; eager's own error counts too.
EPSILON = {torch.float64: 2.3e-16, torch.float32: 1.2e-7, torch.float16: 9.8e-4, torch.bfloat16: 7.9e-3}
SLACK = 40


@dataclass(frozen=True)
class Program:
    """A captured graph as text (so that each use starts afresh), its arguments, and what eager gives for them."""

    text: str
    resources: dict[str, bytes]
    inputs: tuple[torch.Tensor, ...]
    symbols: dict[str, int]
    expected: tuple[torch.Tensor, ...]
    exact: tuple[torch.Tensor, ...]     # computed in f64

    def module(self) -> Operation:
        return parse_module(self.text, resources=self.resources)


def flat(results: Any) -> tuple[torch.Tensor, ...]:
    return tuple(torch.utils._pytree.tree_leaves(results))


def copied(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A copy with the same strides: sizes may be read off these."""
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype or x.dtype).copy_(x)


def widened(x: torch.Tensor) -> torch.Tensor:
    return copied(x, torch.float64) if x.is_floating_point() else x


def shaped(fn: Callable[..., Any], *shapes: Sequence[int], dtype: torch.dtype = torch.float32) -> Program:
    """The inference graph of `fn` on tensors that have no values, to be lowered: of tensors of gigabytes, as of any other."""
    with FakeTensorMode():
        return _imported(fn, [torch.empty(tuple(s), dtype=dtype) for s in shapes], dynamic=False)


def capture(fn: Callable[..., Any], args: Sequence[torch.Tensor], *, dynamic: bool = False, slack: float = SLACK) -> Program:
    """The inference graph of `fn` on `args`; with `dynamic`, sizes other than 0 and 1 become symbols.

    The yardstick in f64 is the imported graph itself, interpreted in f64; the graph is first compared with eager.
    """
    program = _imported(fn, args, dynamic)
    exact = tuple(interpret(program.module(), [widened(x) for x in program.inputs], precision=torch.float64))
    program = replace(program, exact=exact)
    compare(interpret(program.module(), [copied(x) for x in program.inputs]), program, "graph", slack)
    return program


def _imported(fn: Callable[..., Any], args: Sequence[torch.Tensor], dynamic: bool) -> Program:
    """What `capture` gives, but for the values in f64."""
    made: list[tuple[Operation, list[Any]]] = []

    def compiler(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        made.append((import_graph(gm), inputs))
        return make_boxed_func(gm.forward)

    torch._dynamo.reset()
    with torch.no_grad():
        expected = flat(fn(*[a.clone() for a in args]))
        aot_function(fn, compiler, inference_compiler=compiler, decompositions=decomposition_table(), dynamic=dynamic)(*args)
    (module, _), = made
    func = module.body.first
    verify(module)
    text, resources = print_with_resources(module, locations=False)
    assert func is not None
    order = [a["position"] for a in func["arg_attrs"]]
    inputs = tuple(args[i] for i in order)
    assert not func["symbol_args"]
    return Program(text, resources, inputs, {}, expected, ())


def lowered(program: Program, target: Target, upto: str = "tile", options: Options = OPTIONS) -> Operation:
    """The program's module after the stages up to `upto`, verified after every pass."""
    module = program.module()
    for stage in ("graph", "tensor", "tile"):
        run_pipeline(module, parse_pipeline(pipeline(stage, target, options)), PassContext(target))
        if stage == upto:
            break
    return module


def compare(got: Sequence[torch.Tensor], program: Program, what: str, slack: float = SLACK) -> None:
    """Raises AssertionError, naming the level and the result, when `got` is not what the program gives.

    Integers and bools agree exactly; floats have NaN and infinity at the same places, and elsewhere an error of at most four times eager's plus
    `slack` roundings of the largest magnitude involved.
    """
    assert len(got) == len(program.expected), f"{what}: {len(got)} results for {len(program.expected)}"
    for i, (g, e, x) in enumerate(zip(got, program.expected, program.exact, strict=True)):
        label = f"{what}, result {i} {e.dtype} {list(e.shape)}"
        assert g.dtype == e.dtype and g.shape == e.shape, f"{label}: got {g.dtype} {list(g.shape)}"
        if not e.is_floating_point():
            assert torch.equal(g, e), f"{label}:\n{g}\n{e}"
            continue
        g, e, x = g.double(), e.double(), x.double()
        finite = e.isfinite() & x.isfinite()
        odd = ~e.isfinite()
        assert torch.equal(g[odd].nan_to_num(7e77), e[odd].nan_to_num(7e77)), f"{label}: NaN or infinity:\n{g}\n{e}"
        if not bool(finite.any()):
            continue
        scale = max(float(x[finite].abs().max()), slack * 1e-6)  # what cancels to nothing came from values that were not small
        bound = 4 * (e - x).abs()[finite].max() + slack * EPSILON[program.expected[i].dtype] * scale + 1e-30
        worst = (g - x)[finite].abs().max()
        assert worst <= bound, f"{label}: error {worst:.3g} exceeds {bound:.3g} (largest magnitude {scale:.3g})\n{g}\n{e}"


def check_levels(program: Program, target: Target, *, options: Options = OPTIONS, levels: Sequence[str] = ("tensor", "tile"),
                 slack: float = SLACK) -> None:
    """Interprets the program at the given levels and compares each with eager."""
    for level in levels:
        module = lowered(program, target, level, options)
        try:
            got = interpret(module, [copied(x) for x in program.inputs], check=True)
            compare(got, program, level, slack)
        except Exception as e:
            e.add_note(f"at the {level} level for {target.name}; the graph is\n{program.text}")
            raise
