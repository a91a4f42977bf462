"""The verb `train`: from a run file to a tuned model's checkpoints, resuming by itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_dist.config import RunConfig
from sft_dist.data.plan import Plan
from sft_dist.data.prepare import Share
from sft_dist.data.selection import Selection
from sft_dist.distributed.world import World, find_world
from sft_dist.errors import ConfigError, ExitCode, StorageError, UserError, exit_code_of, say
from sft_dist.preparation import (
    heldout_set,
    retention_set,
    say_left_out,
    say_overlap,
    say_retention_overlap,
    share_of,
    training_set,
    with_labels,
    write_left_out,
)
from sft_dist.signals import ignore_signals

if TYPE_CHECKING:
    from sft_dist.distributed.beats import Process
    from sft_dist.distributed.watchdog import Watchdog


@dataclass(frozen=True, slots=True)
class Sets:
    """What a run is about, known before any process group exists."""

    train: Selection
    plan: Plan
    heldout: Selection | None
    retention: Selection | None
    model_config: Any  # of transformers


def run(config: RunConfig, env: Mapping[str, str], *, with_profile: bool = False) -> ExitCode:
    """Train until done or asked to stop. Every way out but a kill, or a second Ctrl-C, leaves RUN_DIR/outcome.json.

    With a profile, rank 0 writes a trace of a few steps to RUN_DIR/profile.
    """
    from sft_dist.train import rundir
    from sft_dist.train.lock import RunLock

    world = find_world(env)
    run_dir = Path(config.run_dir)
    lock = RunLock(run_dir) if world.is_main else None
    try:
        if lock is not None:
            rundir.take(lock)
        exit_code = _train(config, world, share_of(world, env), with_profile)
    except BaseException as error:
        try:
            ignore_signals()
        finally:  # a signal that comes just before
            if lock is not None and lock.was_taken:
                _write_failure(run_dir, exit_code_of(error), f"{type(error).__name__}: {error}")
                lock.release()
        raise
    if lock is not None:
        lock.release()
    return exit_code


def _write_failure(run_dir: Path, exit_code: int, reason: str, holder: "Process | None" = None) -> None:
    """`holder`: rank 0's process, where another rank writes."""
    from sft_dist.train import checkpoint, lock, rundir

    try:
        # One that was taken over must not speak of the run that has it now.
        lock.check_held(run_dir, None if holder is None else (holder.host, holder.pid))
        try:
            newest = _newest(run_dir)
        except checkpoint.Unreadable as error:
            newest, reason = None, f"{reason}; {error}"
        rundir.write_outcome(run_dir, exit_code=exit_code, reason=reason, step=None, checkpoint=newest)
    except (UserError, OSError) as error:
        say(f"how the run ended cannot be written to {run_dir}: {error}")


def _train(config: RunConfig, world: World, share: Share, with_profile: bool) -> ExitCode:
    from sft_dist.model import beside, loading
    from sft_dist.session import close_session, open_session

    if config.head.is_beside:  # first: that rows are too long for an encoder would send people the wrong way
        beside.check_decoder(config, loading.load_config(config.model, max_length=2))
    model_config = loading.load_config(config.model, config.data.max_length)
    # Before any process group exists, so that no collective waits for a tokeniser.
    config = with_labels(config, share)
    selection, plan = training_set(config, share)
    sets = Sets(selection, plan, heldout_set(config, share), retention_set(config, share), model_config)
    run_dir = Path(config.run_dir)
    if world.is_main:
        _say_sets(sets, config, run_dir)
        _say_plan(config, world, plan)
    with open_session(world, config.watchdog, partial(_write_failure, run_dir)) as watchdog:
        result = _with_group(config, world, sets, watchdog, with_profile)
        watchdog.enter("the end")
        if world.is_main:
            _write_results(run_dir, result)
        close_session()
    return result.exit_code


def _say_sets(sets: Sets, config: RunConfig, run_dir: Path) -> None:
    others = {"heldout": sets.heldout, "retention": sets.retention}
    selections = {"train": sets.train} | {name: found for name, found in others.items() if found is not None}
    say_left_out(selections, config)
    if sets.heldout is not None:
        say_overlap(sets.train, sets.heldout)
    if sets.retention is not None:
        say_retention_overlap(sets.train, sets.retention)
    write_left_out(selections, run_dir / "left_out.jsonl")


def _write_results(run_dir: Path, result: Any) -> None:
    from sft_dist.train import files, goodput, rundir

    times = goodput.end(run_dir, result.exit_code)
    files.write_json(run_dir / rundir.SUMMARY, result.summary | {"goodput": times.as_dict()})
    rundir.write_outcome(
        run_dir,
        exit_code=result.exit_code,
        reason=result.reason,
        step=result.state.step,
        checkpoint=_newest(run_dir),
        times=times,
    )
    for line in times.lines():
        say(line)
    say(f"{result.reason} at step {result.state.step:,}; everything lies in {run_dir}")


def _with_group(config: RunConfig, world: World, sets: Sets, watchdog: "Watchdog", with_profile: bool) -> Any:
    from sft_dist.distributed import collectives, preflight
    from sft_dist.model import engine as engines
    from sft_dist.session import print_from_main
    from sft_dist.train import checkpoint, contract, files, rundir, start_answers
    from sft_dist.train.drift import DriftMeter, start_to_measure
    from sft_dist.train.forgetting import Retention
    from sft_dist.train.loop import Run, plan_heldout
    from sft_dist.train.metrics import Metrics
    from sft_dist.train.profiling import Profile

    run_dir, selection, plan = Path(config.run_dir), sets.train, sets.plan
    # By it ranks deal packs among themselves: where they differed, samples would be missed and others taken twice.
    collectives.check_same({"cost of packs (config.json)": plan.cost_model} | preflight.versions())
    print_once = print_from_main(world)

    def say_once(line: str) -> None:
        watchdog.move()  # what takes long says so now and then
        print_once(line)

    heldout = None if sets.heldout is None else sets.heldout.dataset
    facts = collectives.on_main(lambda: contract.facts(config, selection.dataset, heldout, sets.model_config, plan))
    facts = files.masked(facts)  # as a manifest has them
    resumed = _resumed_from(config, world, say_once)
    if resumed is not None:
        allowed = config.checkpoint.allow_changed
        for note in contract.check(resumed, facts, world_size=world.size, allow_changed=allowed):
            say_once(note)
    if world.is_main:
        files.write_json(run_dir / rundir.CONFIG, rundir.portable(config))
    watchdog.enter("loading the model")
    initial, measures = _start(config, resumed, facts, say_once)
    engine = engines.training_engine(config, world, initial)
    pretrained = start_to_measure(engine, config, initial, say_once) if measures else None
    engine.on_forward(watchdog.move)
    watchdog.meet("the model is loaded")
    if config.anchor.kl_top_k is not None:
        watchdog.enter("keeping what θ̂ says")
        selection = start_answers.kept(selection, plan, engine, config, facts, world, say_once)
    state = checkpoint.TrainState()
    kept = Retention(sets.retention) if sets.retention is not None else None
    if resumed is not None:
        state = _state_of(resumed, facts, say_once)
        # As long as the engine holds the pre-trained weights.
        state = _with_starting_nll(state, kept, engine, resumed, facts, config, world, say_once)
        engine.load(resumed.folder)
        if config.checkpoint.keep_best:
            collectives.on_main(partial(checkpoint.mark_best, run_dir, state))
        say_once(f"resumed from {resumed.folder}: {state.step:,} of {plan.num_steps:,} steps are done")
    else:
        _say_advice(config, selection, plan, engine.num_parameters, say_once)
    metrics = Metrics(run_dir, config.logging, first_step=state.step, is_main=world.is_main)
    if selection.top is not None:
        metrics.record("kl_top_k", state.step, **selection.top.as_dict())
    drift = DriftMeter(engine, metrics, pretrained, at_evaluations=config.anchor.drift == "evaluations")
    planned = plan_heldout(sets.heldout) if sets.heldout is not None else None
    profile = Profile(run_dir / "profile", state.step) if with_profile and world.is_main else None
    try:
        run = Run(
            config, world, engine, selection, plan, planned, kept, state, metrics, facts, profile, watchdog, drift
        )
        return run.train()
    finally:
        metrics.close()


def _start(
    config: RunConfig, resumed: Any, facts: dict[str, Any], say_once: Callable[[str], None]
) -> tuple[Path | None, bool]:
    """The checkpoint whose weights training begins with, where it needs them, and whether drift is measured from there.

    No checkpoint of a run holds θ̂: who needs it begins where the run began, and then takes the checkpoint's weights.
    """
    from sft_dist.train import contract

    lost = None if resumed is None else contract.start_lost(resumed.manifest, facts)
    # Adapters are no part of θ̂, and nothing else moves; nor is a head that replaces what the files hold.
    is_plain = config.adapter.kind == "none" and not config.head.is_in_place
    measures = config.anchor.drift != "never" and lost is None and is_plain
    needs_start = resumed is None or config.anchor.decay > 0 or config.anchor.kl > 0
    if not (needs_start or measures):
        return None, False
    try:
        return initial_weights(config, say_once), measures
    except (ConfigError, StorageError) as error:
        if needs_start:
            raise
        say_once(f"warning: the drift is not measured: {error}")
        return None, False


def _state_of(resumed: Any, facts: dict[str, Any], say_once: Callable[[str], None]) -> Any:
    """The state to continue from; a best NLL on other held-out data cannot be compared and is forgotten."""
    state = resumed.state
    if state.heldout_best_step is not None and resumed.manifest["heldout"] != facts["heldout"]:
        say_once("data.heldout is not what it was: the best checkpoint so far is forgotten")
        return replace(state, heldout_nll_best=None, heldout_best_step=None, heldout_nll_before=None)
    return state


def _with_starting_nll(
    state: Any,
    kept: Any,
    engine: Any,
    resumed: Any,
    facts: dict[str, Any],
    config: RunConfig,
    world: World,
    say_once: Callable[[str], None],
) -> Any:
    """The state with the NLL at step 0 of retention sources that are new, by an engine with the pre-trained weights.

    Sources that changed or went are forgotten; what a run that started from other weights would have to tell stays
    unknown. A collective.
    """
    from sft_dist.train.evaluate import heldout_details

    state = replace(state, retention=() if kept is None else kept.comparable(state.retention))
    missing = [] if kept is None else kept.missing(state.retention)
    if not missing:
        return state
    new = f"data.retention: {', '.join(missing)}: new since the run began; "
    if resumed.manifest["weights"] != facts["weights"] or resumed.manifest["config"].get("model.init_from"):
        say_once(f"{new}its NLL before is not known, since model.path does not hold the weights of step 0")
        return state
    say_once(f"{new}scored with the pre-trained weights first")
    details = heldout_details(engine, kept.selection, kept.packs, world, config.batch.packs_per_micro_batch)
    known = kept.measured(details, state.retention, is_start=True)
    return replace(state, retention=tuple(replace(i, now=None) if i.name in missing else i for i in known))


def _resumed_from(config: RunConfig, world: World, say_once: Callable[[str], None]) -> Any:
    from sft_dist.distributed import collectives
    from sft_dist.train import checkpoint

    run_dir, resume = Path(config.run_dir), config.checkpoint.resume
    match resume:
        case "never":
            if collectives.on_main(lambda: bool(checkpoint.step_folders(run_dir))):
                raise ConfigError(
                    f"checkpoint.resume: never, but {run_dir} holds checkpoints; choose another run_dir or remove them"
                )
            return None
        case "auto" | "must":
            found = checkpoint.newest_valid(run_dir, world, say_once)
            if found is None and resume == "must":
                raise ConfigError(f"checkpoint.resume: must, but {run_dir} holds no valid checkpoint")
            if found is None and collectives.on_main(lambda: bool(checkpoint.step_folders(run_dir))):
                raise StorageError(
                    f"{run_dir} holds checkpoints, and none of them can be used: to start anew would remove them; mend "
                    f"them, or start in another run_dir, or move {checkpoint.checkpoints_dir(run_dir)} away"
                )
            return found
        case _:
            # A requeued run names the same start again: its own progress since then comes first.
            inside = run_dir.resolve() in Path(resume).resolve().parents
            own = checkpoint.newest_valid(run_dir, world, say_once, resumed_by=resume if inside else None)
            if own is not None:
                return own
            found, fault = checkpoint.checked(Path(resume), world, say_once)
            if found is None:
                raise ConfigError(f"checkpoint.resume: {resume}: {fault}")
            return found


def initial_weights(config: RunConfig, say_progress: Callable[[str], None] = say) -> Path | None:
    """The checkpoint that model.init_from names, as rank 0 finds it. A collective.

    Raises ConfigError where its tokens or its adapters are not this run's.
    """
    from sft_dist.distributed import collectives

    return collectives.on_main(lambda: _initial_weights(config, say_progress))


def _initial_weights(config: RunConfig, say_progress: Callable[[str], None]) -> Path | None:
    from sft_dist.train import checkpoint, contract

    if config.model.init_from is None:
        return None
    found = checkpoint.find(Path(config.model.init_from), "last", say_progress)
    contract.check_initial(config, found)
    return found.folder


def _say_advice(
    config: RunConfig, selection: Selection, plan: Plan, num_parameters: int, say_once: Callable[[str], None]
) -> None:
    from sft_dist.train import advice

    passes = plan.num_steps / plan.steps_per_epoch * plan.num_samples / len(selection)
    num_conversations = len({*selection.indices.tolist()})
    for line in advice.warnings(config, advice.Facts(num_parameters, num_conversations, passes)):
        say_once(line)


def _say_plan(config: RunConfig, world: World, plan: Plan) -> None:
    per_rank = config.batch.packs_per_micro_batch
    say(
        f"{plan.num_samples:,} samples, {plan.num_tokens:,} tokens, {plan.num_target_tokens:,} targets in "
        f"{plan.num_packs:,} packs of {config.data.max_length:,} (fill {plan.fill:.1%}); {plan.num_steps:,} steps of "
        f"{plan.global_packs:,} packs on {world.size:,} rank(s)"
    )
    if world.size > 1:
        say(
            f"predicted work of a forward, mean over ranks / maximum: {plan.balance(world.size, per_rank):.1%} "
            f"(batch.balance_steps: {plan.balance_steps})"
        )
    per_micro_step = world.size * per_rank
    if idle := -plan.global_packs % per_micro_step:
        say(
            f"batch.global_packs ({plan.global_packs}) does not divide over {world.size} ranks x {per_rank}: room for "
            f"{idle} more packs stays empty in every step"
        )


def _newest(run_dir: Path) -> str | None:
    from sft_dist.train import checkpoint

    folders = [f for f in checkpoint.step_folders(run_dir).values() if (f / checkpoint.MANIFEST).exists()]
    return str(folders[-1]) if folders else None
