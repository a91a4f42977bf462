"""Where a run stands, from the files of its run folder alone: metrics.jsonl, outcome.json, starts.jsonl and the
manifests of its checkpoints. Reads, and never waits for, locks or asks anybody: it works on any machine that sees the
folder, while the run is at work and after it. A file that is missing or cut short leaves its line unknown."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.job import EXIT_USAGE, LaunchError

RECENT_STEPS = 20  # of which the rate is told
SILENT_S = 300.0  # without a new line in metrics.jsonl, and ten steps' time at least
TAIL_BYTES = 1 << 20

Entry = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Status:
    """What is known of a run; None where its files do not tell."""

    run_dir: Path
    state: str  # in words: at work, ended, silent
    step: int = 0
    num_steps: int | None = None
    loss: float | None = None
    heldout_nll: float | None = None
    step_time_s: float | None = None  # median of the recent steps
    tokens_per_s: float | None = None
    eta_s: float | None = None
    checkpoint: str | None = None
    checkpoint_age_s: float | None = None
    num_restarts: int | None = None
    goodput: float | None = None
    wall_s: float | None = None


def read_status(run_dir: Path, *, now_s: float) -> Status:
    """The status of a run folder, at `now_s` seconds since 1970. Raises LaunchError where it is none."""
    metrics, outcome = run_dir / "metrics.jsonl", _read_object(run_dir / "outcome.json")
    if not any((run_dir / name).exists() for name in ("metrics.jsonl", "outcome.json", "config.json", "checkpoints")):
        raise LaunchError(f"{run_dir}: not a run folder", exit_code=EXIT_USAGE)
    entries = list(_entries(metrics, last_bytes=TAIL_BYTES))
    steps = [entry for entry in entries if entry.get("kind") == "train"]
    heldout = [entry for entry in entries if entry.get("kind") == "heldout"]
    last: Entry = steps[-1] if steps else {}
    checkpoint = newest_checkpoint(run_dir)
    step = int(_number(last, "step") or (checkpoint[0] if checkpoint else 0))
    num_steps = _number(last, "num_steps")
    times = [seconds for entry in steps[-RECENT_STEPS:] if (seconds := _number(entry, "step_time_s"))]
    step_time_s = statistics.median(times) if times else None
    tokens = sum(_number(entry, "num_tokens") or 0.0 for entry in steps[-RECENT_STEPS:])
    starts = list(_entries(run_dir / "starts.jsonl"))
    productive_s, wall_s = productive_and_wall_s(starts)
    return Status(
        run_dir=run_dir,
        state=_state(outcome, _age_s(metrics, now_s), step_time_s),
        step=step,
        num_steps=None if num_steps is None else int(num_steps),
        loss=_number(last, "loss"),
        heldout_nll=_number(heldout[-1], "nll") if heldout else None,
        step_time_s=step_time_s,
        tokens_per_s=tokens / sum(times) if times and tokens else None,
        eta_s=None if step_time_s is None or num_steps is None else step_time_s * (num_steps - step),
        checkpoint=None if checkpoint is None else f"step {checkpoint[0]:,} ({checkpoint[1]})",
        checkpoint_age_s=None if checkpoint is None else _age_s(checkpoint[1] / "manifest.json", now_s),
        num_restarts=sum(entry.get("did") == "start" for entry in starts) - 1 if starts else None,
        goodput=productive_s / wall_s if wall_s else None,
        wall_s=wall_s or None,
    )


def newest_checkpoint(run_dir: Path) -> tuple[int, Path] | None:
    """Step and folder of the newest checkpoint that has its manifest."""
    found = []
    for manifest in (run_dir / "checkpoints").glob("step-*/manifest.json"):
        digits = manifest.parent.name.removeprefix("step-")
        if digits.isdecimal():
            found.append((int(digits), manifest.parent))
    return max(found, default=None)


def productive_and_wall_s(starts: Sequence[Entry]) -> tuple[float, float]:
    """Seconds of steps whose result was kept, and of all since the first start.

    A line of starts.jsonl says what the time since the line before went to. A start takes up after a step; the steps
    beyond it are taken again, and their first time was lost. Clocks of two machines (`clock`) are not compared: a
    pause between such starts counts nowhere.
    """
    kept: dict[int, float] = {}
    wall_s, clock = 0.0, None
    last_at: float | None = None
    for entry in starts:
        at = _number(entry, "at")
        if at is None:
            continue
        seconds = 0.0 if last_at is None else max(0.0, at - last_at)
        did, step = entry.get("did"), int(_number(entry, "step") or 0)
        if did != "start" or entry.get("clock") == clock:
            wall_s += seconds
        if did == "start":
            clock = entry.get("clock")
        if did in ("startup", "step"):
            taken_again_from = step + (did == "startup")
            kept = {number: time_s for number, time_s in kept.items() if number < taken_again_from}
        if did == "step":
            kept[step] = seconds
        last_at = at
    return sum(kept.values()), wall_s


def lines(status: Status) -> Iterator[str]:
    """For people, one fact a line."""
    s = status
    yield f"{s.run_dir}: {s.state}"
    of = "" if s.num_steps is None else f" of {s.num_steps:,} ({s.step / max(1, s.num_steps):.0%})"
    heldout = "" if s.heldout_nll is None else f", held-out NLL {s.heldout_nll:.4f}"
    yield f"step        {s.step:,}{of}"
    yield f"loss        {_shown(s.loss, '.4f')}{heldout}"
    yield f"rate        {_shown(s.tokens_per_s, ',.0f')} tokens/s, {_shown(s.step_time_s, '.2f')} s a step"
    yield f"eta         {_duration(s.eta_s)}"
    age = "" if s.checkpoint_age_s is None else f", {_duration(s.checkpoint_age_s)} ago"
    yield f"checkpoint  {s.checkpoint or 'none'}{age}"
    yield f"restarts    {'-' if s.num_restarts is None else s.num_restarts}"
    yield f"goodput     {_shown(s.goodput, '.1%')} of {_duration(s.wall_s)}"


def add_parser(verbs: argparse._SubParsersAction[Any]) -> None:
    """The command `sft-launch status`."""
    parser = verbs.add_parser(
        "status",
        help="where a run stands, from its files",
        description="Step, loss, rate, time left, last checkpoint, restarts and goodput (time of steps that were kept "
        "over all time since the first start) of a run, from the files of its folder alone.",
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    parser.add_argument("--json", action="store_true", help="as one JSON object; null is unknown")


def run(options: argparse.Namespace) -> int:
    """Print the status of a run folder."""
    status = read_status(options.run_dir, now_s=time.time())
    if options.json:
        print(
            json.dumps({key: str(value) if isinstance(value, Path) else value for key, value in vars(status).items()})
        )
    else:
        print("\n".join(lines(status)))
    return 0


def _state(outcome: Entry | None, silent_s: float | None, step_time_s: float | None) -> str:
    if outcome is not None:
        code = _number(outcome, "exit_code")
        return f"ended: {outcome.get('reason', 'for no known reason')} (exit code {_shown(code, '.0f')})"
    if silent_s is None:
        return "starting: no step is taken yet"
    # No lock is asked: to take it, for a moment, could turn a start away.
    if silent_s > max(SILENT_S, 10 * (step_time_s or 0.0)):
        return f"silent: its last word is {_duration(silent_s)} old; killed, or hanging, or waiting in the queue"
    return f"at work: its last word is {_duration(silent_s)} old"


def _entries(path: Path, *, last_bytes: int | None = None) -> Iterator[Entry]:
    """The JSON objects of a file, one a line; those cut short are passed over."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0 if last_bytes is None else max(0, size - last_bytes))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            yield entry


def _read_object(path: Path) -> Entry | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _number(entry: Entry, key: str) -> float | None:
    value = entry.get(key)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _age_s(path: Path, now_s: float) -> float | None:
    try:
        return max(0.0, now_s - path.stat().st_mtime)
    except OSError:
        return None


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _duration(seconds: float | None) -> str:
    """2h41m, 3m20s, 12s"""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
