"""What a run says: one line a step for people, JSON Lines and TensorBoard for tools. Rank 0 only."""

import json
from pathlib import Path
from typing import Any, TextIO

from sft_dist.config import LoggingConfig, flatten
from sft_dist.data.progress import duration
from sft_dist.errors import StorageError, say
from sft_dist.train.meter import Speed


class Metrics:
    """Writes to RUN_DIR/metrics.jsonl (keyed by step, cut back to `first_step` on resume) and to TensorBoard."""

    def __init__(self, run_dir: Path, config: LoggingConfig, *, first_step: int, is_main: bool) -> None:
        self._is_main = is_main
        self._file: TextIO | None = None
        self._board: Any = None
        self._path = run_dir / "metrics.jsonl"
        if not is_main:
            return
        try:
            _cut_back(self._path, first_step)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run
        except OSError as error:
            raise StorageError(f"{self._path} cannot be written: {error.strerror or error}") from error
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def say(self, line: str) -> None:
        """One line for people, from rank 0."""
        if self._is_main:
            say(line)

    def record(self, kind: str, step: int, **values: Any) -> None:
        """One entry of the metrics file; numbers also go to TensorBoard as kind/name, nested ones as kind/name.name.

        Kinds: `train` (one a step), `train_time` (one a step, once the next has begun), `train_details` (every
        logging.details_every steps), `heldout`, `heldout_details`, `retention` and `drift` (one an evaluation),
        `checkpoint` (one that is published), `kl_top_k` (one a start with anchor.kl_top_k), and where numbers went
        wrong `skipped`, `heldout_skipped`, `retention_skipped`, `spike` and `rollback`. Details are nested as
        `Details.as_dict` says. Raises StorageError where they cannot be written.
        """
        if self._file is None:
            return
        try:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._file.flush()
            if self._board is not None:
                for name, value in flatten(values).items():
                    if isinstance(value, (int, float)):
                        self._board.add_scalar(f"{kind}/{name}", value, step)
        except OSError as error:
            raise StorageError(f"{self._path} cannot be written: {error.strerror or error}") from error

    def close(self) -> None:
        for file in (self._file, self._board):
            if file is not None:
                try:
                    file.close()
                except OSError as error:  # whatever ended the run is to be told, and not this
                    say(f"{self._path} is cut short: {error.strerror or error}")


def step_line(
    *,
    step: int,
    num_steps: int,
    loss: float,
    nll: float | None,
    grad_norm: float,
    learning_rate: float,
    speed: Speed,
    memory_gib: float,
    eta_s: float,
) -> str:
    """`step   120/2,340  loss 1.1843  grad 0.92  lr 9.8e-06  tokens/s 34,310  targets/s 9,874  mfu 46.1% (PaLM 60.4%)
    mem 61.2 GiB  eta 2h41m`, in one line

    `nll` is shown where it is not the loss itself. Utilisation that is unknown is shown as `mfu -`.
    """
    width = len(f"{num_steps:,}")
    mfu = "-" if speed.mfu is None else f"{speed.mfu:.1%} (PaLM {speed.mfu_palm:.1%})"
    shown_nll = "" if nll is None else f"  nll {nll:.4f}"
    return (
        f"step {step:>{width},}/{num_steps:,}  loss {loss:.4f}{shown_nll}  grad {grad_norm:.2f}  "
        f"lr {learning_rate:.1e}  tokens/s {speed.tokens_per_s:,.0f}  targets/s {speed.target_tokens_per_s:,.0f}  "
        f"mfu {mfu}  mem {memory_gib:.1f} GiB  eta {duration(eta_s)}"
    )


def _cut_back(path: Path, first_step: int) -> None:
    """Drop entries of steps that will be taken again, and a last line that a crash cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["step"] <= first_step and first_step:
            kept.append(line + "\n")
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)
