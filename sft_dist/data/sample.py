"""Tokens of one conversation and what each of them is: the unit that is packed, trained and scored.

Pure values over numpy; the mapping from `train_on` to target tokens lives here and nowhere else.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

TrainOn = Literal["assistant", "last_assistant", "all"]
Int32 = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of one message: [start, output_start) header, [output_start, output_end) output, rest up to end.

    The output of an assistant message is its content and stop token. Other messages have no output that the
    model would write: output_start = start and output_end = end.
    """

    message: int
    role: str
    start: int
    output_start: int
    output_end: int
    end: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One token sequence of one conversation. `turns`: numbers of the messages that are targets in this sample."""

    conversation_id: str
    index: int
    source: str
    ids: Int32  # [T]
    spans: tuple[Span, ...]
    turns: tuple[int, ...]


def target_turns(sample: Sample, train_on: TrainOn) -> Int32:
    """int32 [T]: for each token the message number it is a target of, or -1.

    Token 0 is never a target: nothing comes before it that could predict it.
    """
    turns = np.full(len(sample.ids), -1, dtype=np.int32)
    match train_on:
        case "all":
            for span in sample.spans:
                turns[span.start : span.end] = span.message
        case "assistant" | "last_assistant":
            owned = sample.turns if train_on == "assistant" else sample.turns[-1:]
            for span in sample.spans:
                if span.message in owned:
                    turns[span.output_start : span.output_end] = span.message
    turns[:1] = -1
    return turns
