"""Random numbers from counters: torch's random operators as functions of a seed and an element's number.

    table = decomposition_table() | random_decompositions()     # while AOTAutograd traces
    share_seeds(gm)                                             # on the joint or inference graph, before it is partitioned

A decomposed graph draws one seed per call from torch's default generator (`aicc::random_seed`, so that `torch.manual_seed` makes a
run repeatable), and everything else is a pure function of that seed: element i of the k-th random tensor of a graph is Philox 4x32-10
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) at counter (i low, i high, k, 0) under key (seed low, seed
high). Being pure, it may be computed again: recomputation in the backward pass (checkpointing, min-cut) needs the seed, which is
marked to be saved, and gives the very same numbers. Eager draws other numbers from the same seed; `fallback_random` leaves these
operators to ATen, which draws eager's.

The operators below run on any device through ATen, for graphs that are not compiled; `ops/random.py` has their rows.
What has no decomposition here (multinomial, randperm, poisson, binomial, generators that are given) stays an ATen call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch._prims_common import compute_elementwise_output_logical_to_physical_perm as physical_order
from torch.utils.checkpoint import CheckpointPolicy

__all__ = ["random_decompositions", "share_seeds"]

aten = torch.ops.aten
Tensor = torch.Tensor

_library = torch.library.Library("aicc", "FRAGMENT")
_library.define("random_seed(Device device) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
_library.define("random_uniform(Tensor seed, SymInt[] size, int stream, ScalarType dtype) -> Tensor")
_library.define("random_normal(Tensor seed, SymInt[] size, int stream, ScalarType dtype) -> Tensor")
_library.define("random_integers(Tensor seed, SymInt[] size, SymInt low, SymInt high, int stream) -> Tensor")

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_DIGITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
"""Bits of the significand: a uniform number is that many random bits, so that rounding never gives 1."""


# -- the operators, in ATen's integer arithmetic -------------------------------------------------------------------------------

def _words(seed: Tensor, index: Tensor, stream: int) -> list[Tensor]:
    """The four 32-bit words for each counter, in i64. Products of two 32-bit numbers wrap in i64, whose bits are still right."""
    c = [index & _LOW, index >> 32, torch.full_like(index, stream), torch.zeros_like(index)]
    key = [seed & _LOW, (seed >> 32) & _LOW]
    for _ in range(10):
        p, q = c[0] * _MULTIPLIERS[0], c[2] * _MULTIPLIERS[1]
        c = [((q >> 32) & _LOW) ^ c[1] ^ key[0], q & _LOW, ((p >> 32) & _LOW) ^ c[3] ^ key[1], p & _LOW]
        key = [(k + step) & _LOW for k, step in zip(key, _KEY_STEPS, strict=True)]
    return c


def _unit(high: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in [0, 1): `high` alone, or with `low` for f64."""
    digits = _DIGITS[dtype]
    bits = high >> (32 - digits) if digits <= 32 else (high << 21) | (low >> 11)
    return bits.to(dtype) * 2.0**-digits


def _index(seed: Tensor, size: Sequence[Any]) -> Tensor:
    """The number of each element."""
    return torch.arange(math.prod(size), device=seed.device).reshape(tuple(size))


def _word(seed: Tensor, size: Sequence[Any], stream: int) -> Tensor:
    """32 bits for each element. Four in a row share a counter: where a thread computes them side by side, they share its ten rounds."""
    index = _index(seed, size)
    w, which = _words(seed, index >> 2, stream), index & 3
    return torch.where(which < 2, torch.where(which == 0, w[0], w[1]), torch.where(which == 2, w[2], w[3]))


def _uniform(seed: Tensor, size: Sequence[Any], stream: int, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float64:
        w = _words(seed, _index(seed, size), stream)
        return _unit(w[1], w[0], dtype)
    word = _word(seed, size, stream)
    return _unit(word, word, dtype)


def _normal(seed: Tensor, size: Sequence[Any], stream: int, dtype: torch.dtype) -> Tensor:
    """Box and Muller: the first number of the pair."""
    w = _words(seed, _index(seed, size), stream)
    if dtype == torch.float64:
        radius, angle = 1 - _unit(w[1], w[0], dtype), _unit(w[3], w[2], dtype)
    else:
        radius, angle = ((w[0] >> 1).float() + 1) * 2.0**-31, _unit(w[1], w[1], torch.float32)
    return (torch.sqrt(-2 * torch.log(radius)) * torch.cos(2 * math.pi * angle)).to(dtype)


def _integers(seed: Tensor, size: Sequence[Any], low: int, high: int, stream: int) -> Tensor:
    span = high - low
    if span <= 1 << 32:
        return low + (((_word(seed, size, stream) * span) >> 32) & _LOW)
    w = _words(seed, _index(seed, size), stream)
    wide = (w[1] << 31) | (w[0] >> 1)  # 63 bits
    return low + wide % span


def _seed(device: torch.device) -> Tensor:
    return torch.randint(-(1 << 63), (1 << 63) - 1, (), device=device)


for _name, _run in {"random_seed": _seed, "random_uniform": _uniform, "random_normal": _normal, "random_integers": _integers}.items():
    _library.impl(_name, _run, "CompositeExplicitAutograd")


def _fake_float(seed: Tensor, size: Sequence[Any], stream: int, dtype: torch.dtype) -> Tensor:
    return seed.new_empty(size, dtype=dtype)


torch.library.register_fake("aicc::random_seed", lambda device: torch.empty((), dtype=torch.int64, device=device), lib=_library)
torch.library.register_fake("aicc::random_uniform", _fake_float, lib=_library)
torch.library.register_fake("aicc::random_normal", _fake_float, lib=_library)
torch.library.register_fake("aicc::random_integers", lambda seed, size, low, high, stream: seed.new_empty(size), lib=_library)


# -- decompositions ------------------------------------------------------------------------------------------------------------

def _draw(name: str, size: Sequence[Any], device: Any, *rest: Any) -> Tensor:
    seed = torch.ops.aicc.random_seed(torch.device(device or torch.get_default_device()))
    return getattr(torch.ops.aicc, name)(seed, list(size), *rest)


def _uniform_of(size: Sequence[Any], device: Any, dtype: torch.dtype) -> Tensor:
    return _draw("random_uniform", size, device, 0, dtype)


def _in_the_order_of(x: Tensor, make: Callable[[Sequence[Any]], Tensor], memory_format: torch.memory_format | None = None) -> Tensor:
    """A tensor with the sizes of `x` and, unless another format is asked for, its order of dimensions in memory."""
    if memory_format not in (None, torch.preserve_format):
        return make(x.shape).contiguous(memory_format=memory_format)
    if x.ndim < 2 or x.is_contiguous():
        return make(x.shape)
    found: Any = physical_order(x)
    order = found[0] if isinstance(found, tuple) else found  # torch 2.13 also says whether it is ambiguous
    return make([x.shape[i] for i in order]).permute([order.index(i) for i in range(x.ndim)])


def _float(dtype: torch.dtype | None) -> torch.dtype:
    return dtype or torch.get_default_dtype()


def _factory(name: str) -> Callable[..., Any]:
    def make(size: Sequence[Any], *, generator: Any = None, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None) -> Any:
        if generator is not None or _float(dtype) not in _DIGITS:
            return NotImplemented
        return _draw(name, size, device, 0, _float(dtype))
    return make


def _like(name: str) -> Callable[..., Any]:
    def make(x: Tensor, *, generator: Any = None, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
             memory_format: Any = None) -> Any:
        kind = dtype or x.dtype
        if generator is not None or kind not in _DIGITS:
            return NotImplemented
        return _in_the_order_of(x, lambda size: _draw(name, size, device or x.device, 0, kind), memory_format)
    return make


def _whole_numbers(size: Sequence[Any], low: Any, high: Any, device: Any, dtype: torch.dtype | None) -> Tensor:
    torch._check(low < high, lambda: f"random_ expects 'from' to be less than 'to', but got from={low} >= to={high}")
    return _draw("random_integers", size, device, low, high, 0).to(dtype or torch.int64)


def randint(high: Any, size: Sequence[Any], *, dtype: Any = None, device: Any = None, **rest: Any) -> Any:
    return randint_low(0, high, size, dtype=dtype, device=device, **rest)


def randint_low(low: Any, high: Any, size: Sequence[Any], *, generator: Any = None, dtype: Any = None, layout: Any = None, device: Any = None,
                pin_memory: Any = None) -> Any:
    return NotImplemented if generator is not None else _whole_numbers(size, low, high, device, dtype)


def randint_like(x: Tensor, high: Any, **rest: Any) -> Any:
    return randint_like_low(x, 0, high, **rest)


def randint_like_low(x: Tensor, low: Any, high: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
                     memory_format: Any = None) -> Any:
    return _in_the_order_of(x, lambda size: _whole_numbers(size, low, high, device or x.device, dtype or x.dtype), memory_format)


def bernoulli(x: Tensor, *, generator: Any = None) -> Any:
    return bernoulli_tensor(x, x, generator=generator)


def bernoulli_tensor(x: Tensor, p: Any, *, generator: Any = None) -> Any:
    """1 where a uniform number is below `p`, a number or a tensor; a tensor of the type and sizes of `x`."""
    if generator is not None:
        return NotImplemented
    fine = torch.float64 if isinstance(p, Tensor) and p.dtype == torch.float64 else torch.float32
    return (_in_the_order_of(x, lambda size: _uniform_of(size, x.device, fine)) < p).to(x.dtype)


def uniform(x: Tensor, low: float = 0.0, high: float = 1.0, *, generator: Any = None) -> Any:
    if generator is not None or x.dtype not in _DIGITS:
        return NotImplemented
    return _in_the_order_of(x, lambda size: _uniform_of(size, x.device, x.dtype)) * (high - low) + low


def _normal_like(x: Tensor) -> Tensor:
    return _in_the_order_of(x, lambda size: _draw("random_normal", size, x.device, 0, x.dtype))


def normal(x: Tensor, mean: float = 0.0, std: float = 1.0, *, generator: Any = None) -> Any:
    return NotImplemented if generator is not None or x.dtype not in _DIGITS else _normal_like(x) * std + mean


def normal_tensors(mean: Any, std: Any = 1.0, *, generator: Any = None) -> Any:
    """Tensors of means or deviations, or both."""
    whole = mean + torch.zeros_like(std) if isinstance(std, Tensor) else mean
    return NotImplemented if generator is not None or whole.dtype not in _DIGITS else _normal_like(whole) * std + mean


def normal_numbers(mean: float, std: float, size: Sequence[Any], *, generator: Any = None, dtype: Any = None, layout: Any = None,
                   device: Any = None, pin_memory: Any = None) -> Any:
    if generator is not None or _float(dtype) not in _DIGITS:
        return NotImplemented
    return _draw("random_normal", size, device, 0, _float(dtype)) * std + mean


def _fine(x: Tensor) -> Tensor:
    """Uniform numbers for `x` in the type that its numbers are computed in: f64 for what f32 cannot count, else f32."""
    return _in_the_order_of(x, lambda size: _uniform_of(size, x.device, torch.float64 if x.dtype in (torch.float64, torch.int64) else torch.float32))


def exponential(x: Tensor, rate: float = 1.0, *, generator: Any = None) -> Any:
    """-ln(u) / rate; never 0, as in eager."""
    if generator is not None or x.dtype not in _DIGITS:
        return NotImplemented
    u = 1 - _fine(x)  # in (0, 1]
    smallest = torch.finfo(u.dtype).eps / 2
    return (torch.where(u >= 1 - smallest, smallest, -torch.log(u)) / rate).to(x.dtype)


def geometric(x: Tensor, p: float, *, generator: Any = None) -> Any:
    torch._check(0 < p < 1, lambda: f"geometric_ expects p to be in (0, 1), but got p={p}")
    return NotImplemented if generator is not None else (torch.floor(torch.log1p(-_fine(x)) / math.log1p(-p)) + 1).to(x.dtype)


def cauchy(x: Tensor, median: float = 0.0, sigma: float = 1.0, *, generator: Any = None) -> Any:
    return NotImplemented if generator is not None else (median + sigma * torch.tan(math.pi * (_fine(x) - 0.5))).to(x.dtype)


def log_normal(x: Tensor, mean: float = 1.0, std: float = 2.0, *, generator: Any = None) -> Any:
    return NotImplemented if generator is not None or x.dtype not in _DIGITS else torch.exp(_normal_like(x) * std + mean)


def random(x: Tensor, *, generator: Any = None) -> Any:
    """Whole numbers: all that the type has from 0 on, for floats those that it holds exactly."""
    info = 1 if x.dtype == torch.bool else 1 << _DIGITS[x.dtype] if x.dtype in _DIGITS else torch.iinfo(x.dtype).max
    return random_from(x, 0, min(info + 1, (1 << 63) - 1), generator=generator)


def random_to(x: Tensor, to: int, *, generator: Any = None) -> Any:
    return random_from(x, 0, to, generator=generator)


def random_from(x: Tensor, low: int, to: int | None, *, generator: Any = None) -> Any:
    if generator is not None or to is None:
        return NotImplemented
    return _in_the_order_of(x, lambda size: _whole_numbers(size, low, to, x.device, x.dtype))


def native_dropout(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    if train is False or p == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    if p == 1:
        return torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bool)
    kept = _in_the_order_of(x, lambda size: _uniform_of(size, x.device, torch.float32)) >= p
    return x * kept * (1 / (1 - p)), kept


_TABLE: dict[Any, Callable[..., Any]] = {
    aten.rand.default: _factory("random_uniform"), aten.randn.default: _factory("random_normal"),
    aten.rand_like.default: _like("random_uniform"), aten.randn_like.default: _like("random_normal"),
    aten.randint.default: randint, aten.randint.low: randint_low,
    aten.randint_like.default: randint_like, aten.randint_like.low_dtype: randint_like_low,
    aten.bernoulli.default: bernoulli, aten.bernoulli.p: bernoulli_tensor, aten.bernoulli.Tensor: bernoulli_tensor,
    aten.uniform.default: uniform, aten.normal_functional.default: normal,
    aten.normal.Tensor_float: normal_tensors, aten.normal.float_Tensor: normal_tensors, aten.normal.Tensor_Tensor: normal_tensors,
    aten.normal.float_float: normal_numbers, aten.exponential.default: exponential, aten.geometric.default: geometric,
    aten.cauchy.default: cauchy, aten.log_normal.default: log_normal, aten.random.default: random, aten.random.to: random_to,
    getattr(aten.random, "from"): random_from, aten.native_dropout.default: native_dropout,
}


def random_decompositions() -> dict[Any, Callable[..., Any]]:
    """Operator overload -> decomposition into the operators of this file."""
    return dict(_TABLE)


# -- graphs ----------------------------------------------------------------------------------------------------------------------

_SEED = torch.ops.aicc.random_seed.default
_STREAM = {torch.ops.aicc.random_uniform.default: 2, torch.ops.aicc.random_normal.default: 2, torch.ops.aicc.random_integers.default: 4}
"""Which argument is the number of the stream."""


def share_seeds(gm: fx.GraphModule) -> None:
    """One seed per device for the whole graph, drawn first and saved for the backward pass; each random tensor gets a stream of its own.

    Graphs within the graph (branches, loop bodies) have seeds of their own, drawn whenever they run.
    """
    for child in gm.children():
        if isinstance(child, fx.GraphModule):
            share_seeds(child)
    first: dict[str, fx.Node] = {}
    streams = 0
    for node in list(gm.graph.nodes):
        if node.target is _SEED:
            shared = first.setdefault(str(node.args[0]), node)
            if shared is node:
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
            else:
                node.replace_all_uses_with(shared)
                gm.graph.erase_node(node)
        elif node.target in _STREAM:
            node.update_arg(_STREAM[node.target], streams)
            streams += 1
    if first:
        gm.recompile()
