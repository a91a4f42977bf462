"""Files that would run code, lead elsewhere or tell secrets, and a run that hangs: by the real loaders and verbs."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from sft_dist.config import ModelConfig
from sft_dist.data.sample import Sample, Span
from sft_dist.data.selection import Example
from sft_dist.data.store import PreparedDataset
from sft_dist.data.tokenizer import load_tokenizer
from sft_dist.errors import UserError
from sft_dist.model import loading, zero
from sft_dist.model.batch import collate
from sft_dist.model.engine import Engine
from sft_dist.paths import fault_of_name
from sft_dist.score.output import GrowingOutput
from sft_dist.train import checkpoint, retention
from tests.end_to_end.conftest import Place
from tests.helpers.plain_engine import PlainEngine

pytestmark = pytest.mark.slow
SECRETS = {
    "HF_TOKEN": "hf_planted0123456789abc",
    "WANDB_API_KEY": "planted-wandb-9876543210",
    "PG_PASSWORD": "s3cr3t-planted",
}


class Bomb:
    """What unpickles this makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module")
def stopped(place: Place) -> Place:
    """A run `guarded` of one rank with a checkpoint of step 1, and secrets in its environment and its run file."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        secret = f"data.template_kwargs={{note: {SECRETS['PG_PASSWORD']}}}"
        done = place.train("guarded", secret, "checkpoint.stop_at_step=1", "evaluate.every=0", ranks=1)
    assert done[0].returncode == 75, done[0].stdout
    (place.folder / "guarded.said").write_text(done[0].stdout)
    return place


def shards(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints" / "step-00000001" / "shards").glob("*.pt"))


def copy_of(place: Place, name: str) -> Path:
    copied = place.folder / name
    shutil.copytree(place.folder / "guarded", copied)
    return copied


def mend_manifest(run_dir: Path, shard: Path) -> None:
    """Whoever can plant a shard can write its checksum too."""
    folder = shard.parent.parent
    manifest = json.loads((folder / "manifest.json").read_text())
    content = shard.read_bytes()
    name = f"shards/{shard.name}"
    manifest["files"][name] |= {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    seal(folder, manifest)


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / "manifest.json").write_text(json.dumps(checkpoint.sealed(manifest)))


@pytest.mark.parametrize("kind", ["optim_states", "model_states"])
def test_a_pickle_in_a_shard_does_not_run_when_a_run_resumes(
    stopped: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)  # masked in the manifest: the same as before all the same
    run_dir = copy_of(stopped, f"bomb-{kind}")
    (shard,) = [path for path in shards(run_dir) if kind in path.name]
    torch.save(Bomb(tmp_path / "marker"), shard)
    mend_manifest(run_dir, shard)
    options = [f"data.template_kwargs={{note: {SECRETS['PG_PASSWORD']}}}", "evaluate.every=0"]
    done = stopped.train(run_dir.name, *options, ranks=1)
    assert done[0].returncode == 74 and "not a readable checkpoint shard" in done[0].stdout, done[0].stdout
    assert not (tmp_path / "marker").exists()
    torch.load(shard, weights_only=False)  # it is a bomb
    assert (tmp_path / "marker").exists()


def test_a_pickle_in_any_other_file_does_not_run(stopped: Place, tmp_path: Path) -> None:
    """Weights, tokenizer, prepared data, journal of scores: refused with a message for people, each."""
    marker = tmp_path / "marker"
    bomb = pickle.dumps(Bomb(marker))

    def weights() -> None:
        folder = shutil.copytree(stopped.folder / "model", tmp_path / "weights")
        for file in folder.glob("*.safetensors"):
            file.unlink()
        torch.save({"transformer.wte.weight": Bomb(marker)}, folder / "pytorch_model.bin")
        for trust in (False, True):
            model = ModelConfig(path=str(folder), trust_remote_code=trust)
            config = loading.load_config(model, 8)
            with pytest.raises(UserError, match="the weights cannot be loaded"):
                loading.load_causal_lm(model, config, added=None, dtype=torch.float32, max_length=8, seed=0)

    def tokenizer() -> None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            folder = shutil.copytree(stopped.folder / "model", tmp_path / name)
            (folder / name).write_bytes(bomb)
            with pytest.raises(UserError, match="tokenizer"):
                load_tokenizer(ModelConfig(path=str(folder)))

    def prepared_data() -> None:
        source = next(path.parent for path in (stopped.folder / "prepared").glob("*/manifest.json"))
        folder = shutil.copytree(source, tmp_path / "prepared")
        for shard in folder.glob("*.arrow"):
            shard.write_bytes(bomb.ljust(shard.stat().st_size, b"\0"))
        with pytest.raises(UserError, match="arrow"):
            len(PreparedDataset(folder)[0].ids)

    def journal() -> None:
        Path(f"{tmp_path}/out.journal").write_bytes(bomb)
        with pytest.raises(UserError, match="not readable"):
            GrowingOutput(tmp_path / "out", {}, 1)

    for kind in (weights, tokenizer, prepared_data, journal):
        kind()
        assert not marker.exists(), kind.__name__


def test_a_shard_reader_makes_tensors_and_nothing_else(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "b": Bomb(tmp_path / "marker")}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="not a readable checkpoint shard"):
        zero.safe_load(tmp_path / "x.pt")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "name", ["../../secret", "/etc/passwd", "shards/../../x", "", "a\\..\\b", "link/x", "link", 3, "a\0"]
)
def test_names_that_lead_out_of_a_folder_are_refused(tmp_path: Path, name: object) -> None:
    (tmp_path / "link").symlink_to("/etc")
    assert fault_of_name(tmp_path, name) is not None
    assert fault_of_name(tmp_path, "shards/zero_pp_rank_0.pt") is None


def test_a_checkpoint_that_names_files_elsewhere_is_not_read(stopped: Place, tmp_path: Path) -> None:
    run_dir = copy_of(stopped, "elsewhere")
    folder = run_dir / "checkpoints" / "step-00000001"
    manifest = json.loads((folder / "manifest.json").read_text())
    outside = tmp_path / "outside"
    outside.write_text("x")
    fact = {"num_bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    for name in (str(outside), os.path.relpath(outside, folder)):
        seal(folder, manifest | {"files": manifest["files"] | {name: fact}})
        fault = checkpoint.fault_of(folder, None)
        assert fault is not None and "leads out of the folder" in fault
    seal(folder, manifest)
    shard = shards(run_dir)[0]
    shard.rename(tmp_path / "moved")
    shard.symlink_to(tmp_path / "moved")
    fault = checkpoint.fault_of(folder, None)
    assert fault is not None and "is a symbolic link" in fault


def test_nothing_behind_a_symbolic_link_is_deleted(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "manifest.json").write_text("{}")
    run_dir = tmp_path / "run"
    checkpoint.checkpoints_dir(run_dir).mkdir(parents=True)
    for step in (1, 2, 3):
        folder = checkpoint.checkpoints_dir(run_dir) / f"step-{step:08d}"
        folder.mkdir()
        (folder / "shards").symlink_to(mine)
    (checkpoint.checkpoints_dir(run_dir) / "step-00000000").symlink_to(mine)
    (checkpoint.checkpoints_dir(run_dir) / ".tmp-step-00000004").symlink_to(mine)
    retention.sweep_temporaries(run_dir)
    assert [removal.step for removal in retention.evict(run_dir, published=3, keep=1)] == [1, 2]
    assert checkpoint.step_folders(run_dir).keys() == {3}
    assert (mine / "manifest.json").exists()


def test_no_secret_is_in_any_file_of_a_run_or_in_what_it_says(stopped: Place) -> None:
    files = [path for path in (stopped.folder / "guarded").rglob("*") if path.is_file()]
    assert len(files) > 6 and {"config.json", "manifest.json", "outcome.json"} <= {path.name for path in files}
    for path in [*files, stopped.folder / "guarded.said"]:
        content = path.read_bytes()
        assert not [name for name, secret in SECRETS.items() if secret.encode() in content], path


def test_no_secret_is_in_an_error(stopped: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    token = SECRETS["HF_TOKEN"]
    for wrong in (f"model.path=https://me:{token}@host/model", f"model.path={token}/x", f"model.pat={token}"):
        done = stopped.verb("train", str(stopped.run_file), f"run_dir={stopped.folder / 'wrong'}", wrong)
        assert done.returncode == 78 and token not in done.stdout + done.stderr, done.stderr
        assert ("[redacted]" in done.stderr) == wrong.startswith("model.path")
    assert token not in (stopped.folder / "wrong" / "outcome.json").read_text()
    # A secret that was masked is missed, not taken for a value.
    done = stopped.verb("export", str(stopped.folder / "guarded"), "--output", str(stopped.folder / "out"))
    assert done.returncode == 78 and "holds a secret that was masked" in done.stderr


def test_code_that_comes_with_a_model_is_refused_aloud_and_recorded_where_it_runs(stopped: Place) -> None:
    folder = shutil.copytree(stopped.folder / "model", stopped.folder / "with-code")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.OwnConfig"}
    config["model_type"] = "own"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(folder / 'ran')!r})\n")
    done = stopped.verb("train", str(stopped.run_file), f"run_dir={stopped.folder / 'code'}", f"model.path={folder}")
    assert done.returncode == 78 and "model.trust_remote_code: true" in done.stderr, done.stderr
    assert not (folder / "ran").exists()
    manifest = stopped.folder / "guarded" / "checkpoints" / "step-00000001" / "manifest.json"
    assert json.loads(manifest.read_text())["trust_remote_code"] is False


def test_a_lock_of_a_killed_build_of_extensions_holds_nothing_up(
    stopped: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed would wait for it for ever: no run builds any. And no run writes there."""
    extensions = stopped.folder / "extensions"
    for place in (extensions, extensions / "py311_cpu"):
        (place / "deepspeed_shm_comm").mkdir(parents=True)
        (place / "deepspeed_shm_comm" / "lock").touch()
    before = sorted(extensions.rglob("*"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
    done = stopped.train("locked", "checkpoint.stop_at_step=1", "evaluate.every=0", ranks=1)
    assert done[0].returncode == 75, done[0].stdout
    assert sorted(extensions.rglob("*")) == before


@pytest.mark.parametrize(
    ("fault", "codes", "of_rank_0", "of_rank_1"),
    [
        ("step.begin:rank=1:step=3:SIGSTOP", [70, -9], "accumulate_gradient", None),
        ("feed.before_collate:rank=1:step=3:hang", [70, 70], "accumulate_gradient", "feeding.py"),
        ("save.after_shard:rank=1:step=2:hang", [70, 70], "saver.py", "_write"),
    ],
    ids=["stopped", "hangs while it feeds", "hangs while it writes a checkpoint in the background"],
)
def test_a_training_that_hangs_names_the_rank_and_leaves(
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    fault: str,
    codes: list[int],
    of_rank_0: str,
    of_rank_1: str | None,
) -> None:
    monkeypatch.setenv("SFT_DIST_FAULTS", fault)
    run = f"hangs {request.node.callspec.id}"
    done = place.train(run, "watchdog.timeout_s=10", "evaluate.every=0", "checkpoint.every=2")
    assert [process.returncode for process in done] == codes, done[0].stdout + done[1].stdout
    outcome = place.outcome(run)
    assert outcome["exit_code"] == 70 and "stuck:\n  rank 1 (host" in outcome["reason"], outcome
    assert of_rank_0 in done[0].stdout, "its stacks"
    assert of_rank_1 is None or of_rank_1 in done[1].stdout


@pytest.mark.parametrize(("signal", "codes"), [("SIGKILL", [-9, 69]), ("SIGSTOP", [-9, 70])])
def test_what_befalls_rank_0_is_written_by_another_rank(
    place: Place, monkeypatch: pytest.MonkeyPatch, signal: str, codes: list[int]
) -> None:
    """Rank 0 holds the run folder, and whoever writes for it knows that."""
    monkeypatch.setenv("SFT_DIST_FAULTS", f"step.begin:rank=0:step=3:{signal}")
    done = place.train(
        f"rank 0 {signal}",
        "watchdog.timeout_s=10",
        "evaluate.every=0",
        "checkpoint.every=2",
        "checkpoint.asynchronous=false",
    )
    assert [process.returncode for process in done] == codes, done[0].stdout + done[1].stdout
    outcome = place.outcome(f"rank 0 {signal}")
    assert outcome["exit_code"] == codes[1] and outcome["checkpoint"].endswith("step-00000002"), outcome
    assert "taken over" not in done[1].stdout


def test_every_forward_is_progress(stopped: Place) -> None:
    """On one rank a whole evaluation may enter no collective, and takes as long as it takes."""
    engine, forwards = PlainEngine(stopped.folder / "model"), []
    Engine.on_forward(cast(Engine, engine), lambda: forwards.append(None))
    span = Span(0, "text", 0, 0, 5, 5, is_owned=True, turn=1)
    sample = Sample("t", 1, "book", np.arange(5, dtype=np.int32), (span,), num_turns=1)
    batch = collate([Example(sample, np.array([-1, 0, 0, 0, 0], np.int32), np.ones(5, np.float32))])
    for _ in range(3):
        engine.logprobs(batch)
    assert len(forwards) == 3
