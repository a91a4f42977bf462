"""The gradient of one optimizer step: every forward and backward of this rank, and the step's loss over all ranks."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sft_dist.config import RunConfig
from sft_dist.data.plan import Plan
from sft_dist.data.selection import Selection
from sft_dist.distributed import collectives
from sft_dist.distributed.world import World
from sft_dist.model.engine import Engine
from sft_dist.train import objective
from sft_dist.train.details import Details
from sft_dist.train.feeding import Feed, micro_batches
from sft_dist.train.meter import PhaseClock


def accumulate_gradient(
    engine: Engine,
    selection: Selection,
    plan: Plan,
    step: int,
    config: RunConfig,
    world: World,
    details: Details | None = None,
    *,
    feed: Feed | None = None,
    clock: PhaseClock | None = None,
) -> tuple[float, float]:
    """All forwards and backwards of one step; returns its loss and its NLL over all ranks, and fills in `details`.

    The loss is what is stepped on; the NLL has the same weights, and no label smoothing and z-loss.
    docs/objective.md, section 5. Without a `feed` the micro-batches are made here. The host waits for the device once,
    for the last forward's loss, when the last backward is already under way.
    """
    clock = clock or PhaseClock(engine.device)
    source = micro_batches(selection, plan, [step], world, config.batch.packs_per_micro_batch)
    denominator = plan.denominator(step)
    terms = objective.loss_terms(config.objective)
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)  # of loss and NLL, not yet divided
    read: Callable[[], list[float]] = sums.tolist
    clock.enter("data")
    for micro_batch in source if feed is None else feed.step(step):
        clock.enter("forward")
        _seed_noise(config.seed, step, micro_batch.number, world.rank)
        batch = micro_batch.batch.to(engine.device)
        loss, values = engine.loss(batch, terms, with_top=details is not None)
        nll = loss.detach()
        if not objective.is_plain(config.objective):
            nll = objective.weighted_nll(values.logprob, batch)
        sums += torch.stack([loss.detach(), nll])
        if micro_batch.is_last:
            read = _copy_to_host(sums)
        clock.enter("backward")
        engine.backward(loss / denominator, is_last=micro_batch.is_last)
        if details is not None:
            clock.enter("other")
            details.add(micro_batch.examples, values)
        clock.enter("data")
    clock.enter("step")
    if details is not None:
        details.reduce()
    total_loss, total_nll = collectives.all_sum(read())
    return total_loss / denominator, total_nll / denominator


def _copy_to_host(values: Tensor) -> Callable[[], list[float]]:
    """Start to copy values to the host; what is returned waits for the copy, and for nothing that is queued later."""
    copy = values.to("cpu", non_blocking=True)
    if not values.is_cuda:
        return copy.tolist
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return copy.tolist()

    return read


def _seed_noise(seed: int, step: int, micro_step: int, rank: int) -> None:
    """Dropout and NEFTune follow from the position in the run, so a resumed run draws what it would have drawn."""
    state = np.random.SeedSequence([seed, step, micro_step, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]) >> 1)
