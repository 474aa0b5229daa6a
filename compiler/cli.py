"""The command line: `aicc dump-ir | opt | run | explain | env | shard | sim | calibrate`. Each command is a file in `commands/`.

What a user can mend ends with one message on stderr and exit code 2; a fault of aicc itself with a message and exit code 1;
`--debug` shows the traceback of either.
"""

from __future__ import annotations

import typer

from .commands.calibrate import calibrate
from .commands.dump_ir import dump_ir
from .commands.env import env
from .commands.explain import explain
from .commands.opt import opt
from .commands.run import run
from .commands.shard import shard
from .commands.sim import sim

__all__ = ["app", "main"]

app = typer.Typer(name="aicc", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="An MLIR-style compiler for PyTorch models: torch.compile(model, backend=\"aicc\").")
app.command("dump-ir")(dump_ir)
app.command("opt")(opt)
app.command("run")(run)
app.command("explain")(explain)
app.command("env")(env)
app.command("shard")(shard)
app.add_typer(sim, name="sim")
app.command("calibrate")(calibrate)


def main() -> None:
    """The entry point of the command `aicc`."""
    app()
