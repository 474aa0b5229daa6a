"""On GPUs, large plain attention in 16 bits stays with the library's kernel; all else is ours."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from aicc.frontend.errors import Unsupported
from aicc.frontend.ops.contractions import _leave_to_library


@pytest.mark.parametrize(("cuda", "dtype", "length", "left"), [
    (True, torch.bfloat16, 4096, True), (True, torch.float16, 1024, True), (True, torch.bfloat16, 512, False),
    (True, torch.float32, 4096, False), (False, torch.bfloat16, 4096, False)])
def test_when_the_library_is_called(cuda: bool, dtype: torch.dtype, length: int, left: bool) -> None:
    context = SimpleNamespace(val=(SimpleNamespace(is_cuda=cuda, dtype=dtype), None))
    if left:
        with pytest.raises(Unsupported, match="library"):
            _leave_to_library(context, length, length)  # type: ignore[arg-type]
    else:
        _leave_to_library(context, length, length)  # type: ignore[arg-type]
