"""The training loop: the parts of a run over time, in the order they happen."""

import math
import os
import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sft_dist import faults
from sft_dist.config import RunConfig
from sft_dist.data.cost import BY_TOKENS
from sft_dist.data.packing import Pack
from sft_dist.data.plan import Plan
from sft_dist.data.selection import Selection
from sft_dist.distributed import collectives
from sft_dist.distributed.watchdog import Watchdog
from sft_dist.distributed.world import World
from sft_dist.errors import ExitCode
from sft_dist.model import probe
from sft_dist.model.cost import find_peak
from sft_dist.model.engine import Engine
from sft_dist.train import classification, forgetting, objective, out_of_memory
from sft_dist.train.checkpoint import TrainState
from sft_dist.train.classification import Answers
from sft_dist.train.deadline import job_end_s
from sft_dist.train.details import Details
from sft_dist.train.drift import DriftMeter
from sft_dist.train.evaluate import heldout_details, heldout_loss, scoring_packs
from sft_dist.train.feeding import Feed, micro_batches
from sft_dist.train.forgetting import Retention
from sft_dist.train.goodput import Timeline
from sft_dist.train.gradient import accumulate_gradient
from sft_dist.train.guard import Gradient, Guard
from sft_dist.train.interrupt import StopRequest
from sft_dist.train.meter import Meter, PhaseClock, shares_line
from sft_dist.train.metrics import Metrics, step_line
from sft_dist.train.offenders import HeldOut
from sft_dist.train.profiling import Profile
from sft_dist.train.saver import Saver
from sft_dist.train.schedule import learning_rate


@dataclass(frozen=True, slots=True)
class Heldout:
    selection: Selection
    packs: list[Pack]


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended; `summary` is what it did in numbers."""

    exit_code: ExitCode
    reason: str
    state: TrainState
    summary: dict[str, Any]


class Run:
    """Everything a running training holds; `train` takes it from its state to its end."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        engine: Engine,
        selection: Selection,
        plan: Plan,
        heldout: Heldout | None,
        retention: Retention | None,
        state: TrainState,
        metrics: Metrics,
        facts: dict[str, Any],
        profile: Profile | None,
        watchdog: Watchdog,
        drift: DriftMeter,
    ) -> None:
        self.config = config
        self.world = world
        self.engine = engine
        self.selection = selection
        self.plan = plan
        self.heldout = heldout
        self.retention = retention
        self.state = state
        self.metrics = metrics
        self.stop = StopRequest(end_s=job_end_s(os.environ), margin_s=config.checkpoint.stop_before_end_s)
        self._facts = facts
        self._drift = drift
        self._profile = profile
        self._meter = _meter(config, engine, plan, metrics, watchdog)
        self._timeline = Timeline(Path(config.run_dir), is_main=world.is_main)
        self._saver = Saver(config.checkpoint, Path(config.run_dir), world, engine, state, metrics)
        self._guard = Guard(config, world, engine, selection, plan, metrics, self._meter.clock, self._saver)
        self._probe = probe.choose(selection.dataset, config.data.max_length)

    def train(self) -> Result:
        """Take all steps that are left. Raises TrainingError when the numbers break."""
        difference = probe.check(self.engine, self._probe)
        what = "logits" if self.engine.is_classifier else "log-probs"
        self.metrics.say(f"packed {what} equal the model's own, unpacked, to {difference:.1e}")
        self._timeline.mark("startup", step=self.state.step)
        if self.state.step == 0:
            self._evaluate(0)
        # A run that was stopped early stays so when it is started again, until its run file allows more.
        early = self._excess() if self.state.step < self.plan.num_steps else None
        steps = range(self.state.step, self.state.step if early else self.plan.num_steps)
        per_forward = self.config.batch.packs_per_micro_batch
        source = micro_batches(self.selection, self.plan, steps, self.world, per_forward)
        ahead = -(-self.plan.global_packs // (self.world.size * per_forward))
        with Feed(source, self.engine.device, ahead=ahead) as feed:
            exit_code, reason = self._take_steps(steps, feed)
        self._end_measuring()
        self._say_retention()
        if exit_code is ExitCode.DONE:
            self._drift.at_end(self.state.step, is_new=bool(steps))
        return self._result(exit_code, f"stopped early: {early}," if early else reason)

    def _take_steps(self, steps: Iterable[int], feed: Feed) -> tuple[ExitCode, str]:
        for step in steps:
            self._meter.clock.begin(step)
            self._record_times()
            faults.reach("step.begin", rank=self.world.rank, step=step + 1)
            self._step(step, feed)
            self._timeline.mark("step", step=step + 1)
            if self._profile is not None:
                self._profile.step_ended()
            self._meter.clock.enter("checkpoint")
            self._saver.poll()
            self._meter.clock.enter("other")
            finished = step + 1
            is_last = finished == self.plan.num_steps
            every = self.config.evaluate.every
            if is_last or (every and finished % every == 0):
                self._evaluate(finished)
                self._drift.after_evaluation(finished)
            ending = self._ending(finished) if not is_last else None
            if is_last or ending or self._due(finished):
                self._save(wait=is_last or ending is not None)
            if ending:
                return ending
        return ExitCode.DONE, "finished"

    def _step(self, step: int, feed: Feed) -> None:
        started = time.monotonic()
        config = self.config
        rate = learning_rate(step, self.plan.num_steps, config.optimizer, config.schedule)
        self.engine.set_lr(rate)
        self.engine.train()
        every = config.logging.details_every
        details = Details(self.selection.source_names) if every and (step + 1) % every == 0 else None
        clock = self._meter.clock
        own_losses: list[torch.Tensor] = []
        with out_of_memory.explained(f"step {step + 1}", rank=self.world.rank, config=config):
            loss, nll = accumulate_gradient(
                self.engine, self.selection, self.plan, step, config, self.world, details,
                feed=feed, clock=clock, own_losses=own_losses,
            )  # fmt: skip
        outcome = self._guard.take(step, Gradient(loss, own_losses), self.state)
        self.state = outcome.state
        clock.enter("other")
        step_s = time.monotonic() - started
        if outcome.grad_norm is None:
            self.state = replace(self.state, train_time_s=self.state.train_time_s + step_s)
        else:
            self._finish_step(loss, nll, outcome.grad_norm, rate, step_s)
            if details is not None:
                self.metrics.record("train_details", step + 1, **details.as_dict())
        faults.reach("step.after_step", rank=self.world.rank, step=step + 1)

    def _finish_step(self, loss: float, nll: float, grad_norm: float, rate: float, step_s: float) -> None:
        step, plan = self.state.step, self.plan
        num_tokens, num_targets = plan.num_step_tokens(step), plan.num_step_targets(step)
        lengths = self.selection.lengths[[index for pack in plan.packs(step) for index in pack]]
        speed = self._meter.add(lengths, num_targets, step_s)
        self.state = replace(
            self.state,
            step=step + 1,
            num_tokens=self.state.num_tokens + num_tokens,
            num_target_tokens=self.state.num_target_tokens + num_targets,
            train_time_s=self.state.train_time_s + step_s,
            first_loss=loss if self.state.first_loss is None else self.state.first_loss,
            last_loss=loss,
        )
        memory_gib = _peak_memory_gib(self.engine.device)
        mean_step_s = self.state.train_time_s / self.state.step
        self.metrics.say(
            step_line(
                step=step + 1,
                num_steps=plan.num_steps,
                loss=loss,
                nll=None if objective.is_plain(self.config) else nll,
                grad_norm=grad_norm,
                learning_rate=rate,
                speed=speed,
                memory_gib=memory_gib,
                eta_s=mean_step_s * (plan.num_steps - step - 1),
            )
        )
        self.metrics.record(
            "train",
            step + 1,
            num_steps=plan.num_steps,
            loss=loss,
            nll=nll,
            grad_norm=grad_norm,
            learning_rate=rate,
            num_tokens=num_tokens,
            num_target_tokens=num_targets,
            step_time_s=step_s,
            **asdict(speed),
            memory_gib=memory_gib,
        )

    def _evaluate(self, step: int) -> None:
        if self.heldout is None and self.retention is None:
            return
        self._meter.clock.enter("evaluate")
        answers = Answers() if self.engine.has_head else None
        heldout = self._scored("heldout", self.heldout, step, answers)
        kept = self._scored("retention", self.retention, step, None)
        self._timeline.mark("evaluate", step=step)
        # First, since a checkpoint of the best held-out NLL holds these values too.
        if kept is not None and self.retention is not None:
            known = self.retention.measured(kept, self.state.retention, is_start=step == 0)
            self.state = replace(self.state, retention=known)
        if heldout is not None:
            self._judge_heldout(heldout, answers, step)
        if kept is not None:
            self._tell_retention(step)
        self._meter.clock.enter("other")

    def _scored(
        self, name: HeldOut, data: Heldout | Retention | None, step: int, answers: Answers | None
    ) -> Details | None:
        """Figures of one of the sets, None without it or where its NLL is no number and that is to be passed over."""
        if data is None:
            return None
        config = self.config
        with out_of_memory.explained(f"evaluation after step {step}", rank=self.world.rank, config=config):
            details = heldout_details(
                self.engine, data.selection, data.packs, self.world, config.batch.packs_per_micro_batch, answers
            )
        judged = details.all.nll
        if name == "heldout":
            judged = heldout_loss(config.head, data.selection, details, answers).judged
        if not math.isfinite(judged):
            self._guard.heldout(judged, data.selection, data.packs, step, name=name)
            return None
        return details

    def _judge_heldout(self, details: Details, answers: Answers | None, step: int) -> None:
        assert self.heldout is not None
        accuracy, head = details.all.accuracy, self.config.head
        loss = heldout_loss(head, self.heldout.selection, details, answers)
        judged = loss.judged
        if not head.is_in_place:
            self.metrics.say(f"held-out  step {step:,}  NLL {details.all.nll:.4f} per token  accuracy {accuracy:.1%}")
        if answers is not None and loss.labels is not None:
            classification.report(self.metrics, step, loss.labels, self.heldout.selection, answers)
        for line in details.lines():
            self.metrics.say(line)
        self.metrics.record("heldout", step, **details.all.as_dict())
        self.metrics.record("heldout_details", step, **details.as_dict())
        best = self.state.heldout_nll_best
        self.state = replace(self.state, heldout_nll_last=judged)
        if step == 0:
            self.state = replace(self.state, heldout_nll_before=judged)
        elif best is not None and judged >= best:
            what = "weighted sum of NLL and loss of labels" if head.is_beside else "NLL"
            self.metrics.say(f"warning: held-out {what} rises: {judged:.4f} at step {step:,}, {best:.4f} at its best")
        elif early := self._excess():
            self.metrics.say(f"step {step:,} is not taken for the best: {early}")
        else:
            self.state = replace(self.state, heldout_nll_best=judged, heldout_best_step=step)
            if self.config.checkpoint.keep_best:
                self._save()

    def _tell_retention(self, step: int) -> None:
        state = self.state
        before, now = state.heldout_nll_before, state.heldout_nll_last
        task_change = None if before is None or now is None else now - before
        self.metrics.say(forgetting.evaluation_line(step, state.retention, task_change=task_change))
        sources = forgetting.as_dict(state.retention)
        self.metrics.record("retention", step, source=sources, heldout_change=task_change)

    def _say_retention(self) -> None:
        state = self.state
        if state.retention:
            task = (state.heldout_nll_before, state.heldout_nll_last, state.heldout_nll_best)
            for line in forgetting.table(state.retention, task=task, best_step=state.heldout_best_step):
                self.metrics.say(line)

    def _excess(self) -> str | None:
        """Why this run goes no further though steps are left; from sums over all ranks, so the same on each."""
        return forgetting.excess(self.state.retention, self.config.evaluate.stop_at_retention_rise)

    def _due(self, step: int) -> bool:
        every = self.config.checkpoint.every
        return bool(every and step % every == 0)

    def _ending(self, step: int) -> tuple[ExitCode, str] | None:
        """Whether and why the run ends after this step; agreed over all ranks, once a step."""
        signal_name = self.stop.agreed(saving_s=self._saver.saving_s)
        if signal_name is not None:
            return ExitCode.STOPPED, f"stopped by {signal_name}"
        if early := self._excess():
            return ExitCode.DONE, f"stopped early: {early},"
        if step == self.config.checkpoint.stop_at_step:
            return ExitCode.STOPPED, f"stopped at step {step:,} as the run file asks"
        return None

    def _save(self, *, wait: bool = False) -> None:
        """A checkpoint of the current step, once; with `wait`, it is published when this returns."""
        self._meter.clock.enter("checkpoint")
        if self._saver.begun_step != self.state.step:
            record = probe.record(self.engine, self._probe)
            self._saver.begin(
                self.state,
                self._facts | {"probe": record, "architectures": [type(self.engine.causal_lm).__name__]},
                protected=self._guard.last_regular(self.state),
                wait=wait,
            )
        if wait:
            self._saver.finish()
        self._timeline.mark("checkpoint", step=self.state.step)
        self._meter.clock.enter("other")

    def _record_times(self) -> None:
        for times in self._meter.finished():
            seconds = {f"{phase}_s": of_phase for phase, of_phase in times.seconds.items()}
            self.metrics.record("train_time", times.step + 1, **seconds, shares=times.shares)

    def _end_measuring(self) -> None:
        self._meter.clock.end()
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize(self.engine.device)
        self._record_times()
        if shares := shares_line(self._meter.shares()):
            self.metrics.say(f"time: {shares}")
        if self._profile is not None:
            self._profile.close()

    def _result(self, exit_code: ExitCode, reason: str) -> Result:
        state, plan = self.state, self.plan
        speed = self._meter.speed()
        summary = {
            "conversations": self.selection.dataset.manifest["num_records"],
            "samples": plan.num_samples,
            "tokens": plan.num_tokens,
            "target_tokens": plan.num_target_tokens,
            "packs": plan.num_packs,
            "fill": plan.fill,
            "balance": plan.balance(self.world.size, self.config.batch.packs_per_micro_batch),
            "ranks": self.world.size,
            "deepspeed": self.engine.settings,
            "steps": state.step,
            "planned_steps": plan.num_steps,
            "trained_tokens": state.num_tokens,
            "trained_target_tokens": state.num_target_tokens,
            "first_loss": state.first_loss,
            "last_loss": state.last_loss,
            "train_time_s": state.train_time_s,
            "tokens_per_s": state.num_tokens / state.train_time_s if state.train_time_s else None,
            "target_tokens_per_s": state.num_target_tokens / state.train_time_s if state.train_time_s else None,
            "mfu": None if speed is None else speed.mfu,
            "mfu_palm": None if speed is None else speed.mfu_palm,
            "peak_flops_per_s": self._meter.flops_per_s,
            "memory_gib": _peak_memory_gib(self.engine.device),
            "time_shares": self._meter.shares(),
            "heldout_nll_before": state.heldout_nll_before,
            "heldout_nll_best": state.heldout_nll_best,
            "heldout_nll_after": state.heldout_nll_last,
            "drift": self._drift.last,
            "kl_top_k": None if self.selection.top is None else self.selection.top.as_dict(),
            "retention": forgetting.as_dict(state.retention),
            "skipped_steps": state.history.skipped,
            "rollbacks": state.history.rollbacks,
            "untrained_steps": state.history.untrained,
            "loss_spikes": state.history.num_alarms,
        }
        return Result(exit_code, reason, state, summary)


def _meter(config: RunConfig, engine: Engine, plan: Plan, metrics: Metrics, watchdog: Watchdog) -> Meter:
    """A collective: the peak is that of all ranks together."""
    peak = find_peak(engine.device, engine.causal_lm.dtype)
    (flops_per_s,) = collectives.all_sum([peak.flops_per_s])
    metrics.say(f"mfu is relative to {peak.name}")
    cost = None if plan.cost_model == BY_TOKENS else plan.cost_model
    clock = PhaseClock(engine.device, watchdog.enter)
    return Meter(clock, cost, flops_per_s=flops_per_s, row_length=config.data.max_length)


def plan_heldout(selection: Selection) -> Heldout:
    return Heldout(selection, scoring_packs(selection))


def _peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this rank: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / (2**30 if sys.platform == "darwin" else 2**20)
