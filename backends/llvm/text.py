"""The text of an LLVM module: what llvmlite's `str(module)` gives, but for blanks, in less than half of the time.

llvmlite formats an instruction through half a dozen calls, and a program for a CPU has some ten thousand. Here there is one format per kind; rare
kinds, and instructions with metadata, are left to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from llvmlite.ir import instructions as kinds

__all__ = ["module_text"]


def module_text(module: ir.Module) -> str:
    """The module's text, which ends with a newline."""
    lines = [f'; ModuleID = "{module.name}"', f'target triple = "{module.triple}"', f'target datalayout = "{module.data_layout}"', ""]
    lines += [t.get_declaration() for t in module.get_identified_types().values()]
    for g in module.global_values:
        if isinstance(g, ir.Function) and g.blocks:
            _function(g, lines)
        else:
            lines.append(str(g))
    return "\n".join([*lines, *module._get_metadata_lines(), ""])


def _function(f: ir.Function, lines: list[str]) -> None:
    head: list[str] = []
    f.descr_prototype(head)
    lines.append("".join(head) + "{")
    for block in f.blocks:
        lines.append(f"{block._format_name()}:")
        for i in block.instructions:
            write = None if i.metadata else _FORMATS.get(type(i))
            lines.append(f"  {i if write is None else write(i)}")
    lines.append("}\n")


def _flags(i: Any) -> str:
    return "".join([f" {flag}" for flag in i.flags]) if i.flags else ""


def _plain(i: Any) -> str:
    operands = ", ".join([x.get_reference() for x in i.operands])
    return f"{i.get_reference()} = {i.opname}{_flags(i)} {i.type} {operands}"


def _compare(i: Any) -> str:
    a, b = i.operands
    return f"{i.get_reference()} = {i.opname}{_flags(i)} {i.op} {a.type} {a.get_reference()}, {b.get_reference()}"


def _select(i: Any) -> str:
    c, a, b = i.operands
    return (f"{i.get_reference()} = select{_flags(i)} {c.type} {c.get_reference()}, {a.type} {a.get_reference()}, "
            f"{b.type} {b.get_reference()}")


def _address(i: Any) -> str:
    indices = ", ".join([f"{x.type} {x.get_reference()}" for x in i.indices])
    inbounds = " inbounds" if i.inbounds else ""
    return f"{i.get_reference()} = getelementptr{inbounds} {i.source_etype}, {i.pointer.type} {i.pointer.get_reference()}, {indices}"


def _load(i: Any) -> str:
    p, = i.operands
    align = "" if i.align is None else f", align {i.align}"
    return f"{i.get_reference()} = load {i.type}, {p.type} {p.get_reference()}{align}"


def _store(i: Any) -> str:
    v, p = i.operands
    align = "" if i.align is None else f", align {i.align}"
    return f"store {v.type} {v.get_reference()}, {p.type} {p.get_reference()}{align}"


def _cast(i: Any) -> str:
    v, = i.operands
    return f"{i.get_reference()} = {i.opname} {v.type} {v.get_reference()} to {i.type}"


def _elements(i: Any) -> str:
    operands = ", ".join([f"{x.type} {x.get_reference()}" for x in i.operands])
    return f"{i.get_reference()} = {i.opname} {operands}"


def _phi(i: Any) -> str:
    incoming = ", ".join([f"[{v.get_reference()}, {b.get_reference()}]" for v, b in i.incomings])
    return f"{i.get_reference()} = phi{_flags(i)} {i.type} {incoming}"


_FORMATS: dict[type, Callable[[Any], str]] = {
    kinds.Instruction: _plain, kinds.ICMPInstr: _compare, kinds.FCMPInstr: _compare, kinds.SelectInstr: _select, kinds.GEPInstr: _address,
    kinds.LoadInstr: _load, kinds.StoreInstr: _store, kinds.CastInstr: _cast, kinds.InsertElement: _elements, kinds.ExtractElement: _elements,
    kinds.ShuffleVector: _elements, kinds.PhiInstr: _phi}
