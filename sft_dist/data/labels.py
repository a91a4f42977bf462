"""Labels of records: how they are written, which there are, and what the outputs of a head are to say of each.

Pure functions of JSON values. A prepared data set holds labels as they were written (JSON text), so that one prepared
set serves every head; a `LabelSet`, which follows from the run file and the training data, gives them numbers. What it
cannot number is a fault with a name, never another label.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.conversation import RecordError, check_text
from sft_dist.data.parsing import kind, short

Kind = Literal["single_label", "multi_label", "regression"]
Float64 = NDArray[np.float64]

NO_LABEL = "null"
_OF_NUMBERS = "value"  # name of the one output of a regression


class LabelFault(Exception):
    """A label that has no number. `reason` is what it is counted by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class LabelSet:
    """The outputs of a head and their names, in the order of their ids.

    `is_read`: False in prediction, where no label is looked at.
    """

    kind: Kind
    names: tuple[str, ...]
    is_read: bool = True

    @property
    def width(self) -> int:
        """Numbers in a target: the id of one label, or one number for every output."""
        return 1 if self.kind == "single_label" else len(self.names)

    def target(self, label: str) -> Float64:
        """float64 [width]: the label's id; 1 for each label that applies and else 0; or the numbers themselves.

        Raises LabelFault.
        """
        if not self.is_read:
            return np.zeros(self.width)
        value = _value(label, self.kind)
        match self.kind:
            case "single_label":
                return np.array([self._id(value)], np.float64)
            case "multi_label":
                target = np.zeros(len(self.names))
                target[[self._id(item) for item in value]] = 1.0
                return target
            case "regression":
                numbers = value if isinstance(value, list) else [value]
                if len(numbers) != len(self.names):
                    raise LabelFault("wrong number of values", f"{len(numbers)} numbers, the head has {self._count()}")
                return np.array(numbers, np.float64)

    def _id(self, value: Any) -> int:
        name = _name(value)
        if name in self.names:
            return self.names.index(name)
        if type(value) is not int or all(_is_integer(known) for known in self.names):
            raise LabelFault("unknown label", f"{short(name)} is none of the {self._count()} (head.labels)")
        if not 0 <= value < len(self.names):
            raise LabelFault("label out of range", f"{value} is no place in the {self._count()} (head.labels)")
        return value

    def _count(self) -> str:
        return f"{len(self.names)} output{'s' if len(self.names) > 1 else ''}"


@dataclass(frozen=True, slots=True)
class LabelTable:
    """The labels of one data set under a label set: `targets` [num_distinct, width], and faults by distinct label."""

    targets: Float64
    faults: dict[int, LabelFault]

    def without(self, labels: Set[int]) -> "LabelTable":
        """The same with no fault in these distinct labels: they are none."""
        return LabelTable(self.targets, {place: fault for place, fault in self.faults.items() if place not in labels})


def written(value: Any) -> str:
    """A record's label as JSON text, "null" where there is none. Raises RecordError for what no head could learn."""
    if value is None or value == "":
        return NO_LABEL
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, (str, bool, int, float)) or (isinstance(value, list) and isinstance(item, bool)):
            raise RecordError("bad label", f"`label` holds {kind(item)}; expected text, numbers, or a list of those")
        if isinstance(item, float) and not math.isfinite(item):
            raise RecordError("bad label", f"`label` is {item}, which is no finite number")
        if isinstance(item, str):
            check_text(item, "`label`")
            if not item.strip():
                raise RecordError("bad label", "`label` is empty text")
    return json.dumps(value, ensure_ascii=False)


def find_names(kind: Kind, given: tuple[str, ...], distinct: Sequence[str], counts: Sequence[int]) -> tuple[str, ...]:
    """Names of the outputs: those given, else those of these labels (JSON texts, and how often each is there), sorted.

    Integers are sorted as numbers. Labels of another type than most, or that no head of this kind has, name nothing.
    """
    if given:
        return given
    usual = _usual_type(kind, distinct, counts)
    values = []
    for label in distinct:
        try:
            value = _value(label, kind)
        except LabelFault:
            continue
        if _type(value) == usual:
            values.append(value)
    if kind == "regression":
        widths = Counter(len(value) if isinstance(value, list) else 1 for value in values)
        width = widths.most_common(1)[0][0] if widths else 0
        return (_OF_NUMBERS,) if width == 1 else tuple(f"{_OF_NUMBERS}_{place}" for place in range(width))
    items = [item for value in values for item in (value if isinstance(value, list) else [value])]
    names = {_name(item) for item in items}
    # Decimal: int() reads no more than some thousand digits. Names of one number, such as 7 and 07, need an order too.
    is_numbered = all(map(_is_integer, names))
    return tuple(sorted(names, key=lambda name: (Decimal(name), name)) if is_numbered else sorted(names))


def tabulate(labels: LabelSet, distinct: Sequence[str], counts: Sequence[int]) -> LabelTable:
    """Targets and faults of distinct labels; `counts` tell which type is the usual one."""
    usual = _usual_type(labels.kind, distinct, counts)
    targets, faults = np.zeros((len(distinct), labels.width)), {}
    for place, label in enumerate(distinct):
        try:
            if labels.is_read and (found := _type(_value(label, labels.kind))) != usual:
                raise LabelFault("mixed label types", f"{short(label)} is {found}, most labels here are {usual}")
            targets[place] = labels.target(label)
        except LabelFault as fault:
            faults[place] = fault
    return LabelTable(targets, faults)


def _usual_type(kind: Kind, distinct: Sequence[str], counts: Sequence[int]) -> str | None:
    """The type of most labels; of two that are as frequent, the first in the alphabet."""
    found: Counter[str] = Counter()
    for label, count in zip(distinct, counts, strict=True):
        try:
            found[_type(_value(label, kind))] += count
        except LabelFault:
            continue
    return min(found, key=lambda name: (-found[name], name)) if found else None


def _value(label: str, kind: Kind) -> Any:
    """What a head of this kind reads in a label. Raises LabelFault for a label of another kind."""
    value = json.loads(label or NO_LABEL)
    if value is None:
        raise LabelFault("no label", "the record has no `label`")
    match kind:
        case "single_label":
            if isinstance(value, (list, float)):
                raise LabelFault(
                    "wrong kind of label", f"{short(label)}; head.kind: single_label expects text or an id"
                )
        case "multi_label":
            value = _parsed(value) if isinstance(value, str) else value  # csv knows only text
            if not isinstance(value, list) or any(isinstance(item, float) for item in value):
                raise LabelFault(
                    "wrong kind of label", f"{short(label)}; head.kind: multi_label expects a list of labels"
                )
        case "regression":
            value = _parsed(value) if isinstance(value, str) else value
            numbers = value if isinstance(value, list) else [value]
            if not numbers or not all(type(item) in (int, float) and _is_finite(item) for item in numbers):
                raise LabelFault("wrong kind of label", f"{short(label)}; head.kind: regression expects numbers")
    return value


def _parsed(text: str) -> Any:
    """The JSON value that a text is, else the text. Raises LabelFault for a list that would be refused as a list."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if isinstance(value, list):
        try:
            written(value)
        except RecordError as error:
            raise LabelFault(error.reason, error.detail) from None
    return value


def _is_finite(value: int | float) -> bool:
    """Whether it is a finite float64."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _type(value: Any) -> str:
    """In words; lists by their items, and integers with other numbers where a list or label may hold both."""
    if isinstance(value, list):
        types = {_type(item) for item in value}
        return f"a list of {' and '.join(sorted(types))}" if len(types) > 1 else "a list"
    return {str: "text", bool: "true or false", int: "a number", float: "a number"}[type(value)]


def _name(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _is_integer(name: str) -> bool:
    return name.removeprefix("-").isdecimal()
