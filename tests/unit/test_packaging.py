"""The package list, the data files and the pinned versions agree with what is in the tree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ("backends", "compiler", "frontend", "ir", "passes", "runtime")


def test_every_package_is_listed() -> None:
    found = {"aicc"} | {"aicc." + ".".join(p.parent.relative_to(ROOT).parts) for f in FOLDERS for p in (ROOT / f).rglob("__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_every_data_file_is_packaged() -> None:
    data = PROJECT["tool"]["setuptools"]["package-data"]
    packaged = {p for package, patterns in data.items() for pattern in patterns
                for p in ROOT.joinpath(*package.split(".")[1:]).glob(pattern)}
    found = {p for f in FOLDERS for p in (ROOT / f).rglob("*") if p.is_file() and p.suffix in (".lark", ".toml", ".json")}
    assert found and found <= packaged


def test_constraints_pin_every_dependency_within_its_range() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#"))
    extras = [r for rows in PROJECT["project"]["optional-dependencies"].values() for r in rows if not r.startswith("aicc")]
    for requirement in [*PROJECT["project"]["dependencies"], *extras]:
        name = re.split(r"[<>=;\[ ]", requirement)[0]
        assert name in pins, f"{name} is not in constraints.txt"
    assert pins["torch"] == "2.13.0"
