"""From the fields of a record to a Conversation, Text or Tokens: what each record format means.

Pure functions over JSON values, which may be anything; what does not fit is a RecordError. Fields that would change
what is trained are understood or refused by name, never dropped; all other fields are harmless.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft_dist.config import RecordFormat
from sft_dist.data import labels
from sft_dist.data.conversation import Conversation, Message, Record, RecordError, Text, Tokens, check_record
from sft_dist.data.messages import MEDIA, message_of, messages_of, refuse_fields, tools_of, weight_of
from sft_dist.data.parsing import kind, short

Fields = Mapping[str, Any]

# The fields that a record of each format must have, in the order in which formats are told apart. Labelled records are
# not told by their fields: head.kind says that they are.
REQUIRED: dict[RecordFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "tokens": ("input_ids",),
    "text": ("text",),
}

MASKS = ("labels", "loss_mask", "completion_mask", "assistant_masks")
IGNORED_LABEL = -100

# What would change the training here or in other tools, and what to write instead.
_REFUSED = MEDIA | {"train": "it belongs to messages; a record has `weight`"}
_REFUSED_OF_CONVERSATION = {
    "system_prompt": "write it as the first message",
    "documents": "write them into a message",
    "chat_template": "give the template in data.chat_template",
    "chat_template_kwargs": "give variables of the template in data.template_kwargs",
}
_REFUSED_SYSTEM = {"system": "write it as the first message"}

# All fields that a record is asked for.
FIELDS = frozenset(
    (
        *("id", "weight", "system", "input", "history", "label", "tools", "functions", "attention_mask"),
        *("position_ids", "candidates", "text_pair"),
    )
).union(*REQUIRED.values(), MASKS, _REFUSED, _REFUSED_OF_CONVERSATION)

# csv knows only text.
_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def format_of(fields: Fields) -> RecordFormat:
    """The first format whose fields are all there (null is not there). Raises RecordError for none."""
    for name, required in REQUIRED.items():
        if _has(fields, required):
            return name
    expected = "; ".join(map(_quoted, REQUIRED.values()))
    raise RecordError("unknown format", f"expected one of {expected}; fields found: {_names(fields)}")


def fields_read(names: Collection[str]) -> list[str]:
    """Which columns of a table matter; all of them where they are of no known format, for errors to show."""
    if any(set(required) <= set(names) for required in REQUIRED.values()):
        return [name for name in names if name in FIELDS]
    return list(names)


def convert(fields: Fields, format: RecordFormat, *, index: int, source: str, where: str, default_id: str) -> Record:
    """One record of a known format. Raises RecordError."""
    if format in REQUIRED and not _has(fields, REQUIRED[format]):
        raise RecordError(
            "unknown format",
            f"this source is of format {format}: expected {_quoted(REQUIRED[format])}; fields found: {_names(fields)}",
        )
    identity = default_id if fields.get("id") in (None, "") else str(fields["id"])
    weight = weight_of(fields.get("weight"), "the record")
    refuse_fields(fields, _REFUSED, "the record")
    record: Record
    label = ""
    if format == "labelled_chat":
        format, fields, label = _beside(fields)
    if format == "labelled":
        record = _labelled(fields, identity, index, source, where, weight)
    elif format == "text":
        record = Text(identity, index, source, where, weight, fields["text"])
    elif format == "tokens":
        record = Tokens(identity, index, source, where, weight, *_token_ids(fields))
    else:
        refuse_fields(fields, _REFUSED_OF_CONVERSATION, "the record")
        messages, tools = _MESSAGES_OF[format](fields), tools_of(fields)
        record = Conversation(
            *(identity, index, source, where, weight, messages, tools), label=label, keeps_turns=bool(label)
        )
    check_record(record)
    return record


def _labelled(fields: Fields, identity: str, index: int, source: str, where: str, weight: float) -> Record:
    """A text, a pair of texts or messages; without a `label` for prediction only."""
    label = labels.written(fields.get("label"))
    if fields.get("text") is not None:
        return Text(identity, index, source, where, weight, fields["text"], fields.get("text_pair"), label=label)
    for name in ("messages", "conversations"):
        if fields.get(name) is not None:
            refuse_fields(fields, _REFUSED_OF_CONVERSATION, "the record")
            messages = _system(fields) + messages_of(fields[name], name)
            return Conversation(identity, index, source, where, weight, messages, tools_of(fields), label=label)
    raise RecordError(
        "unknown format",
        f"a record with a label (head.kind) has `text`, `text` and `text_pair`, or `messages`; fields found: "
        f"{_names(fields)}",
    )


def _beside(fields: Fields) -> tuple[RecordFormat, Fields, str]:
    """The format of a record for a head beside the language model's, its other fields, and its label as JSON text.

    A text or tokens train the language model alone: "".
    """
    format, label = format_of(fields), labels.written(fields.get("label"))
    if format in _MESSAGES_OF:
        return format, {name: value for name, value in fields.items() if name != "label"}, label
    if label != labels.NO_LABEL:
        raise RecordError(
            "unsupported field",
            f"the record has `label` beside {_quoted(REQUIRED[format])}; with head.language_model_weight only "
            "conversations (`messages` and the like) have labels",
        )
    return format, fields, ""


def _openai(fields: Fields) -> tuple[Message, ...]:
    refuse_fields(fields, _REFUSED_SYSTEM, "the record")
    return messages_of(fields["messages"], "messages")


def _sharegpt(fields: Fields) -> tuple[Message, ...]:
    system, messages = _system(fields), messages_of(fields["conversations"], "conversations")
    if system and messages[0].role == "system":
        raise RecordError("two system messages", "the record has `system`, and its first message is one too")
    return system + messages


def _prompt_completion(fields: Fields) -> tuple[Message, ...]:
    refuse_fields(fields, _REFUSED_SYSTEM, "the record")
    _refuse_rejected(fields.get("label"))
    prompt, completion = _side(fields, "prompt", "user"), _side(fields, "completion", "assistant")
    if not any(message.role == "assistant" for message in completion):
        raise RecordError("no assistant turn", "no message of the completion has role 'assistant'")
    # The completion is what the author wants learned; answers inside the prompt are context.
    given = tuple(
        replace(message, train=False) if message.role == "assistant" and message.train is None else message
        for message in prompt
    )
    return given + completion


def _refuse_rejected(label: Any) -> None:
    if label in (None, ""):
        return
    is_good = _LABELS.get(str(label).strip().lower())
    if is_good is None:
        raise RecordError("unsupported field", f"the record has `label`: {short(label)}; expected true or false")
    if not is_good:
        raise RecordError("rejected answer", "`label` is false: the completion is an example of what not to write")


def _alpaca(fields: Fields) -> tuple[Message, ...]:
    parts = [fields["instruction"], fields.get("input") or ""]
    for name, part in zip(("instruction", "input"), parts, strict=True):
        if not isinstance(part, str):
            raise RecordError("no text", f"`{name}` must be text, found {kind(part)}")
    question = "\n\n".join(filter(None, parts))
    if not question:
        raise RecordError("no text", "`instruction` and `input` are empty")
    history = fields.get("history") or []
    if not isinstance(history, list):
        raise RecordError("no messages", f"`history` must be a list of [question, answer], found {kind(history)}")
    turns = [*history, [question, fields["output"]]]
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, list) or len(turn) != 2:
            raise RecordError("no messages", f"entry {number} of `history` must be [question, answer]")
        for role, content in zip(("user", "assistant"), turn, strict=True):
            messages.append(message_of({"role": role, "content": content}, f"message {len(messages) + 1}"))
    return _system(fields) + tuple(messages)


_MESSAGES_OF: dict[RecordFormat, Callable[[Fields], tuple[Message, ...]]] = {
    "messages": _openai,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
}


def _system(fields: Fields) -> tuple[Message, ...]:
    """The message that a top-level `system` stands for: none if it is empty, as where all records have the field."""
    system = fields.get("system")
    return () if system in (None, "") else (message_of({"role": "system", "content": system}, "`system`"),)


def _side(fields: Fields, name: str, role: str) -> tuple[Message, ...]:
    value = fields[name]
    return (Message(role, value),) if isinstance(value, str) else messages_of(value, name)


def _token_ids(fields: Fields) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """(ids int32 [T], is_target bool [T]) of a pre-tokenised record."""
    ids = _integers(fields["input_ids"], "input_ids")
    if not ids or min(ids) < 0 or max(ids) > np.iinfo(np.int32).max:
        raise RecordError("token ids", "`input_ids` must hold ids from 0 to 2^31 - 1, at least one")
    # Other tools lay out padding and packed sequences by these; here a record is one sequence of exactly its tokens.
    for name, expected in (("attention_mask", [1] * len(ids)), ("position_ids", list(range(len(ids))))):
        if fields.get(name) is not None and fields[name] != expected:
            raise RecordError("token ids", f"`{name}` says that the record is padded or packed; expected one sequence")
    given = [name for name in MASKS if fields.get(name) is not None]
    if len(given) != 1:
        raise RecordError("token ids", f"expected one of {_quoted(MASKS)}; found {_quoted(given)}")
    mask = _integers(fields[given[0]], given[0], may_be_bool=given[0] != "labels")
    if len(mask) != len(ids):
        raise RecordError("token ids", f"`input_ids` has {len(ids)} entries, `{given[0]}` has {len(mask)}")
    if given[0] != "labels":
        if not set(mask) <= {0, 1}:
            raise RecordError("token ids", f"`{given[0]}` must hold 0 and 1 only")
        return np.array(ids, np.int32), np.array(mask, np.bool_)
    for place, (token, label) in enumerate(zip(ids, mask, strict=True)):
        if label not in (token, IGNORED_LABEL):
            raise RecordError(
                "token ids",
                f"`labels` at position {place} is {label}, `input_ids` is {token}; a label is its own token "
                f"(not the next one) or {IGNORED_LABEL}",
            )
    return np.array(ids, np.int32), np.array([label != IGNORED_LABEL for label in mask], np.bool_)


def _integers(value: Any, name: str, *, may_be_bool: bool = False) -> list[int]:
    if not isinstance(value, list):
        raise RecordError("token ids", f"`{name}` must be a list, found {kind(value)}")
    strange = set(map(type, value)) - ({int, bool} if may_be_bool else {int})
    if strange:
        found = next(item for item in value if type(item) in strange)
        raise RecordError("token ids", f"`{name}` must hold integers, found {kind(found)}")
    return value


def _has(fields: Fields, required: tuple[str, ...]) -> bool:
    return all(fields.get(name) is not None for name in required)


def _quoted(names: tuple[str, ...] | list[str]) -> str:
    return " and ".join(f"`{name}`" for name in names) or "none"


def _names(fields: Fields) -> str:
    return ", ".join(sorted(name for name in fields if fields[name] is not None)) or "none"
