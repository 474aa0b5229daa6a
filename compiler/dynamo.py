"""The Dynamo backend: `torch.compile(model, backend="aicc")`, found through the entry point `torch_dynamo_backends`.

AOTAutograd makes functional forward and backward graphs, torch's min-cut partitioner decides what is saved between them, and each graph
goes through `driver.compile_fx`. A graph that fails to compile runs through ATen with one warning that names a repro file
(`AICC_STRICT=1` raises): a fault in the compiler never loses the user's program.

AOTAutograd is called directly: torch's wrapper for backends (`torch._dynamo.backends.common`) would import a good part of Inductor.
"""

from __future__ import annotations

import copy
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch._dynamo import disable
from torch._dynamo.utils import flatten_graph_inputs
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.graph_capture_wrappers import handle_effect_tokens_fn
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext

from ..frontend.attention import write_out_attention
from ..frontend.bags import write_out_bags
from ..frontend.common_subexpressions import merge_common_subexpressions
from ..frontend.decompositions import decomposition_table
from ..frontend.flex import expand_flex
from ..frontend.linear_loss import chunk_losses, expand_losses
from ..frontend.mended_losses import mend_losses
from ..frontend.random import random_decompositions, share_seeds
from ..frontend.recompute import permute_transposes, recompute_attention
from ..frontend.recompute_activations import recompute_activations
from ..frontend.recurrent import expand_recurrent
from ..frontend.scan import mend_gradients, unstack_invariants
from ..frontend.window_places import share_window_places
from ..runtime.executor import CompiledGraph
from .activations import within_budget
from .collector import collector_off
from .control_flow import compile_pieces
from .distributed.planned import compile_planned
from .driver import Observer, compile_fx
from .forward_mode import entered, guard_level, keep_tangents
from .gpu import cuda_target, workers_for
from .options import Options
from .passthrough import without_wrapper

__all__ = ["aicc", "aot_backend", "arg_kinds", "backend", "first_saved", "partition", "written_arguments"]

Graph = torch.fx.GraphModule


def aicc(gm: Graph, example_inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None) -> Callable:
    """The backend function that Dynamo calls with each captured graph."""
    chosen = Options.from_user(mode, options)
    return compile_planned(gm, example_inputs, chosen) if chosen.plan else backend(chosen)(gm, example_inputs)


def backend(options: Options, observe: Observer | None = None) -> Callable:
    """A Dynamo backend with fixed options; `observe` sees every module after every pass (for dump-ir)."""
    def compiler(role: str) -> Callable:
        chosen = options if role == "inference" else options.for_gradients()
        return lambda gm, _: _guarded(gm, chosen, role, _decompositions(options.fallback_random), observe)

    return aot_backend(compiler, fallback_random=options.fallback_random, loss_bytes=options.loss_bytes, activation_bytes=options.activation_bytes,
                       as_rounded=options.emulate_precision_casts)


def aot_backend(compiler: Callable[[str], Callable], *, fallback_random: bool = False, loss_bytes: int = Options.loss_bytes,
                activation_bytes: int = Options.activation_bytes, as_rounded: bool = False) -> Callable:
    """A Dynamo backend whose graphs are made as aicc's are: `compiler(role)` gives the compiler of forward, backward or inference graphs.

    as_rounded: attention stays torch's own, which says what eager rounds (written out, its scores would be rounded to 16 bits)."""
    table = _decompositions(fallback_random)
    split = partial(partition, activation_bytes=activation_bytes)

    latest: list[Callable] = []

    def prepared(role: str) -> Callable:
        compile_one = compiler(role)

        def compile_seeded(gm: Graph, inputs: Sequence[Any]) -> Callable:
            if role == "inference":  # the others were parted from a graph whose seeds are shared
                share_seeds(gm)
            expand_losses(gm, table)
            made = compile_one(gm, inputs)
            if role == "inference":
                latest[:] = [made]
            return made

        def compile_later(gm: Graph, inputs: Sequence[Any]) -> Callable:  # when the first gradient is wanted, outside of Dynamo
            _note_layouts(gm, inputs)
            expand_losses(gm, table)
            return disable(compile_one(gm, inputs), reason="compiled code")

        return disable(compile_later, reason="a compiler is not traced") if role == "backward" else compile_seeded

    compilers: Any = {"fw_compiler": prepared("forward"), "bw_compiler": prepared("backward"), "inference_compiler": prepared("inference")}

    def compile_captured(gm: Graph, inputs: Sequence[Any]) -> Callable:
        guard_level()
        if not entered():
            return compile_graph(gm, inputs)
        eager = torch.fx.GraphModule(gm, copy.deepcopy(gm.graph)) if isinstance(gm, Graph) else gm  # as captured, for the other is rewritten
        return keep_tangents(eager, compile_graph(gm, inputs))

    def compile_graph(gm: Graph, inputs: Sequence[Any]) -> Callable:
        _start_workers(inputs)
        if isinstance(gm, Graph):  # not torch's wrapper that takes nested inputs apart: what it wraps was here before
            expand_recurrent(gm)
            mend_gradients(gm)
            mend_losses(gm)
            if not as_rounded:
                write_out_attention(gm, drops=not fallback_random)
            write_out_bags(gm)
            chunk_losses(gm, loss_bytes)
        if any(isinstance(x, (list, tuple, dict)) for x in inputs):
            return flatten_graph_inputs(gm, inputs, compile_graph)
        # Dynamo does not trace into what it is given back: a wrapper that forbids it would cost each call a microsecond or two.
        latest.clear()
        with collector_off():
            made = aot_module_simplified(gm, inputs, decompositions=table, partition_fn=split, keep_inference_input_mutations=True, **compilers)
        return without_wrapper(made, latest.pop(), inputs) if latest and isinstance(gm, Graph) else made

    return compile_captured


def _start_workers(inputs: Sequence[Any]) -> None:
    """The processes that compile kernels get ready while AOTAutograd traces."""
    device = next((x.device for x in inputs if isinstance(x, torch.Tensor) and x.device.type == "cuda"), None)
    if device is not None and torch.cuda.is_available():
        workers_for(cuda_target(f"cuda:{device.index or 0}"))


@cache
def _decompositions(fallback_random: bool) -> dict[Any, Callable[..., Any]]:
    return decomposition_table() if fallback_random else {**decomposition_table(), **random_decompositions()}


def partition(joint: Graph, inputs: Sequence[Any], *, num_fwd_outputs: int, activation_bytes: int = 0, **rest: Any) -> tuple[Graph, Graph]:
    """The forward and backward graphs of a joint one, by torch's min-cut, after what aicc wants computed again is computed again.

    activation_bytes: the most that is kept in between (0: no bound)."""
    share_seeds(joint)
    _drop_detaches(joint.graph)
    unstack_invariants(joint)
    joint.graph.eliminate_dead_code()
    merge_common_subexpressions(joint.graph)
    recompute_attention(joint, num_fwd_outputs)  # after equal nodes are merged, for it makes copies
    recompute_activations(joint, num_fwd_outputs)
    share_window_places(joint)
    permute_transposes(joint.graph)
    with functorch_config.patch(cse=False, recompute_views=True):  # its own pass imports Inductor; a saved view would be a copy
        return within_budget(joint, num_fwd_outputs, activation_bytes, lambda graph: min_cut_rematerialization_partition(
            graph, inputs, num_fwd_outputs=num_fwd_outputs, **rest))


def _drop_detaches(graph: torch.fx.Graph) -> None:
    """In a joint graph `detach` means nothing any more, but torch's partitioner would save its result rather than compute it again."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.detach.default):
        if not any(user.op == "output" for user in node.users):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _guarded(gm: Graph, options: Options, role: str, table: Mapping[Any, Callable[..., Any]], observe: Observer | None) -> Callable:
    try:
        return _compile(gm, options, role, table, observe)
    except Exception as e:
        if options.strict or observe is not None:
            raise
        path = _write_repro(gm, e)
        warnings.warn(f"aicc could not compile this {role} graph ({type(e).__name__}: {str(e).splitlines()[0][:200]}); it runs through ATen "
                      f"instead. A repro is in {path}; set AICC_STRICT=1 to raise.", RuntimeWarning, stacklevel=2)
        return make_boxed_func(gm.forward)


def _compile(gm: Graph, options: Options, role: str, table: Mapping[Any, Callable[..., Any]], observe: Observer | None) -> Callable:
    """The graph, or where there is control flow the pieces between, and the graphs within."""
    expand_flex(gm, table)
    placeholders = gm.graph.find_nodes(op="placeholder")
    kinds = dict(zip(placeholders, arg_kinds(role, len(placeholders)), strict=True))

    def compile_piece(piece: Graph, name: str, origins: list[torch.fx.Node | None]) -> Callable:
        saved = first_saved(role) if piece is gm else None
        made = compile_fx(piece, (), options, name=f"{role}_{name}" if name else role, observe=observe, saved_from=saved,
                          arg_kinds=["input" if n is None else kinds[n] for n in origins])
        if saved is not None:
            _report_strides(made, saved)
        return made

    return compile_pieces(gm, compile_piece, table)


_TOKENS_COUNT = "static_input_indices" in handle_effect_tokens_fn.__code__.co_names
"""Whether torch numbers a program's static inputs with the tokens of its effects in front (from 2.13 on, in inference only), as graphs have them."""


def arg_kinds(role: str, count: int) -> list[str]:
    """'param' for arguments that torch keeps at one address (parameters and buffers), 'input' for the others."""
    context = TracingContext.try_get()
    metadata = getattr(context, "fw_metadata", None) if context is not None else None
    static = set(getattr(metadata, "static_input_indices", None) or ()) if role != "backward" else set()
    if static and (role == "forward" or not _TOKENS_COUNT):
        static = {i + _tokens(metadata) for i in static}
    return ["param" if i in static else "input" for i in range(count)]


def _tokens(metadata: Any) -> int:
    """How many results (and arguments) a forward graph has in front of the others, for the order of effects such as checks of linear algebra."""
    return len(getattr(metadata, "tokens", ()))


def first_saved(role: str) -> int | None:
    """The number of the first result of a forward graph that is only kept for the backward graph; None where torch does not say."""
    context = TracingContext.try_get() if role == "forward" else None
    metadata = context.fw_metadata if context is not None else None
    count = getattr(metadata, "num_forward", None)
    return count + _tokens(metadata) if isinstance(count, int) else None


def written_arguments() -> list[int]:
    """The numbers of the arguments that the graph compiled last in this context writes to."""
    context = TracingContext.try_get()
    metadata = getattr(context, "fw_metadata", None)
    return [i for i, info in enumerate(getattr(metadata, "input_info", ())) if info.mutates_data or info.mutates_metadata]


def _report_strides(made: CompiledGraph, saved: int) -> None:
    """Tells AOTAutograd in which layouts the results are that are saved for the backward graph, which is compiled for those."""
    context = TracingContext.try_get()
    told = getattr(context, "output_strides", None)
    if told is not None and not told:  # a list that waits for one entry per result; None: as eager has it
        tokens = _tokens(context.fw_metadata if context is not None else None)  # AOTAutograd takes them away before it counts
        told.extend(None if i < saved else strides for i, strides in enumerate(made.result_strides) if i >= tokens)


def _note_layouts(gm: Graph, inputs: Sequence[Any]) -> None:
    """Saved tensors come in the layouts that the forward graph gave them, which AOTAutograd tells by `inputs` alone."""
    for node, given in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        traced = node.meta.get("val")
        known = all(isinstance(x, torch.Tensor) and not any(isinstance(n, torch.SymInt) for n in (*x.shape, *x.stride())) for x in (traced, given))
        if known and traced.shape == given.shape and traced.stride() != given.stride():
            node.meta["val"] = given


def _write_repro(gm: torch.fx.GraphModule, error: Exception) -> Path:
    """The graph as Python text with the shapes of its inputs, and the traceback, for a bug report."""
    with tempfile.NamedTemporaryFile("w", prefix="aicc-repro-", suffix=".py", delete=False) as f:
        f.write('"""' + "".join(traceback.format_exception(error)).replace('"""', "'''") + '"""\n\n')
        f.write(gm.print_readable(print_output=False))
        return Path(f.name)
