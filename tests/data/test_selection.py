"""Which tokens are targets and what each weighs, against the definitions of docs/objective.md, token by token."""

import tempfile
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_dist.data.conversation import Conversation, Message, ToolCall, digest
from sft_dist.data.sample import Sample, Span
from sft_dist.data.selection import Selection
from sft_dist.errors import DataError
from tests.helpers.samples import prepared, select

SOURCE_WEIGHTS = {"chat": 0.5, "code": 3.0}  # "text" has none


@st.composite
def conversations(draw: st.DrawFn, index: int) -> list[Sample]:
    """The samples of one conversation: one, two branches that share its turns, or a plain text."""
    weight = draw(st.sampled_from([0.0, 0.25, 1.0, 2.0]))
    source = draw(st.sampled_from(["chat", "code", "text"]))
    common: dict[str, Any] = {"conversation_id": f"c{index}", "index": index, "source": source, "weight": weight}
    common["digest"] = bytes([draw(st.integers(0, 3))] * 16)
    if draw(st.integers(0, 4)) == 0:
        length = draw(st.integers(2, 60))
        span = Span(0, "text", 0, 0, length, length, is_owned=True, turn=1, weight=draw(st.sampled_from([0.5, 1.0])))
        return [Sample(ids=np.arange(length, dtype=np.int32), spans=(span,), num_turns=1, **common)]
    num_messages = draw(st.integers(1, 7))
    roles = [draw(st.sampled_from(["user", "assistant", "assistant", "system"])) for _ in range(num_messages)]
    num_turns = roles.count("assistant")
    branch_of = [draw(st.integers(0, 1)) for _ in roles] if draw(st.booleans()) else [0] * num_messages
    samples = []
    for branch in sorted(set(branch_of)):
        spans, place, turn = [], 0, 0
        for number, role in enumerate(roles):
            header, output, tail = (draw(st.integers(0, 3)), draw(st.integers(1, 6)), draw(st.integers(0, 1)))
            turn += role == "assistant"
            start = place
            place += header + output + tail
            spans.append(
                Span(
                    number,
                    role,
                    start,
                    start + header,
                    start + header + output,
                    place,
                    is_owned=branch_of[number] == branch,
                    turn=turn if role == "assistant" else 0,
                    weight=draw(st.sampled_from([0.0, 0.5, 1.0, 1.0, 4.0])),
                    train=draw(st.sampled_from([None, None, True, False])),
                )
            )
        samples.append(Sample(ids=np.arange(place, dtype=np.int32), spans=tuple(spans), num_turns=num_turns, **common))
    return samples


@st.composite
def data_sets(draw: st.DrawFn) -> list[Sample]:
    return [sample for index in range(draw(st.integers(0, 6))) for sample in draw(conversations(index))]


def is_target(sample: Sample, span: Span, train_on: str) -> bool:
    if not span.is_owned or span.train is False or span.weight == 0 or sample.weight == 0:
        return False
    answers = {"assistant", "text"}
    return {
        "all": True,
        "marked": span.train is True,
        "assistant": span.role in answers,
        "last_assistant": span.role in answers and span.turn == sample.num_turns,
    }[train_on]


def wanted(sample: Sample, train_on: str) -> dict[int, Span]:
    """Position -> span of every target of a whole sample."""
    found = {}
    for span in sample.spans:
        if is_target(sample, span, train_on):
            begin, end = (span.start, span.end) if train_on == "all" else (span.output_start, span.output_end)
            found |= {place: span for place in range(begin, end) if place > 0}
    return found


def kept_tokens(sample: Sample, max_length: int, overflow: str, train_on: str) -> int:
    """How many tokens of a sample take part, from its beginning."""
    if len(sample.ids) <= max_length:
        return len(sample.ids)
    if overflow == "drop":
        return 0
    if all(span.role == "text" for span in sample.spans):
        return len(sample.ids)
    targets = wanted(sample, train_on)
    ends = [span.output_end for span in sample.spans if span.turn and span.output_end <= max_length]
    return max((end for end in ends if any(place < end for place in targets)), default=0)


def kept_kinds(samples: list[Sample], deduplicate: bool, repeats: dict[str, float]) -> list[bool]:
    first: dict[bytes, int] = {}
    for sample in sorted(samples, key=lambda sample: (-repeats.get(sample.source, 1.0), sample.index)):
        first.setdefault(sample.digest, sample.index)
    return [not deduplicate or first[sample.digest] == sample.index for sample in samples]


def targets_found(selection: Selection) -> dict[tuple[int, int], tuple[int, float]]:
    """(sample, position in the whole sample) -> (message, weight), each exactly once."""
    found = {}
    for number in range(len(selection)):
        example = selection[number]
        assert len(example.sample.ids) == len(example.turns) == len(example.weights) == selection.lengths[number]
        for place in np.flatnonzero(example.turns >= 0):
            assert place > 0, "nothing comes before token 0"
            key = (int(selection.samples[number]), int(example.sample.ids[place]))  # ids count the tokens
            assert key not in found, "a target is one once"
            found[key] = (int(example.turns[place]), float(example.weights[place]))
        assert not example.weights[example.turns < 0].any()
    return found


@settings(deadline=None)
@given(
    data_sets(),
    st.sampled_from(["assistant", "last_assistant", "all", "marked"]),
    st.sampled_from(["token", "turn", "conversation"]),
    st.integers(4, 70),
    st.sampled_from(["drop", "truncate_turns"]),
    st.booleans(),
    st.fixed_dictionaries({}, optional={"chat": st.sampled_from([0.0, 2.0]), "code": st.sampled_from([0.0, 0.5])}),
)
def test_targets_weights_and_denominators_are_those_of_the_definitions(
    samples: list[Sample],
    train_on: str,
    normalise: str,
    max_length: int,
    overflow: str,
    deduplicate: bool,
    repeats: dict[str, float],
) -> None:
    policy = {"train_on": train_on, "normalise": normalise, "max_length": max_length, "overflow": overflow}
    policy |= {"deduplicate": deduplicate, "repeats": repeats, "source_weights": SOURCE_WEIGHTS}
    if not samples:
        return
    with tempfile.TemporaryDirectory() as folder:
        selection = select(Path(folder), samples, **policy)
        found = targets_found(selection)
        masses = [float(selection[number].weights.astype(np.float64).sum()) for number in range(len(selection))]
    is_kept = kept_kinds(samples, deduplicate, repeats)
    expected: dict[tuple[int, int], Span] = {}
    lost: dict[int, tuple[str, int, int]] = {}
    never_drawn: list[int] = []
    for place, sample in enumerate(samples):
        targets = wanted(sample, train_on)
        if repeats.get(sample.source) == 0:
            never_drawn.append(len(targets))
            continue
        kept = kept_tokens(sample, max_length, overflow, train_on) if is_kept[place] else 0
        reason = "end cut off" if kept else "too long" if is_kept[place] else "duplicate"
        if kept and not targets:
            kept, reason = 0, "no target"
        expected |= {(place, token): span for token, span in targets.items() if token < kept}
        if kept < len(sample.ids):
            lost[place] = (reason, len(sample.ids) - kept, sum(token >= kept for token in targets))
    assert {key: message for key, (message, _) in found.items()} == {k: span.message for k, span in expected.items()}

    # docs/objective.md, section 5.
    in_turn = Counter((place, span.message) for (place, _), span in expected.items())
    in_conversation: dict[int, float] = defaultdict(float)
    for (place, _), span in expected.items():
        in_conversation[samples[place].index] += span.weight
    weights = {}
    for (place, token), span in expected.items():
        sample = samples[place]
        whole = sample.weight * SOURCE_WEIGHTS.get(sample.source, 1.0)
        share = {
            "token": span.weight,
            "turn": span.weight / in_turn[place, span.message],
            "conversation": span.weight / in_conversation[sample.index],
        }[normalise]
        weights[place, token] = whole * share
    largest = max(weights.values(), default=1.0)
    assert {key: weight for key, (_, weight) in found.items()} == pytest.approx(
        {key: weight / largest for key, weight in weights.items()}, rel=1e-6
    )
    assert selection.mass.tolist() == pytest.approx(masses, rel=1e-6), "the denominator is the sum of the weights"
    counts = Counter(place for place, _ in expected)
    assert Counter(dict(zip(*_sums(selection.samples, selection.num_targets), strict=True))) == counts
    left_out = list(selection.left_out.listed())
    assert {left.sample: (left.reason, left.num_tokens, left.num_targets) for left in left_out} == lost
    assert len(left_out) == len(lost), "nothing is left out twice"
    count, _, num_targets = selection.left_out.summary().get("repeat 0", (0, 0, 0))
    assert (count, num_targets) == (len(never_drawn), sum(never_drawn))
    assert len(selection.left_out) == len(lost) + count
    for reason, (count, num_tokens, num_targets) in selection.left_out.summary().items():
        if reason != "repeat 0":
            mine = [item for item in lost.values() if item[0] == reason]
            assert (count, num_tokens, num_targets) == (len(mine), sum(m[1] for m in mine), sum(m[2] for m in mine))


def _sums(places: np.ndarray, counts: np.ndarray) -> tuple[list[int], list[int]]:
    sums: Counter[int] = Counter()
    for place, count in zip(places.tolist(), counts.tolist(), strict=True):
        if count:
            sums[place] += count
    return list(sums), list(sums.values())


@settings(deadline=None)
@given(data_sets(), st.sampled_from(["token", "turn", "conversation"]), st.sampled_from([0.3, 8.0, 1e-30, 1e30]))
def test_a_factor_on_all_weights_changes_nothing(samples: list[Sample], normalise: str, factor: float) -> None:
    """Also where the product of two weights is no float32."""
    if not samples:
        return
    scaled_samples = [
        replace(
            s, weight=s.weight * factor, spans=tuple(replace(span, weight=span.weight * factor) for span in s.spans)
        )
        for s in samples
    ]
    with tempfile.TemporaryDirectory() as folder:
        plain = select(Path(folder) / "1", samples, normalise=normalise)
        scaled = select(Path(folder) / "2", scaled_samples, normalise=normalise)
        assert len(plain) == len(scaled)
        assert plain.mass == pytest.approx(scaled.mass, rel=1e-6)
        for number in range(len(plain)):
            assert plain[number].weights == pytest.approx(scaled[number].weights, rel=1e-6)
            assert scaled.mass[number] == pytest.approx(scaled[number].weights.sum(dtype=np.float64), rel=1e-6)


@settings(deadline=None)
@given(st.integers(2, 200), st.integers(2, 40))
def test_a_long_text_becomes_windows_that_train_every_token_but_the_first_once(length: int, max_length: int) -> None:
    span = Span(0, "text", 0, 0, length, length, is_owned=True, turn=1)
    sample = Sample("t", 0, "text", np.arange(length, dtype=np.int32), (span,), num_turns=1)
    with tempfile.TemporaryDirectory() as folder:
        selection = select(Path(folder), [sample], max_length=max_length, overflow="truncate_turns", normalise="turn")
        assert sorted(targets_found(selection)) == [(0, place) for place in range(1, length)]
        windows = [selection[number].sample for number in range(len(selection))]
    assert not len(selection.left_out)
    assert selection.mass.sum() == pytest.approx(length - 1), "a text is one turn, in however many windows"
    for window, following in pairwise(windows):
        assert len(window.ids) == max_length
        assert window.ids[-1] == following.ids[0], "windows overlap by one token"
    for window in windows:
        assert window.spans[0].start == 0 and window.spans[0].end == len(window.ids)


def test_an_answer_is_never_cut_inside_and_keeps_its_stop_token(tmp_path: Path) -> None:
    def turn(number: int, start: int) -> tuple[Span, Span]:
        ask = Span(2 * number, "user", start, start, start + 4, start + 4, is_owned=True)
        answer = Span(
            2 * number + 1, "assistant", start + 4, start + 6, start + 10, start + 11, is_owned=True, turn=number + 1
        )
        return ask, answer

    spans = tuple(span for number in range(3) for span in turn(number, 11 * number))
    sample = Sample("c", 0, "chat", np.arange(33, dtype=np.int32), spans, num_turns=3)
    # Answers end at 10, 21 and 32.
    for max_length, kept in {33: 33, 32: 32, 31: 21, 21: 21, 20: 10, 10: 10, 9: 0}.items():
        selection = select(tmp_path / str(max_length), [sample], max_length=max_length, overflow="truncate_turns")
        assert selection.lengths.tolist() == ([kept] if kept else [])
        targets = [place for _, place in sorted(targets_found(selection))]
        assert targets == [p for end in (10, 21, 32) if end <= kept for p in range(end - 4, end)]
        if kept:
            last = selection[0].sample.spans[-1]
            assert last.output_end == min(kept, 32) and last.end == kept, "the last answer is whole"
        left = [(item.num_tokens, item.num_targets) for item in selection.left_out.listed()]
        assert left == ([(33 - kept, 12 - len(targets))] if kept < 33 else [])


def test_scoring_takes_the_roles_it_asks_for_whatever_is_trained(tmp_path: Path) -> None:
    spans = (
        Span(0, "user", 0, 1, 3, 4, is_owned=True, train=False),
        Span(1, "assistant", 4, 5, 7, 8, is_owned=True, turn=1, weight=0.0),
    )
    sample = Sample("c", 0, "chat", np.arange(8, dtype=np.int32), spans, num_turns=1, weight=0.0)
    for roles, expected in ({"user"}, [1, 2]), ({"assistant"}, [5, 6]), ({"user", "assistant"}, [1, 2, 5, 6]):
        selection = select(tmp_path / "-".join(roles), [sample], roles=frozenset(roles))
        assert [place for _, place in sorted(targets_found(selection))] == expected


def test_a_selection_may_be_empty(tmp_path: Path) -> None:
    spans = (Span(0, "assistant", 0, 0, 9, 9, is_owned=True, turn=1),)
    sample = Sample("c", 0, "chat", np.arange(9, dtype=np.int32), spans, num_turns=1)
    for normalise in ("token", "turn", "conversation"):
        selection = select(tmp_path / normalise, [sample], max_length=5, normalise=normalise)
        assert len(selection) == len(selection.mass) == len(selection.lengths) == 0
        assert [item.reason for item in selection.left_out.listed()] == ["too long"]


def one_answer(index: int, source: str, digest: str = "", **facts: Any) -> Sample:
    """One message of three target tokens; `facts` of its span."""
    span = Span(0, "assistant", 0, 1, 4, 5, is_owned=True, turn=1, **facts)
    content = (digest or str(index)).encode().ljust(16)
    return Sample(f"c{index}", index, source, np.arange(5, dtype=np.int32), (span,), num_turns=1, digest=content)


@pytest.mark.parametrize(
    ("repeats", "kept"),
    [({"a": 0}, [1, 3]), ({"a": 0.5}, [1, 3]), ({}, [0, 3]), ({"a": 2, "b": 3}, [1, 3]), ({"b": 0, "c": 0}, [0])],
)
def test_of_equal_conversations_the_one_drawn_most_stays(
    tmp_path: Path, repeats: dict[str, float], kept: list[int]
) -> None:
    samples = [one_answer(0, "a", "x"), one_answer(1, "b", "x"), one_answer(2, "c", "x"), one_answer(3, "c")]
    assert select(tmp_path, samples, deduplicate=True, repeats=repeats).indices.tolist() == kept


def test_windows_without_a_target_are_left_out_and_counted(tmp_path: Path) -> None:
    spans = tuple(
        Span(number, "text", start, start, end, end, is_owned=True, turn=1, train=train)
        for number, (start, end, train) in enumerate([(0, 5, None), (5, 17, False), (17, 20, None)])
    )
    sample = Sample("t", 0, "text", np.arange(20, dtype=np.int32), spans, num_turns=1)
    selection = select(tmp_path, [sample], max_length=6, overflow="truncate_turns")
    # Windows [0, 6), [5, 11), [10, 16) and [15, 20).
    assert [selection[number].sample.ids[0] for number in range(len(selection))] == [0, 15]
    assert [(item.reason, item.num_tokens, item.num_targets) for item in selection.left_out.listed()] == [
        ("no target", 10, 0)
    ]


@pytest.mark.parametrize(("record", "message", "source"), [(1e-38, 1.0, 1.0), (3e38, 3e38, 1e300), (1, 1e-20, 1e-20)])
def test_weights_too_far_apart_for_one_sum_are_an_error(
    tmp_path: Path, record: float, message: float, source: float
) -> None:
    samples = [one_answer(0, "plain"), replace(one_answer(1, "odd", weight=message), weight=record)]
    with pytest.raises(DataError, match=r"weights of target tokens.*c1"):
        select(tmp_path, samples, source_weights={"odd": source})


def test_sources_are_told_apart_over_shards(tmp_path: Path) -> None:
    names = ["b", "a", "b", "ü", "a"]
    whole = prepared(tmp_path, [one_answer(index, name) for index, name in enumerate(names)])
    for first, end in (0, 5), (1, 4), (3, 5):
        part_names, codes = whole.part(first, end).sources()
        assert [part_names[code] for code in codes] == names[first:end]
        assert len(set(part_names)) == len(part_names)


def test_the_digest_is_of_all_that_a_template_may_write() -> None:
    def of(call_id: str | None, answered: str | None) -> bytes:
        messages = (
            Message("assistant", None, tool_calls=(ToolCall("f", {}, call_id),)),
            Message("tool", "1", tool_call_id=answered),
        )
        return digest(Conversation("c", 0, "s", "", 1.0, messages))

    kinds = [of(call_id, answered) for call_id in (None, "a", "b") for answered in (None, "a", "b")]
    assert len(set(kinds)) == 9 and of("a", "b") == of("a", "b")
