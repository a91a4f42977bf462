"""Files to prepared data sets: formats, faults with their places, and the same bytes for any number of processes."""

import gzip
import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist import preparation
from sft_dist.config import DataConfig, ModelConfig, RunConfig, SourceConfig
from sft_dist.data import prepare as preparing
from sft_dist.data.partial import Counts, Partial
from sft_dist.data.prepare import prepare
from sft_dist.data.progress import progress_line
from sft_dist.data.selection import Selection
from sft_dist.data.store import PreparedDataset
from sft_dist.errors import DataError, StorageError
from sft_dist.preparation import describe, policy, write_left_out
from tests.helpers.conversations import make_records, write_jsonl
from tests.helpers.models import build_tokenizer

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(folder)
    return ModelConfig(path=str(folder))


def run(path: Path, model: ModelConfig, **data: Any) -> PreparedDataset:
    options = {"cache_dir": str(path.parent / "prepared"), "num_processes": 1} | data
    return prepare([SourceConfig(path=str(path))], model, DataConfig(**options))


def test_formats_give_the_same_samples(tmp_path: Path, model: ModelConfig) -> None:
    records = make_records(12)
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.json").write_text(json.dumps(records))
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n\r\n"))
    pa.parquet.write_table(pa.Table.from_pylist(records), tmp_path / "d.parquet")
    expected = [sample.ids.tolist() for sample in run(tmp_path / "a.jsonl", model)]
    assert len(expected) == 12
    for name in ("b.jsonl.gz", "c.json", "bom.jsonl", "d.parquet"):
        assert [sample.ids.tolist() for sample in run(tmp_path / name, model)] == expected, name


def test_prompt_completion_is_a_conversation_of_two_messages(tmp_path: Path, model: ModelConfig) -> None:
    as_text = {"prompt": "hi", "completion": "ok"}
    as_messages = {"prompt": GOOD["messages"][:1], "completion": GOOD["messages"][1:]}
    (first,) = run(write_jsonl(tmp_path / "x.jsonl", [GOOD]), model)
    second, third = run(write_jsonl(tmp_path / "y.jsonl", [as_text, as_messages]), model)
    assert first.ids.tolist() == second.ids.tolist() == third.ids.tolist()


def test_same_bytes_for_any_number_of_processes(
    tmp_path: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "RECORDS_PER_SHARD", 10)
    monkeypatch.setattr(preparing, "_WORKERS_START_S", 0.0)  # even for so few records
    path = write_jsonl(tmp_path / "x.jsonl", make_records(45))

    def digests(dataset: PreparedDataset) -> dict[str, str]:
        return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in dataset.folder.iterdir()}

    one = run(path, model, cache_dir=str(tmp_path / "one"), num_processes=1)
    three = run(path, model, cache_dir=str(tmp_path / "three"), num_processes=3)
    assert len(one.manifest["shards"]) == 5
    assert digests(one) == digests(three)
    assert one.folder.name == three.folder.name


def test_what_is_tolerated_is_asked_of_prepared_data_too(tmp_path: Path, model: ModelConfig) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [GOOD, {"messages": "x"}, GOOD, GOOD])
    loose = run(path, model, on_bad_record="refuse", max_refused=0.25)
    assert len(loose) == 3
    before = (loose.folder / "manifest.json").stat().st_mtime_ns
    with pytest.raises(DataError, match=r"1 of 4 records \(25.0%\).*data.max_refused.*1 no messages") as caught:
        run(path, model, on_bad_record="refuse", max_refused=0.24)
    assert "x.jsonl:2: no messages" in str(caught.value) and "raise data.max_refused" in str(caught.value)
    with pytest.raises(DataError, match=r"1 record\(s\) cannot be trained on") as caught:
        run(path, model)
    assert run(path, model, on_bad_record="refuse", max_refused=0.25).folder == loose.folder
    assert (loose.folder / "manifest.json").stat().st_mtime_ns == before, "nothing is prepared twice"


def test_only_ten_refusals_are_named(tmp_path: Path, model: ModelConfig) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [GOOD, *[{"messages": "x"}] * 12])
    with pytest.raises(DataError) as caught:
        run(path, model, on_bad_record="refuse")
    message = str(caught.value)
    assert "12 of 13 records" in message and message.count("x.jsonl:") == 10 and "and 2 more (listed in" in message


def test_the_manifest_counts_records_duplicates_and_sources(tmp_path: Path, model: ModelConfig) -> None:
    other = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}]}
    first = write_jsonl(tmp_path / "a.jsonl", [GOOD, other, GOOD | {"id": "again"}, {"messages": "x"}])
    second = write_jsonl(tmp_path / "b.jsonl", [other])
    data = DataConfig(cache_dir=str(tmp_path / "prepared"), on_bad_record="refuse", max_refused=1.0)
    manifest = prepare([SourceConfig(path=str(path)) for path in (first, second)], model, data).manifest
    assert (manifest["num_records"], manifest["num_rendered"], manifest["num_duplicates"]) == (5, 4, 2)
    assert manifest["num_split"] == 0
    assert manifest["by_source"]["a"] | {"num_tokens": 0} == {
        "num_records": 4, "num_refused": 1, "num_samples": 3, "num_tokens": 0
    }  # fmt: skip
    assert manifest["num_tokens"] == sum(counts["num_tokens"] for counts in manifest["by_source"].values()) > 0


@given(
    st.integers(0, 50), st.integers(1, 50), st.floats(0.001, 1.0), st.integers(1, 100_000), st.floats(2.0, 100_000.0)
)
def test_progress_counts_from_where_it_started(
    num_before: int, num_new: int, share_read: float, num_tokens: int, elapsed_s: float
) -> None:
    chunk = Counts(num_records=7, num_tokens=num_tokens)
    num_chunks = (num_before + num_new) / share_read
    line = progress_line([chunk] * num_before, [chunk] * (num_before + num_new), num_chunks, elapsed_s)
    assert line.startswith(f"prepare  {share_read:.0%}  {7 * (num_before + num_new):,} records")
    assert f"  {num_tokens * num_new / elapsed_s:,.0f} tokens/s  eta " in line
    left_s = (num_chunks - num_before - num_new) * elapsed_s / num_new
    hours, minutes, seconds = (re.search(rf"(\d+){unit}", line.split("eta ")[1]) for unit in "hms")
    shown_s = sum(int(m[1]) * unit for m, unit in ((hours, 3600), (minutes, 60), (seconds, 1)) if m)
    assert abs(shown_s - left_s) <= (60 if hours else 1) + 1e-6 * left_s


def test_progress_says_that_nothing_is_known_yet() -> None:
    assert progress_line([], [], None, 2.0) == "prepare  -  0 records  0 tokens  0 tokens/s  eta -"


def test_second_run_reads_what_the_first_wrote(tmp_path: Path, model: ModelConfig) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", make_records(5))
    folder = run(path, model).folder
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    again = run(path, model)
    assert {file: file.stat().st_mtime_ns for file in again.folder.iterdir()} == before
    path.write_text(path.read_text().replace("c0", "c00"))
    assert run(path, model).folder != folder


def test_stored_samples_are_those_of_the_input_in_order(tmp_path: Path, model: ModelConfig) -> None:
    records = make_records(30)
    dataset = run(write_jsonl(tmp_path / "x.jsonl", records), model)
    assert [sample.conversation_id for sample in dataset] == [record["id"] for record in records]
    assert dataset.lengths.tolist() == [len(sample.ids) for sample in dataset]
    for sample, record in zip(dataset, records, strict=True):
        assert [span.role for span in sample.spans] == [message["role"] for message in record["messages"]]


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (b"", "is empty"),
        (b"\n\n", "no records"),
        (b'{"messages": []}\n{"messages": [}\n', "x.jsonl:2:15"),
        (json.dumps(GOOD).encode() + b"\n" + json.dumps(GOOD).encode()[:30], "x.jsonl:2:"),
        (json.dumps(GOOD).encode().replace(b"hi", b"h\xffi"), "x.jsonl:1:"),
        (b'{"id": ' + b"9" * 5000 + b"}\n", "x.jsonl:1:1"),
    ],
)
def test_broken_files_are_named_with_line_and_column(
    tmp_path: Path, model: ModelConfig, content: bytes, where: str
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        run(path, model)
    assert where in str(caught.value)
    assert not list((tmp_path / "prepared").glob("*.tmp")), "no half-written folder"


def test_refused_records_are_counted_and_listed_or_stop_the_run(tmp_path: Path, model: ModelConfig) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [GOOD, {"text": "x"}, {"messages": "x"}, GOOD, {"text": "y"}])
    with pytest.raises(DataError, match=r"3 record\(s\)") as caught:
        run(path, model)
    assert "x.jsonl:2: unknown format" in str(caught.value)
    dataset = run(path, model, on_bad_record="refuse", max_refused=0.6)
    assert len(dataset) == 2
    assert dataset.manifest["num_refused"] == {"no messages": 1, "unknown format": 2}
    listed = [json.loads(line) for line in (dataset.folder / "refused.jsonl").read_text().splitlines()]
    assert [item["where"].rsplit("/", 1)[1] for item in listed] == ["x.jsonl:2", "x.jsonl:3", "x.jsonl:5"]


def test_a_damaged_archive_is_named(tmp_path: Path, model: ModelConfig) -> None:
    content = bytearray(gzip.compress(json.dumps(GOOD).encode() * 50))
    content[20:40] = b"x" * 20
    (tmp_path / "x.jsonl.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.jsonl\.gz: cannot be read"):
        run(tmp_path / "x.jsonl.gz", model)


def test_details_with_broken_text_are_listed_all_the_same(tmp_path: Path, model: ModelConfig) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps(GOOD) + '\n{"\\ud800": 1}\n')
    dataset = run(tmp_path / "x.jsonl", model, on_bad_record="refuse", max_refused=0.5)
    assert dataset.manifest["num_refused"] == {"unknown format": 1}
    [line] = (dataset.folder / "refused.jsonl").read_text().splitlines()
    assert "\\ud800" in json.loads(line)["detail"].encode().decode(), "it can be written anywhere"
    config = RunConfig(run_dir="x", model=model)
    selection = Selection(dataset, policy(config, ()))
    write_left_out({"train": selection}, tmp_path / "left_out.jsonl")
    assert json.loads((tmp_path / "left_out.jsonl").read_text())["reason"] == "unknown format"
    assert "\\ud800" in describe(selection, config).encode().decode()


def test_a_file_name_that_is_no_unicode_can_be_listed(tmp_path: Path, model: ModelConfig) -> None:
    folder = tmp_path / "\udcff"
    folder.mkdir()
    dataset = run(
        write_jsonl(folder / "x.jsonl", [GOOD, {"a": 1}]),
        model,
        cache_dir=str(tmp_path / "prepared"),
        on_bad_record="refuse",
        max_refused=0.5,
    )
    assert json.loads((dataset.folder / "refused.jsonl").read_text())["where"].endswith("/\\udcff/x.jsonl:2")


def test_the_same_bytes_read_otherwise_are_another_data_set(tmp_path: Path, model: ModelConfig) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps([GOOD]))
    (tmp_path / "x.json").write_text(json.dumps([GOOD]))
    assert len(run(tmp_path / "x.json", model)) == 1
    with pytest.raises(DataError, match="not a record"):
        run(tmp_path / "x.jsonl", model)


def test_a_file_that_changes_while_it_is_read_is_an_error(
    tmp_path: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [GOOD])
    before, make_chunk = path.read_bytes(), preparing._make_chunk

    def change_then_make(*arguments: Any) -> None:
        path.write_bytes(before + before)
        make_chunk(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(preparing, "_make_chunk", change_then_make)
        with pytest.raises(DataError, match=r"x\.jsonl: changed while it was read; start again"):
            run(path, model)
    assert not list((tmp_path / "prepared").iterdir())
    assert len(run(path, model)) == 2


@pytest.mark.parametrize(
    "name",
    [
        *("records", "messages", "parsing", "readers", "formats", "conversation"),
        *("layout", "renderer", "rendering", "sample", "store"),
    ],
)
def test_other_code_prepares_anew(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before, read_bytes = preparing._code_version.__wrapped__(), Path.read_bytes

    def edited(path: Path) -> bytes:
        return read_bytes(path) + (b"\n" if path.name == f"{name}.py" else b"")

    monkeypatch.setattr(Path, "read_bytes", edited)
    assert preparing._code_version.__wrapped__() != before


@pytest.mark.parametrize("name", ["transformers", "tokenizers"])
def test_other_libraries_prepare_anew(
    tmp_path: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [GOOD])
    before, version = run(path, model).folder, preparing.version
    monkeypatch.setattr(preparing, "version", lambda asked: "next" if asked == name else version(asked))
    monkeypatch.setattr(preparing, "_code_version", preparing._code_version.__wrapped__)
    assert run(path, model).folder != before


def test_a_failure_leaves_nothing_behind_but_what_others_work_on(tmp_path: Path, model: ModelConfig) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps([GOOD]) + "]")
    with pytest.raises(DataError):
        run(path, model)
    assert not list((tmp_path / "prepared").iterdir())


@pytest.mark.parametrize(("age_s", "is_kept"), [(0, True), (3600, False)])
def test_what_another_process_works_on_is_kept(
    tmp_path: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch, age_s: float, is_kept: bool
) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [GOOD])

    def fail(*_: Any) -> None:
        [partial] = (tmp_path / "prepared").iterdir()
        (partial / "alive-other").touch()
        at = time.time() - age_s
        os.utime(partial / "alive-other", (at, at))
        raise DataError("broken")

    monkeypatch.setattr(preparing, "_make_chunk", fail)
    with pytest.raises(DataError, match="broken"):
        run(path, model)
    assert bool(list((tmp_path / "prepared").iterdir())) == is_kept


def test_the_failure_of_an_unrelated_run_is_not_ours(
    tmp_path: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, make_chunk = write_jsonl(tmp_path / "x.jsonl", [GOOD]), preparing._make_chunk

    def fail_elsewhere(renderer: Any, partial: Partial, task: Any) -> None:
        other = Partial(partial.folder)
        other.open(preparing.ALONE.attempt)
        other.write_failure(0, DataError("of another run"))
        make_chunk(renderer, partial, task)

    monkeypatch.setattr(preparing, "_make_chunk", fail_elsewhere)
    assert len(run(path, model)) == 1


def test_another_eos_token_is_another_data_set(tmp_path: Path, model: ModelConfig) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", make_records(3))
    other = build_tokenizer()
    other.eos_token = "<|endoftext|>"
    other.save_pretrained(tmp_path / "other")
    first = run(path, model, chat_template="chatml")
    second = run(path, ModelConfig(path=str(tmp_path / "other")), chat_template="chatml")
    assert first.manifest["stop_ids"] != second.manifest["stop_ids"]


def test_default_ids_do_not_depend_on_the_folder(tmp_path: Path, model: ModelConfig) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "x.jsonl", [GOOD])
    shared = str(tmp_path / "prepared")
    first, second = (run(tmp_path / name / "x.jsonl", model, cache_dir=shared) for name in ("a", "b"))
    assert first.folder == second.folder and second[0].conversation_id == "x:1"


def test_nothing_left_is_an_error_that_says_why(tmp_path: Path, model: ModelConfig) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": "x"}])
    with pytest.raises(DataError, match="1 no messages"):
        run(path, model, on_bad_record="refuse")


@pytest.mark.parametrize(("name", "what"), [("missing.jsonl", "missing"), ("nowhere", "nowhere"), (".", "a folder")])
def test_missing_sources_are_named(tmp_path: Path, model: ModelConfig, name: str, what: str) -> None:
    with pytest.raises(DataError, match=what):
        run(tmp_path / name, model)


def test_unknown_kinds_of_file_are_named(tmp_path: Path, model: ModelConfig) -> None:
    (tmp_path / "x.xlsx").write_text("x")
    with pytest.raises(DataError, match="unknown kind of file"):
        run(tmp_path / "x.xlsx", model)


def test_damaged_shards_are_noticed(tmp_path: Path, model: ModelConfig) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", make_records(5))
    shard = run(path, model).folder / "shard-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(StorageError, match=r"wrong size; delete .* and prepare again"):
        run(path, model)
    shard.write_bytes(bytes(len(shard.read_bytes()) + 8))
    with pytest.raises(StorageError, match=r"cannot be read: .*; delete .* and prepare again"):
        run(path, model)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace('"num_samples"', '"x"'),
        lambda text: text.replace('"stop_ids": [', '"stop_ids": null, "x": ['),
        lambda text: json.dumps(json.loads(text) | {"shards": [5]}),
        lambda text: json.dumps(json.loads(text) | {"format": 3}),
    ],
)
def test_a_damaged_manifest_is_told_with_what_to_do(
    tmp_path: Path, model: ModelConfig, damage: Callable[[str], str]
) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [GOOD])
    folder = run(path, model).folder
    manifest = folder / "manifest.json"
    manifest.write_text(damage(manifest.read_text()))
    with pytest.raises(StorageError, match=f"manifest.json: not a readable manifest .*delete {folder} and prepare"):
        run(path, model)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "null", "{}", "\xff", '{"shard": {"x": 1}, "by_source": {}}'),
        '{"shard": null, "by_source": {"x": {"num_records": "1"}}, "num_split": 0, "stop_ids": [], "refused": []}',
        '{"shard": null, "by_source": {}, "num_split": 0, "stop_ids": ["x"], "refused": []}',
        '{"shard": null, "by_source": {}, "num_split": 0, "stop_ids": [], "refused": [{"x": 1}]}',
    ],
)
def test_chunks_of_another_shape_are_made_anew(tmp_path: Path, model: ModelConfig, text: str) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", make_records(3))
    expected = run(path, model)
    there = tmp_path / "other" / f"{expected.folder.name}.partial"
    there.mkdir(parents=True)
    (there / "chunk-00000.json").write_text(text, encoding="latin-1")
    (there / "chunk-abc.json").write_text("x")
    found = run(path, model, cache_dir=str(tmp_path / "other"))
    assert [sample.ids.tolist() for sample in found] == [sample.ids.tolist() for sample in expected]
    assert found.manifest == expected.manifest and not there.exists()


def test_everything_is_on_disk_before_it_has_its_name(
    tmp_path: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen from the file system: what was synced, with which size, when the folder is renamed."""
    synced: dict[int, int] = {}
    renamed: list[Path] = []
    fsync, rename = os.fsync, os.rename

    def fsync_and_note(handle: int) -> None:
        fsync(handle)
        synced[os.fstat(handle).st_ino] = os.fstat(handle).st_size

    def rename_after_looking(before: Path, after: Path) -> None:
        for path in (before, *before.iterdir()):
            assert synced.get(path.stat().st_ino) == path.stat().st_size, path
        synced.clear()
        rename(before, after)
        renamed.append(after)

    monkeypatch.setattr(os, "fsync", fsync_and_note)
    monkeypatch.setattr(os, "rename", rename_after_looking)
    folder = run(write_jsonl(tmp_path / "x.jsonl", [GOOD, GOOD]), model).folder
    assert renamed == [folder] and folder.parent.stat().st_ino in synced


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"max_length": 3}, "data.train: nothing is left to train on"),
        ({"max_length": 30, "overflow": "error"}, "longer than data.max_length"),
        ({"max_length": 30}, None),
    ],
)
def test_the_verb_prepare_fails_where_training_would(
    tmp_path: Path, model: ModelConfig, capsys: pytest.CaptureFixture[str], data: dict[str, Any], message: str | None
) -> None:
    long = {"messages": [*GOOD["messages"], {"role": "user", "content": "x" * 99}, GOOD["messages"][1]]}
    path = write_jsonl(tmp_path / "x.jsonl", [GOOD, long])
    for name in ("train", "heldout"):
        options = {name: str(path), "cache_dir": str(tmp_path / "prepared"), "num_processes": 1} | data
        config = RunConfig.model_validate({"run_dir": "x", "model": model, "data": options})
        if message is None:
            assert preparation.run(config, {}) == 0
            continue
        wanted = "data.heldout: no sample" if name == "heldout" and "nothing" in message else message
        with pytest.raises(DataError, match=wanted) as of_prepare:
            preparation.run(config, {})
        assert "tokens  " in capsys.readouterr().out, "the figures are there to find the mend"
        with pytest.raises(DataError) as of_train:
            preparation.training_set(config) if name == "train" else preparation.heldout_set(config)
        assert str(of_prepare.value) == str(of_train.value)


def test_the_format_is_said_of_data_found_again_as_of_new(
    tmp_path: Path, model: ModelConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [GOOD])
    for _ in range(2):
        run(path, model)
        said = capsys.readouterr().err
        assert said.count(f"{path}: records of format messages") == 1, said
