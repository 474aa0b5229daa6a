"""The command table: quick, complete, and in the words of the commands themselves."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import aicc as package
import pytest
import typer
from aicc.compiler.cli import COMMANDS

_HELP = f"""
import sys, time
sys.path[:0] = {sys.path!r}
sys.argv = ["aicc", "--help"]
from aicc.compiler.cli import main
try:
    main()
except SystemExit:
    pass
print("torch" in sys.modules, time.process_time())
"""


def test_help_is_quick() -> None:
    """No torch, and less than 0.3 s of processor time."""
    found = min(subprocess.run([sys.executable, "-c", _HELP], capture_output=True, text=True, check=True).stdout.split()[-2:] for _ in range(2))
    assert found[0] == "False" and float(found[1]) < 0.3


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_the_command_says(name: str) -> None:
    function = name.replace("-", "_")
    command = getattr(import_module(f"aicc.compiler.commands.{function}"), function)
    doc = str(command.info.help) if isinstance(command, typer.Typer) else command.__doc__
    assert " ".join(doc.split()).startswith(COMMANDS[name].rstrip("."))


def test_every_command_is_listed() -> None:
    folder = Path(package.__file__).parent / "compiler" / "commands"
    commands = {p.stem for p in folder.glob("*.py") if f"def {p.stem}(" in p.read_text() or f"{p.stem} = typer.Typer(" in p.read_text()}
    assert commands == {name.replace("-", "_") for name in COMMANDS}
