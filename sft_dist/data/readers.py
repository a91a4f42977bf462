"""Paths to raw records: jsonl, json, csv (also .gz and .zst), parquet, Arrow folders, Hub ids, in the order they stand.

What a record means is not known here. A file that cannot be read on (missing, damaged archive, a list that is no JSON)
is a DataError; one bad record is passed on as it stands, for `parsing.parse` to refuse.
"""

import csv
import glob
import gzip
import hashlib
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from sft_dist.data.parsing import ArrowValues, CsvCells, Payload, arrow_shape
from sft_dist.errors import DataError

COMPRESSIONS = ("", ".gz", ".zst")
SUFFIXES = (*(kind + packed for kind in (".jsonl", ".json", ".csv") for packed in COMPRESSIONS), ".parquet")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.\[\]%:-]+)?")
_BOM = b"\xef\xbb\xbf"
_ROWS_PER_BATCH = 500
_UNREADABLE = (OSError, EOFError, zlib.error, pa.ArrowException)
# What Python has no value for: text that is no UTF-8, a date after the year 9999.
_NO_VALUE = (ValueError, OverflowError)


def is_hub_id(path: str) -> bool:
    return not os.path.exists(path) and not path.endswith(SUFFIXES) and _HUB_ID.fullmatch(path) is not None


def is_pattern(path: str) -> bool:
    return not os.path.exists(path) and not is_hub_id(path) and glob.has_magic(path)


def expand(path: str) -> list[tuple[str, str]]:
    """(path, part) of all that a source's path stands for, in order.

    `part` is empty, but for the files of a pattern: then it is the path below the folder where the pattern begins.
    Raises DataError for a pattern that matches nothing, or a folder.
    """
    if not is_pattern(path):
        return [(path, "")]
    matches = sorted(glob.glob(path, recursive=True))
    folders = [match for match in matches if os.path.isdir(match)]
    if folders and "**" not in path:
        raise DataError(f"{path}: matches the folder {folders[0]}; a pattern names files")
    files = [match for match in matches if not os.path.isdir(match)]
    if not files:
        raise DataError(f"{path}: no file matches the pattern")
    fixed = Path(*Path(path).parts[: _num_fixed(path)])
    return [(match, Path(match).relative_to(fixed).as_posix()) for match in files]


def without_suffix(name: str) -> str:
    return name.removesuffix(max((suffix for suffix in SUFFIXES if name.endswith(suffix)), key=len, default=""))


def check_readable(path: str) -> None:
    """Raise DataError unless this is a file of a known kind that is not empty, an Arrow folder or a Hub id."""
    if os.path.isdir(path):
        _check_folder(Path(path))
    elif not os.path.exists(path):
        if not is_hub_id(path):
            raise DataError(f"{path}: no such file (and not the form of a Hub id, owner/name[:split])")
    elif not path.endswith(SUFFIXES):
        raise DataError(f"{path}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")
    elif os.path.getsize(path) == 0:
        raise DataError(f"{path}: the file is empty")


def kind_of(path: str) -> str:
    """How a file is read: its suffix without compression, `hub`, or `arrow` for a folder."""
    if is_hub_id(path):
        return "hub"
    if os.path.isdir(path):
        return "arrow"
    name = path.removesuffix(".gz").removesuffix(".zst")
    return next((suffix for suffix in (".jsonl", ".json", ".csv", ".parquet") if name.endswith(suffix)), "")


def fingerprint(path: str) -> str:
    """sha256 of a file's bytes, of the files of a folder, or the data set fingerprint of a Hub id."""
    if is_hub_id(path):
        return str(_hub_dataset(path)._fingerprint)
    if not os.path.isdir(path):
        return _sha256(path)
    lines = [
        f"{file.relative_to(path)} {_sha256(str(file))}" for file in sorted(Path(path).rglob("*")) if file.is_file()
    ]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


class RecordReader:
    """Iterate once over (place, payload) of one file, folder or Hub id; `fraction` of it is read so far.

    `columns_read` chooses among the columns of a table: what nobody asks for need not be readable.
    """

    def __init__(self, path: str, columns_read: Callable[[Collection[str]], list[str]] = list) -> None:
        self.path = path
        self._columns_read = columns_read
        self.fraction = 0.0

    def __iter__(self) -> Iterator[tuple[str, Payload]]:
        check_readable(self.path)
        match kind_of(self.path):
            case "hub":
                yield from self._arrow(_hub_dataset(self.path))
            case "arrow":
                yield from self._arrow(_arrow_folder(self.path))
            case ".parquet":
                yield from self._parquet()
            case ".jsonl":
                yield from self._json_lines()
            case ".csv":
                yield from self._csv()
            case _:
                yield from self._json_list()
        self.fraction = 1.0

    def _json_lines(self) -> Iterator[tuple[str, bytes]]:
        for number, line in enumerate(self._lines(), start=1):
            if line.strip():
                yield f":{number}", line

    def _csv(self) -> Iterator[tuple[str, CsvCells]]:
        # The default limit of 128 KiB a field is shorter than many documents; it can only be set for the process.
        csv.field_size_limit(sys.maxsize)
        rows = csv.reader((line.decode("utf-8", "surrogateescape") for line in self._lines()), strict=True)
        header: tuple[str, ...] | None = None
        end = 0  # line on which the row before ended
        try:
            for row in rows:
                place, end = f":{end + 1}", rows.line_num
                if not row:
                    continue
                if header is None:
                    header = self._csv_header(tuple(row))
                else:
                    yield place, CsvCells(header, tuple(row))
        except csv.Error as error:
            raise DataError(f"{self.path}:{end + 1}: the row that begins here is not valid CSV: {error}") from None

    def _csv_header(self, names: tuple[str, ...]) -> tuple[str, ...]:
        if any("\udc80" <= character <= "\udcff" for name in names for character in name):
            raise DataError(f"{self.path}:1: the header is not valid UTF-8")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise DataError(f"{self.path}:1: the column {twice!r} is there twice")
        return names

    def _json_list(self) -> Iterator[tuple[str, bytes]]:
        """Find where each record ends, and leave the rest to the workers."""
        with _unpacked(self.path) as (file, _):
            text = file.read().removeprefix(_BOM).decode("utf-8", "surrogateescape")
        space = re.compile(r"[ \t\r\n]*")
        # Numbers are left as text: nothing here needs them, and one of thousands of digits is the worker's to refuse.
        scanner = json.JSONDecoder(parse_int=str, parse_float=str)

        def skip(begin: int) -> int:
            match = space.match(text, begin)
            assert match is not None
            return match.end()

        begin = skip(0)
        if text[begin : begin + 1] != "[":
            raise DataError(f"{self.path}: expected a list of records; a file with one record a line is named .jsonl")
        begin, number = skip(begin + 1), 0
        separator = text[begin : begin + 1]
        try:
            while separator != "]":
                _, end = scanner.raw_decode(text, begin)
                self.fraction = end / len(text)
                yield f"[{number}]", text[begin:end].encode("utf-8", "surrogateescape")
                begin = skip(end)
                separator = text[begin : begin + 1]
                if separator not in (",", "]"):
                    raise json.JSONDecodeError("Expecting ',' or ']' after a record", text, begin)
                if separator == ",":
                    begin, number = skip(begin + 1), number + 1
            if skip(begin + 1) != len(text):
                raise json.JSONDecodeError("Extra data after the list", text, begin + 1)
        except json.JSONDecodeError as error:
            raise DataError(f"{self.path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from None
        except RecursionError:
            raise DataError(f"{self.path}[{number}]: nested too deeply") from None

    def _parquet(self) -> Iterator[tuple[str, ArrowValues]]:
        number = 0
        try:
            with pq.ParquetFile(self.path, page_checksum_verification=True) as file:
                shape, num_rows = self._shape(file.schema_arrow), file.metadata.num_rows
                columns = self._columns_read(file.schema_arrow.names)
                for batch in file.iter_batches(_ROWS_PER_BATCH, columns=columns):
                    for values in _rows(batch):
                        yield f"[{number}]", ArrowValues(shape, values)
                        number += 1
                        self.fraction = number / num_rows
        except (*_UNREADABLE, *_NO_VALUE) as error:
            raise DataError(f"{self.path}: cannot be read as parquet after record {number}: {error}") from None

    def _arrow(self, dataset: Any) -> Iterator[tuple[str, ArrowValues]]:
        number = 0
        try:
            shape = self._shape(dataset.data.schema)
            columns = self._columns_read(dataset.column_names)
            for table in dataset.select_columns(columns).with_format("arrow").iter(_ROWS_PER_BATCH):
                for values in _rows(table):
                    yield f"[{number}]", ArrowValues(shape, values)
                    number += 1
                    self.fraction = number / len(dataset)
        except (*_UNREADABLE, *_NO_VALUE) as error:
            raise DataError(f"{self.path}: cannot be read as Arrow data after record {number}: {error}") from None

    def _shape(self, schema: pa.Schema) -> Any:
        if len(set(schema.names)) < len(schema.names):
            raise DataError(f"{self.path}: two columns have the same name: {', '.join(schema.names)}")
        return arrow_shape(schema)

    def _lines(self) -> Iterator[bytes]:
        size = os.path.getsize(self.path)
        with _unpacked(self.path) as (file, raw):
            for number, line in enumerate(file):
                self.fraction = raw.tell() / size
                yield line if number else line.removeprefix(_BOM)


def _rows(table: pa.RecordBatch | pa.Table) -> Iterator[dict[str, Any]]:
    """The rows of a table as Python values, up to the first that has none. Raises what that row raises."""
    try:
        rows: Sequence[dict[str, Any]] = table.to_pylist()
    except _NO_VALUE:
        for number in range(len(table)):
            yield from table.slice(number, 1).to_pylist()
    else:
        yield from rows


@contextmanager
def _unpacked(path: str) -> Iterator[tuple[IO[bytes] | gzip.GzipFile, IO[bytes]]]:
    """A file's content without compression, and the file itself, whose position tells how much is read.

    Raises DataError for what goes wrong while it is open.
    """
    try:
        with open(path, "rb") as raw:
            if path.endswith(".gz"):
                with gzip.open(raw) as file:
                    yield file, raw
            elif path.endswith(".zst"):
                yield io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw), "zstd")), raw
            else:
                yield raw, raw
    except _UNREADABLE as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _num_fixed(pattern: str) -> int:
    """How many leading parts of a pattern have no wildcard; never the last part."""
    parts = Path(pattern).parts
    return next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)


def _check_folder(folder: Path) -> None:
    if (folder / "dataset_dict.json").exists():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        raise DataError(f"{folder}: holds several splits; name one: {', '.join(str(folder / name) for name in splits)}")
    if not (folder / "state.json").exists():
        found = next((s for s in SUFFIXES if any(folder.glob("*" + s))), ".jsonl")
        raise DataError(
            f"{folder}: is a folder, but not one that datasets.save_to_disk wrote; for the files in it give a pattern "
            f"such as {folder}/*{found}"
        )


def _arrow_folder(path: str) -> Any:
    from datasets import load_from_disk

    try:
        return load_from_disk(path)
    except Exception as error:
        raise DataError(f"{path}: not a readable Arrow folder: {type(error).__name__}: {error}") from None


def _hub_dataset(path: str) -> Any:
    from datasets import load_dataset

    name, _, split = path.partition(":")
    try:
        return load_dataset(name, split=split or "train")
    except Exception as error:
        raise DataError(
            f"{path}: not a file here, and as a Hub id it cannot be loaded: {type(error).__name__}: {error}"
        ) from error


def _sha256(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
