"""Options that a user mistypes are named; torch's own spellings are taken."""

from __future__ import annotations

from typing import Any

import pytest
from aicc.compiler.env import read_environment
from aicc.compiler.options import Options


def given(mode: str | None = None, **options: Any) -> Options:
    return Options.from_user(mode, options, read_environment({}))


@pytest.mark.parametrize(("options", "message"), [
    ({"fast_maths": True}, "did you mean 'fast_math'"), ({"winograd": 1}, "must be a bool, got 1"), ({"loss_bytes": True}, "must be a int, got True"),
    ({"loss_bytes": -5}, "must not be negative"), ({"activation_bytes": -1}, "must not be negative"), ({"features": 5}, "names of CPU features"),
    ({"features": ["avx2", 5]}, "names of CPU features"), ({"mode": "fast"}, "unknown mode 'fast'")])
def test_a_bad_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        given(**options)


def test_modes() -> None:
    with pytest.raises(ValueError, match="unknown mode 'fast'; aicc knows default"):
        given("fast")
    assert given("max-autotune-no-cudagraphs").mode == given("max-autotune").mode == "max-autotune"
    assert not given("max-autotune-no-cudagraphs").replays and given("reduce-overhead").replays


def test_features() -> None:
    assert given(features="avx2, fma,").features == given(features=["avx2", "fma"]).features == ("avx2", "fma")
    assert given(features=None).features is None and given(features="").features == ()
