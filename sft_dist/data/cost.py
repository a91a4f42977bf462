"""What a forward and backward over packed samples costs, in floating-point operations. Pure: integers in, numbers out.

One multiplication and addition of a matrix product are 2 FLOPs, and the backward pass is two such products for the one
of the forward pass, so every product of the model counts 6 in all. Three things add up:

    linear     6 P     a token, P the matrix parameters that it passes through in all layers (of experts, the active)
    attention  12 q    a layer and attended pair of tokens, q = heads x head size: 2 q for the score and 2 q for the
                       value, times 3; a sample of l tokens has l (l + 1) / 2 pairs, fewer under a sliding window,
                       and in an encoder l²
    head       6 h V   a target token: logits of other tokens are not computed

Not counted, as usual: looking up embeddings, norms, activations, softmax. Sources: Chowdhery et al. 2022 (PaLM, arXiv
2204.02311), appendix B, for 6 a parameter and model-FLOP utilisation; Korthikanti et al. 2022 (arXiv 2205.05198) for
model as opposed to hardware FLOPs. Both count attention over the whole square of a sequence; here it is counted as it
is computed: causal, and sample by sample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Recomputation = Literal["none", "all_but_attention", "full"]

# Model types in which every token attends to all of its sample.
_ENCODERS = {"albert", "bert", "camembert", "data2vec-text", "distilbert", "electra", "ernie", "roberta", "xlm-roberta"}
# Model types with two matrices in their MLP (up, down); all others have three (gate, up, down).
_UNGATED = {"bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "mpt", "opt", "phi"} | {
    "nemotron",
    "starcoder2",
    *_ENCODERS,
}
# Of the layers of these types every n-th has no window, where config.json does not say so itself.
_FULL_ATTENTION_EVERY = {"gemma2": 2, "gpt_oss": 2, "cohere2": 4, "olmo3": 4, "gemma3_text": 6}
# What has matrices, or attends, in a way that is not described here.
_UNKNOWN = ("kv_lora_rank", "ssm_state_size", "mamba_d_state", "attention_chunk_size", "num_global_key_value_heads")


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer of a transformer, by its sizes."""

    hidden_size: int
    query_size: int  # heads x head size
    key_value_size: int  # key-value heads x head size
    mlp_size: int  # intermediate size; of experts, all that one token passes through together
    num_mlp_matrices: int = 3
    num_experts: int = 0  # outputs of the router
    window: int | None = None  # tokens that a token attends to at most, itself included

    @property
    def num_parameters(self) -> int:
        """Parameters of the matrices that one token passes through."""
        attention = 2 * self.query_size + 2 * self.key_value_size
        return self.hidden_size * (attention + self.num_mlp_matrices * self.mlp_size + self.num_experts)


@dataclass(frozen=True, slots=True)
class CostModel:
    """FLOPs of forward and backward by what they are proportional to; the formulas stand at the head of this module."""

    linear_per_token: float
    attention_per_pair: float = 0.0  # of all layers without a window
    head_per_target: float = 0.0
    windowed_per_pair: float = 0.0  # of all layers with one
    window: int | None = None
    is_frozen: bool = False  # whether gradients of the weights are left out of the backward
    is_causal: bool = True  # else every token attends to all of its sample

    @classmethod
    def of_layers(cls, layers: Sequence[DecoderLayer], *, vocab_size: int, is_causal: bool = True) -> "CostModel":
        """Raises ValueError where windows of two sizes occur."""
        windows = {layer.window for layer in layers if layer.window is not None}
        if len(windows) > 1:
            raise ValueError(f"layers with windows of {' and '.join(map(str, sorted(windows)))} tokens")
        return cls(
            linear_per_token=6.0 * sum(layer.num_parameters for layer in layers),
            attention_per_pair=12.0 * sum(layer.query_size for layer in layers if layer.window is None),
            head_per_target=6.0 * layers[0].hidden_size * vocab_size,
            windowed_per_pair=12.0 * sum(layer.query_size for layer in layers if layer.window is not None),
            window=windows.pop() if windows else None,
            is_causal=is_causal,
        )

    def of_samples(self, lengths: NDArray[np.integer], num_targets: NDArray[np.integer]) -> Float64:
        """[num_samples] FLOPs of each sample of `lengths` tokens, whatever else is in its pack."""
        pairs = attended_pairs(lengths, None) if self.is_causal else np.square(np.asarray(lengths, np.float64))
        within = pairs if self.window is None else attended_pairs(lengths, self.window)
        tokens, targets = np.asarray(lengths, np.float64), np.asarray(num_targets, np.float64)
        return (
            self.linear_per_token * tokens
            + self.attention_per_pair * pairs
            + self.windowed_per_pair * within
            + self.head_per_target * targets
        )

    def flops(self, lengths: Sequence[int] | NDArray[np.integer], num_targets: int) -> float:
        """Model FLOPs of samples together: of one pack, of a step, of a run."""
        sizes = np.asarray(lengths, np.int64)
        return float(self.of_samples(sizes, np.zeros_like(sizes)).sum()) + self.head_per_target * num_targets

    def palm_flops(self, num_tokens: int, sequence_length: int) -> float:
        """(6 N + 12 L q S) a token: PaLM's formula, for comparison with figures of others.

        N are the matrix parameters with the head, S the length of a pack; a pack counts as one sequence, attention over
        its whole square whatever its windows, and the head at every token.
        """
        attention = (self.attention_per_pair + self.windowed_per_pair) * sequence_length
        return (self.linear_per_token + self.head_per_target + attention) * num_tokens

    def frozen(self) -> "CostModel":
        """The same model, its weights not trained: 4 for 6 of every product with a weight, attention as it is.

        What adapters beside the weights cost is left out, as little as it is.
        """
        return replace(
            self,
            linear_per_token=self.linear_per_token * 4 / 6,
            head_per_target=self.head_per_target * 4 / 6,
            is_frozen=True,
        )

    def with_recomputation(self, recomputation: Recomputation) -> "CostModel":
        """FLOPs that the hardware runs, with a fused attention kernel: model FLOPs and what is computed again.

        The backward of such a kernel computes the scores anew, 5 products for the 2 of its forward: 7 for 6 without any
        recomputation of layers. Layers that are run again add a forward: 8 for 6 of the linear part (6 for 4 of
        frozen weights), and 9 for 6 of attention unless its result was kept. The head is not run again.
        """
        again, attention = {"none": (0, 7), "all_but_attention": (2, 7), "full": (2, 9)}[recomputation]
        products = 4 if self.is_frozen else 6
        return replace(
            self,
            linear_per_token=self.linear_per_token * (products + again) / products,
            attention_per_pair=self.attention_per_pair * attention / 6,
            windowed_per_pair=self.windowed_per_pair * attention / 6,
        )


# Where nothing is known of a model: as much as there are tokens.
BY_TOKENS = CostModel(linear_per_token=1.0)


def attended_pairs(lengths: NDArray[np.integer] | Sequence[int], window: int | None) -> Float64:
    """[num_samples] pairs (token, token it attends to) of causal attention: Σ_i min(i, window) for i = 1 … l."""
    sizes = np.asarray(lengths, np.float64)
    inner = sizes if window is None else np.minimum(sizes, window)
    return np.asarray(inner * (inner + 1) / 2 + (sizes - inner) * inner)


def cost_of_model(model_config: Mapping[str, Any]) -> CostModel:
    """By the content of a model's config.json, or transformers' `config.to_dict()`.

    Raises ValueError that names what is missing or not understood.
    """
    fields = model_config.get("text_config") or model_config
    for name in _UNKNOWN:
        if fields.get(name):
            raise ValueError(f"{name} is not understood")
    hidden = _integer(fields, "hidden_size", "n_embd", "d_model", "dim")
    num_layers = _integer(fields, "num_hidden_layers", "n_layer", "num_layers", "n_layers")
    num_heads = _integer(fields, "num_attention_heads", "n_head", "n_heads")
    head_size = _integer(fields, "head_dim", default=hidden // num_heads)
    num_matrices = 2 if fields.get("model_type") in _UNGATED else 3
    windows = _windows(fields, num_layers)
    layers = []
    for number in range(num_layers):
        mlp_size, num_experts = _mlp(fields, number, hidden)
        layers.append(
            DecoderLayer(
                hidden_size=hidden,
                query_size=num_heads * head_size,
                key_value_size=_integer(fields, "num_key_value_heads", default=num_heads) * head_size,
                mlp_size=mlp_size,
                num_mlp_matrices=num_matrices,
                num_experts=num_experts,
                window=windows[number],
            )
        )
    is_causal = fields.get("model_type") not in _ENCODERS or bool(fields.get("is_decoder"))
    return CostModel.of_layers(layers, vocab_size=_integer(fields, "vocab_size"), is_causal=is_causal)


def _mlp(fields: Mapping[str, Any], number: int, hidden: int) -> tuple[int, int]:
    """(intermediate size that a token passes through, outputs of the router) of one layer."""
    num_experts = _integer(fields, "num_experts", "num_local_experts", "n_routed_experts", default=0)
    is_dense = (
        number < (fields.get("first_k_dense_replace") or 0)
        or number in (fields.get("mlp_only_layers") or ())
        or (number + 1) % (fields.get("decoder_sparse_step") or 1) != 0
    )
    if not num_experts or is_dense:
        default = 4 * hidden if fields.get("model_type") in _UNGATED else None
        return _integer(fields, "intermediate_size", "n_inner", "ffn_dim", "hidden_dim", default=default), 0
    expert_size = _integer(fields, "moe_intermediate_size", "intermediate_size")
    shared = (fields.get("n_shared_experts") or 0) * expert_size
    shared += fields.get("shared_expert_intermediate_size") or 0
    active = _integer(fields, "num_experts_per_tok", "experts_per_token")
    # The gate of a shared expert is one more output beside the router's.
    return active * expert_size + shared, num_experts + ("shared_expert_intermediate_size" in fields)


def _windows(fields: Mapping[str, Any], num_layers: int) -> list[int | None]:
    """[num_layers] the sliding window of each layer, None where it attends to all before it.

    Old files name one window and leave it to the model type which layers have it.
    """
    window = fields.get("sliding_window")
    if kinds := fields.get("layer_types"):
        if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
            raise ValueError(f"layer_types: {', '.join(sorted(unknown))} is not understood")
        is_windowed = [kind == "sliding_attention" for kind in kinds]
    elif window is None or fields.get("use_sliding_window") is False:
        is_windowed = [False] * num_layers
    elif fields.get("use_sliding_window"):
        is_windowed = [number >= (fields.get("max_window_layers") or 0) for number in range(num_layers)]
    else:
        every = fields.get("sliding_window_pattern") or _FULL_ATTENTION_EVERY.get(fields.get("model_type", ""), 0)
        if not isinstance(every, int):
            raise ValueError(f"sliding_window_pattern: {every!r} is not understood")
        is_windowed = [not every or (number + 1) % every != 0 for number in range(num_layers)]
    if len(is_windowed) != num_layers:
        raise ValueError(f"layer_types names {len(is_windowed)} layers of {num_layers}")
    if any(is_windowed):
        window = _integer(fields, "sliding_window")
    return [window if windowed else None for windowed in is_windowed]


def _integer(fields: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    """The first of these fields that is there and not null."""
    for name in names:
        if fields.get(name) is not None:
            value = fields[name]
            if isinstance(value, bool) or not isinstance(value, int) or value < (default != 0):
                raise ValueError(f"{name} is {value!r}, not a number of things")
            return value
    if default is None:
        raise ValueError(f"{names[0]} is missing")
    return default
