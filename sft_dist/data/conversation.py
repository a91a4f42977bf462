"""What was said, or written: records of three kinds, validated. No tokens, no templates."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Of messages. `text` is the role of the one message that a plain text is.
ROLES = ("system", "developer", "user", "assistant", "tool", "text")


class RecordError(Exception):
    """A record that cannot become a trained sample. `reason` is what it is counted by, `detail` what was seen."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


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
    """What all kinds share: `where` names it for people (file:line), `index` is its place in the input order."""

    id: str
    index: int
    source: str
    where: str
    weight: float


@dataclass(frozen=True, slots=True)
class Conversation(Record):
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Text(Record):
    """A plain text: all of its tokens are trained."""

    text: str


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
        case Text(text=text):
            content = text
        case Tokens(ids=ids, is_target=is_target):
            content = [ids.tolist(), is_target.tolist()]
        case _:
            raise AssertionError(record)
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()[:16]


def _plain(message: Message) -> list[Any]:
    calls = [[call.name, call.arguments] for call in message.tool_calls]
    return [message.role, message.content, message.reasoning, calls, message.name, message.train, message.weight]


def check_text(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RecordError("broken text", f"{what} has a lone surrogate, which is no Unicode text") from None


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


def check_conversation(conversation: Conversation) -> None:
    """Raise RecordError unless it can be trained on: known roles, real text, an answer that says something."""
    for text in texts_of(conversation.tools):
        check_text(text, "tools")
    for number, message in enumerate(conversation.messages, start=1):
        _check_message(message, number)
    if not any(message.role == "assistant" for message in conversation.messages):
        raise RecordError("no assistant turn", f"{len(conversation.messages)} messages, none with role 'assistant'")


def _check_message(message: Message, number: int) -> None:
    if message.role not in ROLES[:-1]:
        raise RecordError(
            "unknown role", f"message {number} has role {message.role!r}; expected {', '.join(ROLES[:-2])} or tool"
        )
    for text in (message.content, message.reasoning, message.name, message.tool_call_id):
        check_text(text or "", f"message {number}")
    for call in message.tool_calls:
        for text in (call.name, call.id or "", *texts_of(call.arguments)):
            check_text(text, f"message {number}")
    if message.role == "assistant":
        if not (message.content or "").strip() and not message.tool_calls:
            raise RecordError("empty answer", f"message {number} is an assistant turn without text")
    elif message.tool_calls or message.reasoning is not None:
        raise RecordError("not an assistant", f"message {number} ({message.role}) has tool calls or reasoning")
    elif message.content is None:
        raise RecordError("no text", f"message {number} ({message.role}): content is null")
