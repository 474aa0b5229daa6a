"""A plan file with what it was made for: mesh, hardware, batch and the model's sizes. Then the file alone can be simulated, and a plan
for another mesh or model is found out.

Entry points: `PlanFile`, `PlanFile.to_toml()`, `load_plan_file(path)`. The plan itself is `plan.py`'s.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from .cluster import Cluster, Mesh, load_cluster
from .layer_cost import SOFTWARE
from .model import LatentAttention, MixtureOfExperts, ModelConfig
from .plan import Plan, plan_reader, read_plan
from .tables import ConfigError, TableReader

__all__ = ["PlanFile", "Target", "load_plan_file", "model_toml"]


@dataclass(frozen=True)
class Target:
    """hardware: a preset or a cluster file. mesh: as `Mesh.parse` reads it. source: the model file or name, for people."""

    hardware: str
    mesh: str
    global_batch: int
    software: str = "aicc"
    source: str = ""

    def cluster(self) -> Cluster:
        return load_cluster(self.hardware, mesh=Mesh.parse(self.mesh))


@dataclass(frozen=True)
class PlanFile:
    """A plan, its target and its model; the latter two may be absent (a plan written by hand)."""

    plan: Plan
    target: Target | None = None
    model: ModelConfig | None = None

    def to_toml(self) -> str:
        """TOML that `load_plan_file` reads back equal and `load_plan` reads as the plan alone."""
        text = self.plan.to_toml()
        if self.target is not None:
            text += "\n# What the plan was made for.\n[target]\n" + _values(self.target)
        if self.model is not None and self.model.custom is None:  # a traced model is in its source
            text += "\n" + model_toml(self.model)
        return text


_NESTED: dict[str, Any] = {"moe": MixtureOfExperts, "latent": LatentAttention}


def model_toml(model: ModelConfig) -> str:
    """The table `[model]` of a plan file, with `[model.moe]` and `[model.latent]` where there are such."""
    text = "[model]\n" + _values(model, skip=(*_NESTED, "custom"))
    for name in _NESTED:
        if getattr(model, name) is not None:
            text += f"\n[model.{name}]\n" + _values(getattr(model, name))
    return text


def _values(data: Any, skip: tuple[str, ...] = ()) -> str:
    return "".join(f"{f.name} = {json.dumps(getattr(data, f.name))}\n" for f in fields(data) if f.name not in skip)


def load_plan_file(path: str | Path) -> PlanFile:
    """Read a `.toml` or `.json` plan file. Raises ConfigError with file, line, key and what is allowed."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    reader = plan_reader(text, str(path))
    plan = read_plan(reader)
    target = _target(reader.child("target")) if "target" in reader.table else None
    model = _model(reader.child("model")) if "model" in reader.table else None
    return PlanFile(plan, target, model)


def _target(table: TableReader) -> Target:
    target = Target(table.text("hardware"), table.text("mesh"), table.integer("global_batch", "sequences per step"),
                    table.text("software", "aicc", choices=SOFTWARE), table.text("source", ""))
    table.finish()
    try:
        Mesh.parse(target.mesh)
    except ConfigError as error:
        raise table.error("mesh", str(error)) from None
    return target


def _model(table: TableReader) -> ModelConfig:
    nested: dict[str, Any] = {}
    for name, kind in _NESTED.items():
        if name in table.table:
            inner = table.child(name)
            nested[name] = kind(**_fields(inner, kind, ()))
    table.seen.update(_NESTED)
    found = _fields(table, ModelConfig, (*_NESTED, "custom"))
    try:
        return ModelConfig(**found, **nested)
    except ValueError as error:
        raise ConfigError(f"{table.file}: [model]: {error}") from error


def _fields(table: TableReader, kind: type, skip: tuple[str, ...]) -> dict[str, Any]:
    """Values of a dataclass's plain fields, checked by the types of their annotations; other keys are refused."""
    found: dict[str, Any] = {}
    for field in fields(kind):
        key = field.name
        if key in skip:
            continue
        if key not in table.table:
            table.seen.add(key)
        elif field.type == "int":
            found[key] = table.integer(key, "a size", low=0)
        elif field.type == "float":
            found[key] = table.number(key, "a ratio")
        elif field.type == "str":
            found[key] = table.text(key)
        else:
            table.seen.add(key)
            if not isinstance(table.table[key], bool):
                raise table.error(key, "must be true or false")
            found[key] = table.table[key]
    table.finish()
    for field in fields(kind):
        if field.name not in (*found, *skip) and field.default is MISSING:
            raise table.error(field.name, "is missing")
    return found
