"""Faults planted through the environment happen where, when and on which rank they were planted, and nowhere else."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist import faults
from sft_dist.errors import UsageError


@pytest.mark.parametrize(("rank", "step", "happens"), [(1, 3, True), (0, 3, False), (1, 2, False), (1, None, False)])
def test_a_fault_happens_only_where_its_conditions_hold(
    monkeypatch: pytest.MonkeyPatch, rank: int, step: int | None, happens: bool
) -> None:
    monkeypatch.setenv(faults.VARIABLE, "save.after_shards:rank=1:step=3:raise")
    faults.reach("save.before_shards", rank=rank, step=step)
    if happens:
        with pytest.raises(RuntimeError, match=r"planted fault at save\.after_shards"):
            faults.reach("save.after_shards", rank=rank, step=step)
    else:
        faults.reach("save.after_shards", rank=rank, step=step)


def test_a_fault_of_the_first_start_is_gone_after_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, "step.loss:restart=0:nan")
    assert faults.spoils("step.loss", rank=0, step=1)
    monkeypatch.setenv("SFT_DIST_RESTART", "1")
    assert not faults.spoils("step.loss", rank=0, step=1)


def test_nothing_happens_without_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(faults.VARIABLE, raising=False)
    faults.reach("save.after_shards", rank=0, step=0)
    assert not faults.spoils("step.loss", rank=0)


@pytest.mark.parametrize(
    ("action", "code"), [("SIGKILL", -9), ("SIGTERM", -15), ("exit=3", 3), ("raise", 1), ("oserror", 1), ("memory", 1)]
)
def test_actions_end_the_process_as_named(action: str, code: int) -> None:
    program = "from sft_dist import faults; faults.reach('here', rank=0); print('alive')"
    env = {faults.VARIABLE: f"here:{action}"}
    ended = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (code, "")


@pytest.mark.parametrize("text", ["here", "here:explode", "here:rank=x:raise", "here:pack=1:raise", "here:exit"])
def test_what_cannot_be_read_is_named(text: str) -> None:
    with pytest.raises(UsageError, match="SFT_DIST_FAULTS"):
        faults.parse(text)


@given(st.integers(0, 99), st.integers(0, 99), st.sampled_from(["SIGKILL", "hang", "nan", "sleep=0.5"]))
def test_what_is_written_is_read(rank: int, step: int, action: str) -> None:
    (fault,) = faults.parse(f" a.b:step={step}:rank={rank}:{action}, ")
    assert (fault.point, fault.rank, fault.step, fault.restart) == ("a.b", rank, step, None)
    assert fault.action == action.partition("=")[0]
