"""Numerics of the generated text: whole host programs in Triton's interpreter, against eager.

A subprocess runs the cases, as the interpreter has to be chosen before triton is imported; it is asked for them one by one, so that workers share them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from .cases import CASES

HERE = Path(__file__).parent
LONG = {"attention_training", "softmax_long", "conv_backward", "mlp_backward", "max_pool", "scatter_add", "scatter_prod", "embedding_backward",
        "alibi", "norm_columns", "window_softcap", "attention_gradients_bf16", "attention_training_window", "attention_training_bf16", "column_sum_long"}
MODELS = {"model:bert": 2e-5, "model:gpt2": 2e-5, "model:llama": 2e-5}


Simulate = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def simulate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulate]:
    complaints = tmp_path_factory.mktemp("simulated") / "stderr"
    with complaints.open("w") as stderr, subprocess.Popen([sys.executable, str(HERE / "simulate_cases.py")], env={**os.environ, "TRITON_INTERPRET": "1"},
                                                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        questions, answers = process.stdin, process.stdout

        def ask(name: str) -> dict[str, Any]:
            print(name, file=questions, flush=True)
            for line in answers:
                if line.startswith("RESULT "):
                    return json.loads(line.removeprefix("RESULT "))  # type: ignore[no-any-return]
            raise AssertionError(complaints.read_text()[-3000:])

        yield ask


OLD = tuple(int(n) for n in version("triton").split(".")[:2]) < (3, 7)
"""3.6's interpreter takes int() of an array of one element where a loop's bound is computed, which numpy refuses since 2.5, and its maximum of a
number and NaN (`fmax`) is NaN, and it makes no scalars of bfloat16; 3.9's does none of these. Devices are not concerned."""


def check(result: dict[str, Any], tolerance: float) -> None:
    if OLD and "only 0-dimensional arrays can be converted to Python scalars" in result.get("failure", ""):
        pytest.skip("Triton's interpreter before 3.7 cannot run loops with computed bounds under numpy 2.5")
    if OLD and "no attribute 'get_bf16'" in result.get("failure", ""):
        pytest.skip("Triton's interpreter before 3.7 makes no scalars of bfloat16")
    assert "failure" not in result, result["failure"]
    assert result["errors"] and result["launches"] > 0
    assert max(result["errors"]) <= tolerance, result["errors"]


@pytest.mark.parametrize("name", [n for n in CASES if n not in LONG])
def test_case(name: str, simulate: Simulate) -> None:
    if OLD and name == "nan":
        pytest.skip("fmax of a number and NaN is NaN in Triton's interpreter before 3.7")
    check(simulate(name), CASES[name].tolerance)


TILES = [f"{name}@{n}" for name, ns in {"softmax": (1, 5, 11), "column_sum": (1, 4, 9), "transposed": (1, 6), "pointwise": (2, 7), "variance": (3, 8),
                                        "extremes": (2, 6), "gemm_bf16": (2,)}.items() for n in ns]


@pytest.mark.parametrize("name", TILES)
def test_other_tiles(name: str, simulate: Simulate) -> None:
    """Whichever candidate is measured to be the fastest, it computes the same."""
    check(simulate(name), CASES[name.partition("@")[0]].tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LONG))
def test_long_case(name: str, simulate: Simulate) -> None:
    check(simulate(name), CASES[name].tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, simulate: Simulate) -> None:
    check(simulate(name), MODELS[name])
