"""One conversation as texts with boundaries: what the template writes, where each message and each answer lies in it.

Boundaries come from renders of prefixes of the conversation, never from a search for the answer's text. Every answer
lies in exactly the context the template gives it at inference. Usually one text holds them all; where the template
shows a later turn another history than an earlier one wrote (earlier reasoning dropped, an end marker moved), the
conversation takes several texts, and each message is owned by one of them.
"""

import json
import os.path
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest

from sft_dist.data.answers import answer_ends
from sft_dist.data.conversation import Conversation, RecordError, short
from sft_dist.data.escaping import OTHER_TEXT, all_texts, escape, mapped, without_edges
from sft_dist.data.renderer import REASONING_KEYS, Renderer


@dataclass(frozen=True, slots=True)
class Answer:
    """Characters [start, end) that the model writes: what its author wrote, and the stop token."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Layout:
    """One text of a conversation, with stand-ins for what only looks like a control token."""

    text: str
    starts: tuple[int, ...]  # [messages in it + 1] characters
    answers: dict[int, Answer]  # of the owned assistant messages
    contents: dict[int, tuple[int, int]]  # characters of the content of owned messages that are no answers
    stand_ins: dict[str, str]  # stand-in character -> text that someone wrote


@dataclass(frozen=True, slots=True)
class _Turn:
    """An assistant message in the context it has at inference: the text up to and with it, rendered as the last one."""

    number: int
    header: str  # with the generation prompt
    text: str
    ends: tuple[int, ...]  # where its answer may end, the best one first


def lay_out(renderer: Renderer, conversation: Conversation) -> list[Layout]:
    """All texts of a conversation. Raises RecordError where the template loses or changes what was written."""
    _check_tools(renderer, conversation)
    escaped, stand_ins = escape(renderer.marks, conversation)
    work = _Renders(renderer, escaped)
    turns = [_turn(work, number) for number, m in enumerate(escaped.messages) if m.role == "assistant"]
    layouts: list[Layout] = []
    first_owned = 0
    for chain in _chains(turns):
        last = chain[-1][0]
        is_final = last is turns[-1]
        text, end = last.text, last.number + 1
        if is_final and end < len(escaped.messages):
            whole = work.upto(len(escaped.messages))
            if whole.startswith(last.text[: chain[-1][1].end]):
                text, end = whole, len(escaped.messages)
        answers = {turn.number: answer for turn, answer in chain}
        layouts.append(_layout(work, text, first_owned, end, answers, stand_ins))
        first_owned = end
    if first_owned < len(escaped.messages):  # what follows the last answer, where that is then shown differently
        whole = work.upto(len(escaped.messages))
        layouts.append(_layout(work, whole, first_owned, len(escaped.messages), {}, stand_ins))
    for character in stand_ins:
        if any(json.dumps(character)[1:-1] in layout.text for layout in layouts):
            raise RecordError("control text", f"the template escapes {stand_ins[character]!r} beyond recognition")
    if stand_ins:
        _check_control_text_is_only_text(renderer, conversation, layouts)
    _check_nothing_joins(renderer, escaped, layouts)
    return layouts


def lay_out_prompt(renderer: Renderer, conversation: Conversation, *, with_header: bool = True) -> Layout:
    """The context in which an answer to a conversation begins, or without its header all messages.

    Raises RecordError where the template misreads it.
    """

    def rendered(shown: Conversation) -> str:
        work, num = _Renders(renderer, shown), len(shown.messages)
        return work.prompt(num) if with_header else work.upto(num)

    escaped, stand_ins = escape(renderer.marks, conversation)
    text = rendered(escaped)
    layout = Layout(text, (0, len(text)), {}, {}, stand_ins)
    if stand_ins:
        _check_same_text(as_written(layout, text), rendered(conversation))
    return layout


def as_written(layout: Layout, text: str) -> str:
    """A part of a layout's text with what the stand-ins stand for."""
    for character, written in layout.stand_ins.items():
        text = text.replace(character, written)
    return text


def _check_control_text_is_only_text(renderer: Renderer, conversation: Conversation, layouts: Sequence[Layout]) -> None:
    """The template must not read what someone wrote: the same text must come out without stand-ins, as at inference."""
    work = _Renders(renderer, conversation)
    for layout in layouts:
        _check_same_text(as_written(layout, layout.text), work.upto(len(layout.starts) - 1))


def _check_same_text(shown: str, rendered: str) -> None:
    if shown != rendered:
        at = common_length(shown, rendered)
        raise RecordError(
            "control text",
            f"the template takes what a message says for its own syntax: …{short(shown[max(at - 20, 0) :])}",
        )


def _check_nothing_joins(renderer: Renderer, escaped: Conversation, layouts: Sequence[Layout]) -> None:
    """No text of a message may make a mark together with its surroundings, as `/s` does between `<` and `>`."""
    mark = renderer.marks.pattern
    if mark is None:
        return

    def without_parts(text: str) -> str:
        if mark.search(text) is None:
            return without_edges(renderer.marks, text)
        marks = [*mark.findall(text), ""]
        return "".join(without_edges(renderer.marks, said) + m for said, m in zip(mark.split(text), marks, strict=True))

    if all(without_parts(text) == text for text in all_texts(escaped) if text):
        return
    work = _Renders(renderer, mapped(escaped, without_parts, without_parts))
    for layout in layouts:
        demanded = mark.findall(work.upto(len(layout.starts) - 1))
        if mark.findall(layout.text) != demanded:
            raise RecordError(
                "control text", "what a message says becomes a control token between the template's words"
            )


class _Renders:
    """Renders of prefixes of one conversation, each made once."""

    def __init__(self, renderer: Renderer, conversation: Conversation) -> None:
        self.renderer = renderer
        self.messages = conversation.messages
        self.tools = conversation.tools
        self.plain = [renderer.plain(message) for message in conversation.messages]
        self._upto: dict[int, str] = {}

    def upto(self, end: int) -> str:
        """The first `end` messages."""
        if end not in self._upto:
            self._upto[end] = self.renderer.apply(self.plain[:end], self.tools, generation_prompt=False)
        return self._upto[end]

    def prompt(self, end: int) -> str:
        """The first `end` messages and the header of an answer."""
        return self.renderer.apply(self.plain[:end], self.tools, generation_prompt=True)

    def with_other(self, number: int, keys: Iterable[str], end: int) -> str:
        """The first `end` messages with another text in the place of a part of message `number`."""
        other = self.plain[number] | dict.fromkeys(keys, OTHER_TEXT)
        messages = [*self.plain[:number], other, *self.plain[number + 1 : end]]
        return self.renderer.apply(messages, self.tools, generation_prompt=False)

    def start_of_content(self, number: int, text: str) -> int:
        """Where the content of a message begins in a text that goes on with it: where another content would differ."""
        return common_length(self.with_other(number, ("content",), number + 1), text)

    def end_of_content(self, number: int, text: str, end: int) -> int:
        """Where the content of a message ends in the text of the first `end` messages; 0 where it does not show."""
        rendered = self.with_other(number, ("content",), end)
        return len(text) - common_length(rendered[::-1], text[::-1])


def _turn(work: _Renders, number: int) -> _Turn:
    header, text = work.prompt(number), work.upto(number + 1)
    if not text.startswith(header):
        raise RecordError(
            "template contradicts itself",
            f"message {number + 1}: the prompt for it is not how its own rendering begins, so no answer of the model "
            f"could look like it: the prompt ends in {short(header[-60:])}",
        )
    message = work.messages[number]
    plain_stop = work.renderer.plain_stop if message.tool_calls else None
    ends = answer_ends(work.renderer.marks, message, number, len(header), text, plain_stop)
    if message.tool_calls:
        _check_nothing_beside_calls_is_dropped(work, number)
    return _Turn(number, header, text, ends)


def _check_nothing_beside_calls_is_dropped(work: _Renders, number: int) -> None:
    """What stands beside calls may be found in them (a city), and still be dropped: another text in its place tells."""
    message = work.messages[number]
    for said, keys in ((message.content, ("content",)), (message.reasoning, REASONING_KEYS)):
        if (said or "").strip() and OTHER_TEXT not in work.with_other(number, keys, number + 1):
            raise RecordError(
                "template drops a message",
                f"message {number + 1}: the template does not write the {keys[0].replace('_', ' ')} beside tool calls",
            )


def _chains(turns: Sequence[_Turn]) -> Iterator[list[tuple[_Turn, Answer]]]:
    """Group turns of which each finds the ones before it, word for word, in its own context."""
    chain: list[tuple[_Turn, Answer]] = []
    for turn, following in zip_longest(turns, turns[1:]):
        kept = [end for end in turn.ends if following and following.header.startswith(turn.text[:end])]
        chain.append((turn, Answer(len(turn.header), kept[0] if kept else turn.ends[0])))
        if not kept:
            yield chain
            chain = []


def _layout(
    work: _Renders, text: str, first_owned: int, end: int, answers: dict[int, Answer], stand_ins: dict[str, str]
) -> Layout:
    """Find where each message lies in `text`, and check that those it owns are all there."""
    starts, header = [0], work.renderer.answer_header
    for number in range(1, end):
        answer = answers.get(number)
        if answer and header and text.endswith(header, 0, answer.start):
            start = answer.start - len(header)  # saves a render
        else:
            before = answers.get(number - 1)
            low = max(starts[-1], before.end if before else 0)
            start = max(low, _boundary(work, text, number, end, low, answers, is_owned=number >= first_owned))
        starts.append(start)
    starts.append(len(text))
    contents = {}
    for number in range(first_owned, end):
        if number not in answers:
            contents[number] = _content(work, text, number, starts[number], starts[number + 1])
    _check_nothing_is_hidden(work, first_owned, end)
    return Layout(text, tuple(starts), answers, contents, stand_ins)


def _boundary(
    work: _Renders, text: str, number: int, end: int, low: int, answers: dict[int, Answer], *, is_owned: bool
) -> int:
    """Where message `number` begins, at `low` or after it: between the words of the message before it and its own."""
    try:
        before = work.upto(number)
    except RecordError:
        before = None  # some templates refuse a lone system message
    if before is not None and text.startswith(before):
        return len(before)
    if not is_owned:
        return low
    try:
        own = answers[number].start if number in answers else work.start_of_content(number, text)
    except RecordError:
        return low
    # Never beyond the next answer: its words may repeat those of the message before this one.
    limit = min((answer.start for turn, answer in answers.items() if turn >= number), default=len(text))
    own = min(own, limit)
    if number - 1 not in answers and (work.messages[number - 1].content or "").strip():
        with suppress(RecordError):
            said_end = work.end_of_content(number - 1, text, end)
            low = said_end if low < said_end <= limit else low
    if own < low:  # the template has moved it to another place, such as the first system message
        own = next((match.end() for match in work.renderer.marks.control_in(text, low, limit)), low)
    controls = list(work.renderer.marks.control_in(text, low, own))
    # The rendering of what comes before may end in a mark of its own, such as an eos at the end of a conversation.
    parted = common_length(before or "", text)
    parted = next((match.start() for match in controls if match.start() < parted < match.end()), parted)
    if low < parted <= own:
        return parted
    if not controls:
        return own
    # Another history than it had then: behind the control token that ends the message before, and white space.
    behind = controls[0].end()
    return behind + len(text[behind:own]) - len(text[behind:own].lstrip())


def _content(work: _Renders, text: str, number: int, start: int, end: int) -> tuple[int, int]:
    """Characters of a message's content. Raises RecordError where the template has dropped or changed it."""
    for form in _forms(work.messages[number].content or ""):
        at = text.rfind(form, start, end)
        if at >= 0:
            if form and text.find(form, start, end) != at:
                at = _place_of(work, text, number, form, at)
            return at, at + len(form)
        if form in text:  # merged into another message, as some templates do with the system message
            if work.messages[number].train is not None or work.messages[number].weight != 1:
                raise RecordError(
                    "merged message",
                    f"message {number + 1} has a mark or weight of its own, but the template writes it into another",
                )
            return start, start
    raise RecordError(
        "template drops a message",
        f"message {number + 1} ({work.messages[number].role}) is not in the rendered text: "
        f"{short(work.messages[number].content or '')}",
    )


def _forms(written: str) -> Iterator[str]:
    """A content as templates write it: as it is, without white space around it, or as JSON does."""
    yield written
    stripped = written.strip()
    if stripped != written:
        yield stripped
    for form in dict.fromkeys((written, stripped)):
        in_json = json.dumps(form, ensure_ascii=False)[1:-1]
        if in_json != form:
            yield in_json


def _place_of(work: _Renders, text: str, number: int, form: str, otherwise: int) -> int:
    """Where a content begins that its surroundings hold too (an `m` before <|im_end|>): a render with another tells."""
    try:
        at = work.start_of_content(number, text)
    except RecordError:
        return otherwise
    return at if text.startswith(form, at) else otherwise


def _check_nothing_is_hidden(work: _Renders, first: int, end: int) -> None:
    roles = tuple(message.role for message in work.messages[:end])
    for number in sorted(work.renderer.hidden_messages(roles)):
        if number >= first and (work.messages[number].content or "").strip() and roles[number] != "assistant":
            raise RecordError(
                "template drops a message", f"message {number + 1}: the template does not write {roles[number]} there"
            )


def _check_tools(renderer: Renderer, conversation: Conversation) -> None:
    if conversation.tools and not renderer.shows_tools:
        raise RecordError(
            "template drops a message", "the record offers tools, which the template does not write; give a template "
            "with tools (data.chat_template)"
        )  # fmt: skip
    if any(message.tool_calls for message in conversation.messages) and not renderer.shows_tool_calls:
        raise RecordError("template drops a message", "the template does not write tool calls")


def common_length(a: str, b: str) -> int:
    """Characters that two texts share at their beginning."""
    return len(os.path.commonprefix([a, b]))  # noqa: RUF071 - of characters is what is wanted
