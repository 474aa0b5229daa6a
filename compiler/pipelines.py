"""What is run, in order, for each target. Each list takes the module from one level to the next.

`aicc opt --passes` accepts the same text, and `aicc dump-ir` shows the module after each list.
"""

from __future__ import annotations

from ..ir import Target
from .options import Options

__all__ = ["STAGES", "pipeline"]

STAGES = ("graph", "tensor", "tile", "host")


def pipeline(stage: str, target: Target, options: Options) -> str:
    """The passes of one stage, as text."""
    relax = "" if not options.emulate_precision_casts else "{relax-casts=false}"
    tiling = " ".join(["relax-casts=false"] * options.emulate_precision_casts + ["fast-math=true"] * options.fast_math)
    winograd = "winograd" + f"{{budget={options.winograd_budget}}}" * (options.winograd_budget != Options.winograd_budget)
    tile = "tile" + f"{{{tiling}}}" * bool(tiling)
    choices = ["epilogues=false"] * options.emulate_precision_casts + ["replayed=true"] * options.replays
    fuse = "fuse{by-columns=true}" if target.is_gpu else "fuse"
    library = "library" + (f"{{{' '.join(choices)}}}" if choices else "")
    streams = "" if options.streams < 2 or not options.fuse else "two-streams{replayed=true}," if options.replays else "two-streams,"
    merging = f"{{{' '.join(['streams=2'] * (options.streams > 1) + ['replayed=true'] * options.replays)}}}".replace("{}", "")
    return {
        # Still named ops: what is cheap to see here is folded before it is spelled out.
        "graph": f"canonicalize{relax},cse,fold-constants,dce",
        "tensor": ",".join([
            "decompose",
            # Views in front of loops: a loop walks backwards for nothing, and is handed what never changes once.
            "simplify-loops",
            *(["unpad-concatenations"] if target.is_gpu else []),
            # Views first: then every read of a tensor is a map, and two reads of the same elements look alike to cse.
            "absorb-views", f"canonicalize{relax}", "cse", "dce",
            # While the sum and what it is added to are still two ops.
            "lift-sums",
            # While a bias is still an op of its own, and before anything joins the readers of a product.
            *([] if target.is_gpu or not options.fuse else ["merge-products"]),
            # Products for a library leave before anything merges: what it does along the way is still told apart.
            *(["operand-order", library] if target.is_gpu else []),
            # Producers merge into readers; reductions take the shape of their readers, which exposes identity reads to fusion.
            "inline", "plain-reductions", "sink-reshapes", f"canonicalize{relax}", "dce",
            # Only where rounding may fall away: what is normalised is not rounded before the product.
            *(["spread-norms", "dce"] if target.is_gpu and options.fuse and not options.emulate_precision_casts else []),
            *(["turn-streams", "dce"] if options.fuse and not target.is_gpu else []),
            *([] if target.is_gpu or not options.winograd else [winograd]),
            # Layouts and packed operands are new pointwise ops; their own producers merge into them (the second inline).
            "layout", *([] if target.is_gpu else ["factors"]), "pack", "inline", f"canonicalize{relax}", "cse", "dce",
            # Packed weights of recurrent layers leave the loop: what is packed once must be seen to be the same in every trip.
            "hoist-invariants",
            *(["library-operands", "alias-views"] if target.is_gpu else []),
            # Streams of few programs become streams of parts first.
            *(["split-streams"] if target.is_gpu and options.fuse else []),
            *([f"stream{relax}"] if options.fuse else []),
            # What is left of a product's readers: reductions of its tiles join its kernel.
            *(["tile-reductions"] if options.fuse and not target.is_gpu else []),
            # Sums of columns of what some kernel walks row by row are parted so that they can join it.
            *(["part-columns"] if target.is_gpu and options.fuse else []),
            *(["split-reductions"] if options.fuse else []),
            *(["split-dimensions"] if target.is_gpu and options.fuse else []),
            fuse if options.fuse else "fuse{max-members=1}",
            *(["join-columns"] if target.is_gpu and options.fuse else []),
            # What crosses from kernel to kernel is known now.
            *(["narrow-results"] if target.is_gpu else []),
        ]),
        # Kernels are simplified once more: bodies merged by fusion share index arithmetic.
        # On GPUs small ones that are independent of each other are launched together then.
        "tile": f"{tile},cse,dce" + ",predicate-loads" * target.is_gpu + (f",merge-launches{merging}" if target.is_gpu and options.fuse else ""),
        # On GPUs, chains of launches that do not depend on each other run on two streams, if that pays.
        # A CUDA graph wants few kernels to use the memory of outputs, whose address is another one in each call.
        # On CPUs what is too small for several threads shares them with what does not depend on it; then memory is planned for that. Last, as
        # it is known where everything lies: what is written past the caches.
        "host": "schedule,overlap,bufferize," + streams + "plan-memory" + "{outputs=false}" * options.replays if target.is_gpu else
                "schedule,overlap,bufferize,side-by-side,plan-memory" + ",nontemporal" * options.nontemporal,
    }[stage]
