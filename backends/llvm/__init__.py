"""CPU code through LLVM: modules at the host level become object code. Entry points: `compile_module`, `host_target`."""

from .compile import CompiledObject, compile_module
from .host import HostProgram, Step
from .target import host_features, host_target, make_target

__all__ = ["CompiledObject", "HostProgram", "Step", "compile_module", "host_features", "host_target", "make_target"]
