"""What preparation reads of a model: config.json, for the cost of packs."""

import json
from pathlib import Path

import pytest

from sft_dist.config import ModelConfig
from sft_dist.data.cost import BY_TOKENS, cost_of_model
from sft_dist.errors import ConfigError
from sft_dist.preparation import cost_model

SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 9}


def test_costs_follow_from_config_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    assert cost_model(ModelConfig(path=str(tmp_path)), is_main=True) == cost_of_model(SIZES) != BY_TOKENS
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "there is none"),
        ({}, "hidden_size is missing"),
        (SIZES | {"layer_types": ["mamba", "mamba"]}, "mamba is not understood"),
    ],
)
def test_a_model_that_is_not_understood_counts_by_tokens_and_rank_0_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: dict[str, object] | None, reason: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps(content))
    assert cost_model(ModelConfig(path=str(tmp_path)), is_main=True) is BY_TOKENS
    said = capsys.readouterr().err
    assert reason in said and "config.json" in said and said.count("\n") == 1
    assert cost_model(ModelConfig(path=str(tmp_path)), is_main=False) is BY_TOKENS
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff"])
def test_a_damaged_config_json_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"model\.path: .*config\.json"):
        cost_model(ModelConfig(path=str(tmp_path)), is_main=True)
