"""Held-out conversations that are trained on too are told."""

from pathlib import Path

import numpy as np
import pytest

from sft_dist.data.sample import Sample, Span
from sft_dist.preparation import say_overlap
from tests.helpers.samples import select


def samples(digests: str) -> list[Sample]:
    ids = np.arange(5, dtype=np.int32)
    span = Span(0, "assistant", 0, 1, 5, 5, is_owned=True, turn=1)
    return [Sample(d, n, "s", ids, (span,), num_turns=1, digest=d.encode() * 16) for n, d in enumerate(digests)]


def test_shared_conversations_are_counted_once_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, heldout = select(tmp_path / "train", samples("aabcd")), select(tmp_path / "heldout", samples("xaady"))
    say_overlap(train, heldout)
    assert "2 of 4 held-out conversations are in the training data" in capsys.readouterr().err
    say_overlap(train, select(tmp_path / "other", samples("xyz")))
    assert capsys.readouterr().err == ""
