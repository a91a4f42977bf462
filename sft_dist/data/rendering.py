"""Conversations to token sequences with a verified span for every message.

The tokenizer's Jinja template (or the one given) is the only source of text. Boundaries come from renders of
prefixes of the conversation, never from a search for the answer's text. Two rules give the tokens of inference:
no token crosses the start of an output, and text that someone wrote never becomes a control token. What cannot be
verified by decoding is refused by name.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.conversation import Conversation, Record, RecordError, digest
from sft_dist.data.renderer import Renderer
from sft_dist.data.sample import Sample, Span

# Stand-ins for control-token text inside messages while the template runs: the private-use planes 15 and 16.
_STAND_IN_BASES = (0xF0000, 0x100000)
_STAND_INS_PER_BASE = 0xFFFE


@dataclass(frozen=True, slots=True)
class _Layout:
    """One conversation as text: where each message starts and where each assistant output starts (characters)."""

    conversation: Conversation
    text: str  # rendered, with stand-ins
    stand_ins: dict[str, str]  # stand-in character -> text that someone wrote
    starts: tuple[int, ...]  # [messages + 1]
    output_starts: dict[int, int]  # assistant message -> character


def render(renderer: Renderer, records: Sequence[Record]) -> list[tuple[Sample, ...] | RecordError]:
    """Render a batch; the answer has one entry per record, in order: its samples, or why it was refused."""
    layouts = [_attempt(_lay_out, renderer, record) for record in records]
    good = [layout for layout in layouts if isinstance(layout, _Layout)]
    tokens = iter(_encode_layouts(renderer, good))
    results: list[tuple[Sample, ...] | RecordError] = []
    for layout in layouts:
        if isinstance(layout, RecordError):
            results.append(layout)
            continue
        encoded = next(tokens)
        if isinstance(encoded, RecordError):
            results.append(encoded)
        else:
            results.append(_attempt(_verified_sample, renderer, layout, encoded))
    return results


def _attempt(function: Any, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except RecordError as error:
        return error


def _lay_out(renderer: Renderer, conversation: Conversation) -> _Layout:
    messages, stand_ins = _without_control_text(renderer, conversation)
    full = _apply(renderer, messages, generation_prompt=False)
    starts, output_starts = [0], {}
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            header = _apply(renderer, messages[:number], generation_prompt=True)
            _check_prefix(full, header, number, "its generation prompt")
            output_starts[number] = len(header)
        if number == len(messages) - 1:
            starts.append(len(full))
            continue
        try:
            prefix = _apply(renderer, messages[: number + 1], generation_prompt=False)
        except RecordError:
            # Some templates refuse a lone system message: it then shares the span of the message after it.
            if message["role"] == "assistant":
                raise
            starts.append(starts[-1])
            continue
        _check_prefix(full, prefix, number, "the conversation up to it")
        starts.append(len(prefix))
    return _Layout(conversation, full, stand_ins, tuple(starts), output_starts)


def _apply(renderer: Renderer, messages: Sequence[dict[str, str]], *, generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        return renderer.apply(messages, generation_prompt=generation_prompt)
    except (TemplateError, TypeError, KeyError, IndexError, ValueError) as error:
        raise RecordError("template error", f"the chat template refuses it: {error}") from None


def _check_prefix(full: str, prefix: str, number: int, what: str) -> None:
    if not full.startswith(prefix):
        raise RecordError(
            "template rewrites history",
            f"message {number + 1}: the rendering of {what} is not how the whole conversation begins",
        )


def _without_control_text(
    renderer: Renderer, conversation: Conversation
) -> tuple[list[dict[str, str]], dict[str, str]]:
    """Replace text that looks like a control token by single stand-in characters.

    Markup tokens (added, not special: <think>, <tool_call>) are part of what a model writes, so they stay
    tokens in assistant messages and become text in all others.
    """
    written = "".join(message.content or "" for message in conversation.messages)
    texts = renderer.control_texts + renderer.markup_texts
    found = [text for text in texts if text and text in written]
    if not found:
        return [{"role": m.role, "content": m.content or ""} for m in conversation.messages], {}
    base = next((b for b in _STAND_IN_BASES if not any(b <= ord(c) < b + _STAND_INS_PER_BASE for c in written)), None)
    if base is None or len(found) > _STAND_INS_PER_BASE:
        raise RecordError("private-use text", "it has control-token text and characters of both private-use planes")
    stand_in_of = {text: chr(base + i) for i, text in enumerate(found)}
    longest_first = sorted(found, key=len, reverse=True)
    everywhere = re.compile("|".join(map(re.escape, longest_first)))
    control = [text for text in longest_first if text in renderer.control_texts]
    in_answers = re.compile("|".join(map(re.escape, control))) if control else None
    messages = []
    for message in conversation.messages:
        pattern = in_answers if message.role == "assistant" else everywhere
        content = message.content or ""
        if pattern is not None:
            content = pattern.sub(lambda match: stand_in_of[match.group()], content)
        messages.append({"role": message.role, "content": content})
    return messages, {character: text for text, character in stand_in_of.items()}


@dataclass(frozen=True, slots=True)
class _Tokens:
    ids: NDArray[np.int32]  # [T]
    begins: NDArray[np.int64]  # [T] first character
    ends: NDArray[np.int64]  # [T] character after the last


@dataclass(frozen=True, slots=True)
class _Piece:
    begin: int  # character
    text: str
    kind: str  # "first", "middle" or "stand-in"


def _encode_layouts(renderer: Renderer, layouts: Sequence[_Layout]) -> list[_Tokens | RecordError]:
    pieces = [_pieces(layout) for layout in layouts]
    backends = {"first": renderer.tokenizer.backend_tokenizer, "middle": renderer.middle_backend}
    encoded = {
        kind: iter(
            backend.encode_batch(
                [piece.text for group in pieces for piece in group if piece.kind == kind], add_special_tokens=False
            )
        )
        for kind, backend in backends.items()
    }
    results: list[_Tokens | RecordError] = []
    for layout, group in zip(layouts, pieces, strict=True):
        ids: list[int] = []
        begins: list[int] = []
        ends: list[int] = []
        problem = None
        for piece in group:
            if piece.kind == "stand-in":
                written = _attempt(_encode_written, renderer, layout.stand_ins[piece.text])
                if isinstance(written, RecordError):
                    problem = written
                    continue
                ids += written
                begins += [piece.begin] * len(written)
                ends += [piece.begin + 1] * len(written)
            else:
                encoding = next(encoded[piece.kind])
                ids += encoding.ids
                begins += [piece.begin + begin for begin, _ in encoding.offsets]
                ends += [piece.begin + end for _, end in encoding.offsets]
        tokens = _Tokens(np.array(ids, np.int32), np.array(begins, np.int64), np.array(ends, np.int64))
        results.append(tokens if problem is None else problem)
    return results


def _encode_written(renderer: Renderer, text: str) -> list[int]:
    """Ids of text that looks like a control token, none of which is one."""
    ids = renderer.plain_backend.encode(text, add_special_tokens=False).ids
    if not renderer.control_ids.isdisjoint(ids):
        # Unigram vocabularies hold control tokens as ordinary pieces: letter by letter none can match.
        ids = [i for letter in text for i in renderer.plain_backend.encode(letter, add_special_tokens=False).ids]
    if not renderer.control_ids.isdisjoint(ids):
        raise RecordError("control text", f"{text!r} cannot be written in this tokenizer without a control token")
    return list(ids)


def _pieces(layout: _Layout) -> list[_Piece]:
    """Cut the text at the start of every output and around stand-ins; pieces are encoded on their own."""
    cuts = {0, len(layout.text), *layout.output_starts.values()}
    for begin, character in enumerate(layout.text):
        if character in layout.stand_ins:
            cuts |= {begin, begin + 1}
    edges = sorted(cuts)
    pieces = []
    for begin, end in pairwise(edges):
        text = layout.text[begin:end]
        kind = "stand-in" if text in layout.stand_ins else "first" if begin == 0 else "middle"
        pieces.append(_Piece(begin, text, kind))
    return pieces


def _verified_sample(renderer: Renderer, layout: _Layout, tokens: _Tokens) -> tuple[Sample, ...]:
    conversation = layout.conversation
    boundaries = [_token_at(tokens, character, number) for number, character in enumerate(layout.starts)]
    spans: list[Span] = []
    turn = 0
    for number, message in enumerate(conversation.messages):
        start, end = boundaries[number], boundaries[number + 1]
        if number not in layout.output_starts:
            spans.append(Span(number, message.role, start, start, end, end, is_owned=True))
            continue
        output_start = _token_at(tokens, layout.output_starts[number], number)
        output_end = _output_end(renderer, layout, tokens, number, output_start, end)
        _check_decodes(renderer, layout, tokens, number, output_start, output_end)
        turn += 1
        spans.append(Span(number, message.role, start, output_start, output_end, end, is_owned=True, turn=turn))
    sample = Sample(
        conversation.id,
        conversation.index,
        conversation.source,
        tokens.ids,
        tuple(spans),
        num_turns=turn,
        weight=conversation.weight,
        digest=digest(conversation),
    )
    return (sample,)


def _token_at(tokens: _Tokens, character: int, number: int) -> int:
    """The first token that begins at or after a character; no token may lie across it."""
    index = int(np.searchsorted(tokens.begins, character, side="left"))
    if index and tokens.ends[index - 1] > character:
        raise RecordError("turn inside a token", f"message {number + 1}: a token lies across its boundary")
    return index


def _output_end(renderer: Renderer, layout: _Layout, tokens: _Tokens, number: int, output_start: int, end: int) -> int:
    """One past the stop token: the first control token right after what the author wrote."""
    written = layout.conversation.messages[number].content or ""
    forms = {written, written.rstrip(), written.lstrip(), written.strip()}
    output_begin = layout.output_starts[number]
    controls = [i for i in range(output_start, end) if int(tokens.ids[i]) in renderer.control_ids]
    for index in controls:
        body = _as_written(layout, layout.text[output_begin : int(tokens.begins[index])])
        if any(_is_answer(renderer, body, form) for form in forms):
            return index + 1
    if not controls:
        raise RecordError(
            "no stop token",
            f"message {number + 1}: the template puts no control token after the answer, so the model would not "
            "learn to stop; end assistant messages with eos_token in the template",
        )
    rendered = _as_written(layout, layout.text[output_begin : layout.starts[number + 1]])
    raise RecordError(
        "template changes the answer", f"message {number + 1}: written {_short(written)}, rendered {_short(rendered)}"
    )


def _is_answer(renderer: Renderer, body: str, form: str) -> bool:
    """Whether a rendered output is what was written, after nothing but white space and tokens of the template.

    Templates open answers with such marks (an empty <think></think>, a channel); words of their own they may not add.
    """
    if not body.endswith(form):
        return False
    lead = body[: len(body) - len(form)]
    for mark in renderer.control_texts + renderer.markup_texts:
        lead = lead.replace(mark, "")
    return not lead.strip()


def _check_decodes(
    renderer: Renderer, layout: _Layout, tokens: _Tokens, number: int, output_start: int, output_end: int
) -> None:
    """The trained span must decode to exactly the text that was rendered for it."""
    rendered = _as_written(layout, layout.text[layout.output_starts[number] : int(tokens.ends[output_end - 1])])
    decode = renderer.tokenizer.backend_tokenizer.decode
    output = tokens.ids[output_start:output_end].tolist()
    # Together with the token before: decoders of the sentencepiece family drop a leading space at the very start.
    before = tokens.ids[max(output_start - 1, 0) : output_start].tolist()
    decoded = decode(before + output, skip_special_tokens=False)
    expected = (decode(before, skip_special_tokens=False) if before else "") + rendered
    if decoded != expected:
        raise RecordError(
            "tokenizer changes the text",
            f"message {number + 1}: rendered {_short(expected)}, its tokens decode to {_short(decoded)}",
        )


def _as_written(layout: _Layout, text: str) -> str:
    for character, written in layout.stand_ins.items():
        text = text.replace(character, written)
    return text


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:40] + " … " + text[-15:])
