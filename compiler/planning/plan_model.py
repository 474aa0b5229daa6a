"""From what the user names to what the planner plans: sizes of a transformer, no weights.

    found = load_for_planning("model.py", cluster, seq=None, dtype="bf16")
    found.config, found.captured, found.remarks

A transformer with a transformers configuration is planned by its sizes, and its layers' ops go through the integer program beside; any
other module is planned by its traced ops alone.

A Python file runs with torch's default device set to `meta`, so a model of any size is built without memory. It defines a model and
its inputs as for `aicc run`, or a transformers configuration named `config`. A `config.json` of a checkpoint does as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ...passes.shard.cluster import Cluster
from ...passes.shard.model import ModelConfig, from_transformers
from ...passes.shard.traced import traced_config
from ..errors import UserError
from ..model_file import LoadedModel, Script, defined_names, load, namespace
from .op_capture import Captured, capture

__all__ = ["PlannedModel", "load_for_planning"]

_TORCH = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


@dataclass(frozen=True)
class PlannedModel:
    """Sizes for the planner; the module on the meta device with its inputs, if there is one; what the user should know."""

    config: ModelConfig
    loaded: LoadedModel | None = None
    captured: Captured | None = None
    remarks: tuple[str, ...] = field(default=())


def load_for_planning(spec: str, cluster: Cluster, seq: int | None, dtype: str) -> PlannedModel:
    """The model that `spec` names. UserError says what was looked for."""
    if spec.endswith(".json"):
        return PlannedModel(_from_config(_read_json(Path(spec)), spec, seq, dtype))
    with torch.device("meta"):
        if Path(spec).suffix == ".py":
            defined = defined_names(Path(spec))
            if "config" in defined and not {"model", "Model"} & defined:
                names = namespace(Path(spec))
                return PlannedModel(_from_config(names["config"], spec, seq or names.get("seq"), dtype))
        found = load(spec)
    if isinstance(found, Script):
        raise UserError(f"{spec} compiles by itself; for planning, define `model` and `example_inputs`, or a transformers `config`")
    return _from_module(found, spec, cluster, seq, dtype)


def _read_json(path: Path) -> SimpleNamespace:
    try:
        table = json.loads(path.read_text())
    except OSError as e:
        raise UserError(f"'{path}' cannot be read: {e.strerror}") from e
    except json.JSONDecodeError as e:
        raise UserError(f"{path}:{e.lineno}: not JSON: {e.msg}") from e
    if not isinstance(table, Mapping):
        raise UserError(f"{path}: a configuration is a JSON object of sizes (hidden_size, num_hidden_layers, ...)")
    return SimpleNamespace(**table)


def _is_config(value: Any) -> bool:
    return any(hasattr(value, name) for name in ("hidden_size", "n_embd", "d_model"))


def _from_config(config: Any, spec: str, seq: int | None, dtype: str) -> ModelConfig:
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    try:
        return from_transformers(config, seq, dtype)
    except ValueError as e:
        raise UserError(f"{spec}: {e}") from e


def _from_module(found: LoadedModel, spec: str, cluster: Cluster, seq: int | None, dtype: str) -> PlannedModel:
    module = found.model
    if not isinstance(module, torch.nn.Module):
        raise UserError(f"{spec}: '{found.name}' is no torch.nn.Module: the planner needs its parameters")
    module.to(_TORCH[dtype])
    config, remarks = getattr(module, "config", None), []
    try:
        captured: Captured | None = capture(found)
    except UserError as e:
        if not _is_config(config):
            raise
        captured = None
        remarks.append(f"planned by its sizes alone: {e}")
    if captured is not None and captured.unknown:
        remarks.append(f"operations that the planner cannot cut: {', '.join(captured.unknown)}")
    if not _is_config(config):
        assert captured is not None
        try:
            return PlannedModel(traced_config(found.name, captured.blocks, captured.batch, cluster, dtype), found, captured, tuple(remarks))
        except ValueError as e:
            raise UserError(f"{spec}: {e}") from e
    sizes = _from_config(config, spec, seq or _sequence(found), dtype)
    there = sum(p.numel() for p in module.parameters())
    if abs(there / sizes.params() - 1) > 0.02:
        remarks.append(f"the module has {there / 1e9:.3f} billion parameters, the planner's sizes give {sizes.params() / 1e9:.3f}: "
                       "it is no plain decoder, so take the plan with care")
    return PlannedModel(sizes, found, captured, tuple(remarks))


def _sequence(found: LoadedModel) -> int | None:
    """The sequence length of the example inputs: the last extent of the first integer tensor with two dimensions."""
    for value in (*found.args, *found.kwargs.values()):
        if isinstance(value, torch.Tensor) and value.ndim == 2 and not value.is_floating_point():
            return int(value.shape[1])
    return None
