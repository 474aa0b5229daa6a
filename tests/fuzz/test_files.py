"""Damaged artifacts, cache entries, manifests and model files: one class of error each, and nothing else happens."""

from __future__ import annotations

import contextlib
import copy
import warnings
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from aicc.compiler import driver
from aicc.compiler.driver import watching
from aicc.compiler.dynamo import backend
from aicc.compiler.errors import UserError
from aicc.compiler.model_file import load
from aicc.compiler.options import Options
from aicc.runtime.artifact import Artifact, ArtifactError
from aicc.runtime.cache import ArtifactCache
from aicc.runtime.executor import CompiledGraph
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.fuzzing import at_most, attempt, scaled

KEY = "ab" * 32
JUNK = (None, True, 0, -1, 1 << 70, 1.5, "", "x", "../../etc", [], {}, [[]], [0, 0], {"kind": "buffer"}, "main_7", ["call", "exit"], ["extern", {}])


@cache
def compiled() -> tuple[dict[str, Any], bytes]:
    """The manifest and the object code of a program with two outputs, a packed parameter, a size symbol and an operator of ATen's."""
    made: list[Any] = []

    def program(x: torch.Tensor, w: torch.Tensor) -> Any:
        values, order = torch.sort((x @ w).relu(), dim=-1)
        return values.cumsum(0), order + 1
    torch._dynamo.reset()
    true, codes = driver.compile_module, []

    def spy(*args: Any, **named: Any) -> Any:
        result = true(*args, **named)
        codes.append(result.object_code)
        return result
    driver.compile_module = spy
    try:
        with watching(compiled=made.append), torch.no_grad():
            torch.compile(program, backend=backend(Options(strict=True, cache=False)), dynamic=True)(torch.randn(5, 8), torch.randn(8, 6))
    finally:
        driver.compile_module = true
    return made[0].graph.manifest, codes[0]


def damaged_bytes(data: bytes, rng: Random) -> bytes:
    raw = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.choice([rng.randrange(min(64, len(raw)) or 1), rng.randrange(len(raw) or 1)])
        choice = rng.random()
        if choice < 0.3:
            del raw[at:]
        elif choice < 0.6 and raw:
            raw[at % len(raw)] ^= 1 << rng.randrange(8)
        elif choice < 0.8:
            raw[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 9)))
        else:
            del raw[at:at + rng.randint(1, 99)]
    return bytes(raw)


@scaled(100)
@given(st.integers(0, 1 << 40))
def test_artifacts(seed: int) -> None:
    manifest, code = compiled()
    artifact = Artifact(manifest, {"object": code})
    data = artifact.to_bytes()
    changed = damaged_bytes(data, Random(seed))

    def check() -> None:
        with at_most(20), pytest.raises(ArtifactError):
            Artifact.from_bytes(changed)
    if changed != data:
        attempt(f"artifact, seed {seed}", check)


@settings(scaled(25), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 1 << 40))
def test_cache_entries(tmp_path: Path, seed: int) -> None:
    manifest, code = compiled()
    attempt(f"cache, seed {seed}", lambda: check_entry(tmp_path, Artifact(manifest, {"object": code}), seed))


def check_entry(folder: Path, artifact: Artifact, seed: int) -> None:
    store = ArtifactCache(folder)
    store.put(KEY, artifact)
    ((_, _, path),) = store.entries()
    data = path.read_bytes()
    path.write_bytes(damaged_bytes(data, Random(seed)))
    same = path.read_bytes() == data
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        found = store.get(KEY)
    assert (found == artifact) == same and (found is None) != same
    assert same or [w.category for w in heard] == [RuntimeWarning]
    assert same or store.entries() == [], "a damaged entry is dropped"


def _places(node: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a JSON tree."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, child in items for place in ((node, key), *_places(child))]


@scaled(60)
@given(st.integers(0, 1 << 40))
def test_manifests(seed: int) -> None:
    manifest, code = compiled()
    rng = Random(seed)
    changed = copy.deepcopy(manifest)
    for _ in range(rng.randint(1, 3)):
        places = _places(changed)
        container, key = rng.choice(places)
        if rng.random() < 0.25:
            del container[key]
        else:
            container[key] = copy.deepcopy(rng.choice([*JUNK, container[rng.choice(list(container))] if isinstance(container, dict) else rng.choice(container)]))

    def check() -> None:
        with at_most(20), contextlib.suppress(ArtifactError):
            CompiledGraph(changed, code)
    attempt(f"manifest, seed {seed}: {changed}", check)


MODEL = '''"""A model."""
import torch

class Model(torch.nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.linear = torch.nn.Linear(width, width)

    def forward(self, x, *, scale=1.0):
        return self.linear(x) * scale

def get_inputs():
    return [torch.randn(4, 8)]

def get_init_inputs():
    return []
'''


@settings(scaled(60), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 1 << 40))
def test_model_files(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "model.py"
    data = damaged_bytes(MODEL.encode(), Random(seed))
    path.write_bytes(data)

    def check() -> None:
        with at_most(20):
            try:
                found = load(str(path))
            except UserError as e:
                assert "model" in str(e)
            else:
                assert found.name == "model"
    attempt(data, check)
