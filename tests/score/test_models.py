"""The identity of a model is the content of its files."""

import shutil
from pathlib import Path

from sft_dist.config import ModelConfig, RunConfig
from sft_dist.score.models import Scorer, identity
from tests.helpers.models import build_model
from tests.helpers.plain_engine import world_of_one


def test_the_identity_of_a_model_follows_its_content_and_not_its_place(tmp_path: Path) -> None:
    folder = build_model(tmp_path / "model", "llama")
    copied = Path(shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile))
    other = build_model(tmp_path / "other", "llama", seed=1)

    def of(path: Path) -> str:
        config = RunConfig(run_dir="r", model=ModelConfig(path=str(path)))
        return identity(Scorer(str(path), config, None), world)

    with world_of_one() as world:
        assert of(folder) == of(copied) != of(other)
        weights = copied / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(bytes(content))
        assert of(copied) != of(folder)
