"""What training a model takes of a device's memory, part by part, before there is a device.

In: a model on the meta device (shapes without values), the DeepSpeed settings, and what a forward holds. Out: bytes.
What a forward keeps for its backward is not a formula but what autograd saves, counted on the meta device.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sft_dist.errors import ConfigError
from sft_dist.model.layers import decoder_layers

_FUSED = "sft_dist_fused_on_meta"
GIB = 2**30

# What DeepSpeed 0.19 takes where its file does not say.
_DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "sub_group_size": 1_000_000_000,
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers of a model that its memory follows from; parameters are counted in elements."""

    num_parameters: int  # tied ones once
    num_trained: int  # all but frozen ones
    largest_layer: int
    largest_gradient: int  # of a layer or the head
    head: int  # V h
    trains_head: bool
    hidden_size: int
    num_layers: int


@dataclass(frozen=True, slots=True)
class Saved:
    """Bytes that a forward of one row keeps for its backward."""

    all_layers: int
    largest_layer: int
    outside: int  # embeddings, last norm

    def kept(self, *, recomputes_layers: bool, layer_inputs: int) -> int:
        """`layer_inputs`: bytes of the inputs of all layers, which are what recomputation keeps."""
        return self.outside + (layer_inputs + self.largest_layer if recomputes_layers else self.all_layers)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank's device, by part, with everything but activations the same with and without recomputation."""

    parts: dict[str, int]
    activations_recomputed: int
    activations_whole: int

    def total(self, *, recomputes_layers: bool) -> int:
        activations = self.activations_recomputed if recomputes_layers else self.activations_whole
        return sum(self.parts.values()) + activations


def model_without_weights(config: Any, dtype: torch.dtype, *, trust_remote_code: bool) -> Any:
    """A causal language model on the meta device, from its configuration alone. Raises ConfigError for other models."""
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(_FUSED, _fused_attention)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=_FUSED, trust_remote_code=trust_remote_code
            )
    except ValueError as error:
        raise ConfigError(f"model.path: no causal language model follows from its config.json: {error}") from error


def classifier_without_weights(config: Any, dtype: torch.dtype, *, num_outputs: int, trust_remote_code: bool) -> Any:
    """The same backbone with a prediction head in the place of the language model's. Raises ConfigError."""
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(config)
    config.num_labels = num_outputs
    try:
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except ValueError as error:
        raise ConfigError(f"model.path: no sequence classifier follows from its config.json: {error}") from error


def numel(model: nn.Module) -> tuple[int, int]:
    """Elements of all parameters, tied ones once, and of those that are trained."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def sizes_of(causal_lm: Any) -> Sizes:
    layers = decoder_layers(causal_lm)
    head = causal_lm.get_output_embeddings().weight

    def trained(parameters: Iterable[nn.Parameter]) -> int:
        return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)

    num_parameters, num_trained = numel(causal_lm)
    return Sizes(
        num_parameters=num_parameters,
        num_trained=num_trained,
        largest_layer=max((sum(p.numel() for p in layer.parameters()) for layer in layers), default=0),
        largest_gradient=max([trained([head]), *(trained(layer.parameters()) for layer in layers)]),
        head=head.numel(),
        trains_head=head.requires_grad,
        hidden_size=head.shape[1],
        num_layers=len(layers),
    )


def saved_by_forward(causal_lm: Any, num_tokens: int) -> Saved | None:
    """What autograd keeps of a forward over one row of num_tokens tokens, up to the last hidden state.

    None for models whose forward looks at values, as some routers of experts do: the meta device has none.
    """
    seen: dict[int, Tensor] = {parameter.untyped_storage()._cdata: parameter for parameter in causal_lm.parameters()}
    layers = decoder_layers(causal_lm)
    current = 0  # layer number from 1; 0: outside
    saved = [0] * (len(layers) + 1)

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = tensor  # held, so that no other storage gets its address
            saved[current] += storage.nbytes()
        return tensor

    def enter(number: int) -> Any:
        def hook(*_: Any) -> None:
            nonlocal current
            current = number

        return hook

    hooks = [layer.register_forward_pre_hook(enter(number)) for number, layer in enumerate(layers, 1)]
    hooks += [layer.register_forward_hook(enter(0)) for layer in layers]
    ids = torch.zeros(1, num_tokens, dtype=torch.int64, device="meta")
    causal_lm.train()
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            causal_lm.base_model(input_ids=ids, position_ids=ids, use_cache=False)
    except (RuntimeError, NotImplementedError):
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return Saved(sum(saved[1:]), max(saved[1:], default=0), saved[0])


def memory_of(
    sizes: Sizes,
    saved: Saved | None,
    settings: Mapping[str, Any],
    *,
    num_ranks: int,
    num_tokens: int,
    num_targets: int,
    chunk_rows: int,
    element_bytes: int,
    reduces_once: bool,
    reserves_buckets: bool,
    anchor_bytes: int = 0,
    compares: bool = False,
) -> Memory | None:
    """Of one rank, with `settings` as DeepSpeed reads them; None where what a forward keeps is unknown.

    States after Rajbhandari et al., "ZeRO", 2020, section 3.1; buffers as DeepSpeed's stage 3 makes them.
    `reserves_buckets`: whether memory that is asked for counts before it is written (on a GPU, not on a CPU).
    `anchor_bytes`: of a parameter in a copy of θ̂ on the device. `compares`: whether a
    frozen copy of the model answers to every batch too.
    """
    if saved is None:
        return None
    zero = _DEFAULTS | dict(settings.get("zero_optimization", {}))
    accumulates_fp32 = settings.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    own, trained = (-(-number // num_ranks) for number in (sizes.num_parameters, sizes.num_trained))
    bucket = zero["reduce_bucket_size"]
    live = min(zero["stage3_max_live_parameters"], sizes.num_parameters)
    rows, width = min(chunk_rows, num_targets), sizes.head // sizes.hidden_size
    if compares:
        rows, width = -(-rows // 2), 3 * width  # a chunk of half the rows has three tensors of logits
    parts = {
        "weights": element_bytes * own,
        "master weights": 4 * trained,
        "Adam moments": 8 * trained,
        "gradients": (4 if accumulates_fp32 else element_bytes) * trained,
        "gradients while stepping": 4 * min(trained, zero["sub_group_size"]),
        # A rank alone has every weight whole.
        "gathered weights": element_bytes * live if num_ranks > 1 else 0,
        "prefetched weights": 0
        if num_ranks == 1 or live == sizes.num_parameters
        else element_bytes * min(zero["stage3_prefetch_bucket_size"], sizes.num_parameters),
        "gradients of a layer or the head": element_bytes * sizes.largest_gradient,
        "gradients of the step, whole": 4 * sizes.num_trained if reduces_once else 0,
        "reduction bucket": element_bytes * (bucket if reserves_buckets else min(bucket, sizes.num_trained)),
        # Of one chunk the float32 logits, which become their own gradient, and that in the weights' precision; of all
        # targets the hidden states and their gradient; the head's gradient in float32 until the backward pass.
        "head": rows * (4 * width + element_bytes * sizes.head // sizes.hidden_size)
        + 2 * element_bytes * num_targets * sizes.hidden_size
        + 4 * sizes.head * sizes.trains_head,
    }
    if anchor_bytes and not compares:
        parts["copy of θ̂"] = anchor_bytes * trained
    if compares:
        parts["frozen model"] = element_bytes * own
        gathered = min(2 * sizes.largest_layer + sizes.head, sizes.num_parameters)
        parts["frozen model, gathered"] = element_bytes * gathered if num_ranks > 1 else 0
        parts["frozen model, hidden states"] = 4 * element_bytes * num_tokens * sizes.hidden_size
    layer_inputs = element_bytes * num_tokens * sizes.hidden_size * sizes.num_layers
    # While a layer's backward runs, gradients of about half of what it saved are alive beside it.
    flowing = saved.largest_layer // 2
    return Memory(
        parts,
        saved.kept(recomputes_layers=True, layer_inputs=layer_inputs) + flowing,
        saved.kept(recomputes_layers=False, layer_inputs=layer_inputs) + flowing,
    )


class _FusedAttention(torch.autograd.Function):
    """Keeps what a fused kernel keeps: queries, keys, values and its output, but no scores. Only for counting."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        context.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        raise AssertionError("nothing is trained on the meta device")


def _fused_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    return _FusedAttention.apply(query, key, value).transpose(1, 2).contiguous(), None
