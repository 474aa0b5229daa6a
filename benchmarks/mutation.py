"""Do the tests notice? Plants small faults in the compiler, one at a time, and runs the tests that ought to fail.

    python -m aicc.benchmarks.mutation --sample 60 --seed 1 --jobs 1

A mutant is one source file with one change: an operator swapped, a constant off by one, a comparison moved to its neighbour, a condition
negated, a statement dropped. First the tests of all the files (`TESTS`) run on the unchanged package, while `mutation_tests.py` notes which of
them run which changed lines; one that fails there judges nothing. Then each mutant is written into a copy of the package in a temporary
folder, and the tests that run its line run there (for what runs at import, those of its file): quickest first, as many as take `--budget`
seconds unchanged, up to the first failure. A run that is cut off goes on where it stopped, given the same `--baseline` and `--results` files.
A mutant that no test notices survives: it shows a missing test, or a change that means nothing (an equivalent mutant, such as a bound that no
caller reaches). Messages, remarks, annotations and checks that only raise are left alone.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

_PASSES, _LLVM, _FILECHECK, _FUSION = "tests/unit/passes", "tests/unit/llvm", "tests/filecheck", "tests/quality/test_fusion.py"
_PROGRAMS, _RUN = "tests/unit/passes/test_random_programs.py", "tests/unit/runtime/test_compiled_programs.py"
_MEMORY = ("tests/unit/passes/test_host_passes.py", "tests/unit/passes/test_memory_random.py", "tests/unit/passes/test_lowering_details.py")
TESTS: dict[str, tuple[str, ...]] = {
    "passes/decompose/": (_FILECHECK, _PASSES),
    "passes/tiling/": (_FILECHECK, _FUSION, _PASSES, _LLVM, "tests/gpu/test_printer.py", "tests/gpu/test_warp_groups.py"),
    "passes/tiling/stream": (_FILECHECK, _FUSION, _PASSES, "tests/language/test_control_flow.py", "tests/gpu/test_printer.py",
                             "tests/gpu/test_warp_groups.py"),
    "passes/fuse.py": (_FILECHECK, _FUSION, _PASSES),
    "passes/inline.py": (_FILECHECK, _FUSION, _PROGRAMS),
    "passes/layout.py": (_FILECHECK, _FUSION, _PASSES, _RUN),
    "passes/pack.py": (_FILECHECK, "tests/unit/passes/test_tiling.py", _PROGRAMS, _RUN),
    "passes/sink_reshapes.py": (_FILECHECK, "tests/unit/passes/test_reshape_map.py", "tests/unit/passes/test_reshapes.py", _PROGRAMS),
    "passes/bufferize.py": (*_MEMORY, _RUN),
    "passes/plan_memory.py": _MEMORY,
    "passes/fit.py": ("tests/unit/passes/test_fit.py", "tests/unit/passes/test_memory_random.py"),
    "passes/schedule.py": _MEMORY,
    "passes/canonicalize.py": (_FILECHECK, "tests/unit/passes/test_decompose.py", _PROGRAMS),
    "backends/llvm/": (_LLVM,),
    "ir/expr.py": ("tests/unit/ir", "tests/unit/passes/test_tiling.py"),
    "ir/ranges.py": ("tests/unit/ir", "tests/unit/passes/test_tiling.py"),
}
"""File, or folder, below the root -> tests. The longest name that fits a file counts."""

DEFAULT = ("passes/decompose", "passes/tiling", "passes/fuse.py", "passes/inline.py", "passes/layout.py", "passes/bufferize.py",
           "passes/plan_memory.py", "backends/llvm/arith.py", "backends/llvm/tile_ops.py", "backends/llvm/masks.py", "ir/expr.py",
           "ir/ranges.py")

_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mod, ast.Mod: ast.FloorDiv, ast.Div: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.Pow: ast.Mult,
}
_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn,
    ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}


@dataclass(frozen=True)
class Mutant:
    """One change: `text` is the whole file with it."""

    path: str
    line: int
    what: str
    text: str
    lines: tuple[int, int] | None = None  # first and last of what runs with the change; None where it runs at import

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what}"


@dataclass(frozen=True)
class Outcome:
    """`killed` by a failing test, or by `timeout`; survived otherwise."""

    mutant: Mutant
    killed: bool
    how: str
    seconds: float


def _skipped(node: ast.AST) -> bool:
    """Whether changes inside `node` say nothing about code that is generated: messages, types, checks that only raise."""
    if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)):
        return True
    if isinstance(node, ast.If) and all(isinstance(s, ast.Raise) for s in node.body):
        return True
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "remark"


def _children(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """(parent, field, position in the field, child), without annotations, decorators and what is skipped; outer first."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for i, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and not _skipped(child):
                yield node, field, i, child
                yield from _children(child)


def _changes(node: ast.AST, field: str) -> Iterator[tuple[str, ast.AST]]:
    """What may stand in place of `node`, with a description."""
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS and not isinstance(node.left, ast.Constant | ast.JoinedStr):
        new = copy.deepcopy(node)
        new.op = _OPERATORS[type(node.op)]()
        yield f"`{ast.unparse(node)}` becomes `{ast.unparse(new)}`", new
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARISONS:
        changed = copy.deepcopy(node)
        changed.ops = [_COMPARISONS[type(node.ops[0])]()]
        yield f"`{ast.unparse(node)}` becomes `{ast.unparse(changed)}`", changed
    elif isinstance(node, ast.BoolOp):
        other = copy.deepcopy(node)
        other.op = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
        yield f"`{ast.unparse(node)}` becomes `{ast.unparse(other)}`", other
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield f"`{ast.unparse(node)}` becomes `{ast.unparse(node.operand)}`", node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield f"`{node.value}` becomes `{not node.value}`", ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield f"`{node.value}` becomes `{node.value + 1}`", ast.Constant(node.value + 1)
    elif isinstance(node, ast.IfExp) or (isinstance(node, ast.If) and not node.orelse):
        negated = copy.deepcopy(node)
        negated.test = ast.UnaryOp(ast.Not(), node.test)
        yield f"condition `{ast.unparse(node.test)}` is negated", negated
    elif field == "body" and ((isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)) or isinstance(node, ast.AugAssign)):
        yield f"`{ast.unparse(node)}` is dropped", ast.Pass()


def _places(tree: ast.AST) -> dict[ast.AST, tuple[int, int] | None]:
    """The lines of the statement, its head alone if it holds others, or of the lambda's body that a node runs with; None for what runs at import."""
    found: dict[ast.AST, tuple[int, int] | None] = {}

    def visit(node: ast.AST, place: tuple[int, int] | None, inside: bool) -> None:
        body: Any = getattr(node, "body", None)
        if inside and (isinstance(node, ast.stmt) or (isinstance(body, list) and hasattr(node, "lineno"))):
            end = node.end_lineno if not isinstance(body, list) else max(node.lineno, body[0].lineno - 1)  # type: ignore[attr-defined]
            place = (node.lineno, end)  # type: ignore[attr-defined]
        found[node] = place
        function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for child in ast.iter_child_nodes(node):
            if isinstance(node, ast.Lambda) and child is body:
                visit(child, (child.lineno, child.end_lineno or child.lineno), True)  # type: ignore[attr-defined]
            else:
                visit(child, place, inside or (function and child in body))
    visit(tree, None, False)
    return found


def _sites(tree: ast.AST) -> list[tuple[ast.AST, str, int | None, ast.AST, str, ast.AST]]:
    """(parent, field, position, child, description, what stands in the child's place) of every mutant, in order."""
    return [(*place, what, new) for place in list(_children(tree)) for what, new in _changes(place[3], place[1])]


def mutants_of(path: str, source: str, wanted: Collection[int] | None = None) -> list[Mutant]:
    """The mutants of one file, in order: all, or those with the wanted numbers."""
    tree, lines = ast.parse(source), source.splitlines()
    places, original = _places(tree), ast.unparse(tree)
    found = []
    for number, (parent, field, i, child, what, new) in enumerate(_sites(tree)):
        if wanted is not None and number not in wanted:
            continue
        _put(parent, field, i, ast.copy_location(new, child))
        line: int = getattr(child, "lineno", getattr(parent, "lineno", 1))
        shown = f"{what} in `{lines[line - 1].strip()[:100]}`" if isinstance(child, ast.Constant) else what
        found.append(Mutant(path, line, shown.replace("\n", " ")[:200], ast.unparse(ast.fix_missing_locations(tree)), places[child]))
        _put(parent, field, i, child)
    return [m for m in found if m.text != original]


def _put(parent: ast.AST, field: str, i: int | None, child: ast.AST) -> None:
    if i is None:
        setattr(parent, field, child)
    else:
        getattr(parent, field)[i] = child


def tests_for(path: str) -> tuple[str, ...]:
    """The tests that ought to notice a fault in `path`. ValueError for a file that no entry of `TESTS` covers."""
    fitting = [k for k in TESTS if path.startswith(k)]
    if not fitting:
        raise ValueError(f"no tests are mapped to {path}; add it to TESTS")
    return TESTS[max(fitting, key=len)]


def sources(wanted: list[str]) -> list[str]:
    """The Python files below the given files and folders."""
    found = []
    for name in wanted:
        path = ROOT / name
        found += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return [str(p.relative_to(ROOT)) for p in found if p.name != "__init__.py" or p.stat().st_size > 400]


def sample(wanted: list[str], count: int, seed: int) -> list[Mutant]:
    """`count` mutants, as evenly over the files as their numbers allow, chosen by `seed`."""
    rng = random.Random(seed)
    texts = {p: (ROOT / p).read_text() for p in sources(wanted)}
    piles = [(p, list(range(len(_sites(ast.parse(text)))))) for p, text in texts.items()]
    for _, numbers in piles:
        rng.shuffle(numbers)
    rng.shuffle(piles)
    chosen: dict[str, list[int]] = defaultdict(list)
    while sum(map(len, chosen.values())) < count and any(numbers for _, numbers in piles):
        for p, numbers in piles:
            if numbers and sum(map(len, chosen.values())) < count:
                chosen[p].append(numbers.pop())
    return [m for p, numbers in chosen.items() for m in mutants_of(p, texts[p], numbers)]


class Copies:
    """Copies of the package, one per worker; each is used by one mutant at a time."""

    def __init__(self, count: int):
        self.folder = Path(tempfile.mkdtemp(prefix="aicc-mutants-"))
        self.free = [self._made(i) for i in range(count)]

    def _made(self, i: int) -> Path:
        target = self.folder / str(i) / "aicc"
        ignored = shutil.ignore_patterns(".git", "__pycache__", ".venv", "*.egg-info", ".*_cache", "build", "dist")
        shutil.copytree(ROOT, target, ignore=ignored)
        return target

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class Baseline:
    """The unchanged package: seconds of each test that passes, which of them run each mutant's lines (by its number), and what fails."""

    seconds: dict[str, float]
    running: dict[int, list[str]]
    failed: list[str]

    @staticmethod
    def of(found: dict[str, Any], mutants: list[Mutant]) -> Baseline:
        """As it was written down. ValueError if that was for other mutants."""
        if found["mutants"] != list(map(str, mutants)):
            raise ValueError("the baseline was made for other mutants; delete its file")
        return Baseline(found["seconds"], {int(n): tests for n, tests in found["running"].items()}, found["failed"])

    def chosen(self, number: int, mutant: Mutant, budget: float) -> list[str]:
        """The tests that ought to notice a mutant, quickest first."""
        files = tests_for(mutant.path)
        fitting = [t for t in self.seconds if t.startswith(files)] if mutant.lines is None else self.running.get(number, [])
        found, spent = [], 0.0
        for test in sorted(fitting, key=self.seconds.__getitem__):
            spent += self.seconds[test]
            if found and spent > budget:
                break
            found.append(test)
        return found


def baseline(mutants: list[Mutant], package: Path, jobs: int, limit: float) -> Baseline:
    """Runs the tests of all the mutants' files on the unchanged package, shared out to `jobs` processes."""
    wanted: dict[str, dict[int, list[int]]] = {}
    for number, m in enumerate(mutants):
        for line in range(m.lines[0], m.lines[1] + 1) if m.lines is not None else ():
            wanted.setdefault(str(package / m.path), {}).setdefault(line, []).append(number)
    files = tuple(dict.fromkeys(t for m in mutants for t in tests_for(m.path)))
    folder = package.parent
    (folder / "lines.json").write_text(json.dumps(wanted))

    def shard(i: int) -> dict[str, Any]:
        record = folder / f"found{i}.json"
        options = ("--mutation-lines", str(folder / "lines.json"), "--mutation-record", str(record), "--mutation-shard", f"{i}/{jobs}")
        said = run_tests(package, (*options, *files), limit, stop=False)
        if not record.exists():
            return {"passed": {}, "failed": [f"a share of the tests: {said}"]}
        found: dict[str, Any] = json.loads(record.read_text())
        return found
    seconds, running, failed = {}, defaultdict(list), []
    with ThreadPoolExecutor(jobs) as pool:
        for part in pool.map(shard, range(jobs)):
            failed += part["failed"]
            for test, (took, numbers) in part["passed"].items():
                seconds[test] = took
                for number in numbers:
                    running[number].append(test)
    return Baseline(seconds, dict(running), failed)


def run_tests(package: Path, arguments: tuple[str, ...], limit: float, stop: bool = True) -> str:
    """"" when all pass; else the first failing test, 'timeout', or the last line of a collection error. `stop` at the first failure."""
    path = os.pathsep.join(filter(None, (str(package.parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "AICC_CACHE": "0"}
    command = [sys.executable, "-m", "pytest", *["-x"] * stop, "-q", "--no-header", "-p", "no:cacheprovider", "-p", "aicc.benchmarks.mutation_tests",
               "--tb=no", *arguments]
    process = subprocess.Popen(command, cwd=package, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True)
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return "timeout"
    if process.returncode == 0:
        return ""
    lines = [line for line in output.splitlines() if line.strip()]
    return next((line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-1] if lines else f"exit {process.returncode}")[:200]


def judge(mutant: Mutant, tests: list[str], copies: Copies, limit: float) -> Outcome:
    """Runs `tests` on one mutant in a free copy, which is as before afterwards. One that no test runs survives."""
    if not tests:
        return Outcome(mutant, False, "no test runs it", 0.0)
    package = copies.free.pop()
    path = package / mutant.path
    original = path.read_text()
    start = time.monotonic()
    try:
        path.write_text(mutant.text)
        only = package.parent / "only.json"
        only.write_text(json.dumps(tests))
        how = run_tests(package, ("--mutation-only", str(only), *dict.fromkeys(t.partition("::")[0] for t in tests)), limit)
    finally:
        path.write_text(original)
        copies.free.append(package)
    return Outcome(mutant, bool(how), how, time.monotonic() - start)


def _known(path: Path | None, mutants: list[Mutant]) -> dict[str, Outcome]:
    """The outcomes that a run before this one wrote to `path`, by the mutant's name."""
    if path is None or not path.exists():
        return {}
    rows = {row["mutant"]: row for row in map(json.loads, path.read_text().splitlines())}
    return {str(m): Outcome(m, row["killed"], row["how"], row["seconds"]) for m in mutants if (row := rows.get(str(m))) is not None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("paths", nargs="*", default=list(DEFAULT), help="files and folders to mutate (default: the lowerings)")
    parser.add_argument("--sample", type=int, default=60, help="how many mutants (0: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=float, default=400, help="seconds per mutant; one that takes longer counts as killed")
    parser.add_argument("--budget", type=float, default=100, help="seconds of tests per mutant, as they take unchanged")
    parser.add_argument("--seconds", type=float, default=math.inf, help="for all of it: later, no mutant is begun")
    parser.add_argument("--baseline", type=Path, help="which tests run which lines: read from this file if it is there, else written to it")
    parser.add_argument("--results", type=Path, help="outcomes as lines of JSON: those in the file are not judged again, new ones are added")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th mutant of the sample, from the i-th on")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    arguments = parser.parse_args()
    until = time.monotonic() + arguments.seconds
    part, parts = map(int, arguments.part.split("/"))
    mutants = sample(arguments.paths, arguments.sample or 10**9, arguments.seed)
    if arguments.list:
        print("\n".join(map(str, mutants[part::parts])))
        return 0
    mine = list(range(len(mutants)))[part::parts]
    copies = Copies(arguments.jobs)
    try:
        start = time.monotonic()
        if arguments.baseline is not None and arguments.baseline.exists():
            base = Baseline.of(json.loads(arguments.baseline.read_text()), mutants)
        else:
            base = baseline(mutants, copies.free[0], arguments.jobs, 10 * arguments.limit)
        if arguments.baseline is not None:
            arguments.baseline.write_text(json.dumps({**vars(base), "mutants": list(map(str, mutants))}))
        for failure in base.failed:
            print(f"fails without any mutant, and judges none: {failure}", file=sys.stderr)
        if not base.seconds:
            return 2
        print(f"{len(mutants)} mutants (seed {arguments.seed}); {len(base.seconds)} tests pass unchanged in {sum(base.seconds.values()):.0f} s "
              f"({time.monotonic() - start:.0f} s by {arguments.jobs} jobs)", flush=True)

        known = _known(arguments.results, mutants)

        def one(number: int) -> Outcome | None:
            m = mutants[number]
            if str(m) in known:
                return known[str(m)]
            if time.monotonic() > until:
                return None
            outcome = judge(m, base.chosen(number, m, arguments.budget), copies, arguments.limit)
            print(f"{'killed  ' if outcome.killed else 'SURVIVED'} {outcome.seconds:5.0f} s  {m}  {outcome.how}", flush=True)
            if arguments.results is not None:
                row = {"mutant": str(m), "killed": outcome.killed, "how": outcome.how, "seconds": round(outcome.seconds, 1)}
                with arguments.results.open("a") as file:
                    print(json.dumps(row), file=file)
            return outcome
        mine = sorted(mine, key=lambda n: -sum(base.seconds[t] for t in base.chosen(n, mutants[n], arguments.budget)))
        with ThreadPoolExecutor(arguments.jobs) as pool:
            outcomes = [o for o in pool.map(one, mine) if o is not None]
    finally:
        copies.close()
    survivors = [o.mutant for o in outcomes if not o.killed]
    killed = len(outcomes) - len(survivors)
    print(f"\nkill rate: {killed} of {len(outcomes)} ({100 * killed / max(1, len(outcomes)):.0f} %), {len(mine) - len(outcomes)} not tried")
    for m in survivors:
        print(f"survived: {m}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
