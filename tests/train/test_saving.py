"""A run that is killed while it saves, or cannot save, keeps what it had, says what happened and goes on from there."""

import json
import re
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from sft_dist.train import checkpoint
from sft_dist.train.files import write_json
from sft_dist.train.lock import this_process
from tests.helpers.saving_ranks import NUM_STEPS, Job, final_values, run

pytestmark = pytest.mark.slow

EVERY_RANK = (
    "save.snapshot",
    "save.before_shards",
    "save.after_shard",
    "save.after_shards",
    "save.before_publish",
    "save.after_publish",
)
KILLS = [(point, rank) for point in EVERY_RANK for rank in (0, 1)]
KILLS += [("save.before_rename", 0), ("save.evict", 0)]  # where only rank 0 is


def names(run_dir: Path) -> set[str]:
    return {path.name for path in checkpoint.checkpoints_dir(run_dir).iterdir()} - {checkpoint.BEST}


def check_end(run_dir: Path) -> None:
    """The last checkpoint is what uninterrupted arithmetic gives, and nothing half-done lies about."""
    folder = checkpoint.find(run_dir, "last").folder
    assert folder.name == f"step-{NUM_STEPS:08d}"
    for rank in (0, 1):
        weight, moment = final_values(rank)
        weights = torch.load(folder / "shards" / f"rank_{rank}_model.pt")["weights"]
        moments = torch.load(folder / "shards" / f"rank_{rank}_optim.pt")[0]
        assert bool((weights == weight).all()) and bool((moments == moment).all())
    assert not [name for name in names(run_dir) if not name.startswith("step-")]
    assert not (run_dir / "run.lock.json").exists()


@pytest.mark.parametrize("asynchronous", [True, False], ids=["in the background", "while training waits"])
@pytest.mark.parametrize(("point", "rank"), KILLS)
def test_killed_at_any_point_of_a_save_it_goes_on_from_a_whole_checkpoint(
    tmp_path: Path, point: str, rank: int, asynchronous: bool
) -> None:
    run_dir = tmp_path / "run"
    killed = run(Job(run_dir, asynchronous, faults=f"{point}:rank={rank}:step=4:SIGKILL", step_s=0.01))
    assert killed[rank].exit_code == -9, killed[rank].said
    assert killed[1 - rank].exit_code != 0, "nobody goes on alone"
    whole = [
        step for step, folder in checkpoint.step_folders(run_dir).items() if checkpoint.fault_of(folder, None) is None
    ]
    expected = {4} if point in ("save.after_publish", "save.evict") else {2}
    # Rank 0 may be publishing when the other one dies.
    assert whole[-1] in (expected if (point, rank) != ("save.before_publish", 1) else {2, 4})
    best = checkpoint.best_step(run_dir)
    assert best in whole, "best.json never names what is not there"
    again = run(Job(run_dir, asynchronous))
    assert [ended.exit_code for ended in again] == [0, 0], again[0].said + again[1].said
    assert f"resumed from step {whole[-1]}" in again[0].said
    check_end(run_dir)


def test_a_run_that_was_taken_over_publishes_nothing_more(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    other = replace(this_process(), host="node7", pid=4711, boot="another", namespace="another")

    def take_over() -> None:
        while not list(checkpoint.checkpoints_dir(run_dir).glob(".tmp-step-00000004-*")):
            time.sleep(0.01)
        write_json(run_dir / "run.lock.json", asdict(other))

    thief = threading.Thread(target=take_over, daemon=True)
    thief.start()
    ended = run(Job(run_dir, True, faults="save.after_shards:rank=0:step=4:sleep=2"))
    assert [rank.exit_code for rank in ended] == [69, 69], ended[0].said
    assert "was taken over by host node7, process 4711" in ended[0].said
    assert max(checkpoint.step_folders(run_dir)) == 2


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("save.after_shard:rank=1:step=4:oserror", r"cannot be written on rank 1: .*No space left"),
        ("save.after_shards:rank=0:step=4:raise", r"cannot be written on rank 0: RuntimeError: planted"),
        ("save.after_shards:rank=1:step=4:memory", r"cannot be written on rank 1: MemoryError"),
        ("save.before_rename:step=4:oserror", r"cannot be published on rank 0: .*No space left"),
    ],
)
def test_a_failure_of_one_rank_ends_all_with_74_and_costs_no_checkpoint(
    tmp_path: Path, fault: str, told: str, asynchronous: bool
) -> None:
    run_dir = tmp_path / "run"
    failed = run(Job(run_dir, asynchronous, faults=fault, step_s=0.02))
    assert [ended.exit_code for ended in failed] == [74, 74], failed[0].said + failed[1].said
    for ended in failed:
        assert "StorageError: the checkpoint of step 4" in ended.said
        assert re.search(told, ended.said), ended.said
    assert names(run_dir) == {"step-00000002"}, "what was there stays, what was begun is gone"
    assert [ended.exit_code for ended in run(Job(run_dir))] == [0, 0]
    check_end(run_dir)


def test_a_disk_that_refuses_bytes_is_told_with_its_own_words(tmp_path: Path) -> None:
    failed = run(Job(tmp_path / "run", largest_file={1: 100_000}))
    assert [ended.exit_code for ended in failed] == [74, 74], failed[0].said
    assert all("cannot be written on rank 1: OSError: [Errno 27] File too large" in ended.said for ended in failed)
    assert names(tmp_path / "run") == set()


def test_what_will_not_fit_is_told_before_the_first_step(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert [ended.exit_code for ended in run(Job(run_dir))] == [0, 0]
    before = names(run_dir)
    failed = run(Job(run_dir, claims_bytes=2**60))
    assert [ended.exit_code for ended in failed] == [74, 74], failed[0].said
    for ended in failed:
        assert "a checkpoint needs 2,168,958,484.48 GiB" in ended.said and "GiB are free" in ended.said
    assert names(run_dir) == before


def test_training_goes_on_while_a_slow_rank_writes(tmp_path: Path) -> None:
    """And a checkpoint that is still on its way is waited for before the next one, so that one is there at most."""
    slow = "save.after_shard:rank=1:sleep=0.15"  # two files: 0.3 s
    ended = run(Job(tmp_path / "run", faults=slow, step_s=0.2, keep=10))
    assert [rank.exit_code for rank in ended] == [0, 0], ended[0].said
    # The one of step 4 is waited for by the last one, which is itself waited for.
    assert ended[0].published_at == ended[1].published_at == {2: 4, 6: 6}
    waited = run(Job(tmp_path / "waits", False, faults=slow, step_s=0.2, keep=10))
    assert waited[0].published_at == {2: 2, 4: 4, 6: 6}
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if entry["kind"] == "checkpoint"] == [2, 4, 6]
    check_end(tmp_path / "run")


def test_a_rank_that_hangs_in_writing_does_not_stop_the_others_for_ever(tmp_path: Path) -> None:
    """Killed at last (by a watchdog, a launcher), it takes the others along, and nothing is lost."""
    ended = run(
        Job(tmp_path / "run", faults="save.after_shard:rank=1:step=4:sleep=3,save.after_shards:rank=1:step=4:exit=9")
    )
    assert ended[1].exit_code == 9 and ended[0].exit_code not in (0, -9), ended[0].said
    assert names(tmp_path / "run") >= {"step-00000002"}
    assert [rank.exit_code for rank in run(Job(tmp_path / "run"))] == [0, 0]
    check_end(tmp_path / "run")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "swapped", "of another step", "missing", "no manifest"])
def test_ranks_agree_on_what_is_damaged_and_take_the_one_before(tmp_path: Path, damage: str) -> None:
    run_dir = tmp_path / "run"
    assert [ended.exit_code for ended in run(Job(run_dir, keep=3))] == [0, 0]
    newest, before = (checkpoint.step_folders(run_dir)[step] for step in (6, 4))
    shard, other = (newest / "shards" / f"rank_{rank}_model.pt" for rank in (1, 0))
    match damage:
        case "truncated":
            shard.write_bytes(shard.read_bytes()[:-1])
        case "flipped":
            content = bytearray(shard.read_bytes())
            content[len(content) // 2] ^= 1
            shard.write_bytes(content)
        case "swapped":
            ours, theirs = shard.read_bytes(), other.read_bytes()
            shard.write_bytes(theirs)
            other.write_bytes(ours)
        case "of another step":
            shard.write_bytes((before / "shards" / shard.name).read_bytes())
        case "missing":
            shard.unlink()
        case "no manifest":
            (newest / "manifest.json").unlink()
    (checkpoint.checkpoints_dir(run_dir) / "step-00000099").mkdir()  # a folder with nothing in it
    again = run(Job(run_dir, keep=3))
    assert [ended.exit_code for ended in again] == [0, 0], again[0].said
    assert "step-00000099 is not used: " in again[0].said and f"{newest.name} is not used: " in again[0].said
    assert "resumed from step 4" in again[0].said and "is not used" not in again[1].said
    check_end(run_dir)


def test_a_file_that_one_rank_sees_late_is_waited_for_and_one_that_none_sees_is_not(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert [ended.exit_code for ended in run(Job(run_dir))] == [0, 0]
    late = run(Job(run_dir, sees_late={1: 1.0}))
    assert [ended.exit_code for ended in late] == [0, 0], late[0].said
    assert "resumed from step 6" in late[0].said
    (checkpoint.step_folders(run_dir)[6] / "shards" / "rank_0_model.pt").unlink()
    started = time.monotonic()
    assert "rank_0_model.pt is missing" in run(Job(run_dir))[0].said
    assert time.monotonic() - started < 20, "of LATE_S seconds none was waited"
