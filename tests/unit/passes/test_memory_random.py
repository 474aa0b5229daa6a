"""Random programs through schedule, bufferize and plan_memory, run on symbolic contents before and after.

A value's content is a term: ("k", kernel, output, operand contents...). The tensor-level program is evaluated with values; the
host program with bytes: each buffer is a byte range of the arena (or an argument) that holds the term last written there. Any
clobbered buffer, wrong order or lost assignment gives another term.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import pytest
from aicc.ir import DTYPES, Block, Builder, Dense, Operation, Region, SymbolRef, Target, TensorType, Value, make_func, make_module, sym
from aicc.ir.expr import evaluate
from aicc.ir.passes import PassContext, run_pipeline
from aicc.ir.types import BufferType
from aicc.passes.bufferize import Bufferize
from aicc.passes.plan_memory import PlanMemory
from aicc.passes.schedule import Schedule, peak_bytes
from aicc.passes.side_by_side import SideBySide
from aicc.passes.storage import size_at, storage_bytes
from aicc.passes.two_streams import TwoStreams
from hypothesis import given
from hypothesis import strategies as st
from hypothesis import target as aim
from support.fuzzing import attempt, scaled

F32 = DTYPES["f32"]
GPU = Target(kind="cuda", name="sm_90", capability=90, multiprocessors=132)
SHAPES: dict[str, list[tuple[Any, ...]]] = {
    "static": [(4,), (16,), (16, 4), (100,), (8, 33), (1000,)],
    "dynamic": [(4,), (sym("s0"),), (sym("s0"), 16), (sym("s0"), sym("s1")), (sym("s1"), 4), (sym("s0") + 3,), (100,)],
}


@dataclass
class Program:
    """A module under construction, with what the kernels may do in place."""

    module: Operation
    block: Block
    func: Operation
    body: Block
    kernels: int = 0
    values: list[Value] = field(default_factory=list)

    def launch(self, inputs: list[Value], types: list[TensorType], inplace: list[tuple[int, int]],
               cached: bool = False) -> Operation:
        name = f"k{self.kernels}"
        self.kernels += 1
        args = [BufferType(v.type.shape, v.type.dtype, v.type.strides) for v in inputs]  # type: ignore[attr-defined]
        inner = Block([*args, *(BufferType(t.shape, t.dtype) for t in types)])
        inner.append(Operation.create("tile.yield"))
        symbols = ("s0", "s1") if self.func.attributes.get("symbols") else ()
        kernel = Operation.create("tile.kernel", (),
                                  {"sym_name": name, "grid": (1,), "outputs": len(types), "inplace": tuple(inplace),
                                                      "symbols": symbols,
                                   "bytes": 100_000 if self.kernels % 3 else 1000, "flops": 0}, (), [Region([inner])])
        self.block.insert_before(self.func, kernel)
        attrs: dict[str, Any] = {"kernel": SymbolRef(name), **({"cached": True} if cached else {})}
        op = Builder.at_end(self.body).create("tile.launch", inputs, attrs, types)
        self.values += op.results
        return op


@st.composite
def programs(draw: st.DrawFn, kind: str = "static") -> Operation:
    module, block = make_module("tile")
    shapes = SHAPES[kind]
    arg_types = [TensorType(draw(st.sampled_from(shapes)), F32) for _ in range(draw(st.integers(1, 4)))]
    kinds = [draw(st.sampled_from(["input", "param"])) for _ in arg_types]
    symbols = {"symbols": {"s0": (2, None), "s1": (1, 512)}} if kind == "dynamic" else {}
    func, body = make_func(block, "main", arg_types, [f"x{i}" for i in range(len(arg_types))],
                           arg_attrs=tuple({"kind": k} for k in kinds), **symbols)
    p = Program(module, block, func, body, values=list(body.args))
    stable: set[Value] = {a for a, k in zip(body.args, kinds, strict=True) if k == "param"}
    b = Builder.at_end(body)
    for i in range(draw(st.integers(0, 14))):
        choice = draw(st.integers(0, 11))
        if choice == 0:
            shape = (draw(st.integers(1, 40)),)
            p.values.append(b.op("tensor.constant", type=TensorType(shape, F32), value=Dense(F32, shape, bytes(4 * shape[0]))))
            stable.add(p.values[-1])
            continue
        inputs = [draw(st.sampled_from(p.values)) for _ in range(draw(st.integers(1, 3)))]
        same = draw(st.booleans())
        types = [inputs[0].type if same and j == 0 else TensorType(draw(st.sampled_from(shapes)), F32)
                 for j in range(draw(st.integers(1, 2)))]
        if choice == 1:
            made = b.create("tensor.extern", inputs, {
                "target": f"test.op{i}.default", "args": tuple({"operand": k} for k in range(len(inputs))),
                "random": draw(st.booleans()), "result_kinds": ("tensor",) * len(types)}, types)
            p.values += made.results
            continue
        cached = all(v in stable for v in inputs) and draw(st.booleans())
        inplace = [(0, len(inputs))] if same and draw(st.booleans()) else []
        op = p.launch(inputs, types, inplace, cached)
        if cached:
            stable.update(op.results)
    for target in body.args:
        if draw(st.integers(0, 3)) == 0:
            same_type = [v for v in p.values if v.type == target.type]
            b.create("tensor.assign", [target, draw(st.sampled_from(same_type))])
    results = [draw(st.sampled_from(p.values)) for _ in range(draw(st.integers(0, 4)))]
    attrs = []
    for v in results:
        shape = v.type.shape  # type: ignore[attr-defined]
        flipped = len(shape) == 2 and draw(st.booleans())
        attrs.append({"kind": "tensor", **({"strides": (1, shape[0])} if flipped else {})})
    func.attributes["result_attrs"] = tuple(attrs)
    b.create("return", results)
    return module


def function(module: Operation) -> Operation:
    return next(op for op in module.body if op.name == "func")


def applied(op: Operation, index: int, contents: list[Any]) -> Any:
    label = op["kernel"].name if "kernel" in op.attributes else op["target"]
    return (label, index, *contents)


def evaluate_values(func: Operation) -> tuple[list[Any], list[Any], list[str]]:
    """Contents of the results, of the arguments after the call, and the random externs in order."""
    env: dict[Value, Any] = {a: f"arg{i}" for i, a in enumerate(func.body.args)}
    final = {i: f"arg{i}" for i in range(len(func.body.args))}
    effects = []
    for op in func.body:
        if op.name == "tensor.constant":
            env[op.result] = ("constant", op["value"].shape)
        elif op.name in ("tile.launch", "tensor.extern"):
            for i, r in enumerate(op.results):
                env[r] = applied(op, i, [env[v] for v in op.operands])
            if op.name == "tensor.extern" and op["random"]:
                effects.append(op["target"])
        elif op.name == "tensor.assign":
            final[op.operands[0].index] = env[op.operands[1]]  # type: ignore[attr-defined]
    return [env[v] for v in func.body.terminator.operands], list(final.values()), effects


class Memory:
    """Contents by place: (space, low, high). Writing a range destroys whatever overlaps it."""

    def __init__(self) -> None:
        self.cells: dict[tuple[Any, int, int], Any] = {}

    def write(self, place: tuple[Any, int, int], content: Any) -> None:
        space, low, high = place
        for other in list(self.cells):
            if other[0] == space and other[1] < high and low < other[2]:
                del self.cells[other]
        self.cells[place] = content

    def read(self, place: tuple[Any, int, int]) -> Any:
        return self.cells.get(place, ("garbage", place))


def backwards(ops: list[Operation]) -> list[Operation]:
    """The ops of a program, those that run side by side in the opposite order."""
    found: list[Operation] = []
    for number, members in groupby((op for op in ops if op.name in _STEPS), key=lambda op: op.attributes.get("beside", 0)):
        found += list(members)[::-1 if number else 1]
    return [*(op for op in ops if op.name not in _STEPS), *found]


def late_or_early(ops: list[Operation], late: int) -> list[Operation]:
    """An order in which a device may run the steps of two streams: stream `late` as late as the waits allow, the other one as early."""
    queues: list[list[Operation]] = [[], []]
    found = [op for op in ops if op.name not in _STEPS and op.name != "host.wait"]
    for op in ops:
        if op.name == "host.wait":
            found += queues[op["on"]]
            queues[op["on"]] = []
        elif op.name in _STEPS:
            stream = op.attributes.get("stream", 0)
            if stream == late:
                queues[late].append(op)
            else:
                found.append(op)
    return [*found, *queues[0], *queues[1]]


_STEPS = ("host.launch", "host.copy", "host.extern", "host.loop")


def evaluate_host(func: Operation, inputs: int, symbols: dict[str, int], turned: bool = False,
                  order: list[Operation] | None = None) -> tuple[list[Any], list[Any], list[str]]:
    memory = Memory()
    places: dict[Value, tuple[Any, int, int]] = {}
    for i, a in enumerate(func.body.args):
        places[a] = (f"arg{i}", 0, evaluate(storage_bytes(a.type), symbols))  # type: ignore[arg-type]
        if i < inputs:
            memory.write(places[a], f"arg{i}")
    effects = []
    for op in order if order is not None else backwards(func.body.ops) if turned else func.body:
        if op.name == "host.constant":
            places[op.result] = (op, 0, 1)
            memory.write((op, 0, 1), ("constant", op["value"].shape))
        elif op.name == "host.persistent":
            places[op.result] = (op, 0, 1)
        elif op.name == "host.slot":
            low = evaluate(op["offset"], symbols)
            places[op.result] = ("arena", low, low + evaluate(op["bytes"], symbols))
        elif op.name == "host.view":
            space, start, _ = places[op.operands[0]]
            low = start + 4 * evaluate(op["offset"], symbols)
            places[op.result] = (space, low, low + evaluate(storage_bytes(op.result.type), symbols))  # type: ignore[arg-type]
        elif op.name == "host.copy":
            memory.write(places[op.operands[1]], memory.read(places[op.operands[0]]))
        elif op.name in ("host.launch", "host.extern"):
            split = op["inputs"] if op.name == "host.extern" else len(op.operands) - op["outputs"]
            contents = [memory.read(places[v]) for v in op.operands[:split]]
            for i, v in enumerate(op.operands[split:]):
                memory.write(places[v], applied(op, i, contents))
            if op.name == "host.extern" and op["random"]:
                effects.append(op["target"])
    results: list[Any] = []
    for r in func["result_attrs"]:
        results.append(results[r["result"]] if r["kind"] == "same" else memory.read(places[func.body.args[r["arg"]]]))
    return results, [memory.read(places[a]) for a in func.body.args[:inputs]], effects


def check(module: Operation, values: list[dict[str, int]], beside: bool = False, streams: bool = False) -> int:
    """The number of launches that run side by side, or on a second stream."""
    func = function(module)
    inputs = len(func.body.args)
    want = evaluate_values(func)
    before = peak_bytes(module, func)
    run_pipeline(module, [Schedule()], PassContext())
    assert peak_bytes(module, func) <= before
    assert evaluate_values(func) == want
    run_pipeline(module, [Bufferize(), *([SideBySide()] if beside else []), *([TwoStreams(replayed=True)] if streams else []), PlanMemory(check=True)], PassContext(target=GPU))
    stats = func["stats"]
    for symbols in values:
        assert evaluate_host(func, inputs, symbols) == want
        if beside:
            assert evaluate_host(func, inputs, symbols, turned=True) == want
        for late in (0, 1) if streams else ():
            assert evaluate_host(func, inputs, symbols, order=late_or_early(func.body.ops, late)) == want
        arena, bound, unplanned = (size_at(stats[k], symbols) for k in ("arena_bytes", "lower_bound", "unplanned_bytes"))
        assert bound <= arena <= unplanned
    return sum(bool(op.attributes.get("beside") or op.attributes.get("stream")) for op in func.body)


@scaled(75)
@given(programs("static"))
def test_static_programs(module: Operation) -> None:
    attempt(module, lambda: check(module, [{}]))


@scaled(75)
@given(programs("dynamic"))
def test_dynamic_programs(module: Operation) -> None:
    attempt(module, lambda: check(module, [{"s0": 2, "s1": 1}, {"s0": 2, "s1": 7}, {"s0": 33, "s1": 512}, {"s0": 1000, "s1": 1}]))


@scaled(75)
@given(programs("static"))
def test_launches_side_by_side_in_any_order(module: Operation) -> None:
    """Memory is planned so that members of a group may come in the opposite order."""
    attempt(module, lambda: aim(float(check(module, [{}], beside=True))))


@scaled(75)
@given(programs("static"))
def test_two_streams_in_any_order(module: Operation) -> None:
    """Memory is planned so that either stream may be as late as the waits between them allow."""
    attempt(module, lambda: aim(float(check(module, [{}], streams=True))))


def test_contents_differ_when_a_buffer_is_clobbered() -> None:
    """The evaluation itself: two overlapping places do not both keep their contents."""
    memory = Memory()
    memory.write(("arena", 0, 64), "a")
    memory.write(("arena", 32, 96), "b")
    assert memory.read(("arena", 0, 64)) != "a" and memory.read(("arena", 32, 96)) == "b"


if __name__ == "__main__":
    pytest.main([__file__])
