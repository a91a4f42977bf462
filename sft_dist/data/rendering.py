"""Records to token sequences with a verified span for every message.

The tokenizer's Jinja template (or the one given) is the only source of text; data/layout.py says where things lie in
it. Two rules give the tokens of inference: no token crosses the start of an output, and text that someone wrote never
becomes a control token. Every sequence must decode to its text; what cannot be verified is refused by name.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.conversation import Conversation, Record, RecordError, Text, Tokens, digest
from sft_dist.data.escaping import escape_text
from sft_dist.data.labelled import conversation_sample, text_sample
from sft_dist.data.layout import Layout, as_written, common_length, lay_out, lay_out_prompt
from sft_dist.data.renderer import Renderer
from sft_dist.data.sample import Sample, Span

Samples = tuple[Sample, ...]


def render(renderer: Renderer, records: Sequence[Record]) -> list[Samples | RecordError]:
    """Render a batch; the answer has one entry per record, in order: its samples, or why it was refused."""
    layouts = [_attempt(_layouts, renderer, record) for record in records]
    flat = [layout for of_record in layouts if not isinstance(of_record, RecordError) for layout in of_record]
    encoded = _encode(renderer, flat)
    decoded = iter(_decode(renderer, [tokens.ids.tolist() for tokens in encoded if isinstance(tokens, _Tokens)]))
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


def encode_prompt(renderer: Renderer, conversation: Conversation) -> NDArray[np.int32]:
    """int32 [T]: the context of the answer that would follow, as `render` gives it. Raises RecordError."""
    layout = lay_out_prompt(renderer, conversation)
    (tokens,) = _encode(renderer, [layout])
    if isinstance(tokens, RecordError):
        raise tokens
    (decoded,) = _decode(renderer, [tokens.ids.tolist()])
    return _sound(renderer, layout, tokens, decoded).ids


def _attempt(function: Any, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except RecordError as error:
        return error


def _layouts(renderer: Renderer, record: Record) -> list[Layout]:
    match record:
        case Conversation():
            if record.label and not record.keeps_turns:
                return [lay_out_prompt(renderer, record, with_header=False)]
            return lay_out(renderer, record)
        case Text():
            return [] if record.label else [_text_layout(renderer, record.text)]
        case Tokens():
            return []
        case _:
            raise AssertionError(record)


def _text_layout(renderer: Renderer, text: str) -> Layout:
    escaped, stand_ins = escape_text(renderer.marks, text)
    return Layout(escaped, (0, len(escaped)), {}, {}, stand_ins)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Ids, and where each begins and ends in its text, counted in characters or in bytes of what was written."""

    ids: NDArray[np.int32]  # [T]
    begins: NDArray[np.int64]  # [T]
    ends: NDArray[np.int64]  # [T]
    byte_of: NDArray[np.int64] | None  # [characters of the layout + 1] where those are bytes

    def positions(self, characters: Sequence[int]) -> NDArray[np.int64]:
        places = np.array(characters, np.int64)
        return places if self.byte_of is None else self.byte_of[places]


@dataclass(frozen=True, slots=True)
class _Piece:
    begin: int  # character
    text: str
    kind: str  # "sections", "middle" or "stand-in"


def _encode(renderer: Renderer, layouts: Sequence[Layout]) -> list[_Tokens | RecordError]:
    """Encode all layouts; their pieces go to the tokenizer in one batch."""
    pieces = [_pieces(renderer, layout) for layout in layouts]
    encoded = {
        kind: iter(_encode_batch(renderer, kind, [p.text for group in pieces for p in group if p.kind == kind]))
        for kind in ("sections", "middle")
    }
    results: list[_Tokens | RecordError] = []
    for layout, group in zip(layouts, pieces, strict=True):
        parts = []
        problem = None
        for piece in group:
            if piece.kind != "stand-in":
                parts.append(next(encoded[piece.kind]))
                continue
            written = _attempt(renderer.encode_written, layout.stand_ins[piece.text])
            problem = written if isinstance(written, RecordError) else problem
            parts.append(None if isinstance(written, RecordError) else written)
        if problem is not None:
            results.append(problem)
        elif renderer.byte_lengths is not None:
            results.append(_in_bytes(renderer, layout, group, parts))
        else:
            results.append(_in_characters(group, parts))
    return results


def _backend(renderer: Renderer, kind: str) -> Any:
    return renderer.tokenizer.backend_tokenizer if kind == "sections" else renderer.middle_backend


def _encode_batch(renderer: Renderer, kind: str, texts: list[str]) -> Sequence[Any]:
    """Ids of each text where the lengths of tokens tell where they lie, else encodings with offsets."""
    if renderer.words is not None:
        return renderer.words.encode(texts)
    backend = _backend(renderer, kind)
    if renderer.byte_lengths is not None:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    encodings: list[Any] = backend.encode_batch(texts, add_special_tokens=False)
    return encodings


def _in_bytes(renderer: Renderer, layout: Layout, group: Sequence[_Piece], parts: Sequence[Sequence[int]]) -> _Tokens:
    lengths = renderer.byte_lengths
    assert lengths is not None
    ids = np.concatenate([np.zeros(0, np.int32), *parts], dtype=np.int32)
    ends = np.cumsum(lengths[ids], dtype=np.int64)
    byte_of = _byte_of(layout)
    if (ends[-1] if len(ends) else 0) != (len(layout.text) if byte_of is None else byte_of[-1]):
        # White space was swallowed or text was normalised: only the tokenizer knows what came from where.
        encodings = [
            part
            if piece.kind == "stand-in"
            else _backend(renderer, piece.kind).encode(piece.text, add_special_tokens=False)
            for piece, part in zip(group, parts, strict=True)
        ]
        return _in_characters(group, encodings)
    return _Tokens(ids, ends - lengths[ids], ends, byte_of)


def _byte_of(layout: Layout) -> NDArray[np.int64] | None:
    """int64 [characters + 1]: where the bytes of each begin in what was written; None where each is one byte."""
    if layout.text.isascii() and not layout.stand_ins:
        return None
    codes = np.frombuffer(layout.text.encode("utf-32-le"), np.uint32)
    num_bytes = 1 + (codes >= 0x80) + (codes >= 0x800).astype(np.int64) + (codes >= 0x10000)
    for character, written in layout.stand_ins.items():
        num_bytes[codes == ord(character)] = len(written.encode())
    return np.concatenate([[0], np.cumsum(num_bytes)])


def _in_characters(group: Sequence[_Piece], parts: Sequence[Any]) -> _Tokens:
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    for piece, part in zip(group, parts, strict=True):
        if isinstance(part, tuple):  # written out for a stand-in, which is one character
            ids += part
            offsets += [(piece.begin, piece.begin + 1)] * len(part)
        else:
            ids += part.ids
            offsets += [(piece.begin + begin, piece.begin + end) for begin, end in part.offsets]
    edges = np.array(offsets, np.int64).reshape(-1, 2)
    return _Tokens(np.array(ids, np.int32), edges[:, 0], edges[:, 1], byte_of=None)


def _pieces(renderer: Renderer, layout: Layout) -> list[_Piece]:
    """Cut the text at the start of every answer and around stand-ins; pieces are encoded on their own.

    A piece in the middle gets no space at its start. What follows its first added token is encoded as at inference,
    with the space that some tokenizers put before every section.
    """
    cuts = {0, len(layout.text), *(answer.start for answer in layout.answers.values())}
    if layout.stand_ins:
        for begin, character in enumerate(layout.text):
            if character in layout.stand_ins:
                cuts |= {begin, begin + 1}
    pieces = []
    for begin, end in pairwise(sorted(cuts)):
        text = layout.text[begin:end]
        if text in layout.stand_ins:
            pieces.append(_Piece(begin, text, "stand-in"))
        elif begin == 0:
            pieces.append(_Piece(begin, text, "sections"))
        else:
            mark = renderer.section_start and renderer.marks.pattern and renderer.marks.pattern.search(text)
            at = mark.start() if mark else len(text)
            pieces += [_Piece(begin, text[:at], "middle")] if at else []
            pieces += [_Piece(begin + at, text[at:], "sections")] if mark else []
    return pieces


def _decode(renderer: Renderer, sequences: Sequence[list[int]]) -> list[str]:
    if renderer.token_bytes is not None:
        bytes_of = renderer.token_bytes.__getitem__
        return [b"".join(map(bytes_of, ids)).decode("utf-8", "replace") for ids in sequences]
    decoded: list[str] = renderer.tokenizer.backend_tokenizer.decode_batch(sequences, skip_special_tokens=False)
    return decoded


def _samples(renderer: Renderer, record: Record, parts: Sequence[tuple[Layout, _Tokens | RecordError, str]]) -> Samples:
    match record:
        case Tokens():
            return (_tokens_sample(renderer, record),)
        case Text() if record.label:
            return (text_sample(renderer, record),)
        case Text():
            ((layout, tokens, decoded),) = parts
            return (_text_sample(renderer, record, layout, _sound(renderer, layout, tokens, decoded)),)
        case Conversation() if record.label and not record.keeps_turns:
            ((layout, tokens, decoded),) = parts
            return (conversation_sample(record, _sound(renderer, layout, tokens, decoded).ids),)
        case Conversation():
            samples = [
                _sample(renderer, record, layout, _sound(renderer, layout, tokens, decoded))
                for layout, tokens, decoded in parts
            ]
            # The last one is what the template writes for the whole conversation.
            return (*samples[:-1], replace(samples[-1], label=record.label))
        case _:
            raise AssertionError(record)


def _sound(renderer: Renderer, layout: Layout, tokens: _Tokens | RecordError, decoded: str) -> _Tokens:
    """The tokens, if they decode to exactly the text. Raises RecordError."""
    if isinstance(tokens, RecordError):
        raise tokens
    expected = _as_decoded(renderer, layout)
    if decoded != expected and not _is_same(renderer, decoded, expected):
        raise RecordError("tokenizer changes the text", _difference(expected, decoded))
    bos = renderer.tokenizer.bos_token_id
    if bos is not None and len(tokens.ids) > 1 and tokens.ids[0] == tokens.ids[1] == bos:
        raise RecordError(
            "double BOS", f"the rendered text begins with {renderer.tokenizer.bos_token} twice; mend the chat template"
        )
    return tokens


def _as_decoded(renderer: Renderer, layout: Layout) -> str:
    """The text, with the spaces that a tokenizer puts at the start of every section between added tokens."""
    section = renderer.section_start
    if section is None:
        return as_written(layout, layout.text)
    parts = [p.text if p.kind == "middle" else section.sub(r"\g<0> ", p.text) for p in _pieces(renderer, layout)]
    return as_written(layout, "".join(parts))


def _is_same(renderer: Renderer, decoded: str, expected: str) -> bool:
    """Equal but for white space that control tokens swallow, and a first space that sentencepiece decoders drop."""
    pattern = renderer.swallowed
    if pattern is not None:
        decoded, expected = pattern.sub("", decoded), pattern.sub("", expected)
    return decoded == expected or (expected.startswith(" ") and decoded == expected[1:])


def _sample(renderer: Renderer, conversation: Conversation, layout: Layout, tokens: _Tokens) -> Sample:
    # Only the start of an answer must be the start of a token; a token across another boundary is the earlier one's.
    places = [*layout.starts]
    places += [place for answer in layout.answers.values() for place in (answer.start, answer.end)]
    places += [place for content in layout.contents.values() for place in content]
    positions = tokens.positions(places)
    position_of = dict(zip(places, positions.tolist(), strict=True))
    token_at = dict(zip(places, np.searchsorted(tokens.begins, positions).tolist(), strict=True))
    token_over = dict(zip(places, np.searchsorted(tokens.ends, positions, side="right").tolist(), strict=True))
    spans: list[Span] = []
    turn = 0
    for number, message in enumerate(conversation.messages[: len(layout.starts) - 1]):
        turn += message.role == "assistant"
        start, end = token_at[layout.starts[number]], token_at[layout.starts[number + 1]]
        output_start = output_end = end
        if answer := layout.answers.get(number):
            output_start, output_end = token_at[answer.start], token_at[answer.end]
            _check_answer(renderer, tokens, (output_start, output_end), position_of[answer.start], number)
            assert start <= output_start < output_end <= end, "an answer lies in its message"
        elif content := layout.contents.get(number):
            # All tokens that hold some of it: in other roles than the model's own, tokens may lie across its edges.
            output_start = min(max(token_over[content[0]], start), end)
            output_end = max(output_start, min(token_at[content[1]], end))
        is_owned = number in layout.answers or number in layout.contents
        own_turn = turn if message.role == "assistant" else 0
        spans.append(
            Span(
                *(number, message.role, start, output_start, output_end, end),
                is_owned=is_owned,
                turn=own_turn,
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


def _check_answer(renderer: Renderer, tokens: _Tokens, answer: tuple[int, int], start: int, number: int) -> None:
    """Raise RecordError unless the tokens of an answer begin where it does, at `start`, and end with a stop token."""
    first, last = answer
    if first and tokens.ends[first - 1] > start and int(tokens.ids[first - 1]) not in renderer.control_ids:
        # A control token may: it swallows the white space beside it.
        raise RecordError("turn inside a token", f"message {number + 1}: a token lies across the start of the answer")
    if first >= last or int(tokens.ids[last - 1]) not in renderer.control_ids:
        raise RecordError("no stop token", f"message {number + 1}: the stop token is no token of the tokenizer")


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


def _difference(expected: str, decoded: str) -> str:
    at = common_length(expected, decoded)
    near = slice(max(at - 15, 0), at + 25)
    return f"rendered …{expected[near]!r}…, its tokens decode to …{decoded[near]!r}…"
