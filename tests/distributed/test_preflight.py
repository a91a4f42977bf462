"""The preflight tells every problem of every host at once, and nothing of a cluster that is ready."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sft_dist.distributed.preflight import Facts, nearest_existing, problems, stale_locks, table
from tests.end_to_end.conftest import Place, make_place
from tests.helpers.worlds import run_ranks

SAME = {"torch": "2.13.0", "code": "abc", "GPU driver": "570"}
ONE = Facts(
    rank=0, host="n1", local_rank=0, local_size=2, gpu="H200", num_gpus=2, free_gib=100, clock_s=1_000.0, same=SAME
)
READY = [ONE, replace(ONE, rank=1, local_rank=1), replace(ONE, rank=2, host="n2"), replace(ONE, rank=3, host="n2")]


def test_a_cluster_that_is_ready_has_no_problems_and_a_line_for_each_host() -> None:
    assert problems(READY, need_gib=100) == []
    lines = table(READY).splitlines()
    assert [line.split()[:2] for line in lines] == [["host", "ranks"], ["n1", "2"], ["n2", "2"]]
    assert "2 x H200" in lines[2] and "100.0 GiB" in lines[2]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"same": SAME | {"torch": "2.11.0"}}, "n2: torch: 2.11.0 here, 2.13.0 on n1 (rank 0)"),
        ({"same": {**SAME, "code": "xyz"}}, "n2: code: xyz here, abc on n1 (rank 0)"),
        ({"gpu": "A100"}, "n2: GPU: A100 here, H200 on n1"),
        ({"free_gib": 0.25}, "n2: run_dir: 0.25 GiB of disk are free, a checkpoint takes 1.00 GiB"),
        ({"clock_s": 1_090.0}, "n2: clock: 90 s away from that of n1; have the host synchronise it"),
        ({"faults": ("model.path: /m is not there",)}, "n2: model.path: /m is not there"),
    ],
)
def test_each_problem_is_told_once_a_host(changes: dict, expected: str) -> None:
    assert problems([*READY[:2], *(replace(facts, **changes) for facts in READY[2:])], need_gib=1) == [expected]


def test_all_problems_are_told_together_and_shared_ones_once() -> None:
    faulty = [replace(facts, faults=("model.path: /m is not there",)) for facts in READY]
    faulty[3] = replace(faulty[3], free_gib=0.0, same=SAME | {"GPU driver": "535"})
    assert [problem.split(":")[:2] for problem in problems(faulty, need_gib=1)] == [
        ["n1, n2", " model.path"], ["n2", " GPU driver"], ["n2", " run_dir"],
    ]  # fmt: skip


def test_old_locks_are_stale_and_young_ones_are_not(tmp_path: Path) -> None:
    for name, age_s in (("old", 3_600), ("young", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
        os.utime(tmp_path / name / "lock", (time.time() - age_s,) * 2)
    assert stale_locks([tmp_path, tmp_path / "not there"]) == [tmp_path / "old" / "lock"]


def test_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert nearest_existing(tmp_path / "a" / "b") == tmp_path
    assert nearest_existing(tmp_path) == tmp_path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("check"))


@pytest.mark.slow
def test_two_ranks_check_their_host(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["-m", "sft_dist", "check", str(place.run_file), f"run_dir={tmp_path / 'run'}"]
    done = run_ranks(2, words)
    assert [rank.returncode for rank in done] == [0, 0], done[0].stdout
    assert "all-reduce of 64 MiB" in done[0].stdout and done[0].stdout.endswith("ready\n")
    assert done[1].stdout == "" and not list(tmp_path.iterdir()), "nothing is left of it"
    (tmp_path / "extensions" / "op").mkdir(parents=True)
    lock = tmp_path / "extensions" / "op" / "lock"
    lock.touch()
    os.utime(lock, (0, 0))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    missing = place.folder / "train.jsonl"
    missing.rename(place.folder / "away")
    done = run_ranks(2, words)
    assert [rank.returncode for rank in done] == [69, 69]
    assert "2 problems:" in done[0].stdout and "all-reduce of 64 MiB" in done[0].stdout
    assert f"data 1: {missing} is not there" in done[0].stdout and f"{lock}: a lock left by a build" in done[0].stdout
