"""What the backward pass of attention computes again instead of having it saved: everything between its two products.

    recompute_attention(joint, num_fwd_outputs)      # in place, before the joint graph is partitioned; how many were found

Found by shape of the computation, not by name: scores (a product), pointwise ops and masks, a softmax, pointwise ops (a cast, dropout), and
a product. With L = log-sum-exp of the scores S, saved, and O the second product, saved, the rest follows from the inputs (FlashAttention-2,
Dao 2023, section 3.1.2; here for any pointwise change of the scores, masks and dropout):

    P = exp(S - L)                          backward has copies of its own of S and of all that leads from it to P
    sum_j P_ij dP_ij = sum_c dO_ic O_ic     the sum over the middle space becomes one over rows: O = P V and dP = dO V^T

The second line is the exchange of two sums, and holds whatever factors P has taken up before its product with V, if dP has the same.
L of scores in the hundreds has an ulp of 3e-5, which the exponential makes a relative error of P, the same for its whole row. So where scores come
from products of 32 bits or more, the maximum m and 1 / l, with l = sum_j exp(S_ij - m_i), are saved in place of L = m + log(l):
P = exp(S - m) / l, whose difference is exact where P is large. The rows of dS are closed as well (`closed_rows.py`). Scores that are rounded to 16
bits are off by more than that themselves, and torch's kernels for four dimensions of 16 bits round as we do without closing.
Nothing changes where the forward pass returns a value of the middle space, or the backward pass needs one as a gradient (a bias that is
trained): it would be stored all the same. Rows that are masked throughout have a softmax of NaN, and NaN gradients, as in eager.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch._guards import detect_fake_mode

from .closed_rows import close_rows

__all__ = ["META", "ancestors", "is_pointwise", "permute_transposes", "recompute_attention"]

aten = torch.ops.aten
_PRODUCTS = {aten.bmm.default, aten.mm.default}
_RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
_VIEWS = {*_RESHAPES, aten.expand.default, aten.transpose.int, aten.permute.default, aten.t.default, aten.unsqueeze.default, aten.squeeze.dim,
          aten.squeeze.dims, aten.slice.Tensor, aten.select.int, aten.alias.default, aten.detach.default, aten.clone.default}
_SAME = {aten.alias.default, aten.detach.default, aten.clone.default, aten._to_copy.default, torch.ops.prims.convert_element_type.default}
"""Ops whose result is their operand, but for a rounding."""
_CHEAP = {*_SAME, aten.tril.default, aten.triu.default, aten.index.Tensor, aten.embedding.default, aten.full.default, aten.full_like.default,
          aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar, aten.masked_fill.Scalar, aten.masked_fill.Tensor,
          aten.zeros_like.default, aten.ones_like.default, torch.ops.aten.rsub.Scalar, torch.ops.aten.native_dropout.default}
"""Ops besides views and pointwise ones that may be computed again."""
_NARROW = (torch.bfloat16, torch.float16)
META = ("stack_trace", "nn_module_stack", "source_fn_stack", "original_aten", "seq_nr", "from_node")


def recompute_attention(joint: fx.GraphModule, num_fwd_outputs: int) -> int:
    """See the module docstring. `joint`: the graph whose first `num_fwd_outputs` outputs are the forward pass's."""
    found = 0
    for node in list(joint.graph.nodes):
        if node.op == "call_function" and node.target is aten._softmax.default and _dim(node) == node.meta["val"].dim() - 1 >= 1:
            middle = _Middle(joint.graph, node, num_fwd_outputs)
            if middle.streams():
                middle.rewrite()
                found += 1
    if found:
        joint.graph.eliminate_dead_code()
        joint.recompile()
    return found


def permute_transposes(graph: fx.Graph) -> None:
    """Spells transposes as permutations: the partitioner knows these for views, which are not saved but made anew."""
    for n in graph.nodes:
        if n.target in (aten.transpose.int, aten.t.default):
            rank = n.meta["val"].dim()
            order = list(range(rank))
            a, b = (d % max(rank, 1) for d in n.args[1:]) if n.target is aten.transpose.int else (0, rank - 1)
            if rank > 1:
                order[a], order[b] = order[b], order[a]
            n.target, n.args = aten.permute.default, (n.args[0], order)


def _dim(softmax: fx.Node) -> int:
    rank, dim = softmax.meta["val"].dim(), softmax.args[1]
    return dim % rank if rank else 0  # type: ignore[operator, no-any-return]


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and all that they are made from."""
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        n = stack.pop()
        if n not in seen:
            seen.add(n)
            stack.extend(n.all_input_nodes)
    return seen


def is_pointwise(n: fx.Node) -> bool:
    """An op that computes each element from those at its place, or one that is as cheap to repeat."""
    return isinstance(n.target, torch._ops.OpOverload) and (n.target in _CHEAP or torch.Tag.pointwise in n.target.tags
                                                            or str(n.target).startswith("aicc.random_") and "seed" not in str(n.target))


class _Middle:
    """The middle space around one softmax: the nodes that make it (`before`), the softmax, and what follows up to the products (`after`)."""

    def __init__(self, graph: fx.Graph, softmax: fx.Node, num_fwd_outputs: int):
        self.graph, self.softmax = graph, softmax
        outputs, = graph.output_node().args
        self.outputs = set(graph.output_node().all_input_nodes)
        self.forward = ancestors(n for n in outputs[:num_fwd_outputs] if isinstance(n, fx.Node))  # type: ignore[index, union-attr]
        shape = softmax.meta["val"].shape
        self.sizes = Counter(map(str, shape[-2:]))
        self.before: list[fx.Node] = []
        self.after: list[fx.Node] = []
        self.seconds: list[fx.Node] = []
        self.copies: dict[fx.Node, fx.Node] = {}

    def spans(self, n: fx.Node) -> bool:
        """Whether the value has both the rows' and the columns' dimension. (Products of heads and rows count as rows.)"""
        val = n.meta.get("val")
        return isinstance(val, torch.Tensor) and not self.sizes - Counter(map(str, val.shape))

    # -- is it attention, and would nothing of it be stored? -------------------------------------------------------------------

    def streams(self) -> bool:
        if self.softmax not in self.forward or not self._collect_before() or not self._collect_after():
            return False
        inner = {*self.before, self.softmax, *self.after}
        if inner & self.outputs or any(u in self.forward and u not in inner and u not in self.seconds for n in inner for u in n.users):
            return False
        return self._backward_streams(inner)

    def _collect_before(self) -> bool:
        seen: set[fx.Node] = set()
        stack = [self.softmax.args[0]]
        products = 0
        while stack:
            n = stack.pop()
            if not isinstance(n, fx.Node) or n in seen or n.op != "call_function" or not self._is_middle(n):
                continue
            seen.add(n)
            if n.target in _PRODUCTS:
                products += 1
                seen |= self._widenings(n)
            elif is_pointwise(n) or n.target in _VIEWS:
                stack.extend(n.all_input_nodes)
            else:
                seen.discard(n)  # it is saved
        self.before = [n for n in self.graph.nodes if n in seen]
        return products > 0

    def _widenings(self, product: fx.Node) -> set[fx.Node]:
        """Casts from 16 bits and views between them and the product that nothing else in the forward pass reads: if the passes shared them, torch's
        partitioner would save them, or the scores."""
        found: set[fx.Node] = set()
        for a in product.all_input_nodes:
            path = [a]
            while path[-1].target in _VIEWS:
                path.append(path[-1].all_input_nodes[0])
            makers = path[-1].all_input_nodes if path[-1].target in _SAME else []
            readers = {u for n in path for u in n.users if u in self.forward}
            if makers and makers[0].meta["val"].dtype in _NARROW and readers <= {*path, product}:
                found.update(path)
        return found

    def _is_middle(self, n: fx.Node) -> bool:
        val = n.meta.get("val")
        return self.spans(n) or (isinstance(val, torch.Tensor) and _numel(n) == _numel(self.softmax) and _last(n) == _last(self.softmax))

    def _collect_after(self) -> bool:
        stack = [u for u in self.softmax.users if u in self.forward]
        after: set[fx.Node] = set()
        while stack:
            n = stack.pop()
            if n in after or n in self.seconds:
                continue
            if n.target in _PRODUCTS:
                self.seconds.append(n)
            elif n.op == "call_function" and self._is_middle(n) and (is_pointwise(n) or n.target in _VIEWS):
                after.add(n)
                stack.extend(u for u in n.users if u in self.forward)
                stack.extend(self._makers(n, after))
            else:
                return False
        self.after = [n for n in self.graph.nodes if n in after]
        return bool(self.seconds)

    def _makers(self, n: fx.Node, after: set[fx.Node]) -> list[fx.Node]:
        """Operands of the middle space that are no part of it yet: masks of dropout."""
        found: list[fx.Node] = []
        stack = [a for a in n.all_input_nodes if a is not self.softmax and a not in self.before]
        while stack:
            a = stack.pop()
            if a not in after and a not in found and a.op == "call_function" and self._is_middle(a) and (is_pointwise(a) or a.target in _VIEWS):
                found.append(a)
                stack.extend(a.all_input_nodes)
        return found

    def _backward_streams(self, inner: set[fx.Node]) -> bool:
        """Values of the middle space in the backward pass are read by pointwise ops, the sum of the softmax, and products."""
        stack = [u for n in inner for u in n.users if u not in self.forward]
        seen: set[fx.Node] = set()
        while stack:
            n = stack.pop()
            if n in seen or n.target in _PRODUCTS and not self._is_middle(n):
                continue
            seen.add(n)
            if n in self.outputs or n.op == "output":
                return False
            if n.target is aten.sum.dim_IntList:
                continue  # the softmax's, or rows of a gradient
            if not self._is_middle(n) or not (is_pointwise(n) or n.target in _VIEWS or n.target in _PRODUCTS):
                return False
            stack.extend(n.users)
        return True

    # -- the change ------------------------------------------------------------------------------------------------------------

    def rewrite(self) -> None:
        sums = self._exchange_sums()
        made = self._write_softmax()
        inner = {*self.before, self.softmax, *self.after}
        for n in [*self.before, self.softmax, *self.after]:
            for user in [u for u in n.users if u not in self.forward and u not in made.values() and u not in self.copies.values()]:
                user.replace_input_with(n, self._copy(n, inner, made))
        weights = self.copies.get(self.softmax)
        self.softmax.replace_all_uses_with(made["p"])
        self.graph.erase_node(self.softmax)
        if weights is not None and "over" in made:
            for rows in sums:
                close_rows(self.graph, weights, rows, self._call)

    def _write_softmax(self) -> dict[str, fx.Node]:
        """The softmax `p` with its parts: of its rows, the maximum `m` and `over` = 1 / sum, or with scores of 16 bits the log-sum-exp `lse`."""
        x, val = self.softmax.args[0], self.softmax.meta["val"]
        assert isinstance(x, fx.Node)
        with self.graph.inserting_before(self.softmax):
            wide = self._wide(x)
            m = self._call(aten.amax.default, (wide, [-1]))
            e = self._call(aten.exp.default, (self._call(aten.sub.Tensor, (wide, self._call(aten.unsqueeze.default, (m, -1)))),))
            total = self._call(aten.sum.dim_IntList, (e, [-1]))
            p = self._call(aten.div.Tensor, (e, self._call(aten.unsqueeze.default, (total, -1))))
            if val.dtype != p.meta["val"].dtype:
                p = self._call(torch.ops.prims.convert_element_type.default, (p, val.dtype))
            if self._is_rough():
                rows = {"lse": self._call(aten.add.Tensor, (m, self._call(aten.log.default, (total,))))}
            else:
                rows = {"m": m, "over": self._call(aten.reciprocal.default, (total,))}
        return {"p": p, **{f"_{i}": n for i, n in enumerate(_between(wide, [*rows.values()][-1]))}, **rows}

    def _is_rough(self) -> bool:
        """Whether scores are rounded to 16 bits, or the result, as by torch's own kernels (they take four dimensions; with others it computes in
        float32)."""
        products = self.seconds if self.softmax.meta["val"].dim() == 4 else [n for n in self.before if n.target in _PRODUCTS]
        return any(n.meta["val"].dtype in _NARROW for n in products)

    def _wide(self, x: Any) -> fx.Node:
        """Softmax computes in float32 at least."""
        narrow = x.meta["val"].dtype in _NARROW
        return self._call(torch.ops.prims.convert_element_type.default, (x, torch.float32)) if narrow else x  # type: ignore[no-any-return]

    def _copy(self, n: fx.Node, inner: set[fx.Node], rows: Mapping[str, fx.Node]) -> fx.Node:
        """The backward pass's own copy of a node of the middle space."""
        if n not in self.copies:
            if n is self.softmax:
                x = self._copy(n.args[0], inner, rows) if n.args[0] in inner else n.args[0]  # type: ignore[arg-type]
                assert isinstance(x, fx.Node)
                with self.graph.inserting_before(n):
                    low = rows["lse" if "lse" in rows else "m"]
                    gap = self._call(aten.sub.Tensor, (self._wide(x), self._call(aten.unsqueeze.default, (low, -1))))
                    p = self._call(aten.exp.default, (gap,))
                    if "over" in rows:
                        p = self._call(aten.mul.Tensor, (p, self._call(aten.unsqueeze.default, (rows["over"], -1))))
                    if p.meta["val"].dtype != n.meta["val"].dtype:
                        p = self._call(torch.ops.prims.convert_element_type.default, (p, n.meta["val"].dtype))
                self.copies[n] = p
            else:
                for a in n.all_input_nodes:
                    if a in inner:
                        self._copy(a, inner, rows)
                with self.graph.inserting_after(n):
                    copy = self.graph.node_copy(n, lambda a: self.copies.get(a, a))
                copy.meta = {k: v for k, v in n.meta.items() if k in ("val", "tensor_meta", *META)}
                self.copies[n] = copy
        return self.copies[n]

    def _exchange_sums(self) -> list[fx.Node]:
        """sum_j W_ij dW_ij -> sum_c dO_ic O_ic, where dW = dO V^T and O = W V is computed in the forward pass. The sums over rows."""
        found = []
        for node in list(self.graph.nodes):
            if node.target is not aten.sum.dim_IntList or node in self.forward or len(node.args) < 3 or not node.args[2]:
                continue
            summed = node.args[0]
            dims = [d % summed.meta["val"].dim() for d in node.args[1]]
            if dims != [summed.meta["val"].dim() - 1] or not self._is_middle(summed):
                continue
            made = self._over_rows(node, summed)
            if made is not None:
                node.replace_all_uses_with(made)
                self.graph.erase_node(node)
                found.append(made)
        return found

    def _over_rows(self, node: fx.Node, summed: fx.Node) -> fx.Node | None:
        factors = _factors(summed)
        for second in self.seconds:
            weights = Counter(f for f, _ in _factors(second.args[0]))
            for i, (f, path) in enumerate(factors):
                rest = Counter(g for j, (g, _) in enumerate(factors) if j != i)
                if isinstance(f, fx.Node) and f.target is second.target and rest == weights and _is_transposed(f.args[1], second.args[1]):
                    with self.graph.inserting_before(node):
                        wide = [self._wide(x) for x in (f.args[0], second)]
                        rows = self._call(aten.sum.dim_IntList, (self._call(aten.mul.Tensor, tuple(wide)), [-1], True))
                        for sizes in path:
                            rows = self._call(aten.view.default, (rows, [*sizes[:-1], 1]))
                        dtype = node.meta["val"].dtype
                        return rows if rows.meta["val"].dtype == dtype else self._call(torch.ops.prims.convert_element_type.default, (rows, dtype))
        return None

    def _call(self, target: Any, args: tuple[Any, ...]) -> fx.Node:
        node = self.graph.call_function(target, args)
        values = fx.node.map_arg(args, lambda a: a.meta["val"])
        mode = detect_fake_mode([v for v in values if isinstance(v, torch.Tensor)])
        assert mode is not None
        with mode:
            node.meta["val"] = target(*values)
        node.meta |= {k: v for k, v in self.softmax.meta.items() if k in META}
        return node


def _between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """The nodes from one to the other, in the order of the graph."""
    found, n = [first], first
    while n is not last:
        n = n.next
        found.append(n)
    return found


def _factors(node: Any) -> list[tuple[Any, list[Sequence[Any]]]]:
    """What is multiplied to give `node`, with the sizes through which each factor is reshaped on the way; roundings do not count. A choice
    of 0 is a factor as well: its condition."""
    if not isinstance(node, fx.Node):
        return [(node, [])]
    if node.target is aten.mul.Tensor and all(not isinstance(a, fx.Node) or _numel(a) == _numel(node) for a in node.args):
        return [f for a in node.args for f in _factors(a)]
    if node.target in _SAME or (node.target is aten.expand.default and _numel(node.args[0]) == _numel(node)):
        return _factors(node.args[0])
    if node.target is aten.where.self and _is_zero(node.args[2]):
        return [(node.args[0], []), *_factors(node.args[1])]
    if node.target in _RESHAPES and _last(node.args[0]) == _last(node):
        sizes: Any = node.args[1]
        return [(f, [*path, sizes]) for f, path in _factors(node.args[0])]
    return [(node, [])]


def _is_zero(n: Any) -> bool:
    return bool(n.target in (aten.scalar_tensor.default, aten.full.default) and n.args[0 if n.target is aten.scalar_tensor.default else 1] == 0)


def _numel(n: Any) -> str:
    """As text: comparing symbolic sizes themselves would guard on the answer."""
    return str(n.meta["val"].numel())


def _last(n: Any) -> str:
    shape = n.meta["val"].shape
    return str(shape[-1]) if shape else ""


def _is_transposed(a: Any, b: Any) -> bool:
    """Whether a is the matrix or matrices b, transposed."""
    if a.target in (aten.transpose.int, aten.permute.default, aten.t.default) and a.args[0] is b:
        rank = b.meta["val"].dim()
        if a.target is aten.t.default:
            return True
        if a.target is aten.transpose.int:
            return {d % rank for d in a.args[1:]} == {rank - 1, rank - 2}
        return [d % rank for d in a.args[1]] == [*range(rank - 2), rank - 1, rank - 2]
    return False
