"""Figures of a prediction head, against their definitions written out sample by sample."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.data.labels import LabelSet
from sft_dist.train import classification

NAMES = ("a", "b", "c")


@st.composite
def answers(draw: st.DrawFn, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(logits [n, 3], what is true [n, width])."""
    num = draw(st.integers(1, 12))
    logits = [[draw(st.sampled_from([-2.0, -0.5, 0.1, 1.0, 3.0])) for _ in NAMES] for _ in range(num)]
    values = st.integers(0, 2) if width == 1 else st.sampled_from([0.0, 1.0])
    return np.array(logits), np.array([[draw(values) for _ in range(width)] for _ in range(num)], np.float64)


def f1(pairs: list[tuple[bool, bool]]) -> float | None:
    """From precision and recall over (applies, said)."""
    right = sum(applies and said for applies, said in pairs)
    said, applies = sum(said for _, said in pairs), sum(applies for applies, _ in pairs)
    if not said and not applies:
        return None
    if not right:
        return 0.0
    precision, recall = right / said, right / applies
    return 2 * precision * recall / (precision + recall)


def mean(values: list[Any]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


@given(answers(1))
def test_figures_of_one_label(given_answers: tuple[np.ndarray, np.ndarray]) -> None:
    logits, wanted = given_answers
    found = classification.figures(LabelSet("single_label", NAMES), logits, wanted)
    truth, said = wanted[:, 0].astype(int).tolist(), [int(np.argmax(row)) for row in logits]
    assert found["accuracy"] == pytest.approx(mean([a == b for a, b in zip(truth, said, strict=True)]))
    by_label = [f1([(a == k, b == k) for a, b in zip(truth, said, strict=True)]) for k in range(3)]
    assert found["macro_f1"] == pytest.approx(mean(by_label))
    pairs = Counter((NAMES[a], NAMES[b]) for a, b in zip(truth, said, strict=True))
    assert {(a, b): n for a, b, n in found["confusion"]} == pairs
    # Guo et al. 2017: a bin holds confidences in (m / 15, (m + 1) / 15].
    confidences = [float(max(math.exp(v) for v in row) / sum(math.exp(v) for v in row)) for row in logits]
    error = 0.0
    for m in range(15):
        inside = [n for n, c in enumerate(confidences) if m / 15 < c <= (m + 1) / 15]
        if inside:
            accuracy = mean([truth[n] == said[n] for n in inside])
            error += len(inside) / len(truth) * abs(accuracy - mean([confidences[n] for n in inside]))
    assert found["ece"] == pytest.approx(error)


@given(answers(3))
def test_figures_of_several_labels(given_answers: tuple[np.ndarray, np.ndarray]) -> None:
    logits, wanted = given_answers
    found = classification.figures(LabelSet("multi_label", NAMES), logits, wanted)
    pairs = [[(bool(w), v > 0) for w, v in zip(ws, vs, strict=True)] for ws, vs in zip(wanted, logits, strict=True)]
    assert found["exact"] == pytest.approx(mean([all(a == b for a, b in row) for row in pairs]))
    assert found["macro_f1"] == pytest.approx(mean([f1([row[k] for row in pairs]) for k in range(3)]), nan_ok=True)
    micro = f1([pair for row in pairs for pair in row])
    assert found["micro_f1"] == pytest.approx(math.nan if micro is None else micro, nan_ok=True)


@given(st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 2.0, 5.0]), st.sampled_from([0.0, 1.0, 4.0])), min_size=2))
def test_figures_of_numbers(pairs: list[tuple[float, float]]) -> None:
    said, wanted = (np.array(column)[:, None] for column in zip(*pairs, strict=True))
    found = classification.figures(LabelSet("regression", ("value",)), said, wanted)
    errors = [(a - b) ** 2 for a, b in pairs]
    assert found["mse"] == pytest.approx(mean(errors))
    spread = sum((b - mean([b for _, b in pairs])) ** 2 for _, b in pairs)
    if spread:
        assert found["r2"] == pytest.approx(1 - sum(errors) / spread)
    if spread and len({a for a, _ in pairs}) > 1:
        ranks = [
            [mean([n for n, x in enumerate(sorted(column)) if x == v]) for v in column]
            for column in (said[:, 0], wanted[:, 0])
        ]
        assert found["spearman"] == pytest.approx(float(np.corrcoef(ranks)[0, 1]))
    else:
        assert math.isnan(found["spearman"])


@given(answers(1))
def test_probabilities_are_those_of_the_logits_however_large(given_answers: tuple[np.ndarray, np.ndarray]) -> None:
    logits, _ = given_answers
    shares = classification.probabilities("single_label", logits + 1e4)
    assert shares.sum(-1) == pytest.approx(np.ones(len(logits)))
    np.testing.assert_allclose(np.log(shares[:, 0] / shares[:, 1]), logits[:, 0] - logits[:, 1], atol=1e-9)
    each = classification.probabilities("multi_label", np.array([[-1e4, 1e4, 0.0, 1.0]]))
    assert each[0].tolist() == pytest.approx([0, 1, 0.5, 1 / (1 + math.exp(-1))])
