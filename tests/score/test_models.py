"""Which model is asked: the content of its files, how it computes, and the checkpoint that rank 0 finds."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sft_dist.config import ModelConfig, RunConfig
from sft_dist.score import models
from sft_dist.score.models import Scorer, identity
from sft_dist.train.checkpoint import FORMAT, MANIFEST, sealed
from tests.helpers.models import build_model
from tests.helpers.plain_engine import world_of_one
from tests.helpers.worlds import run_ranks


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


LOADS = """
import json, os, sys
from sft_dist.config import DataConfig, ModelConfig, RunConfig
from sft_dist.distributed.world import find_world
from sft_dist.model import engine as engines
from sft_dist.session import open_session

def resident_mib():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024

world = find_world(os.environ)
open_session(world)
config = RunConfig(run_dir="r", model=ModelConfig(path=sys.argv[1]), data=DataConfig(max_length=64))
sizes = []
for _ in range(4):
    engine = engines.inference_engine(config, world, None)
    loaded = resident_mib()
    engine.close()
    sizes.append((loaded, resident_mib()))
print("SIZES", json.dumps(sizes), flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_a_model_leaves_the_memory_to_the_next(tmp_path: Path) -> None:
    wide = LlamaConfig(
        vocab_size=8_000,
        hidden_size=512,
        intermediate_size=2_048,
        num_hidden_layers=6,
        num_attention_heads=8,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(wide)
    mib = sum(parameter.numel() for parameter in model.parameters()) * torch.finfo(torch.float32).bits / 8 / 2**20
    model.save_pretrained(tmp_path)
    (done,) = run_ranks(1, ["-c", LOADS, str(tmp_path)])
    assert done.returncode == 0, done.stdout
    sizes = json.loads(done.stdout.split("SIZES ")[1].splitlines()[0])
    assert sizes[-1][0] - sizes[0][0] < mib / 2, (mib, sizes)


def test_precision_and_attention_of_every_model_are_part_of_its_settings() -> None:
    def of(**section: str) -> dict[str, object]:
        tree = {"run_dir": "r", "model": {"path": "m"} | section}
        return models.settings(Scorer("m", RunConfig.model_validate(tree), None))

    assert of() == of() != of(attention="eager")
    assert of(dtype="bfloat16") != of(dtype="float32")


# Each rank sees another newest checkpoint, as where one is published while they look.
AGREES = """
import os, sys
from pathlib import Path
from sft_dist.config import ModelConfig, RunConfig
from sft_dist.distributed import collectives
from sft_dist.distributed.world import find_world
from sft_dist.errors import ClusterError, ConfigError
from sft_dist.score import models
from sft_dist.session import open_session
from sft_dist.train import checkpoint
from sft_dist.training import initial_weights

world = find_world(os.environ)
open_session(world)
run_dir = Path(sys.argv[1]) / str(world.rank)
config = RunConfig(run_dir="r", model=ModelConfig(path="m", init_from=str(run_dir)))
(agreed,) = models.of_main([models.Scorer("run", config, checkpoint.find(run_dir, "last"))])
print("SCORES", agreed.weights.parent.parent.name)
print("STARTS FROM", initial_weights(config).parent.parent.name)
absent = ModelConfig(path="m", init_from="absent" if world.is_main else str(run_dir))
try:
    initial_weights(RunConfig(run_dir="r", model=absent))
except ConfigError as error:
    print("TOLD", error)
collectives.check_same({"data": "d", "models": ["a"]})
try:
    collectives.check_same({"data": f"d{world.rank}", "models": ["a"]})
except ClusterError as error:
    print("DIFFERS", error, flush=True)
collectives.barrier()
os._exit(0)
"""


@pytest.mark.slow
def test_all_ranks_take_what_rank_0_finds_and_tell_where_they_differ(tmp_path: Path) -> None:
    for rank in range(2):
        folder = tmp_path / str(rank) / "checkpoints" / f"step-{rank + 1:08d}"
        folder.mkdir(parents=True)
        manifest = {"format": FORMAT, "state": {"step": rank + 1}, "world_size": 1, "files": {}, "config": {}}
        (folder / MANIFEST).write_text(json.dumps(sealed(manifest)))
    for done in run_ranks(2, ["-c", AGREES, str(tmp_path)], timeout_s=120):
        assert done.returncode == 0, done.stdout
        assert "SCORES 0\n" in done.stdout and "STARTS FROM 0\n" in done.stdout
        assert "TOLD absent" in done.stdout
        assert "DIFFERS rank 1" in done.stdout and "data: 'd0' there, 'd1' here" in done.stdout
        assert "models:" not in done.stdout
