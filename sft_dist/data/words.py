"""Byte-level BPE by a dictionary of words: the same ids as the tokenizers library gives, about five times faster.

A byte-level tokenizer cuts text at its added tokens, then into words by one regular expression, and merges bytes
within each word only. So the ids of a text are those of its words in a row, and data repeat their words. The cutting is
done here; what a word becomes, the library says, once. `word_encoder` tells whether a tokenizer works like that, by
cutting a long text of everything both ways; where it does not, and for rare characters, the library encodes the text.
"""

import json
import random
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

# How byte-level tokenizers cut text that name no pattern of their own: that of GPT-2 (openai/gpt-2, src/encoder.py).
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same where every digit has been cut out before: the words beside it end and begin there.
_GPT2_WORDS_AND_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
# What may be in a pattern: characters, their classes, groups, choice and greedy repetition mean the same to Python.
_CLASS = r"\\p\{\w+\}|\\s"
_PATTERN = re.compile(
    rf"(?:{_CLASS}|\\S|\\[rn]|\(\?i:|\(\?:|\(\?!|\(\?=|\)|\||\[\^?(?:{_CLASS}|\\[rn]|[^\\\[\]^-])*\]"
    r"|(?:[?*+]|\{\d+(?:,\d*)?\})(?![?+])|[^\\\[\]{}()|?*+.^$])+"
)
# Characters whose class the library is asked for; the surrogates between are no text.
_PLANE = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x10000))))
_EMOJI = "".join(map(chr, range(0x1F300, 0x1FAFF + 1)))
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz")
_MOST_WORDS = 300_000
_LONGEST_WORD = 64  # characters of words that are kept
_PROBE_CHARACTERS = 20_000


class WordEncoder:
    """Encodes texts as `backend` does without special tokens. Keeps the words it has met, up to a number of them."""

    def __init__(self, backend: Any, cut: "_Cut", *, composes: bool) -> None:
        added = {token.content: i for i, token in backend.get_added_tokens_decoder().items()}
        longest_first = sorted(added, key=len, reverse=True)
        self._backend = backend
        self._words = cut.words
        self._strange = cut.strange
        self._composes = composes
        self._added = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self._own = {text: _packed([i]) for text, i in added.items()}
        self._ids = dict(self._own)

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """int32 [tokens] of each text."""
        cut = [self._cut(text) for text in texts]
        unknown = list(set().union(*cut).difference(self._ids))
        unknown.sort()  # an order of its own would differ from process to process
        encodings = self._backend.encode_batch_fast(unknown, add_special_tokens=False)
        self._ids |= {word: _packed(e.ids) for word, e in zip(unknown, encodings, strict=True)}
        ids = self._ids.__getitem__
        encoded = [np.frombuffer(b"".join(map(ids, words)), np.int32) for words in cut]
        for word in unknown:
            if len(word) > _LONGEST_WORD:
                del self._ids[word]
        if len(self._ids) > _MOST_WORDS:
            self._ids = dict(self._own)
        return encoded

    def _cut(self, text: str) -> list[str]:
        """Added tokens and words; what holds strange characters stays whole."""
        words: list[str] = []
        for number, part in enumerate(self._added.split(text)):
            if number % 2 or (part and self._is_strange(part)):
                words.append(part)
            elif part:
                words += self._words.findall(part)
        return words

    def _is_strange(self, text: str) -> bool:
        if text.isascii():
            return False
        return self._strange.search(text) is not None or (self._composes and not unicodedata.is_normalized("NFC", text))


@dataclass(frozen=True, slots=True)
class _Cut:
    words: re.Pattern[str]
    strange: re.Pattern[str]  # characters whose words only the library knows


def word_encoder(backend: Any, spec: dict[str, Any]) -> WordEncoder | None:
    """For a byte-level BPE tokenizer whose words can be cut here exactly as it cuts them, else None.

    `spec` is what tokenizer.json says of it.
    """
    pattern = _words_of(spec)
    if pattern is None or any(map(_is_special_case, spec["added_tokens"])):
        return None
    cut = _cut(pattern, json.dumps(spec["pre_tokenizer"]))
    return None if cut is None else WordEncoder(backend, cut, composes=spec["normalizer"] is not None)


@cache
def _cut(pattern: str, pre_tokenizer: str) -> _Cut | None:
    """The pattern in Python's words; None where it does not cut as the library's own pre_tokenizer (JSON) does."""
    classes = {name: _members(name) for name in {*re.findall(_CLASS, pattern), r"\s"}}
    if any(re.search(f"[{members}]", _EMOJI) for members in classes.values()):
        return None
    # Of unassigned characters Python's tables may say another thing; beyond the first plane none were asked for.
    unassigned = "".join(c for c in _PLANE if unicodedata.category(c) == "Cn")
    folded = "".join(c for c in _PLANE if not c.isascii() and c.casefold() in _LETTERS)
    strange = re.compile(f"[^\0-\uffff{_ranges(_EMOJI)}]|[{_ranges(unassigned)}{_ranges(folded)}]")
    cut = _Cut(re.compile(_translated(pattern, classes)), strange)
    return cut if _cuts_alike(cut, pre_tokenizer) else None


def bytes_of_piece(piece: str) -> bytes:
    """What a token of a byte-level vocabulary decodes to; added tokens may hold characters that stand for no byte."""
    try:
        return bytes(map(_BYTE_OF.__getitem__, piece))
    except KeyError:
        return piece.encode()


def _byte_of() -> dict[str, int]:
    """Every byte as byte-level vocabularies write it: as itself if that can be seen, else from U+0100 on in order."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)).difference(seen))
    return {chr(byte): byte for byte in seen} | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}


_BYTE_OF = _byte_of()


def _words_of(spec: dict[str, Any]) -> str | None:
    """The pattern of the words of a tokenizer (as in tokenizer.json), if it is one that Python understands too."""
    if spec["model"].get("type") != "BPE" or spec["model"].get("dropout"):
        return None
    if spec["normalizer"] is not None and spec["normalizer"]["type"] != "NFC":
        return None
    stage = spec["pre_tokenizer"] or {"type": "none"}
    stages = stage["pretokenizers"] if stage["type"] == "Sequence" else [stage]
    if stages[-1]["type"] != "ByteLevel" or stages[-1]["add_prefix_space"]:
        return None
    uses_gpt2 = stages[-1].get("use_regex", True)
    match stages[:-1]:
        case [] if uses_gpt2:
            return _GPT2_WORDS
        case [{"type": "Digits", "individual_digits": True}] if uses_gpt2:
            return _GPT2_WORDS_AND_DIGITS
        case [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}] if (
            not uses_gpt2 and _PATTERN.fullmatch(pattern)
        ):
            return str(pattern)
    return None


def _is_special_case(token: dict[str, Any]) -> bool:
    """Added tokens that are more than their text."""
    return bool(token["normalized"] or token["lstrip"] or token["rstrip"] or token["single_word"])


def _members(name: str) -> str:
    """The characters of a class, as the library knows them, for a set in a pattern of Python's."""
    from tokenizers import Regex, pre_tokenizers

    rest = pre_tokenizers.Split(Regex(f"{name}+"), "removed").pre_tokenize_str(_PLANE)
    ends = [0, *(edge for _, span in rest for edge in span), len(_PLANE)]
    return "".join(_ranges(_PLANE[begin:end]) for begin, end in zip(ends[::2], ends[1::2], strict=True))


def _ranges(characters: str) -> str:
    """Ascending characters, for a set in a pattern."""
    parts: list[str] = []
    first = last = -2
    for code in [*map(ord, characters), -2]:
        if code != last + 1:
            if first >= 0:
                parts.append(f"\\U{first:08x}-\\U{last:08x}")
            first = code
        last = code
    return "".join(parts)


def _translated(pattern: str, classes: dict[str, str]) -> str:
    """A pattern of the library in Python's words."""

    def written(match: re.Match[str]) -> str:
        if match["set"]:
            return re.sub(_CLASS, lambda inner: classes[inner.group()], match.group())
        return f"[^{classes[chr(92) + 's']}]" if match.group() == r"\S" else f"[{classes[match.group()]}]"

    return re.sub(rf"(?P<set>\[[^\]]*\])|\\S|{_CLASS}", written, pattern)


def _cuts_alike(cut: _Cut, pre_tokenizer: str) -> bool:
    """Whether both cut a long text into the same words, of which each is one alone too."""
    from tokenizers import Tokenizer

    model = {"type": "BPE", "vocab": {}, "merges": []}
    bare = Tokenizer.from_str(json.dumps({"model": model, "pre_tokenizer": json.loads(pre_tokenizer)}))
    chance = random.Random(0)
    common = [*"aAsStTlLrReEvVmMdDz", *"0123", *" \n\t\r" * 4, *"''.,!_-", *"\u00a0éß日ー中\u0301٣²½ⅷ’\u2003…😀"]
    text = "".join(chance.choices([*common, *chance.choices(_PLANE, k=len(common))], k=_PROBE_CHARACTERS))
    text = cut.strange.sub("", text)
    ours = cut.words.findall(text)
    theirs = [text[begin:end] for _, (begin, end) in bare.pre_tokenizer.pre_tokenize_str(text)]
    return ours == theirs and all(cut.words.findall(word) == [word] for word in set(ours))


def _packed(ids: Sequence[int]) -> bytes:
    return np.array(ids, np.int32).tobytes()
