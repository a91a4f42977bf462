"""Scores of conversations: one line each, with the log-probability of every message of the roles asked for."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.sample import Sample, Span
from sft_dist.data.selection import Policy, Selection
from sft_dist.data.store import PreparedDataset
from sft_dist.errors import UsageError
from sft_dist.model import probe
from sft_dist.model.batch import collate
from sft_dist.model.engine import Engine
from sft_dist.score.forwards import Layout, Logprobs, logprobs
from sft_dist.score.summary import Tally, nll_lines
from sft_dist.score.tokens import TokenTexts

_PROBED = 2_048  # samples among which the shortest are chosen to check a model by


@dataclass(frozen=True, slots=True)
class Block:
    """Samples of whole conversations, in input order."""

    first: int
    end: int  # one past the last


class Conversations:
    """A prepared data set as a scoring job."""

    unit = "samples"

    def __init__(
        self, dataset: PreparedDataset, *, roles: Collection[str], max_length: int, texts: TokenTexts | None
    ) -> None:
        self._dataset = dataset
        self._policy = Policy(max_length, roles=frozenset(roles))
        self._texts = texts
        self.num_items = len(dataset)
        self.identity = {"data": dataset.folder.name, "roles": sorted(roles)}

    def blocks(self, first: int, num_items: int) -> Iterator[Block]:
        """The samples from `first` on, about `num_items` at a time; no conversation lies in two blocks."""
        while first < self.num_items:
            end = min(first + num_items, self.num_items)
            while end < self.num_items and self._dataset[end].index == self._dataset[end - 1].index:
                end += 1
            yield Block(first, end)
            first = end

    def check(self, engine: Engine, block: Block) -> str:
        """Raise ConfigError unless packed log-probs are those of the model's own forward. A collective."""
        dataset = self._dataset.part(block.first, min(block.end, block.first + _PROBED))
        difference = probe.check(engine, probe.choose(dataset, self._policy.max_length))
        return f"packed log-probs equal the model's own, unpacked, to {difference:.1e}"

    def check_unchanged(self) -> None:
        """A prepared data set does not change: its folder is named by its content."""

    def score(
        self, engine: Engine, layout: Layout, block: Block, advance: Callable[[float], None]
    ) -> tuple[list[dict[str, Any]], Tally]:
        """The lines of a block in input order, and their sums. A collective; only rank 0 makes lines."""
        dataset = self._dataset.part(block.first, block.end)
        selection = Selection(dataset, self._policy)
        found = logprobs(
            engine,
            layout,
            selection.lengths,
            lambda pack: collate([selection[number] for number in pack]),
            advance,
        )
        if not layout.world.is_main:
            return [], Tally()
        example_of = {int(sample): example for example, sample in enumerate(selection.samples)}
        lines, tally = [], Tally()
        for _, group in groupby(enumerate(dataset), key=lambda item: item[1].index):
            line, sums = self._line(list(group), example_of, found)
            lines.append(line)
            tally += sums
        return lines, tally

    def summary(self, names: Sequence[str], tallies: Sequence[Tally]) -> Iterator[str]:
        return nll_lines(names, tallies)

    def left_out(self, tally: Tally) -> dict[str, int]:
        """Reason -> number, refused records included."""
        long = tally.counts.get("too long", 0)
        return dict(self._dataset.manifest["num_refused"]) | ({"too long": long} if long else {})

    def _line(
        self, samples: Sequence[tuple[int, Sample]], example_of: dict[int, int], found: Logprobs
    ) -> tuple[dict[str, Any], Tally]:
        """One conversation: each message is owned by one of its samples, and scored there."""
        first = samples[0][1]
        line: dict[str, Any] = {"id": first.conversation_id, "index": first.index, "source": first.source}
        entries = []
        for number, sample in samples:
            example = example_of.get(number)
            for span in sample.spans:
                values = None if example is None else found.get((example, span.message))
                if values is not None:
                    entries.append(self._entry(sample, span, values))
        entries.sort(key=lambda entry: entry["message"])
        too_long = [sample for number, sample in samples if number not in example_of]
        counts = {"conversations": 0 if too_long else 1, "too long": 1 if too_long else 0}
        if too_long:
            longest = max(len(sample.ids) for sample in too_long)
            line["left_out"] = f"{longest:,} tokens, data.max_length is {self._policy.max_length:,}"
        else:
            line["num_tokens"] = sum(entry["num_tokens"] for entry in entries)
            line["logprob"] = sum(entry["logprob"] for entry in entries)
        line["turns"] = entries
        tally = Tally(counts)
        for entry in entries:
            key = f"{entry['role']} {entry['turn']}"
            tally += Tally(nll={key: -entry["logprob"]}, tokens={key: entry["num_tokens"]})
        return line, tally

    def _entry(self, sample: Sample, span: Span, values: NDArray[np.float32]) -> dict[str, Any]:
        entry = {
            "turn": span.turn or 1 + max((s.turn for s in sample.spans if s.message < span.message), default=0),
            "message": span.message + 1,
            "role": span.role,
            "num_tokens": len(values),
            "logprob": float(values.sum(dtype=np.float64)),
            "first_logprob": float(values[0]),
        }
        if span.role == "assistant":
            entry["stop_logprob"] = float(values[-1])
        if self._texts is not None:
            # Token 0 of a sample is never scored: nothing comes before it.
            entry["tokens"] = self._texts.described(sample.ids[span.output_end - len(values) : span.output_end], values)
        return entry


def check_roles(roles: Sequence[str], known: Sequence[str]) -> frozenset[str]:
    """Raise UsageError for a role that no message has."""
    for role in roles:
        if role not in known:
            raise UsageError(f"--roles: {role!r} is no role; expected some of {', '.join(known)}")
    return frozenset(roles)
