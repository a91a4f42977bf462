"""Text stays text: stand-ins for all that looks like a control token, while the template runs.

A stand-in is one private-use character that occurs nowhere in the conversation. data/rendering.py encodes what it
stands for as ordinary text, in the place where it stands.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from sft_dist.data.conversation import Conversation, RecordError, ToolCall, texts_of
from sft_dist.data.marks import Marks

# The private-use planes 15 and 16.
_STAND_IN_BASES = (0xF0000, 0x100000)
_STAND_INS_PER_BASE = 0xFFFE
NO_MARK = chr(_STAND_IN_BASES[1] + _STAND_INS_PER_BASE - 1)  # a character that no mark has
OTHER_TEXT = chr(_STAND_IN_BASES[1] + _STAND_INS_PER_BASE)  # what no message says


def escape_text(marks: Marks, text: str) -> tuple[str, dict[str, str]]:
    """A plain text with stand-ins for all that looks like a control or markup token, and what they stand for."""
    stand_in_of = _stand_ins(marks, text)
    if not stand_in_of:
        return text, {}
    escaped = _pattern_of(stand_in_of).sub(lambda match: stand_in_of[match.group()], text)
    return escaped, {character: written for written, character in stand_in_of.items()}


def escape(marks: Marks, conversation: Conversation) -> tuple[Conversation, dict[str, str]]:
    """Replace text that looks like a control token by single stand-in characters, everywhere.

    Markup tokens (added, not special: <think>, <tool_call>) are part of what a model writes, so they stay
    tokens in assistant messages and become text in all others.
    """
    stand_in_of = _stand_ins(marks, "\n".join(all_texts(conversation)))
    if not stand_in_of:
        return conversation, {}
    everywhere = _pattern_of(stand_in_of)
    control = [text for text in stand_in_of if text in marks.control]
    in_answers = _pattern_of(control) if control else re.compile("(?!)")
    escaped = mapped(
        conversation,
        lambda text: in_answers.sub(lambda match: stand_in_of[match.group()], text),
        lambda text: everywhere.sub(lambda match: stand_in_of[match.group()], text),
    )
    return escaped, {character: text for text, character in stand_in_of.items()}


def without_edges(marks: Marks, text: str) -> str:
    """The text with other characters at its edges, where those could join with what stands beside them."""
    body = text.strip()
    if not marks.may_join(body):
        return text
    return text.replace(body, f"{NO_MARK}{body[1:-1]}{NO_MARK}" if len(body) > 1 else NO_MARK, 1)


def mapped(
    conversation: Conversation, of_answers: Callable[[str], str], of_others: Callable[[str], str]
) -> Conversation:
    """A conversation with every text changed."""

    def changed(value: Any, change: Callable[[str], str]) -> Any:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, dict):
            return {changed(key, change): changed(item, change) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(changed(item, change) for item in value)
        return value

    messages = []
    for message in conversation.messages:
        change = of_answers if message.role == "assistant" else of_others
        calls = tuple(
            ToolCall(change(call.name), changed(call.arguments, change), changed(call.id, change))
            for call in message.tool_calls
        )
        messages.append(
            replace(
                message,
                content=changed(message.content, change),
                reasoning=changed(message.reasoning, change),
                tool_calls=calls,
                name=changed(message.name, change),
                tool_call_id=changed(message.tool_call_id, change),
            )
        )
    return replace(conversation, messages=tuple(messages), tools=changed(conversation.tools, of_others))


def _stand_ins(marks: Marks, written: str) -> dict[str, str]:
    """A private-use character that is not in `written` for every control or markup text that is."""
    found = marks.found_in(written)
    if not found:
        return {}
    base = next((b for b in _STAND_IN_BASES if not any(b <= ord(c) < b + _STAND_INS_PER_BASE for c in written)), None)
    if base is None or len(found) > _STAND_INS_PER_BASE:
        raise RecordError("private-use text", "it has control-token text and characters of both private-use planes")
    return {text: chr(base + i) for i, text in enumerate(found)}


def _pattern_of(texts: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))


def all_texts(conversation: Conversation) -> Iterator[str]:
    """Whatever is said in a conversation, in any role and any field."""
    for message in conversation.messages:
        yield message.content or ""
        yield message.reasoning or ""
        yield message.name or ""
        yield message.tool_call_id or ""
        for call in message.tool_calls:
            yield call.name
            yield call.id or ""
            yield from texts_of(call.arguments)
    yield from texts_of(conversation.tools)
