"""On GPUs, large plain attention in 16 bits stays with the library's kernel; all else is ours."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from aicc.frontend.errors import Unsupported
from aicc.frontend.ops.contractions import _leave_to_library
from aicc.ir.types import DTYPES, TensorType


@pytest.mark.parametrize(("cuda", "dtype", "length", "left"), [
    (True, torch.bfloat16, 4096, True), (True, torch.float16, 1024, True), (True, torch.bfloat16, 512, False),
    (True, torch.float32, 4096, False), (False, torch.bfloat16, 4096, False)])
def test_when_the_library_is_called(cuda: bool, dtype: torch.dtype, length: int, left: bool) -> None:
    result = SimpleNamespace(is_cuda=cuda, dtype=dtype, device=torch.device("cuda" if cuda else "cpu"))
    context = SimpleNamespace(val=(result, None), node=SimpleNamespace(users=()))
    heads = TensorType((1, 2, length, 64), DTYPES["bf16"])  # 64 wide: no schedule of ours keeps up with the library's
    if left:
        with pytest.raises(Unsupported, match="library"):
            _leave_to_library(context, heads, heads, heads)  # type: ignore[arg-type]
    else:
        _leave_to_library(context, heads, heads, heads)  # type: ignore[arg-type]
