"""Tokenizers of the kinds that model families have, trained on a page of text on the spot.

Control tokens are special added tokens, markup tokens (<think>, <tool_call>) are added but not special.
"""

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_CORPUS = [
    "What is the capital of France? Paris, of course. Answer: it is 4.",
    "It rains cats and dogs; I stepped in a poodle! The weather in Paris is fine.",
    "system user assistant model tool ipython developer question answer functions analysis commentary final",
    "Newlines\n\n\nmerge\n\n\ninto\n\n\none\n\n\ntoken.   Spaces   merge    too.\r\n\r\n",
    '{"name": "get_weather", "arguments": {"city": "Paris", "days": [1, 2, null]}} [INST] [/INST] <</SYS>>',
    "xxx xxxx <|x|> <x> </x> |>\n |>\n\n >\n >\n\n :\n ]\n",
]
_LETTERS = sorted(set("".join(_CORPUS)) | {chr(code) for code in range(32, 127)} | set("éüß"))

# Words with the space before them, numbers of up to three digits, signs with the newlines after them.
_MODERN_WORDS = r" ?\p{L}\p{M}*(?:\p{L}|\p{M})*|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(
    control: Sequence[str],
    markup: Sequence[str] = (),
    *,
    modern: bool = False,
    nfc: bool = False,
    adds_bos: bool = False,
    bos: str | None = None,
    eos: str,
    pad: str | None = None,
) -> Any:
    """GPT-2 (or, `modern`, Llama 3 and Qwen): every byte has a token, so every text has ids that decode to it.

    `nfc`: composes characters first, as Qwen does, so that decomposed ones come back changed.
    """
    backend = Tokenizer(models.BPE())
    if nfc:
        backend.normalizer = normalizers.NFC()
    if modern:
        split = pre_tokenizers.Split(Regex(_MODERN_WORDS), behavior="isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(_CORPUS, trainer)
    return _finished(backend, control, markup, adds_bos=adds_bos, bos=bos, eos=eos, pad=pad)


def sentencepiece(
    control: Sequence[str],
    markup: Sequence[str] = (),
    *,
    prefix: str,
    adds_bos: bool = True,
    bos: str,
    eos: str,
    pad: str | None = None,
) -> Any:
    """BPE over characters with ▁ for a space and bytes for what has no token.

    `prefix` says who gets a space before it: "every" section between control tokens (Llama 2, Mistral of old),
    the "first" one (their newer conversion), or "none" (Gemma).
    """
    learned = _learned_merges()
    vocab: dict[str, int] = {"<unk>": 0}
    for token in [*(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]:
        vocab.setdefault(token, len(vocab))
    merges = [tuple(pair) for pair in learned["merges"]]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = normalizers.Replace(" ", "▁")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    match prefix:
        case "every":
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
            parts.append(decoders.Strip(" ", 1, 0))
        case "first":
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
            parts.append(decoders.Strip(" ", 1, 0))
        case "none":
            backend.normalizer = spaces
        case _:
            raise ValueError(prefix)
    backend.decoder = decoders.Sequence(parts)
    return _finished(backend, control, markup, adds_bos=adds_bos, bos=bos, eos=eos, pad=pad, unk="<unk>")


def unigram(
    control: Sequence[str], markup: Sequence[str] = (), *, bos: str | None = None, eos: str, pad: str | None = None
) -> Any:
    """T5: pieces with scores, a space before every section, and no token at all for letters it has not seen.

    Its control tokens are ordinary pieces of the vocabulary too, so that text can become one without being added.
    """
    letters = [letter for letter in _LETTERS if letter != " "]
    words = sorted({word for line in _CORPUS for word in line.split() if word.isalpha() and len(word) > 2})
    pieces = [("<unk>", 0.0), *((token, -1.0) for token in control), ("▁", -2.0)]
    pieces += [(letter, -4.0) for letter in letters] + [(f"▁{word}", -5.0) for word in words]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return _finished(backend, control, markup, adds_bos=False, bos=bos, eos=eos, pad=pad, unk="<unk>")


def _learned_merges() -> dict[str, Any]:
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    alphabet = [letter for letter in _LETTERS if letter not in " \n\r"] + ["▁", "\n"]
    trainer = trainers.BpeTrainer(vocab_size=350, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([line.replace("\r", "") for line in _CORPUS], trainer)
    model: dict[str, Any] = json.loads(backend.to_str())["model"]
    return model


def _finished(
    backend: Any,
    control: Sequence[str],
    markup: Sequence[str],
    *,
    adds_bos: bool,
    bos: str | None,
    eos: str,
    pad: str | None,
    unk: str | None = None,
) -> Any:
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in markup])
    if adds_bos:
        bos_id = backend.token_to_id(bos)
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad or eos, unk_token=unk
    )
