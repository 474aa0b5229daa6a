"""The way in: what is imported, which inputs the backend takes, how options are refused, what happens to a graph that fails."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from aicc.compiler.dynamo import backend
from aicc.compiler.options import Options
from aicc.frontend.common_subexpressions import merge_common_subexpressions
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

_PROGRAM = f"""
import sys
sys.path[:0] = {sys.path!r}
import torch, torch._dynamo, torch._functorch.aot_autograd  # what any backend has in memory
before = {{m for m in sys.modules if m.startswith("torch._inductor")}}
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.GELU())
torch.compile(model, backend="aicc")(torch.randn(3, 4)).sum().backward()
print(" ".join(sorted({{m for m in sys.modules if m.startswith("torch._inductor")}} - before)))
"""


def test_inductor_stays_out() -> None:
    """A training step imports nothing of Inductor's compiler. torch's own AOTAutograd imports its configuration and cache when it is
    imported itself, and the few modules named here when it runs."""
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    names = {m.removeprefix("torch._inductor.") for m in done.stdout.split()}
    assert names <= {"compiler_bisector", "fx_passes", "fx_passes.dedupe_symint_uses", "sizevars"}


def test_nested_inputs_reach_the_backend() -> None:
    """A graph module called with lists and dicts, as other frontends than Dynamo do."""
    class Sum(torch.nn.Module):
        def forward(self, xs: Any) -> tuple[Tensor]:
            return (xs[0] * 2 + xs[1],)

    gm = torch.fx.symbolic_trace(Sum())
    xs = [torch.randn(3), torch.randn(3)]
    run = backend(Options.from_user())(gm, [xs])
    got = run(xs)
    torch.testing.assert_close(got[0], xs[0] * 2 + xs[1])


def test_options_are_checked() -> None:
    for options, message in (({"fallback_randon": True}, "did you mean 'fallback_random'"), ({"pack_parameters": 1}, "must be a bool")):
        with pytest.raises(Exception, match=message):
            torch.compile(lambda x: x + 1, backend="aicc", options=options)(torch.ones(2))


def _merged(f: Any, *args: Any) -> tuple[int, list[str]]:
    gm = make_fx(f, tracing_mode="fake")(*args)
    count = merge_common_subexpressions(gm.graph)
    gm.graph.lint()
    return count, [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]


def test_common_subexpressions() -> None:
    x = torch.randn(3)
    assert _merged(lambda x: (x.sin() + x.sin()).cos() * (x.sin() + x.sin()).cos(), x)[0] == 5
    assert _merged(lambda x: (x + 1).exp() * (x + 1.0).exp(), x)[0] == 0, "numbers of two types"
    assert _merged(lambda x: (x + 1, x + 1), x)[0] == 0, "two results have memory of their own"
    assert _merged(lambda x: torch.rand_like(x) * torch.rand_like(x), x)[0] == 0, "random numbers"

    def writes(x: Tensor) -> Tensor:
        y = x.sin() * 2
        x.add_(1)
        return y + x.sin() * 2

    assert _merged(writes, x)[0] == 0, "a write in between"
