"""The compilers that the suites compare, and a cold cache for each.

    call = PEERS["onnxruntime"](function, args, threads)      # optional: `pip install aicc[peers]`
    names = choose("all")

Import this before torch: the caches are named by environment variables that are read early.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

_ROOT = tempfile.mkdtemp(prefix="aicc-bench-")
atexit.register(shutil.rmtree, _ROOT, ignore_errors=True)
# A cache of this run alone: compile times are those of a first call, and nobody's own cache is touched.
os.environ["AICC_CACHE_DIR"] = os.path.join(_ROOT, "aicc")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(_ROOT, "inductor")
os.environ["AICC_STRICT"] = "1"

import torch  # noqa: E402
from aicc.compiler.ahead import compile as compile_ahead  # noqa: E402
from torch._inductor import config as inductor_config  # noqa: E402, TID251  (the settings of a peer)

__all__ = ["DIRECT", "FROM_ONNX", "PEERS", "choose", "export", "missing", "warm_up"]

# Without it Dynamo leaves recurrent layers to eager, whatever the backend.
torch._dynamo.config.allow_rnn = True


def warm_up(backends: list[str]) -> None:
    """Compiles (or exports) something tiny with each, so that imports, worker processes and compiler probes are not charged to the first case."""
    for name in [b for b in backends if b not in FROM_ONNX]:
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(lambda x: x * 2 + 1, backend=name)(torch.ones(8))
    if peers := [p for p in backends if p in FROM_ONNX]:
        path = export(lambda x: x * 2 + 1, [torch.ones(8)])
        for name in peers:
            PEERS[name](path, [torch.ones(8)], 1)()
    torch._dynamo.reset()


class _AsModule(torch.nn.Module):
    """A function as a module, which the exporter wants."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(*args)


def export(function: Callable[..., Any], args: Sequence[torch.Tensor]) -> str:
    """The path of an ONNX file of the function: what the peers in FROM_ONNX are given in its place."""
    module = function if isinstance(function, torch.nn.Module) else _AsModule(function)
    program = torch.onnx.export(module.eval(), tuple(args), dynamo=True, verbose=False)
    path = os.path.join(tempfile.mkdtemp(dir=_ROOT), "model.onnx")
    assert program is not None
    program.save(path)
    return path


def _onnxruntime(path: Any, args: Sequence[torch.Tensor], threads: int) -> Callable[[], list[torch.Tensor]]:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {x.name: a.numpy() for x, a in zip(session.get_inputs(), args, strict=True)}
    return lambda: [torch.from_numpy(y) for y in session.run(None, feed)]


def _openvino(path: Any, args: Sequence[torch.Tensor], threads: int) -> Callable[[], list[torch.Tensor]]:
    import openvino
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    request, feed = compiled.create_infer_request(), [a.numpy() for a in args]
    return lambda: [torch.from_numpy(y) for y in request.infer(feed, share_inputs=True, share_outputs=True).values()]


def _compiled(backend: str, options: dict[str, Any] | None = None) -> Callable[..., Callable[[], Any]]:
    def make(function: Callable[..., Any], args: Sequence[torch.Tensor], threads: int) -> Callable[[], Any]:
        compiled = torch.compile(function, backend=backend, options=options)
        return lambda: compiled(*args)
    return make


def _inductor_max(function: Callable[..., Any], args: Sequence[torch.Tensor], threads: int) -> Callable[[], Any]:
    """With parameters as constants and measured products. As `options` alone the former is ignored: Dynamo asks the configuration."""
    settings = {"freezing": True, "max_autotune": True}
    call = _compiled("inductor", settings)(function, args, threads)
    with inductor_config.patch(settings):
        call()
    return call


def _direct(function: Callable[..., Any], args: Sequence[torch.Tensor], threads: int) -> Callable[[], Any]:
    """aicc's program for fixed inputs: without Dynamo's guards, as the sessions of ONNX Runtime and OpenVINO are."""
    program = compile_ahead(function, *args)
    return lambda: program(*args)


DIRECT = "aicc-direct"
PEERS: dict[str, Callable[[Any, Sequence[torch.Tensor], int], Callable[[], Any]]] = {
    "aicc": _compiled("aicc"), DIRECT: _direct, "inductor": _compiled("inductor"),
    "inductor-max": _inductor_max, "onnxruntime": _onnxruntime, "openvino": _openvino}
"""(function, or for those in FROM_ONNX what `export` made of it, arguments, threads) -> a call. Sessions are made before the first call."""
FROM_ONNX = ("onnxruntime", "openvino")
_PACKAGES = {"onnxruntime": ("onnxruntime", "onnx", "onnxscript"), "openvino": ("openvino", "onnx", "onnxscript")}


def missing(peers: Sequence[str]) -> list[str]:
    """The packages that these peers need and that are not installed."""
    return sorted({m for p in peers for m in _PACKAGES.get(p, ()) if importlib.util.find_spec(m) is None})


def choose(text: str) -> list[str] | str:
    """The peers named by 'all' (that are installed), 'none' or a list with commas; or what is wrong with the text."""
    others = [p for p in PEERS if p not in ("aicc", DIRECT)]
    if text == "all":
        return [p for p in others if not missing([p])]
    names = [] if text == "none" else text.split(",")
    if unknown := [p for p in names if p not in others]:
        return f"no peer {', '.join(unknown)}; there are {', '.join(others)}"
    if packages := missing(names):
        return f"{', '.join(packages)} missing: pip install aicc[peers]"
    return names
