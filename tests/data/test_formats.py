"""Every record format through every reader gives the same records; what cannot be right is refused by name."""

import csv
import gzip
import json
import math
import pickle
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sft_dist.config import RecordFormat, SourceConfig
from sft_dist.data import formats
from sft_dist.data.conversation import Conversation, Message, Record, RecordError, Text, Tokens, ToolCall, digest
from sft_dist.data.parsing import ArrowValues, CsvCells
from sft_dist.data.records import FIELDS, REQUIRED
from sft_dist.data.records import convert as convert_fields
from sft_dist.errors import DataError

Records = list[dict[str, Any]]


def source(path: Path | str, **options: Any) -> SourceConfig:
    return SourceConfig(path=str(path), **options)


def read(path: Path | str, **options: Any) -> list[Record]:
    return [formats.to_record(row) for row in formats.read_rows(source(path, **options))]


def convert(record: Any, format: RecordFormat = "auto") -> Record:
    payload = json.dumps(record).encode()
    return formats.to_record(formats.Row(0, "x", "x.jsonl", ":1", payload, format=format))


def messages_of(record: Any, format: RecordFormat = "auto") -> tuple[Message, ...]:
    conversation = convert(record, format)
    assert isinstance(conversation, Conversation)
    return conversation.messages


def refusal(record: Any, format: RecordFormat = "auto") -> RecordError:
    with pytest.raises(RecordError) as caught:
        convert(record, format)
    return caught.value


def content(record: Record) -> Any:
    """Everything of a record but where it stands, as values that can be compared."""
    if isinstance(record, Tokens):
        return record.id, record.index, record.weight, record.ids.tolist(), record.is_target.tolist()
    return replace(record, source="", where="")


# ---------------------------------------------------------------------------------------------------------------------
# One logical data set, written in every way it can be

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Sum",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "enum": [1, 2]}, "b": {"type": "integer"}},
            "required": [],
        },
    },
}


def call(name: str, arguments: Any, id: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


MESSAGES: Records = [
    {
        "id": "a",
        "messages": [
            {"role": "system", "content": "Be terse."},
            {"role": "user", "content": 'Weather\r\nin «Paris», "now"?\t '},
            {"role": "assistant", "content": None, "tool_calls": [call("weather", {"city": "Paris"}, "1")]},
            {"role": "tool", "content": '{"t": null}', "tool_call_id": "1", "name": "weather"},
            {"role": "assistant", "content": "12 °C 🙂", "reasoning_content": "It said 12."},
        ],
        "tools": [WEATHER],
        "weight": 0.5,
    },
    {
        "id": "b",
        "messages": [
            {"role": "user", "content": "1 + 2?"},
            {"role": "assistant", "content": "", "tool_calls": [call("add", {"a": 1, "b": 2}, "2")], "train": False},
            {"role": "tool", "content": "3", "tool_call_id": "2"},
            {"role": "assistant", "content": "3", "weight": 2.0},
        ],
        "tools": [ADD],
        "weight": 1.0,
    },
]
EXPECTED_MESSAGES = [
    Conversation(
        "a",
        0,
        "",
        "",
        0.5,
        (
            Message("system", "Be terse."),
            Message("user", 'Weather\r\nin «Paris», "now"?\t '),
            Message("assistant", None, tool_calls=(ToolCall("weather", {"city": "Paris"}, "1"),)),
            Message("tool", '{"t": null}', name="weather", tool_call_id="1"),
            Message("assistant", "12 °C 🙂", reasoning="It said 12."),
        ),
        (WEATHER,),
    ),
    Conversation(
        "b",
        1,
        "",
        "",
        1.0,
        (
            Message("user", "1 + 2?"),
            Message("assistant", "", tool_calls=(ToolCall("add", {"a": 1, "b": 2}, "2"),), train=False),
            Message("tool", "3", tool_call_id="2"),
            Message("assistant", "3", weight=2.0),
        ),
        (ADD,),
    ),
]
SHAREGPT: Records = [
    {
        "id": "a",
        "system": "Be terse.",
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Paris"}}'},
            {"from": "observation", "value": "12"},
            {"from": "gpt", "value": "12 °C"},
        ],
        "tools": json.dumps([WEATHER["function"]]),
    },
    {
        "id": "b",
        "system": "",
        "conversations": [
            {"from": "system", "value": "Hi"},
            {"from": "user", "value": "x"},
            {"from": "assistant", "value": "y"},
        ],
        "tools": "",
    },
]
PROMPT_COMPLETION: Records = [
    {"id": "a", "prompt": 'Two\nlines, "quoted"', "completion": " and a space "},
    {"id": "b", "prompt": "", "completion": "[1]"},
]
ALPACA: Records = [
    {"id": "a", "instruction": "Add.", "input": "1, 2", "output": "3", "system": "Count.", "history": [["p", "q"]]},
    {"id": "b", "instruction": "Hi", "input": "", "output": "Hello\n", "system": "", "history": []},
]
TEXT: Records = [{"id": "a", "text": 'One.\n\nTwo, "2".'}, {"id": "b", "text": " x"}]
TOKENS: Records = [
    {"id": "a", "input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    {"id": "b", "input_ids": [8, 9], "labels": [8, 9]},
]
DATA: dict[RecordFormat, Records] = {
    "messages": MESSAGES,
    "sharegpt": SHAREGPT,
    "prompt_completion": PROMPT_COMPLETION,
    "alpaca": ALPACA,
    "text": TEXT,
    "tokens": TOKENS,
}
COLUMNS_OF_JSON = {"messages", "conversations", "tools", "history", "input_ids", "labels", "weight"}


def as_json_lines(records: Sequence[Any]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def as_json(records: Sequence[Any]) -> bytes:
    return json.dumps(records, indent=1).encode()


def as_csv(records: Records, path: Path) -> bytes:
    names = list(records[0])
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for record in records:
            writer.writerow(
                json.dumps(record[name]) if name in COLUMNS_OF_JSON and record[name] else record[name] for name in names
            )
    return path.read_bytes()


def zstd(data: bytes) -> bytes:
    stream = pa.BufferOutputStream()
    with pa.CompressedOutputStream(stream, "zstd") as file:
        file.write(data)
    return stream.getvalue().to_pybytes()


def write_all(records: Records, folder: Path) -> dict[str, Path]:
    """The same records in every kind of file, by suffix."""
    contents = {
        ".jsonl": as_json_lines(records),
        ".json": as_json(records),
        ".csv": as_csv(records, folder / "made.csv"),
    }
    contents |= {suffix + ".gz": gzip.compress(data) for suffix, data in contents.items()}
    contents |= {suffix + ".zst": zstd(contents[suffix]) for suffix in (".jsonl", ".json", ".csv")}
    for suffix, data in contents.items():
        (folder / f"data{suffix}").write_bytes(data)
    dataset = datasets.Dataset.from_list(records)
    dataset.to_parquet(folder / "data.parquet")
    dataset.save_to_disk(folder / "data")
    return {suffix: folder / f"data{suffix}" for suffix in (*contents, ".parquet", "")}


@pytest.mark.parametrize("format", DATA)
def test_all_files_of_one_data_set_give_the_same_records(tmp_path: Path, format: RecordFormat) -> None:
    expected = [convert(record, format) for record in DATA[format]]
    expected = [replace(record, index=index) for index, record in enumerate(expected)]
    paths = write_all(DATA[format], tmp_path)
    assert len(paths) == 11
    for suffix, path in paths.items():
        assert formats.detect_format(source(path)) == format, suffix
        found = read(path)
        assert [content(record) for record in found] == [content(record) for record in expected], suffix
        assert {record.source for record in found} == {"data"}, suffix


def test_messages_mean_what_openai_means(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(as_json_lines(MESSAGES))
    assert [content(record) for record in read(tmp_path / "x.jsonl")] == EXPECTED_MESSAGES


def test_arguments_may_be_json_text() -> None:
    as_text = {"role": "assistant", "tool_calls": [call("f", '{"a": [1, null, 1.0]}', "1")]}
    as_object = {"role": "assistant", "tool_calls": [call("f", {"a": [1, None, 1.0]}, "1")]}
    flat = {"role": "assistant", "tool_calls": [{"name": "f", "id": "1", "arguments": {"a": [1, None, 1.0]}}]}
    first, second, third = (messages_of({"messages": [message]}) for message in (as_text, as_object, flat))
    assert first == second == third
    assert repr(first[0].tool_calls[0].arguments) == "{'a': [1, None, 1.0]}"


def test_the_older_openai_format_is_the_same_conversation() -> None:
    legacy = {
        "messages": [
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
            {"role": "function", "name": "f", "content": "1"},
        ],
        "functions": [WEATHER["function"]],
    }
    now = {
        "messages": [
            {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": "{}"}]},
            {"role": "tool", "name": "f", "content": "1"},
        ],
        "tools": [WEATHER],
    }
    assert convert(legacy) == convert(now)


def test_text_parts_are_joined_as_they_stand() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "\nb", "cache_control": {}}]
    messages = messages_of({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}]})
    assert messages[0].content == "a \nb"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_goes_by_several_names(name: str) -> None:
    message = {"role": "assistant", "content": "x", "reasoning": None} | {name: " why "}
    assert messages_of({"messages": [message]})[0].reasoning == " why "


def test_answers_inside_a_prompt_are_context_unless_marked() -> None:
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    marked = [{"role": "assistant", "content": "b", "train": True}]
    completion = [{"role": "assistant", "content": "d"}]
    assert [m.train for m in messages_of({"prompt": prompt, "completion": completion})] == [None, False, None, None]
    assert [m.train for m in messages_of({"prompt": marked, "completion": completion})] == [True, None]


def test_alpaca_is_a_conversation() -> None:
    assert [(m.role, m.content) for m in messages_of(ALPACA[0])] == [
        ("system", "Count."),
        ("user", "p"),
        ("assistant", "q"),
        ("user", "Add.\n\n1, 2"),
        ("assistant", "3"),
    ]
    assert [(m.role, m.content) for m in messages_of(ALPACA[1])] == [("user", "Hi"), ("assistant", "Hello\n")]


def test_sharegpt_is_a_conversation() -> None:
    first = convert(SHAREGPT[0])
    assert isinstance(first, Conversation) and first.tools == (WEATHER,)
    assert first.messages == (
        Message("system", "Be terse."),
        Message("user", "Weather?"),
        Message("assistant", None, tool_calls=(ToolCall("weather", {"city": "Paris"}),)),
        Message("tool", "12"),
        Message("assistant", "12 °C"),
    )
    several = {"from": "function_call", "value": [{"name": "f", "arguments": {}}, {"name": "g", "arguments": "{}"}]}
    assert messages_of({"conversations": [several]})[0].tool_calls == (ToolCall("f", {}), ToolCall("g", {}))


def test_messages_are_read_by_their_own_keys() -> None:
    openai, sharegpt = {"role": "assistant", "content": "x"}, {"from": "gpt", "value": "x"}
    assert messages_of({"conversations": [openai]}) == messages_of({"messages": [sharegpt]})


def test_all_of_a_text_and_the_marked_tokens_are_kept() -> None:
    assert convert({"text": " a\n"}) == Text("x:1", 0, "x", "x.jsonl:1", 1.0, " a\n")
    ids = {"input_ids": [3, 4, 5]}
    for mask in ({"labels": [-100, -100, 5]}, {"loss_mask": [0, 0, 1]}, {"completion_mask": [False, False, True]}):
        record = convert(ids | mask | {"attention_mask": [1, 1, 1], "position_ids": [0, 1, 2]})
        assert isinstance(record, Tokens)
        assert record.ids.dtype == np.int32 and record.ids.tolist() == [3, 4, 5]
        assert record.is_target.dtype == np.bool_ and record.is_target.tolist() == [False, False, True]


# ---------------------------------------------------------------------------------------------------------------------
# Arrow fills structs with nulls

CALLS = [
    {"messages": [{"role": "assistant", "content": None, "tool_calls": [call("f", arguments, "1")]}], "tools": tools}
    for arguments, tools in (
        ({"city": "Paris"}, [WEATHER]),
        ({"a": 1, "list": [None, 2], "deep": {"x": 1}}, [ADD]),
        ({"deep": {"y": "z"}}, [WEATHER, ADD]),
    )
]


def test_two_tool_schemas_survive_parquet_as_they_survive_json_lines(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(as_json_lines(CALLS))
    dataset = datasets.Dataset.from_list(CALLS)
    dataset.to_parquet(tmp_path / "x.parquet")
    # The fault that this guards against is in the file: all schemas have all properties.
    filled = pa.parquet.read_table(tmp_path / "x.parquet").to_pylist()[0]["tools"][0]
    assert filled["function"]["parameters"]["properties"]["a"] is None
    expected = [content(replace(record, id="")) for record in read(tmp_path / "x.jsonl")]
    assert expected[1].messages[0].tool_calls[0].arguments == {"a": 1, "list": [None, 2], "deep": {"x": 1}}
    assert [content(replace(record, id="")) for record in read(tmp_path / "x.parquet")] == expected


PROPERTY = st.fixed_dictionaries(
    {"type": st.sampled_from(["string", "number"])}, optional={"enum": st.lists(st.sampled_from("abc"), max_size=2)}
)


@settings(max_examples=20, deadline=None)
@given(schemas=st.lists(st.dictionaries(st.text("abk", max_size=3), PROPERTY, max_size=3), min_size=1, max_size=4))
def test_tool_schemas_whose_properties_are_a_map_survive_parquet(
    tmp_path_factory: pytest.TempPathFactory, schemas: list[dict[str, Any]]
) -> None:
    folder = tmp_path_factory.mktemp("maps")
    records = [
        {
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            "tools": [{"function": {"name": "f", "parameters": {"type": "object", "properties": schema}}}],
        }
        for schema in schemas
    ]
    properties = pa.map_(pa.string(), pa.struct([("type", pa.string()), ("enum", pa.list_(pa.string()))]))
    parameters = pa.struct([("type", pa.string()), ("properties", properties)])
    tool = pa.struct([("function", pa.struct([("name", pa.string()), ("parameters", parameters)]))])
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    table = pa.Table.from_pylist(records, pa.schema([("messages", pa.list_(message)), ("tools", pa.list_(tool))]))
    pa.parquet.write_table(table, folder / "x.parquet")
    (folder / "x.jsonl").write_bytes(as_json_lines(records))
    of_lines, of_table = ([content(replace(r, id="")) for r in read(folder / f"x.{s}")] for s in ("jsonl", "parquet"))
    assert of_table == of_lines
    assert [record.tools[0]["function"]["parameters"]["properties"] for record in of_table] == schemas


@pytest.mark.parametrize(
    ("key", "pairs", "reason"),
    [
        (pa.string(), [("a", "1"), ("b", None)], None),
        (pa.string(), [("a", "1"), ("a", "2")], "duplicate key"),
        (pa.int32(), [(1, "1")], "not JSON"),
    ],
)
def test_arguments_that_are_a_map_are_an_object(
    tmp_path: Path, key: pa.DataType, pairs: list[tuple[Any, str]], reason: str | None
) -> None:
    function = pa.struct([("name", pa.string()), ("arguments", pa.map_(key, pa.string()))])
    calls = pa.list_(pa.struct([("function", function)]))
    message = pa.struct([("role", pa.string()), ("tool_calls", calls)])
    record = {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": pairs}}]}]}
    schema = pa.schema([("messages", pa.list_(message))])
    pa.parquet.write_table(pa.Table.from_pylist([record], schema), tmp_path / "x.parquet")
    if reason is None:
        (conversation,) = read(tmp_path / "x.parquet", format="messages")
        assert isinstance(conversation, Conversation)
        assert conversation.messages[0].tool_calls[0].arguments == dict(pairs), "a map's nulls are its author's"
        return
    with pytest.raises(RecordError) as caught:
        read(tmp_path / "x.parquet", format="messages")
    assert caught.value.reason == reason


def test_nulls_in_json_text_and_json_columns_survive_parquet(tmp_path: Path) -> None:
    schema = {"type": "function", "function": {"name": "f", "parameters": {"default": None, "x": {"y": None}}}}
    records = [
        {
            "messages": [{"role": "assistant", "content": None, "tool_calls": [call("f", '{"a": null}', "1")]}],
            "tools": json.dumps([schema]),
        }
    ]
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "text.parquet")
    # Mixed types make `datasets` store JSON, in which nulls are the author's.
    records = [
        {
            "messages": [{"role": "assistant", "content": None, "tool_calls": [call("f", {"a": None}, "1")]}],
            "tools": [t],
        }
        for t in (schema, {"type": "function", "function": {"name": "g", "parameters": []}})
    ]
    (tmp_path / "x.jsonl").write_bytes(as_json_lines(records))
    dataset = datasets.load_dataset(
        "json", data_files=str(tmp_path / "x.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    dataset.to_parquet(tmp_path / "json.parquet")
    assert "arrow.json" in str(pa.parquet.read_schema(tmp_path / "json.parquet"))
    for name in ("text.parquet", "json.parquet", "x.jsonl"):
        first = read(tmp_path / name)[0]
        assert isinstance(first, Conversation)
        assert first.tools == (schema,), name
    assert read(tmp_path / "text.parquet")[0].messages[0].tool_calls[0].arguments == {"a": None}


# ---------------------------------------------------------------------------------------------------------------------
# Detection

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}]}
SHAPES = {format: records[0] for format, records in DATA.items()}


@given(st.sets(st.sampled_from(sorted(DATA)), min_size=1))
def test_a_record_of_several_formats_is_of_the_first_in_the_documented_order(present: set[RecordFormat]) -> None:
    order = ["messages", "sharegpt", "prompt_completion", "alpaca", "tokens", "text"]
    record: dict[str, Any] = {}
    for format in present:
        record |= {name: SHAPES[format][name] for name in REQUIRED[format]}
    absent = {name: None for names in REQUIRED.values() for name in names if name not in record}
    assert formats.records.format_of(record | absent) == min(present, key=order.index)


def test_a_record_that_does_not_fit_its_source_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"other": 1}\nnot JSON\n' + as_json_lines([TEXT[0], GOOD, TEXT[1]]))
    reader = formats.SourceReader(source(path))
    assert reader.format == "text"
    reasons = []
    for row in reader:
        try:
            formats.to_record(row)
            reasons.append("")
        except RecordError as error:
            reasons.append(f"{row.place} {error.reason}")
    assert reasons == [":1 unknown format", ":2 not JSON", "", ":4 unknown format", ""]


def test_a_given_format_wins(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(as_json_lines([GOOD | {"text": "a"}, {"text": "b"}]))
    assert [type(record) for record in read(path, format="text")] == [Text, Text]
    assert formats.detect_format(source(path, format="text")) == "text"
    assert formats.detect_format(source(path)) == "messages"


def test_a_source_of_no_known_format_is_an_error_that_shows_its_fields(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(as_json_lines([{"question": "a", "answer": "b"}] * 200))
    with pytest.raises(DataError, match=r"none of the first 100 .*\n.*fields found: answer, question"):
        formats.SourceReader(source(tmp_path / "x.jsonl"))


# ---------------------------------------------------------------------------------------------------------------------
# Files

BOM = b"\xef\xbb\xbf"


def test_marks_line_ends_and_blank_lines_are_accepted_with_the_right_numbers(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        BOM + b"\r\n" + as_json_lines([GOOD]).replace(b"\n", b"\r\n\r\n") + b"  \n" + as_json_lines([GOOD])[:-1]
    )
    rows = list(formats.read_rows(source(path), 7))
    assert [(row.index, row.place) for row in rows] == [(7, ":2"), (8, ":5")]
    assert len({str(messages_of(json.loads(row.payload))) for row in rows if isinstance(row.payload, bytes)}) == 1


def test_csv_rows_are_known_by_the_line_they_begin_on(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(BOM + b'id,text\r\n1,"a\r\nb"\r\n\r\n2,"c ""d"""\r\n3,\xff\r\n4\r\n5," e"')
    rows = list(formats.read_rows(source(path)))
    assert [row.place for row in rows] == [":2", ":5", ":6", ":7", ":8"]
    found = []
    for row in rows:
        try:
            record = formats.to_record(row)
            assert isinstance(record, Text)
            found.append((record.id, record.text))
        except RecordError as error:
            found.append((row.place, f"{error.reason}: {error.detail}"))
    assert found == [
        ("1", "a\r\nb"),
        ("2", 'c "d"'),
        (":6", f"not UTF-8: {path}:6: not valid UTF-8 (byte 0xff) in column 'text'"),
        (":7", "wrong number of columns: the header names 2 columns, this row has 1"),
        ("5", " e"),
    ]


def test_long_csv_fields_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text\n" + "x" * 300_000 + "\n")
    assert isinstance(record := read(tmp_path / "x.csv")[0], Text) and len(record.text) == 300_000


BROKEN_FILES = [
    ("x.csv", b'text\n"a"b\n', r"x\.csv:2: the row that begins here is not valid CSV"),
    ("x.csv", b'text\na\n"b\nc\n', r"x\.csv:3: the row that begins here is not valid CSV"),
    ("x.csv", b"text,text\na,b\n", "'text' is there twice"),
    ("x.csv", b"text,\xff\na,b\n", "header is not valid UTF-8"),
    ("x.csv", b"text\n", "holds no records"),
    ("x.json", b'{"text": "a"}\n{"text": "b"}', "named .jsonl"),
    ("x.json", b'[\n{"text": "a"},\n{"text": }]', r"x\.json:3:10: not valid JSON"),
    ("x.json", b'[{"text": "a"}', "Expecting ',' or ']'"),
    ("x.json", b'[{"text": "a"},]', "not valid JSON"),
    ("x.json", b'[{"text": "a"}] 1', "Extra data"),
    ("x.json", b"[]", "holds no records"),
    ("x.json", b"[" * 100_000, "nested too deeply"),
    ("x.parquet", b"PAR1 and so on", "cannot be read as parquet"),
    ("x.jsonl.gz", b"not gzip", r"x\.jsonl\.gz: cannot be read"),
    ("x.jsonl.zst", b"not zstd", r"x\.jsonl\.zst: cannot be read"),
    ("x.jsonl", b"", "the file is empty"),
    ("x.jsonl", b"\n \n", "holds no records"),
    ("x.xlsx", b"x", "unknown kind of file"),
]


@pytest.mark.parametrize(("name", "data", "message"), BROKEN_FILES)
def test_files_that_cannot_be_read_on_are_errors(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        formats.check_source(source(tmp_path / name))
        list(formats.read_rows(source(tmp_path / name)))


DEEP = b'{"text": "b", "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"
BROKEN_SYNTAX = (b'{"text": "b", }', b'{"text": "b"', DEEP)  # in a list these are faults of the file
BROKEN_RECORDS = [
    *[(raw, "not JSON", "not valid JSON|cannot be read") for raw in BROKEN_SYNTAX],
    (b'{"text": "\xe9"}', "not UTF-8", r"byte 0xe9"),
    (b'{"text": "b", "text": "c"}', "duplicate key", "'text' is there twice"),
    (b'{"text": "b", "meta": {"k": 1, "k": 1}}', "duplicate key", "'k' is there twice"),
    (b'{"text": "b", "x": NaN}', "not JSON", "NaN"),
    (b'{"text": "b", "x": -Infinity}', "not JSON", "Infinity"),
    (b'{"text": "b", "x": ' + b"9" * 5000 + b"}", "not JSON", "cannot be read"),
    (b'{"text": "\\ud800"}', "broken text", "lone surrogate"),
    (b'"text"', "not a record", "found text"),
]


@pytest.mark.parametrize(("raw", "reason", "detail"), BROKEN_RECORDS)
def test_a_broken_record_is_refused_and_the_others_are_read(
    tmp_path: Path, raw: bytes, reason: str, detail: str
) -> None:
    good = b'{"text": "a"}'
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([good, raw, good]))
    files = [tmp_path / "x.jsonl"]
    if raw not in BROKEN_SYNTAX:
        (tmp_path / "x.json").write_bytes(b"[" + b", ".join([good, raw, good]) + b"]")
        files.append(tmp_path / "x.json")
    for path in files:
        first, second, third = formats.read_rows(source(path))
        assert formats.to_record(first).index == 0 and formats.to_record(third).index == 2
        with pytest.raises(RecordError, match=detail) as caught:
            formats.to_record(second)
        assert caught.value.reason == reason


def test_faults_of_a_line_are_placed(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n{"text": \xff}\n{"text": }\n')
    _, third, fourth = formats.read_rows(source(path))
    with pytest.raises(RecordError, match=r"x\.jsonl:3:10: not valid UTF-8 \(byte 0xff\)"):
        formats.to_record(third)
    with pytest.raises(RecordError, match=r"x\.jsonl:4:10: not valid JSON"):
        formats.to_record(fourth)


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_a_truncated_archive_is_an_error_wherever_it_ends(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    whole = pack(as_json_lines([{"text": f"text {number * 7919 % 1009}"} for number in range(300)]))
    path = tmp_path / ("x.jsonl" + (".gz" if pack is gzip.compress else ".zst"))
    path.write_bytes(whole)
    assert len(read(path)) == 300
    for end in [*range(1, 30), *range(30, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:end])
        with pytest.raises(DataError, match="cannot be read"):
            list(formats.read_rows(source(path)))


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_archives_of_several_members_are_read_whole(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / ("x.jsonl" + (".gz" if pack is gzip.compress else ".zst"))
    path.write_bytes(pack(as_json_lines([TEXT[0]])) + pack(as_json_lines([TEXT[1]])))
    assert [record.id for record in read(path)] == ["a", "b"]


def test_a_pattern_is_one_source_in_sorted_order(tmp_path: Path) -> None:
    for number in (2, 1, 10):
        (tmp_path / "set" / f"f{number}").mkdir(parents=True)
        (tmp_path / "set" / f"f{number}" / "x.jsonl").write_bytes(as_json_lines([{"text": str(number)}] * 2))
    records = read(tmp_path / "set" / "f*" / "x.jsonl", name="all")
    assert [record.text for record in records if isinstance(record, Text)] == ["1", "1", "10", "10", "2", "2"]
    assert [record.index for record in records] == list(range(6))
    assert records[2].id == "all/f10/x.jsonl:1" and records[2].where == str(tmp_path / "set/f10/x.jsonl:1")
    before = formats.source_fingerprint(source(tmp_path / "set" / "f*" / "x.jsonl"))
    (tmp_path / "set").rename(tmp_path / "elsewhere")
    assert formats.source_fingerprint(source(tmp_path / "elsewhere" / "f*" / "x.jsonl")) == before
    (tmp_path / "elsewhere" / "f1" / "x.jsonl").write_text('{"text": "new"}\n')
    assert formats.source_fingerprint(source(tmp_path / "elsewhere" / "f*" / "x.jsonl")) != before
    assert len(read(tmp_path / "elsewhere" / "**" / "*.jsonl")) == 5


def test_patterns_without_files_and_with_strangers_are_errors(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for pattern, message in (("*.jsonl", "no file matches"), ("*", "matches the folder")):
        with pytest.raises(DataError, match=message):
            formats.check_source(source(tmp_path / pattern))
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(DataError, match=r"readme\.txt: unknown kind of file"):
        formats.check_source(source(tmp_path / "*.*"))


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].jsonl").write_bytes(as_json_lines(TEXT))
    assert len(read(tmp_path / "a[1].jsonl")) == 2


def test_folders_that_hold_no_data_set_are_errors_that_say_what_to_write(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text\na\n")
    with pytest.raises(DataError, match=r"is a folder.*/\*\.csv"):
        formats.check_source(source(tmp_path))
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(TEXT), test=datasets.Dataset.from_list(TEXT))
    splits.save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match=r"name one: .*splits/test, .*splits/train"):
        formats.check_source(source(tmp_path / "splits"))
    assert len(read(tmp_path / "splits" / "train")) == 2


def test_an_arrow_folder_is_read_in_the_order_of_its_selection(tmp_path: Path) -> None:
    datasets.Dataset.from_list(TEXT * 3).select([5, 2, 0]).save_to_disk(tmp_path / "x")
    assert [record.id for record in read(tmp_path / "x")] == ["b", "a", "a"]


UNREADABLE_DATE = pa.array([0, 2**46], pa.timestamp("s"))  # the second is after the year 9999


@pytest.mark.parametrize("suffix", [".parquet", ""])
def test_columns_that_nobody_reads_need_no_value_in_python(tmp_path: Path, suffix: str) -> None:
    write_table(pa.table({"text": ["a", "b"], "created": UNREADABLE_DATE}), tmp_path / f"x{suffix}")
    assert len(read(tmp_path / f"x{suffix}")) == 2


@pytest.mark.parametrize("suffix", [".parquet", ""])
def test_a_value_that_python_does_not_have_is_an_error_with_its_record(tmp_path: Path, suffix: str) -> None:
    write_table(pa.table({"text": ["a", "b"], "id": UNREADABLE_DATE}), tmp_path / f"x{suffix}")
    with pytest.raises(DataError, match=r"cannot be read as .* after record 1: "):
        read(tmp_path / f"x{suffix}")


@pytest.mark.parametrize("suffix", [".parquet", ""])
def test_columns_that_are_refused_by_name_are_read(tmp_path: Path, suffix: str) -> None:
    write_table(pa.table({"text": ["a"], "images": [["x.png"]], "color": ["red"]}), tmp_path / f"x{suffix}")
    with pytest.raises(RecordError, match="images"):
        read(tmp_path / f"x{suffix}")


def test_a_table_of_no_known_format_shows_all_its_columns(tmp_path: Path) -> None:
    write_table(pa.table({"question": ["a"], "id": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="fields found: id, question"):
        read(tmp_path / "x.parquet")


def write_table(table: pa.Table, path: Path) -> None:
    if path.suffix:
        pa.parquet.write_table(table, path)
    else:
        datasets.Dataset(table).save_to_disk(path)


class Asked(dict[str, Any]):
    """A record that knows which of its fields were asked for."""

    def __init__(self, fields: dict[str, Any], names: set[str]) -> None:
        super().__init__(fields)
        self.names = names

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)

    def __iter__(self) -> Iterator[str]:
        return iter(("images", "system", "documents"))  # so that every refused name is asked for


def test_every_field_that_is_asked_for_is_among_the_columns_read() -> None:
    asked: set[str] = set()
    for format, examples in DATA.items():
        for record in examples:
            convert_fields(Asked(record, asked), format, index=0, source="x", where="x:1", default_id="x:1")
    assert {"system", "history", "label", "tools", "position_ids", "images", "documents"} <= asked
    assert asked <= FIELDS


def test_a_hub_id_is_read_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> datasets.Dataset:
        if name != "owner/name":
            raise FileNotFoundError(name)
        return datasets.Dataset.from_list([{"text": split}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for path, split in (("owner/name", "train"), ("owner/name:test[:10%]", "test[:10%]")):
        (record,) = read(path)
        assert isinstance(record, Text) and record.text == split
        assert record.source == path and record.id == f"{path}[0]"
    with pytest.raises(DataError, match="as a Hub id it cannot be loaded"):
        read("owner/other")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("logs/x.jsonl.gz", "x"),
        ("owner/name", "owner/name"),
        ("logs/parts-*.jsonl", "parts-*"),
        ("logs/*.jsonl", "logs"),
        ("logs/**/*.jsonl.zst", "logs"),
        ("logs/??/[0-9]*.parquet", "logs"),
        ("logs.jsonl/*.*", "logs"),
        ("/*.jsonl", "/*.jsonl"),
    ],
)
def test_a_source_is_called_by_what_is_its_own(path: str, name: str) -> None:
    assert formats.source_name(source(path)) == name


def test_two_patterns_of_all_files_have_two_names(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jsonl").write_bytes(as_json_lines(DATA["text"]))
    formats.check_sources([source(tmp_path / folder / "*.jsonl") for folder in ("a", "b")])


def test_sources_of_one_name_are_an_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl").write_bytes(as_json_lines(TEXT))
    pair = [source(tmp_path / "a" / "x.jsonl"), source(tmp_path / "b" / "x.jsonl")]
    with pytest.raises(DataError, match="its name 'x' is also that of"):
        formats.check_sources(pair)
    formats.check_sources([pair[0], source(pair[1].path, name="y")])


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".jsonl.gz", ".jsonl.zst", ".parquet", ""])
def test_the_fraction_read_rises_to_one_and_rows_travel(tmp_path: Path, suffix: str) -> None:
    rng = random.Random(0)
    records = [{"id": str(number), "text": rng.randbytes(300).hex()} for number in range(1500)]
    path = write_all(records, tmp_path)[suffix]
    reader = formats.SourceReader(source(path))
    fractions = []
    for row in reader:
        fractions.append(reader.fraction)
        if row.index % 500 == 0:
            assert formats.to_record(pickle.loads(pickle.dumps(row))) == formats.to_record(row)
    assert len(fractions) == 1500 and fractions == sorted(fractions)
    assert 0 <= fractions[0] < 0.4 and fractions[-1] <= 1 and reader.fraction == 1
    assert any(0.3 < fraction < 0.7 for fraction in fractions)


def test_the_fraction_of_a_pattern_counts_bytes(tmp_path: Path) -> None:
    for name, num in (("a", 30), ("b", 10)):
        (tmp_path / f"{name}.jsonl").write_bytes(as_json_lines([{"text": "x"}] * num))
    reader = formats.SourceReader(source(tmp_path / "*.jsonl"))
    of_index = {row.index: reader.fraction for row in reader}
    assert of_index[29] == pytest.approx(0.75) and of_index[39] == 1


# ---------------------------------------------------------------------------------------------------------------------
# What is refused

ANSWER = {"role": "assistant", "content": "x"}


def one(**message: Any) -> dict[str, Any]:
    return {"messages": [ANSWER | message]}


PAIR = {"prompt": "q", "completion": "a"}

BAD_RECORDS: list[tuple[Any, str]] = [
    *((PAIR | {"label": label}, "rejected answer") for label in (False, 0, 0.0, "false", "False", "0")),
    *((PAIR | {"label": label}, "unsupported field") for label in ("good", 2, -1, [True], {})),
    ({"messages": [{"role": "bot", "content": "x"}]}, "unknown role"),
    ({"messages": [{"role": "text", "content": "x"}, ANSWER]}, "unknown role"),
    ({"messages": [{"content": "x"}]}, "unknown role"),
    ({"messages": [{"role": 1, "content": "x"}]}, "unknown role"),
    ({"messages": [{"from": "bing", "value": "x"}]}, "unknown role"),
    ({"messages": [{"role": "user", "content": "x"}]}, "no assistant turn"),
    ({"messages": [{"role": "user", "content": None}]}, "no text"),
    ({"messages": [{"role": "user", "content": [1]}]}, "no text"),
    ({"messages": [{"role": "user", "content": 1}]}, "no text"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, "no text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "unsupported content"),
    ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "unsupported content"),
    ({"messages": ["x"]}, "not a message"),
    ({"messages": [None]}, "not a message"),
    ({"messages": "x"}, "no messages"),
    ({"messages": []}, "no messages"),
    ({"messages": {}}, "no messages"),
    ({"messages": None}, "unknown format"),
    ({"x": "x"}, "unknown format"),
    ({}, "unknown format"),
    ([1, 2], "not a record"),
    (one(content=" \n"), "empty answer"),
    (one(content=None), "empty answer"),
    (one(reasoning="a", thinking="b"), "unsupported field"),
    (one(reasoning=1), "no text"),
    ({"messages": [{"role": "user", "content": "x", "reasoning": "y"}, ANSWER]}, "not an assistant"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [call("f", {}, "1")]}, ANSWER]}, "not an assistant"),
    (one(name=1), "no text"),
    (one(tool_call_id=1), "no text"),
    (one(weight=-1), "weight"),
    (one(weight=True), "weight"),
    (one(weight="1"), "weight"),
    (one(weight=1e31), "weight"),
    (one(weight=10**400), "weight"),
    (one(train=1), "train mark"),
    (one(loss=False), "unsupported field"),
    (one(mask=0), "unsupported field"),
    (one(refusal="No."), "unsupported field"),
    (one(images=["x"]), "unsupported field"),
    (one(tool_calls=[call("f", "[1]", "1")]), "tool call"),
    (one(tool_calls=[call("f", "{", "1")]), "not JSON"),
    (one(tool_calls=[call("f", "", "1")]), "not JSON"),
    (one(tool_calls=[call("f", '{"a": 1, "a": 2}', "1")]), "duplicate key"),
    (one(tool_calls=[call("f", '{"a": NaN}', "1")]), "not JSON"),
    (one(tool_calls=[call("f", '{"a": 1e999}', "1")]), "not JSON"),
    (one(tool_calls=[call("f", {"a": "\ud800"}, "1")]), "broken text"),
    (one(tool_calls=[call("f", {"\ud800": 1}, "1")]), "broken text"),
    (one(tool_calls=[call("", {}, "1")]), "tool call"),
    (one(tool_calls=[call("f", [], "1")]), "tool call"),
    (one(tool_calls=[{"type": "custom", "custom": {"name": "f"}}]), "tool call"),
    (one(tool_calls=["f"]), "tool call"),
    (one(tool_calls=[{"id": 1, "name": "f"}]), "no text"),
    (one(tool_calls=[call("f", {}, "1")], function_call={"name": "f"}), "tool call"),
    (one(function_call={}), "tool call"),
    (one() | {"tools": [{"type": "function"}]}, "tools"),
    (one() | {"tools": ["f"]}, "tools"),
    (one() | {"tools": {"name": "f"}}, "tools"),
    (one() | {"tools": "weather"}, "not JSON"),
    (one() | {"tools": [{"type": "web_search"}]}, "tools"),
    (one() | {"tools": [WEATHER], "functions": [WEATHER]}, "tools"),
    (one() | {"tools": [{"name": "f", "description": "\ud800"}]}, "broken text"),
    (one() | {"weight": -0.5}, "weight"),
    (one() | {"weight": False}, "weight"),
    (one() | {"weight": "1"}, "weight"),
    (one() | {"train": False}, "unsupported field"),
    (one() | {"system": "x"}, "unsupported field"),
    (one() | {"chat_template_kwargs": {"enable_thinking": False}}, "unsupported field"),
    (one() | {"images": ["a.png"]}, "unsupported field"),
    (one() | {"id": "\ud800"}, "broken text"),
    ({"system": "Be terse.", "prompt": "x", "completion": "y"}, "unsupported field"),
    ({"prompt": "x", "completion": " "}, "empty answer"),
    ({"prompt": "x", "completion": None}, "unknown format"),
    ({"prompt": "\ud800", "completion": "x"}, "broken text"),
    ({"prompt": [ANSWER], "completion": [{"role": "user", "content": "x"}]}, "no assistant turn"),
    ({"prompt": 1, "completion": "x"}, "no messages"),
    ({"prompt": "x", "completion": "y", "label": False}, "rejected answer"),
    ({"instruction": "x", "output": ""}, "empty answer"),
    ({"instruction": "", "input": "", "output": "x"}, "no text"),
    ({"instruction": "x", "input": 1, "output": "x"}, "no text"),
    ({"instruction": 1, "output": "x"}, "no text"),
    ({"instruction": "x", "output": 1}, "no text"),
    ({"instruction": "x", "output": "x", "history": "x"}, "no messages"),
    ({"instruction": "x", "output": "x", "history": [["a"]]}, "no messages"),
    ({"instruction": "x", "output": "x", "history": [["a", None]]}, "empty answer"),
    ({"instruction": "x", "output": "x", "system": 1}, "no text"),
    ({"conversations": [{"from": "gpt", "value": None}]}, "empty answer"),
    ({"conversations": [{"from": "function_call", "value": "f()"}]}, "not JSON"),
    ({"conversations": [{"from": "function_call", "value": '"f"'}]}, "tool call"),
    ({"conversations": [{"from": "function_call", "value": ""}]}, "not JSON"),
    ({"conversations": [{"from": "function_call", "value": None}]}, "empty answer"),
    (
        {"conversations": [{"from": "system", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "c"},
        "two system messages",
    ),
    ({"text": ""}, "no text"),
    ({"text": "\n"}, "no text"),
    ({"text": 1}, "no text"),
    ({"text": "x", "weight": "heavy"}, "weight"),
    ({"input_ids": [1, 2]}, "token ids"),
    ({"input_ids": [], "labels": []}, "token ids"),
    ({"input_ids": "1 2", "labels": [1]}, "token ids"),
    ({"input_ids": [[1, 2]], "labels": [[1, 2]]}, "token ids"),
    ({"input_ids": [1, 2.0], "labels": [1, 2]}, "token ids"),
    ({"input_ids": [2, True], "labels": [2, 1]}, "token ids"),
    ({"input_ids": [1, -2], "labels": [1, -2]}, "token ids"),
    ({"input_ids": [1, 2**31], "labels": [1, 2**31]}, "token ids"),
    ({"input_ids": [1, 2], "labels": [1]}, "token ids"),
    ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "token ids"),
    ({"input_ids": [1, 2], "labels": [-100, True]}, "token ids"),
    ({"input_ids": [1, 2], "loss_mask": [0, 2]}, "token ids"),
    ({"input_ids": [1, 2], "loss_mask": [0, 0.5]}, "token ids"),
    ({"input_ids": [1, 2], "loss_mask": [0, 1], "labels": [1, 2]}, "token ids"),
    ({"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 0]}, "token ids"),
    ({"input_ids": [1, 2], "labels": [1, 2], "position_ids": [0, 0]}, "token ids"),
    ({"input_ids": [1, 2], "labels": [1, -100]}, "no target"),
    ({"input_ids": [1, 2], "loss_mask": [1, 0]}, "no target"),
    ({"input_ids": [1], "labels": [1]}, "no target"),
]


@pytest.mark.parametrize(("record", "reason"), BAD_RECORDS)
def test_bad_records_are_refused_with_a_reason(record: Any, reason: str) -> None:
    assert refusal(record).reason == reason


def test_refusals_show_what_was_seen() -> None:
    assert "found an empty list" in refusal({"messages": []}).detail
    assert "found text" in refusal({"messages": "x"}).detail
    for record, seen in (
        (one(tool_calls=[call("f", "[1]", "1")]), "arguments of 'f' must be an object, found a list: '[1]'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "message 1 (user): part 1 is of type 'image_url'",
        ),
        ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "`labels` at position 0 is 2, `input_ids` is 1"),
        ({"conversations": [{"from": "bing", "value": "x"}]}, "message 1 is from 'bing'"),
    ):
        assert seen in refusal(record).detail


HARMLESS = [
    one() | {"weight": 0, "category": "x", "score": [1], "answer": None, "images": [], "tools": []},
    one(weight=0, refusal=None, audio=None, annotations=[], tool_calls=[]),
    {"prompt": "x", "completion": "y", "label": True, "chosen": "z"},
    {"text": "x", "label": 3, "meta": {"system": "x"}},
]


@pytest.mark.parametrize("label", [True, 1, 1.0, "true", "True", "1", "", None])
def test_a_completion_that_is_labelled_good_is_trained(label: Any) -> None:
    assert messages_of(PAIR | {"label": label}) == messages_of(PAIR)


def test_labels_of_csv_are_understood(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("prompt,completion,label\nq,a,true\nq,b,\nq,c,false\n")
    first, second, third = formats.read_rows(source(tmp_path / "x.csv"))
    formats.to_record(first), formats.to_record(second)
    with pytest.raises(RecordError, match="rejected answer"):
        formats.to_record(third)


@pytest.mark.parametrize("record", HARMLESS)
def test_fields_that_change_nothing_are_no_reason(record: Any) -> None:
    convert(record)


def test_deep_nesting_is_refused_before_it_can_exceed_the_stack() -> None:
    texts = [
        '{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": %s}}]}]}',
        '{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "type": %s}]}]}',
        '{"messages": [{"role": "assistant", "content": "x"}], "tools": [{"name": "f", "parameters": %s}]}',
        '{"messages": [{"role": %s, "content": "x"}]}',
        '{"messages": %s}',
        '{"id": %s, "text": "x"}',
        '{"text": "x", "harmless": %s}',
    ]
    # Up to and beyond Python's limit of 1,000 calls, less those of the test itself.
    for depth in [*range(90, 103), *range(800, 1000)]:
        for text in texts:
            raw = (text % ("[" * depth + "1" + "]" * depth)).encode()
            try:
                record = formats.to_record(formats.Row(0, "x", "x.jsonl", ":1", raw))
            except RecordError:
                continue
            digest(pickle.loads(pickle.dumps(record)))
            assert isinstance(record, Text) or depth < 100


def test_tools_are_of_one_form() -> None:
    function = WEATHER["function"]
    for tool in (WEATHER, function, {"function": function}, function | {"type": "function"}):
        record = convert(one() | {"tools": [tool]})
        assert isinstance(record, Conversation) and record.tools == (WEATHER,)


def test_weight_zero_is_kept_for_the_selection() -> None:
    assert convert(one() | {"weight": 0}).weight == 0
    assert messages_of(one(weight=0))[0].weight == 0


# ---------------------------------------------------------------------------------------------------------------------
# Anything at all

NAMES = sorted({name for names in REQUIRED.values() for name in names})
NAMES += ["labels", "loss_mask", "role", "content", "from", "value", "tool_calls", "function", "name", "arguments"]
NAMES += ["weight", "train", "tools", "id", "system", "history", "input", "type", "text", "reasoning", "function_call"]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(codec=None), max_size=8),
    st.sampled_from(
        ["user", "assistant", "tool", "human", "gpt", "function_call", "function", "{}", "[]", '{"name": "f"}']
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), inner, max_size=5)
    ),
    max_leaves=25,
)


@st.composite
def damaged(draw: st.DrawFn) -> Any:
    """A good record in which one value anywhere is another."""
    record = json.loads(json.dumps(draw(st.sampled_from([record for group in DATA.values() for record in group]))))
    place: Any = record
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(keys))
        if not isinstance(place[key], (dict, list)) or not place[key] or draw(st.booleans()):
            place[key] = draw(VALUES)
            return record
        place = place[key]


@settings(max_examples=400, deadline=None)
@given(VALUES | damaged(), st.sampled_from(["auto", *DATA]))
def test_any_value_is_converted_or_refused(value: Any, format: RecordFormat) -> None:
    payloads: list[Any] = [json.dumps(value).encode()]
    if isinstance(value, dict):
        payloads += [CsvCells(tuple(value), tuple(str(item) for item in value.values()))]
        payloads += [ArrowValues(dict.fromkeys(value), value)]
    for payload in payloads:
        row = formats.Row(0, "x", "x", ":1", payload, format=format)
        try:
            record = formats.to_record(row)
        except RecordError as error:
            assert error.reason and error.detail
            continue
        except UnicodeEncodeError:
            raise AssertionError("a lone surrogate went through") from None
        pickle.dumps(record)
        assert math.isfinite(record.weight)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.one_of(
        st.binary(max_size=60),
        st.lists(
            st.sampled_from(
                [b'{"text": "a"}', b"\n", b",", b"[", b"]", b'"', b"\xff", BOM, b"\r\n", b"text", b"NaN", b"{"]
            ),
            max_size=12,
        ).map(b"".join),
    ),
    suffix=st.sampled_from(formats.readers.SUFFIXES),
    is_packed=st.booleans(),
)
@example(data=b"[" * 100_000, suffix=".jsonl", is_packed=False)
@example(data=b"[" * 100_000, suffix=".csv", is_packed=False)
def test_any_bytes_are_read_or_refused(tmp_path: Path, data: bytes, suffix: str, is_packed: bool) -> None:
    if is_packed:
        data = gzip.compress(data) if suffix.endswith(".gz") else zstd(data) if suffix.endswith(".zst") else data
    path = tmp_path / f"x{suffix}"
    path.write_bytes(data)
    try:
        for row in formats.read_rows(source(path, format="text")):
            try:
                formats.to_record(row)
            except RecordError as error:
                assert error.reason and error.detail
        formats.detect_format(source(path))
    except DataError as error:
        assert str(path) in str(error)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip), min_size=1, max_size=4))
@example(texts=["\x00a\r\n\u2028\x85\x1c\"',;"])
def test_any_text_survives_every_reader_exactly(tmp_path: Path, texts: list[str]) -> None:
    records = [{"id": str(number), "text": text} for number, text in enumerate(texts)]
    (tmp_path / "x.jsonl").write_bytes(as_json_lines(records))
    (tmp_path / "x.json").write_bytes(as_json(records))
    as_csv(records, tmp_path / "x.csv")
    pa.parquet.write_table(pa.Table.from_pylist(records), tmp_path / "x.parquet")
    for name in ("x.jsonl", "x.json", "x.csv", "x.parquet"):
        assert [record.text for record in read(tmp_path / name) if isinstance(record, Text)] == texts, name


# ---------------------------------------------------------------------------------------------------------------------
# What the documentation says

ROOT = Path(__file__).resolve().parents[2]
DOCS = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def test_every_reason_is_documented() -> None:
    modules = ("parsing", "messages", "records", "conversation", "formats")
    code = "".join((ROOT / "sft_dist" / "data" / f"{name}.py").read_text(encoding="utf-8") for name in modules)
    reasons = set(re.findall(r'RecordError\(\s*"([^"]+)"', code))
    table = DOCS[DOCS.index("| reason |") : DOCS.index("Rendering and verification")]
    cells = re.findall(r"^\| ([^|]+?) \|", table, flags=re.MULTILINE)[1:]
    listed = {reason for cell in cells for reason in cell.split(", ")}
    assert listed == reasons and len(reasons) > 20


def test_documented_examples_are_of_the_format_they_stand_for() -> None:
    examples = re.findall(r"^\| `(\w+)` \|.*?\| `(\{.*?\})`", DOCS, flags=re.MULTILINE)
    assert [name for name, _ in examples] == list(REQUIRED)
    for name, text in examples:
        assert formats.records.format_of(json.loads(text)) == name
        convert(json.loads(text))
    (whole,) = re.findall(r"^```json\n(.*?)```", DOCS, flags=re.MULTILINE | re.DOTALL)
    assert isinstance(record := convert(json.loads(whole)), Conversation) and len(record.tools) == 1
