"""Encoding by words is encoding: the same ids as the tokenizers library gives, for any text and any tokenizer."""

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from sft_dist.data import words
from sft_dist.data.words import WordEncoder, bytes_of_piece, word_encoder

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "I can't say what they've seen; it's 1984, isn't it?\n\n  def f(x):\n\treturn x ** 2  # straße, naïve, 日本語",
    "We'll see you'd go. 'SHOUT' WE'RE 12 345 6789 ½ ² ⅷ ٣٤ … “quoted” — done 😀😀",
    "  \r\n\r\n  x  y   z\u00a0\u2003\u3000w",
]


def stages(name: str) -> Any:
    if name == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "digits":
        parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        return pre_tokenizers.Sequence(parts)
    pattern = Regex({"qwen": QWEN, "llama3": LLAMA3, "cased": CASED}[name])
    parts = [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    return pre_tokenizers.Sequence(parts)


@cache
def tokenizer(name: str, composes: bool = False) -> Tokenizer:
    own = Tokenizer(models.BPE())
    own.pre_tokenizer, own.decoder = stages(name), decoders.ByteLevel()
    if composes:
        own.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    own.train_from_iterator(
        CORPUS * 3, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    own.add_special_tokens(["<|im_end|>", "<|im"])
    own.add_tokens([AddedToken("<think>", normalized=False)])
    return own


@cache
def encoder(name: str, composes: bool = False) -> WordEncoder:
    own = tokenizer(name, composes)
    found = word_encoder(own, json.loads(own.to_str()))
    assert found is not None
    return found


pieces = st.sampled_from(
    [
        *(*CORPUS[0].split(), *CORPUS[1].split(), " ", "  ", "\n", "\r\n", "\t", "\x1c", "\x85", "'", "'ſ", "'LL", "K"),
        *(
            "<|im",
            "<|im_end|>",
            "<think>",
            "e\u0301",
            "각",
            "\u1100\u1161",
            "𝐀",
            "𠀀",
            "🄀",
            "🯰",
            "🇩🇪",
            "\u0378",
            "ǅ",
            "ʰ",
        ),
    ]
)
texts = st.lists(pieces | st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=12).map("".join)
NAMES = ["gpt2", "digits", "qwen", "llama3", "cased"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("composes", [False, True])
@settings(max_examples=60, deadline=None)
@given(batch=st.lists(texts, min_size=1, max_size=3))
@example(["", " ", "'s's 'S", "<|im_end|><|im_end|>", "<|im<|im_end|>"])
def test_words_give_the_ids_that_the_library_gives(name: str, composes: bool, batch: list[str]) -> None:
    expected = [e.ids for e in tokenizer(name, composes).encode_batch(batch, add_special_tokens=False)]
    assert [ids.tolist() for ids in encoder(name, composes).encode(batch)] == expected


@pytest.mark.parametrize("name", NAMES)
def test_every_character_belongs_to_the_words_that_the_library_cuts(name: str) -> None:
    """The words themselves: too small a vocabulary has the same ids for other words."""
    num_known = 0
    for block in range(0, 0x20000, 4096):
        characters = [chr(i) for i in range(block, block + 4096) if not 0xD800 <= i < 0xE000]
        known = [c for c in characters if not encoder(name)._is_strange(c)]
        num_known += len(known)
        text = "".join(f"a{c} {c}1\n" for c in known)
        spans = [span for _, span in tokenizer(name).pre_tokenizer.pre_tokenize_str(text)]
        assert encoder(name)._cut(text) == [text[begin:end] for begin, end in spans]
    assert num_known > 50_000


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(text=texts)
def test_bytes_of_the_pieces_are_what_the_library_decodes(name: str, text: str) -> None:
    own = tokenizer(name)
    ids = own.encode(text, add_special_tokens=False).ids
    decoded = b"".join(bytes_of_piece(own.id_to_token(i)) for i in ids).decode()
    assert decoded == own.decode(ids, skip_special_tokens=False)


def test_what_is_met_is_forgotten_before_it_fills_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    own = tokenizer("qwen")
    small = word_encoder(own, json.loads(own.to_str()))
    assert small is not None
    monkeypatch.setattr(words, "_MOST_WORDS", 10)
    for text in (" ".join(CORPUS), "x" * 1000, "<|im_end|>" + " ".join(CORPUS)):
        assert small.encode([text])[0].tolist() == own.encode(text, add_special_tokens=False).ids
        assert len(small._ids) <= 10


STRIPPING = {"id": 9, "content": "x", "special": True, "normalized": False, "single_word": False}
STRIPPING |= {"lstrip": True, "rstrip": False}


def variant(**changes: Any) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(json.loads(tokenizer("qwen").to_str()) | changes))


def split(pattern: str, behavior: str = "Isolated") -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    one = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}
    return {"type": "Sequence", "pretokenizers": [one, byte_level]}


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": split(r"\p{L}+")},  # leaves characters between the words
        {"pre_tokenizer": split(r"\s+|\S+(?<=a)|\S+")},  # looks behind: a word alone is another one
        {"pre_tokenizer": split(r"(?:a(?!b))+|\s+|(?:b|[^\sab])+|\S")},
        {"pre_tokenizer": split(r"^\p{L}|\p{L}+|\P{L}+")},
        {"pre_tokenizer": split(r"\p{L}++|[^\p{L}]")},  # possessive
        {"pre_tokenizer": split(r"\p{L}+|[^\p{L}]", "MergedWithNext")},
        {"added_tokens": [STRIPPING]},
    ],
)  # fmt: skip
def test_tokenizers_that_cut_otherwise_are_left_to_the_library(changes: dict[str, Any]) -> None:
    own = variant(**changes)
    found = word_encoder(own, json.loads(own.to_str()))
    if found is not None:  # then it must be right all the same
        text = " ".join(CORPUS) + "aab ba ab'ab"
        assert "added_tokens" not in changes and found.encode([text])[0].tolist() == own.encode(text).ids
    else:
        assert changes
