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
