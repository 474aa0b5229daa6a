"""What a user may choose, as one frozen dataclass whose text is part of every cache key."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .env import Environment, read_environment

__all__ = ["MODES", "Options"]

MODES = ("default", "reduce-overhead", "max-autotune")
_SPELLINGS = {"max-autotune-no-cudagraphs": "max-autotune"}
"""torch's modes that are one of ours: tuning here replays no CUDA graphs."""
GRADIENT_NOISE = 4
"""How much further from float64 a Winograd form of a training step may be than of inference, by the gradients of norms behind it: up to 4.6 times
eager's distance in one layer with 2 x 2 outputs, which alone is 0.8 of it."""


@dataclass(frozen=True)
class Options:
    """`torch.compile(..., backend="aicc", mode=..., options={...})`.

    strict                    raise when a graph does not compile, instead of running it through ATen with a warning
    cache                     keep compiled artifacts on disk
    verify                    verify the IR after every pass, not only at the end of each stage
    emulate_precision_casts   round 16-bit floats after every op as eager does, instead of computing fused chains in float32
    features                  CPU features to compile for; None means those of the host
    fuse                      group ops into kernels; False gives one kernel per op (for debugging)
    fallback_random           draw random numbers through ATen, which gives eager's for the same seed, instead of from counters
    pack_parameters           keep a packed copy of parameters that kernels read in another layout; False keeps the parameters only
    winograd                  compute 3-tap convolutions on CPUs with fewer multiplications and slightly different rounding
    winograd_budget           the most that a form of these may be away from float64, as a multiple of eager's distance
    nontemporal               write results past the caches where they would not be read again before they are thrown out (CPUs)
    fast_math                 cheaper exp, tanh, erf, log and sigmoid of a few ulp (docs/fast-math.md)
    plan                      a plan file: the ranks of the process group share the work (see docs/distributed.md); "" for none
    loss_bytes                logits of a cross-entropy over a linear layer that take more bytes are computed in parts; 0: never
    activation_bytes          training: the most that the forward pass keeps for the backward pass, the rest is computed again; 0: no bound
    streams                   CUDA streams that a graph may use beside each other: 2, or 1 for the caller's alone
    cudagraphs                replay a graph's launches from a CUDA graph (mode="reduce-overhead" means the same)
    """

    mode: str = "default"
    strict: bool = False
    cache: bool = True
    verify: bool = False
    emulate_precision_casts: bool = False
    features: tuple[str, ...] | None = None
    fuse: bool = True
    fallback_random: bool = False
    pack_parameters: bool = True
    winograd: bool = True
    winograd_budget: float = 2.0
    nontemporal: bool = True
    fast_math: bool = False
    loss_bytes: int = 256 << 20
    activation_bytes: int = 0
    streams: int = 2
    cudagraphs: bool = False
    plan: str = ""

    @staticmethod
    def from_user(mode: str | None = None, options: Mapping[str, Any] | None = None, environment: Environment | None = None) -> Options:
        """Options from what torch.compile hands over; the environment gives defaults. ValueError for unknown names (with the nearest)."""
        env = environment or read_environment()
        fields = {f.name: f for f in dataclasses.fields(Options)}
        given: dict[str, Any] = {"mode": mode or "default", "strict": env.strict, "cache": env.cache, "verify": env.verify, "features": env.features}
        for key, value in (options or {}).items():
            name = key.replace("-", "_").removeprefix("aicc.")
            if name not in fields:
                near = difflib.get_close_matches(name, fields, 1)
                raise ValueError(f"unknown option '{key}'" + (f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(fields)}"))
            if name == "features":
                if not (value is None or isinstance(value, (str, tuple, list)) and all(isinstance(f, str) for f in value)):
                    raise ValueError(f"option '{key}' must be names of CPU features, such as \"avx2,fma\", or None; got {value!r}")
                if value is not None:
                    value = tuple(f.strip() for f in (value.split(",") if isinstance(value, str) else value) if f.strip())
            elif name == "plan":
                value = str(value)
            elif type(value) is not type(fields[name].default):  # True is no number of bytes
                raise ValueError(f"option '{key}' must be a {type(fields[name].default).__name__}, got {value!r}")
            elif isinstance(value, int) and value < 0:
                raise ValueError(f"option '{key}' must not be negative, got {value!r}")
            given[name] = value
        given["mode"] = _SPELLINGS.get(given["mode"], given["mode"])
        if given["mode"] not in MODES:
            raise ValueError(f"unknown mode '{given['mode']}'; aicc knows {', '.join(MODES)}")
        return Options(**given)

    def for_gradients(self) -> Options:
        """Of a forward graph that keeps something for its backward graph, and of that: Winograd rounds a tap alike at every position, which the sums
        over positions in gradients of norms and weights do not average out."""
        return dataclasses.replace(self, winograd_budget=self.winograd_budget / GRADIENT_NOISE)

    @property
    def replays(self) -> bool:
        """Whether launches are replayed from CUDA graphs."""
        return self.cudagraphs or self.mode == "reduce-overhead"

    @property
    def key(self) -> str:
        """The part of the options that changes the code."""
        cpu = f"{self.pack_parameters},{self.winograd},{self.winograd_budget},{self.nontemporal}"
        return f"{self.mode},{self.emulate_precision_casts},{self.features},{self.fuse},{self.fast_math},{cpu},{self.replays},{self.streams}"
