"""Random PyTorch programs for a device, as source text: sizes around the tiles of kernels, inputs in many layouts and types, infinities and NaN among them.

    program = device_program(seed)
    program.source(["v3"])                     # text of f(x0, ...), of what v3 needs
    inputs = program.inputs("cuda")            # as `program.recipes` say; `grown=True`: of other sizes
    values = program.evaluate(inputs, exact=True, blur=generator)

Programs of `random_programs.py` keep values where every level must compute them alike. These do not, so no tolerance is right for all of them:
`evaluate` computes in float64, and with `blur` multiplies each number that an operator reads, and that is no small multiple of 1/8, by 1 and some roundings of
the type that eager has it in (stochastic arithmetic, after Vignes's CESTAC method). `Truth` compares with that: an element that several blurred runs
hardly change must be right, one that they change altogether (a comparison of values that are nearly equal, `floor`, a difference of large numbers)
says nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch

__all__ = ["DeviceProgram", "Recipe", "Truth", "device_program", "gradients"]

SIZES = (1, 2, 3, 5, 7, 8, 16, 17, 31, 33, 64, 65, 100, 127, 129, 200, 257)
LONG = (513, 1000, 2049, 4100, 9001)
MOST_INPUT, MOST_VALUE = 300_000, 2_000_000
ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SUMS = {torch.float64: 2.0**-42, torch.float32: 2.0**-16, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5}
"""Relative errors of long sums, in whatever order; eager's own are smaller where it sums in a lucky one."""
BLUR = 4.0
"""Roundings that a value is blurred by: operators make more than one."""

UNARY = """{f}.abs() ; -{f} ; {f}.tanh() ; {f}.sigmoid() ; {f}.relu() ; {f}.abs().sqrt() ; {f}.clamp(-3, 2.5).exp() ; {f}.floor() ; {f}.round()
    ; {f}.sign() ; {f}.abs().log1p() ; {f}.erf() ; {f}.sin() ; F.gelu({f}) ; F.gelu({f}, approximate='tanh') ; F.silu({f}) ; {x}.isnan() ; torch.isinf({f})
    ; {x} != 0 ; ({f}.abs() + 0.1).rsqrt() ; ({f}.abs() + 0.01).log() ; {f} ** 2 ; {f}.trunc() ; {x}.to(torch.bfloat16) ; {x}.float() ; F.leaky_relu({f}, 0.1)
    ; {f}.expm1() ; F.softplus({f}) ; {f}.reciprocal() ; {f}.nan_to_num(0.5, 2.0, -3.0) ; {f}.frac() ; F.hardswish({f}) ; {f} + 2.5 ; {x} * 3
    ; {f}.clamp(min=-0.5) ; {f}.fmod(1.7) ; {f}.remainder(-0.7) ; {f}.clamp(-100, 100).nan_to_num().to(torch.int64) ; {f}.cos() ; {f}.exp2() ; {f}.logit(0.1)"""
BINARY = """{x} + {y} ; {x} * {y} ; {f} - {g} ; {f} / ({g}.abs() + 0.5) ; torch.maximum({f}, {g}) ; torch.minimum({f}, {g}) ; torch.where({x} > 0, {f}, {g})
    ; {x} > {y} ; {x} == {y} ; {x} <= {y} ; torch.fmax({f}, {g}) ; torch.fmin({f}, {g}) ; torch.atan2({f}, {g}) ; {f}.masked_fill({y} > 0, -1.5)
    ; torch.hypot({f}, {g}) ; {f}.lerp({g}, 0.3) ; torch.where({y} != 0, {x}, 0) ; {f}.addcmul({g}, {f}, value=0.5) ; {f}.copysign({g})"""
WHOLE = "{x} // 3 ; {x} % 5 ; {x} & 6 ; {x} ^ 3 ; {x} << 1 ; {x} >> 1 ; {x}.bitwise_not() ; {x} // -4 ; {x}.abs() ; {x} * {x} ; {x}.clamp(-3, 9)"
TRUTHS = "~{x} ; {x} & ({y} > 0) ; {x} | ({y} != 0) ; {x} ^ ({y} > 1)"
REDUCE = """{f}.sum({ds}{k}) ; {f}.mean({ds}{k}) ; {x}.amax({ds}{k}) ; {x}.amin({ds}{k}) ; {f}.var({ds}{k}) ; {f}.var({ds}, correction=0{k}) ; {f}.std({d})
    ; {x}.sum({ds}{k}) ; {x}.any({d}{k}) ; {x}.all({d}{k}) ; {f}.logsumexp({ds}{k}) ; {f}.softmax({d}) ; {f}.log_softmax({d}) ; {x}.cumsum({d})
    ; {x}.argmax({d}{k}) ; {x}.argmin({d}) ; F.layer_norm({f}, {f}.shape[-1:]) ; {f}.clamp(-1.1, 1.1).prod({d}) ; {f}.norm(dim={d}) ; {x}.max({d})[0]
    ; {x}.min({d})[1] ; {f}.sum() ; {x}.max() ; {f}.mean() ; F.normalize({f}, dim={d}) ; {f} - {f}.mean({d}, keepdim=True) ; {x}.flip({d}).cumsum({d})
    ; {x}.cummax({d})[0] ; {f}.clamp(-1.05, 1.05).cumprod({d}) ; ({x} > 0).sum({ds}) ; ({x} != 0).float().mean({ds}) ; {f}.logcumsumexp({d})
    ; {f}.softmax({d}) * {f} ; torch.count_nonzero({x}, {d}) ; torch.aminmax({f}, dim={d})[1] ; F.rms_norm({f}, {f}.shape[-1:], eps=1e-5)
    ; {f}.abs().amax({d}, keepdim=True) + {f} ; ({f} * {f}).sum({d}, keepdim=True).rsqrt() * {f}"""
MOVE = """{x}.transpose({d}, {e}) ; {x}.transpose({d}, {e}).contiguous() ; {x}.flatten() ; torch.cat([{x}, {x} * 2], {d}) ; torch.cat([{x}, {y}], {d})
    ; torch.stack([{x}, {x} + 1], {d}) ; {x}.narrow({d}, {a}, {n}) ; F.pad({x}, ({i}, {j})) ; F.pad({f}, (1, 2), value=-1.0) ; {x}.roll({j}, {d}) ; {x}.flip({d})
    ; {x}.unsqueeze({d}) * torch.ones(3, 1, dtype={x}.dtype, device={x}.device) ; {x}.index_select({d}, torch.tensor({index}, device={x}.device))
    ; {x}.tril({j}) ; {x}.triu({j}) ; {x}[{i}::2] ; {x}.repeat_interleave(2, {d}) ; {x}.unfold({d}, 2, {i} + 1) ; {x}.reshape(-1, {x}.shape[-1])
    ; {x}.sort({d})[0] ; {x}.topk(2, {d})[0] ; {x}.chunk(2, {d})[0] ; {x}.select({d}, {a}) ; {x}.diff(dim={d}) ; {x}.movedim({d}, {e})
    ; torch.zeros_like({x}).index_add({d}, torch.arange({x}.shape[{d}], device={x}.device) // 2, {x}) ; {x}.gather({d}, {x}.argsort(dim={d}, stable=True) // 2)
    ; F.pad({f}.unsqueeze(0), ({i}, 1), mode='replicate').squeeze(0) ; torch.where(torch.arange({x}.shape[-1], device={x}.device) % 3 == 0, {f}, 0.25)
    ; {x}.scatter_add({d}, torch.zeros_like({x}, dtype=torch.int64), {x}) ; {x}.split({a} + 1, {d})[0] ; {x}[..., torch.arange({x}.shape[-1], device={x}.device) // 2]
    ; {x}.index_copy({d}, torch.tensor([{a}], device={x}.device), {x}.narrow({d}, 0, 1) * 2) ; {x}.repeat(2, *[1] * ({x}.dim() - 1))"""
PRODUCT = """{f} @ torch.ones({x}.shape[-1], 5, dtype={f}.dtype, device={x}.device) ; {f}.transpose(-1, -2) @ {f} ; ({f} @ {f}.transpose(-1, -2)).softmax(-1) @ {f}
    ; {f} @ {f}.transpose(-1, -2) ; F.linear({f}, {f}[..., :3, :].flatten(0, -2)) ; F.avg_pool1d({f}, 2) ; F.max_pool1d({f}, 2) ; F.one_hot({x}.argmax(-1) % 7, 7)
    ; F.interpolate({f}, scale_factor=2.0) ; F.scaled_dot_product_attention({f}, {f}, {f}) ; F.scaled_dot_product_attention({f}, {f}, {f}, is_causal=True)
    ; F.cross_entropy({f}.flatten(0, -2), {x}.argmax(-1).flatten(), reduction='none') ; F.embedding({x}.argmax(-1) % 2, {f}.flatten(0, -2).repeat(2, 1)) ; {f}.cumsum(-1) @ {f}[..., :1, :].mT
    ; F.relu({f} @ {f}.transpose(-1, -2) + 0.5) ; torch.addmm({f}[:, :1], {f}, {f}.t()) ; F.conv1d({f}, {f}[:2, :, :3]) ; F.gelu(F.linear({f}, {f}[..., :2, :].flatten(0, -2)))"""


def _rows(table: str) -> tuple[str, ...]:
    return tuple(t.strip() for t in table.split(";"))


@dataclass(frozen=True)
class Recipe:
    """How an input is made: the same for the same seed, wherever it is put."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    scale: float
    special: float | None
    seed: int

    def make(self, device: str, grown: bool = False) -> torch.Tensor:
        """The input in its layout; `grown`: with other sizes, but ones where there were ones."""
        shape = [s + 1 + s // 3 if grown and s > 1 else s for s in self.shape]
        g, base = torch.Generator().manual_seed(self.seed), list(shape)
        if self.layout == "transposed":
            base.reverse()
        elif self.layout == "sliced":
            base[-1] += 3
        elif self.layout == "stepped":
            base[0] *= 2
        elif self.layout == "expanded":
            base[self.seed % len(base)] = 1
        elif self.layout == "misaligned":
            base = [math.prod(shape) + 1]
        if self.dtype.is_floating_point:
            x = torch.randn(base, generator=g) * self.scale
            if self.special is not None and x.numel():
                x.view(-1)[torch.randint(0, x.numel(), (1 + x.numel() // 50,), generator=g)] = self.special
        else:
            x = torch.randint(-20, 20, base, generator=g)
        x = (x > 0 if self.dtype == torch.bool else x.to(self.dtype)).to(device)
        views: dict[str, Callable[[], torch.Tensor]] = {
            "transposed": lambda: x.permute(*reversed(range(x.dim()))), "sliced": lambda: x[..., 2:-1], "stepped": lambda: x[::2],
            "expanded": lambda: x.expand(shape), "misaligned": lambda: x[1:].view(shape)}
        return views.get(self.layout, lambda: x)()

    def __str__(self) -> str:
        special = "" if self.special is None else f" with {self.special}"
        return f"{self.name}: {str(self.dtype)[6:]} {list(self.shape)} {self.layout}{special}"


@dataclass
class DeviceProgram:
    """`lines` are (name, expression) in order."""

    seed: int
    recipes: list[Recipe] = field(default_factory=list)
    lines: list[tuple[str, str]] = field(default_factory=list)
    results: list[str] = field(default_factory=list)

    def inputs(self, device: str, grown: bool = False) -> list[torch.Tensor]:
        return [r.make(device, grown) for r in self.recipes]

    def source(self, results: Sequence[str]) -> str:
        """A function `program` that computes these values and no others."""
        lines = self.needed(results)
        names = ", ".join(r.name for r in self.recipes)
        return f"def program({names}):\n" + "".join(f"    {n} = {t}\n" for n, t in lines) + f"    return ({', '.join(results)},)\n"

    def needed(self, results: Sequence[str]) -> list[tuple[str, str]]:
        need, kept = set(results), []
        for name, text in reversed(self.lines):
            if name in need:
                kept.append((name, text))
                need |= set(re.findall(r"\b[xv]\d+\b", text))
        return kept[::-1]

    def function(self, results: Sequence[str]) -> Callable[..., Any]:
        space: dict[str, Any] = {"torch": torch, "F": torch.nn.functional}
        exec(self.source(results), space)  # our own text
        return space["program"]

    def evaluate(self, inputs: Sequence[torch.Tensor], results: Sequence[str], *, types: dict[str, torch.dtype] | None = None,
                 blur: torch.Generator | None = None) -> dict[str, torch.Tensor]:
        """Every value, in eager; with `types` (those of eager's values) in float64, blurred by roundings of these types."""
        values = {r.name: x for r, x in zip(self.recipes, inputs, strict=True)}
        space: dict[str, Any] = {"torch": torch, "F": torch.nn.functional}
        if types is not None:
            values = {n: x.double() if x.is_floating_point() else x for n, x in values.items()}
            space["read"] = lambda name: _blurred(values[name], types[name], blur)
        for name, text in self.needed(results):
            if types is not None:
                text = re.sub(r"\.float\(\)|\.to\(torch\.bfloat16\)", ".double()", text)
                text = re.sub(r"\b([xv]\d+)\b(?!\.(shape|device|dtype|dim))", r"read('\1')", text)
            values[name] = eval(text, space, values)
        if types is not None:
            values = {n: _blurred(x, types[n], blur) for n, x in values.items()}
        return values


def _blurred(x: torch.Tensor, dtype: torch.dtype, g: torch.Generator | None) -> torch.Tensor:
    if g is None or not x.is_floating_point():
        return x
    known = (x.detach() * 8 == (x.detach() * 8).round()) & (x.detach().abs() < 256)
    noise = 2 * torch.rand(x.shape, generator=g, device=x.device, dtype=torch.float64) - 1
    return torch.where(known, x, x * (1 + BLUR * ROUNDING[dtype] * noise) + torch.finfo(dtype).tiny * noise)


def gradients(results: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """Of the floating results, weighted by random numbers, for the inputs that want one; zeros where nothing depends on an input."""
    wanted = [x for x in inputs if x.requires_grad]
    usable = [r for r in results if r.requires_grad]
    if not usable or not wanted:
        return []
    g = torch.Generator().manual_seed(seed)
    weights = [(torch.randint(-8, 9, r.shape, generator=g) / 8).to(r.device, r.dtype) for r in usable]
    found = torch.autograd.grad(usable, wanted, weights, allow_unused=True)
    return [torch.zeros_like(x) if f is None else f for f, x in zip(found, wanted, strict=True)]


class Truth:
    """What a value is, and of which elements that is known."""

    def __init__(self, eager: torch.Tensor, true: torch.Tensor, blurred: Sequence[torch.Tensor]):
        self.eager = eager
        e, w = eager.detach().double(), true.detach().double()
        others = [b.detach().double() for b in blurred]
        self.value, self.whole = w, not eager.is_floating_point()
        # where eager and all the blurred runs agree whether it is a number, infinite or NaN
        self.known = torch.stack([_kind(e) == _kind(w), *(_kind(b) == _kind(w) for b in others)]).all(0)
        spread = torch.stack([(b - w).abs() for b in others]).amax(0)
        if self.whole:
            self.known &= (e == w) & (spread == 0)
        usual = torch.where(self.known, e - w, 0.0).nan_to_num(0.0, 0.0, 0.0).square().mean().sqrt()  # operators round inside, too: their errors are alike
        self.bound = 8 * spread + 4 * (e - w).abs() + 16 * usual + SUMS.get(eager.dtype, 0.0) * w.abs() + torch.finfo(torch.float32).tiny

    @property
    def share(self) -> float:
        """Of the elements that can be judged."""
        return float(self.known.double().mean()) if self.known.numel() else 1.0

    def fault(self, got: torch.Tensor) -> str | None:
        """What is wrong with `got`, None if nothing is."""
        if got.shape != self.eager.shape or got.dtype != self.eager.dtype or got.device != self.eager.device:
            return f"{got.dtype} {list(got.shape)} on {got.device} for {self.eager.dtype} {list(self.eager.shape)}"
        g = got.detach().double()
        right = (_kind(g) == _kind(self.value)) & (((g - self.value).abs() <= self.bound) | ~self.value.isfinite())
        bad = self.known & ~right
        if not bool(bad.any()):
            return None
        shown = [f"{a:.7g} for {b:.7g} (eager {c:.7g}, bound {d:.1g})" for a, b, c, d in zip(
            *(t[bad][:3].tolist() for t in (g, self.value, self.eager.detach().double(), self.bound)), strict=True)]
        return f"{int(bad.sum())} of {bad.numel()}, first at {bad.nonzero()[0].tolist()}: {'; '.join(shown)}"


def _kind(x: torch.Tensor) -> torch.Tensor:
    """0 for a number, 1 and -1 for infinities, 2 for NaN."""
    return torch.where(x.isnan(), 2.0, torch.where(x.isinf(), x.sign(), 0.0))


class _Maker:
    def __init__(self, seed: int):
        self.rng = Random(seed)
        self.program = DeviceProgram(seed)
        self.values: dict[str, torch.Tensor] = {}

    def add_input(self) -> None:
        r = self.rng
        if self.values and r.random() < 0.6:  # broadcasts with another
            shape = list(r.choice([*self.values.values()]).shape)
            if shape and r.random() < 0.3:
                shape[r.randrange(len(shape))] = 1
            shape = shape[r.random() < 0.2:]
        else:
            shape = [r.choice(SIZES) for _ in range(r.choice([1, 2, 2, 2, 3, 3, 4]))]
            if r.random() < 0.25:
                shape[r.randrange(len(shape))] = r.choice(LONG)
            while math.prod(shape) > MOST_INPUT:
                most = shape.index(max(shape))
                shape[most] = max(1, shape[most] // 2)
        dtype = r.choice([torch.float32] * 6 + [torch.bfloat16, torch.bfloat16, torch.float16, torch.int64, torch.int32, r.choice([torch.int16, torch.int8]), torch.bool])
        layout = r.choice(["plain"] * 4 + ["transposed", "sliced", "stepped", "expanded", "misaligned"]) if shape else "plain"
        special = r.choice([math.nan, math.inf, -math.inf, 0.0, -0.0]) if r.random() < 0.15 else None
        recipe = Recipe(f"x{len(self.values)}", tuple(shape), dtype, layout, r.choice([1, 1, 1, 0.01, 5]), special, r.randrange(1 << 30))
        self.program.recipes.append(recipe)
        self.values[recipe.name] = recipe.make("cpu")

    def text(self) -> str:
        r, names = self.rng, [*self.values]
        n = r.choice(names[-4:] if r.random() < 0.7 else names)
        x = self.values[n]
        m = r.choice([m for m in names if m != n and (self.values[m].shape == x.shape or r.random() < 0.5)] or [n])
        tables = [UNARY] * 4 + [BINARY] * 5 + ([WHOLE] if not x.is_floating_point() and x.dtype != torch.bool else []) + ([TRUTHS] if x.dtype == torch.bool else [])
        if x.dim():
            tables += [REDUCE] * 5 + [MOVE] * 6
        if x.dim() in (2, 3, 4) and max(x.shape) < 600:
            tables += [PRODUCT] * 2
        d = r.randrange(max(1, x.dim()))
        several = sorted(r.sample(range(x.dim()), min(x.dim(), 2)))
        size = x.shape[d] if x.dim() else 1
        a = r.randrange(max(1, size))
        return r.choice(_rows(r.choice(tables))).format(
            x=n, y=m, f=n if x.is_floating_point() else f"{n}.float()", g=m if self.values[m].is_floating_point() else f"{m}.float()",
            d=d, e=r.randrange(max(1, x.dim())), ds=d if r.random() < 0.7 else tuple(several), k=r.choice(["", ", keepdim=True"]), a=a,
            n=r.randint(1, max(1, size - a)), i=r.randint(0, 2), j=r.randint(-2, 3), index=[r.randrange(max(1, size)) for _ in range(r.randint(1, 9))])

    def add_line(self) -> None:
        for _ in range(6):
            text = self.text()
            try:
                made = eval(text, {"torch": torch, "F": torch.nn.functional}, self.values)
            except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError):
                continue  # not for these shapes and types
            if isinstance(made, torch.Tensor) and 0 < made.numel() <= MOST_VALUE and not made.is_complex():
                name = f"v{len(self.program.lines)}"
                self.program.lines.append((name, text))
                self.values[name] = made
                return


def device_program(seed: int) -> DeviceProgram:
    """A program of one to three inputs and two to eight steps; its results are the last value and some of the others."""
    maker = _Maker(seed)
    for _ in range(maker.rng.choice([1, 2, 2, 3])):
        maker.add_input()
    for _ in range(maker.rng.randint(2, 8)):
        maker.add_line()
    names = [n for n, _ in maker.program.lines]
    maker.program.results = [*names[-1:], *(n for n in names[:-1] if maker.rng.random() < 0.2)]
    return maker.program
