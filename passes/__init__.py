"""The passes, one a file. Importing this package registers them all for textual pipelines."""

from . import (
    absorb_views,
    bufferize,
    canonicalize,
    cse,
    dce,
    decompose,
    fold_constants,
    fuse,
    inline,
    layout,
    library,
    pack,
    plan_memory,
    schedule,
    sink_reshapes,
    split_reductions,
    spmd,
    stream,
    tiling,
    unpad_concatenations,
)
