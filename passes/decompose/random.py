"""Random bits: Philox 4x32-10 (Salmon et al., SC 2011) in integer arithmetic, a counter per element, or per four elements that want 32 bits each:
a GPU's thread has them side by side, and then they share its ten rounds.

The four words of the state are held in u64, of which only the lower 32 bits count: a product of two masked words is exact, its upper
half is the high word, and its lower bits are cleaned by the mask before the next product.
"""

from __future__ import annotations

from ...ir import DTYPES, Builder, Dim, Operation, Value
from .common import Rule, index, pointwise, scalar_size, tensor_type

__all__ = ["RULES"]

I64, U32, U64 = (DTYPES[n] for n in ("i64", "u32", "u64"))
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def _random_bits(b: Builder, op: Operation) -> list[Value]:
    t = tensor_type(op.result)
    dtype = t.dtype
    short = isinstance(t.numel, int) and t.numel <= 1 << 32

    def body(i: Builder, seed: Value) -> Value:
        position = _linear(i, t.shape)
        if dtype == U32:
            a, c, d, e = (i.cast(w, U32) for w in _philox(i, i.cast(seed, U64), i.cast(i.arith("shr", position, 2), U64), op["stream"], short))
            which = i.arith("and", position, 3)
            upper = i.arith("select", i.arith("eq", which, 2), d, e)
            return i.arith("select", i.arith("eq", which, 0), a, i.arith("select", i.arith("eq", which, 1), c, upper))
        words = _philox(i, i.cast(seed, U64), i.cast(position, U64), op["stream"], short)
        low, high = words[2 * op["pair"]:2 * op["pair"] + 2]
        return i.arith("or", i.arith("shl", high, 32), i.arith("and", low, 0xFFFFFFFF))

    return [pointwise(b, t.shape, [op.operands[0]], body, dtype)]


def _linear(i: Builder, shape: tuple[Dim, ...]) -> Value:
    """The row-major position in the iteration space, an i64."""
    total: Value | None = None
    for dim, size in enumerate(shape):
        here = index(i, dim)
        total = here if total is None else i.arith("add", i.arith("mul", total, scalar_size(i, size)), here)
    return i.constant(0, I64) if total is None else total


def _philox(i: Builder, seed: Value, counter: Value, stream: int, short: bool) -> list[Value]:
    """Four u64 whose lower 32 bits are random; `seed` and `counter` are u64, `stream` a number below 2^32. `short`: so is `counter`; its upper half
    is then a constant, by which LLVM sees that neighbours have the same counter."""
    mask, half, zero = i.constant(0xFFFFFFFF, U64), i.constant(32, U64), i.constant(0, U64)
    multipliers = [i.constant(m, U64) for m in MULTIPLIERS]
    keys = [seed, i.arith("shr", seed, half)]
    c = [counter, zero if short else i.arith("shr", counter, half), i.constant(stream, U64), zero]
    for r in range(_ROUNDS):
        p, q = (i.arith("mul", i.arith("and", x, mask), m) for x, m in zip((c[0], c[2]), multipliers, strict=True))
        k = [key if r == 0 else i.arith("add", key, r * step) for key, step in zip(keys, KEY_STEPS, strict=True)]
        upper = [i.arith("shr", x, half) for x in (q, p)]
        c = [i.arith("xor", i.arith("xor", upper[0], c[1]), k[0]), q, i.arith("xor", i.arith("xor", upper[1], c[3]), k[1]), p]
    return c


RULES: dict[str, Rule] = {"graph.random_bits": _random_bits}
