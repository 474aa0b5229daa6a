"""The zoo: real models at small real sizes, one row each, for tests and benchmarks.

`MODELS[name].build()` returns the module in eval mode and its example inputs, the same on every call and on every
host: weights and inputs come from fixed seeds and nothing is downloaded. Transformers models are wrapped so that
plain tensors go in and one plain tensor comes out. Dropout is 0 everywhere, so that one training step is comparable.

Parameters that libraries initialise to 0 or 1 (biases, norm scales, running statistics) are moved away from these
values, and transformers weights are drawn wider than by default: at the defaults attention is uniform and a norm's
affine part is the identity, and a compiler that drops either would pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from .networks import LSTMLanguageModel, MobileNetV2, ResNet18, UNet

Inputs = tuple[Tensor, ...]
Loss = Callable[[Tensor, Inputs], Tensor]

VOCABULARY = 512
# 2**-19 or so: where eager happens to round to the exact result, a few units in the last place are still no fault.
SMOOTH_FLOOR = 2e-6


@dataclass(frozen=True)
class ModelCase:
    """One row of the zoo.

    name: the key in `MODELS`.
    make: attention implementation ("sdpa" or "eager"; models without attention ignore it) to module, unseeded.
    inputs: batch, size (sequence length, or image side in pixels), generator to example inputs.
    loss: output and inputs to a scalar, for training.
    batch, size, seed: of the example inputs.
    attention: the attention implementations that differ for this model.
    forward_floor, gradient_floor: error relative to the largest output (gradient) that is allowed on top of 4 times
        eager float32's own error against float64; `rationale` says why it is what it is.
    truth: the row with the same weights and mathematics that can run in float64; empty: this one.
    slow, slow_training: leave the forward (training) test to the slow set.
    full_size: the same architecture at the size of real use, for benchmarks only: in no test.
    """

    name: str
    make: Callable[[str], nn.Module]
    inputs: Callable[[int, int, torch.Generator], Inputs]
    loss: Loss
    batch: int
    size: int
    seed: int = 1
    attention: tuple[str, ...] = ()
    forward_floor: float = SMOOTH_FLOOR
    gradient_floor: float = SMOOTH_FLOOR
    rationale: str = "smooth: float32 rounding only"
    truth: str = ""
    slow: bool = False
    slow_training: bool = True
    full_size: bool = False

    def model(self, attention: str = "sdpa") -> nn.Module:
        """The module, float32, in eval mode, weights seeded."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = self.make(attention)
            _perturb_constant_initialisation(module)
        return module.eval()

    def example_inputs(self, batch: int | None = None, size: int | None = None, seed: int | None = None) -> Inputs:
        """Inputs of the given (default: the row's) batch, size and seed; the same for the same arguments."""
        generator = torch.Generator().manual_seed(self.seed if seed is None else seed)
        return self.inputs(batch or self.batch, size or self.size, generator)

    def build(self, attention: str = "sdpa") -> tuple[nn.Module, Inputs]:
        """The module in eval mode and its example inputs."""
        return self.model(attention), self.example_inputs()


def _perturb_constant_initialisation(module: nn.Module) -> None:
    """Add noise to every 1-d parameter and to the running statistics of batch norms."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for submodule in module.modules():
            if isinstance(submodule, nn.BatchNorm2d):
                assert submodule.running_mean is not None and submodule.running_var is not None
                submodule.running_mean.add_(0.1 * torch.randn_like(submodule.running_mean))
                submodule.running_var.mul_(0.75 + 0.5 * torch.rand_like(submodule.running_var))


class PlainTensors(nn.Module):
    """A transformers model as tensors to tensor: positional tensors become the named arguments, `field` comes out."""

    def __init__(self, model: nn.Module, arguments: tuple[str, ...], field: str) -> None:
        super().__init__()
        self.model = model
        self.arguments = arguments
        self.field = field

    def forward(self, *tensors: Tensor) -> Tensor:
        output = self.model(**dict(zip(self.arguments, tensors, strict=True)), **self.extra())
        return getattr(output, self.field)

    def extra(self) -> dict[str, Any]:
        """Arguments beyond the tensors: no key-value cache where the model would keep one."""
        return {"use_cache": False} if getattr(self.model.config, "use_cache", None) is not None else {}


def _transformer(
    config_class: type,
    model_class: type[nn.Module],
    options: dict[str, Any],
    arguments: tuple[str, ...] = ("input_ids",),
    field: str = "logits",
    experts: str | None = None,
) -> Callable[[str], nn.Module]:
    """A `ModelCase.make` for a transformers model with random weights."""

    def make(attention: str) -> nn.Module:
        config = config_class(**options)
        config._attn_implementation = attention
        if experts is not None:
            config._experts_implementation = experts
        return PlainTensors(model_class(config), arguments, field)

    return make


def _tokens(batch: int, size: int, generator: torch.Generator) -> Inputs:
    return (torch.randint(0, VOCABULARY, (batch, size), generator=generator),)


def _padded_tokens(batch: int, size: int, generator: torch.Generator) -> Inputs:
    """Tokens and an attention mask; row i is padded at the right by 3 i tokens."""
    (tokens,) = _tokens(batch, size, generator)
    lengths = size - 3 * torch.arange(batch)
    mask = (torch.arange(size)[None, :] < lengths.clamp(min=1)[:, None]).to(torch.int64)
    return tokens, mask


def _source_and_target(batch: int, size: int, generator: torch.Generator) -> Inputs:
    """Encoder tokens `[batch, size]`, decoder tokens `[batch, size / 2]`."""
    return _tokens(batch, size, generator) + _tokens(batch, max(size // 2, 1), generator)


def _images(batch: int, size: int, generator: torch.Generator) -> Inputs:
    return (torch.randn(batch, 3, size, size, generator=generator),)


def _next_token(logits: Tensor, inputs: Inputs) -> Tensor:
    """Mean cross-entropy of predicting the next token of the last input."""
    targets = inputs[-1][:, 1:]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())


def _classification(logits: Tensor, inputs: Inputs) -> Tensor:
    """Mean cross-entropy against the classes 0, 1, 2, ..., one per row."""
    return F.cross_entropy(logits, torch.arange(logits.shape[0]) % logits.shape[1])


def _segmentation(logits: Tensor, inputs: Inputs) -> Tensor:
    """Mean cross-entropy per pixel; the class of a pixel is set by the brightness of its first channel."""
    brightness = inputs[0][:, 0]
    targets = (brightness * 2).round().clamp(0, logits.shape[1] - 1).to(torch.int64)
    return F.cross_entropy(logits, targets)


def _hidden_state(hidden: Tensor, inputs: Inputs) -> Tensor:
    """Mean squared distance to a fixed wave, so that every position and feature has a gradient of its own."""
    target = torch.arange(hidden[0].numel()).reshape(hidden[0].shape).to(hidden.dtype).sin()
    return ((hidden - target) ** 2).mean()


# Wide enough that attention scores differ by several units between keys at these widths.
_INIT = {"initializer_range": 0.1}

_GPT2 = {
    "vocab_size": VOCABULARY, "n_positions": 128, "n_embd": 128, "n_layer": 3, "n_head": 4, "bos_token_id": 0,
    "eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **_INIT,
}  # fmt: skip
_DECODER = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
    "attention_dropout": 0.0, **_INIT,
}  # fmt: skip
_BERT = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 128, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **_INIT,
}  # fmt: skip
_VIT = {
    "image_size": 64, "patch_size": 8, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3,
    "num_attention_heads": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 10, **_INIT,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCABULARY, "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_MIXTRAL = {**_DECODER, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_local_experts": 4}


def _mixtral(experts: str) -> Callable[[str], nn.Module]:
    """Mixtral with one of transformers' ways to run the experts: "grouped_mm" (its default), "batched_mm", "eager" (a loop)."""
    return _transformer(transformers.MixtralConfig, transformers.MixtralForCausalLM, _MIXTRAL, experts=experts)


_BOTH = ("sdpa", "eager")

_KINKS = (
    "float32 rounding only: in training, a pre-activation within rounding of a kink of ReLU or ReLU6 (or two equal values in "
    "a max-pooling window) changes a gradient by up to 5 %. The seed is one at which the nearest such value is more than 3 "
    "times eager float32's largest error away, and at which eager in channels-last order stays within the headroom as well "
    "(at some seeds a norm's gradient cancels, and mere summation order costs more than that)"
)

_CASES = (
    ModelCase(
        "gpt2", _transformer(transformers.GPT2Config, transformers.GPT2LMHeadModel, _GPT2), _tokens, _next_token,
        batch=2, size=64, attention=_BOTH, slow_training=False,
    ),
    ModelCase(
        "llama", _transformer(transformers.LlamaConfig, transformers.LlamaForCausalLM, _DECODER), _tokens, _next_token,
        batch=2, size=64, attention=_BOTH,
    ),
    ModelCase(
        "qwen2",
        _transformer(transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {**_DECODER, "tie_word_embeddings": True}),
        _tokens, _next_token, batch=2, size=64, attention=_BOTH, slow=True,
    ),
    ModelCase(
        "bert",
        _transformer(
            transformers.BertConfig, transformers.BertModel, _BERT, ("input_ids", "attention_mask"), "last_hidden_state"
        ),
        _padded_tokens, _hidden_state, batch=3, size=48, attention=_BOTH,
    ),
    ModelCase(
        "t5",
        _transformer(
            transformers.T5Config, transformers.T5ForConditionalGeneration, _T5, ("input_ids", "decoder_input_ids")
        ),
        _source_and_target, _next_token, batch=2, size=48, attention=_BOTH, slow=True,
    ),
    ModelCase(
        "vit", _transformer(transformers.ViTConfig, transformers.ViTForImageClassification, _VIT, ("pixel_values",)),
        _images, _classification, batch=2, size=64, attention=_BOTH, slow=True,
    ),
    ModelCase(
        "mixtral", _mixtral("grouped_mm"),
        _tokens, _next_token, batch=2, size=32, attention=_BOTH, truth="mixtral_loop", slow=True,  # grouped_mm has no float64
    ),
    ModelCase(
        "mixtral_batched", _mixtral("batched_mm"),
        _tokens, _next_token, batch=2, size=32, slow=True,
    ),
    ModelCase(
        "mixtral_loop", _mixtral("eager"),
        _tokens, _next_token, batch=2, size=32, slow=True,
    ),
    ModelCase(
        "resnet18", lambda _: ResNet18(classes=10), _images, _classification, batch=2, size=64, seed=201, rationale=_KINKS,
    ),
    ModelCase("resnet18_full", lambda _: ResNet18(), _images, _classification, batch=1, size=224, full_size=True),
    ModelCase(
        "mobilenet_v2", lambda _: MobileNetV2(MobileNetV2.SMALL, head=256, classes=10), _images, _classification,
        batch=4, size=32, seed=245, rationale=_KINKS, slow=True,
    ),
    ModelCase("mobilenet_v2_full", lambda _: MobileNetV2(), _images, _classification, batch=1, size=224, full_size=True),
    ModelCase(
        "bert_base",
        _transformer(
            transformers.BertConfig, transformers.BertModel, {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
            ("input_ids", "attention_mask"), "last_hidden_state",
        ),
        _padded_tokens, _hidden_state, batch=1, size=128, full_size=True,
    ),
    ModelCase(
        "gpt2_124m",
        _transformer(
            transformers.GPT2Config, transformers.GPT2LMHeadModel, {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        ),
        _tokens, _next_token, batch=1, size=64, full_size=True,
    ),
    ModelCase("lstm", lambda _: LSTMLanguageModel(VOCABULARY, 64, 2), _tokens, _next_token, batch=2, size=12, slow=True),
    ModelCase("unet", lambda _: UNet(16, classes=4), _images, _segmentation, batch=2, size=32, slow=True),
)  # fmt: skip

MODELS: dict[str, ModelCase] = {case.name: case for case in _CASES}
