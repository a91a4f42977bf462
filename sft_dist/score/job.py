"""What the two kinds of data, conversations and candidates, have in common."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from sft_dist.model.engine import Engine
from sft_dist.score.forwards import Layout
from sft_dist.score.summary import Tally


class Block(Protocol):
    """Neighbouring items of the input."""

    @property
    def first(self) -> int: ...

    @property
    def end(self) -> int:
        """One past the last."""
        ...


B = TypeVar("B", bound=Block)


class Job(Protocol[B]):
    """Data to be scored, in blocks of the input order."""

    unit: str  # what an item is, for people
    num_items: int
    identity: dict[str, Any]  # of the data and of what is asked about them

    def blocks(self, first: int, num_items: int) -> Iterator[B]:
        """The items from `first` on, about `num_items` at a time."""
        ...

    def check(self, engine: Engine, block: B) -> str | None:
        """Compare with the model's own forward and say how well it agrees, or raise ConfigError. A collective.

        None where nothing of the block can be compared.
        """
        ...

    def check_unchanged(self) -> None:
        """Raise DataError where the data are not what `identity` says any more."""
        ...

    def score(
        self, engine: Engine, layout: Layout, block: B, advance: Callable[[float], None]
    ) -> tuple[list[dict[str, Any]], Tally]:
        """The lines of a block in input order, and their sums, on rank 0. A collective."""
        ...

    def summary(self, names: Sequence[str], tallies: Sequence[Tally]) -> Iterator[str]:
        """Lines for people, given the sums of each model."""
        ...

    def left_out(self, tally: Tally) -> dict[str, int]:
        """Reason -> number of records without scores."""
        ...
