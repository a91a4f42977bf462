"""Questions: a prompt and candidate answers to it, from records to tokens.

A record is {"prompt": text or messages, "candidates": [text, …]}; other fields mean what they mean beside `messages`.
Each candidate is rendered as the conversation that ends with it, by the code that renders every other conversation, so
that its tokens and spans are verified alike.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from sft_dist.config import SourceConfig
from sft_dist.data import formats
from sft_dist.data.conversation import Record, RecordError, check_text
from sft_dist.data.formats import Row
from sft_dist.data.parsing import parse
from sft_dist.data.records import convert
from sft_dist.data.renderer import Renderer
from sft_dist.data.rendering import render
from sft_dist.data.sample import Int32
from sft_dist.errors import DataError

# How many records may be unreadable before a source is taken for one of conversations.
_ROWS_TO_TELL = 100


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and the candidate answers to it, or what is wrong with the record."""

    row: Row
    id: str
    prompt: tuple[Any, ...] = ()  # messages as the record has them
    candidates: tuple[str, ...] = ()
    others: Mapping[str, Any] = field(default_factory=dict)  # all other fields of the record
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class Rendered:
    """The tokens of a question: one prompt for all candidates, or one for each."""

    prompts: tuple[Int32, ...]
    outputs: tuple[Int32, ...]  # content and stop token of each candidate

    @property
    def is_shared(self) -> bool:
        return len(self.prompts) == 1

    def prompt(self, candidate: int) -> Int32:
        return self.prompts[0 if self.is_shared else candidate]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and answer together."""
        return max(len(self.prompt(number)) + len(output) for number, output in enumerate(self.outputs))


def is_candidates(sources: Sequence[SourceConfig]) -> bool:
    """Whether the first record of each source that can be read has candidates.

    Raises DataError where only some sources do.
    """
    kinds = {source.path: _has_candidates(source) for source in sources}
    if len(set(kinds.values())) > 1:
        with_them, without = ([path for path, has in kinds.items() if has is kind] for kind in (True, False))
        raise DataError(
            f"{', '.join(with_them)}: the first record has `candidates`; that of {', '.join(without)} has not; "
            "score prompts with candidates and conversations apart"
        )
    return any(kinds.values())


def _has_candidates(source: SourceConfig) -> bool:
    for row in islice(_read_rows(source), _ROWS_TO_TELL):
        try:
            return "candidates" in _fields(row)
        except (RecordError, RecursionError):
            continue  # told with its place by whoever reads all
    return False


def read_questions(sources: Sequence[SourceConfig]) -> Iterator[Question]:
    """All records in order, numbered through the sources."""
    index = 0
    for source in sources:
        for row in _read_rows(source, index):
            index = row.index + 1
            yield _question(row)


def _read_rows(source: SourceConfig, first_index: int = 0) -> Iterator[Row]:
    """Rows of a source whose format need not be told: it is none of those that can be trained on."""
    return formats.read_rows(source.model_copy(update={"format": "messages"}), first_index)


def _fields(row: Row) -> dict[str, Any]:
    return parse(row.payload, row.path, row.place)


def _question(row: Row) -> Question:
    try:
        record = _fields(row)
        identity = row.default_id if record.get("id") in (None, "") else str(record["id"])
        prompt, candidates = _prompt(record), _candidates(record)
        others = {name: value for name, value in record.items() if name not in ("prompt", "candidates", "messages")}
        question = Question(row, identity, prompt, candidates, others)
        _conversation(question, candidates[0])  # all but the answer is the same for all candidates
    except RecordError as error:
        return Question(row, row.default_id, fault=str(error))
    except RecursionError:
        return Question(row, row.default_id, fault="nested too deeply: hundreds of objects and lists in each other")
    return question


def _prompt(record: dict[str, Any]) -> tuple[Any, ...]:
    prompt = record.get("prompt")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, list) or not messages:
        raise RecordError("no prompt", "`prompt` must be text or a list of messages")
    return tuple(messages)


def _candidates(record: dict[str, Any]) -> tuple[str, ...]:
    candidates = record.get("candidates")
    if not isinstance(candidates, list) or not candidates:
        raise RecordError("no candidates", "`candidates` must be a list of one text or more")
    for number, candidate in enumerate(candidates, start=1):
        if not isinstance(candidate, str) or not candidate.strip():
            raise RecordError("no text", f"candidate {number} must be text with more than white space in it")
        check_text(candidate, f"candidate {number}")
    return tuple(candidates)


def _conversation(question: Question, candidate: str) -> Record:
    """The conversation that ends with a candidate. Raises RecordError."""
    messages = [*question.prompt, {"role": "assistant", "content": candidate}]
    row = question.row
    return convert(
        {**question.others, "messages": messages},
        "messages",
        index=row.index,
        source=row.source,
        where=row.where,
        default_id=row.default_id,
    )


def render_question(renderer: Renderer, question: Question) -> Rendered | str:
    """The tokens of a question, or what is wrong with it."""
    if question.fault is not None:
        return question.fault
    try:
        return _rendered(renderer, question)
    except RecordError as error:
        return str(error)


def _rendered(renderer: Renderer, question: Question) -> Rendered:
    records = [_conversation(question, candidate) for candidate in question.candidates]
    prompts, outputs = [], []
    for number, samples in enumerate(render(renderer, records), start=1):
        if isinstance(samples, RecordError):
            raise RecordError(samples.reason, f"candidate {number}: {samples.detail}")
        # The answer is the last message; one sample of the conversation owns it.
        last = max(span.message for sample in samples for span in sample.spans)
        sample, span = next((s, p) for s in samples for p in s.spans if p.message == last and p.is_owned)
        prompts.append(sample.ids[: span.output_start])
        outputs.append(sample.ids[span.output_start : span.output_end])
    if all(np.array_equal(prompt, prompts[0]) for prompt in prompts):
        prompts = prompts[:1]
    return Rendered(tuple(prompts), tuple(outputs))
