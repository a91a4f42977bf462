"""Independent answers: plain transformers in float64, one conversation at a time, nothing of the package's masks.

Spans are found again from the template's control tokens, so an error in the package's spans cannot hide here.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
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
        ids, labels = sequence(tokenizer, messages)
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
        total = total + F.cross_entropy(logits, torch.tensor(labels[1:]), ignore_index=-100, reduction="sum")
        count += sum(label != -100 for label in labels[1:])
    return total / count


def sequence(tokenizer: Any, messages: Sequence[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Ids of a whole conversation, and the same with -100 where no token of an answer is."""
    ids: list[int] = []
    labels: list[int] = []
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
    return ids, labels


@dataclass(frozen=True)
class Target:
    """One trained token: its place in its piece, what its message weighs, and what it is part of."""

    place: int
    weight: float
    message: tuple[int, int, int]  # conversation, branch, message
    turn: int  # from 1; 0: no answer
    is_first: bool = False  # of the answer's output
    is_stop: bool = False


@dataclass(frozen=True)
class Piece:
    """One sequence that the model sees by itself."""

    conversation: int
    sample: int  # number of the branch or text in the whole data
    source: str
    weight: float  # of the record
    ids: tuple[int, ...]
    targets: tuple[Target, ...]
    is_text: bool = False


def pieces(
    tokenizer: Any, conversations: Sequence[dict[str, Any]], *, train_on: str, max_length: int, truncate: bool
) -> list[Piece]:
    """What is trained of conversations as tests/helpers/weighted.py writes them, from the messages alone."""
    found: list[Piece] = []
    sample = 0
    for number, conversation in enumerate(conversations):
        facts = (conversation["source"], conversation["weight"])
        if "text" in conversation:
            ids = _text(tokenizer, conversation["text"]) + [tokenizer.convert_tokens_to_ids("<|im_end|>")]
            for window in _windows(ids, max_length, truncate):
                is_in = train_on != "marked" and conversation["weight"] > 0
                key = (number, 0, 0)
                targets = tuple(Target(t, 1.0, key, 0) for t in range(1, len(window)) if is_in)
                found.append(Piece(number, sample, *facts, tuple(window), targets, is_text=True))
            sample += 1
            continue
        last = len(conversation["branches"][-1]) - 1
        for branch, messages in enumerate(conversation["branches"]):
            ids, targets, ends = _branch(tokenizer, messages, (number, branch), train_on, last)
            targets = [target for target in targets if conversation["weight"] > 0]
            if len(ids) > max_length:
                fitting = [end for end in ends if end <= max_length and any(t.place < end for t in targets)]
                cut = max(fitting) if fitting and truncate else 0
                ids, targets = ids[:cut], [target for target in targets if target.place < cut]
            if ids:
                found.append(Piece(number, sample, *facts, tuple(ids), tuple(targets)))
            sample += 1
    return found


def _windows(ids: list[int], max_length: int, truncate: bool) -> list[list[int]]:
    if len(ids) <= max_length:
        return [ids]
    windows = []
    while truncate and len(ids) > 1:
        windows.append(ids[:max_length])
        ids = ids[max_length - 1 :]
    return windows


def _branch(
    tokenizer: Any, messages: Sequence[dict[str, Any]], key: tuple[int, int], train_on: str, last: int
) -> tuple[list[int], list[Target], list[int]]:
    """Ids, targets, and one past the stop token of every answer."""
    ids: list[int] = []
    targets: list[Target] = []
    ends = []
    turn = 0
    for number, message in enumerate(messages):
        begin = len(ids)
        ids += _message_ids(tokenizer, message)
        is_answer = message["role"] == "assistant"
        turn += is_answer
        header = len(_text(tokenizer, "<|im_start|>assistant\n")) if is_answer else 0
        tail = len(_text(tokenizer, "\n")) if is_answer else 0
        output = range(begin + header, len(ids) - tail)
        ends += [output.stop] if is_answer else []
        wanted = {
            "assistant": is_answer,
            "last_assistant": is_answer and number == last,
            "all": True,
            "marked": message["train"] is True,
        }[train_on]
        if wanted and message["is_owned"] and message["train"] is not False and message["weight"] > 0:
            for place in range(begin, len(ids)) if train_on == "all" else output:
                first, stop = is_answer and place == output.start, is_answer and place == output.stop - 1
                if place > 0:
                    targets.append(Target(place, message["weight"], (*key, number), turn * is_answer, first, stop))
    return ids, targets, ends


class Objective:
    """Loss of weighted conversations from full float64 logits, one piece at a time; forwards are kept and shared."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._logits: dict[tuple[int, ...], Tensor] = {}

    def logits(self, piece: Piece) -> Tensor:
        """float64 [T - 1, V]: row t predicts token t + 1."""
        if piece.ids not in self._logits:
            row = torch.tensor([piece.ids])
            self._logits[piece.ids] = self.model(input_ids=row, use_cache=False).logits[0, :-1]
        return self._logits[piece.ids]

    def loss(
        self,
        data: Sequence[Piece],
        counts: Sequence[int],  # how often each piece is in the step
        *,
        normalise: str,
        source_weights: dict[str, float],
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> Tensor:
        """docs/objective.md, section 5: a weighted mean of the means of tokens, turns or conversations."""

        in_turn: dict[Any, float] = defaultdict(float)
        in_conversation: dict[Any, float] = defaultdict(float)
        for piece in data:
            for target in piece.targets:
                in_turn[target.message] += 1
                in_conversation[piece.conversation] += target.weight
        # What the mean of a unit is divided by.
        size_of = {
            "token": lambda target: 1.0,
            "turn": lambda target: in_turn[target.message],
            "conversation": lambda target: in_conversation[target.message[0]],
        }[normalise]
        numerator, denominator = torch.zeros((), dtype=torch.float64), 0.0
        for piece, count in zip(data, counts, strict=True):
            if not count or not piece.targets:
                continue
            rows = torch.tensor([target.place - 1 for target in piece.targets])
            logits = self.logits(piece)[rows]
            logprobs = logits.log_softmax(-1)
            picked = logprobs.gather(-1, torch.tensor(piece.ids)[rows + 1][:, None])[:, 0]
            costs = -(1 - label_smoothing) * picked - label_smoothing * logprobs.mean(-1)
            costs = costs + z_loss * logits.logsumexp(-1) ** 2
            whole = count * source_weights.get(piece.source, 1.0) * piece.weight
            factors = [whole * target.weight / size_of(target) for target in piece.targets]
            numerator = numerator + (torch.tensor(factors, dtype=torch.float64) * costs).sum()
            denominator += sum(factors)
        return numerator / denominator


def figures(objective: Objective, data: Sequence[Piece]) -> dict[str, dict[str, list[float]]]:
    """Group -> name -> [summed NLL, likeliest tokens, summed entropy, tokens], every target counted once."""
    sums: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0] * 4))
    for piece in data:
        for target in piece.targets:
            row, token = objective.logits(piece)[target.place - 1].detach(), piece.ids[target.place]
            names = [("source", piece.source)]
            names += [("token", "text") if piece.is_text else ("turn", str(target.turn or "none"))]
            names += [("token", "first")] * target.is_first + [("token", "stop")] * target.is_stop
            for group, name in [*names, ("all", "all")]:
                entry = sums[group][name]
                entry[0] -= float(row.log_softmax(-1)[token])
                entry[1] += float(int(row.argmax()) == token)
                entry[2] += float(torch.distributions.Categorical(logits=row).entropy())
                entry[3] += 1
    return {group: dict(named) for group, named in sums.items()}


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
