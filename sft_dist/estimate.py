"""The verb `estimate`: memory, time and disk of a run on hardware that need not be there. Reads no weights."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sft_dist.config import RunConfig
from sft_dist.data.cost import BY_TOKENS
from sft_dist.data.plan import Plan
from sft_dist.data.prepare import is_prepared
from sft_dist.data.progress import duration
from sft_dist.data.selection import Selection
from sft_dist.data.top_logprobs import bytes_per_target
from sft_dist.errors import ConfigError, ExitCode
from sft_dist.preparation import training_cost, training_set

if TYPE_CHECKING:
    from sft_dist.model.memory import Memory, Sizes

GIB = 2**30
EFFICIENCIES = (0.6, 0.4)  # of the peak, that a whole run may reach
_GPUS_OF_A_NODE = 8
_BETWEEN_NODES = 50e9  # bytes/s and GPU: 400 Gb/s
_LIBRARIES_GIB = 0.5  # Python, torch, transformers and DeepSpeed, resident in every rank
_STATE_BYTES = 12  # a parameter in a checkpoint: float32 weight and two moments


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the run is estimated for."""

    name: str
    is_gpu: bool
    num_devices: int  # ranks
    flops_per_s: float  # of one
    memory_bytes: float | None  # of one; on a CPU, of the machine, which its ranks share
    link_bytes_per_s: float | None  # between ranks, of one; None: not known

    @property
    def room_bytes(self) -> float | None:
        """For one rank."""
        if self.memory_bytes is None or self.is_gpu:
            return self.memory_bytes
        return self.memory_bytes / self.num_devices


@dataclass(frozen=True, slots=True)
class Load:
    """What there is to compute: means over the steps of an epoch, or bounds where the data are not prepared."""

    is_known: bool
    num_steps: int | None
    tokens_per_step: float
    targets_per_step: float
    model_flops: float  # of a step, forward and backward
    hardware_flops: float  # with what is recomputed
    targets_per_forward: int  # at most, in the first epoch


@dataclass(frozen=True, slots=True)
class Floor:
    """Seconds that a step takes at least."""

    compute_s: float
    communication_s: float | None  # None: the rate between ranks is not known

    @property
    def step_s(self) -> float:
        """Communication can hide behind computation."""
        return max(self.compute_s, self.communication_s or 0.0)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Everything that is told."""

    hardware: Hardware
    sizes: "Sizes"
    element_bytes: int
    load: Load | None  # None: the model's cost is not known
    memory: "Memory | None"
    recomputes_layers: bool
    floor: Floor | None
    checkpoint_bytes: int
    host_bytes: int  # of the model's, on the host of each GPU


def run(config: RunConfig, *, num_gpus: int | None, gpu_memory_gib: float | None, device_name: str | None) -> ExitCode:
    """Print what a run would take."""
    hardware = find_hardware(num_gpus, gpu_memory_gib, device_name)
    data = _prepared(config)
    result = estimate(config, hardware, data)
    for line in _lines(config, result, data, _measured(Path(config.run_dir))):
        print(line)
    return ExitCode.DONE


def find_hardware(num_gpus: int | None, gpu_memory_gib: float | None, device_name: str | None) -> Hardware:
    """A GPU by its name, else those of this machine, else its CPU, whose matrix rate is measured.

    Raises ConfigError for a name that is not known.
    """
    import torch

    from sft_dist.model.cost import GPUS, gpu_of_name, matrix_rate

    if device_name is None and torch.cuda.is_available():
        device_name, num_gpus = torch.cuda.get_device_name(), num_gpus or torch.cuda.device_count()
    if device_name is None or device_name.lower() == "cpu":
        memory = gpu_memory_gib * GIB if gpu_memory_gib else _memory_of_machine()
        count = num_gpus or 1
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // count))  # as a rank does
        return Hardware(
            "CPU of this machine", False, count, matrix_rate(torch.device("cpu"), torch.float32), memory, None
        )
    gpu = gpu_of_name(device_name)
    if gpu is None:
        known = ", ".join(["CPU", *(gpu.name for gpu in GPUS)])
        raise ConfigError(f"--device: {device_name} is not known; known are {known}")
    count = num_gpus or 1
    link = gpu.link_bytes_per_s if count <= _GPUS_OF_A_NODE else min(gpu.link_bytes_per_s, _BETWEEN_NODES)
    return Hardware(device_name, True, count, gpu.flops_per_s, (gpu_memory_gib or gpu.memory_gib) * GIB, link)


def _memory_of_machine() -> float | None:
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError):
        return None


def _prepared(config: RunConfig) -> tuple[Selection, Plan] | None:
    if not config.data.train or not is_prepared(config.data.train, config.model, config.data):
        return None
    return training_set(config)


def estimate(config: RunConfig, hardware: Hardware, data: tuple[Selection, Plan] | None) -> Estimate:
    """From config.json alone. Raises ConfigError for models that cannot be read or trained."""
    import torch

    from sft_dist.model import adapters, fused_head, groups, loading, memory, sharding
    from sft_dist.model.engine import resolve_deepspeed_config
    from sft_dist.model.layers import decoder_layers

    model_config = loading.load_config(config.model, config.data.max_length)
    if (added := loading.new_tokens(config.model)) is not None:
        model_config.get_text_config().vocab_size = added.num_rows(model_config)
    in_half = config.model.dtype == "bfloat16" or (config.model.dtype == "auto" and hardware.is_gpu)
    dtype = torch.bfloat16 if in_half else torch.float32
    causal_lm = memory.model_without_weights(model_config, dtype, trust_remote_code=config.model.trust_remote_code)
    groups.freeze(causal_lm, config.model.freeze)
    with torch.device("meta"):
        adapters.inject(causal_lm, config.adapter, seed=config.seed)
    sizes = memory.sizes_of(causal_lm)
    anchor_bytes = _anchor_bytes(config, dtype.itemsize, str(getattr(model_config, "dtype", "")))
    on_host = hardware.is_gpu and config.anchor.device == "host"
    named = "zero3" if hardware.is_gpu else "cpu"
    settings = resolve_deepspeed_config(
        config.model_copy(update={"deepspeed": named if config.deepspeed == "auto" else config.deepspeed})
    )
    derived, reduces_once = sharding.decide(
        sharding.shapes_of(causal_lm, decoder_layers(causal_lm)),
        world_size=hardware.num_devices,
        element_bytes=dtype.itemsize,
        device_bytes=int(hardware.room_bytes or 0),
        num_micro_batches=config.batch.micro_batches_on(hardware.num_devices),
        reduce_once=config.batch.reduce_once,
    )
    load = _load(config, data)
    tokens_per_forward = config.batch.packs_per_micro_batch * config.data.max_length
    needed = memory.memory_of(
        sizes,
        memory.saved_by_forward(causal_lm, tokens_per_forward),
        sharding.filled(settings, derived.values),
        num_ranks=hardware.num_devices,
        num_tokens=tokens_per_forward,
        num_targets=tokens_per_forward if load is None else load.targets_per_forward,
        chunk_rows=fused_head.chunk_rows(sizes.head // sizes.hidden_size, "cuda" if hardware.is_gpu else "cpu"),
        element_bytes=dtype.itemsize,
        reduces_once=reduces_once,
        reserves_buckets=hardware.is_gpu,
        anchor_bytes=0 if on_host else anchor_bytes,
        compares=config.anchor.needs_copy,
    )
    return Estimate(
        hardware,
        sizes,
        dtype.itemsize,
        load,
        needed,
        config.model.gradient_checkpointing,
        None if load is None else _floor(config, hardware, sizes, load, dtype.itemsize),
        _on_disk(config, sizes.num_parameters, sizes.num_trained, dtype.itemsize),
        anchor_bytes * sizes.num_trained // hardware.num_devices if on_host else 0,
    )


def _anchor_bytes(config: RunConfig, element_bytes: int, stored_dtype: str) -> int:
    """Of a parameter in the copy of θ̂ that anchor.decay needs."""
    if not config.anchor.decay or config.anchor.needs_copy:
        return 0  # the frozen model is the copy
    match config.anchor.dtype:
        case "float32":
            return 4
        case "bfloat16":
            return 2
        case "auto":
            return 2 if element_bytes == 2 or stored_dtype.endswith("bfloat16") else 4


def checkpoint_bytes(config: RunConfig) -> int:
    """On disk, from config.json alone. Raises ConfigError for models that cannot be read."""
    import torch

    from sft_dist.model import adapters, groups, loading, memory

    model_config = loading.load_config(config.model, config.data.max_length)
    dtype, code = torch.bfloat16, config.model.trust_remote_code
    if not config.head.is_in_place:
        model = memory.model_without_weights(model_config, dtype, trust_remote_code=code)
        groups.freeze(model, config.model.freeze)
        with torch.device("meta"):
            adapters.inject(model, config.adapter, seed=config.seed)
    else:
        num_outputs = len(config.head.labels) or 2  # those of the data are few beside the backbone
        model = memory.classifier_without_weights(model_config, dtype, num_outputs=num_outputs, trust_remote_code=code)
        model.base_model.requires_grad_(not config.head.freeze_backbone)
    return _on_disk(config, *memory.numel(model), dtype.itemsize)


def _on_disk(config: RunConfig, num_parameters: int, num_trained: int, element_bytes: int) -> int:
    """Of a checkpoint; the base of adapters is in none."""
    base = num_parameters - num_trained if config.adapter.kind == "none" else 0
    return _STATE_BYTES * num_trained + element_bytes * base


def _load(config: RunConfig, data: tuple[Selection, Plan] | None) -> Load | None:
    """None where it cannot be told from the model's config.json what it costs."""
    cost = training_cost(config, is_main=True) if data is None else data[1].cost_model
    if cost == BY_TOKENS:
        return None
    again = cost.with_recomputation("full" if config.model.gradient_checkpointing else "none")

    def on_hardware(lengths: Any, num_targets: int) -> float:
        """With what is recomputed, and with a forward of the frozen model, a third of forward and backward."""
        frozen = cost.flops(lengths, num_targets) / 3 if config.anchor.needs_copy else 0.0
        return again.flops(lengths, num_targets) + frozen

    row = config.data.max_length
    per_forward = config.batch.packs_per_micro_batch
    if data is None:
        # Full packs of one sample each, every token a target: nothing costs more.
        packs = config.batch.global_packs
        tokens, lengths = packs * row, np.full(packs, row)
        return Load(
            False,
            config.schedule.max_steps,
            tokens,
            tokens,
            cost.flops(lengths, tokens),
            on_hardware(lengths, tokens),
            per_forward * row,
        )
    selection, plan = data
    steps = range(min(plan.num_steps, plan.steps_per_epoch))
    packs_of = [pack for step in steps for pack in plan.packs(step)]
    drawn = [index for pack in packs_of for index in pack]
    lengths, targets = selection.lengths[drawn], selection.num_targets[drawn]
    num_targets = int(targets.sum())
    most = sorted((int(selection.num_targets[list(pack)].sum()) for pack in packs_of), reverse=True)[:per_forward]
    return Load(
        True,
        plan.num_steps,
        float(lengths.sum()) / len(steps),
        num_targets / len(steps),
        cost.flops(lengths, num_targets) / len(steps),
        on_hardware(lengths, num_targets) / len(steps),
        sum(most),
    )


def _floor(config: RunConfig, hardware: Hardware, sizes: "Sizes", load: Load, element_bytes: int) -> Floor:
    """Compute and communication of a step, each at its peak rate; ranks wait for the one with the most packs.

    Every forward gathers the weights, every backward gathers them again and reduces the gradients of those that are
    trained: 3 Ψ elements if all are, of which a rank moves the share (R - 1) / R (Rajbhandari et al., "ZeRO", 2020,
    section 7); the frozen model of anchor.kl is gathered once.
    """
    ranks, packs = hardware.num_devices, config.batch.global_packs
    forwards = _forwards(config, ranks)
    idle = forwards * ranks * config.batch.packs_per_micro_batch / packs
    compute_s = load.hardware_flops * idle / (hardware.flops_per_s * ranks)
    elements = (3 if config.anchor.needs_copy else 2) * sizes.num_parameters + sizes.num_trained
    moved = forwards * elements * element_bytes * (ranks - 1) / ranks
    if not moved:
        return Floor(compute_s, 0.0)
    return Floor(compute_s, None if hardware.link_bytes_per_s is None else moved / hardware.link_bytes_per_s)


def _forwards(config: RunConfig, ranks: int) -> int:
    """Of each rank in each step."""
    return -(-config.batch.global_packs // (ranks * config.batch.packs_per_micro_batch))


def _measured(run_dir: Path) -> dict[str, Any] | None:
    """What a run in this folder has measured, if there was one."""
    try:
        summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    return summary if summary.get("tokens_per_s") and summary.get("peak_flops_per_s") else None


def _lines(
    config: RunConfig, result: Estimate, data: tuple[Selection, Plan] | None, measured: dict[str, Any] | None
) -> Iterator[str]:
    yield from _describe(config, result, data)
    yield from _memory_lines(config, result, measured)
    keep = config.checkpoint.keep + (1 if config.checkpoint.keep_best and config.data.heldout else 0)
    size = result.checkpoint_bytes / GIB
    yield f"disk       {size:,.2f} GiB a checkpoint, {size * (keep + 1):,.2f} GiB for {keep} kept and one being written"
    if config.anchor.kl_top_k is not None:
        per_target = bytes_per_target(config.anchor.kl_top_k)
        whole = "" if data is None else f", {int(data[0].num_targets.sum()) * per_target / GIB:,.2f} GiB of all"
        yield f"           {per_target:,} bytes a target in data.cache_dir for anchor.kl_top_k{whole}; made once"
    yield from _time_lines(config, result, measured)


def _describe(config: RunConfig, result: Estimate, data: tuple[Selection, Plan] | None) -> Iterator[str]:
    hardware, sizes = result.hardware, result.sizes
    yield (
        f"model      {config.model.path}: {sizes.num_parameters:,} parameters, {sizes.num_layers} layers, "
        f"{sizes.num_parameters * result.element_bytes / GIB:,.2f} GiB at {result.element_bytes} bytes each"
    )
    if sizes.num_trained < sizes.num_parameters:
        what = f"{config.adapter.kind} of rank {config.adapter.rank}"
        yield (
            f"{'frozen  ' if config.adapter.kind == 'none' else 'adapters'}   "
            f"{'by model.freeze' if config.adapter.kind == 'none' else what}: {sizes.num_trained:,} parameters are "
            f"trained ({sizes.num_trained / sizes.num_parameters:.2%})"
        )
    if data is None:
        yield (
            "data       not prepared: numbers of samples, tokens and targets are unknown; full packs of single samples "
            "with every token a target are assumed, which is the most there can be (`sft-dist prepare` tells)"
        )
    else:
        plan = data[1]
        yield (
            f"data       {plan.num_samples:,} samples, {plan.num_tokens:,} tokens, {plan.num_target_tokens:,} targets "
            f"in {plan.num_packs:,} packs (fill {plan.fill:.1%})"
        )
    memory = "unknown memory" if hardware.memory_bytes is None else f"{hardware.memory_bytes / GIB:,.1f} GiB"
    each = "each" if hardware.is_gpu else "a rank, the matrix rate measured now"
    rate = f"{hardware.flops_per_s / 1e12:,.3g} TFLOP/s"
    what = f"{hardware.num_devices} x" if hardware.is_gpu else f"{hardware.num_devices} rank(s) on the"
    yield f"hardware   {what} {hardware.name}: {rate} {each}; {memory}"


def _memory_lines(config: RunConfig, result: Estimate, measured: dict[str, Any] | None) -> Iterator[str]:
    memory, hardware = result.memory, result.hardware
    if memory is None:
        yield "memory     unknown: what the layers of this model keep for the backward pass follows from values"
        return
    yield f"memory     of each {'GPU' if hardware.is_gpu else 'rank'}, GiB"
    base = 0.0 if hardware.is_gpu else _LIBRARIES_GIB
    if base:
        yield f"  {'Python and libraries':<40}{base:>8.2f}"
    for part, num_bytes in memory.parts.items():
        yield f"  {part:<40}{num_bytes / GIB:>8.2f}"
    for recomputes, text in ((True, "with recomputation of layers"), (False, "without recomputation")):
        activations = memory.activations_recomputed if recomputes else memory.activations_whole
        total = memory.total(recomputes_layers=recomputes) / GIB + base
        chosen = "  <- this run file" if recomputes == result.recomputes_layers else ""
        yield f"  {f'activations {text}':<40}{activations / GIB:>8.2f}"
        yield f"  {f'total {text}':<40}{total:>8.2f}  {_fits(total, hardware)}{chosen}"
    if hardware.is_gpu:
        stays = f"{result.host_bytes / GIB:.2f} GiB of θ̂" if result.host_bytes else "nothing of the model"
        yield f"  and on the host about 3 GiB for the libraries of each rank; {stays} stays there"
    if measured is not None and measured.get("memory_gib"):
        yield f"  measured by the run in {config.run_dir}, on {measured['ranks']} rank(s): {measured['memory_gib']:.2f}"


def _fits(total_gib: float, hardware: Hardware) -> str:
    room = hardware.room_bytes
    if room is None:
        return "of an unknown size"
    return f"of {room / GIB:,.1f}: " + ("fits" if total_gib <= room / GIB else "DOES NOT FIT")


def _time_lines(config: RunConfig, result: Estimate, measured: dict[str, Any] | None) -> Iterator[str]:
    floor, load, hardware = result.floor, result.load, result.hardware
    if floor is None or load is None:
        yield "time       unknown: operations of this kind of model cannot be counted"
        return
    again = "with layers run twice" if result.recomputes_layers else "without recomputation"
    talk = "communication unknown" if floor.communication_s is None else f"communication {floor.communication_s:.3g} s"
    bound = "" if load.is_known else "at most "
    yield (f"step       {bound}{load.tokens_per_step:,.0f} tokens, {load.model_flops / 1e12:,.3g} TFLOP of the model")
    yield (
        f"           floor {floor.step_s:.3g} s ({load.tokens_per_step / floor.step_s:,.0f} tokens/s): compute "
        f"{floor.compute_s:.3g} s ({again}), {talk}"
    )
    forwards = _forwards(config, hardware.num_devices)
    room = forwards * hardware.num_devices * config.batch.packs_per_micro_batch
    if room != config.batch.global_packs:
        yield (
            f"           batch.global_packs ({config.batch.global_packs}) fill {config.batch.global_packs / room:.0%} "
            f"of what {hardware.num_devices} ranks compute in {forwards} forward(s)"
        )
    if load.num_steps is None:
        yield "run        number of steps unknown until the data are prepared"
    else:
        times = [f"{duration(load.num_steps * floor.step_s)} at the floor"]
        times += [f"{duration(load.num_steps * floor.step_s / part)} at {part:.0%} of it" for part in EFFICIENCIES]
        tokens = load.num_steps * load.tokens_per_step
        yield f"run        {load.num_steps:,} steps, {bound}{tokens:,.0f} tokens: {', '.join(times)}"
    if measured is not None:
        yield _measured_line(config, load, measured)


def _measured_line(config: RunConfig, load: Load, measured: dict[str, Any]) -> str:
    """The run's speed beside the floor of the devices that it ran on."""
    floor = measured["peak_flops_per_s"] * load.tokens_per_step / load.hardware_flops
    return (
        f"measured   {measured['tokens_per_s']:,.0f} tokens/s by the run in {config.run_dir} on {measured['ranks']} "
        f"rank(s): {measured['tokens_per_s'] / floor:.0%} of the floor of its devices ({floor:,.0f} tokens/s)"
    )
