"""flex_attention written out: scores, modification, mask, softmax, product, in plain tensor operators.

    expand_flex(gm, decompositions)      # in place; True if there was one

AOTAutograd hands over `flex_attention(q, k, v, score_mod, block_mask, ...)` as one node with the score modification as a graph within
the graph. A dense form of it is traced here and takes the node's place, so that what follows streams like any other attention
written by hand, forward and backward. The forms are ours: row values of the forward pass (the maximum, the sum, whether a row is masked
throughout) are found in one pass over the scores, and results take their order of dimensions by a permutation, not by writes into memory of
that order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx as fx
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch._guards import detect_fake_mode
from torch._higher_order_ops.flex_attention import _math_attention_inner, flex_attention, flex_attention_backward
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import _vmap_for_bhqkv
from torch.utils import _pytree as pytree

__all__ = ["dense", "dense_backward", "expand_flex"]

Tensor = torch.Tensor


def dense(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(result, log2 of the sum of exponentials, maximum over log 2) as `flex_attention` the operator has them; masked rows are 0."""
    groups = query.size(1) // key.size(1)
    key, value = (x.expand(query.size(0), *x.shape[1:]).repeat_interleave(groups, 1) for x in (key, value))
    _, scores = _math_attention_inner(query, key, value, *rest)
    top = scores.amax(-1)
    weights = torch.exp(scores - top.unsqueeze(-1))
    total = weights.sum(-1)
    dead = top == -math.inf
    out = torch.where(dead.unsqueeze(-1), 0.0, (weights.to(value.dtype) @ value).to(scores.dtype) / total.unsqueeze(-1)).to(query.dtype)
    lse = torch.where(dead, -math.inf, top + torch.log(total))
    return _in_the_order_of(out, query), lse / math.log(2), top / math.log(2)


def dense_backward(query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, grad_out: Tensor | None, grad_logsumexp: Tensor | None,
                   fw_graph: Callable[..., Any], joint_graph: Callable[..., Any], block_mask: tuple[Any, ...], scale: float,
                   kernel_options: Mapping[str, Any], score_mod_other_buffers: tuple[Any, ...],
                   mask_mod_other_buffers: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor, tuple[Any, ...]]:
    """The gradients of query, key and value, and of what the score modification captures, as `flex_attention_backward` the operator has them.

    logsumexp and its gradient are to the base 2. With P = exp(S' - L) for the modified scores S': dV = P^T dO, dS' = P * (dO V^T - sum(O * dO) + dL),
    and `joint_graph` takes dS' to dS (and to the captured buffers)."""
    batches, groups = key.size(0), query.size(1) // key.size(1)
    wide_key, wide_value = (x.expand(query.size(0), *x.shape[1:]).repeat_interleave(groups, 1) for x in (key, value))
    scores, changed = _math_attention_inner(query, wide_key, wide_value, fw_graph, block_mask, scale, kernel_options,  # type: ignore[arg-type]
                                            score_mod_other_buffers, mask_mod_other_buffers)
    wide = scores.dtype
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    # A row that is masked throughout has -inf here; with +inf its weights are exp(-inf) = 0, and no tile asks for such rows.
    low = torch.where(logsumexp == -math.inf, math.inf, logsumexp * math.log(2)).unsqueeze(-1)
    weights = torch.exp(changed - low)
    rows = (out.to(wide) * grad_out.to(wide)).sum(-1, keepdim=True)
    if grad_logsumexp is not None:
        rows = rows - grad_logsumexp.unsqueeze(-1) / math.log(2)
    grad_changed = weights * (grad_out.to(wide) @ wide_value.to(wide).transpose(-2, -1) - rows)
    at = [torch.arange(n, device=query.device) for n in scores.shape]
    captured = (None,) * len(score_mod_other_buffers)
    joint = _vmap_for_bhqkv(joint_graph, prefix=(0,), suffix=(0, *captured), out_dims=[0, None, None, None, None, *captured])  # type: ignore[arg-type]
    mask = _vmap_for_bhqkv(block_mask[-1], prefix=(), suffix=(None,) * len(mask_mod_other_buffers))
    grad_scores, _, _, _, _, *others = joint(scores, *at, grad_changed, *score_mod_other_buffers)
    grad_scores = torch.where(mask(*at, *mask_mod_other_buffers), (grad_scores * scale).to(query.dtype), 0.0)
    grad_query = grad_scores @ wide_key
    grad_key = grad_scores.transpose(-2, -1) @ query
    grad_value = weights.to(query.dtype).transpose(-2, -1) @ grad_out

    def of_shared(x: Tensor, like: Tensor) -> Tensor:
        """Summed over the heads, and batches, that read one key."""
        x = x.unflatten(1, (-1, groups)).sum(2) if groups > 1 else x
        return _in_the_order_of(x.sum(0, keepdim=True) if batches != x.size(0) else x, like)

    captures = tuple(x.contiguous() if isinstance(x, Tensor) else None for x in others)
    return _in_the_order_of(grad_query, query), of_shared(grad_key, key), of_shared(grad_value, value), captures


def _in_the_order_of(x: Tensor, like: Tensor) -> Tensor:
    """`x` densely in memory, its dimensions from outermost to innermost as those of `like`, the last one innermost."""
    strides = like.stride()
    order = [*sorted(range(x.dim() - 1), key=lambda d: (-strides[d], d)), x.dim() - 1]
    if order == list(range(x.dim())):
        return x.contiguous()
    return x.permute(order).contiguous().permute([order.index(d) for d in range(x.dim())])


_DENSE: dict[Any, Callable[..., Any]] = {flex_attention: dense, flex_attention_backward: dense_backward}


def expand_flex(gm: fx.GraphModule, decompositions: Mapping[Any, Callable[..., Any]]) -> bool:
    """Replaces every attention node of `gm` by its dense form, traced with `decompositions`."""
    found = [n for n in gm.graph.nodes if n.op == "call_function" and n.target in _DENSE]
    for node in found:
        _expand(gm, node, decompositions)
    if found:
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return bool(found)


def _expand(gm: fx.GraphModule, node: fx.Node, decompositions: Mapping[Any, Callable[..., Any]]) -> None:
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    given = [a for a in leaves if isinstance(a, fx.Node) and not _is_graph(gm, a)]
    fixed = [getattr(gm, str(a.target)) if isinstance(a, fx.Node) and _is_graph(gm, a) else a for a in leaves]
    places = [i for i, a in enumerate(leaves) if isinstance(a, fx.Node) and not _is_graph(gm, a)]

    def call(*values: Any) -> Any:
        full = list(fixed)
        for i, v in zip(places, values, strict=True):
            full[i] = v
        args, kwargs = pytree.tree_unflatten(full, spec)
        with TransformGetItemToIndex():
            return _DENSE[node.target](*args, **kwargs)  # type: ignore[index]

    values = [_value(gm, a) for a in given]
    mode = detect_fake_mode(values)
    assert mode is not None
    with mode:
        traced = make_fx(torch.func.functionalize(call), decomposition_table=dict(decompositions))(*values)
    traced.graph.eliminate_dead_code()
    with gm.graph.inserting_before(node):
        inlined = dict(zip(traced.graph.find_nodes(op="placeholder"), given, strict=True))
        results = _inline(gm, traced, inlined, node)
    # what reads the results reads tuples, some of them nested, through getitem
    _forward_results(node, results)


def _is_graph(gm: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "get_attr" and isinstance(getattr(gm, str(node.target), None), fx.GraphModule)


def _value(gm: fx.GraphModule, node: fx.Node) -> Any:
    return node.meta["val"]


def _inline(gm: fx.GraphModule, traced: fx.GraphModule, env: dict[fx.Node, Any], at: fx.Node) -> Any:
    """Copies the traced nodes in front of `at`, at its place in the program; gives what they return."""
    for n in traced.graph.nodes:
        if n.op == "output":
            return fx.node.map_arg(n.args[0], lambda m: env[m])
        if n.op == "placeholder":
            continue
        if n.op == "get_attr":
            name = f"_flex_{at.name}_{n.target}".replace(".", "_")
            gm.register_buffer(name, getattr(traced, str(n.target)), persistent=False)
            env[n] = gm.graph.get_attr(name)
        else:
            env[n] = gm.graph.node_copy(n, lambda m: env[m])
        env[n].meta = {**{k: v for k, v in at.meta.items() if k in ("stack_trace", "nn_module_stack", "source_fn_stack")}, **n.meta}
    raise AssertionError("a graph without an output")


def _forward_results(node: fx.Node, results: Any) -> None:
    for user in list(node.users):
        assert user.target.__name__ == "getitem", user  # type: ignore[union-attr]
        value = results[user.args[1]]
        if isinstance(value, (tuple, list)):
            _forward_results(user, value)
        else:
            user.replace_all_uses_with(value)
        user.graph.erase_node(user)
    if not isinstance(node.target, str) and not node.users and node.target in _DENSE:
        node.graph.erase_node(node)
