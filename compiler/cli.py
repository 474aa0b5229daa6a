"""The command line: `aicc dump-ir | opt | run | explain | bisect | shard | sim | calibrate | env`. Each command is a file in `commands/`.

What a user can mend ends with one message on stderr and exit code 2; a fault of aicc itself with a message and exit code 1;
`--debug` shows the traceback of either. A command's file, and with it torch, is imported when the command is called: `aicc --help` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

__all__ = ["COMMANDS", "app", "main"]

COMMANDS: dict[str, str] = {  # command -> what `aicc --help` says of it; the function of that name is in commands/
    "dump-ir": "Print the IR of MODEL at every stage, as text that `aicc opt` reads.",
    "opt": "Read IR from FILE, run passes over it, print the result.",
    "run": "Compile MODEL and run it: accuracy, compile time per stage, kernels, memory, speed against eager.",
    "explain": "Explain what MODEL compiles to, and why.",
    "bisect": "Compare MODEL at every stage with the stage before, in float64 and in its own types, and name the first pass, op or kernel",
    "shard": "Decide how MODEL runs on a mesh: data, tensor, sequence, context, pipeline and expert parallelism, ZeRO, micro-batches",
    "sim": "The training simulator: checked against published runs, and run on plans.",
    "calibrate": "Measure GEMMs, memory and collectives on this machine, and write a cluster file",
    "env": "Show what aicc found: CPU, threads, versions, GPU, cache; and what that enables.",
}


class _Commands(TyperGroup):
    """Knows the commands by name and line of help; loads the one that is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return TyperCommand(cmd_name, help=COMMANDS[cmd_name]) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and _load(str(command.name)), rest


def _load(name: str) -> Any:
    function = name.replace("-", "_")
    found = getattr(import_module(f".commands.{function}", __package__), function)
    if isinstance(found, typer.Typer):  # a command with commands of its own
        return typer.main.get_command(found)
    one = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    one.command(name)(found)
    return typer.main.get_command(one)


app = typer.Typer(name="aicc", cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="An MLIR-style compiler for PyTorch models: torch.compile(model, backend=\"aicc\").")


@app.callback()
def _aicc() -> None:
    pass


def main() -> None:
    """The entry point of the command `aicc`."""
    app()
