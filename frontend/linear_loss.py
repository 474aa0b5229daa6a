"""Cross-entropy of a linear layer in parts, so that its logits never exist whole.

    chunk_losses(gm, limit)                  # in place, on Dynamo's graph, before AOTAutograd: F.cross_entropy(lm_head(h), labels)
    expand_losses(gm, decompositions)        # in place, on forward, backward and inference graphs: the operators below, written out

With a vocabulary of V, logits of N tokens take N * V numbers, most often more than all else in a step. Here some rows at a time are multiplied,
their losses summed, and their gradients taken at once, while the logits are there: both products of the backward pass happen in the forward
pass, for a factor of 1; the backward pass multiplies by the gradient of the loss, which for a mean or a sum is one number (Hsu et al., "Liger
Kernel", 2024). No product is computed twice, and what is kept are gradients of the size of the inputs. Gradients of a weight are summed in float32.
With `reduction="none"` each row has a factor of its own, that is not known before: there logits are computed again, from the saved log-sum-exp of
each row, a fourth product beside three; so that is done only for logits of RECOMPUTED times the limit.

Followed back from the loss to the product: changes of shape that keep rows in order, slices of rows (labels shifted by one), conversions. Left whole:
logits that anything else reads (a model that returns them), weights of classes, probabilities as labels, sizes that are not known.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx

__all__ = ["chunk_losses", "expand_losses", "linear_cross_entropy"]

Tensor = torch.Tensor

MOST_PARTS = 64
RECOMPUTED = 4
ROUND = 128
"""Rows of a part are a multiple of this: whole tiles."""

_library = torch.library.Library("aicc", "FRAGMENT")
_library.define("wide_mm(Tensor a, Tensor b) -> Tensor")
_library.define("linear_loss(Tensor h, Tensor weight, Tensor? bias, Tensor labels, int ignored, float smoothing, bool[] wanted, int limit)"
                " -> (Tensor total, Tensor dh, Tensor dw, Tensor db)")
_library.define("linear_loss_rows(Tensor h, Tensor weight, Tensor? bias, Tensor labels, int ignored, float smoothing, int limit)"
                " -> (Tensor losses, Tensor lse)")
_library.define("linear_loss_rows_backward(Tensor grad, Tensor h, Tensor weight, Tensor? bias, Tensor labels, Tensor lse, int ignored,"
                " float smoothing, bool[] wanted, int limit) -> (Tensor dh, Tensor dw, Tensor db)")


# -- the operators -------------------------------------------------------------------------------------------------------------


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are computed in."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, not rounded to 16 bits."""
    with torch._C._DisableAutocast():
        return a.to(_wide(a.dtype)) @ b.to(_wide(b.dtype))


def _parts(h: Tensor, vocabulary: int, limit: int) -> list[slice]:
    """Rows of each part: as few parts as keep logits below `limit` bytes."""
    rows = h.shape[0]
    count = max(1, min(MOST_PARTS, -(-rows * vocabulary * h.element_size() // max(1, limit))))
    size = -(-rows // count)
    size = -(-size // ROUND) * ROUND if size > ROUND else max(1, size)
    return [slice(a, min(rows, a + size)) for a in range(0, rows, size)]


class _Part:
    """The logits of some rows, and what is known of their labels."""

    def __init__(self, h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignored: int, smoothing: float):
        logits = F.linear(h, weight, bias)
        self.dtype, self.smoothing = logits.dtype, smoothing
        self.logits = logits.to(_wide(logits.dtype))
        self.alive = labels != ignored
        self.labels = torch.where(self.alive, labels, 0)

    def lse(self) -> Tensor:
        """The log-sum-exp of each row."""
        top = self.logits.amax(-1, keepdim=True)
        return (top + (self.logits - top).exp().sum(-1, keepdim=True).log()).squeeze(-1)

    def losses(self, lse: Tensor) -> Tensor:
        """Of each row; 0 where the label is ignored."""
        picked = self.logits.gather(-1, self.labels.unsqueeze(-1)).squeeze(-1)
        if self.smoothing:
            picked = (1 - self.smoothing) * picked + self.smoothing * self.logits.mean(-1)
        return torch.where(self.alive, lse - picked, 0.0)

    def gradient(self, lse: Tensor, factor: Tensor | None = None) -> Tensor:
        """Of the losses' sum (or of the sum of factor times loss) to the logits, in their type."""
        columns = torch.arange(self.logits.shape[-1], device=self.logits.device)
        hit = columns == self.labels.unsqueeze(-1)
        made = (self.logits - lse.unsqueeze(-1)).exp() - torch.where(hit, 1 - self.smoothing, 0.0)
        if self.smoothing:
            made = made - self.smoothing / self.logits.shape[-1]
        made = torch.where(self.alive.unsqueeze(-1), made, 0.0)
        return (made if factor is None else made * factor.unsqueeze(-1)).to(self.dtype)


class _Gradients:
    """Of h, weight and bias, part by part; those that are not wanted are empty."""

    def __init__(self, h: Tensor, weight: Tensor, wanted: Sequence[bool]):
        self.h, self.weight, self.wanted = h, weight, wanted
        self.dh: list[Tensor] = []
        self.dw: Tensor | None = None
        self.db: Tensor | None = None

    def add(self, part: slice, grad: Tensor) -> None:
        if self.wanted[0]:
            self.dh.append(grad @ self.weight)
        if self.wanted[1]:
            made = torch.ops.aicc.wide_mm(grad.t(), self.h[part])
            self.dw = made if self.dw is None else self.dw + made
        if self.wanted[2]:
            summed = grad.sum(0, dtype=_wide(grad.dtype))
            self.db = summed if self.db is None else self.db + summed

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        none = [self.h.new_empty((0,), dtype=t) for t in (self.h.dtype, _wide(self.h.dtype), _wide(self.h.dtype))]
        return (torch.cat(self.dh) if self.wanted[0] else none[0], none[1] if self.dw is None else self.dw, none[2] if self.db is None else self.db)


def _linear_loss(h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignored: int, smoothing: float, wanted: Sequence[bool],
                 limit: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradients = _Gradients(h, weight, wanted)
    total: Tensor | None = None
    with torch._C._DisableAutocast():
        for rows in _parts(h, weight.shape[0], limit):
            part = _Part(h[rows], weight, bias, labels[rows], ignored, smoothing)
            lse = part.lse()
            loss = part.losses(lse).sum()
            total = loss if total is None else total + loss
            gradients.add(rows, part.gradient(lse))
        assert total is not None
        return total, *gradients.results()


def _linear_loss_rows(h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignored: int, smoothing: float,
                      limit: int) -> tuple[Tensor, Tensor]:
    losses, sums = [], []
    with torch._C._DisableAutocast():
        for rows in _parts(h, weight.shape[0], limit):
            part = _Part(h[rows], weight, bias, labels[rows], ignored, smoothing)
            sums.append(part.lse())
            losses.append(part.losses(sums[-1]))
        return torch.cat(losses), torch.cat(sums)


def _linear_loss_rows_backward(grad: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, lse: Tensor, ignored: int,
                               smoothing: float, wanted: Sequence[bool], limit: int) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _Gradients(h, weight, wanted)
    with torch._C._DisableAutocast():
        for rows in _parts(h, weight.shape[0], limit):
            part = _Part(h[rows], weight, bias, labels[rows], ignored, smoothing)
            gradients.add(rows, part.gradient(lse[rows], grad[rows]))
        return gradients.results()


def _fake_gradients(h: Tensor, weight: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(h.dtype)
    return (h.new_empty(h.shape if wanted[0] else (0,)), weight.new_empty(weight.shape if wanted[1] else (0,), dtype=wide),
            weight.new_empty((weight.shape[0],) if wanted[2] else (0,), dtype=wide))


_RUN: dict[str, Callable[..., Any]] = {"wide_mm": _wide_mm, "linear_loss": _linear_loss, "linear_loss_rows": _linear_loss_rows,
                                       "linear_loss_rows_backward": _linear_loss_rows_backward}
_FAKE: dict[str, Callable[..., Any]] = {
    "wide_mm": lambda a, b: a.new_empty((a.shape[0], b.shape[1]), dtype=_wide(a.dtype)),
    "linear_loss": lambda h, weight, bias, labels, ignored, smoothing, wanted, limit: (
        h.new_empty((), dtype=_wide(h.dtype)), *_fake_gradients(h, weight, wanted)),
    "linear_loss_rows": lambda h, weight, bias, labels, ignored, smoothing, limit: tuple(
        h.new_empty(h.shape[:1], dtype=_wide(h.dtype)) for _ in range(2)),
    "linear_loss_rows_backward": lambda grad, h, weight, bias, labels, lse, ignored, smoothing, wanted, limit: _fake_gradients(h, weight, wanted),
}
for _name, _run in _RUN.items():
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"aicc::{_name}", _FAKE[_name], lib=_library)


Dtypes = Sequence[torch.dtype | None]


def _dtypes(*tensors: Tensor | None) -> Dtypes:
    return [None if t is None else t.dtype for t in tensors]


def _as_gradients(made: Sequence[Tensor], dtypes: Dtypes, wanted: Sequence[bool], factor: Tensor | None = None) -> list[Tensor | None]:
    """Times a factor, in the types of what they are gradients of."""
    return [(g if factor is None else g * factor).to(t) if w and t is not None else None for g, t, w in zip(made, dtypes, wanted, strict=True)]


def _keep_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.dtypes, ctx.wanted = _dtypes(*inputs[:3]), inputs[6]


def _sum_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    return (*_as_gradients(ctx.saved_tensors, ctx.dtypes, ctx.wanted, grad), None, None, None, None, None)


def _keep_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, weight, bias, labels, ignored, smoothing, limit = inputs
    ctx.save_for_backward(h, weight, bias, labels, output[1])
    ctx.rest = ignored, smoothing, limit


def _rows_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    h, weight, bias, labels, lse = ctx.saved_tensors
    ignored, smoothing, limit = ctx.rest
    wanted = [bool(w) for w in ctx.needs_input_grad[:3]]
    made = torch.ops.aicc.linear_loss_rows_backward(grad, h, weight, bias, labels, lse, ignored, smoothing, wanted, limit)
    return (*_as_gradients(made, _dtypes(h, weight, bias), wanted), None, None, None, None)


torch.library.register_autograd("aicc::linear_loss", _sum_backward, setup_context=_keep_sum, lib=_library)
torch.library.register_autograd("aicc::linear_loss_rows", _rows_backward, setup_context=_keep_rows, lib=_library)


def linear_cross_entropy(h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, ignored: int = -100, smoothing: float = 0.0,
                         reduction: str = "mean", wide: bool = True, limit: int) -> Tensor:
    """`F.cross_entropy(F.linear(h, weight, bias), labels, ...)` in parts: h `[rows, width]`, weight `[vocabulary, width]`, labels `[rows]`.

    wide: the logits are converted to float32 before the loss, so that it is float32; limit: bytes of logits that may exist at a time."""
    kind = h.device.type
    if torch.is_autocast_enabled(kind):
        h, weight = (t.to(torch.get_autocast_dtype(kind)) for t in (h, weight))
        bias = None if bias is None else bias.to(h.dtype)
        wide = True
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (h, weight, bias)]
    if reduction == "none" or not any(wanted):
        losses, _ = torch.ops.aicc.linear_loss_rows(h, weight, bias, labels, ignored, smoothing, limit)
        total = losses if reduction == "none" else losses.sum()
    else:
        total = torch.ops.aicc.linear_loss(h, weight, bias, labels, ignored, smoothing, wanted, limit)[0]
    if reduction == "mean":
        total = total / (labels != ignored).sum()
    return total if wide else total.to(h.dtype)


# -- finding them --------------------------------------------------------------------------------------------------------------

_SIGNATURE = inspect.signature(F.cross_entropy)
_LINEAR = {F.linear, torch._C._nn.linear}
_PRODUCTS = {operator.matmul, torch.matmul, torch.mm, "matmul", "mm", "__matmul__"}
_TURNS = {"t", "T", "mT", "transpose", "permute"}
_SHAPES = {"view", "reshape", "flatten", torch.flatten, torch.reshape}
_CASTS = {"float", "to", "contiguous", "type", "double"}


@dataclass
class _Found:
    """What a loss is of: `nodes` from the product to the loss's operand, the product excluded."""

    h: fx.Node
    weight: fx.Node
    bias: Any
    turned: bool  # the weight is [width, vocabulary]
    nodes: list[fx.Node] = field(default_factory=list)


def chunk_losses(gm: fx.GraphModule, limit: int) -> int:
    """Computes cross-entropies over linear layers in parts where the logits would take more than `limit` bytes (0: nowhere). How many."""
    count = 0
    for node in list(gm.graph.nodes) if limit > 0 else ():
        if node.op == "call_function" and node.target in (F.cross_entropy, torch._C._nn.cross_entropy_loss):
            count += _rewrite(gm.graph, node, limit)
    if count:
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return count


def _tensor(n: Any) -> Tensor | None:
    value = n.meta.get("example_value") if isinstance(n, fx.Node) else None
    return value if isinstance(value, Tensor) and all(isinstance(s, int) for s in value.shape) else None


def _rewrite(graph: fx.Graph, node: fx.Node, limit: int) -> bool:
    if node.target is not F.cross_entropy and (len(node.args) > 2 or node.kwargs):
        return False  # torch's own: other arguments
    given = _SIGNATURE.bind(*node.args, **node.kwargs)
    given.apply_defaults()
    a = given.arguments
    logits, labels = _tensor(a["input"]), _tensor(a["target"])
    fixed = a["weight"] is None and a["size_average"] is None and a["reduce"] is None and isinstance(a["ignore_index"], int)
    if logits is None or labels is None or labels.is_floating_point() or not fixed or not isinstance(a["label_smoothing"], (int, float)):
        return False
    least = limit * (RECOMPUTED if a["reduction"] == "none" and torch.is_grad_enabled() else 1)
    if not logits.is_floating_point() or logits.dim() < 2 or logits.numel() * logits.element_size() <= least or labels.dim() != logits.dim() - 1:
        return False
    source, wide = a["input"], logits.dtype == torch.float32
    if logits.dim() == 3 and source.target in ("transpose", "mT", torch.transpose) and len(source.users) == 1:
        source = source.args[0]  # classes come second: the product's rows are (batch, position), as labels are
        if (inner := _tensor(source)) is None or inner.shape != (logits.shape[0], logits.shape[2], logits.shape[1]):
            return False
    elif logits.dim() != 2:
        return False
    found = _follow(source)
    if found is None:
        return False
    with graph.inserting_before(node):
        made = _write(graph, found, a, wide, limit)
    made.meta.update({k: v for k, v in node.meta.items() if k != "example_value"})
    node.replace_all_uses_with(made)
    graph.erase_node(node)
    return True


def _follow(n: Any) -> _Found | None:
    """From the loss's operand back to a product; None if something else comes between or reads along."""
    nodes: list[fx.Node] = []
    while isinstance(n, fx.Node) and len(n.users) == 1:
        value = _tensor(n)
        if value is None:
            return None
        product = _product(n)
        if product is not None:
            product.nodes = nodes[::-1]
            return product
        source = _tensor(n.args[0]) if n.args else None
        if source is None or not _keeps_rows(n, source, value):
            return None
        nodes.append(n)
        n = n.args[0]
    return None


def _keeps_rows(n: fx.Node, source: Tensor, value: Tensor) -> bool:
    """A change of shape in front of the last dimension, a slice there, or a conversion to a type that holds the logits'."""
    if source.shape[-1:] != value.shape[-1:] or value.dim() < 2:
        return False
    if n.target in _SHAPES and (n.op == "call_method" or n.op == "call_function"):
        return value.numel() == source.numel()
    if n.op == "call_method" and n.target in _CASTS:
        return value.device == source.device and value.dtype in (source.dtype, torch.float32) and source.dtype != torch.float64
    if n.op == "call_function" and n.target is operator.getitem:
        index = n.args[1] if isinstance(n.args[1], tuple) else (n.args[1],)
        whole = len(index) < source.dim() or index[-1] in (Ellipsis, slice(None)) or index[-1] == slice(None, None, None)
        return whole and all(i is Ellipsis or isinstance(i, (int, slice)) for i in index)
    return False


def _product(n: fx.Node) -> _Found | None:
    if n.op == "call_function" and n.target in _LINEAR:
        a = inspect.signature(lambda input, weight, bias=None: None).bind(*n.args, **n.kwargs).arguments
        h, weight, bias, turned = a["input"], a["weight"], a.get("bias"), False
    elif n.target in _PRODUCTS and n.op in ("call_function", "call_method") and len(n.args) == 2 and not n.kwargs:
        h, weight, bias, turned = n.args[0], n.args[1], None, True
    else:
        return None
    left, right = _tensor(h), _tensor(weight)
    if left is None or right is None or right.dim() != 2 or left.dim() < 2 or not left.is_floating_point():
        return None
    return _Found(h, weight, bias, turned)  # type: ignore[arg-type]


def _write(graph: fx.Graph, found: _Found, a: Mapping[str, Any], wide: bool, limit: int) -> fx.Node:
    """The same changes of shape of h instead of the logits, and the loss of it."""
    first = _tensor(found.h)
    assert first is not None
    width, h = first.shape[-1], found.h
    for n in found.nodes:
        value = _tensor(n)
        assert value is not None
        if n.target is operator.getitem:
            h = graph.call_function(operator.getitem, (h, n.args[1]))
        elif n.target in _SHAPES:
            h = graph.call_method("reshape", (h, *value.shape[:-1], width))
    h = graph.call_method("reshape", (h, -1, width))
    weight = graph.call_method("t", (found.weight,)) if found.turned else found.weight
    labels = graph.call_method("reshape", (a["target"], -1))
    made = graph.call_function(linear_cross_entropy, (h, weight, found.bias, labels), {
        "ignored": a["ignore_index"], "smoothing": float(a["label_smoothing"]), "reduction": a["reduction"], "wide": wide, "limit": limit})
    target = _tensor(a["target"])
    if a["reduction"] == "none" and target is not None and target.dim() > 1:
        made = graph.call_method("reshape", (made, *target.shape))
    return made


# -- writing them out ----------------------------------------------------------------------------------------------------------


def _operators() -> dict[Any, Callable[..., Any]]:
    return {getattr(torch.ops.aicc, name).default: run for name, run in _RUN.items() if name != "wide_mm"}


def expand_losses(gm: fx.GraphModule, decompositions: Mapping[Any, Callable[..., Any]]) -> int:
    """Replaces the operators of this file in `gm` by what they do, traced with `decompositions`. How many there were."""
    known = _operators()
    found = [n for n in gm.graph.nodes if n.op == "call_function" and n.target in known]
    for node in found:
        _expand(gm, node, known[node.target], decompositions)
    if found:
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return len(found)


def _expand(gm: fx.GraphModule, node: fx.Node, run: Callable[..., Any], decompositions: Mapping[Any, Callable[..., Any]]) -> None:
    places = [i for i, x in enumerate(node.args) if isinstance(x, fx.Node)]
    values = [node.args[i].meta["val"] for i in places]  # type: ignore[union-attr]
    mode = detect_fake_mode(values)
    assert mode is not None

    def call(*tensors: Tensor) -> Any:
        args = list(node.args)
        for i, t in zip(places, tensors, strict=True):
            args[i] = t  # type: ignore[call-overload]
        return run(*args)

    with mode, torch.no_grad():
        traced = make_fx(torch.func.functionalize(call), decomposition_table=dict(decompositions))(*values)
    traced.graph.eliminate_dead_code()
    env: dict[fx.Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), [node.args[i] for i in places], strict=True))
    results: Sequence[Any] = ()
    with gm.graph.inserting_before(node):
        for n in traced.graph.nodes:
            if n.op == "output":
                results = fx.node.map_arg(n.args[0], lambda m: env[m])
            elif n.op != "placeholder":
                env[n] = gm.graph.node_copy(n, lambda m: env[m])
                env[n].meta = {**{k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack", "source_fn_stack")}, **n.meta}
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)
