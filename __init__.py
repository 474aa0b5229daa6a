"""aicc: an MLIR-style AI compiler stack for PyTorch.

    torch.compile(model, backend="aicc")

needs no import of this package. What is here is for those who look inside; names load on first use.
"""

from typing import Any

__version__ = "0.1.0"
_PUBLIC = {"Mesh": "passes.shard", "Options": "compiler.options", "Plan": "passes.shard", "auto_shard": "compiler.distributed.auto_shard",
            "compile": "compiler.ahead", "compile_fx": "compiler.driver", "invalidate": "compiler.invalidation"}
__all__ = ["Mesh", "Options", "Plan", "__version__", "auto_shard", "compile", "compile_fx", "invalidate"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        from importlib import import_module
        return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module 'aicc' has no attribute '{name}'; public names: {', '.join(__all__)}")
