"""What a run forgets: which values may be compared, when it is too much, and how it is told."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.config import RunConfig
from sft_dist.data.sample import Sample, Span
from sft_dist.errors import ConfigError, DataError
from sft_dist.model.fused_head import TokenValues
from sft_dist.preparation import retention_set, say_retention_overlap
from sft_dist.train import forgetting
from sft_dist.train.checkpoint import TrainState
from sft_dist.train.details import Details
from sft_dist.train.forgetting import Retention, SourceNll, source_digests
from tests.helpers.conversations import make_records, write_jsonl
from tests.helpers.models import build_model
from tests.helpers.samples import select

nats = st.one_of(st.none(), st.floats(0, 20))
sources = st.lists(st.tuples(nats, nats), max_size=4).map(
    lambda pairs: tuple(SourceNll(f"s{n}", "c", 9, before, now) for n, (before, now) in enumerate(pairs))
)


@given(known=sources, limit=st.floats(0.001, 5))
def test_too_much_is_any_source_beyond_the_limit_and_the_worst_is_named(
    known: tuple[SourceNll, ...], limit: float
) -> None:
    rises = {i.name: i.now - i.before for i in known if i.now is not None and i.before is not None}
    said = forgetting.excess(known, limit)
    assert (said is not None) == any(rise > limit for rise in rises.values())
    if said is not None:
        worst = max(rises.values())
        assert any(f"source {name} has" in said for name, rise in rises.items() if rise == worst)
    assert forgetting.excess(known, None) is None


def test_a_rise_of_exactly_the_limit_is_allowed() -> None:
    known = (SourceNll("wiki", "c", 9, 1.0, 1.5),)
    assert forgetting.excess(known, 0.5) is None
    assert forgetting.excess(known, np.nextafter(0.5, 0.0)) is not None


@given(known=sources)
def test_a_checkpoint_gives_the_values_back_bit_for_bit(known: tuple[SourceNll, ...]) -> None:
    state = TrainState(step=3, retention=known)
    assert TrainState(**json.loads(json.dumps(asdict(state)))) == state


def test_a_state_of_before_there_was_retention_is_still_read() -> None:
    saved = asdict(TrainState(step=3))
    del saved["retention"]
    assert TrainState(**saved).retention == ()


def samples(digests: str, source: str) -> list[Sample]:
    ids = np.arange(5, dtype=np.int32)
    span = Span(0, "assistant", 0, 1, 5, 5, is_owned=True, turn=1)
    return [Sample(d, n, source, ids, (span,), num_turns=1, digest=d.encode() * 16) for n, d in enumerate(digests)]


def scored(kept: Retention, nll: float) -> Details:
    details = Details(kept.selection.source_names)
    for number in range(len(kept.selection)):
        example = kept.selection[number]
        num = int((example.turns >= 0).sum())
        details.add([example], TokenValues(torch.full((num,), -nll), torch.zeros(num)))
    return details


def test_values_at_step_0_stay_and_other_content_is_not_compared_with_them(tmp_path: Path) -> None:
    kept = Retention(select(tmp_path / "1", samples("ab", "wiki") + samples("cd", "code")))
    known = kept.measured(scored(kept, 2.0), (), is_start=True)
    assert [(i.name, i.num_tokens, i.before, i.now) for i in known] == [("code", 8, 2.0, 2.0), ("wiki", 8, 2.0, 2.0)]
    known = kept.measured(scored(kept, 2.5), known, is_start=False)
    assert [(i.before, i.now, i.change) for i in known] == [(2.0, 2.5, 0.5)] * 2

    changed = Retention(select(tmp_path / "2", samples("ab", "wiki") + samples("cx", "code") + samples("e", "new")))
    assert [i.name for i in changed.comparable(known)] == ["wiki"]
    assert sorted(changed.missing(known)) == ["code", "new"]
    after = {i.name: i for i in changed.measured(scored(changed, 3.0), known, is_start=False)}
    assert {name: i.before for name, i in after.items()} == {"wiki": 2.0, "code": None, "new": None}
    assert after["code"].change is None and after["wiki"].change == 1.0
    started = {i.name: i for i in changed.measured(scored(changed, 9.0), known, is_start=True)}
    assert {name: (i.before, i.now) for name, i in started.items()} == {
        "wiki": (2.0, 2.5),
        "code": (9.0, 9.0),
        "new": (9.0, 9.0),
    }


def test_windows_and_targets_are_content(tmp_path: Path) -> None:
    """The same records in windows of other lengths, or with other targets, have NLLs that cannot be compared."""
    span = Span(0, "text", 0, 1, 40, 40, is_owned=True)
    text = [Sample("t", 0, "wiki", np.arange(40, dtype=np.int32), (span,), num_turns=0, digest=b"t" * 16)]
    marked = [replace(text[0], spans=(replace(span, output_start=10),))]

    def digest(name: str, some: list[Sample], max_length: int) -> str:
        return source_digests(select(tmp_path / name, some, max_length=max_length, overflow="truncate_turns"))["wiki"]

    assert digest("1", text, 30) == digest("2", text, 30)
    assert digest("6", text, 30) != digest("3", text, 25), "two windows each"
    assert digest("4", text, 64) != digest("5", marked, 64), "targets"


def test_people_see_what_was_kept_beside_what_was_learned() -> None:
    known = (SourceNll("wiki", "c", 1234, 3.0, 3.25), SourceNll("code", "c", 9, None, 1.5))
    line = forgetting.evaluation_line(1200, known, task_change=-0.5)
    assert line == "retention  step 1,200  wiki NLL 3.2500 (+0.2500)   code NLL 1.5000 (-)   beside held-out -0.5000"
    rows = forgetting.table(known, task=(2.0, 1.5, 1.25), best_step=80)
    assert [row.split() for row in rows] == [
        ["NLL", "per", "token", "before", "now", "change"],
        ["retention", "wiki", "(1,234", "tokens)", "3.0000", "3.2500", "+0.2500"],
        ["retention", "code", "(9", "tokens)", "-", "1.5000", "-"],
        ["task", "(data.heldout)", "2.0000", "1.5000", "-0.5000", "best", "1.2500", "at", "step", "80"],
    ]
    assert len({len(row) for row in rows[:3]}) == 1, "columns stand below each other"


def test_records_that_are_trained_on_too_are_counted_by_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = select(tmp_path / "train", samples("aabcd", "s"))
    retention = select(tmp_path / "kept", samples("xaad", "wiki") + samples("yz", "code"))
    say_retention_overlap(train, retention)
    said = capsys.readouterr().err
    assert "2 of 3 records of retention source wiki are in the training data" in said and "code" not in said


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"))


def config_of(model: Path, folder: Path, *retention: object, **more: object) -> RunConfig:
    data = {"retention": list(retention), "max_length": 64, "cache_dir": str(folder / "prepared"), "num_processes": 1}
    return RunConfig.model_validate({"run_dir": "r", "model": {"path": str(model)}, "data": data} | more)


def test_every_token_of_a_text_is_scored_whatever_is_trained(model: Path, tmp_path: Path) -> None:
    """Longer ones in windows of data.max_length, also where training drops them."""
    text = "the weather in Paris is fine but please tell a joke " * 20
    path = write_jsonl(tmp_path / "wiki.jsonl", [{"text": text}, {"text": "rain"}])
    config = config_of(model, tmp_path, str(path), objective={"train_on": "marked"})
    selection = retention_set(config)
    assert selection is not None
    lengths = selection.dataset.lengths
    assert lengths.max() > 2 * 64 and selection.lengths.max() == 64
    assert selection.num_targets.sum() == (lengths - 1).sum()


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([], "the file is empty"),
        ([{"messages": [{"role": "user", "content": "only a question"}]}], "no assistant turn"),
        ([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}]}],
         "holds no answer and no text"),
    ],
)  # fmt: skip
def test_a_source_of_which_nothing_can_be_scored_is_named(
    model: Path, tmp_path: Path, records: list[object], said: str
) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", make_records(3, max_turns=1, max_words=3))
    empty = write_jsonl(tmp_path / "other.jsonl", records)
    with pytest.raises(DataError, match=said) as caught:
        retention_set(config_of(model, tmp_path, str(good), str(empty)))
    assert "other" in str(caught.value)


def test_one_name_for_two_sources_and_weights_are_refused(model: Path, tmp_path: Path) -> None:
    good = str(write_jsonl(tmp_path / "good.jsonl", make_records(3)))
    with pytest.raises(DataError, match="its name 'good' is also that of"):
        retention_set(config_of(model, tmp_path, good, {"path": good, "name": "good"}))
    with pytest.raises(ConfigError, match=r"data\.retention: good: repeat 2, weight 1"):
        retention_set(config_of(model, tmp_path, {"path": good, "repeat": 2}))


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"evaluate": {"stop_at_retention_rise": 0.1}}, "data.retention is empty"),
        ({"evaluate": {"stop_at_retention_rise": 0.1, "every": 0}, "data": {"retention": "x"}}, "evaluate.every is 0"),
    ],
)
def test_a_limit_that_could_never_stop_a_run_is_a_mistake(tree: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RunConfig.model_validate({"run_dir": "r", "model": {"path": "m"}} | tree)
