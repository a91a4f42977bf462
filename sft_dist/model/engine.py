"""DeepSpeed behind one class: forward, backward, step, save, load.

The only module (with model/zero.py) that imports deepspeed. What the run file decides is injected here; a key that a
DeepSpeed file decides as well is an error that names both.
"""

import fnmatch
import gc
import importlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sft_dist
from sft_dist.config import AdapterConfig, HeadConfig, ModelConfig, RunConfig
from sft_dist.distributed import collectives
from sft_dist.distributed.world import World
from sft_dist.errors import ConfigError, say
from sft_dist.model import (
    adapters,
    anchor,
    attention,
    beside,
    classifier,
    fused_head,
    groups,
    heap,
    interpolation,
    loading,
    resharding,
    sharding,
    zero,
)
from sft_dist.model.batch import Batch
from sft_dist.model.classifier import Classifier
from sft_dist.model.fused_head import LossTerms, TokenValues, TopReference
from sft_dist.model.layers import ask_for_input_gradients, compile_layers, decoder_layers
from sft_dist.model.logprobs import HiddenRows, TokenLogprobs
from sft_dist.model.snapshot import Snapshot, write_file
from sft_dist.model.stored import StoredTensors

# Keys of a DeepSpeed file that belong to the run file, and their home there.
_DECIDED_BY_RUN_FILE = {
    "train_batch_size": "batch.global_packs",
    "train_micro_batch_size_per_gpu": "batch.packs_per_micro_batch",
    "gradient_accumulation_steps": "batch.global_packs",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "fp16": "model.dtype",
    "zero_allow_untested_optimizer": "optimizer",
    "steps_per_print": "logging",
    "tensorboard": "logging.tensorboard",
}
_WRAPPED = "model."  # what TokenLogprobs puts before the names of the model it wraps
_SHARDS = "shards"  # DeepSpeed's tag: the folder inside a checkpoint that holds its files


def compute_dtype(config: ModelConfig) -> torch.dtype:
    match config.dtype:
        case "float32":
            return torch.float32
        case "bfloat16":
            return torch.bfloat16
        case "auto":
            return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def deepspeed_folder() -> Path:
    """The shipped DeepSpeed files: beside the package in a checkout, inside it when installed."""
    package = Path(sft_dist.__file__).parent
    beside = package.parent / "ds_configs"
    return beside if beside.is_dir() else package / "ds_configs"


def resolve_deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """The DeepSpeed configuration of a run: the named file plus what the run file decides."""
    name = config.deepspeed
    if name == "auto":
        name = "zero3" if torch.cuda.is_available() else "cpu"
    path = Path(name) if Path(name).exists() else deepspeed_folder() / f"{name}.json"
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError:
        shipped = ", ".join(sorted(file.stem for file in deepspeed_folder().glob("*.json")))
        raise ConfigError(
            f"deepspeed: {config.deepspeed}: no such file, and not one of those shipped: {shipped}"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"deepspeed: {path}: not a readable JSON file: {error}") from None
    for key, home in _DECIDED_BY_RUN_FILE.items():
        if key in tree:
            raise ConfigError(f"deepspeed: {path}: {key} is decided by {home} in the run file; take it out of there")
    if '"auto"' in json.dumps(tree):
        raise ConfigError(f'deepspeed: {path}: holds an "auto", which nothing here fills in')
    if tree.get("zero_optimization", {}).get("stage") != 3:
        raise ConfigError(f"deepspeed: {path}: zero_optimization.stage must be 3")
    for part in ("offload_optimizer", "offload_param"):
        if (tree["zero_optimization"].get(part) or {}).get("device") == "nvme":
            raise ConfigError(
                f"deepspeed: {path}: zero_optimization.{part}.device: nvme leaves states outside the checkpoints, so "
                "no run could be resumed; use cpu"
            )
    return tree | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # the plan accumulates; Engine.backward marks the last micro-batch
        "gradient_clipping": config.optimizer.max_grad_norm,
        "bf16": _bf16(tree.get("bf16", {}), path, compute_dtype(config.model)),
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }


def _bf16(section: dict[str, Any], path: Path, dtype: torch.dtype) -> dict[str, Any]:
    """What a DeepSpeed file may say about bf16: that states have 16 bits. Whether it is on is model.dtype's."""
    allowed = {"bf16_master_weights_and_grads", "bf16_optimizer_states"}
    if refused := sorted(section.keys() - allowed):
        raise ConfigError(f"deepspeed: {path}: bf16.{refused[0]} is decided by model.dtype in the run file")
    if any(section.values()) and dtype is not torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(f"deepspeed: {path}: states of 16 bits need model.dtype: bfloat16, which is {name} here")
    return {"enabled": dtype is torch.bfloat16, **section}


def states_dtype(config: RunConfig) -> torch.dtype:
    """Precision of master weights and moments."""
    is_16bit = resolve_deepspeed_config(config)["bf16"].get("bf16_master_weights_and_grads")
    return torch.bfloat16 if is_16bit else torch.float32


class Engine:
    """One model over all ranks. Every method is called by all ranks at the same line.

    `reduce_once`: the micro-batches of a step add up their gradients on each rank, and the last one reduces the sum.
    `reference`: DeepSpeed's engine of the frozen θ̂, for losses that compare with it.
    `settings`: what was derived from the model and the memory at hand, for the record.
    `base`: names of frozen parameters that checkpoints leave out, since they are those of model.path.
    """

    def __init__(
        self,
        engine: Any,
        world: World,
        *,
        reduce_once: bool = False,
        settings: dict[str, Any] | None = None,
        reference: Any = None,
        base: frozenset[str] = frozenset(),
    ) -> None:
        self._base = base
        self.settings = settings or {}
        self._engine = engine
        self._world = world
        self._reduce_once = reduce_once
        self._reference = reference
        self._pretrained: anchor.Pretrained | None = None  # where training needs it in memory
        self._reduction = ExitStack()  # open between the first backward of a step and its last
        self._is_open = False

    @property
    def device(self) -> torch.device:
        return torch.device(self._engine.device)

    @property
    def causal_lm(self) -> Any:
        """The model of transformers inside, its parameters sharded."""
        return self._engine.module.model

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters, of all ranks together, tied ones once."""
        return sum(map(zero.numel, self.causal_lm.parameters()))

    @property
    def vocab_size(self) -> int:
        """Tokens that the language model's head knows."""
        return int(self.causal_lm.get_output_embeddings().weight.ds_shape[0])

    @property
    def is_classifier(self) -> bool:
        """Whether the model has a prediction head in the place of the language model's."""
        return isinstance(self._engine.module, Classifier)

    @property
    def has_head(self) -> bool:
        """Whether the model has a prediction head, in the place of the language model's or beside it."""
        return self.is_classifier or self._engine.module.beside is not None

    def on_forward(self, action: Callable[[], None]) -> None:
        """Call `action` at the beginning of every forward from now on."""
        self.causal_lm.get_input_embeddings().register_forward_pre_hook(lambda *_: action())

    def train(self, is_training: bool = True) -> None:
        self._engine.train(is_training)

    def logprobs(self, batch: Batch) -> Tensor:
        """float32 [num_targets] of this rank's batch, on the device."""
        return self.token_values(batch).logprob

    def logits(self, batch: Batch) -> Tensor:
        """float32 [n, C] of a prediction head for every sample of this rank's batch, on the device."""
        logits = self.token_values(batch).logits
        assert logits is not None, "a model with a prediction head"
        return logits

    def token_values(self, batch: Batch, *, with_details: bool = False) -> TokenValues:
        """The log-probs of this rank's batch and, with `with_details`, `is_top` and `entropy`."""
        self._check_ids(batch)
        values: TokenValues = self._engine(batch.to(self.device), with_details=with_details)
        return values

    def loss(self, batch: Batch, terms: LossTerms, *, with_details: bool = False) -> tuple[Tensor, TokenValues]:
        """Σ w ℓ over the targets of this rank's batch, to be given to `backward`, and their `token_values`."""
        self._check_ids(batch)
        own = batch.to(self.device)
        values: TokenValues
        if terms.kl:
            values = self._engine(own, with_details=with_details, loss=terms, reference=self._answer_of_reference(own))
        else:
            values = self._engine(own, with_details=with_details, loss=terms)
        assert values.loss is not None
        return values.loss, values

    def top_logprobs(self, batch: Batch, k: int) -> TopReference:
        """What the model, as it is now, says at this rank's targets, in the host's memory. A collective."""
        self._check_ids(batch)
        with torch.no_grad():
            hidden = HiddenRows(self._engine(batch.to(self.device), as_reference=True), self.causal_lm)
            with hidden.whole() as model:
                found = fused_head.top_logprobs(model.rows, model.head, k)
        return TopReference(found.ids.cpu(), found.logprobs.float().cpu())

    def _answer_of_reference(self, batch: Batch) -> HiddenRows | TopReference:
        if batch.top_ids is not None and batch.top_logprobs is not None:
            return TopReference(batch.top_ids, batch.top_logprobs)
        if self._reference is None:
            assert not batch.num_targets, (
                "examples come with what is kept of the start's answers (data/top_logprobs.py)"
            )
            return TopReference(batch.input_ids.new_zeros(0, 1), batch.weights.new_zeros(0, 2))
        with torch.no_grad():
            return HiddenRows(self._reference(batch, as_reference=True), self._reference.module.model)

    def _check_ids(self, batch: Batch) -> None:
        loading.check_ids(self.causal_lm.config, batch.largest_id)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradient of `loss`, summed over ranks and over the backwards since the last step.

        DeepSpeed averages gradients over the W ranks, and divides by its accumulation steps, which are fixed to 1:
        hence times W here, and nowhere else.
        """
        self._engine.set_gradient_accumulation_boundary(is_last)
        if self._reduce_once and not self._is_open and not is_last:
            self._reduction.enter_context(self._engine.coalesce_grad_reduction())
            self._is_open = True
        self._engine.backward(loss * self._world.size)
        if self._is_open:
            self._cast_gradients(None if is_last else torch.float32)
            if is_last:
                self._is_open = False
                self._reduction.close()  # reduces
                self._engine.set_gradient_accumulation_boundary(True)  # DeepSpeed puts back what was set before it

    def _cast_gradients(self, dtype: torch.dtype | None) -> None:
        """Whole gradients in `dtype`, or in that of their parameters: summed in float32, sent as weights are."""
        for parameter in self._engine.module.parameters():
            wanted = dtype or parameter.dtype
            if parameter.grad is not None and parameter.grad.dtype is not wanted:
                parameter.grad.data = parameter.grad.data.to(wanted)

    def step(self) -> tuple[bool, float]:
        """Clip and update. Returns whether DeepSpeed applied the step, and the gradient norm before clipping."""
        self._engine.step()
        if self.device.type == "cpu":
            heap.trim()
        return bool(self._engine.was_step_applied()), float(self._engine.get_global_grad_norm())

    def _in_reference(self) -> anchor.Pretrained | None:
        if self._reference is None:
            return None
        parameters = self._reference.module.model.named_parameters()
        return anchor.Pretrained({name: self._own(p, p.ds_tensor.data.reshape(-1)) for name, p in parameters}, {})

    def local_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(name, float32 [n] on the CPU): this rank's part of the gradient that the last backward completed."""
        for name, shard in self._local_gradients():
            yield name, shard.float().cpu().clone()

    def _local_gradients(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_local_grad

        for name, parameter in self.causal_lm.named_parameters():
            if parameter.requires_grad:
                yield name, self._own(parameter, safe_get_local_grad(parameter).reshape(-1))

    def _own(self, parameter: Any, shard: Tensor) -> Tensor:
        """A rank's part without what fills up the last ranks' parts to the size of the others."""
        own = min(max(parameter.ds_numel - self._world.rank * shard.numel(), 0), shard.numel())
        return shard[:own]

    def has_finite_gradient(self) -> bool:
        """Whether this rank's part of the gradient that the last backward completed holds nothing but numbers."""
        return all(bool(shard.isfinite().all()) for _, shard in self._local_gradients())

    def broken_weights(self) -> list[str]:
        """Names of the parameters of which this rank's part holds something that is no finite number."""
        parameters = self.causal_lm.named_parameters()
        return [name for name, p in parameters if not self._own(p, p.ds_tensor.reshape(-1)).isfinite().all()]

    def clear_gradients(self) -> None:
        """Forget the backwards since the last step: the next one starts a gradient anew."""
        # ZeRO-3 keeps gradients in its own partitions, which the first backward after this overwrites.
        self._engine.optimizer.zero_grad()

    def set_lr(self, learning_rate: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_factor"]

    def own_parts(self) -> list[anchor.Part]:
        """This rank's part of every parameter of θ, by the names of transformers; for engines that train.

        A new head is no part of θ, and is nowhere in θ̂.
        """
        parts = anchor.own_parts(self._engine, rank=self._world.rank, prefix=_WRAPPED)
        return [part for part in parts if part.name not in self._engine.module.omega]

    def decay_to_start(self, config: RunConfig, initial: Path | None) -> None:
        """Decay toward θ̂, the weights as they are now, with every step from now on. Raises ConfigError, StorageError.

        Parameters that the files do not hold (model.allow_new_parameters) have no pre-trained value to stay at, nor has
        a new head.
        """
        if states_dtype(config) is torch.bfloat16:
            raise ConfigError(
                "anchor.decay: master weights have 16 bits here (deepspeed), which would round its small steps away; "
                "choose a DeepSpeed file with float32 states, or leave it out"
            )
        allowed = config.model.allow_new_parameters
        held = self._readers(config, initial) if allowed else {}
        self._pretrained = self._in_reference() or anchor.kept_in_memory(self.own_parts(), config.anchor)
        exempt = self._engine.module.omega | {
            name
            for name in self._pretrained.kept
            if name not in held and any(fnmatch.fnmatchcase(name, pattern) for pattern in allowed)
        }
        anchor.pull(self._engine, self._pretrained, decay=config.anchor.decay, exempt=exempt, prefix=_WRAPPED)

    def pretrained(self, config: RunConfig, initial: Path | None) -> anchor.Pretrained:
        """This rank's part of θ̂; to be asked for before the weights, as the files gave them, change."""
        if (known := self._pretrained or self._in_reference()) is not None:
            return known
        return anchor.read_again(self.own_parts(), self._readers(config, initial), config.anchor)

    def _readers(self, config: RunConfig, initial: Path | None) -> dict[str, anchor.Reader]:
        """Of what the files that training starts from hold by the names of the parameters."""
        omega, parameters = self._engine.module.omega, self.causal_lm.named_parameters()
        shapes = {name: tuple(parameter.ds_shape) for name, parameter in parameters if name not in omega}
        if initial is not None:
            return _checkpoint_readers(initial, shapes)
        files = StoredTensors(loading.folder_of(config.model.path))
        return anchor.file_readers(files, shapes, self.causal_lm.base_model_prefix)

    def close(self) -> None:
        """Free the memory of the weights, for another model; the engine answers nothing after that."""
        for engine in (self._engine, self._reference):
            if engine is not None:
                zero.release(engine.module)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        heap.trim()

    def capture(self) -> Snapshot:
        """This rank's files of a checkpoint, as DeepSpeed lays them out; their tensors are those that training changes.

        DeepSpeed says what is to be written and writes nothing, so that no file system can keep ranks apart in it.
        """
        files: dict[str, Any] = {}

        def keep(state_dict: Any, path: str) -> None:
            files[f"{_SHARDS}/{Path(path).name}"] = state_dict

        writer = self._engine.checkpoint_engine
        writer.save, writer.makedirs = keep, lambda path, exist_ok=False: None
        self._engine._copy_recovery_script = lambda save_path: None  # its converters: export does that work here
        self._engine.save_checkpoint(
            "unused", tag=_SHARDS, save_latest=False, exclude_frozen_parameters=bool(self._base)
        )
        return Snapshot(files)

    def checkpoint_bytes(self) -> int:
        """Of this rank's files, of a step after the first: AdamW has no moments before it."""
        optimizer = self._engine.optimizer
        states = optimizer.optimizer.state.values()
        there = sum(t.nbytes for state in states for name, t in state.items() if name.startswith("exp_avg"))
        full = 2 * sum(master.nbytes for master in optimizer.fp32_partitioned_groups_flat)
        return self.capture().num_bytes + max(full - there, 0)

    def save(self, folder: Path) -> None:
        """Write this rank's files below `folder`, for no manifest: a checkpoint is published by train/saving.py."""
        (folder / _SHARDS).mkdir(parents=True, exist_ok=True)
        for name, content in self.capture().files.items():
            write_file(folder / name, content)
        collectives.barrier()

    def load(self, folder: Path) -> None:
        """Take the state of a checkpoint, whatever number of ranks wrote it; for engines that train.

        Raises ConfigError where its parameters or their groups are not this model's.
        """
        resharding.load(self._engine, folder / _SHARDS, rank=self._world.rank, but=self._base)


def stored_parameters(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """(name as transformers knows it, master weights) of every parameter of a checkpoint, one at a time."""
    for name, value in resharding.whole_parameters(checkpoint / _SHARDS):
        yield name.removeprefix(_WRAPPED), value


def _checkpoint_readers(checkpoint: Path, names: Iterable[str]) -> dict[str, anchor.Reader]:
    shards = resharding.Shards(checkpoint / _SHARDS)

    def reader(name: str) -> anchor.Reader:
        return lambda into, start: shards.copy(_WRAPPED + name, "weight", into, start=start)

    return {name: reader(name) for name in names}


def stored_numel(checkpoint: Path) -> dict[str, int]:
    return {name.removeprefix(_WRAPPED): n for name, n in resharding.stored_numel(checkpoint / _SHARDS).items()}


def training_engine(config: RunConfig, world: World, initial: Path | None) -> Engine:
    """The pre-trained model (or the weights of checkpoint `initial`), sharded, with AdamW."""
    import deepspeed

    tree = resolve_deepspeed_config(config)
    model, layers = _sharded_model(config, world, tree, initial, seed=config.seed)
    if initial is None and config.head.kind == "none" and world.is_main:
        beside.say_left_out(config)
    frozen = groups.freeze(model.model, config.model.freeze)
    if frozen is not None and world.is_main:
        say(frozen)
    ask_for_input_gradients(layers)
    if config.model.gradient_checkpointing:
        _recompute_layers(model.model)
    if config.model.compile:
        compile_layers(layers)
    optimizer = torch.optim.AdamW(
        classifier.with_head_rate(
            groups.parameter_groups(model.model, layers, config.optimizer), model.model, model.omega, config
        ),
        lr=config.optimizer.learning_rate,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        fused=True,  # on the CPU eight times faster than the loop over parameters
    )
    derived, reduce_once = sharding.decide(
        sharding.shapes_of(model.model, layers),
        world_size=world.size,
        element_bytes=model.model.dtype.itemsize,
        device_bytes=_device_bytes(world),
        num_micro_batches=config.batch.micro_batches_on(world.size),
        reduce_once=config.batch.reduce_once,
    )
    tree = sharding.filled(tree, derived.values)
    if reduce_once:
        for parameter in model.parameters():
            parameter.grad_dtype = None  # any: the gradient of bfloat16 weights is summed in float32
    used = {name: tree["zero_optimization"][name] for name in derived.values}
    if world.is_main:
        say(f"ZeRO-3 over {world.size:,} rank(s): {sharding.in_short(layers, used, derived, reduce_once)}")
    zero.clear_padding(model)
    _import_muon()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=tree)
    settings = used | {"reduce_once": reduce_once, "decoder_layers": len(layers), "weights_kept": derived.kept}
    reference = None
    if config.anchor.needs_copy:
        reference, _ = _frozen_engine(config, world, initial, seed=config.seed, may_persist=False)
    base = frozenset() if config.adapter.kind == "none" else adapters.frozen_names(model)
    result = Engine(engine, world, reduce_once=reduce_once, settings=settings, reference=reference, base=base)
    if config.anchor.decay:
        result.decay_to_start(config, initial)
    return result


def inference_engine(config: RunConfig, world: World, weights: Path | None, *, coefficient: float = 1.0) -> Engine:
    """The same model without optimizer, for scoring: sharded parameters, no gradients.

    With a coefficient below 1 its weights lie so far on the way from the pre-trained ones to those of checkpoint
    `weights`. Raises ConfigError for parameters that neither the model's files nor `weights` hold.
    """
    seed = None if weights is None else config.seed
    engine, settings = _frozen_engine(config, world, weights, seed=seed, may_persist=True, coefficient=coefficient)
    return Engine(engine, world, settings=settings)


def _frozen_engine(
    config: RunConfig,
    world: World,
    weights: Path | None,
    *,
    seed: int | None,
    may_persist: bool,
    coefficient: float = 1.0,
) -> tuple[Any, dict[str, int]]:
    """DeepSpeed's engine for forwards alone, and its settings; `may_persist`: weights may stay whole.

    `seed`: of parameters that are in no file, which are refused without one.
    """
    import deepspeed

    tree = resolve_deepspeed_config(config)
    if weights is None:
        # What nothing has trained changes nothing, or says nothing.
        head = HeadConfig() if config.head.is_beside else config.head
        config = config.model_copy(update={"adapter": AdapterConfig(), "head": head})
    model, layers = _sharded_model(config, world, tree, weights, seed=seed, coefficient=coefficient)
    model.requires_grad_(False)
    if config.model.compile:
        compile_layers(layers)
    element_bytes = model.model.dtype.itemsize
    shapes = sharding.shapes_of(model.model, layers)
    budget = sharding.memory_budget(_device_bytes(world), -(-shapes.total * element_bytes // world.size))
    values = sharding.inference_settings(
        shapes, element_bytes=element_bytes, memory_budget_bytes=budget if may_persist else None
    )
    engine, *_ = deepspeed.initialize(model=model, config=sharding.filled(tree, values))
    engine.eval()
    return engine, values


def _device_bytes(world: World) -> int:
    """Memory for each rank's device: that of the smallest one, since all ranks need the same settings. A collective."""
    if torch.cuda.is_available():
        own = torch.cuda.get_device_properties(world.local_rank).total_memory
    else:
        own = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // world.local_size
    return -int(collectives.all_max([-own])[0])


def _sharded_model(
    config: RunConfig,
    world: World,
    tree: dict[str, Any],
    weights: Path | None,
    *,
    seed: int | None,
    coefficient: float = 1.0,
) -> tuple[TokenLogprobs | Classifier, list[nn.Module]]:
    """The model, and its decoder layers as leaves of ZeRO-3."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    _quiet()
    # The shared-memory op serves inference kernels only, and a build that is killed leaves a lock that hangs every
    # later start: https://github.com/pytorch/pytorch/issues/189245. Not building it costs nothing here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False)
    added = loading.new_tokens(config.model)
    if config.adapter.kind != "none":
        adapters.check_tokens(added)
    model_config = loading.load_config(config.model, config.data.max_length)
    shape = beside.find_shape(config, model_config) if config.head.is_beside else None
    announced = HfDeepSpeedConfig(tree)  # transformers shards while loading as long as this object lives
    if config.head.is_in_place:
        return _with_head(config, world, model_config, weights, seed=seed)
    model = loading.load_causal_lm(
        config.model,
        model_config,
        added=added,
        dtype=compute_dtype(config.model),
        max_length=config.data.max_length,
        seed=seed,
        quantisation=adapters.quantisation(config.adapter, compute_dtype(config.model)),
    )
    base = adapters.inject(model, config.adapter, seed=config.seed)
    if config.adapter.quantise != "none":
        deepspeed.zero.Init(module=model, config_dict_or_path=tree)  # transformers leaves quantised weights whole
    if base and world.is_main:
        say(adapters.describe(model, config.adapter))
    if added is not None and weights is None and world.is_main:
        say(added.describe(model_config))
    chosen = attention.choose_attention(
        model_config,
        config.model.attention,
        config.data.max_length,
        device_type=loading.device_type(),
        dtype=compute_dtype(config.model),
    )
    if chosen.reason is not None and world.is_main:
        say(chosen.reason)
    del announced
    layers = _layers_as_leaves(model, world)
    is_new = world.is_main and weights is None
    head = None if shape is None else beside.attach(model, shape, config, is_main=is_new)
    wrapped = TokenLogprobs(model, neftune_alpha=config.objective.neftune_alpha, beside=head)
    if weights is not None:
        between = partial(interpolation.between, coefficient=coefficient)
        zero.assign(model, stored_parameters(weights), between, but=base | wrapped.omega)
    return wrapped, layers


def _with_head(
    config: RunConfig, world: World, model_config: Any, weights: Path | None, *, seed: int | None
) -> tuple[Classifier, list[nn.Module]]:
    dtype = compute_dtype(config.model)
    is_new = weights is None
    model, omega = classifier.load(config, model_config, dtype=dtype, seed=seed, is_main=world.is_main and is_new)
    layers = _layers_as_leaves(model, world)
    if weights is not None:
        zero.assign(model, stored_parameters(weights))
    return Classifier(model, omega, config.head, layers), layers


def _layers_as_leaves(model: Any, world: World) -> list[nn.Module]:
    from deepspeed.utils import set_z3_leaf_module

    layers = decoder_layers(model)
    for layer in layers:
        set_z3_leaf_module(layer, True)  # one gather per decoder layer instead of one per small module inside it
    if not layers and world.is_main:
        say(f"model.path: no decoder layers found in {type(model).__name__}: every module of it is gathered by itself")
    return layers


def _recompute_layers(causal_lm: Any) -> None:
    causal_lm.config.use_cache = False
    if hasattr(causal_lm, "activation_checkpointing_enable"):  # transformers >= 5.23
        causal_lm.activation_checkpointing_enable({"use_reentrant": False})
    else:
        causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _quiet() -> None:
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)


def _import_muon() -> None:
    """DeepSpeed asks of any optimizer whether it is its own Muon, whose module asks torch for compilers as it is
    imported: 1.7 s of a start, for functions that nothing calls here. They are imported as they are written.
    """
    from deepspeed.runtime import compiler

    decorator = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = decorator


def set_environment() -> None:
    """Before deepspeed is imported: CPU where there is no GPU, and a private folder for what it compiles."""
    # DeepSpeed 0.19.8 calls names that torch 2.13 is renaming, once per collective.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
