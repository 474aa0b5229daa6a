"""A parallel plan: plain data, written and read as TOML or JSON, checked against a model and a mesh.

Entry points: `Plan`, `Plan.to_toml()`, `load_plan(path)`, `SCHEMA` (a JSON schema of the file), `plan_problems(plan,
config, cluster, global_batch)`. A file says the version of its schema and may say in tables of its own what it was made for (see
`plan_file.py`). Rank order: tensor ranks are innermost, then context, then data, and pipeline stages
outermost. Expert groups are laid over tensor, context and data ranks together (each device routes its own tokens).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .cluster import Cluster
from .model import ModelConfig, Shard
from .schedules import SCHEDULES, schedule_problem
from .tables import ConfigError, TableReader, nearest

__all__ = ["CONTEXT", "RECOMPUTE", "SCHEMA", "VERSION", "Plan", "load_plan", "parse_plan", "plan_problems"]

RECOMPUTE = ("none", "selective", "full")
CONTEXT = ("ulysses", "ring")
VERSION = 1  # of the plan file's schema
TABLES = ("target", "model")  # what the plan was made for; `plan_file.py` reads them


@dataclass(frozen=True)
class Plan:
    """How one model trains on a mesh. dp * tp * cp * pp devices.

    zero: 0 keeps everything, 1 shards optimizer state, 2 gradients too, 3 parameters too, over dp * cp. micro_batch:
    sequences per micro-batch and data rank. split: blocks (embedding and head not counted) per model part, in order;
    there are pp * interleave parts (pp * 2 for the V schedules). Empty: as even as possible. context: how attention meets the whole sequence
    where cp cuts it: heads exchanged for it and back (Jacobs et al. 2023, DeepSpeed-Ulysses), or keys and values going round (Liu et al. 2023).
    """

    dp: int = 1
    tp: int = 1
    cp: int = 1
    ep: int = 1
    pp: int = 1
    sp: bool = False
    zero: int = 0
    micro_batch: int = 1
    recompute: str = "none"
    schedule: str = "1f1b"
    interleave: int = 1
    offload: bool = False
    split: tuple[int, ...] = ()
    context: str = "ulysses"

    @property
    def devices(self) -> int:
        return self.dp * self.tp * self.cp * self.pp

    @property
    def parts(self) -> int:
        return self.pp * (SCHEDULES[self.schedule].parts_per_rank or self.interleave)

    @property
    def shard(self) -> Shard:
        return Shard(self.tp, self.sp, self.cp, self.ep, self.rings)

    @property
    def rings(self) -> bool:
        """Whether keys and values go round."""
        return self.cp > 1 and self.context == "ring"

    @property
    def label(self) -> str:
        """One line: `dp8 tp4+sp pp2 zero1 mb1 selective interleaved(3)`."""
        axes = [f"dp{self.dp}", f"tp{self.tp}" + ("+sp" if self.sp else "")]
        ring = "-ring" if self.context == "ring" else ""
        axes += [f"{n}{v}" for n, v in ((f"cp{ring}", self.cp), ("ep", self.ep), ("pp", self.pp)) if v > 1]
        axes += [f"zero{self.zero}"] * (self.zero > 0) + [f"mb{self.micro_batch}", f"recompute={self.recompute}"]
        if self.pp > 1:
            axes.append(self.schedule + (f"({self.interleave})" if self.interleave > 1 else ""))
        return " ".join(axes + ["offload"] * self.offload)

    def micro_batches(self, global_batch: int) -> int:
        return global_batch // (self.dp * self.micro_batch)

    def to_toml(self) -> str:
        """The plan as a TOML table with a comment per line's meaning; `parse_plan` reads it back equal."""
        lines = ["# aicc plan: edit and pass back with --plan. See docs/planner.md.", f"version = {VERSION}  # of this file's schema"]
        for field in fields(self):
            lines.append(f"{field.name} = {_toml(getattr(self, field.name))}  # {_MEANING[field.name]}")
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1)


_MEANING = {
    "dp": "data-parallel degree", "tp": "tensor-parallel degree", "cp": "context-parallel degree",
    "ep": "expert-parallel degree, laid over tensor, context and data ranks", "pp": "pipeline stages",
    "sp": "sequence parallelism in the tensor group", "zero": "ZeRO stage: 0 to 3", "micro_batch": "sequences per micro-batch",
    "recompute": "activation recomputation: none, selective, full", "schedule": "pipeline schedule",
    "interleave": "model parts per rank of the interleaved schedule", "offload": "optimizer state in host memory",
    "split": "blocks per model part, in order",
    "context": "attention under cp: ulysses (heads for the sequence), or ring (keys and values go round)",
}

SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "aicc plan", "type": "object",
    "additionalProperties": False,
    "properties": {
        "version": {"const": VERSION, "description": "version of this schema"},
        **{n: {"type": "integer", "minimum": 1, "description": _MEANING[n]}
           for n in ("dp", "tp", "cp", "ep", "pp", "micro_batch", "interleave")},
        **{n: {"type": "boolean", "description": _MEANING[n]} for n in ("sp", "offload")},
        "zero": {"type": "integer", "minimum": 0, "maximum": 3, "description": _MEANING["zero"]},
        "recompute": {"enum": list(RECOMPUTE), "description": _MEANING["recompute"]},
        "context": {"enum": list(CONTEXT), "description": _MEANING["context"]},
        "schedule": {"enum": list(SCHEDULES), "description": _MEANING["schedule"]},
        "split": {"type": "array", "items": {"type": "integer", "minimum": 0}, "description": _MEANING["split"]},
        "target": {"type": "object", "description": "mesh, hardware and batch that the plan was made for"},
        "model": {"type": "object", "description": "sizes of the model that the plan was made for"},
    },
}


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(map(str, value)) + "]"
    return json.dumps(value)


def load_plan(path: str | Path) -> Plan:
    """Read a plan from a `.toml` or `.json` file. Raises ConfigError with file, line and key."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    return parse_plan(text, str(path))


def parse_plan(text: str, file: str = "plan.toml") -> Plan:
    """Parse TOML, or JSON when `file` ends in `.json`. Missing keys take the defaults of `Plan`."""
    return read_plan(plan_reader(text, file))


def plan_reader(text: str, file: str) -> TableReader:
    """The file's top table. Raises ConfigError when it is not TOML (or JSON, by the name's ending)."""
    if not file.endswith(".json"):
        return TableReader.from_text(text, file)
    try:
        return TableReader(file, text, json.loads(text))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file}:{error.lineno}: not JSON: {error.msg}") from error


def read_plan(reader: TableReader) -> Plan:
    """The plan in a file's top table; its other tables are left alone. Raises ConfigError with file, line and key."""
    if reader.table.get("version", VERSION) != VERSION:
        raise reader.error("version", f"this aicc reads plan files of version {VERSION}")
    reader.seen.update(("version", *TABLES))
    values: dict[str, Any] = {}
    for field in fields(Plan):
        key, rule = field.name, SCHEMA["properties"][field.name]
        if key not in reader.table:
            reader.seen.add(key)
        elif "enum" in rule:
            values[key] = reader.text(key, choices=rule["enum"])
        elif rule["type"] == "integer":
            values[key] = reader.integer(key, _MEANING[key], low=rule["minimum"])
            if values[key] > rule.get("maximum", values[key]):
                raise reader.error(key, f"must be at most {rule['maximum']}")
        else:
            reader.seen.add(key)
            value = reader.table[key]
            if rule["type"] == "boolean" and not isinstance(value, bool):
                raise reader.error(key, "must be true or false")
            if rule["type"] == "array":
                if not isinstance(value, list) or not all(isinstance(v, int) and v >= 0 for v in value):
                    raise reader.error(key, "must be a list of block counts")
                value = tuple(value)
            values[key] = value
    reader.finish()
    return Plan(**values)


def plan_problems(plan: Plan, config: ModelConfig, cluster: Cluster, global_batch: int) -> list[str]:
    """Everything that keeps `plan` from running on this model, mesh and batch, each as one line. Empty: it can run."""
    problems = []
    if plan.devices != cluster.size:
        problems.append(f"dp {plan.dp} * tp {plan.tp} * cp {plan.cp} * pp {plan.pp} = {plan.devices} devices, "
                        f"the mesh has {cluster.size}")
    if global_batch % (plan.dp * plan.micro_batch):
        problems.append(f"global batch {global_batch} is not a multiple of dp {plan.dp} * micro-batch {plan.micro_batch}")
    problems += _shard_problems(plan, config)
    if plan.recompute not in RECOMPUTE:
        problems.append(f"recompute '{plan.recompute}' is unknown; {nearest(plan.recompute, RECOMPUTE)}")
    if plan.zero not in (0, 1, 2, 3):
        problems.append(f"zero stage {plan.zero} does not exist; allowed: 0, 1, 2, 3")
    micro_batches = max(1, plan.micro_batches(global_batch))
    schedule = schedule_problem(plan.schedule, plan.pp, micro_batches, plan.interleave)
    if schedule:
        problems.append(schedule)
    elif plan.parts > config.layers + 2:
        problems.append(f"{plan.parts} model parts, but the model has {config.layers} blocks")
    elif plan.split and (len(plan.split) != plan.parts or sum(plan.split) != config.layers):
        problems.append(f"split has {len(plan.split)} parts of {sum(plan.split)} blocks in all; "
                        f"the plan needs {plan.parts} parts and the model has {config.layers} blocks")
    return problems


def _shard_problems(plan: Plan, config: ModelConfig) -> list[str]:
    problems = []
    if config.heads % plan.tp:
        problems.append(f"tp {plan.tp} does not divide {config.heads} heads")
    if plan.sp and plan.tp == 1:
        problems.append("sequence parallelism (sp) needs tp above 1")
    if config.seq % (plan.cp * (plan.tp if plan.sp else 1)):
        problems.append(f"cp {plan.cp} * tp {plan.tp} does not divide the sequence of {config.seq}")
    if plan.context not in CONTEXT:
        problems.append(f"context '{plan.context}' is unknown; {nearest(plan.context, CONTEXT)}")
    elif plan.cp > 1 and plan.context == "ulysses" and (config.kv_heads % plan.tp or config.kv_heads // plan.tp % plan.cp):
        problems.append(f"cp {plan.cp} does not divide the {config.kv_heads} / {plan.tp} heads of keys and values of a tensor rank: context=ring")
    experts = config.moe.experts if config.moe else 1
    if experts % plan.ep:
        problems.append(f"ep {plan.ep} does not divide {experts} experts")
    if (plan.dp * plan.tp * plan.cp) % plan.ep:
        problems.append(f"ep {plan.ep} does not divide the stage's {plan.dp * plan.tp * plan.cp} devices")
    return problems
