"""What a run forgets: NLL of every source of data.retention before the first step and now, and when that is too much.

In: the prepared retention data and what evaluations say of them. Out: values for every checkpoint's state, and words.
Nothing here trains, and nothing chooses the best checkpoint.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from sft_dist.data.packing import Pack
from sft_dist.data.selection import Selection
from sft_dist.train.details import Details
from sft_dist.train.evaluate import scoring_packs

_UNKNOWN = "-"


@dataclass(frozen=True, slots=True)
class SourceNll:
    """Of one retention source, in nats per token. None: not known, or not yet."""

    name: str
    content: str  # digest of what is scored: of other content, NLLs cannot be compared
    num_tokens: int
    before: float | None  # at step 0
    now: float | None  # at the last evaluation

    @property
    def change(self) -> float | None:
        return None if self.before is None or self.now is None else self.now - self.before

    def as_dict(self) -> dict[str, float | int | None]:
        return {"nll": self.now, "before": self.before, "change": self.change, "count": self.num_tokens}


@dataclass(frozen=True)
class Retention:
    """The retention sources of a run."""

    selection: Selection

    @cached_property
    def packs(self) -> list[Pack]:
        return scoring_packs(self.selection)

    @cached_property
    def contents(self) -> dict[str, str]:
        """Source -> digest of its samples and of what of them is scored."""
        return source_digests(self.selection)

    def comparable(self, known: Sequence[SourceNll]) -> tuple[SourceNll, ...]:
        """Those of the values that are of sources which are still the same."""
        return tuple(item for item in known if self.contents.get(item.name) == item.content)

    def missing(self, known: Sequence[SourceNll]) -> list[str]:
        """The sources of which no NLL at step 0 is known."""
        has_start = {item.name for item in self.comparable(known) if item.before is not None}
        return [name for name in self.contents if name not in has_start]

    def measured(self, details: Details, known: Sequence[SourceNll], *, is_start: bool) -> tuple[SourceNll, ...]:
        """The values after an evaluation; one at the start also gives the values `before` that are not known."""
        of_source, found = {item.name: item for item in self.comparable(known)}, []
        for name, figures in details.group("source").items():
            old = of_source.get(name) or SourceNll(name, self.contents[name], figures.count, None, None)
            if not is_start:
                found.append(replace(old, now=figures.nll))
            elif old.before is None:
                found.append(replace(old, before=figures.nll, now=figures.nll))
            else:
                found.append(old)
        return tuple(found)


def source_digests(selection: Selection) -> dict[str, str]:
    """Source -> 16 hex digits of what is scored of it: contents, lengths and numbers of targets, in order."""
    digests = selection.dataset.column("digest")[selection.samples]
    found = {}
    for code, name in enumerate(selection.source_names):
        mine = selection.source_codes == code
        parts = (digests[mine], selection.lengths[mine], selection.num_targets[mine])
        joined = b"".join(np.ascontiguousarray(part).tobytes() for part in parts)
        found[name] = hashlib.sha256(joined).hexdigest()[:16]
    return found


def excess(known: Sequence[SourceNll], limit: float | None) -> str | None:
    """Which source is forgotten too much, if the NLL of any has risen by more than `limit` nats per token."""
    if limit is None:
        return None
    change, name = max(((item.change, item.name) for item in known if item.change is not None), default=(0.0, ""))
    if change <= limit:
        return None
    return (
        f"the NLL of retention source {name} has risen by {change:.4f} nats per token over step 0, more than "
        f"evaluate.stop_at_retention_rise ({limit:g})"
    )


def evaluation_line(step: int, known: Sequence[SourceNll], *, task_change: float | None) -> str:
    """`retention  step 120  wiki NLL 3.1456 (+0.0222)   chat NLL 2.0101 (-0.0003)   beside held-out -1.3640`"""
    parts = [f"{item.name} NLL {_value(item.now)} ({_signed(item.change)})" for item in known]
    task = [] if task_change is None else [f"beside held-out {_signed(task_change)}"]
    return f"retention  step {step:,}  " + "   ".join(parts + task)


def table(
    known: Sequence[SourceNll], *, task: tuple[float | None, float | None, float | None], best_step: int | None
) -> list[str]:
    """What was kept beside what was learned; `task` is the held-out NLL before, now and at its best."""
    before, now, best = task
    rows = [(f"retention {i.name} ({i.num_tokens:,} tokens)", i.before, i.now, i.change, "") for i in known]
    if now is not None:
        change = None if before is None else now - before
        told = "" if best is None or best_step is None else f"  best {best:.4f} at step {best_step:,}"
        rows.append(("task (data.heldout)", before, now, change, told))
    width = max(len(row[0]) for row in rows)
    head = f"{'NLL per token':<{width}}  {'before':>8}  {'now':>8}  {'change':>8}"
    return [head] + [
        f"{name:<{width}}  {_value(before):>8}  {_value(now):>8}  {_signed(change):>8}{told}"
        for name, before, now, change, told in rows
    ]


def as_dict(known: Sequence[SourceNll]) -> Mapping[str, dict[str, float | int | None]]:
    return {item.name: item.as_dict() for item in known}


def _value(nll: float | None) -> str:
    return _UNKNOWN if nll is None else f"{nll:.4f}"


def _signed(change: float | None) -> str:
    return _UNKNOWN if change is None else f"{change:+.4f}"
