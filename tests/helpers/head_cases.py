"""What the ranks of a test world compute of runs with a prediction head; see tests/helpers/world_cases.py."""

from pathlib import Path
from typing import Any

from sft_dist.config import (
    AnchorConfig,
    BatchConfig,
    DataConfig,
    HeadConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RunConfig,
)
from sft_dist.distributed.world import World
from sft_dist.model import engine as engines
from sft_dist.model import zero
from sft_dist.preparation import training_set, with_labels
from sft_dist.train.gradient import accumulate_gradient
from tests.helpers import resume_cases
from tests.helpers.world_cases import main


def run_config(case: dict[str, Any], folder: Path) -> RunConfig:
    return with_labels(
        RunConfig(
            run_dir=str(folder / "run"),
            model=ModelConfig(path=case["model"], dtype="float32"),
            head=HeadConfig(
                kind=case["kind"],
                learning_rate=case.get("head_rate"),
                freeze_backbone=case.get("is_frozen", False),
                **case.get("head", {}),
            ),
            objective=ObjectiveConfig(normalise=case.get("normalise", "token")),
            anchor=AnchorConfig(**case.get("anchor", {})),
            data=DataConfig(
                train=({"path": case["data"]},),
                max_length=case["max_length"],
                cache_dir=str(folder / "prepared"),
                num_processes=1,
            ),
            batch=BatchConfig(
                global_packs=case.get("global_packs", 4),
                packs_per_micro_batch=case["per_forward"],
                reduce_once=case["reduce_once"],
            ),
            # A large eps: where gradients are rounding alone, AdamW would blow it up to whole steps.
            optimizer=OptimizerConfig(max_grad_norm=0.0, learning_rate=0.01, eps=0.01),
        )
    )


def gradient(case: dict[str, Any], folder: Path, world: World) -> dict[str, Any]:
    """The weights before step 0, its whole gradient and loss, and the records in it."""
    from deepspeed.utils import safe_get_full_grad

    config = run_config(case, folder)
    selection, plan = training_set(config)
    engine = engines.training_engine(config, world, None)
    whole = _whole_parameters(engine)
    engine.train()
    loss, nll = accumulate_gradient(engine, selection, plan, 0, config, world)
    forwards = plan.micro_batches(
        0, data_rank=world.size - 1, data_size=world.size, packs_per_micro_batch=case["per_forward"]
    )
    return {
        "labels": list(config.head.labels),
        "parameters": whole,
        "loss": loss,
        "nll": nll,
        "gradients": {n: safe_get_full_grad(p).clone() for n, p in engine.causal_lm.named_parameters()},
        "samples": [int(selection.indices[index]) for pack in plan.packs(0) for index in pack],
        "empty_forwards": sum(not pack for pack in forwards),
    }


def continued(case: dict[str, Any], folder: Path, world: World) -> dict[str, Any]:
    """The weights after two steps, the first of which was taken here and saved, or elsewhere and is loaded."""
    config = run_config(case, folder)
    selection, plan = training_set(config)
    engine = engines.training_engine(config, world, None)
    engine.train()
    saved = Path(case["saved"])
    answers = {"start": _whole_parameters(engine)}

    def step() -> None:
        engine.set_lr(config.optimizer.learning_rate)
        accumulate_gradient(engine, selection, plan, 0, config, world)
        engine.step()

    if saved.exists():
        engine.load(saved)
    else:
        step()
        engine.save(saved)
    answers["first"] = _whole_parameters(engine)
    step()
    return answers | {"second": _whole_parameters(engine)}


def _whole_parameters(engine: engines.Engine) -> dict[str, Any]:
    whole = {}
    for name, parameter in engine.causal_lm.named_parameters():
        with zero.gathered(parameter):
            whole[name] = parameter.detach().clone()
    return whole


CASES = {"gradient": gradient, "continued": continued, "exact": resume_cases.exact}

if __name__ == "__main__":
    main(CASES)
