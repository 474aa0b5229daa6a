"""The dist dialect: meshes and collectives. Shardings are attributes on the values of other levels.

A sharding of a tensor is one entry per mesh axis: "replicate", {shard = dim} or {partial = "sum"}.
"""

from __future__ import annotations

from ..opdef import Trait, attr, define, optional

_C = [Trait.Communicates]
define("dist.mesh", "a named device mesh", results=(), attrs={"sym_name": attr(), "shape": attr(), "axes": attr("names, outermost first")},
       traits=[Trait.Symbol])
define("dist.all_reduce", "combines over `axis`; every rank gets the result", operands="x", traits=_C,
       attrs={"mesh": attr(), "axis": attr(), "kind": optional("sum")})
define("dist.all_gather", "concatenates the shards along `dim`", operands="x", attrs={"mesh": attr(), "axis": attr(), "dim": attr()}, traits=_C)
define("dist.reduce_scatter", "combines over `axis`; each rank keeps its shard along `dim`", operands="x", traits=_C,
       attrs={"mesh": attr(), "axis": attr(), "dim": attr(), "kind": optional("sum")})
define("dist.all_to_all", "splits along `split`, concatenates along `concat`", operands="x", traits=_C,
       attrs={"mesh": attr(), "axis": attr(), "split": attr(), "concat": attr()})
