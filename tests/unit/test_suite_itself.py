"""What tests rely on without saying so."""

from __future__ import annotations

import pytest
import torch
from aicc.compiler.driver import Compilation, watching


@pytest.mark.parametrize("part", [0, 1])
def test_layers_are_compiled_as_if_no_test_had_come_before(part: int) -> None:
    """Dynamo would take the sizes of the second part for symbols, and run its layers eagerly from the ninth compilation on."""
    seen: list[Compilation] = []
    rows = 2 + part
    with watching(compiled=seen.append), torch.no_grad():
        torch.compile(torch.nn.Linear(16 + part, 4), backend="aicc")(torch.randn(rows, 16 + part))
        for i in range(6):
            torch.compile(torch.nn.Linear(2 + i, 4 + part), backend="aicc", dynamic=False)(torch.randn(rows, 2 + i))
    assert len(seen) == 7 and seen[0].graph is not None and not seen[0].graph.manifest["symbols"]
