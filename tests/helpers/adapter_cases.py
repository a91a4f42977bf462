"""What the ranks of a test world compute about adapters."""

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from sft_dist.distributed import collectives
from sft_dist.distributed.world import World
from sft_dist.errors import UserError
from sft_dist.model import engine as engines
from sft_dist.model import zero
from sft_dist.model.layers import compile_layers
from sft_dist.preparation import training_set
from sft_dist.train.gradient import accumulate_gradient
from tests.helpers import resume_cases, world_cases
from tests.helpers.resume_cases import run_config


def gradient(case: dict[str, Any], folder: Path, world: World) -> dict[str, Any]:
    """Loss and whole gradient of step 0 at the state of a checkpoint, or at the start; which parameters are sharded."""
    import torch._dynamo
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.utils import safe_get_full_grad, safe_get_full_optimizer_state
    from torch._dynamo.utils import counters

    config = run_config(case, folder)
    selection, plan = training_set(config)
    torch._dynamo.reset()
    counters.clear()
    with mock.patch.object(engines, "compile_layers", partial(compile_layers, backend="aot_eager")):
        engine = engines.training_engine(config, world, None)
    if "resume" in case:
        engine.load(Path(case["resume"]))
    engine.train()
    loss, _ = accumulate_gradient(engine, selection, plan, 0, config, world)
    parameters = dict(engine.causal_lm.named_parameters())
    gathered = [name for name, p in parameters.items() if p.ds_status == ZeroParamStatus.AVAILABLE]
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    gradients = {name: safe_get_full_grad(parameter).clone() for name, parameter in trained.items()}
    assert engine.step()[0]
    answer = {
        "loss": loss,
        "gradients": gradients,
        "samples": [index for pack in plan.packs(0) for index in pack],
        "unsharded": [n for n, p in parameters.items() if p.ds_tensor.numel() != -(-p.ds_numel // world.size)],
        "gathered": gathered,
        "leaves": engine.settings["decoder_layers"],
        "graph_breaks": dict(counters["graph_break"]),
        "num_states": sum(safe_get_full_optimizer_state(p, "exp_avg").numel() for p in trained.values()),
    }
    engine.close()
    return answer


def start(case: dict[str, Any], folder: Path, world: World) -> Any:
    """The parameters that an engine starts from, whole; or what every rank says instead."""
    try:
        engine = engines.training_engine(run_config(case, folder), world, None)
    except UserError as error:
        return collectives.gather(f"{type(error).__name__}: {error}")
    found = {}
    for name, parameter in engine.causal_lm.named_parameters():
        with zero.gathered(parameter):
            if parameter.requires_grad:
                found[name] = parameter.detach().clone()
    engine.close()
    return found


CASES = {
    "train": resume_cases.train,
    "exact": resume_cases.exact,
    "refused": resume_cases.refused,
    "gradient": gradient,
    "start": start,
}

if __name__ == "__main__":
    world_cases.main(CASES)
