"""What was said, or written: records of three kinds, validated. No tokens, no templates."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Of messages. `text` is the role of the one message that a plain text is.
ROLES = ("system", "developer", "user", "assistant", "tool", "text")

_LONGEST_DETAIL = 1000
_DEEPEST = 100


class RecordError(Exception):
    """A record that cannot become a trained sample. `reason` is what it is counted by, `detail` what was seen."""

    def __init__(self, reason: str, detail: str) -> None:
        detail = printable(detail)
        if len(detail) > _LONGEST_DETAIL:
            detail = detail[: _LONGEST_DETAIL - 100] + " … " + detail[-90:]
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def printable(text: str) -> str:
    """Text that any file and terminal takes: lone surrogates are spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that an assistant makes; `arguments` is the parsed JSON object."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One message. `content` is None where the author wrote null (beside tool calls)."""

    role: str
    content: str | None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    train: bool | None = None  # the author's mark, if any
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Record:
    """What all kinds share: `where` names it for people (file:line), `index` is its place in the input order.

    `label` is JSON text; "null" where a record of a labelled format has none, "" in all other formats. `keeps_turns`:
    it is rendered with its answers, as without a label, for a head beside the language model's.
    """

    id: str
    index: int
    source: str
    where: str
    weight: float
    label: str = field(default="", kw_only=True)
    keeps_turns: bool = field(default=False, kw_only=True)


@dataclass(frozen=True, slots=True)
class Conversation(Record):
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Text(Record):
    """A plain text, all of whose tokens are trained; or, with a label, a text or pair of texts."""

    text: str
    pair: str | None = None


@dataclass(frozen=True, slots=True)
class Tokens(Record):
    """Token ids made elsewhere, and which of them are targets."""

    ids: NDArray[np.int32]  # [T]
    is_target: NDArray[np.bool_]  # [T]


def digest(record: Record) -> bytes:
    """16 bytes that are equal for exactly equal content (not id, source or weight)."""
    match record:
        case Conversation(messages=messages, tools=tools):
            content: Any = [[_plain(message) for message in messages], list(tools)]
        case Text(text=text, pair=pair):
            content = text if pair is None else [text, pair]
        case Tokens(ids=ids, is_target=is_target):
            content = [ids.tolist(), is_target.tolist()]
        case _:
            raise AssertionError(record)
    is_labelled = record.label and not (record.keeps_turns and record.label == "null")
    content = [content, record.label] if is_labelled else content
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()[:16]


def _plain(message: Message) -> list[Any]:
    calls = [[call.name, call.arguments, call.id] for call in message.tool_calls]
    said = [message.role, message.content, message.reasoning, calls, message.name, message.tool_call_id]
    return [*said, message.train, message.weight]


def check_text(text: str, what: str) -> None:
    """Raise RecordError for a lone surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RecordError("broken text", f"{what} has a lone surrogate, which is no Unicode text") from None


def check_json(value: Any, what: str) -> None:
    """Raise RecordError unless a template can write this tree as JSON: objects, lists, real text, finite numbers."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RecordError("broken text", f"{what} has a lone surrogate, which is no Unicode text") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise RecordError("not JSON", f"{what} cannot be written as JSON: {error}") from None
    # Templates, digests and pickles recurse: what comes near Python's limit here would pass it there.
    if text.count("[") + text.count("{") > _DEEPEST and _is_deeper(value, _DEEPEST):
        raise RecordError("nested too deeply", f"{what}: more than {_DEEPEST} objects and lists in each other")


def _is_deeper(value: Any, num_levels: int) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else None
    if items is None:
        return False
    return num_levels == 0 or any(_is_deeper(item, num_levels - 1) for item in items)


def texts_of(value: Any) -> Iterator[str]:
    """Every string in a tree of JSON values, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from texts_of(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from texts_of(item)


def check_record(record: Record) -> None:
    """Raise RecordError for a record that nothing can be trained on, or that is no Unicode text."""
    check_text(record.id, "id")
    match record:
        case Conversation():
            check_conversation(record)
        case Text(text=text, pair=pair):
            for name, part in (("text", text), ("text_pair", "-" if pair is None else pair)):
                if not isinstance(part, str) or not part.strip():
                    raise RecordError("no text", f"`{name}` must be text with more than white space in it")
                check_text(part, f"`{name}`")
        case Tokens(is_target=is_target):
            if not is_target[1:].any():
                raise RecordError("no target", "no token after the first is a target")


def check_conversation(conversation: Conversation) -> None:
    """Raise RecordError unless it can be trained on: known roles, real text, an answer that says something."""
    check_json(conversation.tools, "tools")
    for number, message in enumerate(conversation.messages, start=1):
        _check_message(message, number)
    if not conversation.label and not any(message.role == "assistant" for message in conversation.messages):
        raise RecordError("no assistant turn", f"{len(conversation.messages)} messages, none with role 'assistant'")


def _check_message(message: Message, number: int) -> None:
    if message.role not in ROLES[:-1]:
        raise RecordError(
            "unknown role", f"message {number} has role {message.role!r}; expected {', '.join(ROLES[:-2])} or tool"
        )
    for text in (message.content, message.reasoning, message.name, message.tool_call_id):
        check_text(text or "", f"message {number}")
    for call in message.tool_calls:
        check_text(call.name + (call.id or ""), f"message {number}")
        check_json(call.arguments, f"message {number}: arguments of {call.name!r}")
    if message.role == "assistant":
        if not (message.content or "").strip() and not message.tool_calls:
            raise RecordError("empty answer", f"message {number} is an assistant turn without text")
    elif message.tool_calls or message.reasoning is not None:
        raise RecordError("not an assistant", f"message {number} ({message.role}) has tool calls or reasoning")
    elif message.content is None:
        raise RecordError("no text", f"message {number} ({message.role}): content is null")


def short(text: str) -> str:
    """A text as errors quote it."""
    return repr(text if len(text) <= 60 else text[:40] + " … " + text[-15:])
