"""Spans of owned messages hold the words of their own message and of no other, header included, in every family."""

import pytest

from sft_dist.data.conversation import Conversation, Message, RecordError, ToolCall
from sft_dist.data.renderer import Renderer
from sft_dist.data.rendering import render
from tests.helpers.zoo import DATE, FAMILIES, Family

CALL = (ToolCall("callfn", {"argx": "argword"}, "abc123def"),)
PARAMETERS = {"type": "object", "properties": {"argx": {"type": "string", "description": "d"}}}
TOOLS = ({"type": "function", "function": {"name": "callfn", "description": "d", "parameters": PARAMETERS}},)


def word(number: int) -> str:
    return f"wordnum{number}x"


def said(*roles: str) -> tuple[Message, ...]:
    return tuple(Message(role, word(number)) for number, role in enumerate(roles))


CONVERSATIONS = {
    "chat": said("user", "assistant", "user", "assistant", "user", "assistant"),
    "system": said("system", "user", "assistant", "user", "assistant", "user"),
    "adjacent": said("user", "assistant", "assistant", "user", "user", "assistant"),
    "system in the middle": said("user", "assistant", "system", "user", "assistant"),
    "reasoning": (
        Message("user", word(0)),
        Message("assistant", word(1), reasoning="thinka"),
        Message("user", word(2)),
        Message("assistant", word(3), reasoning="thinkb"),
    ),
    "tools": (
        Message("user", word(0)),
        Message("assistant", None, tool_calls=CALL),
        Message("tool", word(2), name="callfn", tool_call_id="abc123def"),
        Message("assistant", word(3)),
        Message("user", word(4)),
        Message("assistant", word(5)),
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_an_owned_span_holds_its_own_message_and_no_other(family: Family, name: str) -> None:
    messages = CONVERSATIONS[name]
    renderer = Renderer(family.tokenizer, family.source, date=DATE, template_kwargs=family.kwargs)
    tools = TOOLS if name == "tools" else ()
    (samples,) = render(renderer, [Conversation("c", 0, "s", "s:1", 1.0, messages, tools)])
    if isinstance(samples, RecordError):
        return  # tests/data/test_zoo.py says which family supports what
    decode = renderer.tokenizer.backend_tokenizer.decode
    owned = [(sample, span) for sample in samples for span in sample.spans if span.is_owned]
    assert sorted(span.message for _, span in owned) == list(range(len(messages)))
    has_header = {span.start < span.output_start for _, span in owned if span.role == "user"}
    assert len(has_header) == 1, "in every sample, or (templates without headers) in none"
    for sample, span in owned:
        whole = decode(sample.ids[span.start : span.end].tolist(), skip_special_tokens=False)
        output = decode(sample.ids[span.output_start : span.output_end].tolist(), skip_special_tokens=False)
        others = [n for n in range(len(messages)) if n != span.message and word(n) in whole]
        # Where a template has no place for the system message, it stands among the words of another.
        assert all(messages[n].role == "system" for n in others)
        if span.output_start == span.output_end:
            assert messages[span.message].role == "system"
        else:
            assert (messages[span.message].content or "") in output


def test_a_mark_on_a_message_that_the_template_merges_is_refused() -> None:
    family = next(family for family in FAMILIES if family.name == "gemma3")
    renderer = Renderer(family.tokenizer, family.source, date=DATE, template_kwargs=family.kwargs)
    messages = (Message("system", word(0), train=False), Message("user", word(1)), Message("assistant", word(2)))
    (result,) = render(renderer, [Conversation("c", 0, "s", "s:1", 1.0, messages)])
    assert isinstance(result, RecordError) and result.reason == "merged message"


def test_a_dropped_call_is_seen() -> None:
    """A template that writes only the first of two calls to one function."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m.get('content', '') }}"
        "{% for c in (m.tool_calls or [])[:1] %}{{ '<tool_call>' + c.function | tojson + '</tool_call>' }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    family = next(family for family in FAMILIES if family.name == "qwen2_5")
    calls = (ToolCall("add", {"x": 11, "y": 22}), ToolCall("add", {"x": 22, "y": 11}))
    messages = (Message("user", "sum"), Message("assistant", None, tool_calls=calls))
    for source, is_whole in ((template, False), (template.replace("[:1]", ""), True)):
        (result,) = render(Renderer(family.tokenizer, source), [Conversation("c", 0, "s", "s:1", 1.0, messages)])
        assert isinstance(result, RecordError) != is_whole


FAMILY = {family.name: family for family in FAMILIES}
QWEN3 = FAMILY["qwen3-no-nfc"]


def renderer_of(family: Family, template: str | None = None) -> Renderer:
    return Renderer(family.tokenizer, template or family.source, date=DATE, template_kwargs=family.kwargs)


def conversation(*messages: Message, tools: tuple = TOOLS) -> Conversation:
    return Conversation("c", 0, "s", "s:1", 1.0, messages, tools)


@pytest.mark.parametrize("name", ["llama3", "mistral_v3"])
@pytest.mark.parametrize("said_beside", [{"content": "argword"}, {"content": "a"}, {"reasoning": "argx"}])
def test_text_beside_calls_is_refused_where_it_is_dropped_though_the_call_says_it_too(
    name: str, said_beside: dict[str, str]
) -> None:
    answer = Message("assistant", said_beside.get("content"), reasoning=said_beside.get("reasoning"), tool_calls=CALL)
    (refused,) = render(renderer_of(FAMILY[name]), [conversation(Message("user", "q"), answer)])
    assert isinstance(refused, RecordError) and refused.reason == "template drops a message"
    shown = render(renderer_of(QWEN3), [conversation(Message("user", "q"), answer)])
    assert not isinstance(shown[0], RecordError), "the same is fine where the template writes it"


def test_a_call_ends_in_the_stop_token_of_answers_not_in_an_eos_at_the_end_of_the_text() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
        "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + (c.function | tojson) + '</tool_call>' }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
    )
    renderer = renderer_of(QWEN3, template)
    call, plain = Message("assistant", None, tool_calls=CALL), Message("assistant", "word")
    result = Message("tool", "fine", name="callfn", tool_call_id="abc123def")
    for messages in [(call,), (plain,), (call, result, plain)]:
        (samples,) = render(renderer, [conversation(Message("user", "q"), *messages, tools=())])
        assert not isinstance(samples, RecordError) and len(samples) == 1
        decode = renderer.tokenizer.backend_tokenizer.decode
        for span in samples[0].spans:
            if span.turn:
                output = decode(samples[0].ids[span.output_start : span.output_end].tolist(), skip_special_tokens=False)
                assert output.endswith("<|im_end|>") and "<|endoftext|>" not in output


@pytest.mark.parametrize("short", ["a", "s", "user", "im", "B"])
def test_headers_behind_a_short_answer_belong_to_the_message_they_open(short: str) -> None:
    """A one-letter answer occurs in the next message's header too, whose tokens `train_on: all` would miss."""
    headers = []
    for first in (short, "longword"):
        messages = (
            Message("user", "one"),
            Message("assistant", first),
            Message("user", "two"),
            Message("assistant", "c"),
            Message("user", "three"),
        )
        (samples,) = render(renderer_of(QWEN3), [conversation(*messages, tools=())])
        assert not isinstance(samples, RecordError) and len(samples) == 3
        owned = {span.message: (sample, span) for sample in samples for span in sample.spans if span.is_owned}
        headers.append([owned[m][0].ids[owned[m][1].start : owned[m][1].output_start].tolist() for m in range(5)])
    assert headers[0] == headers[1]
