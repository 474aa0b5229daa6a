"""The mutation check itself: what it changes, what it leaves alone, and that it tells dead mutants from living ones."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from aicc.benchmarks import mutation

SOURCE = '''
def f(a: int, b=3):
    """Adds 1 + 1."""
    if a < 0:
        raise ValueError(f"{a - 1} is too small")
    total = a + b * 2
    out.append(total)
    return total if not a else -total
'''


def test_what_is_changed_and_what_is_not() -> None:
    mutants = mutation.mutants_of("f.py", SOURCE)
    found = [m.what.partition(" in `")[0] for m in mutants]
    assert found == ["`3` becomes `4`", "`a + b * 2` becomes `a - b * 2`", "`b * 2` becomes `b + 2`", "`2` becomes `3`", "`out.append(total)` is dropped",
                     "condition `not a` is negated", "`not a` becomes `a`", "`-total` becomes `total`"]
    assert [m.lines for m in mutants] == [None, *[(6, 6)] * 3, (7, 7), *[(8, 8)] * 3]
    original = ast.unparse(ast.parse(SOURCE))
    for m in mutants:
        changed = [a for a, b in zip(m.text.splitlines(), original.splitlines(), strict=True) if a != b]
        assert len(changed) == 1, m
        ast.parse(m.text)


def test_every_default_file_has_tests_that_exist() -> None:
    files = mutation.sources(list(mutation.DEFAULT))
    assert len(files) > 25
    for path in files:
        for test in mutation.tests_for(path):
            assert (mutation.ROOT / test).exists(), test
    with pytest.raises(ValueError, match="no tests are mapped"):
        mutation.tests_for("runtime/loader.py")


def test_a_sample_is_the_same_for_one_seed_and_spread_over_the_files() -> None:
    a, b = (mutation.sample(["ir/expr.py", "passes/inline.py"], 8, seed=5) for _ in range(2))
    assert a == b and {m.path for m in a} == {"ir/expr.py", "passes/inline.py"} and a != mutation.sample(["ir/expr.py", "passes/inline.py"], 8, seed=6)


TEST = """
from f import f
def test_f():
    assert f() == 1
def test_other():
    pass
def test_wrong():
    assert f() == 3
"""


@pytest.mark.parametrize(("text", "killed"), [("def f():\n    return 1\n", False), ("def f():\n    return 2\n", True),
                                              pytest.param("def f():\n    while True:\n        pass\n", True, marks=pytest.mark.slow)])
def test_dead_or_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, killed: bool) -> None:
    package = tmp_path / "0" / "aicc"
    package.mkdir(parents=True)
    (package / "f.py").write_text("def f():\n    return 1\n")
    (package / "test_f.py").write_text(TEST)
    (package / "pytest.ini").write_text("[pytest]\n")  # the root, from which names of tests count
    (package / "conftest.py").write_text(f"import sys\nsys.path.insert(0, {str(package)!r})\n")
    monkeypatch.setitem(mutation.TESTS, "f.py", ("test_f.py",))

    class Here(mutation.Copies):
        def __init__(self) -> None:
            self.free = [package]

    m = mutation.Mutant("f.py", 2, "", text, (2, 2))
    base = mutation.baseline([m, mutation.Mutant("f.py", 9, "", text, (9, 9))], package, 1, 60)
    assert base.failed == ["test_f.py::test_wrong"] and base.running == {0: ["test_f.py::test_f"]}
    assert len(base.seconds) == 2 and base.chosen(0, mutation.Mutant("f.py", 1, "", text), 9) == sorted(base.seconds, key=base.seconds.__getitem__)
    outcome = mutation.judge(m, base.chosen(0, m, 9), Here(), limit=8 if "while" in text else 60)
    assert outcome.killed == killed, outcome
    assert (package / "f.py").read_text() == "def f():\n    return 1\n", "the file is as before"


def test_what_an_earlier_run_found_is_not_judged_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The second run reads both files and judges only what is missing; its rate counts all."""
    judged: list[int] = []
    mutants = [mutation.Mutant("ir/expr.py", n, "", f"text {n}", (n, n)) for n in (1, 2, 3)]

    class Nothing(mutation.Copies):
        def _made(self, i: int) -> Path:
            return self.folder

    def judge(mutant: mutation.Mutant, tests: list[str], copies: mutation.Copies, limit: float) -> mutation.Outcome:
        judged.append(mutant.line)
        return mutation.Outcome(mutant, mutant.line != 2, "", 1.0)
    for name, value in (("Copies", Nothing), ("judge", judge), ("sample", lambda *_: mutants),
                        ("baseline", lambda *_: mutation.Baseline({"a": 1.0}, {0: ["a"], 1: ["a"], 2: ["a"]}, []))):
        monkeypatch.setattr(mutation, name, value)
    files = ["--baseline", str(tmp_path / "base.json"), "--results", str(tmp_path / "results.jsonl")]
    for part, total in (("0/3", "1 of 1"), ("0/1", "2 of 3")):
        monkeypatch.setattr("sys.argv", ["mutation", "--part", part, *files])
        assert mutation.main() == 0
        assert f"kill rate: {total} " in capsys.readouterr().out
    assert judged == [1, 2, 3]
