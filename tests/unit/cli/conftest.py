"""Model files, and the command line in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from aicc.compiler.cli import app
from typer.testing import CliRunner, Result

MLP = """
import torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 10))
example_inputs = (torch.randn(8, 16),)
"""

Aicc = Callable[..., Result]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def aicc() -> Aicc:
    """Runs `aicc ARGUMENTS`; the result has exit_code, stdout and stderr."""
    def invoke(*arguments: object, input: str | None = None) -> Result:
        return CliRunner().invoke(app, [str(a) for a in arguments], input=input)
    return invoke


@pytest.fixture
def mlp(tmp_path: Path) -> Path:
    path = tmp_path / "mlp.py"
    path.write_text(MLP)
    return path


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """A model file with this text."""
    def make(text: str, name: str = "model.py") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path
    return make


def refused(result: Result, *messages: str) -> SimpleNamespace:
    """Asserts that a command ended as user errors do: exit code 2, a message with these parts, no traceback."""
    assert result.exit_code == 2, (result.exit_code, result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    assert "error:" in result.stderr
    for message in messages:
        assert message in result.stderr, result.stderr
    return SimpleNamespace(stderr=result.stderr)
