"""The host dialect: the compiled program in order. Buffers, launches, ATen calls.

A `func` at this level has buffers for arguments: the inputs, then the outputs that the caller allocates. It returns nothing.
`host.alloc` asks for temporary memory; memory planning gives each an offset into the one arena (`host.slot`).
`host.persistent` is memory that outlives the call (packed parameters), recomputed when the parameter's version changes.
"""

from __future__ import annotations

from ..opdef import Trait, attr, define, optional

_NONTEMPORAL = {"nontemporal": optional((), "operands that are written past the caches, by number (CPUs)"),
                "excess": optional(0, "Dim: only in calls where this is not negative")}

_STREAM = {"stream": optional(0, "on which stream it is launched (GPUs): 0, the caller's, or 1 (see `host.wait`)")}

define("host.alloc", "a temporary buffer, before memory planning", attrs={"bytes": attr("Dim")})
define("host.slot", "a buffer at a fixed place of the arena", attrs={"offset": attr("Dim, bytes"), "bytes": attr("Dim")}, traits=[Trait.Pure])
define("host.persistent", "a buffer that outlives the call; `guards` lists the arguments whose data it was made from",
       attrs={"id": attr("its number"), "bytes": attr("Dim"), "guards": attr("argument numbers")}, traits=[Trait.Pure])
define("host.constant", "a buffer holding constant data", attrs={"value": attr("Dense")}, traits=[Trait.Pure, Trait.ConstantLike])
define("host.view", "the same memory under another type, `offset` elements further on", operands="buffer", attrs={"offset": optional(0)},
       traits=[Trait.Pure, Trait.ViewLike])
define("host.launch", "runs a kernel on buffers (inputs, then outputs)", operands="buffers*", results=(),
       attrs={"kernel": attr("@name"), "outputs": attr("how many trailing buffers are written"),
              "cached": optional(False, "runs only when a guard of its persistent output changed"),
              "beside": optional(0, "neighbours with the same number (not 0) may run at the same time: none touches what another writes"),
              **_NONTEMPORAL, **_STREAM},
       traits=[Trait.ReadsMemory, Trait.WritesMemory])
define("host.loop", "runs function @body once per trip, on row-major buffers (see `loop`): carried, sliced, invariant; then what is written: the "
       "carried values' end, stacked results, scratch of two places per carried value and the body's arena", operands="buffers*", results=(),
       attrs={"body": attr("@name"), "carried": attr(), "sliced": attr(), "reversed_operands": optional(()), "reversed_results": optional(()),
               "trips": attr("Dim"), "outputs": attr("how many trailing buffers are written"),
               "beside": optional(0, "as of `host.launch`")},
       traits=[Trait.ReadsMemory, Trait.WritesMemory])
define("host.copy", "copies `source` to `target` (same shape and element type, any strides)", operands="source target", results=(),
       attrs={**_NONTEMPORAL, **_STREAM}, traits=[Trait.ReadsMemory, Trait.WritesMemory])
define("host.wait", "what is launched on `stream` from here on begins when all that was launched on stream `on` before has ended", operands="",
       results=(), attrs={"stream": attr("0 or 1"), "on": attr("the other one")}, traits=[Trait.ReadsMemory, Trait.WritesMemory])
define("host.library", "a call of a vendor's library on buffers; `roles` names them (a, b, bias, c are read; d and workspace are written)",
       operands="buffers*", results=(),
       attrs={"library": attr("such as cublaslt"), "roles": attr(), "outputs": attr("how many trailing buffers are written"),
              "shape": attr("sizes, strides and types, as runtime/cublaslt.py describes them"), "why": optional(""), **_STREAM},
       traits=[Trait.ReadsMemory, Trait.WritesMemory])
define("host.extern", "an ATen operator on buffers: `inputs` operands are read, the rest receive its tensor results in order",
       operands="buffers*", results=(),
       attrs={"target": attr(), "args": attr(), "kwargs": optional({}), "inputs": attr(), "result_kinds": optional(()),
              "random": optional(False), "reason": optional(""), "operand_strides": optional(()), "defines": optional({})},
       traits=[Trait.ReadsMemory, Trait.WritesMemory])
