"""Labels of records: what becomes of every way to write one, and of bad ones."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.config import DataConfig, HeadConfig, ModelConfig, RunConfig, SourceConfig
from sft_dist.data import labels
from sft_dist.data.labels import LabelSet
from sft_dist.data.prepare import prepare
from sft_dist.data.store import PreparedDataset
from sft_dist.errors import DataError
from sft_dist.preparation import heldout_set, training_set, with_labels
from tests.helpers.encoders import build_encoder
from tests.helpers.models import build_model

NAMES = st.text("abc", min_size=1, max_size=3)


@given(st.lists(NAMES, min_size=1))
def test_names_are_sorted_and_ids_are_places_among_them(values: list[str]) -> None:
    distinct = [labels.written(value) for value in dict.fromkeys(values)]
    names = labels.find_names("single_label", (), distinct, [1] * len(distinct))
    assert list(names) == sorted(set(values))
    known = LabelSet("single_label", names)
    assert [names[int(known.target(labels.written(value))[0])] for value in values] == values


@given(st.sets(st.integers(-5, 200), min_size=1))
def test_integers_are_names_sorted_as_numbers(values: set[int]) -> None:
    distinct = [labels.written(value) for value in values]
    names = labels.find_names("single_label", (), distinct, [1] * len(distinct))
    assert [int(name) for name in names] == sorted(values)


@given(st.lists(st.lists(NAMES, max_size=4), min_size=1), st.booleans())
def test_of_several_labels_each_that_applies_is_one(values: list[list[str]], in_csv: bool) -> None:
    written = [labels.written(json.dumps(value) if in_csv else value) for value in values]
    names = labels.find_names("multi_label", (), written, [1] * len(written))
    known = LabelSet("multi_label", names)
    for value, text in zip(values, written, strict=True):
        assert {names[place] for place in np.flatnonzero(known.target(text))} == set(value)


@given(st.lists(st.floats(-1e6, 1e6) | st.integers(-9, 9), min_size=1, max_size=3))
def test_numbers_are_targets_as_they_are(values: list[float]) -> None:
    value = values[0] if len(values) == 1 else values
    written = labels.written(value)
    names = labels.find_names("regression", (), [written], [1])
    assert LabelSet("regression", names).target(written).tolist() == values


@pytest.mark.parametrize(
    ("kind", "names", "label", "reason"),
    [
        ("single_label", ("a", "b"), "c", "unknown label"),
        ("single_label", ("a", "b"), 2, "label out of range"),
        ("single_label", ("a", "b"), -1, "label out of range"),
        ("single_label", ("0", "1"), 2, "unknown label"),
        ("single_label", ("a", "b"), 0.5, "wrong kind of label"),
        ("single_label", ("a", "b"), ["a"], "wrong kind of label"),
        ("single_label", ("a", "b"), None, "no label"),
        ("multi_label", ("a", "b"), ["a", "c"], "unknown label"),
        ("multi_label", ("a", "b"), "a", "wrong kind of label"),
        ("regression", ("value",), "much", "wrong kind of label"),
        ("regression", ("value",), "NaN", "wrong kind of label"),
        ("regression", ("value",), [1, 2], "wrong number of values"),
        ("regression", ("value",), True, "wrong kind of label"),
        ("regression", ("value",), 10**400, "wrong kind of label"),
        ("regression", ("value",), "9" * 5000, "wrong kind of label"),
        ("regression", ("value",), "[NaN]", "bad label"),
        ("single_label", ("a", "b"), 10**400, "label out of range"),
        ("multi_label", ("a", "b"), "[null]", "bad label"),
        ("multi_label", ("a", "b"), '[{"x": 1}]', "bad label"),
        ("multi_label", ("a", "b"), '["", "b"]', "bad label"),
        ("multi_label", ("a", "b"), '["\\ud800"]', "broken text"),
        ("multi_label", ("a", "b"), "[" * 5000, "wrong kind of label"),
    ],
)
def test_a_label_that_has_no_number_is_a_fault_with_a_name(
    kind: labels.Kind, names: tuple[str, ...], label: Any, reason: str
) -> None:
    with pytest.raises(labels.LabelFault) as fault:
        LabelSet(kind, names).target(labels.written(label))
    assert fault.value.reason == reason
    # Nor does it name an output, or end the search for names.
    good = labels.written([1.5] if kind == "regression" else ["b"] if kind == "multi_label" else "b")
    written = [good, labels.written(label)]
    labels.find_names(kind, (), written, [1, 1])
    assert 1 in labels.tabulate(LabelSet(kind, names), written, [1, 1]).faults


def test_names_of_any_length_and_of_one_number_have_one_order() -> None:
    """Text of csv files: more digits than int() reads; whatever the order of a set is, which differs between ranks."""
    long = ["9" * 5000, "1" * 5000, "-" + "1" * 5000]
    same = ["0" * zeros + "7" for zeros in range(20)]
    names = labels.find_names("single_label", (), [labels.written(name) for name in (*long, *same, "8")], [1] * 24)
    assert names == (long[2], *sorted(same), "8", long[1], long[0])


def test_integers_are_places_where_names_are_given_as_text() -> None:
    assert LabelSet("single_label", ("a", "b")).target("1").tolist() == [1]
    assert LabelSet("single_label", ("7", "5")).target("5").tolist() == [1]


def test_labels_of_another_type_than_most_are_faults_and_name_nothing() -> None:
    written = [labels.written(value) for value in ("a", "b", 3)]
    assert labels.find_names("single_label", (), written, [2, 1, 2]) == ("a", "b")
    table = labels.tabulate(LabelSet("single_label", ("a", "b")), written, [2, 1, 2])
    assert {place: fault.reason for place, fault in table.faults.items()} == {2: "mixed label types"}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_encoder(tmp_path_factory.mktemp("models") / "bert")


def run_config(
    folder: Path, model: Path, train: str | list[Any], heldout: list[Any] | None = None, **head: Any
) -> RunConfig:
    """Records, or the path of a file with them."""
    paths = {}
    for name, records in (("train", train), ("heldout", heldout)):
        if isinstance(records, list):
            paths[name] = str(folder / f"{name}.jsonl")
            lines = (item if isinstance(item, str) else json.dumps(item) for item in records)
            Path(paths[name]).write_text("".join(line + "\n" for line in lines))
        elif records is not None:
            paths[name] = records
    data = {name: ({"path": path},) for name, path in paths.items()}
    more = head.pop("data", {})
    return RunConfig(
        run_dir="unused",
        model=ModelConfig(path=str(model)),
        data=DataConfig(**data, max_length=32, cache_dir=str(folder / "prepared"), num_processes=1, **more),
        head=HeadConfig(**({"kind": "single_label"} | head)),
    )


def test_a_text_or_pair_is_what_the_tokenizer_makes_of_it(encoder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    texts = [("My card!", None), ("Top up", "the Fee"), ("[SEP] is text [MASK]", "[CLS]"), ("ünïcode 漢", None)]
    records = [{"text": a, "label": "x"} | ({} if b is None else {"text_pair": b}) for a, b in texts]
    config = run_config(tmp_path, encoder, [*records, {"text": "pin", "label": "y"}])
    selection, _ = training_set(with_labels(config))
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    for number, (text, pair) in enumerate(texts):
        expected = tokenizer(text, pair, split_special_tokens=True)
        sample = selection[number].sample
        assert sample.ids.tolist() == expected["input_ids"]
        types = [span.message for span in sample.spans for _ in range(span.start, span.end)]
        assert types == expected["token_type_ids"]
        assert list(sample.ids).count(tokenizer.sep_token_id) == (1 if pair is None else 2), "text stays text"


def test_messages_are_what_the_chat_template_writes(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = build_model(tmp_path / "llama")
    messages = [{"role": "user", "content": "Hi <|im_end|> there"}, {"role": "assistant", "content": "Paris."}]
    records = [{"messages": messages[:n], "label": label} for n, label in ((1, "bad"), (2, "good"))]
    selection, plan = training_set(with_labels(run_config(tmp_path, model, records)))
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(selection[1].sample.ids) == text
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [list(selection[n].sample.ids).count(stop) for n in (0, 1)] == [1, 2], "text stays text"
    assert plan.denominator(0) == 2


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_every_reader_gives_the_same_labels(encoder: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data.{suffix}"
    rows = [("my card", "card"), ("the fee", "fee, late"), ("money", "card")]
    if suffix == "jsonl":
        path.write_text("".join(json.dumps({"text": t, "label": label}) + "\n" for t, label in rows))
    elif suffix == "csv":
        path.write_text("text,label\n" + "".join(f'"{t}","{label}"\n' for t, label in rows))
    else:
        pq.write_table(pa.table({"text": [t for t, _ in rows], "label": [label for _, label in rows]}), path)
    config = with_labels(run_config(tmp_path, encoder, str(path)))
    assert config.head.labels == ("card", "fee, late")
    selection, _ = training_set(config)
    assert [selection[n].target.tolist() for n in range(3)] == [[0], [1], [0]]  # type: ignore[union-attr]


def test_a_not_a_number_of_a_parquet_file_is_refused(encoder: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"text": ["a", "b", "c"], "label": [0.5, float("nan"), None]}), path)
    with pytest.raises(DataError, match=r"data\.parquet\[1\]: bad label: `label` is nan, which is no finite number"):
        training_set(with_labels(run_config(tmp_path, encoder, str(path), kind="regression")))


GOOD = [{"text": "my card", "label": "a"}, {"text": "the fee", "label": "b"}]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"text": " ", "label": "a"}, r"train\.jsonl:3: no text"),
        ({"text": "pin", "text_pair": "", "label": "a"}, r"train\.jsonl:3: no text: `text_pair`"),
        ({"text": "pin", "label": " "}, r"train\.jsonl:3: bad label: `label` is empty"),
        ({"text": "pin", "label": {"a": 1}}, r"train\.jsonl:3: bad label: .* an object"),
        ('{"text": "pin", "label": NaN}', r"train\.jsonl:3: not JSON"),
        (
            {"text": "pin", "label": 7},
            r"train\.jsonl:3: mixed label types: .*7.* is a number, most labels here are text",
        ),
        ({"text": "pin"}, r"train\.jsonl:3: no label"),
        ({"label": "a"}, r"train\.jsonl:3: unknown format"),
    ],
)
def test_a_bad_record_is_named_by_its_line(encoder: Path, tmp_path: Path, bad: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        training_set(with_labels(run_config(tmp_path, encoder, [*GOOD, bad])))


def test_unknown_labels_of_held_out_data_are_named_or_left_out_and_counted(encoder: Path, tmp_path: Path) -> None:
    unknown = {"text": "top up", "label": "c"}
    config = with_labels(run_config(tmp_path, encoder, GOOD, [*GOOD, unknown]))
    with pytest.raises(DataError, match=r"1 of 3 labels .* 1 unknown label\n.*heldout\.jsonl:3: unknown label: 'c'"):
        heldout_set(config)
    tolerant = config.data.model_copy(update={"on_bad_record": "refuse", "max_refused": 0.5})
    selection = heldout_set(config.model_copy(update={"data": tolerant}))
    assert selection is not None and len(selection) == 2
    assert selection.left_out.summary()["bad label"][0] == 1
    strict = config.data.model_copy(update={"on_bad_record": "refuse", "max_refused": 0.1})
    with pytest.raises(DataError, match="unknown label"):
        heldout_set(config.model_copy(update={"data": strict}))


def test_labels_without_an_example_are_named(encoder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    training_set(with_labels(run_config(tmp_path, encoder, GOOD, labels=("a", "z", "b"))))
    assert "1 of 3 labels have no training example: z" in capfd.readouterr().err


def test_one_label_alone_is_no_choice(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="labels for 1 output"):
        with_labels(run_config(tmp_path, encoder, GOOD[:1]))


def test_what_is_prepared_serves_every_kind_of_head(encoder: Path, tmp_path: Path) -> None:
    records = [{"text": "pin", "label": 3}, {"text": "top up the card", "label": 1}]
    folders = set()
    for kind, targets in (("single_label", [[1], [0]]), ("regression", [[3], [1]])):
        selection, _ = training_set(with_labels(run_config(tmp_path, encoder, records, kind=kind)))
        assert [selection[n].target.tolist() for n in (0, 1)] == targets  # type: ignore[union-attr]
        folders.add(selection.dataset.folder)
    assert len(folders) == 1
    source = SourceConfig(path=str(tmp_path / "train.jsonl"), format="labelled")
    config = run_config(tmp_path, encoder, records)
    again = prepare((source,), config.model, config.data)
    assert isinstance(again, PreparedDataset) and [sample.label for sample in again] == ["3", "1"]


def test_a_sample_has_one_target_however_short_and_its_record_weight(tmp_path: Path) -> None:
    model = build_model(tmp_path / "llama")
    records = [
        {"text": "a", "label": "x", "weight": 2},
        {"text": "b", "label": "y"},
        {"text": "c c", "label": "y", "weight": 0},
    ]
    selection, plan = training_set(with_labels(run_config(tmp_path, model, records)))
    assert selection.lengths.tolist() == [1, 1] and selection.num_targets.tolist() == [1, 1]
    weights = [float(selection[n].weights[0]) for n in (0, 1)]
    assert weights == [1.0, 0.5] and plan.denominator(0) == 1.5
    assert selection.left_out.summary()["no target"][0] == 1
