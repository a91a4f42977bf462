"""What a scoring run adds up while it writes lines, and the few lines it prints about them in the end."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

# Turns with a line of their own; later ones share one.
_TURNS_SHOWN = 10

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class Tally:
    """Sums over lines, small enough for every journal entry."""

    counts: dict[str, int] = field(default_factory=dict)
    nll: dict[str, float] = field(default_factory=dict)  # "role turn" -> nats
    tokens: dict[str, int] = field(default_factory=dict)  # "role turn" -> tokens

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(added(self.counts, other.counts), added(self.nll, other.nll), added(self.tokens, other.tokens))


def added(one: Mapping[str, Number], other: Mapping[str, Number]) -> dict[str, Number]:
    """The sums of two mappings; a missing key is 0."""
    result = dict(one)
    for key, value in other.items():
        result[key] = result[key] + value if key in result else value
    return result


def nll_lines(names: Sequence[str], tallies: Sequence[Tally]) -> Iterator[str]:
    """NLL per token of each model, over all, by role where there are several, and by turn index."""
    keys = list(tallies[0].tokens)
    roles = sorted({key.split()[0] for key in keys})
    counts = tallies[0].counts
    total = sum(tallies[0].tokens.values())
    yield (
        f"scored {counts.get('conversations', 0):,} conversations, {total:,} tokens: "
        f"NLL {_per_token(names, tallies, keys)} per token"
    )
    for role in roles:
        label = "" if len(roles) == 1 else f"{role}, "
        turns = sorted({int(key.split()[1]) for key in keys if key.startswith(f"{role} ")})
        groups = [(f"turn {turn}", [turn]) for turn in turns[:_TURNS_SHOWN]]
        if later := turns[_TURNS_SHOWN:]:
            groups.append((f"turn {later[0]} and later", later))
        for name, members in groups:
            chosen = [f"{role} {turn}" for turn in members]
            num_tokens = sum(tallies[0].tokens[key] for key in chosen)
            yield f"  {label}{name}: {num_tokens:,} tokens, NLL {_per_token(names, tallies, chosen)}"


def _per_token(names: Sequence[str], tallies: Sequence[Tally], keys: Sequence[str]) -> str:
    """`1.2345`, or `2.1000 (before), 1.9000 (after, -0.2000)` where there are several models; `-` of no token."""
    if not sum(tallies[0].tokens[key] for key in keys):
        return "-"
    values = [sum(tally.nll[key] for key in keys) / sum(tally.tokens[key] for key in keys) for tally in tallies]
    if len(values) == 1:
        return f"{values[0]:.4f}"
    parts = [f"{values[0]:.4f} ({names[0]})"]
    parts += [
        f"{value:.4f} ({name}, {value - values[0]:+.4f})" for name, value in zip(names[1:], values[1:], strict=True)
    ]
    return ", ".join(parts)
