"""Between the gradient and the weights: takes a step, or leaves it out, goes back or stops, as numbers.py decides.

Every rank comes to the same verdict, since the loss and the norm are those of all ranks; so it costs no communication.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from sft_dist import faults
from sft_dist.config import RunConfig
from sft_dist.data.packing import Pack
from sft_dist.data.plan import Plan
from sft_dist.data.selection import Selection
from sft_dist.distributed.world import World
from sft_dist.errors import TrainingError
from sft_dist.model.engine import Engine
from sft_dist.train import checkpoint, numbers, out_of_memory
from sft_dist.train.checkpoint import TrainState
from sft_dist.train.meter import PhaseClock
from sft_dist.train.metrics import Metrics
from sft_dist.train.numbers import Verdict
from sft_dist.train.offenders import HeldOut, Search
from sft_dist.train.saver import Saver


@dataclass(frozen=True, slots=True)
class Gradient:
    """Of a step whose backwards are done."""

    loss: float  # over all ranks
    own_losses: list[Tensor]  # of this rank's micro-batches, on the device


@dataclass(frozen=True, slots=True)
class Outcome:
    """`grad_norm` is None where the step was not taken; `state` then stands behind it all the same."""

    state: TrainState
    grad_norm: float | None


class Guard:
    """One for a run. Its methods are called by all ranks at the same line."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        engine: Engine,
        selection: Selection,
        plan: Plan,
        metrics: Metrics,
        clock: PhaseClock,
        saver: Saver,
    ) -> None:
        self._config = config
        self._world = world
        self._engine = engine
        self._selection = selection
        self._plan = plan
        self._metrics = metrics
        self._search = Search(engine, config, world, clock)
        self._run_dir = Path(config.run_dir)
        self._saver = saver

    def take(self, step: int, gradient: Gradient, state: TrainState) -> Outcome:
        """Take step `step` (from 0) unless its numbers forbid it; the returned state knows what was done.

        Raises TrainingError where the run must not go on. Nothing has then happened to weights and optimizer.
        """
        policy, history = self._config.numbers, state.history
        target = self.last_regular(state)
        verdict = numbers.judge_loss(gradient.loss, history, policy, last_regular=target)
        if verdict.z is not None:
            state = self._alarm(step, gradient.loss, verdict.z, state)
        if verdict.action != "take":
            self._saver.finish()  # the checkpoint to name, or to go back to, may still be on its way
        if verdict.action == "roll back":
            return Outcome(self._roll_back(step, target, state), None)
        if verdict.action == "take":
            grad_norm = self._update(step)
            if math.isfinite(grad_norm):
                history = state.history.after_taking(gradient.loss, policy.spike_window)
                return Outcome(replace(state, history=history), grad_norm)
            verdict = numbers.on_non_finite(state.history, policy)
            self._saver.finish()
            problem = f"the gradient norm is {grad_norm}, the loss {gradient.loss:.4f}"
        elif verdict.z is not None:
            raise TrainingError(
                f"step {step + 1:,}: the loss spikes again and {verdict.reason}; {self._last_checkpoint()}; look at "
                "the data of these steps, or try a lower optimizer.learning_rate, or numbers.spike: alarm"
            )
        else:
            problem = f"the loss is {gradient.loss}"
        return Outcome(self._leave_out(step, problem, gradient, verdict, state), None)

    def last_regular(self, state: TrainState) -> int:
        """The step whose checkpoint a rollback would need now, which retention must keep; 0: none."""
        return numbers.last_regular(state.step, self._config.numbers, self._config.checkpoint)

    def heldout(self, nll: float, selection: Selection, packs: list[Pack], step: int, *, name: HeldOut) -> None:
        """Say which conversations make the NLL of this data after `step` steps something else than a number.

        Raises TrainingError with numbers.non_finite: stop, and where the weights are at fault.
        """
        self._saver.finish()
        said = "held-out" if name == "heldout" else name
        report = self._search.heldout(f"the {said} NLL after step {step:,} is {nll}", step, selection, packs, name=name)
        if self._config.numbers.non_finite == "stop" or report.broken_weights:
            raise TrainingError(str(report))
        self._metrics.say(f"warning: {report}; this evaluation does not count")
        found = [offender.id for offender in report.offenders]
        self._metrics.record(f"{name}_skipped", step, file=report.file.name, conversations=found)

    def _update(self, step: int) -> float:
        """Clip and update. Returns the gradient's norm before clipping; where it is not finite nothing was updated."""
        what = f"step {step + 1}, update of the weights"
        with out_of_memory.explained(what, rank=self._world.rank, config=self._config):
            faults.reach("step.before_step", rank=self._world.rank, step=step + 1)
            is_applied, grad_norm = self._engine.step()
        if is_applied != math.isfinite(grad_norm):
            did = "took" if is_applied else "did not take"
            raise TrainingError(f"step {step + 1:,}: DeepSpeed {did} a step with a gradient norm of {grad_norm}")
        return grad_norm

    def _alarm(self, step: int, loss: float, z: float, state: TrainState) -> TrainState:
        window = self._config.numbers.spike_window
        self._metrics.say(
            f"warning: loss spike at step {step + 1:,}: {loss:.4f} lies {z:.1f} robust standard deviations above the "
            f"median of the {window} losses before it (numbers.spike_threshold: {self._config.numbers.spike_threshold})"
        )
        self._metrics.record("spike", step + 1, loss=loss, z=z)
        return replace(state, history=state.history.after_alarm())

    def _roll_back(self, step: int, target: int, state: TrainState) -> TrainState:
        """The weights and optimizer of step `target`, with the data and learning rate of the next step."""
        self._engine.clear_gradients()
        folder = checkpoint.checkpoints_dir(self._run_dir) / f"step-{target:08d}"
        fault = checkpoint.fault_of(folder, self._world)
        if fault is not None:
            raise TrainingError(f"step {step + 1:,}: the loss spikes, and there is no going back: {fault}")
        self._engine.load(folder)
        saved = checkpoint.read(folder).state
        self._metrics.say(
            f"back to the weights of step {target:,}: steps {target + 1:,} to {step + 1:,} are given up, and their "
            f"samples are not trained on; going on with step {step + 2:,}"
        )
        self._metrics.record("rollback", step + 1, to=target, first=target + 1, last=step + 1)
        return replace(
            state,
            step=step + 1,
            num_tokens=saved.num_tokens,
            num_target_tokens=saved.num_target_tokens,
            last_loss=saved.last_loss,
            history=state.history.after_rollback(saved.history, to=target, step=step + 1),
        )

    def _leave_out(
        self, step: int, problem: str, gradient: Gradient, verdict: Verdict, state: TrainState
    ) -> TrainState:
        """The state behind a step that is not taken, or TrainingError."""
        what = f"step {step + 1:,}: {problem}, so it was not taken"
        with out_of_memory.explained(f"{what}; looking for the cause", rank=self._world.rank, config=self._config):
            report = self._search.step(what, step, self._selection, self._plan, gradient.own_losses)
        if verdict.action == "stop" or report.broken_weights:
            reason = f" ({verdict.reason})" if verdict.reason else ""
            raise TrainingError(
                f"{report}{reason}; {self._last_checkpoint()}; leave these conversations out, or try a lower "
                "optimizer.learning_rate, model.dtype: float32, or numbers.non_finite: skip"
            )
        history = state.history.after_skipping(step + 1)
        allowed = self._config.numbers.max_skipped
        self._metrics.say(f"warning: {report}; {len(history.skipped)} of {allowed} steps that may be left out")
        found = [offender.id for offender in report.offenders]
        self._metrics.record("skipped", step + 1, problem=problem, file=report.file.name, conversations=found)
        return replace(state, step=step + 1, history=history)

    def _last_checkpoint(self) -> str:
        steps = [s for s, f in checkpoint.step_folders(self._run_dir).items() if (f / checkpoint.MANIFEST).exists()]
        return f"the last checkpoint is step {max(steps):,}" if steps else "no checkpoint is saved yet"
