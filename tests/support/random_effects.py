"""Random PyTorch programs with everything that a whole model may do beside computing: buffers, writes into inputs and buffers (through views too),
results that share memory, 16-bit floats, sizes of 0, 1 and 2.

    program = random_effects(seed, steps)        # program.module(): an nn.Module; program.arguments()
    program.expected(torch.float64)              # eager: results, arguments and buffers afterwards, who shares memory with whom

The steps are those of `random_programs`; between them stand writes. A value is stale once memory that it may share is written: it is read no more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st

from .random_programs import LAYOUTS, STEPS, Val, _Drawer, make_input, scan

TINY = (0, 1, 1, 2, 2, 3, 5, 8, 17, 33)
DTYPES = (torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
EXACT_16 = 8.0  # multiples of 1/8 up to this are exact in bf16, sums of a few of them too

Outcome = tuple[list[torch.Tensor], list[tuple[int, int]]]
"""Results, then arguments and buffers afterwards; and which pairs of these share memory."""


class _Module(torch.nn.Module):
    def __init__(self, fn: Callable[..., Any], buffers: Sequence[torch.Tensor]):
        super().__init__()
        self.fn = fn
        for i, b in enumerate(buffers):
            self.register_buffer(f"b{i}", b)

    def forward(self, *args: torch.Tensor) -> Any:
        return self.fn(*self.buffers(), *args)


@dataclass(frozen=True, repr=False)
class EffectProgram:
    """`source` defines f(b0, ..., x0, ...): buffers, then arguments."""

    source: str
    buffers: tuple[torch.Tensor, ...]
    inputs: tuple[torch.Tensor, ...]
    dtype: torch.dtype

    def module(self, dtype: torch.dtype | None = None) -> torch.nn.Module:
        """A fresh module; with `dtype`, the program in that float type."""
        source = self.source if dtype is None else self.source.replace(str(self.dtype), str(dtype))
        space: dict[str, Any] = {"torch": torch, "F": torch.nn.functional, "scan": scan}
        exec(source, space)
        return _Module(space["f"], [_fresh(b, dtype) for b in self.buffers]).eval()

    def arguments(self, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        return [_fresh(x, dtype) for x in self.inputs]

    def outcome(self, call: Callable[..., Any], module: torch.nn.Module, arguments: list[torch.Tensor]) -> Outcome:
        """Runs `call` (the module, or the module compiled) once."""
        with torch.no_grad():
            results = list(call(*arguments))
        values = [*results, *arguments, *module.buffers()]
        shared = [(i, j) for j in range(len(results)) for i in (*range(j), *range(len(results), len(values))) if _share(values[i], results[j])]
        return [v.detach().clone() for v in values], shared

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    def __repr__(self) -> str:
        def shown(xs: Sequence[torch.Tensor]) -> str:
            return ", ".join(f"{x.dtype} {list(x.shape)} strides {list(x.stride())}" for x in xs)
        return f"\n{self.source}# buffers: {shown(self.buffers)}\n# inputs: {shown(self.inputs)}\n"


def _fresh(x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    wanted = dtype if dtype is not None and x.is_floating_point() else x.dtype
    return torch.empty_strided(x.shape, x.stride(), dtype=wanted).copy_(x)


def _share(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.numel() > 0 and b.numel() > 0 and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


class _Effects(_Drawer):
    """Adds writes; `owner` maps a value's storage to the names of all values that share it."""

    def __init__(self, rng: Random, dtype: torch.dtype, roots: Sequence[str]):
        super().__init__(rng, dtype)
        self.roots = roots

    def add(self, text: str, exact: bool) -> None:
        before = len(self.values)
        super().add(text, exact)
        for i in range(before, len(self.values)):
            v = self.values[i]
            if v.exact and v.is_float and self.dtype.itemsize == 2 and not _exact_in_16(v.tensor):
                self.values[i] = Val(v.name, v.tensor, False)

    def write(self) -> None:
        """Changes the memory of an argument or buffer, whole or through a view."""
        target = self.pick(lambda v: v.is_float and any(_share(v.tensor, self.space[r]) for r in self.roots) and _writable(v.tensor))
        if target is None:
            return

        def fits(v: Val) -> bool:
            try:
                return v.tensor.dtype == target.tensor.dtype and torch.broadcast_shapes(v.tensor.shape, target.tensor.shape) == target.tensor.shape
            except RuntimeError:
                return False
        source = self.pick(lambda v: fits(v) and v.exact)
        forms = ["{t}.mul_(0.5)", "{t}.add_(1)", "{t}.neg_()", "{t}.zero_()"]
        if source is not None:
            forms += ["{t}.add_({s}.clone())", "{t}.copy_({s}.clone())", "{t}.sub_({s} * 2)"] * 2
        if target.rank:
            n = target.shape[0]
            forms += [f"{{t}}[{self.integer(0, n)}:].fill_(2)", "{t}[..., ::2].mul_(2)"]
        text = self.choose(forms).format(t=target.name, s=source.name if source is not None else "")
        eval(text, self.space)
        self.lines.append(text)
        exact = target.exact and _exact_in_16(target.tensor) and (source is None or source.exact)
        kept = []
        for v in self.values:
            if not _share(v.tensor, target.tensor):
                kept.append(v)
            else:  # views see the new contents
                kept.append(Val(v.name, v.tensor, exact))
        self.values = kept


def _writable(x: torch.Tensor) -> bool:
    return x.numel() == 0 or all(s != 0 or n == 1 for s, n in zip(x.stride(), x.shape))


def _exact_in_16(x: torch.Tensor) -> bool:
    wide = x.double() * 8
    return x.numel() == 0 or (bool((wide == wide.round()).all()) and bool((x.abs() <= EXACT_16).all()))


def random_effects(seed: int, steps: int) -> EffectProgram:
    """A program of about `steps` steps; it returns values, views of each other, and sometimes an argument or buffer itself."""
    rng = Random(seed)
    dtype = rng.choice(DTYPES)
    tensors: list[torch.Tensor] = []
    buffers = rng.choice([0, 0, 1, 2])
    count = buffers + rng.randint(1, 3)
    shape: tuple[int, ...] = ()
    for k in range(count):
        if k == 0 or rng.random() < 0.4:
            shape = tuple(rng.choice(TINY) for _ in range(rng.randint(0, 3)))
            while torch.Size(shape).numel() > 2000:
                shape = shape[1:]
        x = make_input(shape, rng.choice([dtype, dtype, dtype, torch.int64]) if k else dtype, seed + k)
        x = x.clamp(-2, 2) if x.is_floating_point() else x
        tensors.append((rng.choice(LAYOUTS) if x.dim() else LAYOUTS[0])(x))
    names = [f"v{k}" for k in range(count)]
    d = _Effects(rng, dtype, names)
    for name, x in zip(names, tensors):
        mine = _fresh(x, None) if _writable(x) else x.clone()
        d.space[name] = mine
        d.values.append(Val(name, mine, x.dtype != torch.int64 or bool((x.abs() <= 16).all())))
    tries = 0
    while len(d.lines) < steps and tries < 4 * steps:
        tries += 1
        getattr(d, rng.choice([*STEPS, *["write"] * 5, *["view"] * 4]))()
    made = d.values[count:] or d.values
    results = [v.name for v in made[-3:]]
    results += [rng.choice(d.values).name for _ in range(rng.randint(0, 2))]
    source = f"def f({', '.join(names)}):\n" + "".join(f"    {line}\n" for line in d.lines) + f"    return {', '.join(results)},\n"
    return EffectProgram(source, tuple(tensors[:buffers]), tuple(tensors[buffers:]), dtype)


def effect_programs(most: int = 12) -> st.SearchStrategy[EffectProgram]:
    """Programs of up to `most` steps."""
    return st.builds(random_effects, st.integers(0, 1 << 40), st.integers(1, most))
