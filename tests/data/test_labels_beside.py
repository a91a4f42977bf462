"""Labels beside answers: which sample bears one, what trains what, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist import training
from sft_dist.config import DataConfig, HeadConfig, ModelConfig, RunConfig
from sft_dist.data.plan import Plan
from sft_dist.data.selection import Selection
from sft_dist.errors import ConfigError, DataError
from sft_dist.preparation import training_set, with_labels
from tests.helpers.encoders import build_encoder
from tests.helpers.models import build_model
from tests.helpers.signals import restored_signals

ZOO = Path(__file__).parents[1] / "zoo"
ANSWER = {"role": "assistant", "content": "yes"}
QUESTION = {"role": "user", "content": "is it?"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "llama")


def prepared(
    folder: Path, model: Path, records: list[Any], *, data: dict[str, Any] | None = None, **more: Any
) -> tuple[RunConfig, Selection, Plan]:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    head = {"kind": "single_label", "language_model_weight": 1.0} | more.pop("head", {})
    config = with_labels(
        RunConfig(
            run_dir="unused",
            model=ModelConfig(path=str(model)),
            data=DataConfig(
                train=({"path": str(path)},),
                max_length=128,
                cache_dir=str(folder / "prepared"),
                num_processes=1,
                **(data or {}),
            ),
            head=HeadConfig(**head),
            **more,
        )
    )
    return config, *training_set(config)


def test_every_chat_format_may_have_labels_and_some_records_none(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [
        {"messages": [QUESTION, ANSWER], "label": "b"},
        {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}], "label": "a"},
        {"prompt": "x", "completion": "y", "label": "a"},
        {"instruction": "x", "output": "y", "label": "b"},
        {"messages": [QUESTION], "label": "a"},
        {"messages": [QUESTION, ANSWER]},
        {"text": "nothing but text"},
        {"messages": [QUESTION]},
    ]
    config, selection, plan = prepared(tmp_path, model, records)
    assert config.head.labels == ("a", "b")
    examples = [selection[number] for number in range(len(selection))]
    found = {
        example.sample.index: (
            None if example.target is None else int(example.target[0]),
            bool(example.turns.max() >= 0),
        )
        for example in examples
    }
    both = {0: (1, True), 1: (0, True), 2: (0, True), 3: (1, True)}
    assert found == both | {4: (0, False), 5: (None, True), 6: (None, True)}
    assert selection.left_out.summary().keys() == {"no target"}, "neither a label nor an answer: left out, and counted"
    assert "4 conversations train the language model and the head; 2 without a label" in capsys.readouterr().err
    assert plan.label_denominator(0) == 5 and plan.denominator(0) == sum((e.turns >= 0).sum() for e in examples)


def test_of_several_samples_the_last_bears_the_label_and_a_bad_one_takes_all_out(tmp_path: Path, model: Path) -> None:
    """The template drops earlier reasoning, so each answer has a history, and a sample, of its own."""
    thought = ANSWER | {"reasoning_content": "hm"}
    records = [
        {"messages": [QUESTION, thought, QUESTION, thought, QUESTION, thought], "label": label}
        for label in ("a", "b", "a", 5)
    ]
    data = {"chat_template": str(ZOO / "qwen3.jinja"), "on_bad_record": "refuse", "max_refused": 0.5}
    _, selection, _ = prepared(tmp_path, model, records, data=data)
    assert len(selection.dataset) == 12
    assert selection.indices.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert selection.labelled.tolist() == [2, 5, 8]
    assert selection.label_targets[:, 0].tolist() == [0, 1, 0]
    text = [selection[number].sample for number in (1, 2)]
    assert len(text[1].ids) > len(text[0].ids), "the last one is the whole conversation"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [QUESTION, ANSWER], "label": "c"}, "unknown label"),
        ({"messages": [QUESTION, ANSWER], "label": 2}, "mixed label types"),
        ({"messages": [QUESTION], "label": ["a"]}, "wrong kind of label"),
        ({"messages": [QUESTION, ANSWER], "label": {"a": 1}}, "bad label"),
        ({"text": "x", "label": "a"}, "unsupported field"),
    ],
)
def test_a_label_that_cannot_be_used_ends_the_run_and_names_its_line(
    tmp_path: Path, model: Path, record: dict[str, Any], reason: str
) -> None:
    good = [{"messages": [QUESTION, ANSWER], "label": label} for label in "ab"]
    with pytest.raises(DataError, match=rf"train\.jsonl:3: {reason}"):
        prepared(tmp_path, model, [*good, record], head={"labels": ("a", "b")})


def test_integers_out_of_range_are_named(tmp_path: Path, model: Path) -> None:
    records = [{"messages": [QUESTION, ANSWER], "label": label} for label in (0, 1, 2)]
    with pytest.raises(DataError, match=r"train\.jsonl:3: label out of range: 2"):
        prepared(tmp_path, model, records, head={"labels": ("a", "b")})


def test_data_without_any_label_are_refused(tmp_path: Path, model: Path) -> None:
    with pytest.raises(DataError, match="no conversation that takes part has a `label`"):
        prepared(tmp_path, model, [{"messages": [QUESTION, ANSWER]}], head={"labels": ("a", "b")})


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"head": {"freeze_backbone": True}}, "freeze_backbone"),
        ({"head": {"language_model_weight": 0.0, "weight": 2.0}}, "weight"),
        ({"head": {"kind": "none"}}, "language_model_weight"),
        ({"adapter": {"kind": "lora"}}, "adapter.kind"),
        ({"data": {"overflow": "truncate_turns"}}, "data.overflow"),
    ],
)
def test_what_cannot_stand_beside_is_refused_by_name(
    tmp_path: Path, model: Path, sections: dict[str, Any], key: str
) -> None:
    with pytest.raises(ValueError, match=key):
        prepared(tmp_path, model, [], **sections)


def test_an_encoder_is_refused_before_any_data_are_read(tmp_path: Path) -> None:
    config = RunConfig(
        run_dir=str(tmp_path / "run"),
        model=ModelConfig(path=str(build_encoder(tmp_path / "bert"))),
        data=DataConfig(train=({"path": "nowhere.jsonl"},)),
        head=HeadConfig(kind="single_label", language_model_weight=1.0),
    )
    refusal = pytest.raises(ConfigError, match=r"head\.language_model_weight: .* is an encoder \(bert\)")
    with restored_signals(), refusal:
        training.run(config, {})


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.5, 2.0])), min_size=1, max_size=9))
def test_a_step_has_a_denominator_of_tokens_and_one_of_labels(samples: list[tuple[int, float]]) -> None:
    targets, masses = (np.array(column) for column in zip(*samples, strict=True))
    members = [n for n, (target, mass) in enumerate(samples) if target or mass]
    settings = {"max_length": 8, "global_packs": 100, "seed": 0, "epochs": 1}
    if not members:
        with pytest.raises(ValueError, match="no sample"):
            Plan(np.full(len(samples), 4), targets, label_mass=masses, **settings)
        return
    plan = Plan(np.full(len(samples), 4), targets, label_mass=masses, **settings)
    assert sorted(index for pack in plan.packs(0) for index in pack) == members
    assert plan.label_denominator(0) == masses.sum()
    assert plan.denominator(0) == (targets.sum() or 1.0)
