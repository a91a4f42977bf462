"""What the ranks of a test world compute; started by tests/helpers/worlds.py, one process a rank."""

import errno
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from sft_dist import faults
from sft_dist.config import BatchConfig, DataConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, RunConfig
from sft_dist.data.plan import Plan
from sft_dist.data.prepare import prepare
from sft_dist.data.sample import Sample
from sft_dist.data.selection import Example, Policy, Selection
from sft_dist.data.store import PreparedDataset
from sft_dist.distributed import collectives
from sft_dist.distributed.world import World, find_world
from sft_dist.errors import StorageError
from sft_dist.model import engine as engines
from sft_dist.model import probe, zero
from sft_dist.model.batch import collate
from sft_dist.model.fused_head import LossTerms
from sft_dist.model.layers import compile_layers
from sft_dist.preparation import training_set
from sft_dist.session import close_session, open_session
from sft_dist.train import checkpoint, saving
from sft_dist.train.checkpoint import TrainState
from sft_dist.train.details import Details
from sft_dist.train.evaluate import heldout_details, score_pack, scoring_packs
from sft_dist.train.gradient import accumulate_gradient
from sft_dist.train.meter import PhaseClock
from sft_dist.train.offenders import Search

MAX_LENGTH = 384


def run_config(case: dict[str, Any], folder: Path) -> RunConfig:
    return RunConfig(
        run_dir=str(folder / "run"),
        seed=case.get("seed", 0),
        model=ModelConfig(
            path=case["model"],
            attention=case.get("attention", "auto"),
            dtype=case.get("dtype", "auto"),
            gradient_checkpointing=case.get("gradient_checkpointing", True),
            control_tokens=case.get("control_tokens", ()),
            allow_new_parameters=case.get("allow_new_parameters", ()),
            compile=case.get("compile", False),
        ),
        data=DataConfig(
            train=({"path": case["data"]},),
            max_length=MAX_LENGTH,
            cache_dir=str(folder / "prepared"),
            num_processes=1,
            chat_template=case.get("chat_template"),
        ),
        objective=ObjectiveConfig(train_on=case.get("train_on", "assistant")),
        batch=BatchConfig(
            global_packs=case["global_packs"],
            packs_per_micro_batch=case.get("per_forward", 1),
            reduce_once=case.get("reduce_once", "auto"),
        ),
        optimizer=OptimizerConfig(max_grad_norm=0.0),
        deepspeed=case.get("deepspeed", "auto"),
    )


def gradient(case: dict[str, Any], folder: Path, world: World) -> dict[str, Any]:
    """The whole gradient and loss of step 0, and the conversations in it."""
    from deepspeed.utils import safe_get_full_grad

    config = run_config(case, folder)
    selection, plan = training_set(config)
    with nullcontext() if case.get("leaves", True) else mock.patch.object(engines, "decoder_layers", lambda _: []):
        engine = engines.training_engine(config, world, None)
    engine.train()
    loss, _ = accumulate_gradient(engine, selection, plan, 0, config, world)
    forwards = plan.micro_batches(
        0, data_rank=world.rank, data_size=world.size, packs_per_micro_batch=config.batch.packs_per_micro_batch
    )
    gradients = {
        name.removeprefix("model."): safe_get_full_grad(parameter).clone()
        for name, parameter in engine._engine.module.named_parameters()
    }
    return {
        "loss": loss,
        "gradients": gradients,
        "samples": [index for pack in plan.packs(0) for index in pack],
        "num_forwards": len(forwards),
        "empty_forwards": sum(not pack for pack in forwards),
        "settings": engine.settings,
    }


def repeated_gradient(case: dict[str, Any], folder: Path, world: World) -> dict[str, Any]:
    """The gradient of step 0 once, after forgetting it again, and once more without forgetting; no step is taken."""
    from deepspeed.utils import safe_get_full_grad

    config = run_config(case, folder)
    selection, plan = training_set(config)
    engine = engines.training_engine(config, world, None)
    answers: dict[str, Any] = {"has_compiler": "torch._inductor.compile_fx" in sys.modules}
    for name in ("first", "cleared", "added"):
        if name == "cleared":
            engine.clear_gradients()
        accumulate_gradient(engine, selection, plan, 0, config, world)
        whole = dict(engine.causal_lm.named_parameters())
        answers[name] = {key: safe_get_full_grad(parameter).clone() for key, parameter in whole.items()}
        parts = collectives.gather(dict(engine.local_gradients()))
        answers[f"{name} in parts"] = {key: torch.cat([part[key] for part in parts]) for key in whole}
    return answers


def scores(case: dict[str, Any], folder: Path, world: World) -> list[tuple[int, int, int, float]]:
    """(sample, message, tokens, logprob) of every turn of the data set, packed."""
    from sft_dist.data.plan import distribute

    config = run_config(case, folder)
    dataset = prepare(config.data.train, config.model, config.data)
    selection = Selection(dataset, Policy(MAX_LENGTH))
    engine = engines.inference_engine(config, world, None)
    found = []
    for pack in distribute(scoring_packs(selection), world.rank, world.size, 2):
        found += [(s.example, s.message, s.num_tokens, s.logprob) for s in score_pack(engine, selection, pack)]
    return sorted(item for part in collectives.gather(found) for item in part)


def stepped(case: dict[str, Any], folder: Path, world: World) -> dict[str, Any]:
    """Gradient norms of steps that were really taken, and the parameters after them."""
    config = run_config(case, folder)
    selection, plan = training_set(config)
    engine = engines.training_engine(config, world, None)
    engine.train()
    norms = []
    for step in range(case["steps"]):
        engine.set_lr(0.1)
        accumulate_gradient(engine, selection, plan, step, config, world)
        applied, norm = engine.step()
        assert applied
        norms.append(norm)
    whole = {}
    for name, parameter in engine.causal_lm.named_parameters():
        with zero.gathered(parameter):
            whole[name] = parameter.detach().clone()
    return {"norms": norms, "parameters": whole}


def same_again(case: dict[str, Any], folder: Path, world: World) -> dict[str, torch.Tensor]:
    """The whole gradient of a step of sixteen micro-batches that are all the same."""
    from deepspeed.utils import safe_get_full_grad

    engine = engines.training_engine(run_config(case, folder), world, None)
    engine.train()
    batch = collate([random_example(length, np.random.default_rng(world.rank)) for length in (30, 50)])
    for number in range(16):
        loss, _ = engine.loss(batch, LossTerms())
        engine.backward(loss / batch.num_targets, is_last=number == 15)
    return {name: safe_get_full_grad(p).clone() for name, p in engine.causal_lm.named_parameters()}


def compiled(case: dict[str, Any], folder: Path, world: World) -> dict[str, Any]:
    """Losses and gradient norms of steps over packs of changing layouts, and the graphs that existed after each."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    # Without inductor: what is asked is how often dynamo captures a layer, not what the graph becomes.
    capture = partial(compile_layers, backend="aot_eager")
    with mock.patch.object(engines, "compile_layers", capture):
        engine = engines.training_engine(run_config(case, folder), world, None)
    probe.plain_logprobs(engine.causal_lm, range(3, 20))  # as before every run; costs no graph
    engine.train()
    answer: dict[str, Any] = {"losses": [], "norms": [], "graphs": []}
    for step, lengths in enumerate(case["packs"]):
        rng = np.random.default_rng([step, world.rank])
        batch = collate([random_example(length, rng) for length in lengths])
        loss, _ = engine.loss(batch, LossTerms())
        engine.backward(loss, is_last=True)
        answer["losses"].append(collectives.all_sum([float(loss.detach())])[0])
        answer["norms"].append(engine.step()[1])
        answer["graphs"].append(counters["stats"]["unique_graphs"])
    return answer | {"breaks": dict(counters["graph_break"])}


def random_example(length: int, rng: np.random.Generator) -> Example:
    ids = rng.integers(3, 260, length).astype(np.int32)
    turns = np.where(np.arange(length) > 2, 0, -1).astype(np.int32)
    return Example(Sample("s", 0, "test", ids, (), num_turns=1), turns, (turns >= 0).astype(np.float32))


def parameters(case: dict[str, Any], folder: Path, world: World) -> dict[str, Any]:
    """Whole parameters as the ranks hold them and as a checkpoint holds them, and the names of those in shards."""
    config = run_config(case, folder)
    engine = engines.training_engine(config, world, None)
    whole, sharded = {}, []
    for name, parameter in engine.causal_lm.named_parameters():
        sharded += [name] if hasattr(parameter, "ds_tensor") else []
        with zero.gathered(parameter):
            whole[name] = parameter.detach().clone()
    saved_in = folder / f"saved-{Path(case['model']).name}-{config.model.dtype}"
    engine.save(saved_in)
    collectives.barrier()
    saved = {name: value.clone() for name, value in engines.stored_parameters(saved_in)}
    return {"parameters": whole, "saved": saved, "sharded": sorted(sharded)}


def full_disk(case: dict[str, Any], folder: Path, world: World) -> dict[str, Any]:
    """What every rank raises when the last one cannot write its shard, and what is left in the run folder."""
    config = run_config(case, folder)
    engine = engines.training_engine(config, world, None)
    run_dir = folder / "full"
    saving.save(run_dir, TrainState(step=1), world, engine.capture(), {})
    write = torch.save
    if world.rank == world.size - 1:

        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        torch.save = refuse
    try:
        saving.save(run_dir, TrainState(step=2), world, engine.capture(), {})
        raised = "nothing"
    except StorageError as error:
        raised = str(error)
    torch.save = write
    saving.save(run_dir, TrainState(step=3), world, engine.capture(), {})
    steps = {step: checkpoint.fault_of(path, world) for step, path in checkpoint.step_folders(run_dir).items()}
    return {"raised": collectives.gather(raised), "steps": steps}


@cache
def shared_engine(model: str, neftune_alpha: float, world: World) -> engines.Engine:
    """One engine for many cases: its steps have learning rate 0."""
    config = RunConfig(
        run_dir="unused",
        model=ModelConfig(path=model),
        data=DataConfig(max_length=MAX_LENGTH),
        objective=ObjectiveConfig(neftune_alpha=neftune_alpha),
    )
    return engines.training_engine(config, world, None)


def objective(case: dict[str, Any], folder: Path, world: World) -> dict[str, Any]:
    """Loss, NLL and gradient of one step over a prepared data set, under a policy and a layout; and its figures."""
    from deepspeed.utils import safe_get_full_grad

    selection = Selection(PreparedDataset(Path(case["prepared"])), Policy(**case["policy"]))
    plan = Plan(
        selection.lengths,
        selection.num_targets,
        mass=selection.mass,
        repeats=np.array([case["repeats"].get(selection.source_names[code], 1.0) for code in selection.source_codes]),
        conversations=selection.indices,
        max_length=selection.policy.max_length,
        global_packs=case["global_packs"],
        seed=case["seed"],
        epochs=1,
    )
    config = RunConfig(
        run_dir="unused",
        seed=case["seed"],
        model=ModelConfig(path=case["model"]),
        objective=ObjectiveConfig(**case["objective"]),
        batch=BatchConfig(global_packs=case["global_packs"], packs_per_micro_batch=case["per_forward"]),
    )
    engine = shared_engine(case["model"], config.objective.neftune_alpha, world)
    engine.train()
    engine.set_lr(0.0)
    step = plan.num_steps - 1 if case["last_step"] else 0
    details = Details(selection.source_names) if case["details"] else None
    loss, nll = accumulate_gradient(engine, selection, plan, step, config, world, details)
    gradients = {
        name.removeprefix("model."): safe_get_full_grad(parameter).clone()
        for name, parameter in engine._engine.module.named_parameters()
    }
    engine.step()
    forwards = plan.micro_batches(
        step, data_rank=world.rank, data_size=world.size, packs_per_micro_batch=case["per_forward"]
    )
    return {
        "loss": loss,
        "nll": nll,
        "gradients": gradients,
        "samples": [int(selection.samples[index]) for pack in plan.packs(step) for index in pack],
        "forwards": collectives.gather(forwards),
        "details": None if details is None else details.as_dict(),
    }


def heldout(case: dict[str, Any], folder: Path, world: World) -> dict[str, Any]:
    selection = Selection(PreparedDataset(Path(case["prepared"])), Policy(**case["policy"]))
    engine = shared_engine(case["model"], case["neftune_alpha"], world)
    return heldout_details(engine, selection, scoring_packs(selection), world, case["per_forward"]).as_dict()


def discarded_step(case: dict[str, Any], folder: Path, world: World) -> dict[str, Any]:
    """State and next gradient around a step that rank 1 breaks, and the same in an engine that never had that step."""
    config = run_config(case, folder)
    selection, plan = training_set(config)
    answers: dict[str, Any] = {}
    for name in ("broken", "never"):
        engine = engines.training_engine(config, world, None)
        engine.train()
        engine.set_lr(0.01)
        accumulate_gradient(engine, selection, plan, 0, config, world)
        engine.step()
        answers[f"{name}: before"] = _optimizer_state(engine)
        if name == "broken":
            with mock.patch.dict(os.environ, {faults.VARIABLE: f"{case['fault']}:rank=1:step=2:nan"}):
                answers["loss"], _ = accumulate_gradient(engine, selection, plan, 1, config, world)
            if case["fault"] == "step.loss":
                engine.clear_gradients()
            else:
                answers["is_applied"], answers["norm"] = engine.step()
        answers[f"{name}: after"] = _optimizer_state(engine)
        accumulate_gradient(engine, selection, plan, 2, config, world)
        answers[f"{name}: gradient"] = dict(engine.local_gradients())
        answers[f"{name}: norm"] = engine.step()[1]
        answers[f"{name}: end"] = _optimizer_state(engine)
        answers["settings"] = engine.settings
        engine.close()
    return answers


def _optimizer_state(engine: engines.Engine) -> dict[str, torch.Tensor]:
    optimizer = engine._engine.optimizer
    tensors = {f"weight {n}": t.detach().clone() for n, t in enumerate(optimizer.fp32_partitioned_groups_flat)}
    tensors |= {f"shard {name}": p.ds_tensor.clone() for name, p in engine.causal_lm.named_parameters()}
    for n, state in enumerate(optimizer.optimizer.state.values()):
        tensors |= {f"{key} {n}": value.clone() for key, value in state.items()}
    return tensors


def offenders_found(case: dict[str, Any], folder: Path, world: World) -> dict[str, Any]:
    """Reports on a loss that breaks once, on held-out data whose embedding breaks, and on weights that are broken."""
    config = run_config(case, folder)
    selection, plan = training_set(config)
    engine = engines.training_engine(config, world, None)
    own_losses = [torch.tensor(float("nan") if world.rank == 1 else 1.0)]
    search = Search(engine, config, world, PhaseClock(engine.device))
    step = partial(search.step, "the loss", 0, selection, plan, own_losses)
    heldout_data = partial(search.heldout, "the NLL", 4, selection, scoring_packs(selection), name="heldout")
    answers = {"finite again": step(), "finite heldout": heldout_data()}

    def spoil(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill((inputs[0] == case["token"])[..., None], torch.nan)

    with engine.causal_lm.get_input_embeddings().register_forward_hook(spoil):
        answers["heldout"] = heldout_data()
    if world.rank == 1:
        name, parameter = list(engine.causal_lm.named_parameters())[2]
        parameter.ds_tensor.data[3] = torch.inf
    answers["weights"] = step()
    answers["name"] = collectives.gather(name if world.rank == 1 else "")[1]
    return {key: str(value) for key, value in answers.items()} | {
        "ids": [offender.id for offender in answers["heldout"].offenders]
    }


CASES = {
    "gradient": gradient,
    "repeated_gradient": repeated_gradient,
    "scores": scores,
    "parameters": parameters,
    "stepped": stepped,
    "same_again": same_again,
    "compiled": compiled,
    "full_disk": full_disk,
    "objective": objective,
    "heldout": heldout,
    "discarded_step": discarded_step,
    "offenders_found": offenders_found,
}


def main(cases: dict[str, Callable[[dict[str, Any], Path, World], Any]]) -> None:
    folder = Path(sys.argv[1])
    world = find_world(os.environ)
    open_session(world)
    for number, case in enumerate(json.loads((folder / "cases.json").read_text())):
        answer = cases[case["case"]](case, folder, world)
        if world.is_main:
            torch.save(answer, folder / f"answer-{number}.pt")
    close_session()
    # As the command line leaves: threads of the process group can abort a rank in the interpreter's shutdown.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(CASES)
