"""The identity of a model is the content of its files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sft_dist.config import ModelConfig, RunConfig
from sft_dist.score.models import Scorer, identity
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
