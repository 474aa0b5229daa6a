"""Importing this package registers every dialect."""

from . import arith, builtin, dist, graph, host, tensor, tile
