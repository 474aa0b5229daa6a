"""What the planning commands share: options, and the planner's errors as the user's.

Nothing here imports torch or the planner before a command runs: `aicc --help` need not wait for them.
"""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import UserError

__all__ = ["Budget", "Debug", "Dtype", "Hardware", "MeshShape", "Seq", "reports_planning_errors"]

Hardware = Annotated[str, typer.Option(help="A preset (h100-sxm, a100-80gb-sxm, ...) or a cluster's .toml file.")]
MeshShape = Annotated[str, typer.Option("--mesh", help="Nodes x devices per node (2x8). Default: all of the cluster.", show_default=False)]
Seq = Annotated[int, typer.Option(help="Sequence length. Default: that of the example inputs, or the model's longest.", show_default=False)]
Dtype = Annotated[str, typer.Option(help="Type of compute. Default: bf16 where the device has it, else fp16, else fp32.", show_default=False)]
Budget = Annotated[float, typer.Option(help="Seconds after which the search takes the best plan so far.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

F = TypeVar("F", bound=Callable[..., Any])


def reports_planning_errors(command: F) -> F:
    """Turns complaints about what the user gave into one message on stderr and exit code 2. The planner's own are ValueErrors
    (ConfigError, Infeasible) from `passes.shard`; others are faults of aicc and exit code 1.
    """
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
            mendable = isinstance(e, UserError) or type(e).__name__ in ("ConfigError", "Infeasible")
            text = str(e) if mendable else f"{type(e).__name__}: {e}\nThis is a fault of aicc, not of your input; --debug shows where."
            if isinstance(e, OSError):
                mendable, text = True, f"{e.filename or 'a file'}: {e.strerror or e}"
            Console(file=sys.stderr, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {escape(text)}")
            raise typer.Exit(2 if mendable else 1) from None
    return wrapped  # type: ignore[return-value]
