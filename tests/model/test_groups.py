"""What is trained and at which rate, by names and depths of plain models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sft_dist.config import OptimizerConfig
from sft_dist.errors import ConfigError
from sft_dist.model.groups import freeze, parameter_groups
from sft_dist.model.layers import decoder_layers
from sft_dist.model.places import places_of
from tests.helpers.models import FAMILIES, build_model


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(build_model(tmp_path / "model", request.param))


def trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_patterns_freeze_what_they_match_and_say_how_much(model: Any) -> None:
    every = trained(model)
    said = freeze(model, ["*.1.*", "*.0.mlp.*"])
    frozen = {name for name in every if ".1." in name or ".0.mlp." in name}
    assert trained(model) == every - frozen
    numel = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert said is not None and f"{len(frozen)} of {len(every)} parameters" in said
    assert f"{sum(numel[name] for name in frozen):,} of {sum(numel.values()):,} weights" in said


def test_nothing_is_frozen_without_patterns(model: Any) -> None:
    every = trained(model)
    assert freeze(model, []) is None and trained(model) == every


def test_a_tied_head_is_frozen_by_either_name_and_said(tmp_path: Path) -> None:
    for pattern in ("lm_head*", "*embed_tokens*"):
        tied = AutoModelForCausalLM.from_pretrained(build_model(tmp_path / "llama", "llama"))
        said = freeze(tied, [pattern])
        assert not tied.lm_head.weight.requires_grad and "embed_tokens.weight = lm_head.weight" in str(said)
        untied = AutoModelForCausalLM.from_pretrained(build_model(tmp_path / "qwen2", "qwen2"))
        said = freeze(untied, [pattern])
        assert untied.lm_head.weight.requires_grad != (pattern == "lm_head*") and "tied" not in str(said)


def test_a_pattern_without_a_match_and_patterns_that_leave_nothing_are_refused(model: Any) -> None:
    near = next(name for name in trained(model) if ".1." in name and "mlp" in name)
    with pytest.raises(ConfigError, match=r"model\.freeze: \*.*wrong: no parameter has such a name; near it are ") as e:
        freeze(model, ["*.0.*", f"*{near}.wrong"])
    assert near in str(e.value)
    with pytest.raises(ConfigError, match=r"model\.freeze: \*: all \d+ parameters, so nothing is trained"):
        freeze(model, ["*"])
    assert trained(model) == {name for name, _ in model.named_parameters()}, "and nothing is changed"


def test_rates_fall_from_the_head_to_the_embeddings(model: Any) -> None:
    optimizer = OptimizerConfig(weight_decay=0.1, layer_decay=0.5)
    groups = parameter_groups(model, decoder_layers(model), optimizer)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: (group["lr_factor"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found.keys() == set(names.values())
    for name, (factor, decay) in found.items():
        shape = model.get_parameter(name).shape
        layer = next((int(part) for part in name.split(".") if part.isdecimal()), None)
        is_lowest = any(word in name for word in ("embed", "wte", "wpe"))
        assert factor == (0.5 ** (3 - layer) if layer is not None else 0.5**4 if is_lowest else 1.0), name
        assert decay == (0.1 if len(shape) > 1 else 0.0)
    assert len({group["name"] for group in groups}) == len(groups) <= 2 * 5


def test_without_layer_decay_there_are_two_groups_at_the_full_rate(model: Any) -> None:
    groups = parameter_groups(model, decoder_layers(model), OptimizerConfig())
    assert [(group["name"], group["lr_factor"]) for group in groups] == [("matrices", 1.0), ("norms and biases", 1.0)]
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim > 1)
    assert [group["name"] for group in parameter_groups(model, [], OptimizerConfig())] == ["matrices"]


def test_rates_by_layer_need_layers() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.layer_decay: 0\.9: no decoder layers were found in Linear"):
        parameter_groups(torch.nn.Linear(2, 2), [], OptimizerConfig(layer_decay=0.9))


def test_every_parameter_has_a_layer_and_a_kind(model: Any) -> None:
    places = places_of(model, decoder_layers(model))
    words = {
        "embeddings": ("embed", "wte", "wpe"), "norms": ("norm", "ln_"), "attention": ("attn",), "mlp": ("mlp",),
        "head": ("lm_head",),
    }  # fmt: skip
    for name, place in places.items():
        assert any(word in name for word in words[place.kind]), (name, place)
        layer = next((int(part) for part in name.split(".") if part.isdecimal()), None)
        assert place.layer == layer
    assert places.keys() == {name for name, _ in model.named_parameters()}
