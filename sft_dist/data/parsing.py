"""The raw contents of one record, as readers hand them over, and the mapping of fields they stand for.

Readers do as little as they can in their one process; what takes time (JSON, null handling) happens here, in the
workers. JSON is read strictly: a key written twice, NaN and lone bytes are refused, and nulls and numbers survive.
"""

import json
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import pyarrow as pa

from sft_dist.data.conversation import RecordError

# How values of an Arrow column are nested: a struct by field name, a list as [shape of its items], a map, JSON text, a
# leaf.
Shape: TypeAlias = "dict[str, Shape] | list[Shape] | MapShape | str | None"
_JSON = "json"

# Columns of csv files that hold JSON. An empty cell of them is an absent field; all other cells are text as it stands.
JSON_COLUMNS = (
    *("messages", "conversations", "history", "tools", "functions", "weight", "candidates"),
    *("input_ids", "labels", "loss_mask", "completion_mask", "assistant_masks", "attention_mask", "position_ids"),
)


@dataclass(frozen=True, slots=True)
class MapShape:
    """A column of pairs of key and value."""

    values: Shape


@dataclass(frozen=True, slots=True)
class CsvCells:
    """One row of a csv file. Bytes that are no UTF-8 are still in it, as surrogates."""

    header: tuple[str, ...]
    cells: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ArrowValues:
    """One row of a parquet file or Arrow table."""

    shape: dict[str, Shape]
    values: dict[str, Any]


# JSON text of one record, a csv row, an Arrow row.
Payload: TypeAlias = bytes | CsvCells | ArrowValues


def parse(payload: Payload, path: str, place: str) -> dict[str, Any]:
    """The fields of a record. Raises RecordError; `path` and `place` (":417" or "[3]") tell where it stands."""
    match payload:
        case bytes():
            record = _parse_bytes(payload, path, place)
        case CsvCells():
            record = _parse_cells(payload, path + place)
        case ArrowValues():
            record = _without_filling(payload.values, payload.shape)
    if not isinstance(record, dict):
        raise RecordError("not a record", f"expected an object with named fields, found {kind(record)}")
    return record


def parse_json(text: str, what: str) -> Any:
    """The value of JSON text found inside a record. Raises RecordError that names `what`."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise RecordError("not JSON", f"{what}: {error.msg} at character {error.pos} of {short(text)}") from None
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        raise RecordError("not JSON", f"{what}: JSON that cannot be read: {error}") from None


def kind(value: Any) -> str:
    """What a value is, in the words of JSON."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:60] + " … " + text[-15:]


def arrow_shape(schema: pa.Schema) -> dict[str, Shape]:
    """How the columns of a table are nested."""
    return {field.name: _shape(field.type) for field in schema}


def _shape(type_: pa.DataType) -> Shape:
    if isinstance(type_, pa.JsonType):
        return _JSON
    if pa.types.is_struct(type_):
        return {field.name: _shape(field.type) for field in type_}
    if pa.types.is_map(type_):
        return MapShape(_shape(type_.item_type))
    is_list = pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)
    inner = _shape(type_.value_type) if is_list else None
    return None if inner is None else [inner]


def _without_filling(value: Any, shape: Shape) -> Any:
    """Structs without their nulls: all rows of a table have the same fields, and a null stands for an absent one.

    Maps become objects. Nulls inside JSON text, among the items of lists and the values of maps are their author's, and
    stay.
    """
    if value is None or shape is None:
        return value
    if isinstance(shape, dict):
        return {name: _without_filling(item, shape[name]) for name, item in value.items() if item is not None}
    if isinstance(shape, list):
        return [_without_filling(item, shape[0]) for item in value]
    if isinstance(shape, MapShape):
        return _unique([(_map_key(key), _without_filling(item, shape.values)) for key, item in value])
    return parse_json(value, "a JSON column")


def _map_key(key: Any) -> str:
    if not isinstance(key, str):
        raise RecordError("not JSON", f"a map has the key {short(key)}; the names in a JSON object are text")
    return key


def _parse_bytes(raw: bytes, path: str, place: str) -> Any:
    try:
        return _DECODER.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        where = _locate(raw[: error.start], path, place)
        raise RecordError("not UTF-8", f"{where}: not valid UTF-8 (byte 0x{raw[error.start]:02x})") from None
    except json.JSONDecodeError as error:
        where = _locate(error.doc[: error.pos], path, place)
        raise RecordError("not JSON", f"{where}: not valid JSON: {error.msg}") from None
    except (RecursionError, ValueError) as error:
        where = _locate(b"", path, place)
        raise RecordError("not JSON", f"{where}: JSON that cannot be read: {error}") from None


def _locate(before: bytes | str, path: str, place: str) -> str:
    """file:line:column of a fault in a JSON line; in a record of a list, how far from its start."""
    column = len(before) + 1
    return f"{path}{place}:{column}" if place.startswith(":") else f"{path}{place}, {column} into the record"


def _parse_cells(row: CsvCells, where: str) -> dict[str, Any]:
    if len(row.cells) != len(row.header):
        raise RecordError(
            "wrong number of columns", f"the header names {len(row.header)} columns, this row has {len(row.cells)}"
        )
    record: dict[str, Any] = {}
    for name, cell in zip(row.header, row.cells, strict=True):
        try:
            cell.encode("utf-8")
        except UnicodeEncodeError as error:
            byte = ord(cell[error.start]) - 0xDC00
            raise RecordError("not UTF-8", f"{where}: not valid UTF-8 (byte 0x{byte:02x}) in column {name!r}") from None
        if name not in JSON_COLUMNS:
            record[name] = cell
        elif cell.strip():
            record[name] = parse_json(cell, f"column {name!r}")
    return record


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RecordError("duplicate key", f"{twice!r} is there twice in one object")
    return tree


def _refuse_constant(name: str) -> NoReturn:
    raise RecordError("not JSON", f"not valid JSON: {name} is no JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)
