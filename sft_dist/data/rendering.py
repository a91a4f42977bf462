"""Records to token sequences with a verified span for every message.

The tokenizer's Jinja template (or the one given) is the only source of text; data/layout.py says where things lie in
it. Two rules give the tokens of inference: no token crosses the start of an output, and text that someone wrote never
becomes a control token. Every sequence must decode to its text; what cannot be verified is refused by name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.conversation import Conversation, Record, RecordError, Text, Tokens, digest
from sft_dist.data.layout import Layout, common_length, escape_text, lay_out
from sft_dist.data.renderer import Renderer
from sft_dist.data.sample import Sample, Span

Samples = tuple[Sample, ...]


def render(renderer: Renderer, records: Sequence[Record]) -> list[Samples | RecordError]:
    """Render a batch; the answer has one entry per record, in order: its samples, or why it was refused."""
    layouts = [_attempt(_layouts, renderer, record) for record in records]
    flat = [layout for of_record in layouts if not isinstance(of_record, RecordError) for layout in of_record]
    encoded = _encode(renderer, flat)
    decoded = iter(_decode(renderer, [tokens.ids for tokens in encoded if isinstance(tokens, _Tokens)]))
    texts = iter([next(decoded) if isinstance(tokens, _Tokens) else "" for tokens in encoded])
    tokens_of = iter(encoded)
    results: list[Samples | RecordError] = []
    for record, of_record in zip(records, layouts, strict=True):
        if isinstance(of_record, RecordError):
            results.append(of_record)
            continue
        mine = [(layout, next(tokens_of), next(texts)) for layout in of_record]
        results.append(_attempt(_samples, renderer, record, mine))
    return results


def _attempt(function: Any, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except RecordError as error:
        return error


def _layouts(renderer: Renderer, record: Record) -> list[Layout]:
    match record:
        case Conversation():
            return lay_out(renderer, record)
        case Text():
            return [_text_layout(renderer, record.text)]
        case Tokens():
            return []
        case _:
            raise AssertionError(record)


def _text_layout(renderer: Renderer, text: str) -> Layout:
    escaped, stand_ins = escape_text(renderer, text)
    return Layout(escaped, (0, len(escaped)), {}, {}, stand_ins)


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


def _encode(renderer: Renderer, layouts: Sequence[Layout]) -> list[_Tokens | RecordError]:
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
                written = _attempt(renderer.encode_written, layout.stand_ins[piece.text])
                if isinstance(written, RecordError):
                    problem = written
                    continue
                ids += written
                begins += [piece.begin] * len(written)
                ends += [piece.begin + 1] * len(written)
            else:
                encoding = next(encoded[piece.kind])
                ids += encoding.ids
                for begin, end in encoding.offsets:
                    begins.append(piece.begin + begin)
                    ends.append(piece.begin + end)
        tokens = _Tokens(np.array(ids, np.int32), np.array(begins, np.int64), np.array(ends, np.int64))
        results.append(tokens if problem is None else problem)
    return results


def _pieces(layout: Layout) -> list[_Piece]:
    """Cut the text at the start of every answer and around stand-ins; pieces are encoded on their own."""
    cuts = {0, len(layout.text), *(answer.start for answer in layout.answers.values())}
    if layout.stand_ins:
        for begin, character in enumerate(layout.text):
            if character in layout.stand_ins:
                cuts |= {begin, begin + 1}
    pieces = []
    for begin, end in pairwise(sorted(cuts)):
        text = layout.text[begin:end]
        kind = "stand-in" if text in layout.stand_ins else "first" if begin == 0 else "middle"
        pieces.append(_Piece(begin, text, kind))
    return pieces


def _decode(renderer: Renderer, sequences: Sequence[NDArray[np.int32]]) -> list[str]:
    backend = renderer.tokenizer.backend_tokenizer
    decoded: list[str] = backend.decode_batch([ids.tolist() for ids in sequences], skip_special_tokens=False)
    return decoded


def _samples(renderer: Renderer, record: Record, parts: Sequence[tuple[Layout, _Tokens | RecordError, str]]) -> Samples:
    match record:
        case Tokens():
            return (_tokens_sample(renderer, record),)
        case Text():
            ((layout, tokens, decoded),) = parts
            return (_text_sample(renderer, record, layout, _sound(renderer, layout, tokens, decoded)),)
        case Conversation():
            return tuple(
                _sample(renderer, record, layout, _sound(renderer, layout, tokens, decoded))
                for layout, tokens, decoded in parts
            )
        case _:
            raise AssertionError(record)


def _sound(renderer: Renderer, layout: Layout, tokens: _Tokens | RecordError, decoded: str) -> _Tokens:
    """The tokens, if they decode to exactly the text. Raises RecordError."""
    if isinstance(tokens, RecordError):
        raise tokens
    expected = _as_written(layout, layout.text)
    if decoded != expected and not _is_same(renderer, decoded, expected):
        raise RecordError("tokenizer changes the text", _difference(expected, decoded))
    bos = renderer.tokenizer.bos_token_id
    if bos is not None and len(tokens.ids) > 1 and tokens.ids[0] == tokens.ids[1] == bos:
        raise RecordError(
            "double BOS", f"the rendered text begins with {renderer.tokenizer.bos_token} twice; mend the chat template"
        )
    return tokens


def _is_same(renderer: Renderer, decoded: str, expected: str) -> bool:
    """Equal but for white space that control tokens swallow, and a first space that sentencepiece decoders drop."""
    pattern = renderer.swallowed
    if pattern is not None:
        decoded, expected = pattern.sub("", decoded), pattern.sub("", expected)
    return decoded == expected or (expected.startswith(" ") and decoded == expected[1:])


def _sample(renderer: Renderer, conversation: Conversation, layout: Layout, tokens: _Tokens) -> Sample:
    is_control = np.isin(tokens.ids, list(renderer.control_ids))
    boundaries = [_token_at(tokens, is_control, character, n) for n, character in enumerate(layout.starts)]
    spans: list[Span] = []
    turn = 0
    for number, message in enumerate(conversation.messages[: len(layout.starts) - 1]):
        turn += message.role == "assistant"
        start, end = boundaries[number], boundaries[number + 1]
        output_start = output_end = end
        if answer := layout.answers.get(number):
            output_start = _token_at(tokens, is_control, answer.start, number)
            output_end = int(np.searchsorted(tokens.begins, answer.end, side="left"))
            if not output_start < output_end <= end or not is_control[output_end - 1]:
                raise RecordError("no stop token", f"message {number + 1}: the stop token is no token of the tokenizer")
        elif content := layout.contents.get(number):
            output_start = int(np.searchsorted(tokens.ends, content[0], side="right"))
            output_end = max(output_start, int(np.searchsorted(tokens.begins, content[1], side="left")))
            output_start, output_end = min(max(output_start, start), end), min(max(output_end, start), end)
        spans.append(
            Span(
                number,
                message.role,
                start,
                output_start,
                output_end,
                end,
                is_owned=number in layout.answers or number in layout.contents,
                turn=turn if message.role == "assistant" else 0,
                weight=message.weight,
                train=message.train,
            )
        )
    return Sample(
        conversation.id,
        conversation.index,
        conversation.source,
        tokens.ids,
        tuple(spans),
        num_turns=sum(message.role == "assistant" for message in conversation.messages),
        weight=conversation.weight,
        digest=digest(conversation),
    )


def _token_at(tokens: _Tokens, is_control: NDArray[np.bool_], character: int, number: int) -> int:
    """The first token that begins at or after a character; only white space that a control token swallows may end."""
    index = int(np.searchsorted(tokens.begins, character, side="left"))
    if index and tokens.ends[index - 1] > character and not is_control[index - 1]:
        raise RecordError("turn inside a token", f"message {number + 1}: a token lies across its boundary")
    return index


def _text_sample(renderer: Renderer, record: Text, layout: Layout, tokens: _Tokens) -> Sample:
    before, after = renderer.text_edges
    ids = np.concatenate([before, tokens.ids, after]).astype(np.int32)
    span = Span(0, "text", 0, 0, len(ids), len(ids), is_owned=True, turn=1)
    return Sample(
        record.id, record.index, record.source, ids, (span,), num_turns=1, weight=record.weight, digest=digest(record)
    )


def _tokens_sample(renderer: Renderer, record: Tokens) -> Sample:
    """Runs of targets are answers, what lies between them is context."""
    if len(record.ids) and not 0 <= record.ids.min() <= record.ids.max() < len(renderer.tokenizer):
        raise RecordError(
            "unknown token id",
            f"ids {record.ids.min()}..{record.ids.max()}, the tokenizer has {len(renderer.tokenizer)}",
        )
    edges = [0, *(np.flatnonzero(np.diff(record.is_target.astype(np.int8))) + 1).tolist(), len(record.ids)]
    spans: list[Span] = []
    turn = 0
    for number, (start, end) in enumerate(pairwise(edges)):
        is_answer = bool(record.is_target[start])
        turn += is_answer
        role, own = ("assistant", turn) if is_answer else ("user", 0)
        spans.append(Span(number, role, start, start, end, end, is_owned=True, turn=own))
    return Sample(record.id, record.index, record.source, record.ids, tuple(spans), turn, record.weight, digest(record))


def _as_written(layout: Layout, text: str) -> str:
    for character, written in layout.stand_ins.items():
        text = text.replace(character, written)
    return text


def _difference(expected: str, decoded: str) -> str:
    at = common_length(expected, decoded)
    near = slice(max(at - 15, 0), at + 25)
    return f"rendered …{expected[near]!r}…, its tokens decode to …{decoded[near]!r}…"
