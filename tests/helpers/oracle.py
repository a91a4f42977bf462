"""Independent answers: plain transformers in float64, one conversation at a time, nothing of the package's masks.

Spans are found again from the template's control tokens, so an error in the package's spans cannot hide here.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def turn_contexts(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[tuple[list[int], list[int]]]:
    """(context ids, output ids) of every assistant turn, each from a render of its own, as at inference."""
    pairs = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        context: list[int] = []
        for earlier in messages[:number]:
            context += _message_ids(tokenizer, earlier)
        context += _text(tokenizer, "<|im_start|>assistant\n")
        output = _text(tokenizer, message["content"]) + [tokenizer.convert_tokens_to_ids("<|im_end|>")]
        pairs.append((context, output))
    return pairs


def turn_logprobs(model: Any, tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[tuple[int, float]]:
    """(number of tokens, log Pr(y_k | x_1, y_1, ..., x_k)) of every turn, from K separate forward passes."""
    answers = []
    for context, output in turn_contexts(tokenizer, messages):
        with torch.no_grad():
            answers.append((len(output), float(_output_logprobs(model, context, output).sum())))
    return answers


def loss(model: Any, tokenizer: Any, conversations: Sequence[Sequence[dict[str, str]]]) -> Tensor:
    """Mean negative log-probability of all assistant tokens of all conversations, one conversation at a time."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for messages in conversations:
        ids, labels = [], []
        for message in messages:
            if message["role"] == "assistant":
                header = _text(tokenizer, "<|im_start|>assistant\n")
                output = _text(tokenizer, message["content"]) + [tokenizer.convert_tokens_to_ids("<|im_end|>")]
                tail = _text(tokenizer, "\n")
                ids += header + output + tail
                labels += [-100] * len(header) + output + [-100] * len(tail)
            else:
                own = _message_ids(tokenizer, message)
                ids += own
                labels += [-100] * len(own)
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
        total = total + F.cross_entropy(logits, torch.tensor(labels[1:]), ignore_index=-100, reduction="sum")
        count += sum(label != -100 for label in labels[1:])
    return total / count


def _output_logprobs(model: Any, context: list[int], output: list[int]) -> Tensor:
    logits = model(input_ids=torch.tensor([context + output]), use_cache=False).logits[0]
    rows = logits[len(context) - 1 : -1].log_softmax(-1)
    return rows.gather(-1, torch.tensor(output)[:, None])[:, 0]


def _message_ids(tokenizer: Any, message: dict[str, str]) -> list[int]:
    start, end = tokenizer.convert_tokens_to_ids("<|im_start|>"), tokenizer.convert_tokens_to_ids("<|im_end|>")
    body = _text(tokenizer, f"{message['role']}\n{message['content']}")
    if message["role"] == "assistant":
        # The tokens of an earlier answer are those the model wrote: none crosses the start of the output.
        body = _text(tokenizer, "assistant\n") + _text(tokenizer, message["content"])
    return [start, *body, end, *_text(tokenizer, "\n")]


def _text(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids
