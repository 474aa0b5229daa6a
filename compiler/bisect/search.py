"""The walk over the stages of one graph: the first that goes wrong, and the ops that it takes.

    report = bisect_graph(captured, options)
    report.rows          # a Row per stage
    report.finding       # None, or the first fault, reduced
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ... import passes  # noqa: F401  (importing passes registers them)
from ...frontend.importer import import_graph
from ...ir import Target
from ...ir.core import UNKNOWN, IRError, Location, Operation, equivalent
from ...ir.passes import Pass, PassContext, parse_pipeline, run_pipeline
from ...ir.types import TensorType
from ..driver import cpu_target
from ..options import Options
from ..pipelines import STAGES, pipeline
from .capture import CapturedGraph
from .checks import WIDE, Check, KernelCheck, PassCheck, ProgramCheck, Verdict, algebra, compare_host, is_host, rounding
from .evaluate import function_of, run_fx, run_module, tensor_outputs, trace, written_arguments
from .importing import NodeRepro, node_repro
from .kernels import NativeLaunch
from .memory import run_native
from .numerics import algebra_tolerance, difference, distance, perturbed
from .reduce import Reduced, reduce

__all__ = ["Finding", "Report", "Row", "bisect_graph"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class Row:
    """One stage: how far its float64 values moved from the stage before, and how far it is from the truth in its own types (relative)."""

    stage: str
    name: str
    moved: float | None
    error: float | None
    verdict: str


@dataclass
class Finding:
    """The first fault. `name` is the pass, 'import', 'llvm' (or 'triton') for a kernel, 'program' for what is around the kernels.

    `reduced` is the smallest module on which `passes` (the last of them at fault) or the backend goes wrong; `node` instead for the importer.
    """

    graph: str
    stage: str
    name: str
    verdict: Verdict
    op: str
    location: Location
    passes: list[Pass] = field(default_factory=list)
    reduced: Reduced | None = None
    node: NodeRepro | None = None
    target: Target | None = None


@dataclass
class Report:
    """What became of one graph."""

    graph: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    finding: Finding | None = None


def bisect_graph(captured: CapturedGraph, options: Options, *, target: Target | None = None, seconds: float = 60, backend: Backend | None = None,
                 tell: Callable[[str], None] | None = None) -> Report:
    """Walks one graph through its stages up to the first fault. `seconds` bound the reduction; `tell` hears what is being looked at.

    `target` and `backend` are for compiling to what this machine is not (`triton.simulated_backend`).
    """
    return _Walk(captured, options, target or cpu_target(options), seconds, tell or (lambda _: None), backend or Backend()).run()


@dataclass(frozen=True)
class Backend:
    """The code generator in question: semantics of `tile.launch`, and of a whole program; by default LLVM's."""

    name: str = "llvm"
    launch: Any = None
    program: Callable[..., Any] = run_native


class _Walk:
    def __init__(self, captured: CapturedGraph, options: Options, target: Target, seconds: float, tell: Callable[[str], None], backend: Backend):
        self.captured, self.options, self.target, self.seconds, self.tell, self.backend = captured, options, target, seconds, tell, backend
        self.arguments = captured.arguments
        self.report = Report(captured.title)

    def run(self) -> Report:
        module = self._import()
        if module is None:
            return self.report
        last, steps = self._tensor_stages(module)
        if last is None or not self._host_stages(last, steps):
            return self.report
        self._backend(last, steps)
        return self.report

    # -- the importer

    def _import(self) -> Operation | None:
        self.tell("eager, and the importer")
        try:
            module = import_graph(self.captured.gm, arg_kinds=self.captured.kinds)
        except Exception as e:  # any fault of the importer is what is looked for
            self._found("import", "import", Verdict("crash", f"{type(e).__name__}: {e}"))
            return None
        func = function_of(module)
        self.truth = run_module(module, self.arguments, WIDE)
        self.wide = self.truth
        random = any(op.name == "graph.extern" and op["random"] for op in func.body)
        plain = [] if random else self._eager(func, None)
        self.plain = plain or run_module(module, self.arguments)
        if not plain:
            self.report.notes.append("the graph draws random numbers: it is compared from the import on" if random
                                     else "ATen cannot run this graph on the CPU: it is compared from the import on")
            self.report.rows.append(Row("capture", "import", None, distance(self.plain, self.truth), "taken as the truth"))
            return module
        exact = self._eager(func, WIDE)
        found = difference(self.truth, exact, algebra_tolerance(exact)) if exact else None
        if found is not None and not found.problem:
            moved = [perturbed(a, 1e-13, i) if isinstance(a, Tensor) else a for i, a in enumerate(self._wide_arguments())]
            sensitive = [(a - b).abs().nan_to_num().max().item() if a.is_floating_point() and a.numel() else 0.0
                         for a, b in zip(self._eager_outputs(func, run_fx(self.captured.gm, moved, WIDE)), exact, strict=True)]
            found = difference(self.truth, exact, [t + 8 * s for t, s in zip(algebra_tolerance(exact), sensitive, strict=True)])
        if found is not None:
            self.report.rows.append(Row("capture", "import", distance(self.truth, exact), None, "BUG"))
            self._wrong_node(module, Verdict("bug", str(found), found))
            return None
        self.report.rows.append(Row("capture", "import", distance(self.truth, exact) if exact else None, distance(self.plain, self.truth), "eager"))
        return module

    def _wide_arguments(self) -> list[Any]:
        return [a.to(WIDE) if isinstance(a, Tensor) and a.is_floating_point() else a for a in self.arguments]

    def _eager_outputs(self, func: Operation, ran: Sequence[Any]) -> list[Tensor]:
        """The FX graph's results and written arguments, as `run_module` orders them."""
        count = len(func["result_attrs"])
        tensors = ran[count:]
        return [*tensor_outputs(func, ran[:count]), *(tensors[i] for i in written_arguments(func))]

    def _eager(self, func: Operation, precision: torch.dtype | None) -> list[Tensor]:
        """The graph by ATen; [] where it does not run there (devices, float64)."""
        try:
            return self._eager_outputs(func, run_fx(self.captured.gm, self.arguments, precision))
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as e:
            self.report.notes.append(f"the captured graph does not run {'in float64' if precision else 'on the CPU'}: {str(e).splitlines()[0][:120]}")
            return []

    def _wrong_node(self, module: Operation, verdict: Verdict) -> None:
        """The first FX node whose imported value differs."""
        known = {v.name: (v, x) for v, x in trace(module, self.arguments, WIDE).values.items() if v.name and isinstance(v.type, TensorType)}
        first: list[tuple[torch.fx.Node, Any]] = []

        def see(node: torch.fx.Node, value: Any) -> None:
            if node.op != "call_function" or first or not isinstance(value, Tensor) or node.name not in known:
                return
            v, got = known[node.name]
            if got.shape == value.shape and difference([got], [value], algebra_tolerance([value])) is not None:
                first.append((node, v))
        run_fx(self.captured.gm, self.arguments, WIDE, see)
        finding = self._found("capture", "import", verdict)
        if first:
            node, value = first[0]
            op = value.defining_op
            finding.op = node.format_node() or node.name
            finding.location = op.location if op is not None else UNKNOWN
            finding.node = node_repro(self.captured.gm, node, self.arguments)

    # -- passes

    def _found(self, stage: str, name: str, verdict: Verdict) -> Finding:
        finding = Finding(self.report.graph, stage, name, verdict, "", UNKNOWN, target=self.target)
        self.report.finding = finding
        return finding

    def _reduced(self, stage: str, name: str, verdict: Verdict, module: Operation, check: Check, applied: list[Pass]) -> None:
        self.tell(f"reducing what '{name}' needs to go wrong")

        def fails(m: Operation, arguments: Sequence[Any]) -> Verdict | None:
            found = check(m, arguments)
            return found if found is not None and found.kind == verdict.kind else None
        small = reduce(module, self.arguments, fails, verdict, seconds=self.seconds)
        finding = self._found(stage, name, small.verdict)
        finding.reduced, finding.passes = small, applied
        finding.op, finding.location = culprit(small)

    def _tensor_stages(self, module: Operation) -> tuple[Operation | None, list[Pass]]:
        """Runs and compares passes while modules are on tensors: (the last such module, the passes that are left); none after a fault."""
        left = [(stage, p) for stage in STAGES for p in parse_pipeline(pipeline(stage, self.target, self.options))]
        ctx = PassContext(self.target)
        while left:
            stage, p = left[0]
            if stage == "host" and p.name != "schedule":
                break
            self.tell(f"{stage}: {p}")
            check = PassCheck([p], self.target)
            before = module.clone()
            try:
                run_pipeline(module, [p], ctx, verify_each=True)
            except Exception as e:  # any fault of a pass is what is looked for
                self.report.rows.append(Row(stage, str(p), None, None, "CRASH"))
                text = str(e) if isinstance(e, IRError) else f"{type(e).__name__}: {e}"
                self._reduced(stage, p.name, Verdict("crash", text), before, check, [p])
                return None, []
            left.pop(0)
            if equivalent(before, module):
                self.report.rows.append(Row(stage, str(p), 0.0, None, "unchanged"))
                continue
            verdict = self._compare(stage, p, before, module)
            if verdict is not None:
                self._reduced(stage, p.name, verdict, before, check, [p])
                return None, []
        return module, [p for _, p in left]

    def _compare(self, stage: str, p: Pass, before: Operation, after: Operation) -> Verdict | None:
        try:
            got = run_module(after, self.arguments, WIDE, check=True)
            found = algebra(before, after, self.arguments, self.wide, got)
        except (IRError, IndexError) as e:
            self.report.rows.append(Row(stage, str(p), None, None, "BUG"))
            return Verdict("bug", f"what it leaves cannot be run: {e}")
        moved, self.wide = distance(got, self.wide), got
        if found is not None:
            self.report.rows.append(Row(stage, str(p), moved, None, "BUG"))
            return Verdict("bug", str(found), found)
        own = run_module(after, self.arguments)
        odd = rounding(own, self.truth, self.plain, self._moved)
        self.report.rows.append(Row(stage, str(p), moved, distance(own, self.truth), "legal rounding" if odd is None else "UNSTABLE"))
        return None if odd is None else Verdict("unstable", str(odd), odd)

    def _moved(self, relative: float, seed: int) -> list[Tensor]:
        """The truth for moved arguments."""
        moved = [perturbed(a, relative, 100 * seed + i) if isinstance(a, Tensor) else a for i, a in enumerate(self._wide_arguments())]
        return run_module(import_graph(self.captured.gm, arg_kinds=self.captured.kinds), moved, WIDE)

    # -- the host program and the backend

    def _host_stages(self, module: Operation, steps: list[Pass]) -> bool:
        """False after a fault."""
        host = module.clone()
        for i, p in enumerate(steps):
            self.tell(f"host: {p}")
            check = PassCheck(steps[:i + 1], self.target)
            try:
                run_pipeline(host, [p], PassContext(self.target))
            except Exception as e:  # any fault of a pass is what is looked for
                self.report.rows.append(Row("host", str(p), None, None, "CRASH"))
                self._reduced("host", p.name, Verdict("crash", f"{type(e).__name__}: {e}"), module, check, steps[:i + 1])
                return False
            verdict = compare_host(module, host, self.arguments) if is_host(host) else None
            self.report.rows.append(Row("host", str(p), None, None, "same bits" if verdict is None else "BUG"))
            if verdict is not None:
                self._reduced("host", p.name, verdict, module, check, steps[:i + 1])
                return False
        return True

    def _backend(self, module: Operation, steps: list[Pass]) -> None:
        name = self.backend.name
        self.tell(f"{name}: kernels one at a time")
        launch = self.backend.launch or NativeLaunch(self.target)  # compiles each kernel once, for both checks
        check: Check = KernelCheck(self.target, launch)
        verdict = check(module, self.arguments)
        self.report.rows.append(Row("backend", f"{name} kernels", None, None, "legal rounding" if verdict is None else verdict.kind.upper()))
        if verdict is not None:
            self._reduced("backend", name, verdict, module, check, [])
            return
        self.tell(f"{name}: the whole program")
        whole = ProgramCheck(steps, self.target, self.backend.program, launch)
        verdict = whole(module, self.arguments)
        self.report.rows.append(Row("backend", "program", None, None, "as its kernels" if verdict is None else verdict.kind.upper()))
        if verdict is not None:
            self._reduced("backend", "program", verdict, module, whole, steps)


def culprit(small: Reduced) -> tuple[str, Location]:
    """(the op of a reduced module whose value is wrong first, or the only one; its Python line)."""
    func = function_of(small.module)
    ops = [op for op in func.body if op is not func.body.terminator]
    if not ops:
        return "", UNKNOWN
    found = small.verdict.difference
    returned = func.body.terminator.operands
    op = ops[-1]
    if found is not None and found.index < len(returned):
        op = returned[found.index].defining_op or op
    if op.name == "tensor.fused":
        inner = op.body.terminator.operands[returned[found.index].index if found is not None and found.index < len(returned) else 0]  # type: ignore[attr-defined]
        op = inner.defining_op or op
    if op.name == "loop":  # no trip of it fails by itself
        body = next(f for f in small.module.body if f.name == "func" and f["sym_name"] == op["body"].name)
        place = next((o.location for o in (op, *body.walk()) if o.location.file), UNKNOWN)
        return _line(op), place
    if op.name == "tile.launch":
        kernel = next(k for k in small.module.body if k.name == "tile.kernel" and k["sym_name"] == op["kernel"].name)
        stores = [o for o in kernel.walk() if o.name == "tile.store"]
        stored = stores[-1].operands[1].defining_op if stores else None
        place = next((o.location for o in (stored, op, *kernel.walk()) if o is not None and o.location.file), UNKNOWN)
        return f"{_line(stored) if stored is not None else ''} in kernel @{kernel['sym_name']}", place
    place = op.location if op.location.file else next((o.location for o in op.walk() if o.location.file), UNKNOWN)
    return _line(op), place


def _line(op: Operation) -> str:
    return str(op).split("\n", 1)[0].strip()[:200]
