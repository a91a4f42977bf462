"""From files of many kinds to conversations: which reader for which path, and which record shape means what.

The only module that knows record formats. Faults of a file (missing, not UTF-8, not JSON) are DataErrors with
file:line:column; faults of one record are RecordErrors, which the caller refuses or raises.
"""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_dist.config import SourceConfig
from sft_dist.data.conversation import Conversation, Message, Record, RecordError, check_conversation, check_text
from sft_dist.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.\[\]%:-]+)?")


@dataclass(frozen=True, slots=True)
class Row:
    """One record before it is parsed: the bytes of a JSON line, or a ready mapping from other readers."""

    index: int
    source: str
    path: str
    place: str  # ":417" or "[3]"
    payload: bytes | dict[str, Any]

    @property
    def where(self) -> str:
        return self.path + self.place

    @property
    def default_id(self) -> str:
        """Does not depend on the folder, as the identity of the prepared data does not."""
        return self.source + self.place


def source_fingerprint(source: SourceConfig) -> str:
    """Identity of a source's content: sha256 of a file's bytes, or the data set fingerprint of a Hub id."""
    path = source.path
    if not _is_hub_id(path):
        digest = hashlib.sha256()
        try:
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        return digest.hexdigest()
    return str(_hub_dataset(path)._fingerprint)


def check_source(source: SourceConfig) -> None:
    """Raise DataError unless the path is a readable file of a known kind, or has the form of a Hub id."""
    path = source.path
    if Path(path).is_dir():
        raise DataError(f"{path}: is a folder; name its files")
    if not Path(path).exists():
        if not _is_hub_id(path):
            raise DataError(f"{path}: no such file (and not the form of a Hub id, owner/name[:split])")
    elif not path.endswith(SUFFIXES):
        raise DataError(f"{path}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")
    elif Path(path).stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")


def read_rows(source: SourceConfig, first_index: int = 0) -> Iterator[Row]:
    """Yield the records of one source in order; `first_index` numbers them through all sources."""
    check_source(source)
    name, path = source_name(source), source.path
    if _is_hub_id(path):
        records = iter(_hub_dataset(path))
        rows: Iterator[tuple[str, Any]] = ((f"[{number}]", record) for number, record in enumerate(records))
    elif path.endswith(".parquet"):
        rows = _parquet_records(path)
    elif path.removesuffix(".gz").endswith(".jsonl"):
        rows = _json_lines(path)
    else:
        rows = _json_records(path)
    for index, (place, payload) in enumerate(rows, start=first_index):
        yield Row(index, name, path, place, payload)


def to_record(row: Row) -> Record:
    """Parse and convert one row. Raises DataError for a broken JSON line, RecordError for a wrong record."""
    record = row.payload
    if isinstance(record, bytes):
        record = _parse(record, row.path, first_line=int(row.place.removeprefix(":")))
    if not isinstance(record, dict):
        raise RecordError("not a record", f"expected an object with named fields, found {type(record).__name__}")
    if record.get("messages") is not None:
        messages = _messages(record["messages"], "messages")
    elif record.get("prompt") is not None and record.get("completion") is not None:
        messages = _side(record["prompt"], "prompt", "user") + _side(record["completion"], "completion", "assistant")
    else:
        fields = ", ".join(sorted(map(str, record))) or "none"
        raise RecordError(
            "unknown format", f"expected `messages`, or `prompt` and `completion`; fields found: {fields}"
        )
    if record.get("tools"):
        raise RecordError("tools", "the record offers tools; tool calls cannot be rendered yet")
    _refuse_fields(record, ("system", "weight"), "the record")
    identity = row.default_id if record.get("id") is None else str(record["id"])
    check_text(identity, "id")
    conversation = Conversation(
        id=identity,
        index=row.index,
        source=row.source,
        where=row.where,
        weight=1.0,
        messages=messages,
    )
    check_conversation(conversation)
    return conversation


def source_name(source: SourceConfig) -> str:
    """Name of a source in statistics: the one given, else the file name without its suffixes, or the Hub id."""
    if source.name is not None:
        return source.name
    path = source.path
    if _is_hub_id(path):
        return path
    name = Path(path).name
    suffix = max((suffix for suffix in SUFFIXES if name.endswith(suffix)), key=len, default="")
    return name.removesuffix(suffix)


def _is_hub_id(path: str) -> bool:
    return not Path(path).exists() and not path.endswith(SUFFIXES) and _HUB_ID.fullmatch(path) is not None


def _hub_dataset(path: str) -> Any:
    from datasets import load_dataset

    name, _, split = path.partition(":")
    try:
        return load_dataset(name, split=split or "train")
    except Exception as error:
        raise DataError(
            f"{path}: not a file here, and as a Hub id it cannot be loaded: {type(error).__name__}: {error}"
        ) from error


def _parquet_records(path: str) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset

    try:
        # Streaming reads the file in place; the other way copies it into a cache first.
        rows = load_dataset("parquet", data_files=[path], split="train", streaming=True)
        for index, row in enumerate(rows):
            yield f"[{index}]", row
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from error


def _json_lines(path: str) -> Iterator[tuple[str, bytes]]:
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield f":{number}", line
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _json_records(path: str) -> Iterator[tuple[str, Any]]:
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            raw = file.read().removeprefix(b"\xef\xbb\xbf")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    records = _parse(raw, path, first_line=1)
    if not isinstance(records, list):
        raise DataError(f"{path}: expected a list of records; a file with one record a line is named .jsonl")
    for index, record in enumerate(records):
        yield f"[{index}]", record


def _parse(raw: bytes, path: str, first_line: int) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = first_line + raw[: error.start].count(b"\n")
        column = error.start - (raw[: error.start].rfind(b"\n") + 1) + 1
        raise DataError(f"{path}:{line}:{column}: not valid UTF-8 (byte 0x{raw[error.start]:02x})") from None
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{path}:{line}:{error.colno}: not valid JSON: {error.msg}") from None
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        raise DataError(f"{path}:{first_line}:1: JSON that cannot be read: {error}") from None


def _messages(value: Any, field: str) -> tuple[Message, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise RecordError("no messages", f"`{field}` must be a non-empty list, found {_kind(value)}")
    return tuple(_message(item, field, number) for number, item in enumerate(value, start=1))


def _message(item: Any, field: str, number: int) -> Message:
    if not isinstance(item, dict):
        raise RecordError("not a message", f"{field} {number} must be an object, found {_kind(item)}")
    if item.get("tool_calls"):
        raise RecordError("tools", f"message {number} has tool calls, which cannot be rendered yet")
    role, content = item.get("role"), item.get("content")
    _refuse_fields(item, ("reasoning_content", "weight", "train"), f"message {number}")
    if not isinstance(role, str):
        raise RecordError("unknown role", f"message {number} has role {role!r}; expected a name such as 'user'")
    if not isinstance(content, str):
        raise RecordError("no text", f"message {number} ({role}): content must be text, found {_kind(content)}")
    return Message(role, content)


def _refuse_fields(tree: dict[str, Any], names: tuple[str, ...], what: str) -> None:
    """Fields that change what is trained must not be dropped in silence."""
    for name in names:
        if tree.get(name) is not None:
            raise RecordError("unsupported field", f"{what} has {name!r}, which is not supported yet")


def _side(value: Any, field: str, role: str) -> tuple[Message, ...]:
    return (Message(role, value),) if isinstance(value, str) else _messages(value, field)


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
