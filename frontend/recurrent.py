"""Recurrent layers written out: one product for the inputs of all steps, then a scan over time.

    expand_recurrent(gm)      # in place, on Dynamo's graph; True if there was one

Dynamo hands over `torch.lstm`, `torch.gru`, `torch.rnn_tanh` and `torch.rnn_relu` as one call each (with `torch._dynamo.config.allow_rnn`);
torch itself would unroll them over time, or call a library. Here each layer and direction becomes

    gates of the input = linear(x, w_ih, b)             [T, N, G * H], one product
    scan(step, (h0, ...), (gates,), (w_hh.t(), ...))    a step is one product [N, H] x [H, G * H] and what follows it

before autograd sees it, so that the backward pass is a scan too. Packed sequences, autocast, 16-bit floats and other devices are left alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.nn import functional as F

__all__ = ["expand_recurrent"]

_KEPT = ("stack_trace", "nn_module_stack", "source_fn_stack")


# -- one step; everything that depends on the input alone is in `x` already ------------------------------------------------------

def _lstm(h: Any, c: Any, x: Any, w: Any) -> Any:
    gates = x + torch.mm(h, w)
    parts = torch.chunk(gates, 4, -1)
    c = torch.sigmoid(parts[1]) * c + torch.sigmoid(parts[0]) * torch.tanh(parts[2])
    h = torch.sigmoid(parts[3]) * torch.tanh(c)
    return h, c, h.clone()


def _lstm_projected(h: Any, c: Any, x: Any, w: Any, p: Any) -> Any:
    wide, c, _ = _lstm(h, c, x, w)
    h = torch.mm(wide, p)
    return h, c, h.clone()


def _gru_joined(h: Any, x: Any, hidden: Any) -> Any:
    a, b = torch.chunk(x, 3, -1), torch.chunk(hidden, 3, -1)
    reset, update = torch.sigmoid(a[0] + b[0]), torch.sigmoid(a[1] + b[1])
    new = torch.tanh(a[2] + reset * b[2])
    h = (h - new) * update + new
    return h, h.clone()


def _gru(h: Any, x: Any, w: Any) -> Any:
    return _gru_joined(h, x, torch.mm(h, w))


def _gru_biased(h: Any, x: Any, w: Any, b: Any) -> Any:
    return _gru_joined(h, x, torch.addmm(b, h, w))


def _tanh(h: Any, x: Any, w: Any) -> Any:
    h = torch.tanh(x + torch.mm(h, w))
    return h, h.clone()


def _relu(h: Any, x: Any, w: Any) -> Any:
    h = torch.relu(x + torch.mm(h, w))
    return h, h.clone()


_KINDS: dict[Any, str] = {torch.lstm: "lstm", torch.gru: "gru", torch.rnn_tanh: "tanh", torch.rnn_relu: "relu"}
_STEPS: dict[tuple[str, bool], Callable[..., Any]] = {
    ("lstm", False): _lstm, ("lstm", True): _lstm_projected, ("gru", False): _gru, ("gru", True): _gru_biased, ("tanh", False): _tanh,
    ("relu", False): _relu,
}
"""By kind and whether the step has one more parameter: an LSTM's projection, a GRU's bias (part of which is scaled by a gate)."""


def expand_recurrent(gm: fx.GraphModule) -> bool:
    """Replaces the recurrent layers of Dynamo's graph `gm` that run on the CPU in float32 or float64."""
    if torch.is_autocast_enabled("cpu") or any(n.target is torch.amp.autocast_mode._enter_autocast for n in gm.graph.nodes):
        return False
    found = [n for n in gm.graph.nodes if n.op == "call_function" and n.target in _KINDS and _is_dense(n)]
    for node in found:
        with gm.graph.inserting_before(node):
            results = _Layers(gm, node).build()
        _replace(node, results)
    if found:
        gm.graph.lint()
        gm.recompile()
    return bool(found)


def _is_dense(node: fx.Node) -> bool:
    """(input, hidden, parameters, ...) on the CPU, not (data, batch sizes, ...)."""
    if len(node.args) != 9 or not isinstance(node.args[3], bool) or not isinstance(node.args[0], fx.Node):
        return False
    x = node.args[0].meta.get("example_value")
    if not isinstance(x, torch.Tensor) or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or x.dim() != 3:
        return False
    steps = x.shape[1 if node.args[8] else 0]
    return not isinstance(steps, int) or steps > 0


class _Layers:
    """All layers and directions of one call, as nodes in front of it."""

    def __init__(self, gm: fx.GraphModule, node: fx.Node):
        self.gm, self.node, self.kind = gm, node, _KINDS[node.target]

    def call(self, f: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = self.gm.graph.call_function(f, args, kwargs)
        made.meta.update({k: v for k, v in self.node.meta.items() if k in _KEPT})
        return made

    def build(self) -> tuple[fx.Node, ...]:
        """(output, last h) or (output, last h, last c)."""
        x, hidden, parameters, biased, layers, dropout, train, bidirectional, batch_first = self.node.args
        states: Sequence[Any] = hidden if self.kind == "lstm" else (hidden,)  # type: ignore[assignment]
        if batch_first:
            x = self.call(torch.transpose, x, 0, 1)
        ways = 2 if bidirectional else 1
        per = len(parameters) // (layers * ways)  # type: ignore[arg-type,operator]
        last: list[list[Any]] = [[] for _ in states]
        for layer in range(layers):  # type: ignore[arg-type]
            outputs = []
            for way in range(ways):
                k = layer * ways + way
                start = [self.call(torch.select, s, 0, k) for s in states]
                weights: Any = parameters[k * per:(k + 1) * per]  # type: ignore[index]
                y, end = self.layer(x, start, weights, bool(biased), reverse=way == 1)
                outputs.append(y)
                for found, e in zip(last, end, strict=True):
                    found.append(e)
            x = outputs[0] if ways == 1 else self.call(torch.cat, outputs, -1)
            if dropout and train and layer + 1 < layers:  # type: ignore[operator]
                x = self.call(torch.dropout, x, dropout, True)
        if batch_first:
            x = self.call(torch.transpose, x, 0, 1)
        return (x, *(self.call(torch.stack, found) for found in last))  # type: ignore[return-value,arg-type]

    def layer(self, x: Any, start: list[fx.Node], weights: Sequence[Any], biased: bool, *, reverse: bool) -> tuple[fx.Node, list[fx.Node]]:
        """x [T, N, I]; the outputs [T, N, H] and the states after the last step."""
        w_ih, w_hh, *rest = weights
        extra: list[Any] = [self.call(torch.t, w_hh)]  # turned outside: scan's gradient saves what a step makes once per step
        bias = None
        if biased:
            bias, hidden_bias, *rest = rest
            if self.kind == "gru":
                extra.append(hidden_bias)
            else:
                bias = self.call(operator.add, bias, hidden_bias)
        extra += [self.call(torch.t, w) for w in rest]  # the projection of an LSTM
        if reverse:
            x = self.call(torch.flip, x, (0,))
        gates = self.call(F.linear, x, w_ih, bias)
        body = self.gm.graph.get_attr(self.body(_STEPS[self.kind, len(extra) > 1]))
        made = self.call(torch.ops.higher_order.scan, body, tuple(start), (gates,), tuple(extra))
        *end, y = (self.call(operator.getitem, made, i) for i in range(len(start) + 1))
        return (self.call(torch.flip, y, (0,)) if reverse else y), end

    def body(self, step: Callable[..., Any]) -> str:
        """The name of the submodule that holds a step."""
        name = f"recurrent{step.__name__}"
        if not hasattr(self.gm, name):
            self.gm.add_submodule(name, fx.symbolic_trace(step))
        return name


def _replace(node: fx.Node, results: tuple[fx.Node, ...]) -> None:
    for user in list(node.users):
        if user.target is operator.getitem and isinstance(user.args[1], int):
            user.replace_all_uses_with(results[user.args[1]])
            user.graph.erase_node(user)
    if node.users:
        with node.graph.inserting_before(node):
            whole = node.graph.call_function(_as_tuple, results)
        node.replace_all_uses_with(whole)
    node.graph.erase_node(node)


def _as_tuple(*values: Any) -> tuple[Any, ...]:
    return values
