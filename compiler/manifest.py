"""From a host-level module to the manifest that `runtime/executor.py` runs by.

    manifest = build_manifest(module)       # plain JSON data

Names of native functions, agreed with the backend: each maximal run of launches and copies between externs is a segment,
`NAME_0`, `NAME_1`, ...; `NAME_pack_<id>` fills persistent buffer <id>, and all other outputs of the same cached launch.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..ir.core import BlockArg, IRError, Operation, Value
from ..ir.expr import Dim, Expr, free_symbols
from ..ir.expr_json import expr_to_json
from ..ir.types import BufferType, element_type

__all__ = ["build_manifest"]


def build_manifest(module: Operation, name: str = "main", errors: Mapping[int, str] | None = None, *, device: str = "cpu",
                   stepwise: bool = False) -> dict[str, Any]:
    """The manifest of function `name` of a module at the host level; `errors` are the messages of native error codes. `stepwise`: as the
    code was compiled, each launch is a step.

    IRError if there is no such function, it is not fully planned, or an argument is on a device that a program for `device` cannot read.
    """
    for op in module.body:
        if op.name == "func" and op["sym_name"] == name:
            return _Builder(module, op, device, stepwise).build(errors or {})
    raise IRError(f"the module has no function '{name}'")


@dataclass(frozen=True)
class _Place:
    """Where a buffer is: a space, a number within it, and an offset in bytes."""

    space: str
    index: int
    offset: Dim


class _Builder:
    def __init__(self, module: Operation, func: Operation, device: str, stepwise: bool = False):
        self.func = func
        self.stepwise = stepwise
        self.device = device
        self.kernels = {op["sym_name"]: op for op in module.body if op.name == "tile.kernel"}
        self.args = func.body.args
        self.arg_attrs: Sequence[Mapping[str, Any]] = func["arg_attrs"] or ({"kind": "input"},) * len(self.args)
        self.inputs = [a for a in self.args if self._kind(a) not in ("output", "extern", "late")]
        self.buffers = self.args[len(self.inputs):]
        self.places: dict[Value, _Place] = {}
        self.constants: list[str] = []
        self.constant_ops: list[Operation] = []
        for i, a in enumerate(self.args):
            n = len(self.inputs)
            self.places[a] = _Place("input", i, 0) if i < n else _Place("buffer", i - n, 0)
        if any(self._kind(a) not in ("output", "extern", "late") for a in self.buffers):
            raise IRError("the inputs of a host function must come before its outputs")

    def build(self, errors: Mapping[int, str]) -> dict[str, Any]:
        func = self.func
        self._find_places()
        steps, mutated = self._steps()
        manifest = {
            "name": func["sym_name"], "symbols": list(func["symbols"]),
            "inputs": self._inputs(),
            "symbol_args": [[a["position"], str(a["expr"]) if _is_symbol(a["expr"]) else None] for a in func["symbol_args"]],
            "symbol_sources": [[name, *where[:2], *(where[2:] or ("size",))] for name, where in func["symbol_sources"].items()],
            "buffers": [{"kind": self._kind(a), **_layout(a.type)} for a in self.buffers],
            "results": [self._result(r) for r in func["result_attrs"]],
            "persistent": self._persistent(),
            "arena": expr_to_json(func["stats"].get("arena_bytes", 0)),
            "steps": steps, "mutated": mutated, "constants": self.constants,
            "errors": {str(code): message for code, message in errors.items()},
        }
        return json.loads(json.dumps(manifest, allow_nan=False))  # tuples become lists, as after a trip through a file

    # -- values

    def _kind(self, a: BlockArg) -> str:
        return str(self.arg_attrs[a.index].get("kind", "input"))

    def _find_places(self) -> None:
        for op in self.func.body:
            if op.name == "host.slot":
                self.places[op.result] = _Place("arena", 0, op["offset"])
            elif op.name == "host.persistent":
                self.places[op.result] = _Place("persistent", op["id"], 0)
            elif op.name == "host.constant":
                self.places[op.result] = _Place("constant", len(self.constant_ops), 0)
                self.constant_ops.append(op)
            elif op.name == "host.view":
                base = self.places[op.operands[0]]
                moved = op["offset"] * element_type(op.operands[0].type).bytes
                self.places[op.result] = _Place(base.space, base.index, base.offset + moved)
            elif op.name == "host.alloc":
                raise IRError("'host.alloc' is left: run plan-memory before building a manifest")

    def _operand(self, v: Value) -> dict[str, Any]:
        place = self.places[v]
        index = place.index
        if place.space == "constant":  # only constants that an extern reads are kept in the manifest
            data = base64.b64encode(self.constant_ops[index]["value"].data).decode()
            if data not in self.constants:
                self.constants.append(data)
            index = self.constants.index(data)
        return {"space": place.space, "index": index, "offset": expr_to_json(place.offset), **_layout(v.type)}

    def _inputs(self) -> list[dict[str, Any]]:
        taken = {a["position"] for a in self.func["symbol_args"]}
        free = (p for p in range(len(self.inputs) + len(taken)) if p not in taken)
        rows = []
        for a in self.inputs:
            attrs = self.arg_attrs[a.index]
            following = next(free)
            if self.device == "cpu" and not str(attrs.get("device", "cpu")).startswith("cpu"):
                raise IRError(f"argument '{attrs.get('name', a.name)}' is on {attrs['device']}; this program runs on the CPU")
            rows.append({"name": attrs.get("name") or a.name or f"argument {a.index}",
                         "position": attrs.get("position", following),
                         **({"number": True} if attrs.get("number") else {}), **_layout(a.type)})
        return rows

    def _result(self, attrs: Mapping[str, Any]) -> dict[str, Any]:
        kind = attrs["kind"]
        if kind in ("buffer", "item"):
            return {"kind": kind, "buffer": attrs["arg"] - len(self.inputs)}
        if kind == "input":
            return {"kind": kind, "input": attrs["arg"]}
        if kind == "same":
            return {"kind": kind, "result": attrs["result"]}
        if kind == "int":
            return {"kind": kind, "expr": expr_to_json(attrs["expr"])}
        if kind == "view":
            n = len(self.inputs)
            of = {"input": attrs["arg"]} if attrs["arg"] < n else {"buffer": attrs["arg"] - n}
            return {"kind": kind, **of, **({"dtype": attrs["dtype"]} if "dtype" in attrs else {}), "offset": expr_to_json(attrs.get("offset", 0)),
                    "shape": [expr_to_json(e) for e in attrs["shape"]], "strides": [expr_to_json(e) for e in attrs["strides"]]}
        if kind == "none":
            return {"kind": kind}
        raise IRError(f"unknown kind of result '{kind}'")

    # -- persistent buffers

    def _persistent(self) -> list[dict[str, Any]]:
        rows: dict[int, dict[str, Any]] = {}
        launches = [op for op in self.func.body if op.name == "host.launch"]
        for op in self.func.body:
            if op.name == "host.persistent":
                rows[op["id"]] = {"bytes": expr_to_json(op["bytes"]), "guards": list(op["guards"]), "pack": None,
                                  "transient": False,
                                  "symbolic": isinstance(op["bytes"], Expr)}
        used = {self.places[v].index for op in self.func.body if op.name in _READS
                and not (op.name == "host.launch" and op["cached"])
                for v in op.operands if v in self.places and self.places[v].space == "persistent"}
        for op in launches:
            if not op["cached"]:
                continue
            made = sorted(self.places[v].index for v in op.operands[len(op.operands) - op["outputs"]:])
            rows[made[0]]["pack"] = f"{self.func['sym_name']}_pack_{made[0]}"
            symbolic = bool(self.kernels[op["kernel"].name]["symbols"])
            needed = [self.places[v].index for v in op.operands if self.places[v].space == "persistent"]
            for i in made:
                rows[i]["symbolic"] |= symbolic or any(rows[j]["symbolic"] for j in needed)
                rows[i]["transient"] = not used.intersection(made)
        if sorted(rows) != list(range(len(rows))):
            raise IRError(f"persistent buffers must be numbered 0, 1, 2, ...; found {sorted(rows)}")
        return [rows[i] for i in range(len(rows))]

    # -- the program

    def _steps(self) -> tuple[list[list[Any]], list[int]]:
        steps: list[list[Any]] = []
        mutated: set[int] = set()
        last_use: dict[int, int] = {}  # buffer -> the last step that touches it
        known = set(self.func["symbols"])
        for op in self.func.body:
            if op.name == "host.extern":
                known -= set(op["defines"])
        made = {self.places[v].index for op in self.func.body if op.name == "host.extern" for v in op.operands[op["inputs"]:]}
        waiting = [a for a in self.buffers if self.places[a].index not in made and not _needs(a.type) <= known]
        segment, busy = 0, False

        def touch(op: Operation) -> None:
            for v in op.operands:
                if self.places[v].space == "buffer":
                    last_use[self.places[v].index] = len(steps)

        def close() -> None:
            nonlocal segment, busy
            if busy:
                steps.append(["call", f"{self.func['sym_name']}_{segment}"])
                segment, busy = segment + 1, False

        for op in self.func.body:
            if op.name in ("host.launch", "host.loop", "host.library", "host.copy") and not op.attributes.get("cached", False):
                outputs = 1 if op.name == "host.copy" else op["outputs"]
                busy = True
                touch(op)
                early = [a for a in waiting if a in op.operands]
                if early:
                    raise IRError(f"'{op.name}' comes before the symbols that decide the size of a buffer of type {early[0].type}")
                mutated |= {self.places[v].index for v in op.operands[len(op.operands) - outputs:]
                            if self.places[v].space == "input"}
                if self.stepwise:
                    close()
            elif op.name == "host.extern":
                close()
                touch(op)
                steps.append(["extern", self._extern(op)])
                known |= set(op["defines"])
                ready = [a for a in waiting if _needs(a.type) <= known]
                if ready:
                    waiting = [a for a in waiting if a not in ready]
                    steps.append(["allocate", [self.places[a].index for a in ready]])
        close()
        if waiting:
            raise IRError(f"the size of a buffer of type {waiting[0].type} depends on a symbol that nothing defines")
        return self._with_drops(steps, last_use), sorted(mutated)

    def _with_drops(self, steps: list[list[Any]], last_use: Mapping[int, int]) -> list[list[Any]]:
        """Buffers that are not returned go as soon as their last step has run."""
        kept = {r["arg"] - len(self.inputs) for r in self.func["result_attrs"] if r["kind"] in ("buffer", "item", "view")}
        done: list[list[Any]] = []
        for i, step in enumerate(steps):
            done.append(step)
            dead = sorted(b for b, last in last_use.items() if last == i and b not in kept)
            if dead and i + 1 < len(steps):
                done.append(["drop", dead])
        return done

    def _extern(self, op: Operation) -> dict[str, Any]:
        n = op["inputs"]
        strides = op["operand_strides"] or (None,) * n
        return {"target": op["target"], "args": [_encode(a) for a in op["args"]],
                "kwargs": {k: _encode(v) for k, v in op["kwargs"].items()},
                "operands": [self._operand(v) for v in op.operands[:n]],
                "operand_strides": [self._strides(v, s) for v, s in zip(op.operands[:n], strides, strict=True)],
                "result_kinds": list(op["result_kinds"]) or ["tensor"] * (len(op.operands) - n),
                "results": [_layout(v.type) for v in op.operands[n:]],
                "buffers": [self.places[v].index for v in op.operands[n:]],
                "defines": [[name, *where, *self.func["symbols"].get(name, (0, None))] for name, where in op["defines"].items()]}

    def _strides(self, v: Value, wanted: tuple[Dim, ...] | None) -> list[Any] | None:
        """The strides that an operand must be given (it has them in eager; none: row-major); None if it has them already."""
        t = v.type
        assert isinstance(t, BufferType)
        strides = BufferType(t.shape, t.dtype).layout if wanted is None else wanted
        return None if strides == t.layout else [expr_to_json(e) for e in strides]


_READS = ("host.launch", "host.loop", "host.library", "host.copy", "host.extern")


def _layout(t: Any) -> dict[str, Any]:
    assert isinstance(t, BufferType)
    return {"dtype": t.dtype.name, "shape": [expr_to_json(e) for e in t.shape], "strides": [expr_to_json(e) for e in t.layout]}


def _needs(t: Any) -> set[str]:
    """The symbols that a buffer's allocation needs."""
    return {s for e in (*t.shape, *t.layout) for s in free_symbols(e)}


def _is_symbol(e: Any) -> bool:
    return isinstance(e, Expr) and free_symbols(e) == {str(e)}


def _encode(a: Any) -> Any:
    """An encoded operator argument (see `frontend/extern.py`) as JSON."""
    if isinstance(a, float) and (a != a or a in (float("inf"), float("-inf"))):
        return {"float": str(a)}
    if isinstance(a, tuple):
        return [_encode(x) for x in a]
    if isinstance(a, Expr):
        return {"expr": expr_to_json(a)}
    if isinstance(a, Mapping):
        (kind, value), = a.items()
        if kind == "expr":
            return {"expr": expr_to_json(value)}
        return {kind: list(value) if isinstance(value, tuple) else value}
    return a
