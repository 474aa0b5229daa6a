from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import pytest


@pytest.fixture
def compile_ir() -> Callable[..., bytes]:
    """LLVM IR text -> object code for this machine."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()

    def compile_text(text: str, **options: Any) -> bytes:
        module = llvm.parse_assembly(text)
        module.triple = llvm.get_process_triple()
        machine = llvm.Target.from_default_triple().create_target_machine(**{"reloc": "pic", "codemodel": "small", **options})
        return machine.emit_object(module)

    return compile_text
