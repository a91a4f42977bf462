"""Conversations with weights, marks, branches and plain texts, and their samples as a prepared data set holds them.

A conversation is {"source", "weight", "branches": [[message, ...], ...]} or {"source", "weight", "text"}; a message is
{"role", "content", "train", "weight", "is_owned"}.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sft_dist.data.conversation import Conversation, Message
from sft_dist.data.renderer import Renderer
from sft_dist.data.rendering import render
from sft_dist.data.sample import Sample, Span

_WORDS = ["rain", "Paris", "is", "42", "ü", "日", "no"]


def make_conversations(num: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [_conversation(rng) for _ in range(num)]


def _conversation(rng: random.Random) -> dict[str, Any]:
    head = {
        "source": rng.choice(["chat", "code", "book"]),
        "weight": rng.choice([0.0, 0.5, 0.75, 1.0, 1.0, 1.5, 2.0, 3.5]),
    }
    if rng.random() < 0.15:
        return head | {"text": _text(rng, 40)}
    messages = [_message(rng, "system")] if rng.random() < 0.3 else []
    for _ in range(rng.randint(1, 3)):
        messages += [_message(rng, "user"), _message(rng, "assistant")]
    if rng.random() < 0.1:
        # Nobody wants this conversation trained.
        messages = [message | {"train": False} for message in messages]
    if len(messages) < 4 or rng.random() < 0.5:
        return head | {"branches": [messages]}
    # The first answers belong to a branch of their own; the other one shows them in short.
    cut = 2 if messages[0]["role"] == "user" else 3
    seen = [m | {"is_owned": False, "content": m["content"][:3] + "."} for m in messages[:cut]]
    return head | {"branches": [messages[:cut], seen + messages[cut:]]}


def _message(rng: random.Random, role: str) -> dict[str, Any]:
    is_answer = role == "assistant"
    return {
        "role": role,
        "content": _text(rng, 6),
        "train": rng.choice([None, None, True, True, True, False])
        if is_answer
        else rng.choice([None, None, None, False]),
        "weight": rng.choice([0.0, 0.25, 1.0, 1.0, 1.0, 3.0]),
        "is_owned": True,
    }


def _text(rng: random.Random, max_words: int) -> str:
    return " ".join(rng.choices(_WORDS, k=rng.randint(1, max_words)))


def samples_of(renderer: Renderer, conversations: Sequence[dict[str, Any]]) -> list[Sample]:
    """In order, the branches of a conversation one after the other."""
    samples = []
    for index, conversation in enumerate(conversations):
        facts = {"index": index, "source": conversation["source"], "weight": conversation["weight"]}
        if "text" in conversation:
            ids = renderer.tokenizer(conversation["text"], add_special_tokens=False).input_ids
            ids = np.array([*ids, renderer.tokenizer.eos_token_id], np.int32)
            span = Span(0, "text", 0, 0, len(ids), len(ids), is_owned=True, turn=1)
            samples.append(Sample(f"c{index}", ids=ids, spans=(span,), num_turns=1, **facts))
            continue
        rendered = [_rendered(renderer, messages, index) for messages in conversation["branches"]]
        num_turns = max(sample.num_turns for sample in rendered)
        for sample, messages in zip(rendered, conversation["branches"], strict=True):
            spans = tuple(
                replace(span, weight=m["weight"], train=m["train"], is_owned=m["is_owned"])
                for span, m in zip(sample.spans, messages, strict=True)
            )
            samples.append(replace(sample, spans=spans, num_turns=num_turns, **facts))
    return samples


def _rendered(renderer: Renderer, messages: Sequence[dict[str, Any]], index: int) -> Sample:
    said = tuple(Message(message["role"], message["content"]) for message in messages)
    (samples,) = render(renderer, [Conversation(f"c{index}", index, "", "", 1.0, said)])
    assert isinstance(samples, tuple), samples
    (sample,) = samples
    return sample
