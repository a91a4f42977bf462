"""Parameters that the pre-trained files lack: they start from the seed of the run file, on any number of ranks."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sft_dist.config import ModelConfig
from sft_dist.errors import ConfigError
from sft_dist.model import loading
from tests.helpers.conversations import make_records, write_jsonl
from tests.helpers.models import build_model
from tests.helpers.worlds import run_world

NEW = "model.layers.3.*"


def build_deeper(folder: Path) -> Path:
    """A model whose configuration has a layer more than its files."""
    build_model(folder, "qwen2")
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": 4, "layer_types": None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
def test_new_parameters_follow_from_the_seed_and_from_nothing_else(tmp_path: Path) -> None:
    folder = build_deeper(tmp_path / "model")
    files = AutoModelForCausalLM.from_pretrained(build_model(tmp_path / "plain", "qwen2")).state_dict()
    common = {
        "case": "parameters",
        "model": str(folder),
        "data": str(write_jsonl(tmp_path / "train.jsonl", make_records(2))),
        "allow_new_parameters": [NEW],
        "global_packs": 1,
    }
    # The third case starts from the random state that the others left behind.
    seeds = (3, 4, 3)
    starts = {
        size: [
            answer["parameters"]
            for answer in run_world(size, [common | {"seed": s} for s in seeds], tmp_path / str(size))
        ]
        for size in (1, 2)
    }
    first = starts[1][0]
    new = [name for name in first if name.startswith("model.layers.3.")]
    drawn = [name for name in new if name.endswith("proj.weight")]
    assert len(drawn) == 7 and first.keys() - new == files.keys()
    for size, (three, four, again) in starts.items():
        assert all(torch.equal(three[name], first[name]) for name in first), size
        assert all(torch.equal(again[name], first[name]) for name in first), size
        assert all(torch.equal(three[name], files[name]) for name in files), size
        assert not any(torch.equal(three[name], four[name]) for name in drawn), size
    assert torch.stack([first[name].std() for name in drawn]).min() > 0.1, "drawn, not zero"


@pytest.mark.slow
def test_new_parameters_have_no_value_to_stay_at_and_all_others_have(tmp_path: Path) -> None:
    """The pull of step 2 is the first one; what the gradient there does is the same with and without it."""
    common = {
        "case": "train",
        "model": str(build_deeper(tmp_path / "model")),
        "data": str(write_jsonl(tmp_path / "train.jsonl", make_records(24))),
        "allow_new_parameters": ["*"],
        "steps": [0, 2],
    }
    free, pulled, compared = run_world(
        2,
        [common, common | {"anchor": {"decay": 30.0}}, common | {"anchor": {"kl": 1.0}}],
        tmp_path / "world",
        module="tests.helpers.resume_cases",
    )
    for name, weights in free["state"]["master"].items():
        is_new = name.startswith("model.layers.3.")
        assert torch.equal(weights, pulled["state"]["master"][name]) == is_new, name
    assert compared["losses"][0] == pytest.approx(free["losses"][0], abs=1e-5), "the frozen copy starts alike"
    assert compared["losses"][1] != free["losses"][1]


def test_without_a_seed_new_parameters_are_refused_also_where_they_are_allowed(tmp_path: Path) -> None:
    config = ModelConfig(path=str(build_deeper(tmp_path / "model")), allow_new_parameters=(NEW,))
    base = loading.load_config(config, max_length=2)
    with pytest.raises(ConfigError, match=r"would be random: model\.layers\.3"):
        loading.load_causal_lm(config, base, added=None, dtype=torch.float32, max_length=2, seed=None)
