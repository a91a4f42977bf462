"""Points between the pre-trained and the tuned weights, from the files of any model folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sft_dist.config import ModelConfig
from sft_dist.errors import ConfigError
from sft_dist.model import loading
from sft_dist.model.interpolation import Pretrained, between, interpolated
from tests.helpers.bare import CHATML_TOKENS, build_bare_model
from tests.helpers.models import build_model

numbers = st.floats(-1e3, 1e3, width=32)


@given(pairs=st.lists(st.tuples(numbers, numbers), min_size=1, max_size=8), share=st.floats(0, 1))
def test_a_point_is_the_weighted_mean_of_its_ends(pairs: list[tuple[float, float]], share: float) -> None:
    start, end = (torch.tensor(column, dtype=torch.float32) for column in zip(*pairs, strict=True))
    exact = np.float64(start) + share * (np.float64(end) - np.float64(start))
    allowed = 4 * 2.0**-24 * (np.abs(np.float64(start)) + np.abs(np.float64(end))) + 1e-37
    assert (np.abs(np.float64(between(start, end, share)) - exact) <= allowed).all()


@given(pairs=st.lists(st.tuples(numbers, numbers), min_size=1, max_size=8))
def test_the_ends_are_the_very_bits(pairs: list[tuple[float, float]]) -> None:
    start, end = (torch.tensor([*column, -0.0], dtype=torch.float32) for column in zip(*pairs, strict=True))
    assert between(start, end, 0.0).numpy().tobytes() == start.numpy().tobytes()
    assert between(start, end, 1.0).numpy().tobytes() == end.numpy().tobytes()


def test_16_bit_ends_are_combined_in_32() -> None:
    start, end = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0 + 2.0**-12])
    assert between(start, end, 0.5).item() == 1.0 + 2.0**-13


def rename(folder: Path, prefix: str) -> None:
    """As files of a base model are: without what its class puts before the names."""
    values = load_file(folder / "model.safetensors")
    save_file({n.removeprefix(prefix): v for n, v in values.items()}, folder / "renamed", {"format": "pt"})
    (folder / "renamed").rename(folder / "model.safetensors")


def cut_in_two(folder: Path) -> None:
    values = load_file(folder / "model.safetensors")
    names = sorted(values)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: values[name] for name in own}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, own in parts.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("layout", ["as saved", "cut in two", "without prefix"])
def test_parameters_are_those_that_transformers_loads(
    tmp_path: Path, family: str, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = build_model(tmp_path / "model", family)
    if layout == "cut in two":
        cut_in_two(folder)
    if layout == "without prefix":
        rename(folder, "transformer." if family == "gpt2" else "model.")
    expected = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    pretrained = Pretrained(ModelConfig(path=str(folder)), seed=0)
    for name, value in expected.items():
        assert torch.equal(pretrained[name], value), name
    assert "loaded whole" not in capsys.readouterr().err
    tuned = {name: value + 1 for name, value in expected.items()}
    for name, value in interpolated(pretrained, iter(tuned.items()), 0.5):
        torch.testing.assert_close(value, expected[name] + 0.5)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_rows_of_added_tokens_are_the_mean_where_they_started(tmp_path: Path, family: str) -> None:
    folder = build_bare_model(tmp_path / "model", family, spare_rows=1)
    section = ModelConfig(path=str(folder), control_tokens=CHATML_TOKENS)
    config = loading.load_config(section, 2)
    added = loading.new_tokens(section)
    assert added is not None
    model = loading.load_causal_lm(section, config, added=added, dtype=torch.float32, max_length=2, seed=0)
    pretrained = Pretrained(section, seed=0)
    old = load_file(folder / "model.safetensors")
    grown = 0
    for name, value in model.named_parameters():
        assert torch.equal(pretrained[name], value.detach()), name
        grown += name in old and len(old[name]) < len(value)
    assert grown == (1 if model.config.tie_word_embeddings else 2)


def test_what_files_do_not_hold_is_what_training_started_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = build_model(tmp_path / "model", "qwen2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4, "layer_types": None}))
    section = ModelConfig(path=str(folder), allow_new_parameters=("model.layers.3.*",))
    model = loading.load_causal_lm(
        section, loading.load_config(section, 2), added=None, dtype=torch.float32, max_length=2, seed=7
    )
    pretrained = Pretrained(section, seed=7)
    for name, value in model.named_parameters():
        assert torch.equal(pretrained[name], value.detach()), name
    assert capsys.readouterr().err.count("it is loaded whole") == 1
    with pytest.raises(ConfigError, match="has no parameter lm_tail"):
        pretrained["lm_tail"]


def test_a_folder_without_safetensors_is_told(tmp_path: Path) -> None:
    folder = build_model(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"has no model\.safetensors and no"):
        Pretrained(ModelConfig(path=str(folder)), seed=0)
