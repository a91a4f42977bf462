"""A prepared data set as one run sees it: what fits, which tokens are targets, and how much each counts.

Pure functions of (prepared data, policy), applied after preparation, so that one prepared set serves every mask, length
and weighting. The formulas stand in docs/objective.md, section 5.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.conversation import ROLES
from sft_dist.data.sample import Int32, Sample
from sft_dist.data.store import PreparedDataset, SpanTable

TrainOn = Literal["assistant", "last_assistant", "all", "marked"]
Normalise = Literal["token", "turn", "conversation"]
Overflow = Literal["drop", "truncate_turns"]
Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]

_TEXT = ROLES.index("text")
_ANSWERS = (ROLES.index("assistant"), _TEXT)


@dataclass(frozen=True, slots=True)
class Policy:
    """What of a prepared data set takes part, and with which weight.

    `roles` replaces `train_on` where it is given (scoring): the outputs of all messages of these roles.
    """

    max_length: int
    train_on: TrainOn = "assistant"
    normalise: Normalise = "token"
    overflow: Overflow = "drop"
    deduplicate: bool = False
    source_weights: Mapping[str, float] = field(default_factory=dict)
    roles: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """A sample, cut to what fits, with its targets. Token 0 is never one: nothing comes before it."""

    sample: Sample
    turns: Int32  # [T] number of the message that each token is a target of, or -1
    weights: NDArray[np.float32]  # [T] factor of -log Pr in the numerator of the loss; 0 where no target


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A sample, or the end of one, that takes no part."""

    sample: int  # its number in the prepared data set
    reason: str
    num_tokens: int
    num_targets: int


class Selection:
    """Examples by number, in the order of the data set; those without a target are there too."""

    def __init__(self, dataset: PreparedDataset, policy: Policy) -> None:
        self.dataset = dataset
        self.policy = policy
        self._is_target, self._first, self._last = _targets(dataset.spans, dataset.column("num_turns"), policy)
        self._span_rows = np.searchsorted(dataset.spans.sample, np.arange(len(dataset) + 1))
        self.samples, self._begins, self._ends, self.left_out = self._views()
        self.lengths: Int64 = self._ends - self._begins  # [n] tokens of each example
        self.indices: Int64 = dataset.column("index")[self.samples]  # [n] of each example's conversation
        self.sources: NDArray[Any] = dataset.column("source")[self.samples]  # [n] names
        self._base, self._scale = np.zeros(0), np.ones(0)  # weight of each span, factor of each example
        self.num_targets: Int64 = np.zeros(0, np.int64)  # [n] target tokens of each example
        self.mass: Float64 = np.zeros(0)  # [n] what each example adds to the denominator of its step
        self._weigh()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> Example:
        begin, end = int(self._begins[number]), int(self._ends[number])
        whole = self.dataset[int(self.samples[number])]
        sample = whole if (begin, end) == (0, len(whole.ids)) else _cut(whole, begin, end)
        turns = np.full(end - begin, -1, np.int32)
        weights = np.zeros(end - begin, np.float32)
        rows = slice(*self._span_rows[self.samples[number] : self.samples[number] + 2])
        for row in range(rows.start, rows.stop):
            first, last = max(int(self._first[row]), begin + 1), min(int(self._last[row]), end)
            if not self._is_target[row] or first >= last:
                continue
            turns[first - begin : last - begin] = self.dataset.spans.message[row]
            weight = self._base[row] * self._scale[number]
            weights[first - begin : last - begin] = (
                weight / (last - first) if self.policy.normalise == "turn" else weight
            )
        return Example(sample, turns, weights)

    def _views(self) -> tuple[Int64, Int64, Int64, list[LeftOut]]:
        """(sample, begin, end) of every example, and what is left out."""
        dataset, policy = self.dataset, self.policy
        lengths = dataset.lengths
        left_out: list[LeftOut] = []
        is_kept = np.ones(len(dataset), bool)
        if policy.deduplicate:
            is_kept = _first_of_their_kind(dataset)
            left_out += [self._left_out(int(n), "duplicate", 0) for n in np.flatnonzero(~is_kept)]
        fitting = np.flatnonzero(is_kept & (lengths <= policy.max_length))
        views = [(fitting, np.zeros(len(fitting), np.int64), lengths[fitting])]
        for number in np.flatnonzero(is_kept & (lengths > policy.max_length)):
            windows, rest = self._fit(int(number))
            if windows:
                begins, ends = np.array(windows, np.int64).T
                views.append((np.full(len(windows), number), begins, ends))
            if rest is not None:
                left_out.append(rest)
        samples, begins, ends = (np.concatenate(parts) for parts in zip(*views, strict=True))
        order = np.lexsort((begins, samples))
        return samples[order], begins[order], ends[order], left_out

    def _fit(self, number: int) -> tuple[list[tuple[int, int]], LeftOut | None]:
        """Windows of a sample that is too long, and what of it is left out."""
        length, room = int(self.dataset.lengths[number]), self.policy.max_length
        if self.policy.overflow == "drop":
            return [], self._left_out(number, "too long", 0)
        spans = self.dataset.spans
        rows = np.arange(self._span_rows[number], self._span_rows[number + 1])
        if (spans.role[rows] == _TEXT).all():
            # Windows overlap by one token, so that every token but the first of the text is a target once.
            return [(begin, min(begin + room, length)) for begin in range(0, length - 1, room - 1)], None
        ends = spans.output_end[rows]
        is_end = (spans.turn[rows] > 0) & (ends <= room)
        # Up to the last answer that fits and that has a target at or before it.
        is_end &= np.cumsum(self._is_target[rows] & (self._last[rows] > self._first[rows])) > 0
        if not is_end.any():
            return [], self._left_out(number, "too long", 0)
        cut = int(ends[is_end].max())
        return [(0, cut)], self._left_out(number, "end cut off", cut)

    def _left_out(self, number: int, reason: str, begin: int) -> LeftOut:
        """Everything of a sample from token `begin`."""
        rows = slice(self._span_rows[number], self._span_rows[number + 1])
        inside = np.clip(self._last[rows] - np.maximum(self._first[rows], max(begin, 1)), 0, None)
        num_targets = int(inside[self._is_target[rows]].sum())
        return LeftOut(int(number), reason, int(self.dataset.lengths[number]) - begin, num_targets)

    def _weigh(self) -> None:
        """Fill in base, scale, num_targets and mass."""
        spans, policy, num = self.dataset.spans, self.policy, len(self)
        of_source = {name: policy.source_weights.get(name, 1.0) for name in set(self.sources)}
        conversation_weight = (
            np.array([of_source[name] for name in self.sources])
            * (self.dataset.column("weight").astype(np.float64)[self.samples])
        )
        # All pairs of an example and a span of its sample.
        counts = (self._span_rows[self.samples + 1] - self._span_rows[self.samples]).astype(np.int64)
        view = np.repeat(np.arange(num), counts)
        row = np.arange(counts.sum()) + np.repeat(self._span_rows[self.samples] - (np.cumsum(counts) - counts), counts)
        first = np.maximum(self._first[row], self._begins[view] + 1)
        tokens = np.where(
            self._is_target[row], np.clip(np.minimum(self._last[row], self._ends[view]) - first, 0, None), 0
        )
        self.num_targets = np.bincount(view, tokens, minlength=num).astype(np.int64)
        self._base, self._scale = spans.weight, conversation_weight
        weighted = spans.weight[row] * tokens
        if policy.normalise == "turn":
            weighted = spans.weight[row] * (tokens > 0)
        self.mass = conversation_weight * np.bincount(view, weighted, minlength=num)
        if policy.normalise == "conversation":
            _, conversation = np.unique(self.indices, return_inverse=True)
            own = np.bincount(view, weighted, minlength=num)
            whole = np.bincount(conversation, own)[conversation]
            self._scale = np.divide(conversation_weight, whole, out=np.zeros(num), where=whole > 0)
            self.mass = self._scale * own


def _targets(spans: SpanTable, num_turns: Int32, policy: Policy) -> tuple[NDArray[np.bool_], Int32, Int32]:
    """For every span whether it is a target, and its first target token and the one after the last."""
    # A mark of the author and a weight of 0 always take a message out.
    is_target = spans.is_owned & (spans.train != 0) & (spans.weight > 0)
    if policy.roles is not None:
        wanted = [place for place, role in enumerate(ROLES) if role in policy.roles]
        return spans.is_owned & np.isin(spans.role, wanted), spans.output_start, spans.output_end
    match policy.train_on:
        case "all":
            return is_target, spans.start, spans.end
        case "marked":
            is_target &= spans.train == 1
        case "assistant":
            is_target &= np.isin(spans.role, _ANSWERS)
        case "last_assistant":
            is_target &= np.isin(spans.role, _ANSWERS) & (spans.turn == num_turns[spans.sample])
    return is_target, spans.output_start, spans.output_end


def _first_of_their_kind(dataset: PreparedDataset) -> NDArray[np.bool_]:
    """Whether each sample belongs to the first conversation of its content."""
    _, kind = np.unique(dataset.column("digest").astype("S16"), return_inverse=True)
    indices = dataset.column("index")
    first = np.full(kind.max(initial=0) + 1, np.iinfo(np.int64).max)
    np.minimum.at(first, kind, indices)
    return np.asarray(first[kind] == indices)


def _cut(sample: Sample, begin: int, end: int) -> Sample:
    """Tokens [begin, end) of a sample, with the spans that lie in it."""
    spans = tuple(
        replace(
            span,
            start=max(span.start, begin) - begin,
            output_start=min(max(span.output_start, begin), end) - begin,
            output_end=min(max(span.output_end, begin), end) - begin,
            end=min(span.end, end) - begin,
        )
        for span in sample.spans
        if span.start < end and span.end > begin
    )
    return replace(sample, ids=sample.ids[begin:end], spans=spans)
