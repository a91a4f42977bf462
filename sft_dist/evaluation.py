"""The verb `evaluate`: a checkpoint of a run on its held-out and retention data, or points on the way to it.

At coefficient a the weights are θ̂ + a (θ̃ − θ̂), from the pre-trained model (0) to the checkpoint (1): what is gained on
the task stands beside what is lost on everything else. One model at a time is loaded, sharded over all ranks.
"""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sft_dist import __version__
from sft_dist.config import RunConfig
from sft_dist.data.renderer import load_renderer
from sft_dist.data.selection import Selection
from sft_dist.distributed import collectives
from sft_dist.distributed.watchdog import Watchdog
from sft_dist.distributed.world import World, find_world
from sft_dist.errors import ConfigError, ExitCode, StorageError, UsageError
from sft_dist.export import check_pretrained
from sft_dist.model import engine as engines
from sft_dist.model import probe
from sft_dist.preparation import heldout_set, policy, retention_set, share_of, with_labels
from sft_dist.score.output import check_writable
from sft_dist.session import close_session, open_session, print_from_main
from sft_dist.train import checkpoint as checkpoints
from sft_dist.train import contract, files, rundir
from sft_dist.train.checkpoint import Checkpoint
from sft_dist.train.details import Details
from sft_dist.train.evaluate import heldout_details, scoring_packs
from sft_dist.train.forgetting import Retention

OUTPUT = "evaluation.json"
TASK = "task"  # the column of data.heldout


@dataclass(frozen=True, slots=True)
class Point:
    """Figures of one coefficient: of the held-out data as a whole, of the retention data by source."""

    coefficient: float
    heldout: Details | None
    retention: Details | None

    def nll(self) -> dict[str, float]:
        """Column -> nats per token; the held-out data are `task`."""
        columns = {} if self.heldout is None else {TASK: self.heldout.all.nll}
        kept = {} if self.retention is None else self.retention.group("source")
        return columns | {_column(name): figures.nll for name, figures in kept.items()}


def run(
    config: RunConfig, env: Mapping[str, str], *, coefficients: Sequence[float], which: str, output: Path | None
) -> ExitCode:
    """Score data.heldout and data.retention at each coefficient; print the table and write it as JSON.

    The model with its adapters is that of the run folder, whatever the run file says of it. Raises ConfigError without
    data or without a checkpoint, for a run that trained no language model, and where adapters or coefficients below 1
    would need pre-trained weights that are no longer there; StorageError where the JSON cannot be written.
    """
    if len(set(coefficients)) < len(coefficients):
        raise UsageError("--interpolate: a coefficient is given twice")
    world = find_world(env)
    run_dir = Path(config.run_dir)
    saved = rundir.saved_config(run_dir)
    contract.check_language_model(saved, config.run_dir)
    # Of a run's file, what its weights are weights of.
    own = {name: getattr(saved, name) for name in ("model", "adapter", "head", "seed")}
    place = output or run_dir / OUTPUT
    share = share_of(world, env)
    config = with_labels(config.model_copy(update=own), share)
    heldout, retention = heldout_set(config, share), retention_set(config, share)
    if heldout is None and retention is None:
        raise ConfigError("data.heldout and data.retention are both empty: nothing to evaluate on")
    with open_session(world, config.watchdog) as watchdog:
        found = collectives.on_main(lambda: _checkpoint(config, run_dir, which, coefficients, place))
        say_once = print_from_main(world)
        if found.manifest["template"] != load_renderer(config.model, config.data).template:
            say_once("note: this checkpoint was trained with another chat template than the one it is scored with")
        points = []
        for coefficient in coefficients:
            watchdog.enter(f"evaluation at coefficient {coefficient:g}")
            points.append(_point(config, world, found, coefficient, heldout, retention, watchdog))
            say_once(f"coefficient {coefficient:g}: " + _told(points[-1].nll()))
        before = _before(points, found, config, saved, heldout, retention)
        if world.is_main:
            print("\n".join(table(points, before, step=found.step)), flush=True)
        collectives.on_main(lambda: _write(place, run_dir, found, points, before))
        if world.is_main:
            print(f"written to {place}")
        close_session()
    return ExitCode.DONE


def table(points: Sequence[Point], before: Mapping[str, float], *, step: int) -> list[str]:
    """`coefficient   task              retention wiki` with NLLs per token and their changes, one line a point."""
    columns = list(points[0].nll())
    rows = [["coefficient", *columns]]
    for point in points:
        values = point.nll()
        cells = [f"{values[name]:.4f}" + _change(values[name], before.get(name)) for name in columns]
        rows.append([f"{point.coefficient:g}", *cells])
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    told = "; changes since the pre-trained model" if before else ""
    return [f"step {step:,}, NLL per token{told}"] + [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
    ]


def _checkpoint(
    config: RunConfig, run_dir: Path, which: str, coefficients: Sequence[float], output: Path
) -> Checkpoint:
    """The checkpoint asked for. Raises whatever would be in the way of its figures, before they are computed."""
    check_writable(output)
    found = checkpoints.find(run_dir, which)
    contract.check_base(config, found)
    if any(coefficient < 1.0 for coefficient in coefficients):
        check_pretrained(config, found)
    return found


def _point(
    config: RunConfig,
    world: World,
    found: Checkpoint,
    coefficient: float,
    heldout: Selection | None,
    retention: Selection | None,
    watchdog: Watchdog,
) -> Point:
    """A collective."""
    engine = engines.inference_engine(config, world, found.folder, coefficient=coefficient)
    engine.on_forward(watchdog.move)
    selections = [selection for selection in (heldout, retention) if selection is not None]
    probe.check(engine, probe.choose(selections[0].dataset, config.data.max_length))
    per_forward = config.batch.packs_per_micro_batch

    def scored(selection: Selection | None) -> Details | None:
        if selection is None:
            return None
        return heldout_details(engine, selection, scoring_packs(selection), world, per_forward)

    point = Point(coefficient, scored(heldout), scored(retention))
    engine.close()
    return point


def _before(
    points: Sequence[Point],
    found: Checkpoint,
    config: RunConfig,
    saved: RunConfig,
    heldout: Selection | None,
    retention: Selection | None,
) -> dict[str, float]:
    """Column -> NLL that changes are counted from: that of coefficient 0, else what the run knew of the same data."""
    for point in points:
        if point.coefficient == 0.0:
            return point.nll()
    known: dict[str, float] = {}
    if retention is not None:
        values = Retention(retention).comparable(found.state.retention)
        known = {_column(value.name): value.before for value in values if value.before is not None}
    nll = found.state.heldout_nll_before
    # Beside a head it is the NLL and the loss of labels together.
    if heldout is not None and nll is not None and not saved.head.is_beside:
        is_same = found.manifest["heldout"] == contract.samples_digest(heldout.dataset)
        if is_same and policy(config, config.data.heldout) == policy(saved, saved.data.heldout):
            known[TASK] = nll
    return known


def _write(place: Path, run_dir: Path, found: Checkpoint, points: Sequence[Point], before: Mapping[str, float]) -> None:
    entries = []
    for point in points:
        nll = point.nll()
        kept = {} if point.retention is None else point.retention.group("source")
        entries.append(
            {
                "coefficient": point.coefficient,
                "heldout": None if point.heldout is None else point.heldout.as_dict(),
                "retention": {name: figures.as_dict() for name, figures in kept.items()},
                "change": {name: nll[name] - before[name] for name in nll if name in before},
            }
        )
    content = {
        "run_dir": str(run_dir),
        "step": found.step,
        "checkpoint": found.folder.name,
        "weights": found.manifest["weights"],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "sft_dist": __version__,
        "points": entries,
    }
    try:
        files.write_json(place, content)
    except OSError as error:
        raise StorageError(f"{place}: cannot be written: {error}") from error


def _column(source: str) -> str:
    return f"retention {source}"


def _told(nll: Mapping[str, float]) -> str:
    return "   ".join(f"{name} NLL {value:.4f}" for name, value in nll.items())


def _change(now: float, before: float | None) -> str:
    return "" if before is None else f" ({now - before:+.4f})"
