"""The run file: one YAML, read into one frozen value that nothing writes to afterwards.

In: a path and `section.key=value` overrides. Out: a `RunConfig`, or one ConfigError that lists every
mistake with the nearest key. Never imports torch, and never reads data or models.
"""

import datetime
import difflib
import glob
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from sft_dist.errors import ConfigError
from sft_dist.runfile import apply_override, read_yaml


def _as_sources(value: Any) -> Any:
    """A path alone, or a list of paths, stands for sources with the defaults."""
    values = value if isinstance(value, (list, tuple)) else (value,)
    return tuple({"path": item} if isinstance(item, str) else item for item in values)


# Variables that transformers, or the renderer, gives to the template itself.
_RESERVED = (
    *("messages", "conversation", "tools", "documents", "chat_template", "tokenize", "tokenizer_kwargs"),
    *("add_generation_prompt", "continue_final_message", "padding", "truncation", "max_length", "sft_dist_today"),
)


def _check_variables(variables: dict[str, Any]) -> dict[str, Any]:
    reserved = [name for name in variables if name in _RESERVED or name.startswith("return_")]
    if reserved:
        raise ValueError(f"{', '.join(reserved)}: not a variable of the template that can be set here")
    for name, value in variables.items():
        _check_json(value, name)
    return variables


def _check_json(value: Any, name: str) -> None:
    """Raise ValueError for what YAML can say and JSON cannot."""
    if isinstance(value, (list, tuple)):
        for place, item in enumerate(value):
            _check_json(item, f"{name}[{place}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{name}: the key {key} is {type(key).__name__}, not text; quote it")
            _check_json(item, f"{name}.{key}")
    elif not (value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))):
        raise ValueError(f"{name}: {value} is {type(value).__name__}, which JSON does not have; quote it")


Variables = Annotated[dict[str, Any], AfterValidator(_check_variables)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class ModelConfig(Section):
    path: str
    """Folder or Hub id of the pre-trained model θ̂: config, safetensors, tokenizer."""
    init_from: str | None = None
    """Run folder whose newest checkpoint gives the initial weights (weights only, step starts at 0)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of forward and backward; auto: bfloat16 on GPU (fp32 master weights), float32 on CPU."""
    attention: Literal["auto", "split", "varlen", "flash", "sdpa", "eager"] = "auto"
    """Attention kernel; auto: on GPU varlen (torch's own) or flash (an installed flash-attn), on CPU and for what they
    lack split (conversation by conversation), else transformers' masked kernels sdpa and eager."""
    gradient_checkpointing: bool = True
    """Recompute each layer in the backward pass: less memory, about a third more work."""
    compile: bool = False
    """Compile each decoder layer (torch.compile): a minute at the start, fewer and faster kernels after it. Where a
    model has attention dropout, attention stays outside the graphs."""
    allow_new_parameters: tuple[str, ...] = ()
    """Name patterns (fnmatch) of parameters that may be absent in the pre-trained files and start at random."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Recorded in every checkpoint when on."""
    control_tokens: tuple[str, ...] = ()
    """Control tokens that the template uses and the tokenizer lacks; their embeddings start at the mean of all."""
    freeze: tuple[str, ...] = ()
    """Name patterns (fnmatch) of parameters that are not trained, such as `*embed_tokens*` or `model.layers.[0-7].*`;
    nothing of the optimizer is kept for them."""


class AdapterConfig(Section):
    kind: Literal["none", "lora", "dora"] = "none"
    """What is trained: none: all parameters; lora: low-rank matrices beside the linear layers of a frozen model (Hu et
    al. 2021); dora: those, and the norm of the weights of every output (Liu et al. 2024)."""
    rank: Annotated[int, Field(ge=1)] = 16
    """Rank of the update of each adapted matrix."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The update is scaled by alpha / rank."""
    rank_stabilised: bool = False
    """Scale by alpha / sqrt(rank) instead, so that high ranks learn as fast (rsLoRA, Kalajdzievski 2023)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that is dropped while training."""
    targets: tuple[str, ...] = ()
    """Name patterns (fnmatch, such as "*.q_proj") of the linear layers to adapt; none: all in the decoder layers."""
    quantise: Literal["none", "nf4"] = "none"
    """Hold the frozen weights of linear layers in 4 bits (QLoRA, Dettmers et al. 2023); needs bitsandbytes."""

    @model_validator(mode="after")
    def _says_its_kind(self) -> "AdapterConfig":
        if self.model_fields_set and "kind" not in self.model_fields_set:
            raise ValueError("kind is missing; lora or dora (none trains all parameters of the model)")
        return self


RecordFormat = Literal[
    "auto", "messages", "prompt_completion", "alpaca", "sharegpt", "text", "tokens", "labelled", "labelled_chat"
]


class SourceConfig(Section):
    path: str
    """File, glob pattern, Arrow folder or Hub id (owner/name[:split])."""
    name: str | None = None
    """Name in every statistic; default: the Hub id, or the file name without suffixes (of `logs/*.jsonl`: logs)."""
    format: RecordFormat = "auto"
    """What a record is; auto: told by the fields of the first records, and said."""
    repeat: Annotated[float, Field(ge=0)] = 1.0
    """How often an epoch holds each conversation; 0.5: a random half, drawn anew; 2.5: all twice, half thrice."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Factor of the loss of this source's conversations."""


Sources = Annotated[tuple[SourceConfig, ...], BeforeValidator(_as_sources)]


class DataConfig(Section):
    train: Sources = ()
    """Sources of training conversations: paths, or path with name, format, repeat, weight."""
    heldout: Sources = ()
    """Sources of held-out conversations, for evaluation and for choosing the best checkpoint."""
    retention: Sources = ()
    """Sources (conversations or text) that tell what is forgotten: scored at every evaluation, never trained on."""
    chat_template: str | None = None
    """Jinja file that replaces the tokenizer's chat template, or `chatml` for the one that ships."""
    template_kwargs: Variables = {}
    """Variables given to the chat template, such as enable_thinking: false."""
    date: datetime.date = datetime.date(2025, 1, 1)
    """Today, as the template sees it: data must not depend on the day they are prepared."""
    max_length: Annotated[int, Field(ge=2)] = 2048
    """Tokens of a pack, and of the longest sample."""
    overflow: Literal["drop", "truncate_turns", "error"] = "drop"
    """Samples longer than max_length: leave out; keep the turns that fit whole (text: cut into windows); or stop."""
    on_bad_record: Literal["error", "refuse"] = "error"
    """What to do with records that cannot be converted: stop; or leave out, counted and listed."""
    max_refused: Fraction = 0.1
    """With on_bad_record: refuse, a larger share of refused records than this stops all the same."""
    deduplicate: bool = False
    """Train on exactly equal conversations only once, also across sources; counted."""
    cache_dir: str = "prepared"
    """Where prepared data sets live, one folder per content; safe to share between runs."""
    num_processes: Annotated[int, Field(ge=0)] = 0
    """Processes that tokenise; 0: one per available core. The result is the same for any number."""


class ObjectiveConfig(Section):
    train_on: Literal["assistant", "last_assistant", "all", "marked"] = "assistant"
    """Which tokens are targets: assistant turns, the last one, every token, or messages with train: true."""
    normalise: Literal["token", "turn", "conversation"] = "token"
    """What counts once in the mean of a step: each target token (maximum likelihood), turn or conversation."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each target's probability that is spread evenly over the vocabulary."""
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Coefficient of log^2 of the softmax normaliser, added to each target's loss."""
    neftune_alpha: Annotated[float, Field(ge=0)] = 0.0
    """Uniform noise on input embeddings while training, of size alpha / sqrt(tokens of the sample x width)."""


def _as_names(value: Any) -> Any:
    """Labels may be written as numbers."""
    if not isinstance(value, (list, tuple)):
        return value
    return tuple(str(item) if isinstance(item, int) and not isinstance(item, bool) else item for item in value)


class HeadConfig(Section):
    kind: Literal["none", "single_label", "multi_label", "regression"] = "none"
    """A prediction head in the place of the language model's: one of several labels, any of several labels, or numbers;
    none: language modelling. Records are then texts, pairs of texts or messages with a `label`."""
    language_model_weight: Annotated[float, Field(ge=0)] = 0.0
    """Above 0 the head stands beside the language model's: conversations with a `label`, answers or both are trained in
    the same steps, and this is the factor of the language model's loss; 0: in its place."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Factor of the head's own loss, with language_model_weight above 0."""
    labels: Annotated[tuple[str, ...], BeforeValidator(_as_names)] = ()
    """Names of the head's outputs in the order of their ids; empty: those of the training data, sorted."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of the head's own parameters; default: optimizer.learning_rate."""
    freeze_backbone: bool = False
    """Train the head alone: all pre-trained parameters stay as they are, and the backbone runs without dropout."""

    @model_validator(mode="after")
    def _labels_fit(self) -> "HeadConfig":
        if len(set(self.labels)) < len(self.labels):
            twice = next(name for name in self.labels if self.labels.count(name) > 1)
            raise ValueError(f"labels: {twice!r} is there twice")
        if "" in self.labels:
            raise ValueError("labels: one of them is empty")
        if self.kind == "none" and (self.labels or self.learning_rate is not None or self.freeze_backbone):
            raise ValueError("kind: none has no labels, learning_rate or freeze_backbone; set kind to single_label ...")
        if self.kind == "single_label" and len(self.labels) == 1:
            raise ValueError("labels: a choice needs at least two")
        if self.kind == "none" and self.language_model_weight:
            raise ValueError("language_model_weight: kind: none has no head beside; set kind to single_label ...")
        if self.weight != 1 and not self.language_model_weight:
            raise ValueError("weight: alone in a loss it changes nothing; it is for language_model_weight above 0")
        if self.is_beside and self.freeze_backbone:
            raise ValueError(
                "freeze_backbone: the language model that is to be trained beside (language_model_weight) would stay "
                "as it is; leave one of the two out, or freeze parts of it with model.freeze"
            )
        return self

    @property
    def is_beside(self) -> bool:
        """Whether the language model keeps its own head."""
        return self.kind != "none" and self.language_model_weight > 0

    @property
    def is_in_place(self) -> bool:
        """Whether there is no language model's head."""
        return self.kind != "none" and not self.is_beside


class BatchConfig(Section):
    global_packs: Annotated[int, Field(ge=1)] = 8
    """Packs of max_length tokens in one optimizer step, over all ranks. Accumulation is derived."""
    packs_per_micro_batch: Annotated[int, Field(ge=1)] = 1
    """Packs that one rank processes in one forward pass."""
    balance_steps: Annotated[int, Field(ge=1)] = 1
    """Steps whose packs are dealt to them by predicted cost: ranks wait less, lengths differ more between steps."""
    reduce_once: bool | Literal["auto"] = "auto"
    """Sum a step's gradient on each rank (4 bytes a parameter) and reduce it once; auto: where memory allows."""

    def micro_batches_on(self, num_ranks: int) -> int:
        """Forwards of one rank in a full step."""
        return -(-self.global_packs // (num_ranks * self.packs_per_micro_batch))


class OptimizerConfig(Section):
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Peak learning rate of AdamW. Adapters want about ten times that of full fine-tuning: with adapter.kind the
    default is 1e-4."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay of AdamW's first and second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's denominator term."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of matrices, toward zero; vectors (norms, biases) never decay. Toward θ̂: anchor.decay."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor d of the learning rate from each layer to the one below: the head learns at the full rate, the highest of
    n decoder layers at d times it, embeddings (a head tied to them, too) at d^(n + 1)."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Clip the global gradient norm to this; 0: no clipping."""


class AnchorConfig(Section):
    decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of all trained parameters toward θ̂, the weights at step 0 (L2-SP); 0: none."""
    kl: Annotated[float, Field(ge=0)] = 0.0
    """Coefficient of KL(p_θ̂ ‖ p_θ) over the whole vocabulary, added to each target's loss; 0: none. It takes a frozen
    copy of the model, sharded over the ranks, and one more forward; or kl_top_k."""
    kl_top_k: Annotated[int, Field(ge=1)] | None = None
    """Instead of the frozen copy, keep what θ̂ says: before the first step one forward over the training data writes its
    k likeliest tokens at every target below data.cache_dir, 8 k + 4 bytes a target. All others count as one, so this KL
    is a lower bound; it misses the mass that θ̂ has outside its k (its mean is said and recorded) times the KL there."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the copy of θ̂ that anchor.decay needs; auto: bfloat16 where that is exact, else float32."""
    device: Literal["host", "device"] = "host"
    """Where each rank keeps its part of that copy: in the host's memory, which is read every step, or in the GPU's.
    With anchor.kl the decay uses the frozen copy, and neither key counts."""
    drift: Literal["evaluations", "end", "never"] = "evaluations"
    """When to measure how far θ is from θ̂, by layer and kind of weight: after each evaluation, or at the end alone.
    Without anchor.decay θ̂ is read from its files each time, each rank its own part."""

    @property
    def needs_copy(self) -> bool:
        """Whether a frozen copy of the model answers to every batch."""
        return self.kl > 0 and self.kl_top_k is None


class ScheduleConfig(Section):
    name: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warmup."""
    epochs: Annotated[int, Field(ge=1)] = 1
    """Passes over the training data."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """End (and plan the schedule) after this many optimizer steps, if epochs would give more."""
    warmup_fraction: Fraction = 0.03
    """Share of the steps in which the learning rate rises linearly from 0."""
    final_fraction: Fraction = 0.1
    """Learning rate at the end, as a share of the peak (cosine and linear)."""


class CheckpointConfig(Section):
    every: Annotated[int, Field(ge=0)] = 100
    """Steps between checkpoints; 0: only at the end and when asked to stop."""
    keep: Annotated[int, Field(ge=1)] = 2
    """How many of the newest checkpoints to keep (the best one, and that which was resumed from, beside them)."""
    keep_gib: Annotated[float, Field(gt=0)] | None = None
    """Keep fewer where all would take more GiB than this; the newest, the best and that which was resumed from stay."""
    keep_best: bool = True
    """Keep the checkpoint with the lowest held-out NLL."""
    asynchronous: bool | Literal["auto"] = "auto"
    """Write while training goes on, from a copy in host memory; auto: where that takes at most half of what is free."""
    resume: str = "auto"
    """auto: newest valid checkpoint if any; must: fail without one; never: start anew; or a checkpoint folder."""
    stop_at_step: Annotated[int, Field(ge=1)] | None = None
    """Checkpoint and leave with code 75 after this step; the schedule is not changed by it."""
    stop_before_end_s: Annotated[float, Field(ge=0)] = 120.0
    """Save and leave with 75 when a Slurm job's time limit is nearer than this many seconds, one more step and a save
    together: the step as the longest so far, the save as the longest beside the steps and no less than that step."""
    allow_changed: tuple[str, ...] = ()
    """Fixed keys (config --explain) that may differ from the resumed checkpoint's run file all the same."""


class NumbersConfig(Section):
    non_finite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is no finite number is never taken: stop with code 70, or go on without it."""
    max_skipped: Annotated[int, Field(ge=0)] = 3
    """With non_finite: skip, how many steps of a run may be left out; at one more it stops with code 70."""
    spike: Literal["alarm", "rollback"] = "alarm"
    """A loss far above those before: say so; or go back to the last checkpoint of checkpoint.every and leave out all
    steps since then, that one included (before the first such checkpoint: say so)."""
    spike_window: Annotated[int, Field(ge=4)] = 50
    """How many losses before it a loss is compared with; fewer raise no alarm."""
    spike_threshold: Annotated[float, Field(gt=0)] = 10.0
    """Robust standard deviations (median absolute deviation) above the median of the window that are a spike."""
    max_rollbacks: Annotated[int, Field(ge=0)] = 2
    """With spike: rollback, how often a run may go back; at one spike more it stops with code 70."""


class EvaluateConfig(Section):
    every: Annotated[int, Field(ge=0)] = 100
    """Steps between evaluations on data.heldout and data.retention; 0: only before the first and after the last."""
    stop_at_retention_rise: Annotated[float, Field(gt=0)] | None = None
    """End the run, with a checkpoint and code 0, at an evaluation where the NLL of any source of data.retention has
    risen by more nats per token than this over step 0; such an evaluation gives no best checkpoint."""


class LoggingConfig(Section):
    tensorboard: bool = True
    """Write TensorBoard event files to RUN_DIR/tensorboard."""
    details_every: Annotated[int, Field(ge=0)] = 10
    """Steps between training metrics by source, turn, first and stop token; 0: never."""


class WatchdogConfig(Section):
    timeout_s: Annotated[float, Field(ge=0)] = 600.0
    """Seconds without progress on any rank (no phase begun, no collective entered) after which the run is given up with
    code 70 and the stuck ranks are named; the longest time without either is that of compiling or of writing a rank's
    files of a checkpoint. 0: never."""
    slow_ratio: Annotated[float, Field(ge=0)] = 1.5
    """Name ranks that work this many times as long as a typical other one while these wait for them; 0: never."""

    @model_validator(mode="after")
    def _room_for_beats(self) -> "WatchdogConfig":
        if 0 < self.timeout_s < 2:
            raise ValueError(f"timeout_s must be 0 or at least 2 seconds, got {self.timeout_s:g}")
        if 0 < self.slow_ratio <= 1:
            raise ValueError(f"slow_ratio must be 0 or above 1, got {self.slow_ratio:g}")
        return self


_ADAPTER_LEARNING_RATE = 1e-4


class RunConfig(Section):
    run_dir: str
    """Folder of this run: checkpoints, metrics, logs, outcome."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Order of the data, dropout and the start of new parameters follow from this and from nothing else."""
    model: ModelConfig
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    head: HeadConfig = HeadConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    anchor: AnchorConfig = AnchorConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    deepspeed: str = "auto"
    """DeepSpeed file: a path, or the name of one in ds_configs; auto: zero3 on GPU, cpu on CPU."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    numbers: NumbersConfig = NumbersConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    logging: LoggingConfig = LoggingConfig()
    watchdog: WatchdogConfig = WatchdogConfig()

    @model_validator(mode="before")
    @classmethod
    def _learning_rate_of_adapters(cls, tree: Any) -> Any:
        adapter, optimizer = (tree.get(name) or {} for name in ("adapter", "optimizer"))
        if isinstance(adapter, dict) and isinstance(optimizer, dict) and adapter.get("kind", "none") != "none":
            return tree | {"optimizer": {"learning_rate": _ADAPTER_LEARNING_RATE} | optimizer}
        return tree

    @model_validator(mode="after")
    def _adapters_start_from_files(self) -> "RunConfig":
        if self.adapter.kind != "none" and self.model.allow_new_parameters:
            raise ValueError(
                "model.allow_new_parameters: parameters that start at random would stay so: adapter.kind: "
                f"{self.adapter.kind} trains nothing but adapters"
            )
        return self

    @model_validator(mode="after")
    def _betas_below_one(self) -> "RunConfig":
        if max(self.optimizer.betas) >= 1.0:
            raise ValueError(f"optimizer.betas must be below 1, got {list(self.optimizer.betas)}")
        return self

    @model_validator(mode="after")
    def _decays_less_than_all(self) -> "RunConfig":
        if (share := self.optimizer.learning_rate * self.anchor.decay) >= 1.0:
            raise ValueError(
                f"anchor.decay times optimizer.learning_rate is the share of the way back to θ̂ that every step goes; "
                f"it must be below 1, got {share:g}"
            )
        return self

    @model_validator(mode="after")
    def _top_k_of_a_divergence(self) -> "RunConfig":
        if self.anchor.kl_top_k is not None and not self.anchor.kl:
            raise ValueError("anchor.kl_top_k: nothing is compared while anchor.kl is 0; set that, or leave this out")
        return self

    @model_validator(mode="after")
    def _adapters_leave_the_rest(self) -> "RunConfig":
        if self.adapter.kind != "none":
            for key, value in (("anchor.decay", self.anchor.decay), ("model.freeze", self.model.freeze)):
                if value:
                    raise ValueError(
                        f"{key}: the model is frozen already, but for its adapters (adapter.kind); leave it out"
                    )
        return self

    @model_validator(mode="after")
    def _labels_are_for_a_head(self) -> "RunConfig":
        for key in ("train", "heldout", "retention"):
            sources = getattr(self.data, key)
            if self.head.kind == "none" and any(s.format.startswith("labelled") for s in sources):
                raise ValueError(
                    f"data.{key}: format: labelled: a language model (head.kind: none) would learn the texts and not "
                    "their labels; set head.kind, or another format"
                )
        return self

    @model_validator(mode="after")
    def _head_knows_what_is_asked(self) -> "RunConfig":
        if self.head.kind == "none":
            return self
        if self.data.overflow == "truncate_turns":
            raise ValueError(
                "data.overflow: truncate_turns cuts texts that have one label (head.kind); use drop or error"
            )
        if self.head.is_beside:
            if self.adapter.kind != "none":
                raise ValueError(
                    "adapter.kind: not known with a head beside the language model's (head.language_model_weight); "
                    "leave it out"
                )
            return self
        for key in ("label_smoothing", "z_loss", "neftune_alpha"):
            if getattr(self.objective, key):
                raise ValueError(f"objective.{key}: not known with a head (head.kind: {self.head.kind}); leave it out")
        for key, is_asked in (
            ("model.control_tokens", self.model.control_tokens),
            ("model.freeze", self.model.freeze),
            ("adapter.kind", self.adapter.kind != "none"),
            ("data.retention", self.data.retention),
            ("anchor.decay", self.anchor.decay),
            ("anchor.kl_top_k", self.anchor.kl_top_k),
            ("anchor.kl", self.anchor.kl),
        ):
            if is_asked:
                raise ValueError(f"{key}: not known with a head (head.kind: {self.head.kind}); leave it out")
        return self

    @model_validator(mode="after")
    def _allowed_are_keys(self) -> "RunConfig":
        known = {key for key, _, _ in explain()} if self.checkpoint.allow_changed else set()
        for name in self.checkpoint.allow_changed:
            if name not in known:
                raise ValueError(f"checkpoint.allow_changed: {name}: no key of a run file; {_nearest(name)}")
        return self

    @model_validator(mode="after")
    def _rollback_needs_checkpoints(self) -> "RunConfig":
        if self.numbers.spike == "rollback" and not self.checkpoint.every:
            raise ValueError("numbers.spike: rollback goes back to checkpoints of checkpoint.every, which is 0 here")
        return self

    @model_validator(mode="after")
    def _retention_is_measured_where_it_stops(self) -> "RunConfig":
        if self.evaluate.stop_at_retention_rise is not None:
            if not self.data.retention:
                raise ValueError("evaluate.stop_at_retention_rise: data.retention is empty: nothing is measured")
            if not self.evaluate.every:
                raise ValueError("evaluate.stop_at_retention_rise: evaluate.every is 0: no step would be looked at")
        return self


# What a resumed run may change at will: files, layout, speed, what is kept and said; no sample, and no number beyond
# rounding and draws of dropout. Files are compared by content (train/contract.py). Any other key is fixed for a run.
_CHANGEABLE = (
    *("run_dir", "model.path", "model.init_from", "model.attention", "model.gradient_checkpointing", "model.compile"),
    *("model.allow_new_parameters", "model.trust_remote_code"),
    *("data.train", "data.heldout", "data.retention", "data.chat_template", "data.cache_dir", "data.num_processes"),
    *("data.on_bad_record", "data.max_refused"),
    *("batch.packs_per_micro_batch", "batch.reduce_once", "deepspeed", "anchor.device", "anchor.drift"),
    *("checkpoint.", "evaluate.", "logging.", "numbers.", "watchdog."),
)


def may_change(key: str) -> bool:
    """Whether a resumed run may have another value of a key than its checkpoint, without checkpoint.allow_changed."""
    return any(key.startswith(name) if name.endswith(".") else key == name for name in _CHANGEABLE)


# Keys people bring from other tools, and where that fact lives here.
TRANSLATIONS = {
    "per_device_train_batch_size": "batch.global_packs (the whole batch; accumulation is derived from it)",
    "gradient_accumulation_steps": "batch.global_packs (the whole batch; accumulation is derived from it)",
    "micro_batch_size": "batch.packs_per_micro_batch",
    "num_train_epochs": "schedule.epochs",
    "num_epochs": "schedule.epochs",
    "lr": "optimizer.learning_rate",
    "lr_scheduler_type": "schedule.name",
    "lr_scheduler": "schedule.name",
    "warmup_ratio": "schedule.warmup_fraction",
    "max_seq_length": "data.max_length",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "model_name_or_path": "model.path",
    "base_model": "model.path",
    "output_dir": "run_dir",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "resume_from_checkpoint": "checkpoint.resume",
    "eval_steps": "evaluate.every",
    "bf16": "model.dtype: bfloat16",
    "max_grad_norm": "optimizer.max_grad_norm",
    "layerwise_lr_decay": "optimizer.layer_decay",
    "llrd": "optimizer.layer_decay",
    "freeze_layers": "model.freeze (patterns over parameter names)",
    "unfrozen_parameters": "model.freeze (patterns of what is not trained)",
    "train_on_inputs": "objective.train_on: all",
    "packing": "nothing: packing is always on",
    "neftune_noise_alpha": "objective.neftune_alpha",
    "label_smoothing_factor": "objective.label_smoothing",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target": "adapter.targets",
    "target_modules": "adapter.targets",
    "use_dora": "adapter.kind: dora",
    "use_rslora": "adapter.rank_stabilised",
    "load_in_4bit": "adapter.quantise: nf4",
    "mask_history": "objective.train_on: last_assistant",
    "dataset_exact_deduplication": "data.deduplicate",
    "task": "head.kind (single_label, multi_label or regression; none: language modelling)",
    "problem_type": "head.kind (single_label, multi_label or regression; none: language modelling)",
    "num_labels": "head.labels (default: those of the training data)",
    "datasets": "data.train",
    "dataset": "data.train",
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file and apply `section.key=value` overrides (values are YAML).

    Raises ConfigError that lists every mistake at once.
    """
    run_file = Path(path)
    tree = read_yaml(run_file)
    for override in overrides:
        apply_override(tree, override)
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = [_describe(item) for item in error.errors()]
        raise ConfigError(f"{run_file}: " + "\n".join([f"{len(lines)} mistake(s) in the run file"] + lines)) from None
    return _resolve_paths(config, run_file.resolve().parent)


def explain() -> Iterator[tuple[str, str, str]]:
    """Yield (key, default, meaning) of every key of the run file, in the order of the schema."""
    yield from _explain(RunConfig, "")


def to_json(config: RunConfig) -> str:
    return json.dumps(config.model_dump(mode="json"), indent=2)


def to_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _section_of(annotation: Any) -> type[Section] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _explain(section: type[Section], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in section.model_fields.items():
        child = _section_of(field.annotation)
        if child is not None:
            yield from _explain(child, f"{prefix}{name}.")
            continue
        default = field.get_default(call_default_factory=True)
        shown = "required" if field.is_required() else json.dumps(default, default=str)
        yield f"{prefix}{name}", shown, field.description or ""
        if field.annotation == Sources or get_args(field.annotation)[:1] == (SourceConfig,):
            yield from _explain(SourceConfig, f"{prefix}{name}[].")


def _describe(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"  {key}: unknown key; {_nearest(key)}"
    if error["type"] == "missing":
        return f"  {key}: required, but missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    if not key:
        return f"  {message}"
    return f"  {key}: {message[0].lower()}{message[1:]} (got {error['input']!r})"


def _nearest(key: str) -> str:
    leaf = key.rsplit(".", 1)[-1]
    known = [name for name, _, _ in explain()]
    elsewhere = [name for name in known if name.rsplit(".", 1)[-1] == leaf]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    if leaf in TRANSLATIONS:
        return f"here that is {TRANSLATIONS[leaf]}"
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in known}
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    close = close or [by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.6)]
    return f"did you mean {close[0]}?" if close else "`sft-dist config --explain` lists every key"


def _resolve_paths(config: RunConfig, run_file_dir: Path) -> RunConfig:
    """A path counts as given; where it does not exist, next to the run file; else it stays (a Hub id, say)."""

    def resolve(value: str) -> str:
        beside = run_file_dir / value
        return os.path.relpath(beside) if not found(Path(value)) and found(beside) else value

    def found(path: Path) -> bool:
        return path.exists() or any(glob.iglob(str(path), recursive=True))

    def resolve_source(source: SourceConfig) -> SourceConfig:
        return source.model_copy(update={"path": resolve(source.path)})

    def resolve_optional(value: str | None) -> str | None:
        return None if value is None else resolve(value)

    model = config.model.model_copy(
        update={"path": resolve(config.model.path), "init_from": resolve_optional(config.model.init_from)}
    )
    data = config.data.model_copy(
        update={
            "train": tuple(resolve_source(source) for source in config.data.train),
            "heldout": tuple(resolve_source(source) for source in config.data.heldout),
            "retention": tuple(resolve_source(source) for source in config.data.retention),
            "chat_template": resolve_optional(config.data.chat_template),
        }
    )
    return config.model_copy(update={"model": model, "data": data, "deepspeed": resolve(config.deepspeed)})
