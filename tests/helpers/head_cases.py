"""What the ranks of a test world compute of runs with a prediction head; see tests/helpers/world_cases.py."""

from pathlib import Path
from typing import Any

from sft_dist.config import BatchConfig, DataConfig, HeadConfig, ModelConfig, OptimizerConfig, RunConfig
from sft_dist.distributed.world import World
from sft_dist.model import engine as engines
from sft_dist.model import zero
from sft_dist.preparation import training_set, with_labels
from sft_dist.train.gradient import accumulate_gradient
from tests.helpers.world_cases import main


def gradient(case: dict[str, Any], folder: Path, world: World) -> dict[str, Any]:
    """The weights before step 0, its whole gradient and loss, and the records in it."""
    from deepspeed.utils import safe_get_full_grad

    config = with_labels(
        RunConfig(
            run_dir=str(folder / "run"),
            model=ModelConfig(path=case["model"], dtype="float32"),
            head=HeadConfig(kind=case["kind"]),
            data=DataConfig(
                train=({"path": case["data"]},),
                max_length=case["max_length"],
                cache_dir=str(folder / "prepared"),
                num_processes=1,
            ),
            batch=BatchConfig(
                global_packs=4, packs_per_micro_batch=case["per_forward"], reduce_once=case["reduce_once"]
            ),
            optimizer=OptimizerConfig(max_grad_norm=0.0),
        )
    )
    selection, plan = training_set(config)
    engine = engines.training_engine(config, world, None)
    whole = {}
    for name, parameter in engine.causal_lm.named_parameters():
        with zero.gathered(parameter):
            whole[name] = parameter.detach().clone()
    engine.train()
    loss, _ = accumulate_gradient(engine, selection, plan, 0, config, world)
    forwards = plan.micro_batches(
        0, data_rank=world.size - 1, data_size=world.size, packs_per_micro_batch=case["per_forward"]
    )
    return {
        "labels": list(config.head.labels),
        "parameters": whole,
        "loss": loss,
        "gradients": {n: safe_get_full_grad(p).clone() for n, p in engine.causal_lm.named_parameters()},
        "samples": [int(selection.indices[index]) for pack in plan.packs(0) for index in pack],
        "empty_forwards": sum(not pack for pack in forwards),
    }


CASES = {"gradient": gradient}

if __name__ == "__main__":
    main(CASES)
