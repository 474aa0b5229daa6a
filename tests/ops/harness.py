"""One operator of OpInfo through `torch.compile(backend="aicc")`, compared with eager.

    outcome = check(find("softmax"), torch.float32, samples=2, backward=True)

An `Outcome` has a status:

    pass         every sample agrees (see `compare`), and at least one graph was compiled
    nograph      every sample agrees, but torch handed no graph to the compiler
    wrong        a result, its type, shape, or the state of an argument differs
    crash        the compiler raised (tests run strict); `declined` if it said that it does not support the graph
    hang         no result within the time limit
    eager        eager itself fails on every sample, or the operator has no samples of this type
    torch        it fails in the same way with torch's own "aot_eager" backend, and has no row in `known.py` yet
    known        differs, with a reason in `known.py`

Samples, types and tolerances are OpInfo's. A float result that misses them still agrees if each of the elements that miss is
nearer to the result in float64 than eager's is: rounding less often than eager is no fault. For the same reason results of 16 bits agree if they
do with `emulate_precision_casts`.
"""

from __future__ import annotations

import itertools
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("AICC_STRICT", "1")
os.environ["AICC_CACHE"] = "0"

import torch
from aicc.compiler.driver import Compilation, watching
from torch.testing._internal import common_methods_invocations, common_utils
from torch.testing._internal.common_device_type import toleranceOverride
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from .known import known

__all__ = ["DTYPES", "Outcome", "check", "every_op", "find", "label"]

DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64,
                                                      torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64,
                                                      torch.complex128)}
_TOLERANCES_OF = (None, "TestCommon", "TestInductorOpInfo", "TestDecomp", "TestUnaryUfuncs", "TestReductions")
"""The test classes of torch whose tolerances are taken: those that compare two implementations of an operator."""


# OpInfo seeds random operators inside the call, which breaks the graph; here `run` seeds before the call.
common_methods_invocations.wrapper_set_seed = lambda op, *args, **kwargs: op(*args, **kwargs)
torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0  # flushes the caches of the processor at every compilation
common_utils.extract_test_fn = lambda: None  # looks for a unittest among the callers of whoever takes samples, with their lines of source: 0.04 s each time
_CAPTURE = {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True}
"""Sizes that depend on data stay in one graph."""


@dataclass
class Outcome:
    """What came of one operator at one type."""

    op: str
    dtype: str
    status: str = "pass"
    detail: str = ""
    samples: int = 0
    graphs: int = 0
    kernels: int = 0
    externs: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


class Hang(Exception):
    """The time limit has passed."""


class Differs(Exception):
    """A result is not eager's."""


def label(op: OpInfo) -> str:
    """The operator's name, with the variant if it has one."""
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


def every_op() -> list[OpInfo]:
    return list(op_db)


def find(name: str) -> OpInfo:
    """The row of the database with this label. KeyError if there is none."""
    for op in op_db:
        if label(op) == name:
            return op
    raise KeyError(name)


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises Hang when the body takes longer (in Python code; native code is interrupted when it returns)."""
    def ring(*_: Any) -> None:
        raise Hang(f"no result in {seconds} s")
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check(op: OpInfo, dtype: torch.dtype, *, samples: int = 1, backward: bool = False, seconds: int = 60,
          dynamic: bool = False) -> Outcome:
    """Compiles the first `samples` samples of `op` and compares each with eager."""
    outcome = Outcome(label(op), str(dtype).removeprefix("torch."))
    allowed = op.supported_backward_dtypes("cpu") & op.supported_dtypes("cpu") if backward else op.supported_dtypes("cpu")
    if dtype not in allowed or (backward and not op.supports_autograd):
        outcome.status, outcome.detail = "eager", "not for this type"
        return outcome
    try:
        torch.manual_seed(0)
        with time_limit(seconds):
            given = list(itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=backward), samples))
    except Exception as e:
        outcome.status, outcome.detail = "eager", f"samples: {_line(e)}"
        return outcome
    for sample in given:
        _one(op, sample, dtype, backward, seconds, dynamic, outcome)
        if outcome.status not in ("pass", "eager"):
            break
    if outcome.status == "eager" and outcome.samples:  # the last one only
        outcome.status = "pass"
    if outcome.status == "pass" and not outcome.graphs:
        outcome.status = "nograph"
    if not given:
        outcome.status, outcome.detail = "eager", "no samples"
    return outcome


def _one(op: OpInfo, sample: SampleInput, dtype: torch.dtype, backward: bool, seconds: int, dynamic: bool, outcome: Outcome) -> None:
    run = _runner(op, sample, backward, dtype)
    arguments = (sample.input, sample.args, sample.kwargs)
    ours, theirs = tree_map(_copy, arguments), tree_map(_copy, arguments)  # operators may write to their arguments
    try:
        with time_limit(seconds):
            expected = run(lambda f: f, theirs)
    except Exception as e:
        outcome.status, outcome.detail = "eager", _line(e)
        return
    outcome.status, outcome.samples = "pass", outcome.samples + 1
    compiled: list[Compilation] = []
    try:
        with time_limit(seconds), watching(compiled=compiled.append), torch._dynamo.config.patch(**_CAPTURE):
            got = run(lambda f: _compile(f, "aicc", dynamic), ours)
        _note(outcome, compiled)
        compare(got, expected, tolerances(op, dtype), lambda: _in_f64(run, arguments, dtype), loose=_loose(outcome))
        compare(ours, theirs, tolerances(op, dtype), lambda: None, loose=_loose(outcome))
    except Hang as e:
        outcome.status, outcome.detail = "hang", _where(e)
    except Differs as e:
        if dtype in (torch.bfloat16, torch.float16) and _agrees_when_rounding(run, arguments, expected, op, dtype, seconds, dynamic):
            return
        outcome.status, outcome.detail = "wrong", f"{e}\n  sample: {_describe(sample)}"
    except Exception as e:
        outcome.status, outcome.detail = "declined" if "UnsupportedError" in str(e) else "crash", f"{_where(e)}\n  sample: {_describe(sample)}"
    if outcome.status == "pass":
        return
    name = outcome.dtype
    reason = known(outcome.op, "numerics", name) or (known(outcome.op, "declined", name) if outcome.status == "declined" else None)
    if reason is None and _fails_without_us(run, arguments, expected, op, dtype, seconds, dynamic):
        outcome.status, reason = "torch", known(outcome.op, "torch", name)
    if reason is not None:
        outcome.status, outcome.detail = "known", reason


def _runner(op: OpInfo, sample: SampleInput, backward: bool, dtype: torch.dtype) -> Callable[..., Any]:
    """`run(transform, arguments)`: the results of the transformed operator, and with `backward` the gradients of the arguments."""
    function = op.get_op()

    def weight(t: torch.Tensor) -> torch.Tensor:
        """A gradient to start from: numbers of `dtype`, the same when the operator runs in float64."""
        drawn = torch.randn(t.shape, dtype=torch.complex128 if t.is_complex() else torch.float64)
        return (drawn.to(dtype) if dtype.is_complex == t.is_complex() else drawn).to(t.dtype)

    def plain(x: Any, args: Any, kwargs: Any) -> Any:
        return function(x, *args, **kwargs)

    def run(transform: Callable[..., Any], arguments: Any) -> Any:
        torch.manual_seed(1)
        if not backward:
            with torch.no_grad():
                return _held(op, arguments, transform(plain)(*arguments))
        result = transform(plain)(*arguments)
        finished = sample.output_process_fn_grad(result)
        outputs = [t for t in tree_leaves(finished) if isinstance(t, torch.Tensor) and t.requires_grad]
        leaves = [t for t in tree_leaves(arguments) if isinstance(t, torch.Tensor) and t.requires_grad]
        torch.manual_seed(2)
        weights = [weight(t) for t in outputs]
        gradients = torch.autograd.grad(outputs, leaves, weights, allow_unused=True) if outputs else ()
        return result, gradients

    return run


_PLACES = {"sort": 0, "argsort": 0, "topk": 1, "kthvalue": 1}
"""Operators that say where in a row elements lie, and which argument behind the tensor is the row's dimension."""


def _held(op: OpInfo, arguments: Any, result: Any) -> Any:
    """Among equal elements the order is free unless `stable` is asked for: of the places, what lies there and that no two are the same are compared."""
    x, args, kwargs = arguments
    if op.name not in _PLACES or kwargs.get("stable") or x.dim() == 0:
        return result
    first = _PLACES[op.name]
    dim = kwargs.get("dim", args[first] if len(args) > first else -1)
    values, places = (x, result) if isinstance(result, torch.Tensor) else result
    wide = places if places.dim() == x.dim() else places.unsqueeze(dim)
    return values, x.gather(dim, wide), wide.sort(dim)[0].diff(dim=dim) > 0, torch.empty_like(places).zero_()


def _compile(function: Callable[..., Any], backend: str, dynamic: bool, **options: Any) -> Callable[..., Any]:
    """Random numbers are eager's (`fallback_random`), or there would be nothing to compare."""
    torch._dynamo.reset()
    given = {"fallback_random": True, **options} if backend == "aicc" else None
    return torch.compile(function, backend=backend, dynamic=dynamic, options=given)


def _agrees_when_rounding(run: Callable[..., Any], arguments: Any, expected: Any, op: OpInfo, dtype: torch.dtype, seconds: int, dynamic: bool) -> bool:
    """True if the results are eager's once 16-bit floats are rounded where eager rounds them: then nothing else was different."""
    try:
        with time_limit(seconds), torch._dynamo.config.patch(**_CAPTURE):
            got = run(lambda f: _compile(f, "aicc", dynamic, emulate_precision_casts=True), tree_map(_copy, arguments))
        compare(got, expected, tolerances(op, dtype), lambda: _in_f64(run, arguments, dtype))
    except Exception:
        return False
    return True


def _fails_without_us(run: Callable[..., Any], arguments: Any, expected: Any, op: OpInfo, dtype: torch.dtype, seconds: int, dynamic: bool) -> bool:
    """True if torch's own reference backend does not give eager's results either."""
    try:
        with time_limit(seconds), torch._dynamo.config.patch(**_CAPTURE):
            got = run(lambda f: _compile(f, "aot_eager", dynamic), tree_map(_copy, arguments))
        compare(got, expected, tolerances(op, dtype), lambda: None)
    except Exception:
        return True
    return False


def _note(outcome: Outcome, compiled: list[Compilation]) -> None:
    outcome.graphs += len(compiled)
    for c in compiled:
        outcome.kernels += c.stats["kernels"]
        outcome.externs += [e["target"] for e in c.stats["externs"]]
        outcome.reasons += [e["reason"] for e in c.stats["externs"]]


def _loose(outcome: Outcome) -> bool:
    return any(known(outcome.op, kind, outcome.dtype) is not None for kind in ("random", "undefined"))


def _in_f64(run: Callable[..., Any], arguments: Any, dtype: torch.dtype) -> Any:
    """Eager's results in float64, or None where the operator cannot."""
    if not (dtype.is_floating_point or dtype.is_complex) or dtype in (torch.float64, torch.complex128):
        return None
    double = torch.complex128 if dtype.is_complex else torch.float64

    def wide(x: Any) -> Any:
        if isinstance(x, torch.Tensor) and x.dtype == dtype:
            return x.detach().to(double).requires_grad_(x.requires_grad)
        return double if x is dtype else x

    try:
        return run(lambda f: f, tree_map(wide, tree_map(_copy, arguments)))
    except Exception:
        return None


# -- comparing --------------------------------------------------------------------------------------------------------


def tolerances(op: OpInfo, dtype: torch.dtype) -> dict[torch.dtype, tuple[float, float]]:
    """(rtol, atol) by element type, where OpInfo asks for more room than `torch.testing.assert_close` gives."""
    found: dict[torch.dtype, tuple[float, float]] = {}
    for d in op.decorators:
        inner = getattr(d, "decorators", [d])
        if getattr(d, "cls_name", None) not in _TOLERANCES_OF or getattr(d, "device_type", None) not in (None, "cpu"):
            continue
        for o in inner:
            if isinstance(o, toleranceOverride):
                for t, (atol, rtol) in o.d.items():
                    have = found.get(t, _default(t))
                    found[t] = (max(have[0], rtol), max(have[1], atol))
    return found


def _default(t: torch.dtype) -> tuple[float, float]:
    return torch.testing._comparison.default_tolerances(t)


def compare(got: Any, expected: Any, room: dict[torch.dtype, tuple[float, float]], truth: Callable[[], Any], *, loose: bool = False) -> None:
    """Raises Differs unless `got` has the structure, types, shapes and (unless `loose`) values of `expected`."""
    mine, shape = tree_flatten(got)
    theirs, want = tree_flatten(expected)
    if len(mine) != len(theirs):
        raise Differs(f"{shape} instead of {want}")
    exact: list[Any] | None = None
    for i, (g, e) in enumerate(zip(mine, theirs, strict=True)):
        if not isinstance(e, torch.Tensor):
            if not loose and g is not e and g != e and not (g != g and e != e):
                raise Differs(f"result {i}: {g!r} instead of {e!r}")
            continue
        if not isinstance(g, torch.Tensor) or (g.dtype, g.shape, g.layout) != (e.dtype, e.shape, e.layout):
            raise Differs(f"result {i}: {_type(g)} instead of {_type(e)}")
        if loose:
            continue
        rtol, atol = room.get(e.dtype, _default(e.dtype))
        try:
            torch.testing.assert_close(g.detach(), e.detach(), rtol=rtol, atol=atol, equal_nan=True)
        except AssertionError as error:
            exact = tree_leaves(truth()) if exact is None else exact
            if len(exact) != len(mine) or not _nearer(g, e, exact[i], rtol, atol):
                text = " ".join(str(error).split())
                raise Differs(f"result {i} of {len(mine)} {_type(e)}: {text[:300]}\n  got {_short(g)}\n  not {_short(e)}") from None


def _nearer(g: torch.Tensor, e: torch.Tensor, exact: Any, rtol: float, atol: float) -> bool:
    """True if every element of `g` that misses `e` is nearer to the exact value than `e` is."""
    if not isinstance(exact, torch.Tensor) or not (e.is_floating_point() or e.is_complex()) or exact.shape != e.shape:
        return False
    double = torch.complex128 if e.is_complex() else torch.float64
    g, e, exact = g.detach().to(double), e.detach().to(double), exact.detach().to(double)
    good = torch.isclose(g, e, rtol=rtol, atol=atol, equal_nan=True) | ((g - exact).abs() <= (e - exact).abs())
    return bool(good.all())


# -- telling ----------------------------------------------------------------------------------------------------------


def _copy(x: Any) -> Any:
    """A tensor of its own with the same values and strides."""
    if not isinstance(x, torch.Tensor):
        return x
    if x.layout != torch.strided or x.is_neg() or x.is_conj() or type(x) is not torch.Tensor:
        return x.detach().clone().requires_grad_(x.requires_grad)
    memory = x.detach().untyped_storage().clone()
    return torch.empty(0, dtype=x.dtype).set_(memory, x.storage_offset(), x.size(), x.stride()).requires_grad_(x.requires_grad)


def _type(x: Any) -> str:
    return f"{str(x.dtype)[6:]}{list(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__


def _short(t: torch.Tensor) -> str:
    return " ".join(str(t.detach()).split())[:200]


def _line(e: BaseException) -> str:
    return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}"


def _where(e: BaseException) -> str:
    """The message, and the innermost frame in aicc."""
    chain = [e]
    while (below := chain[-1].__cause__ or chain[-1].__context__) is not None and len(chain) < 20:
        chain.append(below)
    frames = [f for c in chain for f in traceback.extract_tb(c.__traceback__) if "/aicc/" in f.filename and "/tests/" not in f.filename]
    text = " ".join(str(e).split("Set TORCHDYNAMO_VERBOSE")[0].split())
    place = f"  at {frames[-1].filename.split('/aicc/')[-1]}:{frames[-1].lineno} {frames[-1].line}" if frames else ""
    return f"{type(e).__name__}: {text[:500]}\n{place}"


def _describe(sample: SampleInput) -> str:
    def show(x: Any) -> Any:
        return f"{_type(x)}{'' if x.layout != torch.strided or x.is_contiguous() else x.stride()}" if isinstance(x, torch.Tensor) else x
    return " ".join(str(tree_map(show, (sample.input, *sample.args, sample.kwargs))).split())[:400]
