"""The passes, one a file. Importing this package registers them all for textual pipelines."""

from . import absorb_views, canonicalize, cse, dce, fuse, inline, pack, sink_reshapes, tiling
