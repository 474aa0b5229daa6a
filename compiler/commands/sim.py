"""`aicc sim validate` and `aicc sim run`: the simulator against published runs, and on a plan. What they do is in
`compiler/planning/simulation.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..planning import simulation
from .common import Debug, reports_errors
from .planning import MeshShape

__all__ = ["sim"]

sim = typer.Typer(no_args_is_help=True, help="The training simulator: checked against published runs, and run on plans.")
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@sim.command("validate")
@reports_errors
def validate(
    runs: Annotated[Path | None, typer.Argument(help="A file of published runs. Default: the shipped one.", show_default=False)] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Predict published training runs: every figure against the prediction, signed error, fitted or held out, and the constants."""
    simulation.show_validation(runs, as_json)


@sim.command("run")
@reports_errors
def run(
    plan: Annotated[Path, typer.Argument(help="A plan file of `aicc shard -o`.", show_default=False)],
    mesh: MeshShape = "",
    hardware: Annotated[str, typer.Option(help="Default: what the plan file says.", show_default=False)] = "",
    global_batch: Annotated[int, typer.Option(help="Default: what the plan file says.", show_default=False)] = 0,
    gantt: Annotated[bool, typer.Option("--gantt/--no-gantt", help="Draw the pipeline.")] = True,
    scale: Annotated[str, typer.Option(help="Numbers of devices for the scaling curve; 'off' for none.")] = "32,64,128,256,512,1024,2048,4096",
    jitter: Annotated[float, typer.Option(help="Spread of the devices' speeds (0.02: 2 %).")] = 0.0,
    straggler: Annotated[float, typer.Option(help="One device takes so many times as long.")] = 1.0,
    mtbf: Annotated[float, typer.Option(help="Mean days between failures of one device; 0: none fail.")] = 0.0,
    checkpoint: Annotated[float, typer.Option(help="Seconds that a checkpoint stops the run.")] = 30.0,
    restart: Annotated[float, typer.Option(help="Seconds from a failure to the next step.")] = 300.0,
    interval: Annotated[float, typer.Option(help="Seconds of work between checkpoints; 0: the best.")] = 0.0,
    days: Annotated[float, typer.Option(help="Days that the run lasts.")] = 30.0,
    lose: Annotated[int, typer.Option(help="Nodes that fail for good: go on without them.")] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Simulate a plan: step time and where it goes, a Gantt chart, a scaling curve, stragglers, failures, fewer nodes."""
    simulation.run_plan(simulation.RunRequest(plan, mesh, hardware, global_batch, gantt, scale, jitter, straggler, mtbf, checkpoint, restart,
                                              interval, days, lose, as_json))
