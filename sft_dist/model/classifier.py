"""A prediction head with parameters ω on a pre-trained backbone: the class that transformers has for it, packed.

In: a run file whose head.labels are known. Out: a model of transformers' AutoModelForSequenceClassification, sharded
when model/engine.py has announced it, and a wrapper that answers for every sample of a packed row. Everything after the
encoder is computed by the class's own code, which sees each sample as its first token alone; of decoders the score of
each sample's last token is taken, as the class does. `probe.check` compares with the class's own forward.
"""

import fnmatch
import hashlib
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sft_dist.config import HeadConfig, RunConfig
from sft_dist.errors import ConfigError, say
from sft_dist.model import attention, bidirectional, loading, zero
from sft_dist.model.batch import Batch
from sft_dist.model.fused_head import LossTerms, TokenValues

_PROBLEM_TYPES = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
# Encoders whose tokens learn where they are from position ids alone, and of others through attention alone: packed,
# their samples are exact. A new head's small logits say too little of a small leak, so others are refused by name.
_PACKED_ENCODERS = {
    *("albert", "bert", "camembert", "data2vec-text", "distilbert", "electra", "ernie", "roberta", "xlm-roberta"),
}
_INIT_STD = 0.02  # of ω, where config.json has no initializer_range
_NAMED = 5


def is_encoder(model_config: Any) -> bool:
    """Whether a model of this configuration reads in both directions."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return model_config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        model_config, "is_decoder", False
    )


def configuration(config: RunConfig, model_config: Any) -> Any:
    """The model's configuration with the head's labels, kind and padding; `model_config` is changed."""
    names = config.head.labels
    model_config.num_labels = len(names)
    model_config.id2label = dict(enumerate(names))
    model_config.label2id = {name: number for number, name in enumerate(names)}
    model_config.problem_type = _PROBLEM_TYPES[config.head.kind]
    if getattr(model_config, "pad_token_id", None) is None:
        from sft_dist.data.tokenizer import load_tokenizer

        # Decoders find the last token of each sample by it, and refuse batches without one.
        model_config.pad_token_id = load_tokenizer(config.model).pad_token_id
    return model_config


def choose_attention(config: RunConfig, model_config: Any, *, dtype: torch.dtype) -> attention.Choice:
    """The kernel that keeps the samples of a row apart. Raises ConfigError for models that cannot be packed."""
    if not is_encoder(model_config):
        return attention.choose_attention(
            model_config,
            config.model.attention,
            config.data.max_length,
            device_type=loading.device_type(),
            dtype=dtype,
        )
    if model_config.model_type not in _PACKED_ENCODERS:
        raise ConfigError(
            f"model.path: {model_config.model_type} is not known to keep the samples of a pack apart; these do: "
            f"{', '.join(sorted(_PACKED_ENCODERS))}"
        )
    if config.model.attention != "auto":
        raise ConfigError(
            f"model.attention: {config.model.attention} attends to what comes before a token only; an encoder "
            f"({model_config.model_type}) needs model.attention: auto"
        )
    if config.model.compile:
        raise ConfigError("model.compile: not known for encoders, whose attention takes other lengths in every row")
    return attention.Choice(bidirectional.NAME)


def load(
    config: RunConfig, model_config: Any, *, dtype: torch.dtype, seed: int | None, is_main: bool
) -> tuple[Any, frozenset[str]]:
    """The pre-trained backbone with a new head, and the names of ω: values follow from `seed` on any number of ranks.

    A folder that has a head for exactly these labels keeps it. Without a seed nothing may be new. Raises ConfigError
    for new parameters inside the backbone, and for a head of other labels.
    """
    from transformers import AttentionInterface, AutoModelForSequenceClassification
    from transformers.utils import logging

    attention.register()
    AttentionInterface.register(bidirectional.NAME, bidirectional.attention)
    before = list(model_config.id2label.values())
    chosen = choose_attention(config, model_config, dtype=dtype)
    if seed is not None:
        torch.manual_seed(seed % 2**63)
    path = config.model.path
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what is new and what is discarded is said below, once
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            path,
            config=configuration(config, model_config),
            dtype=dtype,
            attn_implementation=chosen.name,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=config.model.trust_remote_code,
            use_safetensors=None if config.model.trust_remote_code else True,
        )
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"model.path: {path}: no model with a head can be loaded: {first_line}") from error
    finally:
        logging.set_verbosity(verbosity)
    mismatched = [item[0] if isinstance(item, tuple) else item for item in report.get("mismatched_keys") or ()]
    new = sorted({*report["missing_keys"], *mismatched})
    discarded = sorted(report["unexpected_keys"])
    _check_new(config, model, new, discarded, may_start_new=seed is not None)
    inside = f"{model.base_model_prefix}."
    omega = [name for name, _ in model.named_parameters() if not name.startswith(inside)]
    # The outputs are the last layer; of what stands before it, a part may be new all the same.
    outputs = {name for name in omega if name.rpartition(".")[0] == omega[-1].rpartition(".")[0]}
    if not outputs <= set(new) and before != list(config.head.labels):
        raise ConfigError(
            f"model.path: {path}: its head has {len(before)} labels ({', '.join(before[:_NAMED])} ...), head.labels "
            f"are others ({', '.join(config.head.labels[:_NAMED])} ...); give those of the head, or a model without one"
        )
    if seed is not None:
        initialise(model, new, seed)
    if is_main:
        what = f"new parameters ω: {', '.join(new)}" if new else "the head in its files is continued"
        say(f"{type(model).__name__} for {len(config.head.labels):,} output(s); {what}")
        if others := sorted({*discarded, *mismatched}):
            named = ", ".join(others[:_NAMED]) + (" ..." if len(others) > _NAMED else "")
            say(f"discarded of {path}, as the head of its pre-training: {named}")
    _check_positions(config, model)
    return model, frozenset({*omega, *new})


def _check_new(
    config: RunConfig, model: Any, new: Sequence[str], discarded: Sequence[str], *, may_start_new: bool
) -> None:
    """Raise ConfigError for parameters that would be random inside the backbone, or be lost from it."""
    path = config.model.path
    # Files of a backbone alone have names without its prefix.
    parts = {model.base_model_prefix, *(name for name, _ in model.base_model.named_children())}

    def of_backbone(names: Sequence[str]) -> list[str]:
        inside = [name for name in names if name.split(".")[0] in parts]
        return [name for name in inside if "pooler" not in name.split(".") and not name.endswith("position_ids")]

    if new and not may_start_new:
        raise ConfigError(
            f"model.path: {path}: {len(new)} parameter(s) are not in its files: {', '.join(new[:_NAMED])}"
        )
    allowed = config.model.allow_new_parameters
    if refused := [name for name in of_backbone(new) if not any(fnmatch.fnmatch(name, p) for p in allowed)]:
        raise ConfigError(
            f"model.path: {path}: {len(refused)} parameter(s) of the backbone are not in its files and would start at "
            f"random: {', '.join(refused[:_NAMED])}; name them in model.allow_new_parameters if that is meant"
        )
    if lost := of_backbone(discarded):
        raise ConfigError(
            f"model.path: {path}: its files hold {len(lost)} parameter(s) of the backbone that the model has no place "
            f"for: {', '.join(lost[:_NAMED])}"
        )


def initialise(model: Any, new: Sequence[str], seed: int) -> None:
    """Give new parameters values that follow from (seed, name): matrices normal, biases 0, other vectors 1.

    transformers draws them in the order in which it comes to them, under ZeRO-3 on one rank.
    """
    std = getattr(model.config, "initializer_range", None) or _INIT_STD
    parameters = dict(model.named_parameters())
    for name in new:
        parameter = parameters[name]
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if zero.is_vector(parameter):
            value = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        else:
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            value = torch.randn(shape, generator=generator) * std
        with torch.no_grad():
            zero.write(parameter, value)


def _check_positions(config: RunConfig, model: Any) -> None:
    context = getattr(model.config, "max_position_embeddings", None)
    first = _first_position(model)
    if context is not None and first and config.data.max_length + first > context:
        raise ConfigError(
            f"data.max_length ({config.data.max_length:,}) is longer than the model's context ({context - first:,}: "
            f"{context:,} positions, of which the first {first} stand for padding)"
        )


def _first_position(model: nn.Module) -> int:
    """The position of the first token: some families count from behind the one of padding."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def with_head_rate(
    groups: list[dict[str, Any]], causal_lm: Any, omega: Set[str], config: RunConfig
) -> list[dict[str, Any]]:
    """Parameter groups with ω apart where it has a learning rate of its own: `lr_factor` times that of the rest.

    `omega`: its names.
    """
    if config.head.learning_rate is None:
        return groups
    own = {id(p) for name, p in causal_lm.named_parameters() if name in omega}
    factor = config.head.learning_rate / config.optimizer.learning_rate
    split = [
        group
        | {
            "params": [p for p in group["params"] if (id(p) in own) == is_own],
            "lr_factor": group.get("lr_factor", 1.0) * factor**is_own,
        }
        for group in groups
        for is_own in (False, True)
    ]
    return [group for group in split if group["params"]]


class Classifier(nn.Module):
    """A model with a head that answers for every sample of a batch, each as if it were alone."""

    def __init__(self, model: Any, omega: frozenset[str], head: HeadConfig, layers: Sequence[nn.Module]) -> None:
        """`omega`: names of the head's parameters; `layers`: the backbone's repeated blocks, as model/layers.py finds
        them. Raises ConfigError.
        """
        super().__init__()
        self.model = model
        self.omega = omega
        self._kind = head.kind
        self._frozen = [model.base_model] if head.freeze_backbone else []  # a list: no second name of its parameters
        if head.freeze_backbone:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in omega)
        self._is_encoder = is_encoder(model.config)
        self._stack = [_stack_of(model, layers)] if self._is_encoder else []
        self._first_position = _first_position(model)
        self._has_types = (getattr(model.config, "type_vocab_size", 0) or 0) > 1
        if not self._is_encoder and not isinstance(getattr(model, "score", None), nn.Linear):
            raise ConfigError(f"model.path: {type(model).__name__} has no linear `score`; its head is not known here")

    def train(self, mode: bool = True) -> "Classifier":
        """As of every module, but a frozen backbone never draws dropout."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def forward(self, batch: Batch, *, with_details: bool = False, loss: LossTerms | None = None) -> TokenValues:
        """Logits of the batch's samples [n, C]; with their labels −ℓ as `logprob` and whether the answer is right.

        With `loss` also Σ w ℓ. Of a batch without labels there are logits only, and a loss of 0.
        """
        logits = self._encoder(batch) if self._is_encoder else self._decoder(batch)
        logits = logits if logits.dtype is torch.float64 else logits.float()
        if batch.labels is None or batch.label_weights is None:
            none = logits[:0, 0].detach()
            return TokenValues(none, none, logits.sum() * 0, logits.detach())
        losses = label_losses(self._kind, logits, batch.labels)  # [n]
        total = (losses * batch.label_weights).sum() if loss is not None else None
        is_top = _is_right(self._kind, logits, batch.labels).to(logits.dtype) if with_details else None
        return TokenValues(-losses.detach(), is_top, total, logits.detach())

    def _row(self, batch: Batch) -> dict[str, Any]:
        row = {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids + self._first_position,
            "cu_seqlens": batch.cu_seqlens,
            "host_cu_seqlens": batch.host_cu_seqlens,
            "max_seqlen": batch.max_length,
        }
        if self._has_types:
            row["token_type_ids"] = (
                torch.zeros_like(batch.input_ids) if batch.token_types is None else batch.token_types
            )
        return row

    def _encoder(self, batch: Batch) -> Tensor:
        with _first_tokens(self._stack[0], batch.cu_seqlens[:-1]):
            logits: Tensor = self.model(**self._row(batch)).logits  # [n, C]
        return logits

    def _decoder(self, batch: Batch) -> Tensor:
        hidden = self.model.base_model(**self._row(batch), use_cache=False).last_hidden_state  # [1, T, D]
        rows = last_tokens(batch.input_ids[0], batch.cu_seqlens, self.model.config.get_text_config().pad_token_id)
        logits: Tensor = self.model.score(hidden[0].index_select(0, rows))
        return logits


def label_losses(kind: str, logits: Tensor, labels: Tensor) -> Tensor:
    """ℓ of each sample, [n], from logits [n, C] and labels [n, width]; docs/objective.md, "A prediction head".

    −log softmax(logits)_c of the label c; the mean over outputs of −log σ(±logit); or of (logit − value)²: the losses
    of transformers' sequence classification, one sample at a time.
    """
    match kind:
        case "single_label":
            return F.cross_entropy(logits, labels[:, 0].long(), reduction="none")
        case "multi_label":
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(-1)
        case "regression":
            return (logits - labels.to(logits.dtype)).square().mean(-1)
    raise AssertionError(kind)


def _is_right(kind: str, logits: Tensor, labels: Tensor) -> Tensor:
    """bool [n]: the likeliest label is the right one; all labels are right; of numbers, which never are, False."""
    match kind:
        case "single_label":
            return logits.argmax(-1) == labels[:, 0]
        case "multi_label":
            return ((logits > 0) == (labels > 0)).all(-1)
    return torch.zeros(len(logits), dtype=torch.bool, device=logits.device)


def last_tokens(ids: Tensor, cu_seqlens: Tensor, padding: int | None) -> Tensor:
    """int64 [n]: where the last token of each sample lies in the row [T] that is not the one of padding.

    The first token where all are: so transformers' classes choose (GenericForSequenceClassification.forward).
    """
    first, last = cu_seqlens[:-1].long(), cu_seqlens[1:].long() - 1
    if padding is None:
        return last
    places = torch.arange(len(ids), device=ids.device)
    sample = torch.bucketize(places, cu_seqlens[1:].long(), right=True)  # [T]
    found = torch.where(ids == padding, -1, places)
    latest = torch.full_like(last, -1).scatter_reduce(0, sample, found, "amax")
    return torch.where(latest < 0, first, latest)


def _stack_of(model: Any, layers: Sequence[nn.Module]) -> nn.Module:
    """The module whose forward runs all layers: what comes after it is the class's own business."""
    for module in model.base_model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) and layers and child[0] is layers[0]:
                return module
    raise ConfigError(f"model.path: no stack of layers is found in {type(model).__name__}; it cannot be packed")


@contextmanager
def _first_tokens(stack: nn.Module, rows: Tensor) -> Iterator[None]:
    """Within, what follows the encoder sees the first token of each sample as a sample of its own: [n, 1, D]."""

    def pick(module: nn.Module, arguments: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state  # [1, T, D]
        first = hidden[0].index_select(0, rows)[:, None]
        if isinstance(output, tuple):
            return (first, *output[1:])
        output.last_hidden_state = first
        return output

    hook = stack.register_forward_hook(pick)
    try:
        yield
    finally:
        hook.remove()
