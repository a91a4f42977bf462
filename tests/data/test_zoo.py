"""Every template family against benign and hostile conversations: refused by name for a reason, or exactly right.

The oracle (tests/helpers/inference.py) asks transformers what inference would see and never the code under test.
"""

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_dist.data.conversation import Conversation, RecordError
from sft_dist.data.renderer import Renderer
from sft_dist.data.rendering import render
from sft_dist.data.sample import Sample, Span
from tests.helpers.inference import (
    Expected,
    Refused,
    Turn,
    added_ids,
    expected,
    has_added_text,
    is_shown,
    missing,
    only_added,
    render_text,
    template_reads,
    texts_written,
    twin_of,
)
from tests.helpers.zoo import BENIGN, DATE, FAMILIES, ZOO_DIR, Family, conversations, hostile

REASONS = frozenset(
    {
        "template error",
        "no stop token",
        "template changes the answer",
        "template contradicts itself",
        "template drops a message",
        "tokenizer changes the text",
        "turn inside a token",
        "private-use text",
        "control text",
        "double BOS",
        "broken text",
    }
)
families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def rendered(family: Family, conversations: list[Conversation]) -> list[tuple[Sample, ...] | RecordError]:
    renderer = Renderer(family.tokenizer, family.source, date=DATE, template_kwargs=dict(family.kwargs))
    return render(renderer, conversations)


@families
@pytest.mark.parametrize("name", BENIGN)
def test_benign_conversations_are_rendered_by_every_family_that_has_words_for_them(family: Family, name: str) -> None:
    (answer,) = rendered(family, [BENIGN[name]])
    if name in family.refused:
        assert isinstance(answer, RecordError) and answer.reason == family.refused[name]
    else:
        assert not isinstance(answer, RecordError), answer
        check_samples(family, BENIGN[name], answer)


@families
def test_hostile_conversations_are_refused_for_a_reason_or_exactly_right(family: Family) -> None:
    conversations = hostile(family)
    answers = rendered(family, list(conversations.values()))
    for (name, conversation), answer in zip(conversations.items(), answers, strict=True):
        __tracebackhide__ = False
        print(name, answer if isinstance(answer, RecordError) else "")
        check(family, conversation, answer)


@families
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_drawn_conversations_are_refused_for_a_reason_or_exactly_right(family: Family, data: st.DataObject) -> None:
    conversation = data.draw(conversations(family))
    (answer,) = rendered(family, [conversation])
    check(family, conversation, answer)


@pytest.mark.slow
@families
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_many_drawn_conversations_are_refused_for_a_reason_or_exactly_right(
    family: Family, data: st.DataObject
) -> None:
    conversation = data.draw(conversations(family))
    (answer,) = rendered(family, [conversation])
    check(family, conversation, answer)


def test_a_template_with_generation_marks_agrees_on_what_is_trained() -> None:
    family = next(family for family in FAMILIES if family.template == "generation_marks")
    for conversation in (BENIGN["plain"], BENIGN["system"], BENIGN["twelve turns"]):
        (answer,) = rendered(family, [conversation])
        assert not isinstance(answer, RecordError)
        (sample,) = answer
        marked = family.tokenizer.apply_chat_template(
            [{"role": message.role, "content": message.content} for message in conversation.messages],
            chat_template=family.source,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert sample.ids.tolist() == list(marked["input_ids"])
        trained = [0] * len(sample.ids)
        for span in sample.spans:
            if span.role == "assistant":
                trained[span.output_start : span.output_end] = [1] * (span.output_end - span.output_start)
        assert trained == list(marked["assistant_masks"]) and any(trained)


@pytest.mark.parametrize(
    ("name", "conversation", "texts"),
    [
        (
            "qwen3-no-nfc",
            "reasoning on each turn",
            [
                "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n[<think>\nTwo and two are four.\n</think>"
                "\n\nFour.<|im_end|>]\n",
                "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\nFour.<|im_end|>\n"
                "<|im_start|>user\nAnd 3 more?<|im_end|>\n<|im_start|>assistant\n[<think>\nFour and three are seven."
                "\n</think>\n\nSeven.<|im_end|>]\n",
                "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\nFour.<|im_end|>\n"
                "<|im_start|>user\nAnd 3 more?<|im_end|>\n<|im_start|>assistant\nSeven.<|im_end|>\n"
                "<|im_start|>user\nThanks<|im_end|>\n<|im_start|>assistant\n[<think>\nThey thank me.\n</think>\n\n"
                "Welcome.<|im_end|>]\n",
            ],
        ),
        (
            "mistral_v3",
            "system",
            [
                "<s>[INST] Answer in one sentence.\n\nHello there[/INST][ Hello yourself.</s>]",
                "<s>[INST] Hello there[/INST] Hello yourself.</s>[INST] Answer in one sentence.\n\nBye[/INST]"
                "[ Farewell.</s>]",
            ],
        ),
        (
            "eos_at_end",
            "plain",
            [
                "user:Hello there\nassistant:[Hello! How are you?\n<|endoftext|>]",
                "user:Hello there\nassistant:Hello! How are you?\nuser:Fine. And the weather?\nassistant:[It rains.\n"
                "<|endoftext|>]",
            ],
        ),
        (
            "two_stops",
            "plain",
            [
                "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n[Hello! How are you?<|im_end|>"
                "<|endoftext|>]\n<|im_start|>user\nFine. And the weather?<|im_end|>\n<|im_start|>assistant\n[It rains."
                "<|im_end|><|endoftext|>]\n",
            ],
        ),
        (
            "deepseek_v31",
            "plain",
            [
                "<｜begin▁of▁sentence｜><｜User｜>Hello there<｜Assistant｜></think>"
                "[Hello! How are you?<｜end▁of▁sentence｜>]"
                "<｜User｜>Fine. And the weather?<｜Assistant｜></think>[It rains.<｜end▁of▁sentence｜>]",
            ],
        ),
    ],
)  # fmt: skip
def test_samples_of_a_conversation_as_people_read_them(name: str, conversation: str, texts: list[str]) -> None:
    """In brackets what is trained: written out once, where the oracle might share a misunderstanding."""
    family = next(family for family in FAMILIES if family.name == name)
    (answer,) = rendered(family, [BENIGN[conversation]])
    assert not isinstance(answer, RecordError)
    assert [bracketed(family, sample) for sample in answer] == texts


def test_harmony_ends_the_last_answer_otherwise_than_the_history() -> None:
    family = next(family for family in FAMILIES if family.template == "gpt_oss")
    (answer,) = rendered(family, [BENIGN["reasoning on the last turn"]])
    assert not isinstance(answer, RecordError)
    first, second = (bracketed(family, sample).partition("<|start|>user")[2] for sample in answer)
    assert first == "<|message|>2 + 2?<|end|><|start|>assistant[<|channel|>final<|message|>Four.<|return|>]"
    assert second == (
        "<|message|>2 + 2?<|end|><|start|>assistant<|channel|>final<|message|>Four.<|end|>"
        "<|start|>user<|message|>And 3 more?<|end|><|start|>assistant"
        "[<|channel|>analysis<|message|>Four and three.<|end|><|start|>assistant"
        "<|channel|>final<|message|>Seven.<|return|>]"
    )


def bracketed(family: Family, sample: Sample) -> str:
    edges = [
        edge
        for span in sample.spans
        if span.role == "assistant" and span.is_owned
        for edge in ((span.output_start, "["), (span.output_end, "]"))
    ]
    text = decode(family, sample.ids)
    for end, bracket in reversed(edges):
        at = len(decode(family, sample.ids[:end]))
        text = text[:at] + bracket + text[at:]
    return text


def test_every_template_of_the_zoo_is_used_and_described() -> None:
    files = {path.stem for path in ZOO_DIR.glob("*.jinja")}
    readme = (ZOO_DIR / "README.md").read_text(encoding="utf-8")
    assert files == {family.template for family in FAMILIES}
    assert all(f"`{name}`" in readme for name in files)


def check(family: Family, conversation: Conversation, answer: tuple[Sample, ...] | RecordError) -> None:
    if isinstance(answer, RecordError):
        check_refusal(family, conversation, answer)
    else:
        check_samples(family, conversation, answer)


def check_refusal(family: Family, conversation: Conversation, error: RecordError) -> None:
    """A refusal must be one that the oracle finds reason for, so that a renderer that refuses all is no good one."""
    assert error.reason in REASONS, error
    try:
        want = expected(family, conversation)
        lost = missing(family, conversation)
    except Refused:
        reasons = {"template error"}
        if conversation.tools or any(message.tool_calls or message.reasoning for message in conversation.messages):
            reasons |= {"template drops a message", "template changes the answer"}
        if has_added_text(family, conversation):
            reasons |= {"private-use text", "control text"}
        assert error.reason in reasons, error
        return
    match error.reason:
        case "template error":
            raise AssertionError(f"the template refuses nothing: {error}")
        case "template drops a message" | "template changes the answer" if lost:
            pass
        case "tokenizer changes the text":
            texts = [want.full, *(turn.own for turn in want.turns)]
            assert any(not survives(family, text) for text in texts), error
        case "control text":
            assert template_reads(family, conversation), error
        case "private-use text":
            assert has_added_text(family, conversation) and all(
                any(low <= character < high for character in texts_written(family, conversation))
                for low, high in (("\U000f0000", "\U00100000"), ("\U00100000", "\U0010ffff"))
            )
        case _:
            assert error.reason in family.refused.values() or want.problem, error


def check_samples(family: Family, conversation: Conversation, samples: tuple[Sample, ...]) -> None:
    want = expected(family, conversation)
    assert want.problem is None
    assert not missing(family, conversation), "every text is shown"
    check_owners(conversation, samples)
    twin = expected(family, twin_of(family, conversation))
    turns = {turn.message: (number, turn) for number, turn in enumerate(want.turns)}
    for sample in samples:
        check_layout(conversation, sample)
        check_whole(family, conversation, sample)
        for span in sample.spans:
            if span.is_owned and span.role != "assistant" and span.output_start < span.output_end:
                content = decode(family, sample.ids[span.output_start : span.output_end])
                assert is_shown(conversation.messages[span.message].content or "", content)
            if span.is_owned and span.role == "assistant":
                number, turn = turns[span.message]
                turn, twin_turn = (shown(family, sample, t) for t in (turn, twin.turns[number]))
                assert span.turn == number + 1
                check_turn(family, sample, span, turn)
                written = added_ids(family, twin_turn.prompt + twin_turn.output)
                assert only_added(family, sample.ids[: span.output_end].tolist()) == written, "text stays text"
                if not has_added_text(family, conversation):
                    check_token_boundaries(family, sample, span, turn)
    extra = family.history_stop is not None and conversation.messages[-1].role != "assistant"
    assert len(samples) in (num_branches(family, want), num_branches(family, want) + extra)


def shown(family: Family, sample: Sample, turn: Turn) -> Turn:
    """The turn as its sample has it: with the end that it has in a history, if the sample goes on."""
    is_last = turn.message == max(span.message for span in sample.spans)
    if family.history_stop is None or is_last:
        return turn
    return replace(turn, output=turn.output.removesuffix(family.stop) + family.history_stop)


def check_owners(conversation: Conversation, samples: tuple[Sample, ...]) -> None:
    owned = Counter(span.message for sample in samples for span in sample.spans if span.is_owned)
    assert owned == Counter(range(len(conversation.messages))), "every message has exactly one owner"
    num_turns = sum(message.role == "assistant" for message in conversation.messages)
    assert {sample.num_turns for sample in samples} == {num_turns}


def check_layout(conversation: Conversation, sample: Sample) -> None:
    edges = [0]
    for span in sample.spans:
        assert span.role == conversation.messages[span.message].role
        edges += [span.start, span.output_start, span.output_end, span.end]
    assert edges == sorted(edges) and edges[-1] <= len(sample.ids)


def check_whole(family: Family, conversation: Conversation, sample: Sample) -> None:
    upto = max(span.message for span in sample.spans) + 1
    text = render_text(family, conversation, upto, prompt=False)
    assert same(family, decode(family, sample.ids), text)


def check_turn(family: Family, sample: Sample, span: Span, turn: Turn) -> None:
    context, whole = (decode(family, sample.ids[:end]) for end in (span.output_start, span.output_end))
    assert same(family, context, turn.prompt), "the context of inference"
    assert same(family, whole, turn.prompt + turn.output), "what the template renders"
    assert family.tokenizer.added_tokens_decoder[int(sample.ids[span.output_end - 1])].special, "ends in a stop token"


def check_token_boundaries(family: Family, sample: Sample, span: Span, turn: Turn) -> None:
    """The ids are those of pieces cut at the starts of outputs, which is where generation began."""
    starts = [s.output_start for s in sample.spans if s.role == "assistant" and s.message <= span.message]
    text = turn.prompt + turn.output
    cuts = [length_of(family, text, decode(family, sample.ids[:start])) for start in starts]
    assert cuts[-1] == len(turn.prompt)
    first, *middle = (text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True))
    ids = family.tokenizer(first, add_special_tokens=False).input_ids
    assert sample.ids[: len(ids)].tolist() == ids, "the first context is encoded in one piece"
    for piece in middle:
        ids = ids + encode_after_control(family, piece)
    assert sample.ids[: span.output_end].tolist() == ids


def encode_after_control(family: Family, text: str) -> list[int]:
    """Ids of a piece in the middle: encoded behind a newline, so that it gets no space that starts a section."""
    before, ids = (family.tokenizer("\0" + t, add_special_tokens=False).input_ids for t in ("", text))
    assert ids[: len(before)] == before
    return list(ids[len(before) :])


def num_branches(family: Family, want: Expected) -> int:
    """One sample for the whole, and one for every turn whose text no later one continues."""
    wholes = [turn.prompt + turn.output for turn in want.turns]
    if family.history_stop:
        wholes = [whole.removesuffix(family.stop) + family.history_stop for whole in wholes]
    later = [[*wholes[number + 1 :], want.full] for number in range(len(wholes))]
    return 1 + sum(not any(b.startswith(a) for b in bs) for a, bs in zip(wholes, later, strict=True))


def same(family: Family, decoded: str, text: str) -> bool:
    """Equal; a tokenizer that puts a space before every section shows it behind its added tokens."""
    return decoded == text or (family.prepends and without_spaces(family, decoded) == without_spaces(family, text))


def without_spaces(family: Family, text: str) -> str:
    added = "|".join(map(re.escape, family.tokenizer.added_tokens_encoder))
    return re.sub(f"({added}) +", r"\1", text)


def length_of(family: Family, text: str, decoded: str) -> int:
    """How many characters of `text` were decoded to `decoded`, its beginning."""
    end = 0
    for character in decoded:
        if character == text[end : end + 1]:
            end += 1
        else:
            assert family.prepends and character == " "
    return end


def survives(family: Family, text: str) -> bool:
    return same(family, decode(family, family.tokenizer(text, add_special_tokens=False).input_ids), text)


def decode(family: Family, ids: Any) -> str:
    return str(family.tokenizer.backend_tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))
