"""Labelled records to tokens: what a head's backbone reads is exactly what its own tokenizer or template gives.

A text, or a pair of texts, becomes `tokenizer(text, pair)` with the tokens that the tokenizer puts around them; but
text stays text: what is spelled like a control token becomes ordinary tokens (`split_special_tokens=True`). Messages
become what the chat template writes for them, without the header of an answer. Uncased tokenizers do not decode to what
was written, so unlike in language modelling that is not asked of texts here.
"""

from typing import Any

import numpy as np

from sft_dist.data.conversation import Conversation, RecordError, Text, digest
from sft_dist.data.renderer import Renderer
from sft_dist.data.sample import Int32, Sample, Span


def text_sample(renderer: Renderer, record: Text) -> Sample:
    """A span for each text with the tokens around it; the first span is what the label belongs to. Raises RecordError.

    The second begins where the tokenizer's token types turn to 1, else at the first token of the second text.
    """
    encoding = renderer.labelled_backend.encode(record.text, record.pair)
    ids = np.array(encoding.ids, np.int32)
    own = [number is not None for number in encoding.sequence_ids]
    unknown = renderer.tokenizer.unk_token_id
    if any(mine and int(i) in renderer.control_ids and int(i) != unknown for i, mine in zip(ids, own, strict=True)):
        raise RecordError("control text", "the text becomes a control token, whatever is done about it")
    for number in (0,) if record.pair is None else (0, 1):
        if number not in encoding.sequence_ids:
            raise RecordError("no text", f"`{('text', 'text_pair')[number]}` has no token in this tokenizer")
    begin = len(ids) if record.pair is None else _begin_of_second(encoding)
    return _sample(record, ids, begin)


def conversation_sample(record: Conversation, ids: Int32) -> Sample:
    """One span over everything, given the tokens of the rendered messages."""
    return _sample(record, ids, len(ids))


def _begin_of_second(encoding: Any) -> int:
    types = encoding.type_ids
    return int(types.index(1) if 1 in types else encoding.sequence_ids.index(1))


def _sample(record: Text | Conversation, ids: Int32, begin_of_second: int) -> Sample:
    edges = [(0, begin_of_second), (begin_of_second, len(ids))]
    spans = tuple(
        Span(number, "text", begin, begin, end, end, is_owned=number == 0)
        for number, (begin, end) in enumerate(edges)
        if begin < end
    )
    return Sample(
        *(record.id, record.index, record.source, ids, spans),
        num_turns=0,
        weight=record.weight,
        digest=digest(record),
        label=record.label,
    )
