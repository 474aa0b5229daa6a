"""IR to text. One syntax for every op of every level; the grammar is `ir/grammar.lark`.

    %r = tensor.generic(%a, %b) {dims = [4, 8]} : tensor<4x8xf32> {
      ^(%x: f32, %y: f32):
        ...
    } loc("model.py":12, "layer.0")

Printing is deterministic, and `parse(print(m))` is equivalent to `m`. Constants larger than `INLINE_BYTES` print as a content hash;
their bytes go to the `resources` dictionary (`print_with_resources`) or to a folder beside the file (`save`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .attributes import Dense, SymbolRef
from .core import UNKNOWN, Block, Operation, Value
from .expr import Expr
from .types import Type

__all__ = ["INLINE_BYTES", "print_attribute", "print_op", "print_with_resources", "save"]

INLINE_BYTES = 1024


def print_attribute(value: Any, resources: dict[str, bytes] | None = None) -> str:
    """The text of an attribute; bytes of large constants are added to `resources`."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        text = repr(value)
        return text if not text.lstrip("-").isdigit() else f"{text}.0"
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, (int, Expr, Type, SymbolRef)):
        return str(value)
    if isinstance(value, tuple):
        return f"[{', '.join(print_attribute(v, resources) for v in value)}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_key(k)} = {print_attribute(v, resources)}' for k, v in value.items())}}}"
    if isinstance(value, Dense):
        return _print_dense(value, resources)
    raise TypeError(f"not an attribute: {value!r}")


def _key(key: str) -> str:
    return key if key.isidentifier() and key.isascii() else json.dumps(key)


def _print_dense(value: Dense, resources: dict[str, bytes] | None) -> str:
    shape = f"[{', '.join(map(str, value.shape))}]"
    if len(value.data) > INLINE_BYTES:
        if resources is not None:
            resources[value.digest] = value.data
        return f'dense<{value.dtype}, {shape}, "sha256:{value.digest}">'
    plain = value.dtype.kind in ("int", "uint", "bool") or value.dtype.name in ("f32", "f64", "f16")
    flat = value.to_numpy().reshape(-1)
    if not plain or (flat.dtype.kind == "f" and bool(np.isnan(flat).any())):
        return f'dense<{value.dtype}, {shape}, "0x{value.data.hex()}">'
    return f"dense<{value.dtype}, {shape}, {print_attribute(tuple(x.item() for x in flat))}>"


class _Printer:
    def __init__(self, locations: bool, resources: dict[str, bytes] | None):
        self.locations = locations
        self.resources = resources
        self.lines: list[str] = []
        self.names: dict[Value, str] = {}
        self.taken: set[str] = set()
        self.counter = 0

    def name(self, v: Value) -> str:
        found = self.names.get(v)
        if found is not None:
            return found
        hint = "".join(c if (c.isalnum() and c.isascii()) or c == "_" else "_" for c in v.name)
        if not hint or hint[0].isdigit():
            while str(self.counter) in self.taken:
                self.counter += 1
            hint = str(self.counter)
        elif hint in self.taken:
            n = 1
            while f"{hint}_{n}" in self.taken:
                n += 1
            hint = f"{hint}_{n}"
        self.taken.add(hint)
        self.names[v] = f"%{hint}"
        return self.names[v]

    def block(self, block: Block, indent: int) -> None:
        pad = "  " * indent
        if block.args:
            self.lines.append(f"{pad}^({', '.join(f'{self.name(a)}: {a.type}' for a in block.args)}):")
        for op in block:
            self.op(op, indent + (1 if block.args else 0))

    def op(self, op: Operation, indent: int) -> None:
        pad = "  " * indent
        attrs = op.attributes
        text = pad
        operands = ", ".join(self.name(v) for v in op.operands)
        if op.results:
            text += ", ".join(self.name(r) for r in op.results) + " = "
        text += op.name
        if isinstance(attrs.get("sym_name"), str) and attrs["sym_name"]:
            text += f" @{attrs['sym_name']}"
            attrs = {k: v for k, v in attrs.items() if k != "sym_name"}
        text += f"({operands})" if operands or not op.regions else ""
        if attrs:
            text += " " + print_attribute(attrs, self.resources)
        if op.results:
            text += " : " + ", ".join(str(r.type) for r in op.results)
        for region in op.regions:
            saved = (set(self.taken), self.counter)
            self.lines.append(text + " {")
            for block in region.blocks:
                self.block(block, indent + 1)
            text = pad + "}"
            self.taken, self.counter = saved
        if self.locations and op.location != UNKNOWN:
            loc = op.location
            text += f" loc({json.dumps(loc.file)}:{loc.line}, {json.dumps(loc.module)})"
        self.lines.append(text)


def print_op(op: Operation, *, locations: bool = False) -> str:
    """The text of an op and all that it holds. Large constants appear as their hash only."""
    p = _Printer(locations, None)
    p.op(op, 0)
    return "\n".join(p.lines) + "\n"


def print_with_resources(op: Operation, *, locations: bool = True) -> tuple[str, dict[str, bytes]]:
    """The text, and the bytes of the large constants by their sha256."""
    resources: dict[str, bytes] = {}
    p = _Printer(locations, resources)
    p.op(op, 0)
    return "\n".join(p.lines) + "\n", resources


def save(op: Operation, path: Path, *, locations: bool = True) -> None:
    """Writes the text to `path` and large constants to the folder `<path>.resources`."""
    text, resources = print_with_resources(op, locations=locations)
    if resources:
        folder = Path(f"{path}.resources")
        folder.mkdir(exist_ok=True)
        for digest, data in resources.items():
            (folder / f"{digest}.bin").write_bytes(data)
    path.write_text(text)


