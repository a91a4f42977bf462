"""Tokens of one conversation and what each of them is: the unit that is packed, trained and scored.

Pure values over numpy; the mapping from a policy to target tokens lives in data/selection.py and nowhere else.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of one message: [start, output_start) header, [output_start, output_end) output, the rest up to end.

    The output of an assistant message is what the model writes: content and stop token. That of any other message is
    its content. `is_owned`: this sample, and no other of the conversation, may train and score the message.
    """

    message: int
    role: str
    start: int
    output_start: int
    output_end: int
    end: int
    is_owned: bool
    turn: int = 0  # counts the conversation's answers from 1; 0: no answer
    weight: float = 1.0  # of the message
    train: bool | None = None  # the author's mark


@dataclass(frozen=True, slots=True)
class Sample:
    """One token sequence of one conversation.

    A conversation has several where the template shows a later turn another history than an earlier one wrote.
    """

    conversation_id: str
    index: int  # of the conversation in the input order
    source: str
    ids: Int32  # [T]
    spans: tuple[Span, ...]
    num_turns: int  # answers of the whole conversation
    weight: float = 1.0  # of the conversation
    digest: bytes = bytes(16)  # of the conversation's content
    label: str = ""  # JSON text; "null": none is given; "": of no labelled format, or at a later sample
