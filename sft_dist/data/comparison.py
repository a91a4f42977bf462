"""Prepared contexts against those that the tokenizer itself makes, and trained answers against what was written.

An answer found another way than data/rendering.py finds it: one direct call of apply_chat_template or of the tokenizer.
Some differences are meant; each has its name here, and must leave the decoded text as it is.
"""

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from difflib import SequenceMatcher
from typing import Any

from sft_dist.data.conversation import Conversation, Message, Record, Text, Tokens, texts_of
from sft_dist.data.renderer import Renderer
from sft_dist.data.sample import Sample, Span

_ASKS_FOR_TODAY = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")

EQUAL = "with equal ids"
STAYS_TEXT = "in which text that looks like control tokens stays text"
CUT = "cut where an earlier answer begins, as at inference"
REFUSED = "that the template does not render on their own"
DIFFERENT = "different"


def compare_context(
    renderer: Renderer,
    record: Record,
    sample: Sample,
    span: Span,
    *,
    date: datetime.date,
    template_kwargs: Mapping[str, Any],
) -> tuple[str, list[int]]:
    """How the tokens before an answer compare with those that the tokenizer itself makes, and the latter."""
    from jinja2 import TemplateError

    def today(call: re.Match[str]) -> str:
        return repr(date.strftime(call[2]))

    ours = sample.ids[: span.output_start].tolist()
    match record:
        case Conversation():
            before = record.messages[: span.message]
            try:
                expected = renderer.tokenizer.apply_chat_template(
                    [renderer.plain(message) for message in before],
                    tools=list(record.tools) or None,
                    chat_template=_ASKS_FOR_TODAY.sub(today, renderer.template or ""),
                    add_generation_prompt=True,
                    return_dict=False,
                    **template_kwargs,
                )
            except TemplateError:
                return REFUSED, []
        case Text():
            ours, expected = sample.ids.tolist(), renderer.tokenizer(record.text).input_ids
            expected += [] if expected[-1:] == ours[-1:] else [renderer.tokenizer.eos_token_id]
        case Tokens():
            ours, expected = sample.ids.tolist(), record.ids.tolist()
        case _:
            raise AssertionError(record)
    if ours == expected:
        return EQUAL, expected
    decode = renderer.tokenizer.backend_tokenizer.decode
    if decode(ours, skip_special_tokens=False) != decode(expected, skip_special_tokens=False):
        return DIFFERENT, expected
    if not isinstance(record, Tokens) and renderer.marks.found_in("\n".join(texts_of(asdict(record)))):
        return STAYS_TEXT, expected
    earlier = [other.output_start for other in sample.spans if other.turn and other.message < span.message]
    return (CUT if _differ_only_at(ours, expected, earlier) else DIFFERENT), expected


def _differ_only_at(ours: list[int], expected: list[int], places: Sequence[int]) -> bool:
    """Whether every difference of two sequences touches one of the places (positions in `ours`)."""
    changes = SequenceMatcher(None, ours, expected, autojunk=False).get_opcodes()
    return all(tag == "equal" or any(first <= place <= last for place in places) for tag, first, last, _, _ in changes)


def answer_fault(renderer: Renderer, message: Message, sample: Sample, span: Span) -> str | None:
    """What is wrong with an answer's trained tokens, if anything."""
    output = sample.ids[span.output_start : span.output_end].tolist()
    decoded = renderer.tokenizer.backend_tokenizer.decode(output, skip_special_tokens=False)
    if not output or output[-1] not in renderer.control_ids:
        return f"does not end in a control token: {decoded[-60:]!r}"
    written = [message.content or "", message.reasoning or "", *(call.name for call in message.tool_calls)]
    lost = [piece for text in written for piece in renderer.marks.between(text) if piece not in decoded]
    return f"{lost[0][:60]!r} is not in {decoded[:60]!r}" if lost else None


def difference(renderer: Renderer, ours: list[int], expected: list[int]) -> str:
    """Where two sequences part, for people."""
    pairs = zip(ours, expected, strict=False)
    at = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(expected)))
    decode = renderer.tokenizer.backend_tokenizer.decode
    shown = [decode(ids[max(at - 4, 0) : at + 6], skip_special_tokens=False) for ids in (ours, expected)]
    return f"from token {at:,} on: prepared …{shown[0]!r}…, apply_chat_template …{shown[1]!r}…"
