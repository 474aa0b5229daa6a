"""Compiled graphs on a real device, through torch.compile. `gpu_check.py` runs the same and more without pytest."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from aicc.compiler.dynamo import aicc

from .cases import CASES, error, tensors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AICC_STRICT", "1")
    torch._dynamo.reset()


def listed(out: Any) -> list[torch.Tensor]:
    return tensors(list(out)) if isinstance(out, (tuple, list)) else [out]


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if not c.backward and n != "gemm_i64"])
def test_case(name: str) -> None:
    case = CASES[name]
    function, inputs = case.build(seed=7)
    if isinstance(function, torch.nn.Module):
        function = function.cuda()
    given = [x.cuda() for x in inputs]
    with torch.no_grad():
        got = listed(torch.compile(function, backend=aicc, dynamic=case.dynamic)(*given))
        true = listed((function.cpu() if isinstance(function, torch.nn.Module) else function)(*inputs))
    assert all(a.is_cuda for a in got)
    assert max(error(a, b) for a, b in zip(got, true, strict=True)) <= case.tolerance


@pytest.mark.parametrize("model", ["bert", "llama", "gpt2", "resnet18"])
def test_model(model: str) -> None:
    from aicc.tests.models.zoo import MODELS

    module, inputs = MODELS[model].build()
    module, given = module.cuda(), [x.cuda() for x in inputs]
    with torch.no_grad():
        truth = copy.deepcopy(module).double()(*[x.double() if x.is_floating_point() else x for x in given])
        ours = error(torch.compile(module, backend=aicc)(*given), truth)
        assert ours <= 4 * error(module(*given), truth) + 2e-6
