"""Figures by group: who is counted where, and how they are written; tests/model/test_objective.py has their values."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sft_dist.config import LoggingConfig
from sft_dist.data.sample import Sample, Span
from sft_dist.data.selection import Example
from sft_dist.model.fused_head import TokenValues
from sft_dist.train.details import Details
from sft_dist.train.metrics import Metrics

NUM_TURNS = 11


def long_conversation() -> Example:
    """Turns of a user's message (2 tokens) and an answer: header, 2 tokens and stop token; all of them targets."""
    spans: list[Span] = []
    for turn in range(1, NUM_TURNS + 1):
        begin = 6 * (turn - 1)
        spans.append(Span(len(spans), "user", begin, begin, begin + 2, begin + 2, is_owned=True))
        answer = Span(len(spans), "assistant", begin + 2, begin + 3, begin + 6, begin + 6, is_owned=True, turn=turn)
        spans.append(answer)
    ids = np.arange(6 * NUM_TURNS, dtype=np.int32)
    turns = np.concatenate([np.full(span.end - span.start, span.message) for span in spans]).astype(np.int32)
    turns[0] = -1
    return Example(Sample("c", 0, "chat", ids, tuple(spans), num_turns=NUM_TURNS), turns, (turns >= 0) * np.float32(2))


def text() -> Example:
    span = Span(0, "text", 0, 0, 5, 5, is_owned=True, turn=1)
    sample = Sample("t", 1, "book", np.arange(5, dtype=np.int32), (span,), num_turns=1)
    return Example(sample, np.array([-1, 0, 0, 0, 0], np.int32), np.ones(5, np.float32))


@pytest.fixture
def details() -> Details:
    """Every target's NLL is its place in its sample; those at even places are the likeliest."""
    details = Details(["chat", "book", "unused"])
    examples = [long_conversation(), text()]
    places = np.concatenate([np.flatnonzero(example.turns >= 0) for example in examples])
    values = TokenValues(
        logprob=-torch.tensor(places, dtype=torch.float32),
        is_top=torch.tensor(places % 2 == 0, dtype=torch.float32),
        entropy=torch.tensor(places, dtype=torch.float32) / 2,
    )
    for own, part in ((examples[:1], slice(None, -4)), (examples[1:], slice(-4, None))):
        details.add(own, TokenValues(values.logprob[part], values.is_top[part], entropy=values.entropy[part]))
    return details


def test_every_target_is_counted_once_in_the_turn_it_belongs_to(details: Details) -> None:
    turns = details.group("turn")
    assert list(turns) == [*"12345678", "9+", "none"]
    assert [turns[name].count for name in turns] == [4] * 8 + [12, 2 * NUM_TURNS - 1]
    assert turns["2"].nll == np.mean([8, 9, 10, 11]) and turns["2"].accuracy == 0.5
    assert turns["2"].entropy == turns["2"].nll / 2
    assert turns["9+"].nll == np.mean([6 * turn + place for turn in (8, 9, 10) for place in (2, 3, 4, 5)])
    sources = details.group("source")
    assert {name: sources[name].count for name in sources} == {"chat": 6 * NUM_TURNS - 1, "book": 4}
    assert details.all.count == 6 * NUM_TURNS + 3


def test_first_and_stop_tokens_are_those_of_answers(details: Details) -> None:
    tokens = details.group("token")
    assert {name: tokens[name].count for name in tokens} == {"first": NUM_TURNS, "stop": NUM_TURNS, "text": 4}
    assert tokens["first"].nll == np.mean([6 * turn + 3 for turn in range(NUM_TURNS)])
    assert tokens["stop"].nll == np.mean([6 * turn + 5 for turn in range(NUM_TURNS)])
    assert tokens["text"].nll == np.mean([1, 2, 3, 4])
    assert tokens["text"].perplexity == pytest.approx(np.exp(2.5))


def test_figures_are_written_nested_and_said_in_a_few_lines(details: Details, tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, LoggingConfig(), first_step=0, is_main=True)
    metrics.record("heldout_details", 3, **details.as_dict())
    metrics.close()
    (entry,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (entry["kind"], entry["step"]) == ("heldout_details", 3)
    assert entry["turn"]["2"] == details.group("turn")["2"].as_dict()
    assert set(entry["token"]["stop"]) == {"nll", "perplexity", "accuracy", "entropy", "count"}
    assert "unused" not in entry["source"]
    lines = details.lines()
    assert [line.split()[1] for line in lines] == ["source", "turn", "token"]
    assert "2: 9.500 50%" in lines[1]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    (scalar,) = board.Scalars("heldout_details/turn.2.nll")
    assert (scalar.step, scalar.value) == (3, 9.5)
