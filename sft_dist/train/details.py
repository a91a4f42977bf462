"""NLL, perplexity, accuracy, entropy and count of target tokens by source, by turn, and of first, stop and text tokens.

In: what forwards say of their targets. Out: sums in one table whose rows every rank knows beforehand (they follow from
the names of the sources), so that one sum over ranks is enough and a mean is taken once, at the end. Weights play no
part: every target counts once.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sft_dist.data.sample import Span
from sft_dist.data.selection import Example
from sft_dist.distributed import collectives
from sft_dist.model.fused_head import TokenValues

_LAST_TURN = 8  # later ones are counted together
_TURNS = (*map(str, range(1, _LAST_TURN + 1)), f"{_LAST_TURN + 1}+", "none")
_PLACES = ("first", "stop", "text")


@dataclass(frozen=True, slots=True)
class Figures:
    """Of some target tokens: sums, of which the means are taken here."""

    nll_sum: float  # nats
    num_top: float  # how many were the model's likeliest token
    entropy_sum: float  # nats, of what the model expected there; nan for a prediction head
    count: int

    @property
    def nll(self) -> float:
        """Nats per token; nan where there is none."""
        return self.nll_sum / self.count if self.count else math.nan

    @property
    def accuracy(self) -> float:
        return self.num_top / self.count if self.count else math.nan

    @property
    def entropy(self) -> float | None:
        """Nats per token; None where it is not known."""
        return None if math.isnan(self.entropy_sum) or not self.count else self.entropy_sum / self.count

    @property
    def perplexity(self) -> float | None:
        """exp of the NLL; None where that is no number."""
        return math.exp(self.nll) if self.nll < 700 else None

    def as_dict(self) -> dict[str, float | int | None]:
        return {
            "nll": self.nll,
            "perplexity": self.perplexity,
            "accuracy": self.accuracy,
            "entropy": self.entropy,
            "count": self.count,
        }

    def __str__(self) -> str:
        return f"{self.nll:.3f} {self.accuracy:.0%}"


class Details:
    """Sums by group; `add` on every rank, then `reduce` once, then read.

    Groups: `source` (names), `turn` (1 to 8, 9+; none: tokens of messages that are no answers, with train_on all or
    marked) and `token`: first and stop token of answers, and the tokens of plain texts, which belong to no turn.
    """

    def __init__(self, sources: Iterable[str]) -> None:
        self._groups = {"source": tuple(sorted(set(sources))), "turn": _TURNS, "token": _PLACES}
        keys = [("all", "all"), *((group, name) for group, names in self._groups.items() for name in names)]
        self._row_of = {key: row for row, key in enumerate(keys)}
        self._sums: NDArray[np.float64] = np.zeros((len(keys), 4))  # nll, likeliest, entropy, count

    def add(self, examples: Sequence[Example], values: TokenValues) -> None:
        """Count the targets of one forward over `examples`, in the order of the row."""
        assert values.is_top is not None
        entropy = torch.full_like(values.logprob, math.nan) if values.entropy is None else values.entropy
        columns = [-values.logprob, values.is_top, entropy, torch.ones_like(values.logprob)]
        facts = torch.stack(columns, -1).double().cpu().numpy()  # float64 [num_targets, 4]
        begin = 0
        for example in examples:
            end = begin + int((example.turns >= 0).sum())
            self._add(example, facts[begin:end])
            begin = end

    def _add(self, example: Example, facts: NDArray[np.float64]) -> None:
        targets = np.flatnonzero(example.turns >= 0)
        messages, begins, counts = np.unique(example.turns[targets], return_index=True, return_counts=True)
        spans = {span.message: span for span in example.sample.spans}
        for message, begin, count in zip(messages.tolist(), begins.tolist(), counts.tolist(), strict=True):
            span, own = spans[message], facts[begin : begin + count]
            total = own.sum(0)
            for key in (("all", "all"), ("source", example.sample.source), _group_of(span)):
                self._sums[self._row_of[key]] += total
            if span.turn and span.role != "text":
                start = int(targets[begin])  # targets of a message lie side by side
                for place, token in (("first", span.output_start), ("stop", span.output_end - 1)):
                    if 0 <= token - start < count:
                        self._sums[self._row_of["token", place]] += own[token - start]

    def reduce(self) -> None:
        """Sum over ranks. A collective."""
        self._sums = np.array(collectives.all_sum(self._sums.ravel().tolist())).reshape(self._sums.shape)

    @property
    def all(self) -> Figures:
        return self._figures("all", "all")

    def group(self, group: str) -> dict[str, Figures]:
        """Figures by name, without those of which there is no token."""
        figures = {name: self._figures(group, name) for name in self._groups[group]}
        return {name: of_name for name, of_name in figures.items() if of_name.count}

    def as_dict(self) -> dict[str, Any]:
        """{"all": FIGURES, "source": {NAME: FIGURES}, "turn": {"1": …}, "token": {"first": …}}, with FIGURES
        {"nll": nats per token, "perplexity": …, "accuracy": 0 to 1, "entropy": nats per token, "count": tokens}.
        """
        groups = {group: {n: f.as_dict() for n, f in self.group(group).items()} for group in self._groups}
        return {"all": self.all.as_dict()} | groups

    def lines(self) -> list[str]:
        """For people: NLL and accuracy of every group that has something to tell apart."""
        found = {group: self.group(group) for group in self._groups}
        return [
            f"  by {group:<7} " + "   ".join(f"{name}: {figures}" for name, figures in named.items())
            for group, named in found.items()
            if len(named) > 1
        ]

    def _figures(self, group: str, name: str) -> Figures:
        nll_sum, num_top, entropy_sum, count = self._sums[self._row_of[group, name]].tolist()
        return Figures(nll_sum, num_top, entropy_sum, int(count))


def _group_of(span: Span) -> tuple[str, str]:
    if span.role == "text":
        return "token", "text"
    if not span.turn:
        return "turn", "none"
    return "turn", _TURNS[min(span.turn, _LAST_TURN + 1) - 1]
