"""Every way of naming a model, and what is said of a file that names none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from aicc.compiler.errors import UserError
from aicc.compiler.model_file import LoadedModel, Script, load

Write = Callable[..., Path]


def test_model_and_example_inputs(mlp: Path) -> None:
    found = load(str(mlp))
    assert isinstance(found, LoadedModel)
    assert found.model(*found.args).shape == (8, 10)


@pytest.mark.parametrize("inputs, args, kwargs", [
    ("torch.ones(2)", 1, ()), ("[torch.ones(2), 3]", 2, ()), ("{'x': torch.ones(2)}", 0, ("x",)), ("lambda: (torch.ones(2),)", 1, ()),
])
def test_forms_of_inputs(write: Write, inputs: str, args: int, kwargs: tuple[str, ...]) -> None:
    found = load(str(write(f"import torch\nmodel = lambda x, y=1: x + y\ninputs = {inputs}\n")))
    assert isinstance(found, LoadedModel)
    assert (len(found.args), tuple(found.kwargs)) == (args, kwargs)


def test_class_with_functions_beside_it(write: Write) -> None:
    found = load(str(write("""
import torch
class Model(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = torch.nn.Linear(4, width)
    def forward(self, x):
        return self.linear(x)
def get_init_inputs():
    return [3]
def get_inputs():
    return [torch.ones(2, 4)]
""")))
    assert isinstance(found, LoadedModel)
    assert found.model(*found.args).shape == (2, 3)


def test_class_with_methods(write: Write) -> None:
    found = load(str(write("""
import torch
class Model(torch.nn.Module):
    def forward(self, x):
        return x + 1
    @staticmethod
    def get_inputs():
        return [torch.ones(2)]
""")))
    assert isinstance(found, LoadedModel)
    assert torch.equal(found.model(*found.args), torch.full((2,), 2.0))


def test_module_and_attribute(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("import torch\nsmall = torch.nn.Linear(2, 3)\nexample_inputs = torch.ones(1, 2)\n", "somewhere_aicc.py")
    monkeypatch.chdir(tmp_path)
    found = load("somewhere_aicc:small")
    sys.modules.pop("somewhere_aicc")
    assert isinstance(found, LoadedModel)
    assert found.model(*found.args).shape == (1, 3)
    again = load("somewhere_aicc.py:small")
    assert isinstance(again, LoadedModel)


def test_script_is_not_run_when_loaded(write: Write, tmp_path: Path) -> None:
    path = write(f"""
import pathlib, torch
if __name__ == "__main__":
    torch.compile(torch.nn.Linear(2, 2), backend="aicc")
    pathlib.Path({str(tmp_path / 'ran')!r}).touch()
""")
    found = load(str(path))
    assert isinstance(found, Script)
    assert not (tmp_path / "ran").exists()
    found.run()
    assert (tmp_path / "ran").exists()


def test_files_beside_the_model_can_be_imported(write: Write) -> None:
    write("width = 5\n", "width_aicc.py")
    found = load(str(write("import torch, width_aicc\nmodel = torch.nn.Linear(2, width_aicc.width)\ninputs = torch.ones(1, 2)\n")))
    assert isinstance(found, LoadedModel)
    assert found.model(*found.args).shape == (1, 5)


def test_nothing_defined_says_what_was_looked_for_with_an_example_that_works(write: Write) -> None:
    with pytest.raises(UserError) as caught:
        load(str(write("x = 1\n")))
    text = str(caught.value)
    for wanted in ("`model`", "`example_inputs`", "`inputs`", "class `Model`", "`get_inputs()`", "torch.compile"):
        assert wanted in text
    example = text.partition("For example:\n")[2]
    assert len(example.splitlines()) == 5
    found = load(str(write("\n".join(line.strip() for line in example.splitlines()), "example.py")))
    assert isinstance(found, LoadedModel)
    assert found.model(*found.args).shape == (8, 10)


@pytest.mark.parametrize("source, message", [
    ("model = (\n", "model.py:1:9: '(' was never closed"),
    ("import torch\nmodel = nn.Linear(2, 2)\n", "model.py:2: NameError: name 'nn' is not defined\n    model = nn.Linear(2, 2)"),
    ("model = print\n", "it has model"),
    ("model = print\ninputs = 3\n", "the inputs must be a tensor"),
    ("import sys\nsys.exit(3)\n", "exit code 3"),
    ("import torch\nclass Model(torch.nn.Module):\n  def __init__(self, n): pass\ndef get_inputs(): return []\n", "get_init_inputs()"),
])
def test_faulty_files(write: Write, source: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(str(write(source)))
    assert message in str(caught.value)


def test_syntax_error_has_a_caret(write: Write) -> None:
    with pytest.raises(UserError) as caught:
        load(str(write("x = 1\n    y = 2 +* 3\n")))
    first, source, caret = str(caught.value).splitlines()
    assert "model.py:2:" in first
    assert source.strip() == "y = 2 +* 3" and caret.strip() == "^"


def test_names_that_are_not_there(tmp_path: Path, write: Write) -> None:
    write("x = 1\n", "near.py")
    with pytest.raises(UserError, match=r"no file .*has near\.py"):
        load(str(tmp_path / "neer.py"))
    with pytest.raises(UserError, match="no module 'not_a_package_aicc'"):
        load("not_a_package_aicc:model")
    with pytest.raises(UserError, match="there is no 'modle'"):
        load("torch.nn:modle")
