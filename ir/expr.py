"""Integer index expressions: shapes, strides, offsets, loop bounds and index maps.

An expression is a polynomial with integer coefficients over *atoms*: symbols, floor divisions, remainders,
maxima and minima. It is kept in one canonical form at all times (sorted monomials, folded constants), so that
structural equality is equality of polynomials and printing is deterministic. Constants are plain Python ints:
`Dim = int | Expr`, and every operator returns an int as soon as nothing symbolic is left.

Naming convention for symbols, relied upon by all levels:
  s0, s1, u0 ...   sizes (torch's backed and unbacked symbols), integers >= 0
  d0, d1 ...       dimensions of an iteration space (tensor level)
  i0, i1 ...       the index operands of a tile op
  t0, t1 ...       positions within a tile

Why not sympy: an expression is built for every operand of every op, and sympy is two orders of magnitude slower
than compile time allows; its string parser also evaluates code. `frontend/symbols.py` converts from sympy.

Semantics of `//` and `%` are Python's (round toward minus infinity); denominators are positive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, Union

__all__ = [
    "Dim",
    "Expr",
    "Sym",
    "arguments",
    "as_int",
    "ceildiv",
    "evaluate",
    "floordiv",
    "fold",
    "free_symbols",
    "maximum",
    "minimum",
    "mod",
    "product",
    "substitute",
    "sym",
]

Dim = Union[int, "Expr"]


class Atom:
    """An indivisible factor of a monomial. `key` is its canonical text and its identity."""

    __slots__ = ("_hash", "_symbols", "args", "key")

    def __init__(self, key: str, args: tuple[Dim, ...] = ()):
        self.key = key
        self.args = args
        self._hash = hash(key)
        self._symbols: frozenset[str] | None = None

    @property
    def symbols(self) -> frozenset[str]:
        """Names of all symbols in it."""
        if self._symbols is None:
            self._symbols = frozenset((self.key,)) if isinstance(self, Sym) else frozenset().union(*map(free_symbols, self.args))
        return self._symbols

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Atom) and self.key == other.key

    def __lt__(self, other: Atom) -> bool:
        return self.key < other.key

    def __reduce__(self) -> Any:
        return (type(self), (self.key, self.args))


class Sym(Atom):
    """A named integer."""


class FloorDiv(Atom):
    """`args[0] // args[1]`, denominator > 0."""


class Mod(Atom):
    """`args[0] % args[1]`, denominator > 0."""


class Max(Atom):
    """The largest of `args`."""


class Min(Atom):
    """The smallest of `args`."""


Monomial = tuple[Atom, ...]


class Expr:
    """A canonical integer polynomial: `sum(coefficient * monomial) + const`. Immutable and hashable."""

    __slots__ = ("_hash", "_symbols", "_text", "const", "terms")
    terms: tuple[tuple[Monomial, int], ...]
    const: int

    def __init__(self, terms: tuple[tuple[Monomial, int], ...], const: int):
        self.terms = terms
        self.const = const
        self._hash = hash((terms, const))
        self._text: str | None = None
        self._symbols: frozenset[str] | None = None

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expr) and self._hash == other._hash and (
            self.const == other.const and self.terms == other.terms)

    def __str__(self) -> str:
        if self._text is None:
            self._text = _text_of(self)
        return self._text

    __repr__ = __str__

    def __reduce__(self) -> Any:
        return (Expr, (self.terms, self.const))

    def __add__(self, other: Dim) -> Dim:
        return _sum(self, other, 1)

    __radd__ = __add__

    def __sub__(self, other: Dim) -> Dim:
        return _sum(self, other, -1)

    def __rsub__(self, other: Dim) -> Dim:
        return _sum(_scale(self, -1), other, 1)

    def __neg__(self) -> Dim:
        return _scale(self, -1)

    def __mul__(self, other: Dim) -> Dim:
        return _mul(self, other)

    __rmul__ = __mul__

    def __floordiv__(self, other: Dim) -> Dim:
        return floordiv(self, other)

    def __rfloordiv__(self, other: Dim) -> Dim:
        return floordiv(other, self)

    def __mod__(self, other: Dim) -> Dim:
        return mod(self, other)

    def __rmod__(self, other: Dim) -> Dim:
        return mod(other, self)

    def __bool__(self) -> bool:
        raise TypeError(f"the truth of the symbolic expression '{self}' is unknown at compile time")


def _make(terms: dict[Monomial, int], const: int) -> Dim:
    kept = [(m, c) for m, c in terms.items() if c]
    if not kept:
        return const
    if len(kept) > 1:
        kept.sort(key=_monomial_key)
    return Expr(tuple(kept), const)


def _monomial_key(term: tuple[Monomial, int]) -> tuple[str, ...]:
    return tuple(a.key for a in term[0])


def _atom(atom: Atom) -> Expr:
    return Expr((((atom,), 1),), 0)


_SYMBOLS: dict[str, Expr] = {}  # interning only: a Sym is its name


def sym(name: str) -> Expr:
    """The expression that is the symbol `name`."""
    found = _SYMBOLS.get(name)
    if found is None:
        found = _SYMBOLS[name] = _atom(Sym(name))
    return found


def _sum(a: Dim, b: Dim, sign: int) -> Dim:
    if isinstance(b, int):
        if b == 0:
            return a
        if isinstance(a, int):
            return a + sign * b
        return Expr(a.terms, a.const + sign * b)
    if isinstance(a, int):
        return _sum(_scale(b, sign), a, 1)
    terms = dict(a.terms)
    for m, c in b.terms:
        terms[m] = terms.get(m, 0) + sign * c
    return _make(terms, a.const + sign * b.const)


def _scale(a: Dim, k: int) -> Dim:
    if isinstance(a, int):
        return a * k
    if k == 0:
        return 0
    return Expr(tuple((m, c * k) for m, c in a.terms), a.const * k)


def _mul(a: Dim, b: Dim) -> Dim:
    if isinstance(a, int):
        return _scale(b, a)
    if isinstance(b, int):
        return _scale(a, b)
    terms: dict[Monomial, int] = {}
    for ma, ca in (*a.terms, ((), a.const)):
        for mb, cb in (*b.terms, ((), b.const)):
            if ca and cb:
                m = tuple(sorted(ma + mb))
                terms[m] = terms.get(m, 0) + ca * cb
    const = terms.pop((), 0)
    return _make(terms, const)


def _divide_monomial(m: Monomial, by: Monomial) -> Monomial | None:
    rest = list(m)
    for atom in by:
        if atom not in rest:
            return None
        rest.remove(atom)
    return tuple(rest)


def _split_multiple(a: Expr, b: Dim) -> tuple[Dim, Dim]:
    """(q, r) with a == q*b + r, where q takes every term that `b` (an int or one monomial) divides exactly."""
    if isinstance(b, int):
        quotient = {m: c // b for m, c in a.terms if c % b == 0}
        rest = {m: c for m, c in a.terms if c % b}
        return _make(quotient, a.const // b), _make(rest, a.const % b)
    if len(b.terms) != 1 or b.const:
        if a == b:
            return 1, 0
        return 0, a
    (bm, bc), = b.terms
    quotient, rest = {}, {}
    for m, c in a.terms:
        q = _divide_monomial(m, bm)
        if q is not None and c % bc == 0:
            quotient[q] = quotient.get(q, 0) + c // bc
        else:
            rest[m] = c
    const = quotient.pop((), 0)
    return _make(quotient, const), _make(rest, a.const)


def floordiv(a: Dim, b: Dim) -> Dim:
    """`a // b`, rounding toward minus infinity. Raises ZeroDivisionError for b == 0; b must be positive."""
    if isinstance(b, int):
        if b == 0:
            raise ZeroDivisionError(f"({a}) // 0")
        if b == 1:
            return a
        if isinstance(a, int):
            return a // b
    if isinstance(a, int):
        return 0 if a == 0 else _atom(FloorDiv(f"({a} // {_divisor(b)})", (a, b)))
    quotient, rest = _split_multiple(a, b)
    if isinstance(rest, int) and (rest == 0 or isinstance(b, int)):
        return quotient if rest == 0 else _sum(quotient, rest // b, 1)  # type: ignore[operator]
    # (x // p) // q == x // (p*q)
    if isinstance(rest, Expr) and len(rest.terms) == 1 and rest.const == 0:
        (m, c), = rest.terms
        if c == 1 and len(m) == 1 and isinstance(m[0], FloorDiv):
            return _sum(quotient, floordiv(m[0].args[0], _mul(m[0].args[1], b)), 1)
    return _sum(quotient, _atom(FloorDiv(f"({_operand(rest)} // {_divisor(b)})", (rest, b))), 1)


def mod(a: Dim, b: Dim) -> Dim:
    """`a % b` with the sign of b; b must be positive."""
    if isinstance(b, int):
        if b == 0:
            raise ZeroDivisionError(f"({a}) % 0")
        if b == 1:
            return 0
        if isinstance(a, int):
            return a % b
    if isinstance(a, int):
        return 0 if a == 0 else _atom(Mod(f"({a} % {_divisor(b)})", (a, b)))
    _, rest = _split_multiple(a, b)
    if isinstance(rest, int) and (rest == 0 or isinstance(b, int)):
        return 0 if rest == 0 else rest % b  # type: ignore[operator]
    if isinstance(rest, Expr) and isinstance(b, int) and len(rest.terms) == 1 and rest.const == 0:
        (m, c), = rest.terms  # (x % (b*k)) % b == x % b
        if c == 1 and len(m) == 1 and isinstance(m[0], Mod) and isinstance(m[0].args[1], int) and (
                m[0].args[1] % b == 0):
            return mod(m[0].args[0], b)
    return _atom(Mod(f"({_operand(rest)} % {_divisor(b)})", (rest, b)))


def ceildiv(a: Dim, b: Dim) -> Dim:
    """`a / b` rounded up."""
    return floordiv(_sum(_sum(a, b, 1), 1, -1), b)


def maximum(*args: Dim) -> Dim:
    """The largest of the arguments; differences that are constant are decided here."""
    return _extreme(Max, "max", args, keep_larger=True)


def minimum(*args: Dim) -> Dim:
    """The smallest of the arguments."""
    return _extreme(Min, "min", args, keep_larger=False)


def _extreme(kind: type[Atom], name: str, args: Iterable[Dim], keep_larger: bool) -> Dim:
    kept: list[Dim] = []
    for arg in [x for a in args for x in arguments(a, kind)]:
        drop = False
        for i, other in enumerate(kept):
            gap = _sum(arg, other, -1)
            if isinstance(gap, int):
                if (gap > 0) == keep_larger and gap != 0:
                    kept[i] = arg
                drop = True
                break
        if not drop:
            kept.append(arg)
    if len(kept) == 1:
        return kept[0]
    kept.sort(key=str)
    return _atom(kind(f"{name}({', '.join(map(str, kept))})", tuple(kept)))


def arguments(a: Dim, kind: type[Atom]) -> tuple[Dim, ...]:
    """The arguments of `a` if it is an extreme of that kind (`Max`, `Min`): max(x, max(y, z)) is max(x, y, z). Else `a` alone."""
    if isinstance(a, Expr) and len(a.terms) == 1 and not a.const:
        (m, c), = a.terms
        if c == 1 and len(m) == 1 and type(m[0]) is kind:
            return m[0].args
    return (a,)


def product(dims: Iterable[Dim]) -> Dim:
    """The product of `dims`; 1 when empty."""
    result: Dim = 1
    for d in dims:
        result = _mul(result, d)
    return result


def as_int(a: Dim, what: str = "value") -> int:
    """`a` itself when it is constant; raises TypeError naming `what` otherwise."""
    if isinstance(a, int):
        return a
    raise TypeError(f"{what} must be a constant, got the symbolic expression '{a}'")


# -- printing ---------------------------------------------------------------------------------------------------------

def _operand(a: Dim) -> str:
    text = str(a)
    return f"({text})" if isinstance(a, Expr) and (" + " in text or " - " in text or text.startswith("-")) and not (
        len(a.terms) == 1 and not a.const and a.terms[0][1] == 1 and len(a.terms[0][0]) == 1) else text


def _divisor(b: Dim) -> str:
    """The right operand of a division: a product needs parentheses too, or `d0 // (s0*3)` would read `(d0 // s0)*3`."""
    if isinstance(b, int) or (not b.const and len(b.terms) == 1 and b.terms[0][1] == 1 and len(b.terms[0][0]) == 1):
        return str(b)
    return f"({b})"


def _text_of(e: Expr) -> str:
    parts: list[str] = []
    for m, c in e.terms:
        body = "*".join(a.key for a in m)
        magnitude = body if abs(c) == 1 else f"{body}*{abs(c)}"
        if not parts:
            parts.append(magnitude if c > 0 else f"-{magnitude}")
        else:
            parts.append(f" + {magnitude}" if c > 0 else f" - {magnitude}")
    if e.const:
        parts.append(f" + {e.const}" if e.const > 0 else f" - {-e.const}")
    return "".join(parts)


# -- traversal --------------------------------------------------------------------------------------------------------

def fold(e: Dim, leaf: Callable[[str], Any], constant: Callable[[int], Any], ops: Mapping[str, Callable[..., Any]]) -> Any:
    """Evaluates `e` bottom-up in any domain.

    `leaf(name)` gives a symbol's value, `constant(n)` an integer's, and `ops` has binary functions under the keys
    'add', 'mul', 'floordiv', 'mod', 'max' and 'min'. This is how numpy values, LLVM instructions and Triton text are made.
    """
    if isinstance(e, int):
        return constant(e)

    def atom_value(a: Atom) -> Any:
        if isinstance(a, Sym):
            return leaf(a.key)
        args = [fold(x, leaf, constant, ops) for x in a.args]
        name = {FloorDiv: "floordiv", Mod: "mod", Max: "max", Min: "min"}[type(a)]
        value = args[0]
        for x in args[1:]:
            value = ops[name](value, x)
        return value

    total = None
    for m, c in e.terms:
        value = atom_value(m[0])
        for a in m[1:]:
            value = ops["mul"](value, atom_value(a))
        if c != 1:
            value = ops["mul"](value, constant(c))
        total = value if total is None else ops["add"](total, value)
    if e.const:
        total = ops["add"](total, constant(e.const))
    return total


_PYTHON_OPS: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b, "mul": lambda a, b: a * b, "floordiv": lambda a, b: a // b, "mod": lambda a, b: a % b,
}


def _python_max(a: Any, b: Any) -> Any:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else _np_pick(a, b, True)


def _python_min(a: Any, b: Any) -> Any:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else _np_pick(a, b, False)


def _np_pick(a: Any, b: Any, larger: bool) -> Any:
    import numpy as np  # numpy only when arrays are evaluated
    return np.maximum(a, b) if larger else np.minimum(a, b)


def evaluate(e: Dim, env: Mapping[str, Any]) -> Any:
    """The value of `e` with symbols from `env` (ints or integer numpy arrays, which broadcast). KeyError if one is missing."""
    if isinstance(e, int):
        return e
    return fold(e, env.__getitem__, lambda n: n, {**_PYTHON_OPS, "max": _python_max, "min": _python_min})


_DIM_OPS: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: _sum(a, b, 1), "mul": _mul, "floordiv": floordiv, "mod": mod, "max": maximum, "min": minimum,
}


def substitute(e: Dim, env: Mapping[str, Dim]) -> Dim:
    """`e` with each symbol named in `env` replaced by an expression."""
    if isinstance(e, int):
        return e
    found = free_symbols(e) & env.keys()
    return _substituted(e, tuple((name, env[name]) for name in sorted(found))) if found else e


@lru_cache(maxsize=1 << 14)
def _substituted(e: Expr, values: tuple[tuple[str, Dim], ...]) -> Dim:
    env = dict(values)
    names = env.keys()
    # Most terms of an address have none of the symbols. They stay as they are, and in order.
    same = tuple((m, c) for m, c in e.terms if all(names.isdisjoint(a.symbols) for a in m))
    total: Dim = Expr(same, e.const) if same else e.const
    for m, c in e.terms:
        if all(names.isdisjoint(a.symbols) for a in m):
            continue
        term: Dim = c
        for a in m:
            if isinstance(a, Sym):
                term = _mul(env.get(a.key, sym(a.key)), term)
            elif names.isdisjoint(a.symbols):
                term = _mul(_atom(a), term)
            else:
                term = _mul(fold(_atom(a), lambda name: env[name] if name in env else sym(name), lambda n: n, _DIM_OPS), term)
        total = _sum(total, term, 1)
    return total


def free_symbols(e: Dim) -> frozenset[str]:
    """Names of all symbols in `e`."""
    if isinstance(e, int):
        return frozenset()
    if e._symbols is None:
        if len(e.terms) == 1 and len(e.terms[0][0]) == 1:
            e._symbols = e.terms[0][0][0].symbols
        else:
            e._symbols = frozenset().union(*[a.symbols for m, _ in e.terms for a in m])
    return e._symbols
