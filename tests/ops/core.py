"""The core ATen operator set (`torch.Tag.core`), each operator compiled on its own: which need no call to ATen?

    for op, calls in collect().items():
        rows = [compile_call(c) for c in calls]

The calls are real ones: what eager dispatches while it runs OpInfo's samples, forward and backward, one for each combination of
element types, ranks and other arguments (at most `PER_OP` for an operator). Operators that eager never dispatches, because it has
a fused or composite form of them, have calls written down in `BY_HAND`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("AICC_STRICT", "1")
os.environ["AICC_CACHE"] = "0"

import torch
from aicc.compiler.driver import Compilation, watching
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .harness import Differs, compare, every_op, time_limit
from .reasons import class_of

__all__ = ["Call", "CoreRow", "collect", "compile_call", "core_overloads", "measure"]

PER_OP = 4
TYPES = (torch.float32, torch.int64, torch.bool, torch.bfloat16, torch.complex64)
_NUMBERS_OF_TENSORS = ("sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "sym_is_contiguous")
"""Operators that compute sizes: they never reach a graph as tensor operators."""


@dataclass(frozen=True)
class Call:
    """One call of an operator: tensors are copies of what eager gave."""

    op: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(hash=False)

    @property
    def complex(self) -> bool:
        """True if complex numbers go in or come out."""
        given = tree_leaves((self.args, self.kwargs))
        return any((isinstance(x, torch.Tensor) and x.is_complex()) or isinstance(x, complex)
                   or (isinstance(x, torch.dtype) and x.is_complex) for x in given)


@dataclass
class CoreRow:
    """What came of one core operator. `reasons` has the class and text of each call that is not native."""

    op: str
    calls: int = 0
    native: int = 0
    complex_calls: int = 0
    complex_native: int = 0
    failures: list[str] = field(default_factory=list)
    reasons: list[tuple[str, str]] = field(default_factory=list)

    @property
    def status(self) -> str:
        """'native', 'no calls', 'fails', or the class of the first reason; calls with complex numbers do not count."""
        if self.failures:
            return "fails"
        if not self.calls:
            return "no calls"
        return "native" if self.native == self.calls else self.reasons[0][0]


def core_overloads() -> list[OpOverload]:
    """Every functional tensor operator of the core set, in order of their names."""
    found = []
    for name in sorted(dir(torch.ops.aten)):
        packet = getattr(torch.ops.aten, name)
        if not isinstance(packet, torch._ops.OpOverloadPacket) or name in _NUMBERS_OF_TENSORS:
            continue
        for overload in packet.overloads():
            op = getattr(packet, overload)
            if torch.Tag.core in op.tags and not op._schema.is_mutable:
                found.append(op)
    return found


# -- calls ------------------------------------------------------------------------------------------------------------


class _Recorder(TorchDispatchMode):
    """Notes the calls of the wanted operators as they pass by, one for each signature."""

    def __init__(self, wanted: set[OpOverload]):
        super().__init__()
        self.wanted = wanted
        self.calls: dict[OpOverload, dict[str, Call]] = {op: {} for op in wanted}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = self.calls.get(func)
        if made is not None and len(made) < PER_OP:
            made.setdefault(_signature((args, kwargs)), Call(func, *_copied((args, kwargs))))
        return func(*args, **kwargs)


def _copied(tree: Any) -> Any:
    leaves, spec = tree_flatten(tree)
    return tree_unflatten([x.detach().clone() if isinstance(x, torch.Tensor) else x for x in leaves], spec)


def _signature(tree: Any) -> str:
    def show(x: Any) -> Any:
        return (str(x.dtype), x.dim(), 0 in x.shape) if isinstance(x, torch.Tensor) else x if isinstance(x, (bool, str)) else type(x)
    return str([show(x) for x in tree_leaves(tree)])


def collect(samples: int = 3) -> dict[OpOverload, list[Call]]:
    """The calls of each core operator, from the first `samples` samples of every operator of OpInfo at each of `TYPES`."""
    recorder = _Recorder(set(core_overloads()))
    for dtype in TYPES:
        for op in every_op():
            backward = dtype == torch.float32 and op.supports_autograd
            if dtype not in op.supported_dtypes("cpu"):
                continue
            try:
                torch.manual_seed(0)
                given = list(itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=backward), samples))
            except Exception:
                continue  # eager has no such samples
            for sample in given:
                try:
                    with time_limit(20), recorder:
                        result = op.op(sample.input, *sample.args, **sample.kwargs)
                        if backward:
                            roots = [t for t in tree_leaves(sample.output_process_fn_grad(result))
                                     if isinstance(t, torch.Tensor) and t.requires_grad]
                            torch.autograd.backward(roots, [torch.ones_like(t) for t in roots])
                except Exception:
                    continue
    calls = {op: list(made.values()) for op, made in recorder.calls.items()}
    for op, written in BY_HAND.items():
        if not calls[op]:
            torch.manual_seed(0)
            calls[op] = [Call(op, *arguments) for arguments in written()]
    for op, written in BESIDE.items():
        torch.manual_seed(0)
        calls[op] += [Call(op, *arguments) for arguments in written()]
    return {op: calls[op] for op in core_overloads()}


def _r(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def _ranks(rows: int, columns: int) -> torch.Tensor:
    """Each row in an order of its own, without equal elements: among those, eager's choice is free."""
    return torch.stack([torch.randperm(columns) for _ in range(rows)])


aten = torch.ops.aten
BY_HAND: dict[OpOverload, Callable[[], list[tuple[tuple[Any, ...], dict[str, Any]]]]] = {
    aten._native_batch_norm_legit.no_stats: lambda: [((_r(2, 3, 4, 4), _r(3), _r(3), True, 0.1, 1e-5), {})],
    aten._native_batch_norm_legit_no_training.default: lambda: [((_r(2, 3, 4, 4), _r(3), _r(3), _r(3), _r(3).abs(), 0.1, 1e-5), {})],
    aten._adaptive_avg_pool2d_backward.default: lambda: [((_r(2, 3, 3, 2), _r(2, 3, 7, 5)), {})],
    aten.adaptive_avg_pool1d.default: lambda: [((_r(2, 3, 7), [o]), {}) for o in (1, 3, 7)],
    aten.avg_pool1d.default: lambda: [((_r(2, 3, 7), [3], [2], [1]), {})],
    aten.any.dims: lambda: [((_r(3, 4) > 0, [0, 1]), {})],
    aten.var.dim: lambda: [((_r(3, 4), [1]), {})],
    aten.fmod.Scalar: lambda: [((_r(3, 4), 0.7), {}), ((torch.arange(6), 4), {})],
    aten.div.Scalar_mode: lambda: [((_r(3, 4), 0.7), {"rounding_mode": m}) for m in (None, "floor", "trunc")],
    **{getattr(aten, f"bitwise_{n}").Scalar: lambda: [((torch.arange(6), 5), {}), ((torch.arange(6) > 2, True), {})]
       for n in ("and", "or", "xor")},
    aten.reflection_pad2d.default: lambda: [((_r(1, 2, 5, 6), [1, 2, 0, 3]), {})],
    aten.reflection_pad3d.default: lambda: [((_r(1, 2, 4, 5, 6), [1, 2, 0, 3, 1, 1]), {})],
    aten.replication_pad3d.default: lambda: [((_r(1, 2, 4, 5, 6), [1, 2, 0, 3, 1, 1]), {})],
    aten._softmax.default: lambda: [((_r(3, 4), 1, False), {})],
    aten._log_softmax.default: lambda: [((_r(3, 4), 1, False), {})],
    aten.native_dropout.default: lambda: [((_r(3, 4), 0.5, True), {}), ((_r(3, 4), 0.5, False), {})],
    aten.empty.memory_format: lambda: [(([3, 4],), {})],
    aten.empty_strided.default: lambda: [(([3, 4], [4, 1]), {})],
    aten.full.default: lambda: [(([3, 4], 2.5), {})],
    aten.full_like.default: lambda: [((_r(3, 4), 2.5), {})],
    aten.scalar_tensor.default: lambda: [((2.5,), {})],
    aten.copy.default: lambda: [((_r(3, 4), _r(4)), {})],
    aten.fill.Scalar: lambda: [((_r(3, 4), 2.5), {})],
    aten.rand.default: lambda: [(([3, 4],), {})],
    aten.randn.default: lambda: [(([3, 4],), {})],
    aten.randperm.default: lambda: [((7,), {})],
    aten.clone.default: lambda: [((_r(3, 4),), {})],
    aten.slice_scatter.default: lambda: [((_r(5, 4), _r(2, 4), 0, 1, 5, 2), {})],
    aten.select_scatter.default: lambda: [((_r(5, 4), _r(4), 0, 2), {})],
    aten.scatter.src: lambda: [((_r(3, 4), 1, torch.tensor([[0, 2]]), _r(1, 2)), {})],
    aten.scatter.value: lambda: [((_r(3, 4), 1, torch.tensor([[0, 2]]), 2.0), {})],
    aten.scatter_add.default: lambda: [((_r(3, 4), 1, torch.tensor([[0, 2, 2]]), _r(1, 3)), {})],
    aten.scatter_reduce.two: lambda: [((_r(3, 4), 1, torch.tensor([[0, 2, 2]]), _r(1, 3), k), {"include_self": s})
                                      for k in ("sum", "prod", "mean", "amax", "amin") for s in (True, False)],
    aten.index_put.default: lambda: [((_r(3, 4), [torch.tensor([0, 2])], _r(2, 4), a), {}) for a in (False, True)],
    aten.masked_scatter.default: lambda: [((_r(3, 4), torch.rand(3, 4) > 0.5, _r(12)), {})],
    aten.upsample_nearest2d.vec: lambda: [((_r(1, 2, 3, 4), [6, 7], None), {}), ((_r(1, 2, 3, 4), None, [2.0, 1.5]), {})],
    aten.upsample_bilinear2d.vec: lambda: [((_r(1, 2, 3, 4), [6, 7], False, None), {}), ((_r(1, 2, 3, 4), [6, 7], True, None), {})],
    aten.grid_sampler_2d.default: lambda: [((_r(1, 2, 3, 4), torch.rand(1, 5, 6, 2) * 2 - 1, m, p, a), {})
                                           for m in (0, 1, 2) for p in (0, 1, 2) for a in (False, True)],
    aten.native_layer_norm_backward.default: lambda: [(
        (_r(3, 4), x := _r(3, 4), [4], x.mean(1, True), x.std(1, keepdim=True).reciprocal(), _r(4), _r(4), [True] * 3), {})],
    aten.native_group_norm_backward.default: lambda: [(
        (_r(2, 4, 5), _r(2, 4, 5), _r(2, 2), _r(2, 2).abs(), _r(4), 2, 4, 5, 2, [True] * 3), {})],
    aten.col2im.default: lambda: [((_r(1, 12, 6), [3, 4], [2, 2], [1, 1], [0, 0], [1, 1]), {})],
    aten.embedding_dense_backward.default: lambda: [((_r(3, 4), torch.tensor([0, 2, 2]), 5, -1, False), {}),
                                                    ((_r(3, 4), torch.tensor([0, 2, 2]), 5, 0, True), {})],
}

BESIDE: dict[OpOverload, Callable[[], list[tuple[tuple[Any, ...], dict[str, Any]]]]] = {
    aten.topk.default: lambda: [((_r(3, 1000), 1), {}), ((_r(3, 1000), 8), {}), ((_r(2, 3, 2000), 64, -1, False), {}),
                                ((_ranks(4, 700), 5), {}), ((_ranks(3, 250).bfloat16(), 8), {}), ((_r(3, 1000), 200), {})],
    aten.sort.default: lambda: [((_r(3, 1000),), {}), ((_ranks(4, 700), 0, True), {})],
}
"""Calls besides those of OpInfo, whose samples have five elements: what is compiled differs with the length of the rows."""


# -- compiling ---------------------------------------------------------------------------------------------------------

_ONE_RESULT = (aten._embedding_bag.default,)
"""Operators whose other results eager leaves uninitialised where its own backward does not need them."""

_FREE_PLACES = (aten.topk.default,)
"""Operators that may take any of several equal elements: what lies at the places that they give is compared."""


def compile_call(call: Call, seconds: int = 60) -> tuple[list[dict[str, str]], str]:
    """(the ATen calls left in the compiled graph, what went wrong: empty if the result is eager's)."""
    leaves, spec = tree_flatten((call.args, call.kwargs))
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]

    def function(*given: torch.Tensor) -> Any:
        rest = iter(given)
        args, kwargs = tree_unflatten([next(rest) if isinstance(x, torch.Tensor) else x for x in leaves], spec)
        made = call.op(*args, **kwargs)
        if call.op in _FREE_PLACES:
            return made[0], args[0].gather(args[2] if len(args) > 2 else -1, made[1])
        return made[0] if call.op in _ONE_RESULT else made

    def exact() -> Any:
        return function(*[t.double() if t.dtype in (torch.bfloat16, torch.float16, torch.float32) else t for t in tensors])

    compiled: list[Compilation] = []
    try:
        with time_limit(seconds), torch.no_grad(), watching(compiled=compiled.append), torch._dynamo.config.patch(
                capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
            torch.manual_seed(1)
            expected = function(*[t.clone() for t in tensors])
            torch._dynamo.reset()
            torch.manual_seed(1)
            got = torch.compile(function, backend="aicc", dynamic=False, options={"fallback_random": True})(*[t.clone() for t in tensors])
        compare(got, expected, {torch.float32: (1e-4, 1e-4)}, exact, loose=call.op._schema.name.startswith("aten::empty"))
    except Differs as e:
        return [], f"differs: {e}"
    except Exception as e:
        return [], f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}"
    return [x for c in compiled for x in c.stats["externs"]], ""


def measure(calls: dict[OpOverload, list[Call]]) -> Iterator[CoreRow]:
    """One row per operator. Calls with complex numbers are counted apart: aicc has no complex arithmetic of its own."""
    for op, given in calls.items():
        row = CoreRow(str(op).removeprefix("aten."))
        for call in given:
            externs, wrong = compile_call(call)
            if call.complex:
                row.complex_calls += 1
                row.complex_native += not externs and not wrong
            else:
                row.calls += 1
                row.native += not externs and not wrong
                row.reasons += [(class_of(e["target"], e["reason"]), f"{e['target'].removeprefix('aten.')}: {e['reason']}") for e in externs]
            if wrong:
                row.failures.append(wrong)
        yield row
