"""The gradient of one optimizer step: every forward and backward of this rank, and the step's loss over all ranks."""

import numpy as np
import torch

from sft_dist.config import RunConfig
from sft_dist.data.plan import Plan
from sft_dist.data.selection import Selection
from sft_dist.distributed import collectives
from sft_dist.distributed.world import World
from sft_dist.model.batch import collate
from sft_dist.model.engine import Engine
from sft_dist.train import objective
from sft_dist.train.details import Details


def accumulate_gradient(
    engine: Engine,
    selection: Selection,
    plan: Plan,
    step: int,
    config: RunConfig,
    world: World,
    details: Details | None = None,
) -> tuple[float, float]:
    """All forwards and backwards of one step; returns its loss and its NLL over all ranks, and fills in `details`.

    The loss is what is stepped on; the NLL has the same weights, and no label smoothing and z-loss.
    docs/objective.md, section 5.
    """
    micro_batches = plan.micro_batches(
        step, data_rank=world.rank, data_size=world.size, packs_per_micro_batch=config.batch.packs_per_micro_batch
    )
    denominator = plan.denominator(step)
    terms = objective.loss_terms(config.objective)
    # On the device: reading a loss would make the host wait for its forward.
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)  # loss, NLL
    for number, pack in enumerate(micro_batches):
        _seed_noise(config.seed, step, number, world.rank)
        examples = [selection[index] for index in pack]
        batch = collate(examples)
        loss, values = engine.loss(batch, terms, with_top=details is not None)
        engine.backward(loss / denominator, is_last=number == len(micro_batches) - 1)
        loss = loss.detach()
        nll = loss if objective.is_plain(config.objective) else objective.weighted_nll(values.logprob, batch)
        sums += torch.stack([loss, nll])
        if details is not None:
            details.add(examples, values)
    if details is not None:
        details.reduce()
    total_loss, total_nll = collectives.all_sum(sums.tolist())
    return total_loss / denominator, total_nll / denominator


def _seed_noise(seed: int, step: int, micro_step: int, rank: int) -> None:
    """Dropout and NEFTune follow from the position in the run, so a resumed run draws what it would have drawn."""
    state = np.random.SeedSequence([seed, step, micro_step, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]) >> 1)
