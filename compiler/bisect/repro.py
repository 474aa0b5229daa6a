"""A fault as a folder, and the folder run again.

    commands = write_repro(finding, Path("repro"))
    verdict = replay(Path("repro"))         # None: it is mended

    repro.mlir       the smallest failing module, as `aicc opt` reads it (large constants in repro.mlir.resources)
    inputs.pt        its arguments (torch.load); for a fault of the importer, the operator's
    repro.json       which step is at fault, and the target
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from ...ir import Target
from ...ir.parser import load
from ...ir.passes import parse_pipeline
from ...ir.printer import save
from ...ir.verifier import verify
from ..errors import UserError
from .checks import Check, KernelCheck, PassCheck, ProgramCheck, Verdict
from .importing import NodeRepro, check_node
from .search import Backend, Finding

__all__ = ["replay", "write_repro"]

_MODULE, _INPUTS, _ABOUT = "repro.mlir", "inputs.pt", "repro.json"


def write_repro(finding: Finding, folder: Path) -> list[str]:
    """Writes the folder; gives the commands that show the fault again. [] when there is nothing to show (a graph that cannot be imported)."""
    about: dict[str, Any] = {"stage": finding.stage, "name": finding.name, "passes": [str(p) for p in finding.passes],
                             "target": None if finding.target is None else dataclasses.asdict(finding.target),
                             "verdict": finding.verdict.kind, "text": finding.verdict.text, "op": finding.op, "location": str(finding.location)}
    if finding.reduced is None and finding.node is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    commands = [f"aicc bisect --replay {folder}"]
    if finding.reduced is not None:
        save(finding.reduced.module, folder / _MODULE, locations=True)
        torch.save(finding.reduced.arguments, folder / _INPUTS)
        if finding.passes and finding.name != "program":
            commands.append(f"aicc opt {folder / _MODULE} --passes \"{','.join(map(str, finding.passes))}\"")
    elif finding.node is not None:
        module, _ = check_node(finding.node)
        save(module, folder / _MODULE, locations=False)
        torch.save({"target": finding.node.target, "args": list(finding.node.args), "kwargs": finding.node.kwargs}, folder / _INPUTS)
    (folder / _ABOUT).write_text(json.dumps(about, indent=2) + "\n")
    return commands


def replay(folder: Path, backend: Backend | None = None) -> Verdict | None:
    """The verdict on a folder now. UserError for a folder that is none of ours."""
    try:
        about = json.loads((folder / _ABOUT).read_text())
        given = torch.load(folder / _INPUTS, weights_only=True)
    except FileNotFoundError as e:
        raise UserError(f"'{folder}' is no repro of aicc bisect: it has no {Path(str(e.filename)).name}") from e
    except (ValueError, RuntimeError, EOFError) as e:
        raise UserError(f"'{folder}' cannot be read: {e}") from e
    if about["name"] == "import":
        _, found = check_node(NodeRepro(given["target"], tuple(given["args"]), given["kwargs"]))
        return None if found is None else Verdict("bug", str(found), found)
    module = load(folder / _MODULE)
    verify(module)
    return check_of(about["stage"], about["name"], about["passes"], target_of(about["target"]), backend or Backend())(module, given)


def target_of(fields: dict[str, Any]) -> Target:
    """A target from its JSON form."""
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return Target(**given)


def check_of(stage: str, name: str, passes: list[str], target: Target, backend: Backend) -> Check:
    """The check that a finding failed."""
    steps = parse_pipeline(",".join(passes))
    if stage != "backend":
        return PassCheck(steps, target)
    if name != "program":
        return KernelCheck(target, backend.launch)
    return ProgramCheck(steps, target, backend.program, backend.launch)
