"""Text to IR. The grammar is `ir/grammar.lark`; this file turns its trees into operations.

IR text is data: parsing runs no code, and every error is an `IRError` with file, line and column.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from lark import Lark, Token, Transformer
from lark.exceptions import UnexpectedInput, VisitError

from . import expr as E
from .attributes import NUMPY_DTYPES, Dense, SymbolRef
from .core import UNKNOWN, Block, IRError, Location, Operation, Region, Value
from .opdef import lookup
from .types import DTYPES, BufferType, ScalarType, TensorType, TileType, Type

__all__ = ["ParseError", "load", "parse_expr", "parse_module", "parse_type"]

MAX_DEPTH = 100
MAX_CONSTANT_BYTES = 1 << 31
MAX_MESSAGE = 500
MAX_TERMS = 4096
"""Terms of an index expression. Products of sums are kept multiplied out, so that a short text could ask for any number of them."""


class ParseError(IRError):
    """IR text that cannot be read; `line` and `column` (from 1) say where."""

    def __init__(self, message: str, filename: str, line: int, column: int, source: str = ""):
        lines = source.splitlines()
        excerpt = ""
        if 0 < line <= len(lines):
            shown = lines[line - 1][:200]
            excerpt = f"\n  {shown}\n  {' ' * min(column - 1, 200)}^"
        message = message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + "..."  # it may quote a token of any length
        super().__init__(f"{filename}:{line}:{column}: {message}{excerpt}")
        self.line, self.column = line, column


Children = list[Any]


class _Tree(Transformer):
    """Bottom-up: attribute values become Python values, ops become plain tuples (built into IR afterwards)."""

    def __init__(self, resources: Mapping[str, bytes]):
        super().__init__()
        self.resources = resources

    def start(self, c: Children) -> Any:
        return c[0]

    def op(self, c: Children) -> Any:
        results, name, symbol, operands, attrs, types, *rest = c
        return (results or [], name, symbol, operands or [], attrs or {}, types or [], rest[:-1], rest[-1])

    def results(self, c: Children) -> Children:
        return c

    def operands(self, c: Children) -> Children:
        return [x for x in c if x is not None]

    types = results

    def region(self, c: Children) -> Any:
        return (c[0] or [], c[1:])

    def block_args(self, c: Children) -> Children:
        return [x for x in c if x is not None]

    def block_arg(self, c: Children) -> Any:
        return (c[0], c[1])

    def loc(self, c: Children) -> Location:
        return Location(json.loads(c[0]), int(c[1]), json.loads(c[2]))

    def type(self, c: Children) -> Type:
        return parse_type(str(c[0]))

    def attrs(self, c: Children) -> Any:
        return dict(c)

    def pair(self, c: Children) -> Any:
        key = json.loads(c[0]) if c[0].type == "STRING" else str(c[0])
        return (key, c[1])

    def float(self, c: Children) -> Any:
        return float(c[0])

    def string(self, c: Children) -> str:
        return str(json.loads(c[0]))

    def symbol(self, c: Children) -> SymbolRef:
        return SymbolRef(str(c[0])[1:])

    def shaped(self, c: Children) -> Type:
        return parse_type(str(c[0]))

    def list(self, c: Children) -> Any:
        return tuple(x for x in c if x is not _ABSENT)

    def empty_dict(self, c: Children) -> Any:
        return {}

    def dict(self, c: Children) -> Any:
        return c[0]

    def int(self, c: Children) -> Any:
        if len(c[0]) > 4000:
            raise ValueError("integer literal too long")
        return int(c[0])

    def name(self, c: Children) -> Any:
        text = str(c[0])
        constants = {"true": True, "false": False, "none": None}
        if text in constants:
            return _NONE if text == "none" else constants[text]
        if text[0] == "i" and text[1:].isdigit():  # the index operands of tile ops: i1, i8 and so on are not types here
            return E.sym(text)
        return ScalarType(DTYPES[text]) if text in DTYPES else E.sym(text)

    def dense(self, c: Children) -> Dense:
        dtype, shape, data = DTYPES[str(c[0])], _unwrap(c[1]), _unwrap(c[2])
        return _dense(dtype, shape, data, self.resources)

    def neg(self, c: Children) -> Any:
        return -_dim(c[0])

    def add(self, c: Children) -> Any:
        return _dim(c[0]) + _dim(c[1])

    def sub(self, c: Children) -> Any:
        return _dim(c[0]) - _dim(c[1])

    def mul(self, c: Children) -> Any:
        a, b = _dim(c[0]), _dim(c[1])
        if isinstance(a, E.Expr) and isinstance(b, E.Expr) and (len(a.terms) + 1) * (len(b.terms) + 1) > MAX_TERMS:
            raise ValueError(f"an index expression of more than {MAX_TERMS} terms")
        return a * b

    def floordiv(self, c: Children) -> Any:
        return E.floordiv(_dim(c[0]), _dim(c[1]))

    def mod(self, c: Children) -> Any:
        return E.mod(_dim(c[0]), _dim(c[1]))

    def max(self, c: Children) -> Any:
        return E.maximum(*map(_dim, c))

    def min(self, c: Children) -> Any:
        return E.minimum(*map(_dim, c))


class _Sentinel:
    """`none` while lark also uses None for absent optional parts."""


_NONE = _Sentinel()
_ABSENT = None


def _unwrap(value: Any) -> Any:
    if value is _NONE:
        return None
    if isinstance(value, tuple):
        return tuple(_unwrap(v) for v in value)
    if isinstance(value, dict):
        return {k: _unwrap(v) for k, v in value.items()}
    return value


def _dim(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, E.Expr)):
        raise ValueError(f"'{value}' cannot stand in an index expression")
    return value


def _dense(dtype: Any, shape: Any, data: Any, resources: Mapping[str, bytes]) -> Dense:
    import math

    import numpy as np
    count = math.prod(shape)
    if count * dtype.bytes > MAX_CONSTANT_BYTES:
        raise ValueError(f"constant of {count} elements is larger than {MAX_CONSTANT_BYTES} bytes")
    if isinstance(data, str) and data.startswith("sha256:"):
        digest = data.removeprefix("sha256:")
        if digest not in resources:
            raise ValueError(f"constant {digest[:12]}... is not in the file's .resources folder")
        raw = resources[digest]
        made = Dense(dtype, shape, raw)
        if made.digest != digest:
            raise ValueError(f"constant {digest[:12]}... is damaged: its bytes hash to {made.digest[:12]}...")
    elif isinstance(data, str) and data.startswith("0x"):
        made = Dense(dtype, shape, bytes.fromhex(data[2:]))
    else:
        made = Dense(dtype, shape, np.array(data, dtype=NUMPY_DTYPES[dtype.name]).tobytes())
    if len(made.data) != count * dtype.bytes:
        raise ValueError(f"constant of shape {list(shape)} needs {count * dtype.bytes} bytes, got {len(made.data)}")
    return made


@lru_cache(maxsize=1)
def _grammar() -> Lark:
    text = (Path(__file__).parent / "grammar.lark").read_text() + "%ignore COMMENT\n"
    return Lark(text, parser="lalr", maybe_placeholders=True, start=["start", "expr", "type"])


@lru_cache(maxsize=4096)
def parse_expr(text: str) -> Any:
    """An index expression (int or Expr) from its text; ValueError if it is none."""
    try:
        return _dim(_Tree({}).transform(_grammar().parse(text, start="expr")))
    except UnexpectedInput as e:
        raise ValueError(f"'{text}' is not an index expression: column {e.column}") from None
    except VisitError as e:
        raise ValueError(str(e.orig_exc)) from None
    except RecursionError:
        raise ValueError(f"the expression '{text[:40]}...' is nested too deeply") from None


@lru_cache(maxsize=4096)
def parse_type(text: str) -> Type:
    """A type from its text; ValueError if it is none."""
    if text in DTYPES:
        return ScalarType(DTYPES[text])
    kind, _, rest = text.partition("<")
    if kind not in ("tensor", "buffer", "tile") or not rest.endswith(">"):
        raise ValueError(f"'{text}' is not a type")
    body, _, layout = rest[:-1].partition(", strides=[")
    *dims, element = _split_dims(body.strip())
    if element not in DTYPES:
        raise ValueError(f"'{text}' has no known element type")
    shape = tuple(parse_expr(d) for d in dims)
    strides = None
    if layout:
        inner = layout.rstrip()[:-1]
        strides = tuple(parse_expr(s) for s in _split_commas(inner))
        if len(strides) != len(shape):
            raise ValueError(f"'{text}' has {len(strides)} strides for {len(shape)} dimensions")
    if kind == "tile":
        return TileType(shape, DTYPES[element])
    return (TensorType if kind == "tensor" else BufferType)(shape, DTYPES[element], strides)


def _split_dims(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if c == "x" and depth == 0 and i > start and (text[start].isdigit() or text[start] in "-(" or text[start:i] not in DTYPES):
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


def _split_commas(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if c == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [p.strip() for p in [*parts, text[start:]] if p.strip()]


class _Builder:
    def __init__(self, filename: str, source: str):
        self.filename, self.source = filename, source

    def fail(self, token: Token, message: str) -> NoReturn:
        raise ParseError(message, self.filename, token.line or 0, token.column or 0, self.source)

    def build(self, tree: tuple, scope: dict[str, Value], depth: int) -> Operation:
        results, name, symbol, operands, attrs, types, regions, loc = tree
        if depth > MAX_DEPTH:
            self.fail(name, f"regions nest deeper than {MAX_DEPTH}")
        values = []
        for token in operands:
            if str(token) not in scope:
                self.fail(token, f"{token} is used before it is defined")
            values.append(scope[str(token)])
        if len(results) != len(types):
            self.fail(name, f"'{name}' names {len(results)} results but has {len(types)} result types")
        attributes = _unwrap(attrs)
        if symbol is not None:
            attributes = {"sym_name": str(symbol)[1:], **attributes}
        try:
            opdef = lookup(str(name))
        except IRError as e:
            self.fail(name, str(e))
        built = []
        for args, ops in regions:
            inner = dict(scope)
            block = Block()
            for token, t in args:
                inner[str(token)] = block.add_arg(t, _hint(token))
            for sub in ops:
                block.append(self.build(sub, inner, depth + 1))
            built.append(Region([block]))
        op = Operation(opdef, values, attributes, types, built, loc if loc is not None else UNKNOWN)
        for token, r in zip(results, op.results, strict=True):
            r.name = _hint(token)
            scope[str(token)] = r
        return op


def _hint(token: Token) -> str:
    text = str(token)[1:]
    return "" if text[0].isdigit() else text


def parse_module(text: str, *, filename: str = "<text>", resources: Mapping[str, bytes] | None = None) -> Operation:
    """The op (usually a module) that `text` describes. Raises ParseError with line and column. Does not verify."""
    try:
        tree = _Tree(resources or {}).transform(_grammar().parse(text, start="start"))
    except UnexpectedInput as e:
        token = getattr(e, "token", None)
        seen = "the end of the text" if (token is None and e.pos_in_stream in (None, -1)) or (token is not None and token.type == "$END") else (
            f"'{token}'" if token is not None else f"character {text[e.pos_in_stream]!r}")  # type: ignore[index]
        expected = sorted(getattr(e, "accepts", None) or getattr(e, "expected", None) or getattr(e, "allowed", None) or ())
        line, column = max(e.line, 1), max(e.column, 1)
        if token is not None and token.type == "$END":
            line, column = text.count("\n") + 1, len(text.rsplit("\n", 1)[-1]) + 1
        raise ParseError(f"unexpected {seen}; expected {', '.join(map(str, expected)) or 'something else'}", filename, line, column,
                         text) from None
    except VisitError as e:
        meta = getattr(e.obj, "meta", None)
        line, column = (getattr(meta, "line", 0) or 0), (getattr(meta, "column", 0) or 0)
        if isinstance(e.obj, Token):
            line, column = e.obj.line or 0, e.obj.column or 0
        elif not line:
            token = next((t for t in e.obj.scan_values(lambda v: isinstance(v, Token))), None) if hasattr(e.obj, "scan_values") else None
            if token is not None:
                line, column = token.line or 0, token.column or 0
        raise ParseError(str(e.orig_exc), filename, line, column, text) from None
    except RecursionError:
        raise ParseError("nested too deeply", filename, *_deepest(text), text) from None
    return _Builder(filename, text).build(tree, {}, 0)


def _deepest(text: str) -> tuple[int, int]:
    """Line and column of the bracket, or else the operator, in which a text that nests too deeply is deepest."""
    depth = deepest = place = 0
    for m in re.finditer(r'"(?:[^"\\\n]|\\.)*"|//[^\n]*|[(\[{]|[)\]}]', text):
        depth += (m.group() in "([{") - (m.group() in ")]}")
        if depth > deepest:
            deepest, place = depth, m.start()
    return text.count("\n", 0, place) + 1, place - text.rfind("\n", 0, place)


def load(path: Path) -> Operation:
    """Reads an IR file with its `<path>.resources` folder. OSError if unreadable, ParseError if malformed."""
    folder = Path(f"{path}.resources")
    resources = {p.stem: p.read_bytes() for p in folder.glob("*.bin")} if folder.is_dir() else {}
    try:
        text = path.read_text()
    except UnicodeDecodeError as e:
        raise ParseError(f"not a text file: {e.reason}", str(path), 1, 1) from None
    return parse_module(text, filename=str(path), resources=resources)
