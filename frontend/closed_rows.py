"""The gradient of a softmax's row sums to 0, also after rounding.

    close_rows(graph, weights, rows, call)      # in place; whether it was

dS_ij = P_ij (dP_ij - D_i), where D = rows is summed over columns of the result (`recompute.py`) and dP over the same columns in another order:
dP_ij - D_i is off by their roundings, e_i, the same for the whole row. Where one weight of the row is nearly 1, dP_ij - D_i is 0 but for that.
Eager's D is the sum of its own P_ij dP_ij, so that this cancels. The sum of the row tells e_i, as weights sum to 1, and the products of dS are
linear in it:

    r_i = sum_j dS_ij          dQ = L(dS) K - r L(P) K          dK = L(dS')^T Q   with   dS'_ij = P_ij (dP_ij - (D_i + r_i))

L is what the backward pass multiplies dS by (scales, derivatives of a soft cap, masks, a rounding). The stream of dQ finds r beside its product, and
multiplies P by K too (four products instead of three); that of dK and dV reads D + r.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

__all__ = ["close_rows"]

aten = torch.ops.aten
_PRODUCTS = (aten.bmm.default, aten.mm.default)
_RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default)
_CASTS = (aten._to_copy.default, torch.ops.prims.convert_element_type.default)
_Call = Callable[[Any, tuple[Any, ...]], fx.Node]
_Path = tuple[tuple[fx.Node, int], ...]
"""Nodes, and which operand of each is the one before."""


def close_rows(graph: fx.Graph, weights: fx.Node, rows: fx.Node, call: _Call) -> bool:
    """`weights`: P as the backward pass has it; `rows`: D, with a last dimension of 1; `call(target, args)` makes a node. Nothing changes where the
    gradient is not of this form, or what multiplies it on the way to dQ is not known to be linear."""
    gradient = _gradient(weights, rows)
    if gradient is None:
        return False
    paths = _paths(gradient)
    if not paths:
        return False
    users = list(gradient.users)
    with graph.inserting_after(gradient):
        rest = _finite_sum(gradient, call)
    with graph.inserting_after(rest):
        closed = call(aten.add.Tensor, (rows, rest))
    with graph.inserting_after(closed):
        share = call(aten.mul.Tensor, (weights, closed))
    with graph.inserting_after(share):
        again = call(aten.sub.Tensor, (gradient.args[0], share))
    for product, path in paths.items():
        with graph.inserting_before(product):
            left, right = (call(product.target, (_along(path, x, call), product.args[1])) for x in (gradient, weights))
            made = call(aten.sub.Tensor, (left, call(aten.mul.Tensor, (right, _rows_along(path, rest, call)))))
            made = _cast(made, product.meta["val"].dtype, call)
        product.replace_all_uses_with(made)
        graph.erase_node(product)
    for user in users:
        user.replace_input_with(gradient, again)
    return True


def _finite_sum(gradient: fx.Node, call: _Call) -> fx.Node:
    """The sum of each row, 0 where it is none: rows that are masked throughout have weights of NaN, which a choice behind them makes 0."""
    graph = gradient.graph
    total = call(aten.sum.dim_IntList, (gradient, [-1], True))
    with graph.inserting_after(total):
        size = call(aten.abs.default, (total,))
    with graph.inserting_after(size):
        finite = call(aten.lt.Scalar, (size, math.inf))
    with graph.inserting_after(finite):
        zero = call(aten.zeros_like.default, (total,))
    with graph.inserting_after(zero):
        return call(aten.where.self, (finite, total, zero))


def _gradient(weights: fx.Node, rows: fx.Node) -> fx.Node | None:
    """x - P * rows, the only thing that is made of `rows`."""
    share, *others = rows.users
    if others or share.target is not aten.mul.Tensor or set(share.all_input_nodes) != {weights, rows} or len(share.users) != 1:
        return None
    gradient, = share.users
    fits = gradient.target is aten.sub.Tensor and gradient.args[1] is share and isinstance(gradient.args[0], fx.Node) and not gradient.kwargs
    return gradient if fits and gradient.meta["val"].shape == weights.meta["val"].shape else None


def _paths(gradient: fx.Node) -> dict[fx.Node, _Path]:
    """The products that sum over the last dimension of what is linear in `gradient`, and the way to each."""
    found: dict[fx.Node, _Path] = {}
    stack: list[_Path] = [()]
    while stack:
        path = stack.pop()
        x = path[-1][0] if path else gradient
        for user in x.users:
            places = [i for i, a in enumerate(user.args) if a is x]
            if len(places) != 1 or user.kwargs and user.target not in _CASTS:
                continue
            if user.target in _PRODUCTS and places == [0]:
                found[user] = path
            elif _is_linear(user, places[0]) and _extent(user) == _extent(x):
                stack.append((*path, (user, places[0])))
    return found


def _is_linear(n: fx.Node, place: int) -> bool:
    """Whether `n` is linear in its operand of this number, row by row."""
    match n.target:
        case aten.mul.Tensor:
            return True
        case aten.where.self | aten.where.ScalarOther | aten.where.ScalarSelf:
            return place > 0 and _is_zero(n.args[3 - place])
        case aten.masked_fill.Scalar | aten.masked_fill.Tensor:
            return place == 0 and _is_zero(n.args[2])
        case _:
            return place == 0 and n.target in (*_RESHAPES, *_CASTS, aten.clone.default, aten.alias.default, aten.neg.default, aten.div.Tensor)


def _extent(n: fx.Node) -> tuple[str, str]:
    """Number of elements and last size, as text: comparing symbolic sizes themselves would guard on the answer."""
    val = n.meta["val"]
    return str(val.numel()), str(val.shape[-1])


def _is_zero(x: Any) -> bool:
    if isinstance(x, fx.Node):
        return x.target in (aten.scalar_tensor.default, aten.full.default) and _is_zero(x.args[-1])
    return bool(x == 0)


def _along(path: _Path, x: fx.Node, call: _Call) -> fx.Node:
    """What the path makes of x in place of the gradient."""
    for n, place in path:
        if n.target in _CASTS:
            x = _cast(x, n.meta["val"].dtype, call)
        else:
            x = call(n.target, (*n.args[:place], x, *n.args[place + 1:]))
    return x


def _cast(x: fx.Node, dtype: torch.dtype, call: _Call) -> fx.Node:
    return x if x.meta["val"].dtype == dtype else call(torch.ops.prims.convert_element_type.default, (x, dtype))


def _rows_along(path: _Path, rows: fx.Node, call: _Call) -> fx.Node:
    """One value for each row, as the path shapes them."""
    for n, _ in path:
        if n.target in _RESHAPES:
            sizes: Any = n.args[1]
            rows = call(n.target, (rows, [*sizes[:-1], 1]))
    return rows
