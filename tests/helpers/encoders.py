"""Tiny encoders with an uncased word-piece tokenizer, and labelled records for them."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = (
    *("card", "bank", "lost", "money", "sent", "late", "fee", "where", "when", "my", "the", "is", "new", "pin"),
    *("top", "up", "hello", "thanks", "two", "three"),
)
ENCODERS = ("bert", "roberta", "distilbert")


def build_word_tokenizer() -> PreTrainedTokenizerFast:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*_SPECIAL, *WORDS, *letters, *(f"##{letter}" for letter in letters), *".,?!'[]"]
    backend = Tokenizer(WordPiece(vocab={p: n for n, p in enumerate(dict.fromkeys(pieces))}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **names,
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def build_encoder(folder: Path, family: str = "bert", *, dropout: float = 0.0, context: int = 128) -> Path:
    """Write a random pre-trained backbone of a family with its tokenizer to `folder` and return it."""
    torch.manual_seed(0)
    tokenizer = build_word_tokenizer()
    common: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": 0, "initializer_range": 0.2}
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    if family == "bert":
        model: Any = BertModel(BertConfig(**common, **sizes, max_position_embeddings=context))
    elif family == "roberta":
        model = RobertaModel(RobertaConfig(**common, **sizes, max_position_embeddings=context + 1, type_vocab_size=1))
    elif family == "distilbert":
        small = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "seq_classif_dropout": dropout}
        model = DistilBertModel(
            DistilBertConfig(
                **common, **small, dropout=dropout, attention_dropout=dropout, max_position_embeddings=context
            )
        )
    else:
        raise ValueError(family)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_beside(num: int, *, kind: str = "single_label", seed: int = 0) -> list[dict[str, Any]]:
    """Conversations that are told apart as in `make_labelled`: of four, one has no answer and one no label."""
    records = []
    for number, record in enumerate(make_labelled(num, kind=kind, seed=seed)):
        turns = [("user", record["text"])]
        if number % 4 != 1:
            turns += [("assistant", "it is " + json.dumps(record["label"]))]
        if number % 4 == 2:
            turns += [("user", "when"), ("assistant", "too late"), ("user", "thanks")]
        messages = [{"role": role, "content": content} for role, content in turns]
        records.append({"id": record["id"], "messages": messages, "label": record["label"]})
        if number % 4 == 3:
            del records[-1]["label"]
    return records


def make_labelled(num: int, *, kind: str = "single_label", seed: int = 0, pairs: bool = False) -> list[dict[str, Any]]:
    """Texts whose words tell the label: the first of a few words that is in them, all that are, or their number."""
    rng = random.Random(seed)
    records = []
    for number in range(num):
        words = [rng.choice(WORDS) for _ in range(rng.randint(1, 12))]
        told = [word for word in ("card", "money", "fee") if word in words]
        label: Any
        if kind == "single_label":
            label = told[0] if told else "other"
        elif kind == "multi_label":
            label = told
        else:
            label = len(told) - 0.5
        record: dict[str, Any] = {"id": f"r{number}", "text": " ".join(words), "label": label}
        if pairs and number % 2:
            record["text_pair"] = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 5)))
        records.append(record)
    return records
