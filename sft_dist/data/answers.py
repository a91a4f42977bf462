"""Where an answer ends in rendered text, and whether it is what its author wrote."""

import json
from collections.abc import Iterator
from typing import Any

from sft_dist.data.conversation import Message, RecordError, short
from sft_dist.data.marks import Marks


def answer_ends(
    marks: Marks, message: Message, number: int, start: int, text: str, plain_stop: str | None
) -> tuple[int, ...]:
    """Where the answer that begins at `start` of its own rendering may end, the best place first.

    After the stop token: a control token behind all that the author wrote. Behind tool calls, whose syntax may close
    with several, it is `plain_stop`, the one that ends answers without calls, and where that does not follow the last
    one. Raises RecordError where there is none.
    """
    matches = list(marks.control_in(text, start))
    for place, match in enumerate(matches):
        if not _is_answer(marks, message, text[start : match.start()]):
            continue
        if message.tool_calls:
            closing = range(place, len(matches))
            place = next((i for i in closing if matches[i].group() == plain_stop), len(matches) - 1)
        first_end = end = matches[place].end()
        for following in matches[place + 1 :]:
            if following.start() != end:
                break
            end = following.end()
        return tuple(dict.fromkeys((end, first_end)))
    rendered = text[start:]
    if not matches:
        example = (
            f"; of the tokenizer's control tokens {', '.join(marks.control[:3])} could do" if marks.control else ""
        )
        raise RecordError(
            "no stop token",
            f"message {number + 1}: the template puts no control token after the answer ({short(rendered)}), so the "
            "model would not learn to stop: end assistant messages with eos_token in the template, or name the "
            f"template's own end marker in model.control_tokens{example}",
        )
    if message.reasoning and message.reasoning.strip() not in rendered:
        raise RecordError(
            "template drops a message", f"message {number + 1}: the template does not write the reasoning of the answer"
        )
    raise RecordError(
        "template changes the answer",
        f"message {number + 1}: written {short(message.content or '')}, rendered {short(rendered)}",
    )


def _is_answer(marks: Marks, message: Message, body: str) -> bool:
    """Whether a rendered output is what was written.

    Without tool calls: the same text but for white space around its parts, between nothing but tokens of the template
    (an empty <think></think>, the name of a channel between two control tokens); words of its own it may not add.
    With them the syntax is the template's: reasoning, then content; every name in its order; every argument.
    """
    parts = [message.reasoning or "", message.content or ""]
    if not message.tool_calls:
        if not message.reasoning and body.strip() == parts[1].strip():
            return True
        expected = [piece for part in parts for piece in marks.between(part)]
        found = marks.between(marks.without_channels(body))
        return found == expected
    at = 0
    for piece in (piece for part in parts for piece in marks.between(part)):
        at = body.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    places = [0]
    for call in message.tool_calls:
        at = body.find(call.name, places[-1])
        if at < 0:
            return False
        places.append(at + len(call.name))
    # The arguments of a call lie between the names of its neighbours, before or behind its own name.
    ends = [*(end - len(call.name) for end, call in zip(places[2:], message.tool_calls[1:], strict=True)), len(body)]
    return all(
        _is_shown(leaf, body[begin:end])
        for call, begin, end in zip(message.tool_calls, places[:-1], ends, strict=True)
        for leaf in _leaves(call.arguments)
    )


def _is_shown(leaf: str, body: str) -> bool:
    forms = (leaf, json.dumps(leaf, ensure_ascii=False)[1:-1], json.dumps(leaf)[1:-1])
    return any(form in body for form in forms)


def _leaves(value: Any) -> Iterator[str]:
    """Keys and values of a tree of arguments as they appear in text."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value if isinstance(value, str) else json.dumps(value)
