"""Random PyTorch programs, as source text.

Hypothesis draws a seed and a number of steps; a program of fewer steps is a prefix of that of more, so that shrinking the number shrinks the
program. (Drawing each choice by hypothesis itself gives mostly one-liners: half of what it tries is close to the simplest choice.)
Steps are made one after the other and run at once, so that each knows the shapes it can take. Values are *exact* when every level must
compute them bit for bit alike (small multiples of 1/8 under addition, maxima, moves): only those feed comparisons, argmax and other
discontinuous ops, where a rounding difference would change the result altogether.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st
from torch._higher_order_ops.scan import scan as torch_scan

SIZES = (1, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 17, 33, 65, 100)
MAX_ELEMENTS = 9000
LIMIT = 64.0  # exact values stay below, so that their sums are exact


@dataclass(frozen=True, repr=False)
class RandomProgram:
    """`source` defines f(x0, x1, ...); `inputs` are its arguments."""

    source: str
    inputs: tuple[torch.Tensor, ...]

    @property
    def fn(self) -> Callable[..., Any]:
        space: dict[str, Any] = {"torch": torch, "F": torch.nn.functional, "scan": scan}
        exec(self.source, space)
        return space["f"]

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """How hypothesis shows it: the source, and what the inputs look like."""
        printer.text(repr(self))

    def __repr__(self) -> str:
        shapes = ", ".join(f"{x.dtype} {list(x.shape)}" for x in self.inputs)
        return f"\n{self.source}# inputs: {shapes}\n"


@dataclass(frozen=True)
class Val:
    name: str
    tensor: torch.Tensor
    exact: bool

    @property
    def is_float(self) -> bool:
        return self.tensor.is_floating_point()

    @property
    def rank(self) -> int:
        return self.tensor.dim()

    @property
    def shape(self) -> list[int]:
        return list(self.tensor.shape)


def make_input(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    whole = torch.randint(-16, 17, shape, generator=g)
    if dtype == torch.bool:
        return whole > 0
    return (whole.double() / 8).to(dtype) if dtype.is_floating_point else whole.to(dtype)


def scan(step: Callable[..., Any], start: torch.Tensor, xs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's scan where it is compiled; in eager a loop of Python, where torch would compile something of its own."""
    if torch.compiler.is_compiling():
        return torch_scan(step, start, xs)
    made = []
    for x in xs:
        start, y = step(start, x)
        made.append(y)
    return start, torch.stack(made)


class _Drawer:
    def __init__(self, rng: Random, dtype: torch.dtype):
        self.rng, self.dtype = rng, dtype
        self.values: list[Val] = []
        self.lines: list[str] = []
        self.space: dict[str, Any] = {"torch": torch, "F": torch.nn.functional, "scan": scan}

    def pick(self, condition: Callable[[Val], bool] = lambda v: True) -> Val | None:
        found = [v for v in self.values if condition(v)]
        return self.rng.choice(found[-3:] if self.rng.random() < 0.6 else found) if found else None

    def integer(self, low: int, high: int) -> int:
        return self.rng.randint(low, high)

    def choose(self, items: Any) -> Any:
        return self.rng.choice(list(items))

    def add(self, text: str, exact: bool) -> None:
        """Runs a step and keeps its values; steps that make too much, or leave the exact range, are dropped."""
        try:
            made = eval(text, self.space)  # our own text
        except (RuntimeError, IndexError) as e:
            raise AssertionError(f"the generator made an impossible step: {text}: {e}\n" + "\n".join(self.lines)) from e
        several = isinstance(made, (tuple, list))
        results = list(made) if several else [made]
        if any(r.numel() > MAX_ELEMENTS for r in results):
            return
        if any(r.is_floating_point() and r.numel() and not bool((r.abs() < 1e6).all()) for r in results):
            return
        names = [f"v{len(self.values) + i}" for i in range(len(results))]
        self.lines.append(f"{', '.join(names)} = {text}")
        for name, r in zip(names, results):
            in_range = not r.numel() or r.dtype == torch.bool or bool((r.double().abs() <= LIMIT).all())
            self.values.append(Val(name, r, exact and in_range and (not r.is_floating_point() or r.numel() == 0 or bool(
                (r.double() * 64 == (r.double() * 64).round()).all()))))
            self.space[name] = r

    # -- steps

    def unary(self) -> None:
        v = self.pick(lambda v: v.is_float)
        if v is None:
            return
        smooth = ["torch.tanh({})", "torch.sigmoid({})", "torch.sin({})", "F.gelu({})", "F.silu({})", "torch.exp({}.clamp(max=3))", "{} * {} * 0.125",
                  "torch.rsqrt({} * {} + 1)", "torch.log1p({}.abs())", "torch.sqrt({}.abs() + 0.5)", "torch.erf({})", "{} / 3", "({} - 1) / ({}.abs() + 1)"]
        exact = ["-{}", "{}.relu()", "{}.abs()", "{} + 0.5", "{} * 2", "{}.clamp(-1, 1)", "1 - {}", "{} * 0.5"]
        text = self.choose(exact + smooth)
        self.add(text.replace("{}", v.name), v.exact and text in exact)

    def discontinuous(self) -> None:
        v = self.pick(lambda v: v.exact and v.tensor.dtype != torch.bool)
        if v is None:
            return
        text = self.choose(["{} > 0", "{} <= 1", "{} == 0", "{}.sign()", "{} != {}.flip(0)" if v.rank else "{} != 1", "{}.long()", "torch.where({} > 0, {}, -{})"]
                           + (["{}.floor()", "{}.round()", "{}.to(torch.bfloat16).to(torch.float64)"] if v.is_float else ["{} // 3", "{} % 5", "{} & 7"]))
        if "float64" in text and self.dtype != torch.float64:
            text = "{}.trunc()"
        self.add(text.replace("{}", v.name), True)

    def bools(self) -> None:
        v = self.pick(lambda v: v.tensor.dtype == torch.bool)
        if v is None:
            return
        text = self.choose(["~{}", "{}.to(" + str(self.dtype) + ")", "{}.long()", "{} | {}.flip(-1)" if v.rank else "~{}", "{}.any()", "{}.all()"])
        self.add(text.replace("{}", v.name), True)

    def binary(self) -> None:
        a = self.pick(lambda v: v.tensor.dtype != torch.bool)
        if a is None:
            return

        def fits(b: Val) -> bool:
            if b.tensor.dtype != a.tensor.dtype:
                return False
            try:
                return torch.broadcast_shapes(a.tensor.shape, b.tensor.shape).numel() <= MAX_ELEMENTS
            except RuntimeError:
                return False
        b = self.pick(fits)
        assert b is not None
        exact = ["{} + {}", "{} - {}", "torch.maximum({}, {})", "torch.minimum({}, {})", "{} * {}"]
        smooth = ["{} / ({}.abs() + 1)", "torch.where({0} > 0.1, {0}, {1})"] if a.is_float else []
        text = self.choose(exact + smooth)
        if "where" in text and not a.exact:
            text = "{} + {}"
        self.add(text.format(a.name, b.name), a.exact and b.exact and (text in exact or "where" in text))

    def mask(self) -> None:
        m = self.pick(lambda v: v.tensor.dtype == torch.bool)
        if m is None:
            return

        def fits(b: Val) -> bool:
            try:
                return b.is_float and torch.broadcast_shapes(m.tensor.shape, b.tensor.shape).numel() <= MAX_ELEMENTS
            except RuntimeError:
                return False
        a = self.pick(fits)
        if a is not None:
            b = self.pick(lambda v: fits(v) and v.shape in ([], a.shape)) or a
            self.add(f"torch.where({m.name}, {a.name}, {self.choose([b.name, '0.5', '-1.0'])})", a.exact and b.exact)

    def reduce(self) -> None:
        v = self.pick(lambda v: v.rank > 0 and v.tensor.numel() > 0)
        if v is None:
            return
        dims = tuple(sorted(self.rng.sample(range(v.rank), self.integer(1, v.rank))))
        keep = self.choose(["", ", keepdim=True"])
        if v.tensor.dtype == torch.bool:
            self.add(f"{v.name}.{self.choose(['any', 'all'])}({dims[0]}{keep})", True)
            return
        kinds = {"sum": True, "amax": True, "amin": True}
        if v.is_float:
            kinds |= {"mean": False, "logsumexp": False, "var": False}
        kind = self.choose(kinds)
        extra = ", correction=0" if kind == "var" else ""
        self.add(f"{v.name}.{kind}({dims}{extra}{keep})", v.exact and kinds[kind])

    def best(self) -> None:
        v = self.pick(lambda v: v.exact and v.rank > 0 and v.tensor.numel() > 0 and v.tensor.dtype != torch.bool)
        if v is not None:
            d = self.integer(0, v.rank - 1)
            self.add(f"{v.name}.{self.choose(['argmax', 'argmin', 'max', 'min'])}({d}{self.choose(['', ', keepdim=True'])})", True)

    def normalise(self) -> None:
        v = self.pick(lambda v: v.is_float and v.rank > 0)
        if v is None:
            return
        d = self.integer(0, v.rank - 1)
        last = v.shape[-1]
        options = [f"{v.name}.softmax({d})", f"{v.name}.log_softmax({d})"]
        if last > 0:
            options += [f"F.layer_norm({v.name}, ({last},))", f"F.rms_norm({v.name}, ({last},), eps=1e-5)"]
        self.add(self.choose(options), False)

    def scan(self) -> None:
        v = self.pick(lambda v: v.rank > 0 and v.tensor.dtype != torch.bool)
        if v is not None:
            self.add(f"{v.name}.cumsum({self.integer(0, v.rank - 1)})", v.exact)

    def loop(self) -> None:
        """A scan along the first dimension, from the last slice or from the first, on numbers that stay bounded. torch wants the carried value's strides
        to stay, and has several for dimensions of size one: such tensors are left out."""
        v = self.pick(lambda v: v.is_float and v.rank > 0 and v.tensor.is_contiguous() and v.tensor.numel() > 0 and 1 not in v.shape)
        if v is None:
            return
        step = self.choose(["torch.tanh(c + x)", "c * 0.5 + x", "torch.where(x > c, x, c * 0.5)", "c + x * 0.125"])
        made = self.choose(["c * x", "x - c", "c + 1", "(c - x).abs().sum()"])
        inputs = self.choose([v.name, v.name, f"{v.name}.flip(0)"])
        self.add(f"scan(lambda c, x: ({step}, {made}), torch.zeros_like({v.name}[{self.choose([0, -1])}]) + 0.5, {inputs})", False)

    def view(self) -> None:
        v = self.pick()
        if v is None:
            return
        r, shape, n = v.rank, v.shape, v.name
        options = [f"{n}[None]", f"{n}.reshape(-1)" if v.tensor.numel() else f"{n}[None]"]
        if r:
            d = self.integer(0, r - 1)
            perm = self.rng.sample(range(r), r)
            options += [f"{n}.permute({', '.join(map(str, perm))})", f"{n}.flip({d})", f"{n}.unsqueeze({d})", f"{n}.transpose(0, {d})"]
            step = self.integer(1, 3)
            start = self.integer(0, max(0, shape[d] - 1))
            index = ", ".join([":"] * d + [f"{start}::{step}"])
            options += [f"{n}[{index}]", f"F.pad({n}, (1, 2))" if v.tensor.dtype != torch.bool else f"{n}.flip({d})",
                        f"{n}.roll({self.integer(-3, 3)}, {d})", f"torch.cat([{n}, {n}.flip({d})], {d})", f"torch.stack([{n}, {n}], {d})"]
            if shape[d] > 0:
                options += [f"{n}.select({d}, {self.integer(0, shape[d] - 1)})"]
            if shape[d] == 1:
                options += [f"{n}.expand({', '.join(str(self.choose([2, 5])) if i == d else '-1' for i in range(r))})", f"{n}.squeeze({d})"]
            if r >= 2 and d < r - 1 and v.tensor.numel():
                options += [f"{n}.flatten({d}, {d + 1})"]
            factors = [k for k in range(2, 9) if shape[d] and shape[d] % k == 0]
            if factors:
                k = self.choose(factors)
                options += [f"{n}.unflatten({d}, ({k}, {shape[d] // k}))"] * 2
            if v.tensor.numel():
                flat = [v.tensor.numel()]
                for k in (2, 3, 2, 5):
                    if flat[-1] % k == 0 and self.rng.random() < 0.5:
                        flat = [*flat[:-1], k, flat[-1] // k]
                options += [f"{n}.reshape({', '.join(map(str, flat))})"] * 2
            if r == 2 and v.tensor.dtype != torch.bool:
                options += [f"{n}.tril()", f"{n}.triu(1)"]
        self.add(self.choose(options), v.exact)

    def join(self) -> None:
        a = self.pick(lambda v: v.rank > 0)
        if a is None:
            return
        d = self.integer(0, a.rank - 1)

        def fits(b: Val) -> bool:
            return b.rank == a.rank and b.tensor.dtype == a.tensor.dtype and all(x == y for i, (x, y) in enumerate(zip(a.shape, b.shape)) if i != d)
        b = self.pick(fits)
        assert b is not None
        self.add(f"torch.cat([{a.name}, {b.name}], {d})", a.exact and b.exact)

    def matmul(self) -> None:
        a = self.pick(lambda v: v.is_float and v.rank >= 2)
        if a is None:
            return

        def fits(b: Val) -> bool:
            return b.tensor.dtype == a.tensor.dtype and b.rank >= 2 and b.shape[-2] == a.shape[-1] and (
                b.rank == 2 or b.shape[:-2] == a.shape[:-2])
        b = self.pick(fits)
        option = self.choose(["self", "left", "mv", "other"])
        if option == "other" and b is not None:
            self.add(f"({a.name} * 0.25) @ {b.name}", False)
        elif option == "mv":
            self.add(f"{a.name} @ {a.name}.flatten(0, -2)[0]" if a.tensor.numel() else f"{a.name} @ {a.name}.transpose(-1, -2)", False)
        elif option == "left":
            self.add(f"{a.name}.transpose(-1, -2) @ {a.name}", False)
        else:
            self.add(f"{a.name} @ {a.name}.transpose(-1, -2)", False)

    def index(self) -> None:
        v = self.pick(lambda v: v.rank > 0 and v.tensor.numel() > 0)
        i = self.pick(lambda v: v.tensor.dtype == torch.int64 and 0 < v.tensor.numel() <= 40)
        if v is None or i is None:
            return
        d = self.integer(0, v.rank - 1)
        size, n = v.shape[d], v.name
        flat = f"({i.name}.reshape(-1) % {size})"
        options = [f"{n}.index_select({d}, {flat})"]
        if d == 0:
            options += [f"{n}[{i.name} % {size}]"] if i.rank else []  # torch reads a 0-d index on the host
            if v.tensor.dtype != torch.bool:
                options += [f"{n}.index_put(({flat},), {n}[{flat}] + 1, accumulate=True)", f"torch.zeros_like({n}).index_add(0, {flat}, {n}[{flat}])"]
        if i.rank == v.rank and all(x <= y for x, y in zip(i.shape, v.shape)):
            options += [f"{n}.gather({d}, {i.name} % {size})"]
            if v.tensor.dtype != torch.bool:
                region = ", ".join(f":{x}" for x in i.shape)
                options += [f"{n}.scatter_add({d}, {i.name} % {size}, {n}[{region}])"]
        if v.rank == 2 and d == 0:
            options += [f"F.embedding({i.name} % {size}, {n})"]
        self.add(self.choose(options), v.exact)


STEPS = (["unary"] * 4 + ["binary"] * 5 + ["view"] * 6 + ["reduce"] * 4 + ["normalise"] * 2 + ["matmul"] * 2 + ["discontinuous"] * 2 + ["mask"] * 2
         + ["bools", "best", "scan", "join", "index", "index", "loop"])


def random_program(seed: int, steps: int) -> RandomProgram:
    """A program of about `steps` steps on one to three inputs; it returns what no step reads, and one more of its values."""
    rng = Random(seed)
    dtype = rng.choice([torch.float32, torch.float32, torch.float64])
    d = _Drawer(rng, dtype)
    inputs: list[torch.Tensor] = []
    shape: tuple[int, ...] = ()
    for k in range(rng.randint(1, 3)):
        if k == 0 or rng.random() < 0.3:
            shape = tuple(0 if rng.random() < 0.02 else rng.choice(SIZES) for _ in range(rng.randint(1, 4)))
            while torch.Size(shape).numel() > MAX_ELEMENTS // 2:
                shape = shape[1:]
        elif shape and rng.random() < 0.6:  # broadcasts with the last
            shape = tuple(1 if rng.random() < 0.4 else s for s in shape)[rng.randint(0, len(shape) - 1):]
        x = make_input(shape, rng.choice([dtype, dtype, dtype, torch.int64]) if k else dtype, seed + k)
        x = rng.choice(LAYOUTS)(x)
        inputs.append(x)
        name = f"v{k}"
        d.values.append(Val(name, x, True))
        d.space[name] = x
    tries = 0
    while len(d.lines) < steps and tries < 4 * steps:
        tries += 1
        getattr(d, rng.choice(STEPS))()
    made = d.values[len(inputs):] or d.values
    read = " ".join(line.partition("=")[2] for line in d.lines)
    leaves = [v.name for v in made if not re.search(rf"\b{v.name}\b", read)]
    results = list(dict.fromkeys([*leaves[-4:], Random(seed).choice([v.name for v in made])]))
    args = ", ".join(f"v{k}" for k in range(len(inputs)))
    source = f"def f({args}):\n" + "".join(f"    {line}\n" for line in d.lines) + f"    return {', '.join(f'{r} + 0' if r in args else r for r in results)},\n"
    return RandomProgram(source, tuple(inputs))


LAYOUTS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda x: x, lambda x: x, lambda x: x,
    lambda x: x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() else x,
    lambda x: torch.stack([x, x], -1)[..., 0],
)
"""Memory layouts of inputs: mostly contiguous, sometimes transposed or with gaps."""


def random_programs(most: int = 14) -> st.SearchStrategy[RandomProgram]:
    """Programs of up to `most` steps."""
    return st.builds(random_program, st.integers(0, 1 << 40), st.integers(1, most))
