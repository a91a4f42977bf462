"""What a model sees and should write at inference, turn by turn, from transformers' own apply_chat_template.

Nothing here knows how the package renders. The sequence of control tokens that a conversation's structure demands is
read from a twin of it, in which every text is a word of plain letters.
"""

import datetime
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from jinja2 import TemplateError
from transformers.utils import chat_template_utils

from sft_dist.data.conversation import Conversation, Message, ToolCall, texts_of
from tests.helpers.zoo import DATE, Family

_SIMPLE = re.compile(r"[A-Za-z_]+")


class _Today(datetime.datetime):
    """The clock of whoever runs inference on the day that the tests say it is."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> "_Today":
        return cls(DATE.year, DATE.month, DATE.day, tzinfo=tz)


class Refused(Exception):
    """The template itself refuses a render that inference or training needs."""


@dataclass(frozen=True)
class Turn:
    """One answer: the text before it, what the model should write, and everything rendered up to it."""

    message: int
    prompt: str
    output: str  # up to and including the stop token
    own: str  # render of the conversation with this turn as its last message


@dataclass(frozen=True)
class Expected:
    """All turns of a conversation. `problem` says why no honest training sample exists, if so."""

    turns: tuple[Turn, ...]
    full: str
    problem: str | None = None


def render_text(family: Family, conversation: Conversation, upto: int, *, prompt: bool) -> str:
    """Raises Refused."""
    try:
        with mock.patch.object(chat_template_utils, "datetime", _Today):
            return str(
                family.tokenizer.apply_chat_template(
                    _dicts(family, conversation.messages[:upto]),
                    tools=list(conversation.tools) or None,
                    chat_template=family.source,
                    tokenize=False,
                    add_generation_prompt=prompt,
                    **family.kwargs,
                )
            )
    except (TemplateError, TypeError, ValueError) as error:
        raise Refused(str(error)) from None


def expected(family: Family, conversation: Conversation) -> Expected:
    """The turns as at inference. Raises Refused where the template refuses a part of the conversation."""
    full = render_text(family, conversation, len(conversation.messages), prompt=False)
    turns = []
    for number, message in enumerate(conversation.messages):
        if message.role != "assistant":
            continue
        prompt = render_text(family, conversation, number, prompt=True)
        own = render_text(family, conversation, number + 1, prompt=False)
        if not own.startswith(prompt):
            return Expected((), full, f"message {number}: the answer does not begin with its generation prompt")
        stop = (family.call_stop or family.stop) if message.tool_calls else family.stop
        at = own.rfind(stop, len(prompt)) if stop else -1
        if at < 0:
            return Expected((), full, f"message {number}: no stop token")
        turns.append(Turn(number, prompt, own[len(prompt) : at + len(stop)], own))
    return Expected(tuple(turns), full)


def added_ids(family: Family, text: str) -> list[int]:
    """The control and markup tokens of a text of the template with plain words in it, in order."""
    return only_added(family, family.tokenizer(text, add_special_tokens=False).input_ids)


def only_added(family: Family, ids: Sequence[int]) -> list[int]:
    added = family.tokenizer.added_tokens_decoder
    return [i for i in ids if i in added]


def has_added_text(family: Family, conversation: Conversation) -> bool:
    """Whether someone wrote what looks like an added token: then no plain call of the tokenizer gives the ids."""
    written = texts_written(family, conversation)
    return any(text in written for text in family.tokenizer.added_tokens_encoder)


def texts_written(family: Family, conversation: Conversation) -> str:
    return "\0".join(texts_of([_dicts(family, conversation.messages), conversation.tools]))


def missing(family: Family, conversation: Conversation) -> list[str]:
    """Texts of a conversation that no render shows: contents and schemas anywhere, answers in the render they end."""
    twin, markup = twin_of(family, conversation), _markup(family)
    lacking = []
    for written in (twin, conversation):
        own = {
            number: render_text(family, written, number + 1, prompt=False)
            for number, message in enumerate(written.messages)
            if message.role == "assistant"
        }
        anywhere = "\0".join([*own.values(), render_text(family, written, len(written.messages), prompt=False)])
        for number, message in enumerate(written.messages):
            parts = [part for text in _message_texts(message) for part in markup.split(text) if part.strip()]
            lacking += [part for part in parts if not is_shown(part, own.get(number, anywhere))]
        lacking += [tool["function"]["name"] for tool in written.tools if tool["function"]["name"] not in anywhere]
    return lacking


def template_reads(family: Family, conversation: Conversation) -> bool:
    """Whether a template does other things for what a message says than it does for a plain word in its place."""
    words: dict[str, str] = {}
    end = len(conversation.messages)
    plain = render_text(family, twin_of(family, conversation, words), end, prompt=False)
    back = re.sub("w[0-9]+w", lambda match: words.get(match.group(), match.group()), plain)
    rendered = render_text(family, conversation, end, prompt=False)
    return back != rendered or added_ids(family, plain) != added_ids(family, rendered)


def twin_of(family: Family, conversation: Conversation, words: dict[str, str] | None = None) -> Conversation:
    """The same structure with a plain word for every text; white space around texts stays, so do tokens in answers.

    `words` receives what each word stands for.
    """
    words = {} if words is None else words
    markup = _markup(family)

    def word(text: str) -> str:
        body = text.strip()
        if not body:
            return text
        start = text.index(body)
        name = f"w{len(words)}w"
        words[name] = body
        return f"{text[:start]}{name}{text[start + len(body) :]}"

    def answer(text: str) -> str:
        marks = [*markup.findall(text), ""]
        return "".join(word(part) + mark for part, mark in zip(markup.split(text), marks, strict=True))

    messages = []
    for message in conversation.messages:
        change = answer if message.role == "assistant" else word
        calls = tuple(replace(call, arguments=_mapped(call.arguments, change)) for call in message.tool_calls)
        changed = {
            name: None if text is None else change(text)
            for name, text in (("content", message.content), ("reasoning", message.reasoning))
        }
        messages.append(replace(message, tool_calls=calls, **changed))
    return replace(conversation, messages=tuple(messages), tools=tuple(_mapped(t, word) for t in conversation.tools))


def _markup(family: Family) -> re.Pattern[str]:
    added = family.tokenizer.added_tokens_decoder.values()
    texts = sorted((token.content for token in added if not token.special), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {
            (key if _SIMPLE.fullmatch(key) else change(key)): (
                item if key in ("type", "name", "required") else _mapped(item, change)
            )
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _message_texts(message: Message) -> list[str]:
    texts = [message.content or "", message.reasoning or ""]
    for call in message.tool_calls:
        texts += [call.name, *texts_of(call.arguments)]
    return [text for text in texts if text.strip()]


def is_shown(text: str, rendered: str) -> bool:
    body = text.strip()
    forms = (body, json.dumps(body, ensure_ascii=False)[1:-1], json.dumps(body)[1:-1])
    return any(form in rendered for form in forms)


def _dicts(family: Family, messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [_dict(family, message) for message in messages]


def _dict(family: Family, message: Message) -> dict[str, Any]:
    entry: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        entry |= dict.fromkeys(("reasoning_content", "reasoning", "thinking"), message.reasoning)
    if message.tool_calls:
        entry["tool_calls"] = [_call(family, call) for call in message.tool_calls]
    for name in ("name", "tool_call_id"):
        if getattr(message, name) is not None:
            entry[name] = getattr(message, name)
    return entry


def _call(family: Family, call: ToolCall) -> dict[str, Any]:
    as_text = family.arguments == "string"
    arguments = json.dumps(call.arguments, ensure_ascii=False) if as_text else call.arguments
    return {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": arguments}}
