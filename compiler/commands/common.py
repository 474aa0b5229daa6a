"""What the commands share: common options, the consoles, and how errors end a command."""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.markup import escape

from ...frontend.errors import UnsupportedError
from ...ir.core import IRError
from ...ir.parser import ParseError
from ...passes.shard import ConfigError, Infeasible
from ..errors import UserError

__all__ = ["Debug", "Dynamic", "ModelSpec", "Train", "console", "reports_errors"]

ModelSpec = Annotated[str, typer.Argument(metavar="MODEL", help="model.py, model.py:attribute or package.module:attribute", show_default=False)]
Train = Annotated[bool, typer.Option("--train", help="Training: forward and backward graphs.")]
Dynamic = Annotated[bool | None, typer.Option("--dynamic/--static", help="Symbolic sizes, or none. Default: torch decides.", show_default=False)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

F = TypeVar("F", bound=Callable[..., Any])


def console(*, stderr: bool = False) -> Console:
    """A console on the current standard streams; 120 columns wide where that is no terminal."""
    file = sys.stderr if stderr else sys.stdout
    return Console(file=file, width=None if file.isatty() else 120, highlight=False)


def reports_errors(command: F) -> F:
    """Turns exceptions of a command into one message and an exit code: 2 for what the user can mend, 1 for faults of aicc."""
    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, KeyboardInterrupt):
            raise
        except BrokenPipeError:  # the reader (a pager, head) has had enough
            raise typer.Exit(0) from None
        except Exception as e:
            if kwargs.get("debug"):
                traceback.print_exc()
            text, code = _explain(e)
            console(stderr=True).print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True)
            raise typer.Exit(code) from None
    return wrapped  # type: ignore[return-value]


def _explain(error: Exception) -> tuple[str, int]:
    """The message and the exit code."""
    cause = error
    while type(cause).__name__ == "BackendCompilerFailed" and isinstance(getattr(cause, "inner_exception", None), Exception):
        cause = cause.inner_exception  # type: ignore[attr-defined]
    if isinstance(cause, (UserError, ParseError, ConfigError, Infeasible)):
        return str(cause), 2
    if isinstance(cause, OSError):
        return f"{cause.filename or 'a file'}: {cause.strerror or cause}", 2
    if isinstance(cause, UnsupportedError):
        return f"this model cannot be imported: {cause}", 2
    if isinstance(cause, torch._dynamo.exc.TorchDynamoException):
        return f"torch cannot capture this model: {str(cause).strip().splitlines()[0]} (--debug shows all of it)", 2
    what = str(cause) if isinstance(cause, IRError) else f"{type(cause).__name__}: {cause}"
    return f"{what}\nThis is a fault of aicc, not of your input; --debug shows where.", 1
