"""A prediction head with parameters ω beside the language model's own head: both read the same last hidden states.

In: a causal language model and a run file whose head.labels are known. Out: the same model with the linear `score` that
transformers' class for sequence classification of the family has, under the same name, and a `LabelHead` that answers
for every sample of a packed row with it. The backbone is computed once; its last hidden states go to both heads.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sft_dist.config import RunConfig
from sft_dist.errors import ConfigError, say
from sft_dist.model import classifier, loading, zero
from sft_dist.model.batch import Batch
from sft_dist.model.fused_head import TokenValues
from sft_dist.model.stored import StoredTensors

PREFIX = "score."  # of the names of ω


@dataclass(frozen=True, slots=True)
class Shape:
    """What the family's class for sequence classification has behind its backbone."""

    in_features: int
    num_outputs: int
    has_bias: bool
    padding: int | None  # id of the token that it looks past


def find_shape(config: RunConfig, model_config: Any) -> Shape:
    """The shape of ω. Raises ConfigError for encoders, and for families whose class has no linear `score`.

    To be called before transformers is told to shard: it builds the class, without memory.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    path = config.model.path
    check_decoder(config, model_config)
    if type(model_config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ConfigError(
            f"model.path: {path}: transformers has no class for sequence classification of {model_config.model_type}, "
            "so no head beside the language model's (head.language_model_weight) could be exported"
        )
    labelled = classifier.configuration(config, deepcopy(model_config))
    with torch.device("meta"):
        model = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(model_config)](labelled)
    score = getattr(model, "score", None)
    inside = f"{model.base_model_prefix}."
    others = [n for n, _ in model.named_parameters() if not n.startswith((inside, PREFIX))]
    if not isinstance(score, nn.Linear) or others:
        raise ConfigError(
            f"model.path: {path}: the head of {type(model).__name__} is no single linear `score`; it is not known "
            "beside a language model (head.language_model_weight)"
        )
    padding = labelled.get_text_config().pad_token_id
    return Shape(score.in_features, score.out_features, score.bias is not None, padding)


def check_decoder(config: RunConfig, model_config: Any) -> None:
    """Raise ConfigError for a model that is no language model from left to right."""
    if classifier.is_encoder(model_config):
        raise ConfigError(
            f"head.language_model_weight: {config.model.path} is an encoder ({model_config.model_type}), which reads "
            "in both directions and has no language model to train beside a head; set it to 0, or take a decoder"
        )


def attach(causal_lm: Any, shape: Shape, config: RunConfig, *, is_main: bool) -> "LabelHead":
    """Give a model its ω, whose values follow from the seed or are those in the model's files.

    They are sharded if the model is, and this is a collective then. Raises ConfigError for a head of other labels.
    """
    if hasattr(causal_lm, PREFIX.removesuffix(".")):
        raise ConfigError(f"model.path: {type(causal_lm).__name__} has a part of the name `score` already")
    reference = next(causal_lm.parameters())
    causal_lm.score = nn.Linear(shape.in_features, shape.num_outputs, bias=shape.has_bias, dtype=causal_lm.dtype)
    causal_lm.score.to(reference.device)
    zero.shard_new(causal_lm)
    names = [PREFIX + name for name, _ in causal_lm.score.named_parameters()]
    stored = StoredTensors(loading.folder_of(config.model.path))
    is_new = not any(name in stored.shapes for name in names)
    if is_new:
        classifier.initialise(causal_lm, names, config.seed)
    else:
        _continue(causal_lm, names, stored, config)
    stored.close()
    if is_main:
        what = f"new parameters ω: {', '.join(names)}" if is_new else "the one in its files is continued"
        say(f"a head for {shape.num_outputs:,} output(s) beside that of {type(causal_lm).__name__}; {what}")
    return LabelHead(causal_lm.score, frozenset(names), shape.padding, config.head.kind)


def say_left_out(config: RunConfig) -> None:
    """Say it where a run without such a head starts from a folder with one."""
    stored = StoredTensors(loading.folder_of(config.model.path))
    if names := sorted(name for name in stored.shapes if name.startswith(PREFIX)):
        say(f"{config.model.path}: a prediction head beside the language model's is left out: {', '.join(names)}")
    stored.close()


def _continue(causal_lm: Any, names: list[str], stored: StoredTensors, config: RunConfig) -> None:
    known = list(causal_lm.config.id2label.values())
    if known != list(config.head.labels):
        raise ConfigError(
            f"model.path: {config.model.path}: its head beside the language model's has {len(known)} labels "
            f"({', '.join(map(str, known[:5]))} ...), head.labels are others; give those of the head, or a model "
            "without one"
        )
    parameters = dict(causal_lm.named_parameters())
    for name in names:
        shape = tuple(getattr(parameters[name], "ds_shape", parameters[name].shape))
        if stored.shapes.get(name) != shape:
            raise ConfigError(
                f"model.path: {config.model.path}: its head beside the language model's has no {name} of the shape "
                f"{shape} (there is {stored.shapes.get(name)}); give a whole model folder, or one without a head"
            )
        value = torch.empty(stored.shapes[name])
        stored.read(name, value.view(-1), start=0)
        with torch.no_grad():
            zero.write(parameters[name], value)


def without_head(values: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Of parameters by name those of the language model."""
    return (item for item in values if not item[0].startswith(PREFIX))


class LabelHead:
    """Answers for the samples of a row from their last hidden states. Holds no parameters: `score` is the model's."""

    def __init__(self, score: nn.Linear, omega: frozenset[str], padding: int | None, kind: str) -> None:
        self.omega = omega  # names of its parameters in the model
        self._score = score
        self._padding = padding
        self._kind = kind

    def answered(self, values: TokenValues, hidden: Tensor, batch: Batch, *, with_loss: bool) -> TokenValues:
        """`values` with the logits of all samples, from hidden [T, D], and with Σ W ℓ over the labels there are.

        Every forward calls the head, also one without any sample or label: under ZeRO-3 each call is a collective.
        """
        rows = classifier.last_tokens(batch.input_ids[0], batch.cu_seqlens, self._padding)
        logits: Tensor = self._score(hidden.index_select(0, rows))  # [n, C]
        logits = logits if logits.dtype is torch.float64 else logits.float()
        loss = None
        if with_loss and batch.labels is not None and batch.label_weights is not None and batch.label_rows is not None:
            losses = classifier.label_losses(self._kind, logits.index_select(0, batch.label_rows), batch.labels)
            loss = (losses * batch.label_weights).sum()
        elif with_loss:
            loss = logits[:0].sum()
        return values._replace(logits=logits.detach(), label_loss=loss)
