"""The verb `train`: from a run file to a tuned model's checkpoints, resuming by itself."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft_dist.config import RunConfig
from sft_dist.data.plan import Plan
from sft_dist.data.prepare import prepare
from sft_dist.data.store import PreparedDataset
from sft_dist.distributed.world import World, find_world
from sft_dist.errors import ConfigError, ExitCode, UserError
from sft_dist.preparation import say_left_out, training_set, write_left_out


def run(config: RunConfig, env: Mapping[str, str]) -> ExitCode:
    """Train until done or asked to stop. Every way out but a crash leaves RUN_DIR/outcome.json, written first."""
    from sft_dist.train import rundir

    world = find_world(env)
    run_dir = Path(config.run_dir)
    lock = rundir.RunLock(run_dir) if world.is_main else None
    try:
        exit_code = _train(config, world)
    except UserError as error:
        if lock is not None:
            rundir.write_outcome(
                run_dir, exit_code=error.exit_code, reason=str(error), step=None, checkpoint=_newest(run_dir)
            )
        raise
    if lock is not None:
        lock.release()
    return exit_code


def _train(config: RunConfig, world: World) -> ExitCode:
    from sft_dist.session import close_session
    from sft_dist.train import rundir

    # Before any process group exists, so that no collective waits for a tokeniser.
    dataset, plan = training_set(config)
    heldout = prepare(config.data.heldout, config.model, config.data) if config.data.heldout else None
    run_dir = Path(config.run_dir)
    if world.is_main:
        say_left_out(dataset, config)
        write_left_out(dataset, config, run_dir / "left_out.jsonl")
        _say_plan(config, world, plan)
    result = _with_group(config, world, dataset, plan, heldout)
    if world.is_main:
        rundir.write_json(run_dir / rundir.SUMMARY, result.summary)
        rundir.write_outcome(
            run_dir,
            exit_code=result.exit_code,
            reason=result.reason,
            step=result.state.step,
            checkpoint=_newest(run_dir),
        )
        print(f"{result.reason} at step {result.state.step:,}; everything lies in {run_dir}", file=sys.stderr)
    close_session()
    return result.exit_code


def _with_group(
    config: RunConfig, world: World, dataset: PreparedDataset, plan: Plan, heldout: PreparedDataset | None
) -> Any:
    from sft_dist.model import engine as engines
    from sft_dist.model import loading
    from sft_dist.session import open_session, print_from_main
    from sft_dist.train import checkpoint, contract, rundir
    from sft_dist.train.loop import Run, plan_heldout
    from sft_dist.train.metrics import Metrics

    run_dir = Path(config.run_dir)
    model_config = loading.load_config(config.model, config.data.max_length)
    open_session(world)
    say = print_from_main(world)
    facts = contract.facts(config, dataset, model_config)
    resumed = _resumed_from(config, world)
    if resumed is not None:
        contract.check(resumed, facts, allow_changed=config.checkpoint.allow_changed)
        contract.check_world_size(resumed, world.size)
    if world.is_main:
        rundir.write_json(run_dir / rundir.CONFIG, rundir.portable(config))
    initial = None if resumed is not None else _initial_weights(config)
    engine = engines.training_engine(config, world, initial)
    state = checkpoint.TrainState()
    if resumed is not None:
        engine.load(resumed.folder)
        state = resumed.state
        say(f"resumed from {resumed.folder}: {state.step:,} of {plan.num_steps:,} steps are done")
    metrics = Metrics(run_dir, config.logging, first_step=state.step, is_main=world.is_main)
    planned = plan_heldout(heldout, config, say) if heldout is not None else None
    try:
        return Run(config, world, engine, dataset, plan, planned, state, metrics, facts).train()
    finally:
        metrics.close()


def _resumed_from(config: RunConfig, world: World) -> Any:
    from sft_dist.session import print_from_main
    from sft_dist.train import checkpoint

    run_dir, resume = Path(config.run_dir), config.checkpoint.resume
    match resume:
        case "never":
            if any(checkpoint.checkpoints_dir(run_dir).glob("step-*")):
                raise ConfigError(
                    f"checkpoint.resume: never, but {run_dir} holds checkpoints; choose another run_dir or remove them"
                )
            return None
        case "auto" | "must":
            found = checkpoint.newest_valid(run_dir, world, print_from_main(world))
            if found is None and resume == "must":
                raise ConfigError(f"checkpoint.resume: must, but {run_dir} holds no valid checkpoint")
            return found
        case _:
            fault = checkpoint.fault_of(Path(resume), world)
            if fault is not None:
                raise ConfigError(f"checkpoint.resume: {resume}: {fault}")
            return checkpoint.read(Path(resume))


def _initial_weights(config: RunConfig) -> Path | None:
    from sft_dist.train import checkpoint

    if config.model.init_from is None:
        return None
    return checkpoint.find(Path(config.model.init_from), "last").folder


def _say_plan(config: RunConfig, world: World, plan: Plan) -> None:
    print(
        f"{plan.num_samples:,} conversations, {plan.num_tokens:,} tokens, {plan.num_target_tokens:,} targets in "
        f"{plan.num_packs:,} packs of {config.data.max_length:,} (fill {plan.fill:.1%}); {plan.num_steps:,} steps of "
        f"{plan.global_packs:,} packs on {world.size:,} rank(s)",
        file=sys.stderr,
        flush=True,
    )
    per_micro_step = world.size * config.batch.packs_per_micro_batch
    if empty := -plan.global_packs % per_micro_step:
        print(
            f"batch.global_packs ({plan.global_packs}) does not divide over {world.size} ranks x "
            f"{config.batch.packs_per_micro_batch}: {empty} empty forwards in every step",
            file=sys.stderr,
        )


def _newest(run_dir: Path) -> str | None:
    from sft_dist.train import checkpoint

    folders = sorted(checkpoint.checkpoints_dir(run_dir).glob("step-*"))
    return str(folders[-1]) if folders else None
