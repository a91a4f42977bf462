"""What is bolder than usual is said once, with the key, its value and what is usual; what is usual is not."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.config import RunConfig
from sft_dist.train.advice import Facts, highest_usual_rate, warnings

USUAL = Facts(num_parameters=8_000_000_000, num_conversations=50_000, num_passes=2.0)


def config(**sections: Any) -> RunConfig:
    tree: dict[str, Any] = {"run_dir": "r", "model": {"path": "m"}, "data": {"heldout": "h.jsonl"}}
    return RunConfig.model_validate(tree | sections)


def test_the_defaults_are_usual_for_every_size() -> None:
    for num_parameters in (10**7, 135 * 10**6, 10**9, 8 * 10**9, 70 * 10**9, 10**12):
        assert warnings(config(), Facts(num_parameters, 100, 1.0)) == []


def test_adapters_want_higher_rates_and_have_another_default() -> None:
    assert warnings(config(adapter={"kind": "lora"}), USUAL) == []


@pytest.mark.parametrize(
    ("sections", "key", "value"),
    [
        ({"optimizer": {"learning_rate": 1e-4}}, "optimizer.learning_rate", "0.0001"),
        ({"optimizer": {"weight_decay": 0.5}}, "optimizer.weight_decay", "0.5"),
        ({"optimizer": {"max_grad_norm": 0}}, "optimizer.max_grad_norm", "0"),
        ({"schedule": {"warmup_fraction": 0}}, "schedule.warmup_fraction", "0"),
        ({"data": {}}, "data.heldout", "empty"),
    ],
)
def test_each_bold_key_gives_one_line(sections: dict[str, Any], key: str, value: str) -> None:
    (line,) = warnings(config(**sections), USUAL)
    assert line.startswith(f"warning: {key}: {value}") and "\n" not in line
    assert "usual" in line or "published" in line


@given(passes=st.floats(0.1, 50), num=st.integers(1, 10**6))
def test_many_passes_count_over_few_conversations_only(passes: float, num: int) -> None:
    said = warnings(config(), Facts(USUAL.num_parameters, num, passes))
    assert bool(said) == (passes > 3 and num < 10_000)
    assert all(line.startswith("warning: schedule.epochs: ") and f"{num:,} conversations" in line for line in said)


@given(size=st.integers(10**6, 10**12), share=st.floats(0.01, 100))
def test_a_rate_is_judged_by_the_recipes_of_the_models_size(size: int, share: float) -> None:
    highest = highest_usual_rate(size)
    assert highest_usual_rate(size * 2) <= highest, "larger models take smaller rates"
    said = warnings(config(optimizer={"learning_rate": share * highest}), Facts(size, 50_000, 1.0))
    assert bool(said) == (share * highest > 2 * highest)


@pytest.mark.parametrize(
    ("num_parameters", "rate"),
    [(135e6, 1e-3), (360e6, 1e-3), (1.7e9, 3e-4), (3e9, 2e-5), (7e9, 2e-5), (8e9, 5e-6), (70e9, 2e-6), (70e9, 2e-5)],
)
def test_no_published_recipe_is_warned_of(num_parameters: float, rate: float) -> None:
    assert warnings(config(optimizer={"learning_rate": rate}), Facts(int(num_parameters), 10**6, 5.0)) == []
