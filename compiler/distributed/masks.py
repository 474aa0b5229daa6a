"""Masks of attention that are no data: computed while the model is captured, and left out where attention can do without.

    simplify_masks(graph)        # in place; how many calls lost their mask

A model that is traced builds its causal mask from positions, batch by batch, and hands it to attention, which then reads it, and computes what it
masks. Where no argument of the graph reaches a mask, its value is the same in every call: if it is the causal mask, attention is told so; if it
masks nothing, it goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx

from ...frontend.whole_attention import ATTENTION

__all__ = ["simplify_masks"]

LARGEST = 1 << 30
"""Elements of a mask above which it is left alone: it is computed on the host."""


def simplify_masks(gm: fx.GraphModule) -> int:
    """See the module docstring."""
    known: dict[fx.Node, Any] = {}
    found: dict[fx.Node, str] = {}
    changed = 0
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target not in ATTENTION:
            continue
        given = {**dict(zip(("attn_mask", "dropout_p", "is_causal"), node.args[3:], strict=False)), **node.kwargs}
        mask = given.get("attn_mask")
        if not isinstance(mask, fx.Node) or given.get("is_causal"):
            continue
        kind = found[mask] if mask in found else found.setdefault(mask, _kind(mask, known))
        if kind in ("causal", "none"):
            rest = {k: v for k, v in given.items() if k not in ("attn_mask", "is_causal")}
            node.args, node.kwargs = node.args[:3], {**rest, **({"is_causal": True} if kind == "causal" else {})}
            changed += 1
    if changed:
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return changed


def _kind(mask: fx.Node, known: dict[fx.Node, Any]) -> str:
    """'causal', 'none' (nothing is masked), or '' for what is neither, or is not known."""
    shape = _shape(mask)
    if len(shape) < 2 or not all(isinstance(s, int) for s in shape) or _product(shape) > LARGEST or not _constant(mask):
        return ""
    value = _evaluate(mask, known)
    if value.dtype != torch.bool:
        lowest = torch.finfo(value.dtype).min
        if not bool(((value == 0) | (value <= lowest)).all()):
            return ""
        value = value == 0
    if bool(value.all()):
        return "none"
    rows, columns = value.shape[-2:]
    causal = torch.ones(rows, columns, dtype=torch.bool).tril()
    return "causal" if rows == columns and bool((value == causal).all()) else ""


def _shape(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("val", node.meta.get("example_value"))
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for s in shape:
        total *= s
    return total


def _constant(node: fx.Node) -> bool:
    """Whether no argument of the graph reaches it, and nothing random."""
    frontier, seen = [node], {node}
    while frontier:
        current = frontier.pop()
        if current.op != "call_function" or not isinstance(current.target, torch._ops.OpOverload) or (
                torch.Tag.nondeterministic_seeded in current.target.tags or current.target._schema.is_mutable):
            return False
        for x in current.all_input_nodes:
            if x not in seen:
                seen.add(x)
                frontier.append(x)
    return True


def _evaluate(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """The value, computed on the CPU."""
    stack = [node]
    while stack:
        current = stack[-1]
        missing = [x for x in current.all_input_nodes if x not in known]
        if current in known or not missing:
            if current not in known:
                args, kwargs = fx.map_arg((current.args, current.kwargs), lambda x: known[x])
                known[current] = current.target(*args, **_on_cpu(kwargs))  # type: ignore[operator]
            stack.pop()
        else:
            stack.extend(missing)
    return known[node]


def _on_cpu(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {k: torch.device("cpu") if isinstance(v, torch.device) else v for k, v in kwargs.items()}
