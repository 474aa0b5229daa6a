"""The options that the planning commands share."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["Budget", "Dtype", "Hardware", "MeshShape", "Seq"]

Hardware = Annotated[str, typer.Option(help="A preset (h100-sxm, a100-80gb-sxm, ...) or a cluster's .toml file.")]
MeshShape = Annotated[str, typer.Option("--mesh", help="Nodes x devices per node (2x8). Default: all of the cluster.", show_default=False)]
Seq = Annotated[int, typer.Option(help="Sequence length. Default: that of the example inputs, or the model's longest.", show_default=False)]
Dtype = Annotated[str, typer.Option(help="Type of compute. Default: bf16 where the device has it, else fp16, else fp32.", show_default=False)]
Budget = Annotated[float, typer.Option(help="Seconds after which the search takes the best plan so far.")]
