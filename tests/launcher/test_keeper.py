"""A keeper before a rank, as the lifeline hears it: real keepers, real ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from launcher.lifeline import Lifeline, Report
from launcher.parcel import Parcel, encode

from .conftest import ROOT, TIMEOUT_S

pytestmark = pytest.mark.slow

# It ends with the code in the file `go`, once there is one.
RANK = """
import sys, time
from pathlib import Path
print("the rank is up", flush=True)
while not Path("go").exists():
    time.sleep(0.01)
sys.exit(int(Path("go").read_text()))
"""


@dataclass
class Kept:
    """Rank 1 behind a keeper, both in `folder`, and the lifeline to it."""

    folder: Path
    line: Lifeline
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def log(self) -> Path:
        return self.folder / "logs" / "rank-1.log"

    def start(self) -> None:
        (self.folder / "rank.py").write_text(RANK)
        path = os.pathsep.join((str(self.folder), str(ROOT)))
        word = encode(Parcel(("rank",), {"PYTHONPATH": path}, self.line.contact, str(self.log.parent)))
        self.processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "launcher.keeper", word],
                cwd=self.folder,
                env={**os.environ, "RANK": "1", "PYTHONPATH": path},
                stderr=subprocess.PIPE,
                text=True,
            )
        )

    def until(self, condition: Callable[[list[Report]], bool]) -> list[Report]:
        deadline = time.monotonic() + TIMEOUT_S
        reports = self.line.poll()
        while not condition(reports):
            assert time.monotonic() < deadline, reports
            time.sleep(0.01)
            reports += self.line.poll()
        return reports

    def end_with(self, code: int) -> Report:
        temporary = self.folder / "go.tmp"
        temporary.write_text(str(code))
        temporary.replace(self.folder / "go")
        (report,) = self.until(bool)
        return report

    def leave(self) -> tuple[int, str]:
        """The code of the keeper, which has stayed until now, and what it has said."""
        (process,) = self.processes
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        self.line.let_go()
        _, said = process.communicate(timeout=TIMEOUT_S)
        return process.returncode, said


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    made = Kept(tmp_path, Lifeline(("127.0.0.1",), num_ranks=1))
    yield made
    made.line.close()  # a keeper that is left over ends its rank
    for process in made.processes:
        process.communicate(timeout=TIMEOUT_S)


@pytest.mark.parametrize(("code", "words"), [(75, None), (3, "log cannot be read: No such file or directory")])
def test_the_end_of_a_rank_is_told_though_its_log_has_gone(kept: Kept, code: int, words: str | None) -> None:
    kept.start()
    kept.until(lambda _: kept.log.exists() and "the rank is up" in kept.log.read_text())
    kept.log.unlink()
    report = kept.end_with(code)
    assert (report.name.split()[:2], report.returncode) == (["rank", "1"], code)
    assert (report.quote and report.quote.lines) == (words and (words,))
    assert kept.leave() == (0 if code == 75 else code, "")


def test_a_rank_that_cannot_be_started_is_told_with_the_reason(kept: Kept) -> None:
    kept.log.parent.write_text("a file where the folder is to be")
    kept.start()
    (report,) = kept.until(bool)
    assert report.returncode is None
    assert report.reason == f"it could not be started: --log-dir {kept.log.parent}: File exists"
    assert kept.line.is_complete
    assert kept.leave() == (69, "")
