"""A prepared data set as one run sees it: what fits, which tokens are targets, and how much each counts.

Pure functions of (prepared data, policy), applied after preparation, so that one prepared set serves every mask, length
and weighting. The formulas stand in docs/objective.md, section 5.
"""

import hashlib
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.conversation import ROLES
from sft_dist.data.labels import NO_LABEL, LabelFault, LabelSet, LabelTable, tabulate
from sft_dist.data.sample import Int32, Sample
from sft_dist.data.store import PreparedDataset
from sft_dist.data.top_logprobs import TopLogprobs, TopTable
from sft_dist.errors import DataError

TrainOn = Literal["assistant", "last_assistant", "all", "marked"]
Normalise = Literal["token", "turn", "conversation"]
Overflow = Literal["drop", "truncate_turns"]
Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]

_ASSISTANT, _TEXT = ROLES.index("assistant"), ROLES.index("text")

# What happens to a sample.
_WHOLE, _WINDOWS, _CUT, _TOO_LONG, _NO_TARGET, _DUPLICATE, _NEVER_DRAWN, _BAD_LABEL = range(8)
_REASONS = {
    _CUT: "end cut off",
    _TOO_LONG: "too long",
    _NO_TARGET: "no target",
    _DUPLICATE: "duplicate",
    _NEVER_DRAWN: "repeat 0",
    _BAD_LABEL: "bad label",
}
_SMALLEST_WEIGHT = 1e-30  # of a target, beside the largest: what float32 holds with all its digits, with room to spare


@dataclass(frozen=True, slots=True)
class Policy:
    """What of a prepared data set takes part, and with which weight.

    `roles` replaces `train_on` where it is given (scoring): the outputs of all messages of these roles. Samples without
    a target stay then; otherwise they are left out, as are those of sources that are repeated 0 times.

    With `labels` each sample has one target, its label, whose place is token 0; no token is a target. With `is_beside`
    too, tokens are targets as without labels, and the last sample of a conversation may have a label beside them.
    """

    max_length: int
    train_on: TrainOn = "assistant"
    normalise: Normalise = "token"
    overflow: Overflow = "drop"
    deduplicate: bool = False
    source_weights: Mapping[str, float] = field(default_factory=dict)  # by name; default: 1
    repeats: Mapping[str, float] = field(default_factory=dict)  # copies in an epoch, by source; default: 1
    roles: frozenset[str] | None = None
    labels: LabelSet | None = None
    is_beside: bool = False

    @property
    def is_in_place(self) -> bool:
        """Whether labels are all that is learned."""
        return self.labels is not None and not self.is_beside


@dataclass(frozen=True, slots=True)
class Example:
    """A sample, cut to what fits, with its targets. Token 0 is never one: nothing comes before it."""

    sample: Sample
    turns: Int32  # [T] number of the message that each token is a target of, or -1
    weights: NDArray[np.float32]  # [T] factor of -log Pr in the numerator of the loss; 0 where no target
    target: Float64 | None = None  # what the label says to a head, as LabelSet.target has it
    label_weight: float | None = None  # of the target beside those among the tokens; None: weights[0], and no others
    top: TopLogprobs | None = None  # what θ̂ finds likeliest at the targets, in their order


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A sample, or the end of one, that takes no part."""

    sample: int  # its number in the prepared data set
    reason: str
    num_tokens: int
    num_targets: int


@dataclass(frozen=True, slots=True)
class LeftOutTable:
    """All that takes no part, as columns in the order of the data set."""

    samples: Int64
    reasons: Int64  # keys of _REASONS
    num_tokens: Int64
    num_targets: Int64

    def __len__(self) -> int:
        return len(self.samples)

    def summary(self) -> dict[str, tuple[int, int, int]]:
        """Reason -> (number, tokens, targets), the most frequent first."""
        sums = {}
        for reason, name in _REASONS.items():
            mine = self.reasons == reason
            if mine.any():
                sums[name] = (int(mine.sum()), int(self.num_tokens[mine].sum()), int(self.num_targets[mine].sum()))
        return dict(sorted(sums.items(), key=lambda item: -item[1][0]))

    def listed(self) -> Iterator[LeftOut]:
        """One by one, without sources that are never drawn: those are whole, and wanted so."""
        for row in np.flatnonzero(self.reasons != _NEVER_DRAWN):
            reason = _REASONS[int(self.reasons[row])]
            yield LeftOut(int(self.samples[row]), reason, int(self.num_tokens[row]), int(self.num_targets[row]))


@dataclass(frozen=True, slots=True)
class Labels:
    """The labels of a data set: distinct ones as they are written, their targets and faults, and whose is which."""

    distinct: tuple[str, ...]
    table: LabelTable
    codes: Int32  # [num_samples] place in `distinct`
    is_there: NDArray[np.bool_]  # [num_samples]

    @property
    def is_faulty(self) -> NDArray[np.bool_]:
        """[num_samples]"""
        return np.isin(self.codes, list(self.table.faults))

    def target(self, sample: int) -> Float64:
        return np.asarray(self.table.targets[self.codes[sample]])

    def fault(self, sample: int) -> LabelFault:
        return self.table.faults[int(self.codes[sample])]


class Selection:
    """Examples by number, in the order of the data set.

    Raises DataError for weights of targets that are too far apart for one float32 sum.
    """

    def __init__(self, dataset: PreparedDataset, policy: Policy) -> None:
        self.dataset = dataset
        self.policy = policy
        self.top: TopTable | None = None
        spans = dataset.spans
        self.labels = None if policy.labels is None else _labels(dataset, policy.labels, is_beside=policy.is_beside)
        self._is_target, first, self._last = _targets(dataset, policy)
        self._lead = 0 if policy.is_in_place else 1  # nothing comes before token 0, which only labels belong to
        self._first = np.maximum(first, self._lead)
        self._rows = np.searchsorted(spans.sample, np.arange(len(dataset) + 1))  # first span of every sample
        cuts = self._ends_that_fit()
        self.source_names, source_codes = dataset.sources()
        reasons = _reasons(dataset, policy, cuts, _by_name(self.source_names, policy.repeats)[source_codes])
        if self.labels is not None:
            indices = dataset.column("index")
            is_bad = np.isin(indices, indices[self.labels.is_faulty])  # all samples of such a conversation
            reasons[is_bad & (reasons != _NEVER_DRAWN)] = _BAD_LABEL
        self.samples, self._begins, self._ends = self._views(reasons, cuts)
        self._label_weights = self._weights_of_labels(source_codes)
        view, row, num_tokens = self._targets_of_views()
        self.num_targets: Int64 = np.bincount(view, num_tokens, minlength=len(self)).astype(np.int64)  # [n]
        if policy.roles is None:
            view = self._drop_without_target(reasons, view)
        self.lengths: Int64 = self._ends - self._begins  # [n] tokens of each example
        self.indices: Int64 = dataset.column("index")[self.samples]  # [n] of each example's conversation
        self.source_codes: Int32 = source_codes[self.samples]  # [n] place in source_names
        self.left_out = self._left_out(reasons)
        self._span_weights: Float64 = spans.weight  # of each target token of a span
        if policy.normalise == "turn":
            # A text that is cut into windows is one turn all the same.
            of_span = np.bincount(row, num_tokens, minlength=len(spans.weight))
            self._span_weights = spans.weight / np.maximum(of_span, 1)
        own: Float64 = np.bincount(view, self._span_weights[row] * num_tokens, minlength=len(self)).astype(np.float64)
        self._scale = self._scales(own)  # [n] factor of the span weights in each example
        if policy.roles is None:
            self._scale /= self._largest_weight(view, row)
        self.mass: Float64 = self._scale * own  # [n] what each example adds to the denominator of its step
        # [n] what its label adds to the one of labels, where those stand beside tokens; 0 where it has none.
        self.label_mass: Float64 = self._label_weights[self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def labelled(self) -> Int64:
        """int64 [m]: numbers of the examples that have a label."""
        return np.flatnonzero(self.label_mass > 0) if self.policy.is_beside else np.arange(len(self))

    @property
    def label_targets(self) -> Float64:
        """[m, width]: what their labels say."""
        assert self.labels is not None
        return np.asarray(self.labels.table.targets[self.labels.codes[self.samples[self.labelled]]])

    def __getitem__(self, number: int) -> Example:
        begin, end = int(self._begins[number]), int(self._ends[number])
        place = int(self.samples[number])
        whole = self.dataset[place]
        sample = whole if (begin, end) == (0, len(whole.ids)) else _cut(whole, begin, end)
        turns = np.full(end - begin, -1, np.int32)
        weights = np.zeros(end - begin, np.float32)
        for row in range(self._rows[place], self._rows[place + 1]):
            # Token 0 of a window has nothing before it; it is a target of the window before.
            first, last = max(int(self._first[row]), begin + self._lead), min(int(self._last[row]), end)
            if self._is_target[row] and first < last:
                turns[first - begin : last - begin] = self.dataset.spans.message[row]
                weights[first - begin : last - begin] = self._span_weights[row] * self._scale[number]
        top = None if self.top is None else self.top.rows(number, int(self.num_targets[number]))
        if self.labels is None:
            return Example(sample, turns, weights, top=top)
        if not self.policy.is_beside:
            return Example(sample, turns, weights, self.labels.target(place))
        weight = float(self.label_mass[number])
        return Example(sample, turns, weights, self.labels.target(place) if weight else None, weight, top)

    def with_top(self, top: TopTable) -> "Selection":
        """The same; its examples say what θ̂ finds likeliest at their targets."""
        other = copy(self)
        other.top = top
        return other

    def digest(self) -> str:
        """16 hex digits of which tokens of the data set are in which example, and which of them are targets."""
        parts = (self.samples, self._begins, self._ends, self._is_target, self._first, self._last)
        return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()[:16]

    def _ends_that_fit(self) -> Int64:
        """[num_samples] one past the last answer that fits and has a target in it or before it; 0: there is none."""
        spans = self.dataset.spans
        seen = np.concatenate([[0], np.cumsum(self._is_target & (self._first < self._last))])
        has_target = seen[1:] > seen[self._rows[spans.sample]]
        is_end = (spans.turn > 0) & (spans.output_end <= self.policy.max_length) & has_target
        ends = np.zeros(len(self.dataset), np.int64)
        np.maximum.at(ends, spans.sample[is_end], spans.output_end[is_end])
        return ends

    def _views(self, reasons: Int64, cuts: Int64) -> tuple[Int64, Int64, Int64]:
        """(sample, begin, end) of every example. Windows overlap by one token: each but the first is a target once."""
        lengths, room = self.dataset.lengths, self.policy.max_length
        stops = np.where(reasons == _CUT, cuts, lengths)
        counts = np.where(reasons == _WINDOWS, -(-(lengths - 1) // (room - 1)), 1)
        counts[np.isin(reasons, (_TOO_LONG, _DUPLICATE, _NEVER_DRAWN, _BAD_LABEL))] = 0
        samples = np.repeat(np.arange(len(lengths)), counts)
        within = np.arange(len(samples)) - np.repeat(np.cumsum(counts) - counts, counts)
        begins = within * (room - 1)
        return samples, begins, np.minimum(begins + room, stops[samples])

    def _targets_of_views(self) -> tuple[Int64, Int64, Int64]:
        """(example, span, number of its target tokens in the example) of all pairs that have any."""
        counts = self._rows[self.samples + 1] - self._rows[self.samples]
        view = np.repeat(np.arange(len(self)), counts)
        row = np.arange(len(view)) + np.repeat(self._rows[self.samples] - (np.cumsum(counts) - counts), counts)
        is_target = self._is_target[row]
        view, row = view[is_target], row[is_target]
        first = np.maximum(self._first[row], self._begins[view] + self._lead)
        num_tokens = np.minimum(self._last[row], self._ends[view]) - first
        some = num_tokens > 0
        return view[some], row[some], num_tokens[some]

    def _drop_without_target(self, reasons: Int64, view: Int64) -> Int64:
        """Take examples without a target out, and note it in `reasons`; returns the new numbers of those in `view`."""
        has_target = (self.num_targets > 0) | (self._label_weights[self.samples] > 0)
        without = self.samples[~has_target]
        reasons[without] = np.where(reasons[without] == _CUT, _TOO_LONG, _NO_TARGET)
        self.samples, self._begins, self._ends, self.num_targets = (
            column[has_target] for column in (self.samples, self._begins, self._ends, self.num_targets)
        )
        return np.asarray((np.cumsum(has_target) - 1)[view])

    def _weights_of_labels(self, source_codes: Int32) -> Float64:
        """[num_samples] source x record weight of the labels beside tokens, the largest 1; 0: there is none."""
        weights = np.zeros(len(self.dataset))
        if self.labels is None or self.policy.labels is None or not self.policy.is_beside:
            return weights
        is_there = self.labels.is_there & ~self.labels.is_faulty
        if not self.policy.labels.is_read:
            weights[is_there] = 1.0
            return weights
        every = _by_name(self.source_names, self.policy.source_weights)[source_codes] * self.dataset.column("weight")
        weights[is_there] = every[is_there]
        some = weights[weights > 0]
        if len(some) and not (np.isfinite(some).all() and some.min() >= _SMALLEST_WEIGHT * some.max()):
            raise DataError(
                f"weights of labelled conversations reach from {some.min():.3g} to {some.max():.3g}: the smallest must "
                f"be at least {_SMALLEST_WEIGHT:g} of the largest; mend the weights of these records or sources"
            )
        return weights / some.max() if len(some) else weights

    def _largest_weight(self, view: Int64, row: Int64) -> float:
        """Of all targets, 1 where there is none. Divided by it, weights of any size are float32 numbers."""
        if not len(view):
            return 1.0
        with np.errstate(over="ignore", invalid="ignore"):
            weights = self._span_weights[row] * self._scale[view]
        low, high = int(np.argmin(weights)), int(np.argmax(weights))
        if not (np.isfinite(weights).all() and weights[low] >= _SMALLEST_WEIGHT * weights[high] > 0):
            names = [self.dataset[int(self.samples[view[pair]])].conversation_id for pair in (low, high)]
            raise DataError(
                f"weights of target tokens reach from {weights[low]:.3g} ({names[0]}) to {weights[high]:.3g} "
                f"({names[1]}): the smallest must be at least {_SMALLEST_WEIGHT:g} of the largest; mend the weights of "
                "these records, their messages or sources, or set them to 0 to leave them out"
            )
        return float(weights[high])

    def _scales(self, own: Float64) -> Float64:
        """Source x record weight of every example; with `conversation` as a share of its conversation's weight."""
        weights = _by_name(self.source_names, self.policy.source_weights)[self.source_codes]
        with np.errstate(over="ignore"):
            weights *= self.dataset.column("weight")[self.samples]
        if self.policy.normalise != "conversation":
            return weights
        _, conversation = np.unique(self.indices, return_inverse=True)
        whole = np.bincount(conversation, own)[conversation]
        with np.errstate(over="ignore"):
            return np.divide(weights, whole, out=np.zeros(len(own)), where=whole > 0)

    def _left_out(self, reasons: Int64) -> LeftOutTable:
        """What no example covers, sample by sample."""
        spans, num = self.dataset.spans, len(self.dataset)
        of_span = np.where(self._is_target, np.maximum(self._last - self._first, 0), 0)
        targets = np.bincount(spans.sample, of_span, minlength=num)
        targets -= np.bincount(self.samples, self.num_targets, minlength=num)
        # The first token of a later window is in the window before as well.
        covered = np.bincount(self.samples, self.lengths - (self._begins > 0), minlength=num)
        tokens = self.dataset.lengths - covered
        places = np.flatnonzero(np.isin(reasons, list(_REASONS)))
        return LeftOutTable(places, reasons[places], tokens[places].astype(np.int64), targets[places].astype(np.int64))


def _labels(dataset: PreparedDataset, labels: LabelSet, *, is_beside: bool) -> Labels:
    distinct, codes = dataset.texts("label")
    table = tabulate(labels, distinct, np.bincount(codes, minlength=len(distinct)).tolist())
    if not is_beside:
        return Labels(distinct, table, codes, np.ones(len(codes), np.bool_))
    absent = ("", NO_LABEL) if labels.is_read else ("",)
    without = {place for place, label in enumerate(distinct) if label in absent}
    return Labels(distinct, table.without(without), codes, ~np.isin(codes, list(without)))


def _by_name(names: tuple[str, ...], values: Mapping[str, float]) -> Float64:
    """[num_sources] the value of each source, 1 where none is given."""
    return np.array([values.get(name, 1.0) for name in names], np.float64)


def _reasons(dataset: PreparedDataset, policy: Policy, cuts: Int64, repeats: Float64) -> Int64:
    """[num_samples] what happens to every sample."""
    is_long = dataset.lengths > policy.max_length
    reasons = np.where(is_long, _TOO_LONG, _WHOLE)
    if policy.overflow == "truncate_turns":
        num_others = np.bincount(dataset.spans.sample, dataset.spans.role != _TEXT, minlength=len(dataset))
        reasons[is_long & (cuts > 0)] = _CUT
        reasons[is_long & (num_others == 0)] = _WINDOWS
    if policy.deduplicate:
        reasons[~_chosen_of_their_kind(dataset, repeats)] = _DUPLICATE
    if policy.roles is None:
        reasons[repeats == 0] = _NEVER_DRAWN
    return reasons


def _targets(dataset: PreparedDataset, policy: Policy) -> tuple[NDArray[np.bool_], Int32, Int32]:
    """For every span whether it is a target, and its first target token and the one after the last."""
    spans = dataset.spans
    if policy.labels is not None and policy.is_in_place:
        is_target = spans.is_owned & ((dataset.column("weight")[spans.sample] > 0) | (not policy.labels.is_read))
        return is_target, np.zeros_like(spans.start), np.ones_like(spans.start)
    if policy.roles is not None:
        wanted = [place for place, role in enumerate(ROLES) if role in policy.roles]
        return spans.is_owned & np.isin(spans.role, wanted), spans.output_start, spans.output_end
    # A mark of the author and a weight of 0, of the message or its record, always take a message out.
    is_target = spans.is_owned & (spans.train != 0) & (spans.weight > 0)
    is_target &= dataset.column("weight")[spans.sample] > 0
    if policy.labels is not None and not policy.labels.is_read:
        is_target[:] = False  # in prediction
    match policy.train_on:
        case "all":
            return is_target, spans.start, spans.end
        case "marked":
            is_target &= spans.train == 1
        case "assistant":
            is_target &= np.isin(spans.role, (_ASSISTANT, _TEXT))
        case "last_assistant":
            is_last = spans.turn == dataset.column("num_turns")[spans.sample]
            is_target &= (spans.role == _TEXT) | ((spans.role == _ASSISTANT) & is_last)
    return is_target, spans.output_start, spans.output_end


def _chosen_of_their_kind(dataset: PreparedDataset, repeats: Float64) -> NDArray[np.bool_]:
    """Whether each sample belongs to the conversation that stands for all of its content.

    That is the one of the source that is repeated most, so that none is drawn less than it would be by itself; of
    several the first.
    """
    _, kind = np.unique(dataset.column("digest").view("S16"), return_inverse=True)
    indices = dataset.column("index")
    most = np.zeros(kind.max(initial=0) + 1)
    np.maximum.at(most, kind, repeats)
    is_candidate = repeats == most[kind]
    first = np.full(len(most), np.iinfo(np.int64).max)
    np.minimum.at(first, kind[is_candidate], indices[is_candidate])
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
