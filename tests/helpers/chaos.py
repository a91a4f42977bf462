"""Kill a training at random instants and start it again, until it is done: which process, by which signal and in which
phase are drawn. Everything is real: processes, signals, files. What the run folder shows tells the phase."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.processes import all_processes, kill_sessions, living_members
from launcher.restarts import checkpoints
from sft_dist.train import goodput
from tests.helpers.worlds import ROOT

Phase = Literal["start-up", "step", "save", "evaluate"]
PHASES: tuple[Phase, ...] = ("start-up", "step", "save", "evaluate")
_PHASE_WEIGHTS = (4, 2, 3, 2)
_TARGETS = ("rank 0", "rank 1", "launcher")
_TARGET_WEIGHTS = (5, 5, 2)
# TERM and USR1 ask for a checkpoint; the others end a process in the middle of whatever it does.
RANK_SIGNALS = ("SIGKILL", "SIGKILL", "SIGABRT", "SIGSEGV", "SIGTERM", "SIGUSR1")
_LAUNCHER_SIGNALS = ("SIGKILL", "SIGTERM")
_EXPECTED_OF_LAUNCHER = {"SIGKILL": {-signal.SIGKILL}, "SIGTERM": {75, 128 + signal.SIGTERM}}
_POLL_S = 0.002
_MAX_FRUITLESS = 2  # sft-launch gives up at the third restart without a new checkpoint
_MAX_DELAY_S = 0.05  # within a phase: of a tiny model they take 60 to 140 ms


@dataclass(frozen=True, slots=True)
class Kill:
    """One blow, and what the run folder showed just before it."""

    target: str
    signal: str
    phase: Phase
    step: int  # finished by then
    at: float  # s, the clock of starts.jsonl


class Sight:
    """What a run folder shows of the run at work; cheap enough to be asked every two milliseconds."""

    def __init__(self, run_dir: Path, evaluate_every: int) -> None:
        self._run_dir = run_dir
        self._evaluate_every = evaluate_every
        self._offset = 0
        self._published: frozenset[Any] = frozenset()
        self.entries: list[dict[str, Any]] = []

    def look(self) -> Phase:
        path = self._run_dir / goodput.STARTS
        if path.exists() and path.stat().st_size > self._offset:
            with path.open("rb") as file:
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
            self._offset += len(whole + newline)
            self.entries += [json.loads(line) for line in whole.splitlines() if line.endswith(b"}")]
        if not self.entries or self.entries[-1]["did"] in ("start", "end"):
            return "start-up"
        if any((self._run_dir / "checkpoints").glob(".tmp-*")):
            return "save"
        last = self.entries[-1]
        is_due = last["step"] % self._evaluate_every == 0
        first = last["did"] == "startup" and last["step"] == 0
        return "evaluate" if first or (is_due and last["did"] == "step") else "step"

    @property
    def num_steps_taken(self) -> int:
        """Over all starts, those taken twice counted twice."""
        return sum(entry["did"] == "step" for entry in self.entries)

    @property
    def step(self) -> int:
        return next((entry["step"] for entry in reversed(self.entries) if "step" in entry), 0)

    @property
    def num_checkpoints(self) -> int:
        """Ever published, as sft-launch counts them: one that is on its way when its ranks are hit is none."""
        self._published |= checkpoints(self._run_dir)
        return len(self._published)


class Chaos:
    """One run under `sft-launch run --restarts`, and the blows it is given."""

    def __init__(
        self,
        arguments: list[str],
        run_dir: Path,
        *,
        evaluate_every: int,
        rng: random.Random,
        rank_signals: tuple[str, ...] = RANK_SIGNALS,
        timeout_s: float = 120.0,
    ) -> None:
        """`arguments` of `sft-launch run`; `timeout_s` is the longest wait for anything to happen."""
        self._arguments = arguments
        self._rng = rng
        self._rank_signals = rank_signals
        self._timeout_s = timeout_s
        self._sight = Sight(run_dir, evaluate_every)
        self._log = run_dir.parent / f"{run_dir.name}.log"
        self._startup_s = 6.0
        self._fruitless = 0
        self.kills: list[Kill] = []

    def run(self, num_kills: int) -> list[Kill]:
        """Kill `num_kills` times, then let the run end; returns the kills. Fails where anything ends unexpectedly."""
        while True:
            with self._launched() as launcher:
                blow = self._torment(launcher, num_kills)
                code = launcher.wait(timeout=self._timeout_s + self._startup_s)
            if blow is None:
                assert code == 0, f"the run ended with {code}:\n{self.log_tail()}"
                assert len(self.kills) == num_kills, f"the run was over after {len(self.kills)} kills"
                return self.kills
            assert code in _EXPECTED_OF_LAUNCHER[blow], f"sft-launch ended with {code} by {blow}:\n{self.log_tail()}"

    def log_tail(self) -> str:
        return self._log.read_text(errors="replace")[-6000:]

    @contextmanager
    def _launched(self) -> Iterator[subprocess.Popen[bytes]]:
        with self._log.open("ab") as log:
            launcher = subprocess.Popen(
                [sys.executable, "-m", "launcher", "run", *self._arguments],
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
            )
        ranks: set[int] = set()
        try:
            yield launcher
        finally:
            ranks |= {p.pid for p in all_processes() if p.parent == launcher.pid}
            launcher.kill()
            launcher.wait()
            kill_sessions(ranks | {launcher.pid}, timeout_s=10)

    def _torment(self, launcher: subprocess.Popen[bytes], num_kills: int) -> str | None:
        """Kill until the launcher itself was hit, whose signal is returned, or until enough was killed."""
        ranks: dict[int, int] = {}
        while len(self.kills) < num_kills:
            ranks = self._two_ranks(launcher, unlike=ranks)
            num_checkpoints = self._sight.num_checkpoints
            if not self._reach_the_instant(launcher):
                return None  # the run was over first
            kill = self._strike(launcher, ranks)
            self._until_gone(set(ranks.values()))
            self._sight.look()
            self._fruitless = 0 if self._sight.num_checkpoints > num_checkpoints else self._fruitless + 1
            if kill.target == "launcher":
                return kill.signal
        return None

    def _reach_the_instant(self, launcher: subprocess.Popen[bytes]) -> bool:
        """Wait for the phase that was drawn and a random time into it; False if the launcher ended before."""
        rng, sight = self._rng, self._sight
        (phase,) = rng.choices(PHASES, _PHASE_WEIGHTS)
        num_before, begun = sight.num_checkpoints, time.monotonic()
        num_starts = sum(entry["did"] == "startup" for entry in sight.entries)
        if phase == "start-up" and self._fruitless < _MAX_FRUITLESS:
            until = begun + rng.uniform(0, self._startup_s)
            return self._poll(lambda: time.monotonic() >= until, launcher)

        def trains() -> bool:
            sight.look()
            return sum(entry["did"] == "startup" for entry in sight.entries) > num_starts

        if not self._poll(trains, launcher):
            return False
        self._startup_s = time.monotonic() - begun
        num_steps = sight.num_steps_taken + rng.randint(0, 2)
        must_save = self._fruitless >= _MAX_FRUITLESS

        def is_there() -> bool:
            now = sight.look()
            is_late = sight.num_steps_taken > num_steps + 3  # phases may be too short to be seen
            saved = not must_save or sight.num_checkpoints > num_before
            return saved and sight.num_steps_taken >= num_steps and (now == phase or is_late)

        if not self._poll(is_there, launcher):
            return False
        until = time.monotonic() + rng.uniform(0, _MAX_DELAY_S)
        return self._poll(lambda: time.monotonic() >= until, launcher)

    def _strike(self, launcher: subprocess.Popen[bytes], ranks: dict[int, int]) -> Kill:
        (target,) = self._rng.choices(_TARGETS, _TARGET_WEIGHTS)
        name = self._rng.choice(_LAUNCHER_SIGNALS if target == "launcher" else self._rank_signals)
        pid = launcher.pid if target == "launcher" else ranks[int(target[-1])]
        kill = Kill(target, name, self._sight.look(), self._sight.step, time.time())
        os.kill(pid, signal.Signals[name])
        self.kills.append(kill)
        print(f"kill {len(self.kills):>3}: {name} to {target} in {kill.phase} after step {kill.step}", flush=True)
        return kill

    def _two_ranks(self, launcher: subprocess.Popen[bytes], *, unlike: dict[int, int]) -> dict[int, int]:
        """Rank -> process id of the next start."""
        deadline = time.monotonic() + self._timeout_s
        while not (found := _ranks(launcher.pid, unlike=unlike)):
            assert launcher.poll() is None, f"sft-launch ended instead of starting ranks:\n{self.log_tail()}"
            assert time.monotonic() < deadline, f"two ranks did not start:\n{self.log_tail()}"
            time.sleep(_POLL_S)
        return found

    def _poll(self, condition: Callable[[], bool], launcher: subprocess.Popen[bytes]) -> bool:
        deadline = time.monotonic() + self._timeout_s
        while not condition():
            if launcher.poll() is not None:
                return False
            assert time.monotonic() < deadline, f"nothing happens:\n{self.log_tail()}"
            time.sleep(_POLL_S)
        return launcher.poll() is None

    def _until_gone(self, pids: set[int]) -> None:
        """Each rank leads a session; nothing of it may outlive the blow."""
        deadline = time.monotonic() + self._timeout_s
        while living_members(pids):
            assert time.monotonic() < deadline, f"ranks outlive the blow:\n{self.log_tail()}"
            time.sleep(0.02)


def recoveries_s(kills: list[Kill], entries: list[dict[str, Any]]) -> list[float]:
    """Seconds from a blow to the end of the first step that was not there before, in a later start.

    Blows that fall before that step belong to the same recovery, which begins with the first of them.
    """
    found: list[float] = []
    recovered_at = 0.0
    for kill in kills:
        if kill.at < recovered_at:
            continue
        later = [n for n, entry in enumerate(entries) if entry["did"] == "start" and entry["at"] > kill.at]
        if not later:
            break
        reached = max((entry["step"] for entry in entries[: later[0]] if entry["did"] == "step"), default=0)
        new = (e["at"] for e in entries[later[0] :] if e["did"] == "step" and e["step"] > reached)
        recovered_at = next(new, float("inf"))
        if recovered_at < float("inf"):
            found.append(recovered_at - kill.at)
    return found


def _ranks(launcher: int, *, unlike: dict[int, int]) -> dict[int, int]:
    """Rank -> process id once both of a new start are there; else nothing."""
    found = {}
    for process in all_processes():
        if process.parent == launcher and process.state not in "ZX" and process.pid not in unlike.values():
            try:
                environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            for entry in environment:
                if entry.startswith(b"RANK="):
                    found[int(entry[5:])] = process.pid
    return found if len(found) == 2 else {}
