"""Largest error of the unary float32 functions of `backends/llvm/vecmath.py`, in ulps, over all 2^32 inputs.

    python benchmarks/ulp.py [--stride N] [--features avx512f] [name ...]                     # one after the other, printed as they come
    python benchmarks/ulp.py --all --jobs 16 --seconds 500 --json ulp.json [--part 0/2]       # every function, by 16 processes; goes on with ulp.json

(PYTHONPATH is the folder above the checkout.) Each function is compiled for this host, run over every float32 bit pattern (or every N-th), and
compared with torch's float64 function on the same inputs; the input of the largest error is evaluated once more with mpmath. With `--all`,
eager's own float32 function is measured beside it on every `EAGER_EVERY`-th block of inputs. When the time is up, a function that is not
through says on how many inputs it was measured, and the JSON which pieces of them are missing: the same command measures those.
`ulp_docs.py` makes docs/numerics.md from the JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import mpmath
import torch
from aicc.backends.llvm.vecmath import MAX_ULP, UNARY
from aicc.benchmarks.elementwise import REFERENCES, compile_elementwise, host_features

__all__ = ["Measured", "merged", "sweep", "ulp_error"]

PIECES = 256  # of the 2^32 inputs of a function: what a process takes at a time
CHUNK = 1 << 15  # inputs that are computed and compared together: they stay in the second-level cache
EAGER_EVERY = 16
MASKS = ("isnan", "isinf")
NO_BOUND = ("lgamma", "digamma")  # computed in float64 by the C library and rounded: as good as its float64, near the roots too


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


def plain_errors(got: torch.Tensor, exact: torch.Tensor) -> tuple[float, torch.Tensor] | None:
    """(largest error, errors in units of 2^23 ulps), as `ulp_error` in a quarter of its time; None unless all numbers are finite, no error is
    large and no zero has the wrong sign."""
    bits = exact.float().view(torch.int32)
    if int((bits ^ got.view(torch.int32)).amin()) == -(1 << 31):
        return None
    spacing = bits.bitwise_and_(0x7F800000).view(torch.float32).clamp_(2.0**-126, 2.0**127)  # a float with no mantissa: 2^23 ulps
    error = got.double().sub_(exact).abs_().div_(spacing)
    top = float(error.amax())
    return (top * 2.0**23, error) if top < 2.0**-16 else None


@dataclass(frozen=True)
class Measured:
    """One function on `inputs` inputs. Counts are of inputs where float32 and the rounded float64 result disagree in kind."""

    name: str
    inputs: int = 0
    worst: float = 0.0  # ulps
    at: float = 0.0
    nan: int = 0  # NaN on one side only
    infinity: int = 0  # infinite on one side only
    zero: int = 0  # zeros of different sign
    eager: float = 0.0  # largest error of eager's float32 function, ulps, where it agrees in kind
    eager_kind: int = 0  # inputs where eager's function disagrees in kind
    eager_inputs: int = 0
    seconds: float = 0.0  # of our kernel alone


def merged(a: Measured, b: Measured) -> Measured:
    """Both pieces of one function as one."""
    top = a if a.worst >= b.worst else b
    return Measured(a.name, a.inputs + b.inputs, top.worst, top.at, a.nan + b.nan, a.infinity + b.infinity, a.zero + b.zero,
                    max(a.eager, b.eager), a.eager_kind + b.eager_kind, a.eager_inputs + b.eager_inputs, a.seconds + b.seconds)


def sweep(name: str, stride: int = 1, features: frozenset[str] = frozenset(), first: int = -(1 << 31), end: int = 1 << 31,
          eager_every: int = 0) -> Measured:
    """Unary `name` over every `stride`-th bit pattern in [first, end), patterns taken as int32; CHUNK * stride divides the range."""
    kernel, reference = _kernel(name, features), REFERENCES[name]
    steps = torch.arange(CHUNK, dtype=torch.int64) * stride
    m = Measured(name)
    for i, start in enumerate(range(first, end, CHUNK * stride)):
        x = (steps + start).to(torch.int32).view(torch.float32)
        begin = time.perf_counter()
        got = kernel(x)
        took = time.perf_counter() - begin
        exact = reference(x.double())
        m = merged(m, replace(_compared(name, x, got, exact, m.worst), seconds=took))
        if eager_every and i % eager_every == 0:
            theirs = _compared(name, x, reference(x), exact, math.inf)
            m = replace(m, eager=max(m.eager, theirs.worst), eager_inputs=m.eager_inputs + CHUNK,
                        eager_kind=m.eager_kind + theirs.nan + theirs.infinity + theirs.zero)
    return m


@cache
def _kernel(name: str, features: frozenset[str]) -> Callable[..., torch.Tensor]:
    return compile_elementwise(name, features=features)


def _compared(name: str, x: torch.Tensor, got: torch.Tensor, exact: torch.Tensor, above: float) -> Measured:
    """A block of inputs. Where its largest error is not larger than `above`, its place is not looked for."""
    if name in MASKS:
        return Measured(name, CHUNK, nan=int((got != exact).sum()))
    plain = plain_errors(got, exact)
    if plain is not None:
        worst, errors = plain
        return Measured(name, CHUNK, worst, float(x[int(errors.argmax())]) if worst > above else 0.0)
    error = ulp_error(got, exact)
    rounded = exact.float()
    nan = got.isnan() != rounded.isnan()
    infinity = (got.isinf() != rounded.isinf()) & ~nan
    zero = (got == 0) & (rounded == 0) & (got.signbit() != rounded.signbit())
    error[nan | zero] = 0
    top = int(error.argmax())
    return Measured(name, CHUNK, float(error[top]), float(x[top]), int(nan.sum()), int(infinity.sum()), int(zero.sum()))


def exact_error(name: str, at: float) -> float:
    """Error at one input in ulps against mpmath with 60 digits; NaN where mpmath has no such function or the result is not finite."""
    functions: dict[str, Callable[[Any], Any]] = {
        "log2": lambda v: mpmath.log(v, 2), "exp2": lambda v: mpmath.power(2, v), "sigmoid": lambda v: 1 / (1 + mpmath.exp(-v)),
        "rsqrt": lambda v: 1 / mpmath.sqrt(v), "lgamma": lambda v: mpmath.log(abs(mpmath.gamma(v))), "reciprocal": lambda v: 1 / v}
    function = functions.get(name, getattr(mpmath, name, None))
    if function is None or not math.isfinite(at):
        return math.nan
    got = float(compile_elementwise(name)(torch.full((16,), at))[0])
    try:
        with mpmath.workdps(60):
            exact = function(mpmath.mpf(at))
            if not isinstance(exact, mpmath.mpf) or not mpmath.isfinite(exact) or not math.isfinite(got):
                return math.nan
            field = (int(torch.tensor(float(exact)).float().view(torch.int32)) >> 23) & 255
            return float(abs(mpmath.mpf(got) - exact) * mpmath.mpf(2) ** (150 - min(max(field, 1), 254)))
    except (ValueError, ZeroDivisionError, OverflowError):
        return math.nan


# -- every function, by many processes --------------------------------------------------------------------------------------


def _piece(name: str, piece: int, features: frozenset[str], until: float) -> Measured | None:
    """A piece of the inputs of `name`; None when the time is up."""
    torch.set_num_threads(1)
    if time.time() > until:
        return None
    width = (1 << 32) // PIECES
    first = -(1 << 31) + piece * width
    return sweep(name, 1, features, first, first + width, EAGER_EVERY)


def sweep_all(names: Iterable[str], jobs: int, seconds: float, features: frozenset[str],
              before: Iterable[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """Every function over all inputs, as far as the time goes; one row per function, as in the JSON. `before`: rows to go on with."""
    until = time.time() + seconds
    fields = Measured.__dataclass_fields__
    found = {row["name"]: Measured(**{k: v for k, v in row.items() if k in fields}) for row in before}
    missing = {row["name"]: list(row["missing"]) for row in before}
    names = list(names)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(_piece, name, piece, features, until): (name, piece)
                   for name in names for piece in missing.setdefault(name, list(range(PIECES)))}
        for done in as_completed(waiting):
            (name, piece), part = waiting[done], done.result()
            if part is not None:
                found[name] = merged(found[name], part) if name in found else part
                missing[name].remove(piece)
                if found[name].inputs == 1 << 32:
                    print(_line(asdict(found[name])), flush=True)
    rows: list[dict[str, Any]] = [asdict(found.get(name, Measured(name))) | {"missing": missing[name]}
                                  for name in dict.fromkeys([*names, *found])]
    for row in rows:
        row["exact"] = exact_error(row["name"], row["at"]) if row["inputs"] else math.nan
        row["bound"] = MAX_ULP.get(row["name"], 0.5)
    return rows


_HEAD = f"{'function':<12}{'max ulp':>9}  {'at':<24}{'bound':>6}{'ns/element':>12}{'kind':>6}{'eager ulp':>12}{'kind':>10}{'inputs':>8}"


def _line(row: dict[str, Any]) -> str:
    """A line under `_HEAD`."""
    bound = "-" if row["name"] in NO_BOUND else MAX_ULP.get(row["name"], 0.5)
    return (f"{row['name']:<12}{row['worst']:>9.3f}  {row['at']:<24.9g}{bound:>6}{row['seconds'] / max(1, row['inputs']) * 1e9:>12.2f}"
            f"{row['nan'] + row['infinity'] + row['zero']:>6}{row['eager']:>12.4g}{row['eager_kind']:>10}{row['inputs'] / 2**32:>8.1%}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="functions (default: all that have a bound; with --all every one)")
    parser.add_argument("--stride", type=int, default=1, help="take every N-th input, N a power of two")
    parser.add_argument("--features", default="", help="comma-separated names handed to the emitters")
    parser.add_argument("--all", action="store_true", help="all inputs of all functions, in parallel")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing after this long (with --all)")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th function from the i-th on (with --all)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    features = frozenset(filter(None, options.features.split(",")))
    print(_HEAD)
    if options.all:
        part, parts = map(int, options.part.split("/"))
        names = options.names or sorted(UNARY, key=lambda name: name in NO_BOUND)  # slow ones last
        before = json.loads(options.json.read_text())["rows"] if options.json is not None and options.json.exists() else []
        rows = sweep_all(names[part::parts], options.jobs, options.seconds, features, before)
        if options.json is not None:
            machine = {"processor": _processor(), "features": sorted(host_features() & {"avx2", "fma", "avx512f"}), "torch": torch.__version__}
            options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
        print(f"\n{_HEAD}  largest error again, by mpmath")
        for row in rows:
            print(f"{_line(row)}  {row['exact']:.4f}")
        return int(any(row["worst"] > row["bound"] and row["name"] not in NO_BOUND for row in rows))
    for name in options.names or [name for name in UNARY if name in MAX_ULP]:
        print(_line(asdict(sweep(name, options.stride, features))), flush=True)
    return 0


def _processor() -> str:
    """The model's name, as Linux says it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
