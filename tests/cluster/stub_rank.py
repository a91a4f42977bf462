"""Stands in for sft-dist where only processes matter: the tests copy it to FOLDER/sft_dist/__main__.py.

`config` answers with the run folder. `train` takes steps of a computation in which none can be missed or taken twice
unseen, saves on a signal to any rank, and ends with 75 after all ranks have agreed, as sft-dist does. Overrides:
    run_dir=DIR steps=N step_s=S    where, how many, how long each takes
    every=K                         a checkpoint every K steps too
    end=C                           end with code C instead of taking a step, on every rank
    seed=N                          another computation
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

SILENT_S = 3.0


def advance(state: str, step: int) -> str:
    return hashlib.sha256(f"{state} {step}".encode()).hexdigest()[:12]


def undisturbed(steps: int, seed: int = 0) -> str:
    """What a run without any disturbance ends with."""
    state = str(seed)
    for step in range(steps):
        state = advance(state, step)
    return state


class Rank:
    def __init__(self, options: dict[str, str]) -> None:
        self.rank = int(os.environ["SLURM_PROCID"])
        self.size = int(os.environ["SLURM_NTASKS"])
        self.run_dir = Path(options["run_dir"])
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.start = "-".join(os.environ.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"))
        self.seen: list[str] = []
        for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(signum, lambda number, _: self.seen.append(signal.Signals(number).name))

    def file(self, kind: str, rank: int) -> Path:
        return self.run_dir / f"{kind}-{self.start}-{rank}"

    def follow(self) -> int:
        """Any rank but 0: show signs of life, pass on signals, leave when rank 0 does."""
        ended = self.file("ended", 0)
        last_word = time.monotonic()
        alive = self.file("alive", 0)
        while not ended.exists():
            write(self.file("alive", self.rank), "")
            if self.seen:
                write(self.file("asked", self.rank), self.seen[0])
            if alive.exists() and time.time() - alive.stat().st_mtime < SILENT_S:
                last_word = time.monotonic()
            if time.monotonic() - last_word > 10 * SILENT_S:
                return 69
            time.sleep(0.05)
        return int(ended.read_text())

    def lead(self, options: dict[str, str]) -> int:
        """Rank 0."""
        (self.run_dir / "outcome.json").unlink(missing_ok=True)
        if "end" in options:
            return self.leave(int(options["end"]), "as asked", 0, "")
        step, state = self.newest(options.get("seed", "0"))
        others = range(1, self.size)
        while not all(self.file("alive", rank).exists() for rank in others):
            if self.seen:
                return self.leave(128 + signal.Signals[self.seen[0]], "before the first step", step, state)
            time.sleep(0.02)
        while step < int(options["steps"]):
            write(self.file("alive", 0), "")
            time.sleep(float(options.get("step_s", 0.1)))
            state, step = advance(state, step), step + 1
            asked = [rank for rank in others if self.file("asked", rank).exists()]
            if self.seen or asked:
                self.save(step, state)
                who = self.seen[:1] or [self.file("asked", asked[0]).read_text()]
                return self.leave(75, f"stopped by {who[0]}", step, state)
            if any(time.time() - self.file("alive", rank).stat().st_mtime > SILENT_S for rank in others):
                return self.leave(69, "another rank is gone", step, state)
            if "every" in options and step % int(options["every"]) == 0:
                self.save(step, state)
        self.save(step, state)
        return self.leave(0, "finished", step, state)

    def newest(self, seed: str) -> tuple[int, str]:
        found = sorted(self.run_dir.glob("checkpoints/step-*/manifest.json"))
        if not found:
            return 0, seed
        manifest = json.loads(found[-1].read_text())
        return manifest["step"], manifest["state"]

    def save(self, step: int, state: str) -> None:
        folder = self.run_dir / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "manifest.json", json.dumps({"step": step, "state": state}))

    def leave(self, code: int, reason: str, step: int, state: str) -> int:
        outcome = {"exit_code": code, "reason": reason, "step": step, "state": state}
        write(self.run_dir / "outcome.json", json.dumps(outcome, indent=2))
        with (self.run_dir / "starts").open("a") as file:
            file.write(f"{code} {reason} at step {step}\n")
        write(self.file("ended", 0), str(code))
        print(f"rank 0 leaves with {code}: {reason}", flush=True)
        return code


def write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def main() -> int:
    verb, run_file, *rest = sys.argv[1:]
    options = {"run_dir": str(Path(run_file).resolve().parent / "run")}
    options |= dict(word.split("=", 1) for word in rest if "=" in word)
    if verb == "config":
        print(json.dumps({"run_dir": options["run_dir"]}))
        return 0
    rank = Rank(options)
    print(f"rank {rank.rank} of {rank.size} is up", flush=True)
    return rank.lead(options) if rank.rank == 0 else rank.follow()


if __name__ == "__main__":
    sys.exit(main())
