"""The MLIR-style core of aicc: values, ops, blocks, regions, types, dialects; printing, parsing, verifying, rewriting."""

from . import dialects
from .attributes import Dense, SymbolRef
from .builder import Builder, make_func, make_module
from .core import UNKNOWN, Block, BlockArg, IRError, Location, Operation, OpResult, Region, Value, clone_region, equivalent
from .expr import Dim, Expr, sym
from .opdef import Trait, define, lookup, registered
from .target import Target
from .types import DTYPES, BufferType, DType, ScalarType, TensorType, TileType, Type, dtype, element_type

__all__ = ["DTYPES", "UNKNOWN", "Block", "BlockArg", "BufferType", "Builder", "DType", "Dense", "Dim", "Expr", "IRError", "Location",
           "OpResult", "Operation", "Region", "ScalarType", "SymbolRef", "Target", "TensorType", "TileType", "Trait", "Type", "Value",
           "clone_region", "define", "dialects", "dtype", "element_type", "equivalent", "lookup", "make_func", "make_module",
           "registered", "sym"]
