"""SPMD: from a graph with placements to the program that every rank runs.

    seeds        where parameters lie on a tensor axis
    partition    the per-rank program (rules.py: one row per op; special.py: programs of cut tables; build.py)
    split        forward and backward apart
    collectives  passes: merged, bucketed, started early
    traffic      bytes per collective
    virtual      the program on all ranks in one process; validate: against the whole program; faults: planted errors
"""

from . import collectives
from .partition import Partitioned, Policy, partition
from .seeds import tensor_seeds
from .split import Split, split
from .virtual import assemble, disassemble, run_virtual

__all__ = ["Partitioned", "Policy", "Split", "assemble", "collectives", "disassemble", "partition", "run_virtual", "split", "tensor_seeds"]
