"""Finding by machine where a program goes wrong: which pass, which op, which kernel.

    captured = capture(found)                        # the graphs that torch makes of a model, with their arguments; nothing of aicc runs
    finding = bisect_graph(captured[0], options)     # None, or what is wrong first, reduced to a small module
    write_repro(finding, folder); replay(folder)

Each stage that a graph passes through has a meaning of its own: the FX graph (ATen), the imported module and the module after every pass
(the reference interpreter), the host program before and after memory planning (interpreted on real memory), each kernel of the backend, and the
finished program. Two neighbours are compared twice:

- in float64, where both must agree to about 1e-9: the *algebra*. A difference that the sensitivity of the program to its inputs does not
  explain, nor the rounding of constants that were folded in their own type, is a **bug** of the stage between them.
- in the program's own types, where each must be about as close to float64 as eager is: the *rounding*. A stage with the right algebra that is
  much further off is **unstable**. Everything nearer is **legal rounding**.

Files: `capture` (FX graphs and arguments), `evaluate` (what a stage computes), `numerics` (differences and budgets), `memory` (host programs
on interpreted kernels), `kernels` (compiled kernels one at a time), `reduce` (a failing module made small), `search` (the walk over the
stages), `repro` (folders that show the fault again).
"""

from .capture import CapturedGraph, capture
from .repro import replay, write_repro
from .search import Finding, Report, bisect_graph

__all__ = ["CapturedGraph", "Finding", "Report", "bisect_graph", "capture", "replay", "write_repro"]
