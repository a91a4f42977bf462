"""What the ranks of a test world compute about resuming: training from a checkpoint, and the state before and after."""

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor

from sft_dist import faults
from sft_dist.config import (
    AdapterConfig,
    AnchorConfig,
    BatchConfig,
    DataConfig,
    HeadConfig,
    LoggingConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
)
from sft_dist.data.selection import Selection
from sft_dist.distributed import collectives
from sft_dist.distributed.world import World
from sft_dist.errors import UserError
from sft_dist.model import engine as engines
from sft_dist.model import groups, loading, zero
from sft_dist.model.anchor import Pretrained
from sft_dist.model.engine import Engine
from sft_dist.preparation import training_set, with_labels
from sft_dist.train import contract, start_answers
from sft_dist.train.drift import DriftMeter
from sft_dist.train.evaluate import heldout_details, scoring_packs
from sft_dist.train.gradient import accumulate_gradient
from sft_dist.train.metrics import Metrics
from tests.helpers import world_cases


def run_config(case: dict[str, Any], folder: Path) -> RunConfig:
    config = RunConfig(
        run_dir=str(folder / "run"),
        seed=3,
        model=ModelConfig(
            path=case["model"],
            dtype=case.get("dtype", "float32"),
            freeze=case.get("freeze", ()),
            control_tokens=case.get("control_tokens", ()),
            compile=case.get("compile", False),
            allow_new_parameters=case.get("allow_new_parameters", ()),
            gradient_checkpointing=case.get("gradient_checkpointing", True),
        ),
        adapter=AdapterConfig(**case.get("adapter", {})),
        data=DataConfig(
            train=({"path": case["data"]},),
            max_length=384,
            cache_dir=case.get("cache_dir", str(Path(case["data"]).parent / "prepared")),
            num_processes=1,
            chat_template=case.get("chat_template"),
        ),
        objective=ObjectiveConfig(neftune_alpha=case.get("neftune_alpha", 0.0)),
        batch=BatchConfig(
            global_packs=case.get("global_packs", 5),
            reduce_once=case.get("reduce_once", "auto"),
            balance_steps=case.get("balance_steps", 1),
        ),
        optimizer=OptimizerConfig(**{"learning_rate": 3e-3, "weight_decay": 0.1} | case.get("optimizer", {})),
        anchor=AnchorConfig(**case.get("anchor", {})),
        head=HeadConfig(**case.get("head", {})),
        schedule=ScheduleConfig(epochs=case.get("epochs", 8)),
        deepspeed=case.get("deepspeed", "cpu"),
    )
    return with_labels(config)


def whole_weights(engine: Engine) -> dict[str, Tensor]:
    found = {}
    for name, parameter in engine.causal_lm.named_parameters():
        with zero.gathered(parameter):
            found[name] = parameter.detach().clone()
    return found


def whole_state(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """As DeepSpeed itself gathers it: weights, master weights and moments of every parameter."""
    found: dict[str, dict[str, Tensor]] = {"weight": whole_weights(engine)}
    found |= {"master": {}, "exp_avg": {}, "exp_avg_sq": {}}
    for name, parameter in engine.causal_lm.named_parameters():
        if parameter.requires_grad:
            found["master"][name] = safe_get_full_fp32_param(parameter).clone()
            for moment in ("exp_avg", "exp_avg_sq"):
                found[moment][name] = safe_get_full_optimizer_state(parameter, moment).clone()
    return found


def hyper_parameters(engine: Engine) -> dict[str, Any]:
    """What AdamW steps with: its count for every sub-group, and weight decay by parameter."""
    optimizer = engine._engine.optimizer
    inner = optimizer.optimizer
    steps = [inner.state[flat]["step"] for flat in optimizer.fp32_partitioned_groups_flat]
    names = engine._engine.param_names
    return {
        "steps": [float(step) for step in steps],
        "shared": len({id(step) for step in steps}) < len(steps),
        "weight_decay": {
            names[parameter]: inner.param_groups[optimizer.sub_group_to_group_id[number]]["weight_decay"]
            for number, group in enumerate(optimizer.fp16_groups)
            for parameter in group
        },
        "counters": [engine._engine.global_steps, engine._engine.skipped_steps],
    }


def local_state(engine: Engine) -> list[Tensor]:
    """Everything this rank holds, padding included."""
    optimizer = engine._engine.optimizer
    states = [optimizer.optimizer.state[flat] for flat in optimizer.fp32_partitioned_groups_flat]
    flats = [flat.detach() for flat in optimizer.fp32_partitioned_groups_flat]
    shards = [parameter.ds_tensor for parameter in engine._engine.module.parameters()]
    return [value.clone() for value in (*flats, *shards, *(v for state in states for _, v in sorted(state.items())))]


def train(case: dict[str, Any], folder: Path, world: World) -> dict[str, Any]:
    """Take the steps [first, last), from a checkpoint where one is given; save before them where asked to, or after."""
    config = run_config(case, folder)
    selection, plan = training_set(config)
    initial = Path(case["initial"]) if "initial" in case else None
    engine = engines.training_engine(config, world, initial)
    answer: dict[str, Any] = {"losses": [], "samples": []}
    # Adapters are no part of θ̂, and no run measures how far they are from it.
    pretrained = engine.pretrained(config, initial) if config.adapter.kind == "none" else None
    answer["kept"] = {} if pretrained is None else {name: kept.dtype for name, kept in pretrained.kept.items()}
    if "start" in case:
        answer["start"] = whole_weights(engine)
    if config.anchor.kl_top_k is not None:
        selection = with_start_answers(config, selection, plan, engine, world, answer)
    if "resume" in case:
        torch.manual_seed(99)
        engine.load(Path(case["resume"]))
        answer["loaded"] = whole_state(engine)
        answer["with"] = hyper_parameters(engine)
    if "save_loaded" in case:
        answer["stored"] = save(engine, Path(case["save_loaded"]))
    first, last = case["steps"]
    for step in range(first, last):
        answer["losses"].append(take_step(engine, config, selection, plan, step, world))
        forwards = plan.micro_batches(step, data_rank=world.rank, data_size=world.size, packs_per_micro_batch=1)
        dealt = [index for part in collectives.gather(forwards) for pack in part for index in pack]
        answer["samples"].append(sorted(int(selection.samples[index]) for index in dealt))
    answer["state"] = whole_state(engine)
    answer["drift"] = drift(engine, pretrained, folder)
    if "save" in case:
        answer["stored"] = save(engine, Path(case["save"]))
    engine.close()
    return answer


def with_start_answers(
    config: RunConfig, selection: Selection, plan: Any, engine: Engine, world: World, answer: dict[str, Any]
) -> Selection:
    """As a run does it, before it takes a checkpoint's weights."""
    model_config = loading.load_config(config.model, config.data.max_length)
    facts = collectives.on_main(lambda: contract.facts(config, selection.dataset, None, model_config, plan))
    said: list[str] = []
    found = start_answers.kept(selection, plan, engine, config, facts, world, said.append)
    assert found.top is not None
    answer["table"], answer["said"] = str(found.top.folder), said
    return found


def drift(engine: Engine, pretrained: Pretrained | None, folder: Path) -> dict[str, Any]:
    """As a run records it."""
    metrics = Metrics(folder / "drift", LoggingConfig(tensorboard=False), first_step=0, is_main=False)
    meter = DriftMeter(engine, metrics, pretrained, at_evaluations=True)
    found: list[dict[str, Any]] = []
    with mock.patch.object(metrics, "record", lambda kind, step, **values: found.append(values)):
        meter.after_evaluation(1)
    return found[0] if found else {}


def save(engine: Engine, folder: Path) -> dict[str, Tensor]:
    """What every parameter of the saved checkpoint is, read whole."""
    engine.save(folder)
    collectives.barrier()
    return {name: value.clone() for name, value in engines.stored_parameters(folder)}


def take_step(engine: Engine, config: RunConfig, selection: Selection, plan: Any, step: int, world: World) -> float:
    engine.train()
    engine.set_lr(3e-3 / (1 + step))
    loss, _ = accumulate_gradient(engine, selection, plan, step, config, world)
    applied, _ = engine.step()
    assert applied
    return loss


def exact(case: dict[str, Any], folder: Path, world: World) -> dict[str, Any]:
    """Whether the step after every checkpoint gives the same bits in a new engine, and in one never disturbed.

    The first engine evaluates and saves after every step; each of the others loads one save and takes one step; the
    last one takes all steps and does nothing else.
    """
    config = run_config(case, folder)
    selection, plan = training_set(config)
    num_steps = plan.num_steps
    folders = [folder / f"exact-{case['name']}-{step}" for step in range(1, num_steps + 1)]
    engine = engines.training_engine(config, world, None)
    after, losses = [], []
    for step in range(num_steps):
        losses.append(take_step(engine, config, selection, plan, step, world))
        after.append(local_state(engine))
        if case.get("evaluate", True):
            heldout_details(engine, selection, scoring_packs(selection)[:2], world, 1)
        engine.save(folders[step])
    engine.close()
    collectives.barrier()
    differing = []
    for step in range(1, num_steps):
        torch.manual_seed(step)
        engine = engines.training_engine(config, world, None)
        engine.load(folders[step - 1])
        same = _equal(local_state(engine), after[step - 1])
        loss = take_step(engine, config, selection, plan, step, world)
        if not (same and loss == losses[step] and _equal(local_state(engine), after[step])):
            differing.append(step)
        engine.close()
    engine = engines.training_engine(config, world, None)
    plain = [take_step(engine, config, selection, plan, step, world) for step in range(num_steps)]
    undisturbed = plain == losses and _equal(local_state(engine), after[-1])
    # Back to the first checkpoint, in an engine that has trained to the end.
    engine.load(folders[0])
    rewound = take_step(engine, config, selection, plan, 1, world) == losses[1]
    rewound = rewound and _equal(local_state(engine), after[1])
    engine.close()
    return {
        "differing": collectives.gather(differing),
        "undisturbed": collectives.gather(undisturbed),
        "rewound": collectives.gather(rewound),
        "folder": str(folders[0]),
        "num_steps": num_steps,
        "steps_per_epoch": plan.steps_per_epoch,
        "losses": losses,
        "num_micro_batches": config.batch.micro_batches_on(world.size),
    }


def _equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def refused(case: dict[str, Any], folder: Path, world: World) -> list[str]:
    """What every rank says to a checkpoint that does not fit."""
    config = run_config(case, folder)
    by_decay = groups.parameter_groups
    one_group = mock.patch.object(
        groups,
        "parameter_groups",
        lambda *arguments: [{"params": [p for group in by_decay(*arguments) for p in group["params"]], "name": "all"}],
    )
    with one_group if case.get("one_group") else nullcontext():
        engine = engines.training_engine(config, world, None)
    try:
        engine.load(Path(case["resume"]))
        said = "nothing"
    except UserError as error:
        said = f"{type(error).__name__}: {error}"
    engine.close()
    return collectives.gather(said)


def refused_answers(case: dict[str, Any], folder: Path, world: World) -> dict[str, list[str]]:
    """What every rank says where the start's answers cannot be had, and whether files of that name are there then."""
    config = run_config(case, folder)
    selection, plan = training_set(config)
    engine = engines.training_engine(config, world, None)

    def ask(config: RunConfig, fault: str = "") -> list[str]:
        with mock.patch.dict(os.environ, {faults.VARIABLE: fault}):
            try:
                with_start_answers(config, selection, plan, engine, world, {})
                said = "nothing"
            except UserError as error:
                said = f"{type(error).__name__}: {error}"
        return collectives.gather(f"{said} {len(list(Path(config.data.cache_dir).glob('top-*')))}")

    anchor = config.anchor.model_copy(update={"kl_top_k": 1_000})
    answer = {
        "more than there are": ask(config.model_copy(update={"anchor": anchor})),
        "full disk": ask(config, "start_answers.before_write:rank=1:step=2:oserror"),
        "made": ask(config),
    }
    collectives.on_main(lambda: _give_to_other_data(Path(config.data.cache_dir)))
    answer["other data"] = ask(config)
    engine.close()
    return answer


def _give_to_other_data(cache_dir: Path) -> None:
    (manifest,) = cache_dir.glob("top-*/manifest.json")
    tree = json.loads(manifest.read_text())
    tree["identity"]["data"] = "other"
    manifest.write_text(json.dumps(tree))


CASES = {"refused_answers": refused_answers, "train": train, "exact": exact, "refused": refused}

if __name__ == "__main__":
    world_cases.main(CASES)
