"""A checkpoint is whole or absent, and what is not as its manifest says is never used."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_dist.errors import ConfigError, StorageError
from sft_dist.model.zero import safe_load
from sft_dist.train import checkpoint, integrity, retention
from sft_dist.train.checkpoint import TrainState


def make(run_dir: Path, step: int) -> Path:
    folder = checkpoint.checkpoints_dir(run_dir) / f"step-{step:08d}"
    (folder / "shards").mkdir(parents=True)
    files: dict[str, Any] = {}
    for rank in range(2):
        content = f"shard of rank {rank} at step {step}".encode()
        (folder / "shards" / f"r{rank}.pt").write_bytes(content)
        files[f"shards/r{rank}.pt"] = {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = {"format": checkpoint.FORMAT, "world_size": 2, "state": asdict(TrainState(step=step)), "files": files}
    seal(folder, manifest)
    return folder


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / "manifest.json").write_text(json.dumps(checkpoint.sealed(manifest)))


def truncate(folder: Path) -> None:
    path = folder / "shards" / "r1.pt"
    path.write_bytes(path.read_bytes()[:-3])


def flip_a_bit(folder: Path) -> None:
    path = folder / "shards" / "r0.pt"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)


def remove_a_shard(folder: Path) -> None:
    (folder / "shards" / "r0.pt").unlink()


def swap_shards(folder: Path) -> None:
    first, second = folder / "shards" / "r0.pt", folder / "shards" / "r1.pt"
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)


def mix_steps(folder: Path) -> None:
    (folder / "shards" / "r0.pt").write_bytes(b"shard of rank 0 at step 1")


def remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def garble_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def strip_manifest(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]
    seal(folder, manifest)


def strip_a_file_of_its_digest(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["shards/r1.pt"]["sha256"]
    seal(folder, manifest)


def flip_a_bit_of_the_state(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    assert '"num_tokens": 0' in text
    (folder / "manifest.json").write_text(text.replace('"num_tokens": 0', '"num_tokens": 1'))


def take_the_name_of_another_step(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    seal(folder, manifest | {"state": manifest["state"] | {"step": 3}})


def flip_a_bit_of_the_format(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    assert '"format": 2' in text
    (folder / "manifest.json").write_text(text.replace('"format": 2', '"format": 3'))


def list_a_file_that_is_not_there(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["shards/r2.pt"] = manifest["files"]["shards/r1.pt"]
    seal(folder, manifest)


FAULTS = [
    truncate,
    list_a_file_that_is_not_there,
    flip_a_bit,
    remove_a_shard,
    swap_shards,
    mix_steps,
    remove_manifest,
    garble_manifest,
    strip_manifest,
    strip_a_file_of_its_digest,
    flip_a_bit_of_the_state,
    flip_a_bit_of_the_format,
    take_the_name_of_another_step,
]


@pytest.mark.parametrize("damage", FAULTS)
def test_damage_is_noticed_and_the_checkpoint_before_is_found(tmp_path: Path, damage: Any) -> None:
    make(tmp_path, 1)
    folder = make(tmp_path, 2)
    assert checkpoint.find(tmp_path, "last").step == 2
    damage(folder)
    assert checkpoint.fault_of(folder, None) is not None
    assert checkpoint.find(tmp_path, "last").step == 1
    with pytest.raises(StorageError):
        checkpoint.find(tmp_path, "2")


@pytest.mark.parametrize("name", ["manifest.json", "shards/r0.pt"])
def test_what_cannot_be_read_now_is_not_called_damaged(tmp_path: Path, name: str) -> None:
    """Else a run would go on from an older one, and give up what is newer."""
    make(tmp_path, 1)
    folder = make(tmp_path, 2)
    (folder / name).unlink()
    (folder / name).mkdir()  # reading gives EISDIR, to root as well
    if name != "manifest.json":
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][name]["num_bytes"] = (folder / name).stat().st_size
        seal(folder, manifest)
    with pytest.raises(integrity.Unreadable, match="cannot be read: Is a directory"):
        checkpoint.find(tmp_path, "last")


@contextmanager
def as_nobody() -> Iterator[None]:
    """Within, permissions count: root stands above them."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.mark.parametrize(
    ("what", "mode", "told"),
    [
        ("checkpoints", 0o300, "cannot be listed"),
        ("checkpoints", 0o000, "cannot be listed"),
        ("checkpoints/step-00000002", 0o000, "cannot be read"),
        ("checkpoints/step-00000002/shards", 0o000, "cannot be read"),
        ("checkpoints/step-00000002/shards", 0o111, "cannot be listed"),
    ],
)
def test_a_folder_that_cannot_be_looked_into_is_not_called_empty(what: str, mode: int, told: str) -> None:
    with tempfile.TemporaryDirectory() as made:
        run_dir = Path(made)
        run_dir.chmod(0o755)
        for step in (1, 2):
            make(run_dir, step)
        (run_dir / what).chmod(mode)
        with as_nobody(), pytest.raises(integrity.Unreadable, match=f"{what}.* {told}: Permission denied"):
            checkpoint.find(run_dir, "last")
        (run_dir / what).chmod(0o755)
        assert checkpoint.find(run_dir, "last").step == 2


def test_a_copy_by_another_name_is_a_checkpoint(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    copy = folder.rename(folder.with_name("step-00000001-kept"))
    assert checkpoint.checked(copy, None, print)[0] is not None
    assert checkpoint.step_folders(tmp_path) == {}


def test_only_what_is_known_to_be_of_another_start_is_passed_over(tmp_path: Path) -> None:
    """A run that resumes from a PATH goes on from its own progress; else it would overwrite what it cannot read."""
    folder = make(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    seal(folder, manifest | {"config": {"checkpoint.resume": "runs/a/step"}})
    assert checkpoint.may_be_of(folder, "runs/a/step") and not checkpoint.may_be_of(folder, "runs/b/step")
    garble_manifest(folder)
    assert checkpoint.may_be_of(folder, "runs/b/step")
    remove_manifest(folder)
    assert checkpoint.may_be_of(folder, "runs/b/step")
    (folder / "manifest.json").mkdir()
    with pytest.raises(integrity.Unreadable):
        checkpoint.may_be_of(folder, "runs/b/step")


def test_long_checking_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(integrity, "_SAY_EVERY_S", 0.0)
    make(tmp_path, 1)
    checkpoint.find(tmp_path, "last")
    assert "step-00000001: 50% of" in (said := capsys.readouterr().err) and "step-00000001: 100% of" in said


def test_a_newer_format_is_refused_by_name(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    seal(folder, json.loads((folder / "manifest.json").read_text()) | {"format": 9})
    with pytest.raises(ConfigError, match="format 9"):
        checkpoint.read(folder)


def test_find_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkpoint"):
        checkpoint.find(tmp_path, "last")
    for step in (1, 2, 3):
        make(tmp_path, step)
    assert checkpoint.find(tmp_path, "best-or-last").step == 3
    with pytest.raises(ConfigError, match="best"):
        checkpoint.find(tmp_path, "best")
    checkpoint.mark_best(tmp_path, TrainState(step=3, heldout_nll_best=1.5, heldout_best_step=2))
    assert checkpoint.find(tmp_path, "best").step == 2
    assert checkpoint.find(tmp_path, "best-or-last").step == 2
    assert checkpoint.find(tmp_path, "1").step == 1
    with pytest.raises(ConfigError, match="expected best, last or a step"):
        checkpoint.find(tmp_path, "newest")


def test_a_best_checkpoint_that_is_gone_gives_way_to_the_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 3):
        make(tmp_path, step)
    checkpoint.mark_best(tmp_path, TrainState(step=3, heldout_nll_best=1.5, heldout_best_step=1))
    assert checkpoint.find(tmp_path, "best-or-last").step == 3
    assert "the best checkpoint (step 1) is gone" in capsys.readouterr().err
    with pytest.raises(StorageError, match="step-00000001"):
        checkpoint.find(tmp_path, "best")


def test_eviction_keeps_the_newest_and_the_protected(tmp_path: Path) -> None:
    for step in range(1, 6):
        make(tmp_path, step)
    (checkpoint.checkpoints_dir(tmp_path) / "step-00000001.bak").mkdir()
    removed = retention.evict(tmp_path, published=5, keep=2, protected=[2])
    assert removed == [retention.Removal(1, None), retention.Removal(3, None)]
    assert list(checkpoint.step_folders(tmp_path)) == [2, 4, 5]
    assert (checkpoint.checkpoints_dir(tmp_path) / "step-00000001.bak").exists(), "a user's copy is left alone"


def test_eviction_never_removes_what_was_just_published(tmp_path: Path) -> None:
    for step in (90, 95, 100):
        make(tmp_path, step)
    flip_a_bit(checkpoint.step_folders(tmp_path)[100])
    retention.evict(tmp_path, published=95, keep=1, protected=[])
    assert list(checkpoint.step_folders(tmp_path)) == [95], "what lies beyond is of a continuation given up"


def test_temporaries_of_killed_saves_are_swept(tmp_path: Path) -> None:
    make(tmp_path, 1)
    left = checkpoint.checkpoints_dir(tmp_path) / ".tmp-step-00000002"
    left.mkdir()
    (left / "half").write_text("x")
    retention.sweep_temporaries(tmp_path)
    assert [path.name for path in checkpoint.checkpoints_dir(tmp_path).iterdir()] == ["step-00000001"]


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "5", "{}", '{"step": null}', '{"step": 1e400}', '{"step": "x"}', '{"step": []}']
)
def test_a_damaged_note_of_the_best_checkpoint_is_told(tmp_path: Path, text: str) -> None:
    make(tmp_path, 1)
    (checkpoint.checkpoints_dir(tmp_path) / "best.json").write_text(text)
    for which in ("best", "best-or-last"):
        with pytest.raises(StorageError, match=r"best\.json: not readable .*; ask for the last checkpoint"):
            checkpoint.find(tmp_path, which)
    assert checkpoint.find(tmp_path, "last").step == checkpoint.find(tmp_path, "1").step == 1


@pytest.mark.parametrize(
    ("which", "told"), [("3", "no checkpoint of step 3"), ("²", "expected best"), ("x", "expected")]
)
def test_a_step_that_is_not_there_is_told_with_those_that_are(tmp_path: Path, which: str, told: str) -> None:
    for step in (2, 40):
        make(tmp_path, step)
    (checkpoint.checkpoints_dir(tmp_path) / "step-0000000²").mkdir()
    with pytest.raises(ConfigError, match=told + r".* \(steps there: 2, 40\)"):
        checkpoint.find(tmp_path, which)


class _Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.path,))


def test_a_planted_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    shard, marker = tmp_path / "shard.pt", tmp_path / "marker"
    torch.save({"optimizer_state_dict": _Bomb(str(marker))}, shard)
    with pytest.raises(StorageError):
        safe_load(shard)
    assert not marker.exists()
