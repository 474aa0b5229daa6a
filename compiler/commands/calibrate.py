"""`aicc calibrate`: measures this machine and writes a cluster file for the planner. What it does is in `compiler/planning/calibration.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ...passes.shard.calibrate import cluster_toml
from ..planning.calibration import CalibrationRequest
from ..planning.calibration import calibrate as measure
from .common import Debug, reports_errors
from .output import console

__all__ = ["calibrate"]


@reports_errors
def calibrate(
    output: Annotated[Path, typer.Option("--output", "-o", help="The cluster file to write.")] = Path("cluster.toml"),
    ranks: Annotated[int, typer.Option(help="Processes of a node. Default: one per GPU, or per CPU core.", show_default=False)] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda. Default: what is there.", show_default=False)] = "",
    threads: Annotated[int, typer.Option(help="CPU threads of a rank. Default: an equal share.", show_default=False)] = 0,
    seconds: Annotated[float, typer.Option(help="How long to measure, about.")] = 30.0,
    name: Annotated[str, typer.Option(help="The cluster's name. Default: this host's.", show_default=False)] = "",
    debug: Debug = False,
) -> None:
    """Measure GEMMs, memory and collectives on this machine, and write a cluster file: aicc shard MODEL --hardware cluster.toml."""
    found = measure(CalibrationRequest(ranks, device, threads, seconds, name))
    output.write_text(cluster_toml(found.cluster), encoding="utf-8")
    title = f"{found.cluster.groups[0].device.name}, {found.cluster.node_size} ranks"
    table = Table("what", "measured", "model", "error", title=title, title_justify="left")
    for what, measured, predicted in found.rows:
        table.add_row(what, f"{measured * 1e3:.4g} ms", f"{predicted * 1e3:.4g} ms", f"{predicted / measured - 1:+.0%}")
    console().print(table)
    console().print(f"measured in {found.seconds:.0f} s; written: {output}")
