"""Marks: the texts of a tokenizer's control and markup tokens, and the tags that a template writes.

What tells structure from speech in rendered text. Pure functions of texts; no tokenizer, no template is run.
"""

import re
from collections.abc import Iterator, Sequence
from functools import cached_property


class Marks:
    """`control`: texts of special tokens (<|im_end|>); `markup`: of added tokens that are not special (<think>)."""

    def __init__(self, control: Sequence[str], markup: Sequence[str], template: str) -> None:
        self.control = tuple(sorted(set(control)))
        self.markup = tuple(sorted(set(markup)))
        self._template = template

    @cached_property
    def control_pattern(self) -> re.Pattern[str] | None:
        return _any_of(self.control)

    def control_in(self, text: str, begin: int, end: int | None = None) -> Iterator[re.Match[str]]:
        """Control tokens in a part of a text, in order."""
        if self.control_pattern is None:
            return iter(())
        return self.control_pattern.finditer(text, begin, len(text) if end is None else end)

    @cached_property
    def pattern(self) -> re.Pattern[str] | None:
        """Texts of control and markup tokens."""
        return _any_of((*self.control, *self.markup))

    def may_join(self, text: str) -> bool:
        """Whether a text may be part of a mark: it ends in the beginning of one, begins with an end, or is inside."""
        beginnings, ends, longest = self._parts
        if not text or not longest:
            return False
        # The sets are a quick test: most texts hold none of these characters near their edges.
        return (
            (not self._edges[0].isdisjoint(text[-longest:]) and text.endswith(beginnings))
            or (not self._edges[1].isdisjoint(text[:longest]) and text.startswith(ends))
            or (len(text) < longest and text in "\0".join(self.control + self.markup))
        )

    @cached_property
    def _parts(self) -> tuple[tuple[str, ...], tuple[str, ...], int]:
        marks = self.control + self.markup
        beginnings = {mark[:end] for mark in marks for end in range(1, len(mark))}
        ends = {mark[start:] for mark in marks for start in range(1, len(mark))}
        return tuple(beginnings), tuple(ends), max(map(len, marks), default=0)

    @cached_property
    def _edges(self) -> tuple[frozenset[str], frozenset[str]]:
        marks = [mark for mark in self.control + self.markup if mark]
        return frozenset(mark[0] for mark in marks), frozenset(mark[-1] for mark in marks)

    def found_in(self, text: str) -> list[str]:
        """Texts of control and markup tokens that occur in a text."""
        if not any(beginning in text for beginning in self._beginnings):
            return []
        return [mark for mark in self.control + self.markup if mark and mark in text]

    def between(self, text: str) -> list[str]:
        """What a text says between control tokens, markup tokens and tags, without white space around it."""
        pieces = [text] if self._structure is None else self._structure.split(text)
        return [piece.strip() for piece in pieces if piece.strip()]

    def without_channels(self, text: str) -> str:
        """Without words that the template itself writes between two control tokens (<|channel|>final<|message|>)."""
        for framed, marks in self._channels:
            text = text.replace(framed, marks)
        return text

    @cached_property
    def _beginnings(self) -> frozenset[str]:
        """A quick test: most texts hold none of them."""
        return frozenset(mark[:2] for mark in self.control + self.markup if mark)

    @cached_property
    def _structure(self) -> re.Pattern[str] | None:
        # A tag that the template writes is a mark as well, also where the tokenizer has no token for it.
        tags = re.findall(r"</?[\w|]+>", self._template)
        return _any_of((*self.control, *self.markup, *tags))

    @cached_property
    def _channels(self) -> list[tuple[str, str]]:
        if self.control_pattern is None:
            return []
        control = self.control_pattern.pattern
        found = re.findall(f"(?=(({control})\\w+({control})))", self._template)
        # Neighbours share a control token, so the longest chain of frames is what is replaced first.
        return sorted({(framed, first + last) for framed, first, last in found}, key=lambda pair: -len(pair[0]))


def _any_of(texts: Sequence[str]) -> re.Pattern[str] | None:
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
