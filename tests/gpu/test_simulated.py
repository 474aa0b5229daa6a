"""Numerics of the generated text: whole host programs in Triton's interpreter, against eager.

One subprocess runs all cases, as the interpreter has to be chosen before triton is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from .cases import CASES

HERE = Path(__file__).parent
LONG = {"attention_training", "softmax_long", "conv_backward", "mlp_backward", "max_pool", "scatter_add", "scatter_prod", "embedding_backward",
        "alibi", "norm_columns", "window_softcap", "attention_gradients_bf16", "attention_training_window", "attention_training_bf16", "column_sum_long"}
MODELS = {"model:bert": 2e-5, "model:gpt2": 2e-5, "model:llama": 2e-5}


@cache
def simulated(names: tuple[str, ...]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(HERE / "simulate_cases.py"), *names],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[-1].removeprefix("RESULT "))  # type: ignore[no-any-return]


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
def test_case(name: str) -> None:
    if OLD and name == "nan":
        pytest.skip("fmax of a number and NaN is NaN in Triton's interpreter before 3.7")
    check(simulated(tuple(n for n in CASES if n not in LONG))[name], CASES[name].tolerance)


TILES = [f"{name}@{n}" for name, ns in {"softmax": (1, 5, 11), "column_sum": (1, 4, 9), "transposed": (1, 6), "pointwise": (2, 7), "variance": (3, 8),
                                        "extremes": (2, 6), "gemm_bf16": (2,)}.items() for n in ns]


@pytest.mark.parametrize("name", TILES)
def test_other_tiles(name: str) -> None:
    """Whichever candidate is measured to be the fastest, it computes the same."""
    check(simulated(tuple(TILES))[name], CASES[name.partition("@")[0]].tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LONG))
def test_long_case(name: str) -> None:
    check(simulated(tuple(sorted(LONG)))[name], CASES[name].tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_model(name: str) -> None:
    check(simulated((name,))[name], MODELS[name])
