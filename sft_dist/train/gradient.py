"""The gradient of one optimizer step: every forward and backward of this rank, and the step's loss over all ranks."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sft_dist import faults
from sft_dist.config import RunConfig
from sft_dist.data.plan import Plan
from sft_dist.data.selection import Selection
from sft_dist.distributed import collectives
from sft_dist.distributed.world import World
from sft_dist.model.engine import Engine
from sft_dist.model.fused_head import LossTerms, TokenValues
from sft_dist.train import objective, out_of_memory
from sft_dist.train.details import Details
from sft_dist.train.feeding import Feed, MicroBatch, micro_batches
from sft_dist.train.meter import PhaseClock
from sft_dist.train.objective import Balance


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
    own_losses: list[Tensor] | None = None,
) -> tuple[float, float]:
    """All forwards and backwards of one step; returns its loss and its NLL over all ranks, and fills in `details`.

    `own_losses` receives Σ w ℓ of each micro-batch of this rank, a scalar on the device that nobody waits for.

    The loss is what is stepped on; the NLL has the same weights, and nothing beside it.
    docs/objective.md, section 5. Without a `feed` the micro-batches are made here. The host waits for the device once,
    for the last forward's loss, when the last backward is already under way.
    """
    clock = clock or PhaseClock(engine.device)
    source = micro_batches(selection, plan, [step], world, config.batch.packs_per_micro_batch)
    denominator = plan.denominator(step)
    terms, balance = objective.loss_terms(config), objective.balance_of(config, plan, step)
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)  # of loss and NLL, not yet divided
    read: Callable[[], list[float]] = sums.tolist
    clock.enter("data")
    for micro_batch in source if feed is None else feed.step(step):
        what = f"step {step + 1}, micro-batch {micro_batch.number + 1}"
        with out_of_memory.explained(what, rank=world.rank, config=config, examples=micro_batch.examples):
            clock.enter("forward")
            loss, values = forward(
                engine, micro_batch, terms, config.seed, world.rank, balance=balance, with_details=details is not None
            )
            nll = loss.detach()
            if not objective.is_plain(config):
                nll = objective.weighted_nll(values.logprob, micro_batch.batch)
            sums += torch.stack([loss.detach(), nll])
            if own_losses is not None:
                own_losses.append(loss.detach())
            if micro_batch.is_last:
                read = _copy_to_host(sums)
            clock.enter("backward")
            faults.reach("step.before_backward", rank=world.rank, step=step + 1)
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


def forward(
    engine: Engine,
    micro_batch: MicroBatch,
    terms: LossTerms,
    seed: int,
    rank: int,
    *,
    balance: Balance | None,
    with_details: bool = False,
) -> tuple[Tensor, TokenValues]:
    """Σ w ℓ of one micro-batch, with the dropout and noise of its place in the run, and the values of its tokens."""
    step = micro_batch.step + 1
    faults.reach("step.before_forward", rank=rank, step=step)
    _seed_noise(seed, micro_batch.step, micro_batch.number, rank)
    loss, values = engine.loss(micro_batch.batch, terms, with_details=with_details)
    if balance is not None:
        loss = objective.joint(loss, values, balance)
    if micro_batch.examples and faults.spoils("step.loss", rank=rank, step=step):
        loss = loss * torch.nan
    if micro_batch.examples and faults.spoils("step.gradient", rank=rank, step=step):
        loss = loss + (loss * 0).sqrt() * 0  # the same value; its derivative is 0 times infinity
    return loss, values


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
