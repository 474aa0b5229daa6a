"""Seconds from `torch.compile` to the first result, each contender in fresh processes with empty caches, in turn.

    python -m aicc.benchmarks.cold_compile --cases llama-prefill-256,vit-s-b1 --peers inductor,openvino --threads 1     # cases of cpu.py
    python -m aicc.benchmarks.cold_compile --cases bert-train-b32 --peers inductor --rounds 2                           # rows of gpu_models.py

The clock starts when torch is there and eager has run (the device, its libraries and its kernels are loaded); it counts what the compiler imports
beyond Dynamo and AOTAutograd, and the processes that it starts. For ONNX Runtime and OpenVINO it counts the export. Printed: the median of the
rounds, and aicc's over each peer's.
"""

from __future__ import annotations

import argparse
import compileall
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULT = "-- seconds -- "


def _import_aicc() -> float:
    """The benchmarks import it, so this comes first. Without torch's own tracers, which all but eager need."""
    for name in ("torch._dynamo", "torch._functorch.aot_autograd"):
        importlib.import_module(name)
    start = time.perf_counter()
    importlib.import_module("aicc.compiler.dynamo")
    return time.perf_counter() - start


def _on_cpu(case: str, contender: str, threads: int) -> float:
    contenders = importlib.import_module("aicc.benchmarks.contenders")
    cases = importlib.import_module("aicc.benchmarks.cpu").CASES
    torch = importlib.import_module("torch")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    function, args = cases[case].build()
    if isinstance(function, torch.nn.Module):
        function.eval()
    with torch.no_grad():
        function(*args)
        start = time.perf_counter()
        given = contenders.export(function, args) if contender in contenders.FROM_ONNX else function
        contenders.PEERS[contender](given, args, threads)()
        return time.perf_counter() - start


def _on_gpu(row: str, contender: str) -> float:
    models = importlib.import_module("aicc.benchmarks.gpu_models")
    torch = importlib.import_module("torch")
    subject = models.Subject(next(r for r in models.ROWS if r.name == row))
    for _ in range(2):
        subject.call(subject.model)
    torch.cuda.synchronize()
    start = time.perf_counter()
    subject.call(models.contender(subject.model, contender))
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _fresh(case: str, contender: str, options: argparse.Namespace) -> float:
    """Seconds in a process of its own. RuntimeError with its last words if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "AICC_STRICT": "1", "TMPDIR": folder, "AICC_CACHE_DIR": f"{folder}/aicc",
               "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        command = [sys.executable, "-m", "aicc.benchmarks.cold_compile", "--one", contender, "--cases", case, "--threads", str(options.threads)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith(RESULT):
            return float(line.removeprefix(RESULT))
    raise RuntimeError(f"{contender} fails on {case}: {(done.stderr or done.stdout)[-600:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", required=True, help="cases of cpu.py or rows of gpu_models.py, separated by commas")
    parser.add_argument("--peers", default="inductor", help="besides aicc, separated by commas")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="torch's, for cases of cpu.py")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no further process is started after this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    cases = options.cases.split(",")
    if options.one:
        imports = _import_aicc()
        on_gpu = any(r.name == cases[0] for r in importlib.import_module("aicc.benchmarks.gpu_models").ROWS)
        seconds = _on_gpu(cases[0], options.one) if on_gpu else _on_cpu(cases[0], options.one, options.threads)
        print(RESULT + str(seconds + imports * options.one.startswith("aicc")), flush=True)
        return
    # As an installer does: else some machines compile 300 files each time.
    compileall.compile_dir(Path(__file__).parents[1], quiet=2, maxlevels=20)
    begin = time.monotonic()
    found: dict[str, dict[str, list[float]]] = {}
    for case in cases:
        times = found[case] = {name: [] for name in ["aicc", *options.peers.split(",")]}
        for _ in range(options.rounds):
            for name, seconds in times.items():
                if time.monotonic() - begin < options.seconds:
                    try:
                        seconds.append(_fresh(case, name, options))
                    except RuntimeError as e:
                        print(e, file=sys.stderr)
        middle = {name: statistics.median(s) for name, s in times.items() if s}
        over = {name: middle["aicc"] / s for name, s in middle.items() if name != "aicc" and "aicc" in middle}
        print(f"{case:22s} " + ", ".join(f"{n} {s:.2f} s" for n, s in middle.items()) + "; aicc over " + ", ".join(
            f"{n} {ratio:.2f}" for n, ratio in over.items()), flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
