"""How good the answers of a prediction head are: from the logits of a whole data set to figures.

In: what forwards say of their samples, rank by rank. Out: accuracy, F1, confusion and calibration of labels, or errors
and correlations of numbers. The logits of all samples travel, in the order of the data set, so that the figures are
those of one rank for any number of ranks; all are computed in float64.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sft_dist.data.labels import Kind, LabelSet
from sft_dist.data.selection import Selection
from sft_dist.distributed import collectives
from sft_dist.model.classifier import label_losses
from sft_dist.train.metrics import Metrics

Float64 = NDArray[np.float64]
_NUM_BINS = 15  # of confidence; Guo et al. 2017, section 4
_NUM_SAID = 3  # pairs of labels that are named as confused


class Answers:
    """Logits by sample; `add` on every rank, then `reduce` once, then read `logits`."""

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._parts: list[NDArray[np.float32]] = []
        self.logits = np.zeros((0, 0))  # [n, C], in the order of the samples' numbers

    def add(self, numbers: Sequence[int], logits: Tensor) -> None:
        """The logits [n, C] of one forward over these samples of the selection."""
        if numbers:
            self._numbers += numbers
            self._parts.append(logits.float().cpu().numpy())

    def reduce(self) -> None:
        """Bring the answers of all ranks together. A collective."""
        own = (self._numbers, np.concatenate(self._parts) if self._parts else None)
        every = collectives.gather(own)
        numbers = np.concatenate([np.array(of_rank, np.int64) for of_rank, _ in every])
        parts = [part for _, part in every if part is not None]
        if parts:
            self.logits = np.concatenate(parts)[np.argsort(numbers, kind="stable")].astype(np.float64)


def targets(selection: Selection) -> Float64:
    """[m, width] what the labels of a selection say, in its order."""
    return selection.label_targets


def mean_loss(labels: LabelSet, logits: Float64, wanted: Float64) -> float:
    """Mean over samples of what they cost, each counted once; nan without any."""
    losses = label_losses(labels.kind, torch.from_numpy(logits), torch.from_numpy(wanted))
    return float(losses.mean())


def probabilities(kind: Kind, logits: Float64) -> Float64:
    """[n, C] of labels: softmax, or of each by itself the logistic function; of numbers the numbers."""
    match kind:
        case "single_label":
            shifted = np.exp(logits - logits.max(-1, keepdims=True))
            return np.asarray(shifted / shifted.sum(-1, keepdims=True))
        case "multi_label":
            return np.asarray(np.where(logits >= 0, 1.0, np.exp(-np.abs(logits))) / (1 + np.exp(-np.abs(logits))))
        case "regression":
            return logits


def figures(labels: LabelSet, logits: Float64, wanted: Float64) -> dict[str, Any]:
    """What is recorded of the answers to samples with these targets; `confusion` lists [label, answer, number]."""
    match labels.kind:
        case "single_label":
            truth, answers = wanted[:, 0].astype(np.int64), logits.argmax(-1)
            num = len(labels.names)
            table = np.bincount(truth * num + answers, minlength=num * num).reshape(num, num)
            right = np.diag(table).astype(np.float64)
            scores = _f1(right, table.sum(0), table.sum(1))
            return {
                "count": len(truth),
                "accuracy": float(right.sum() / max(len(truth), 1)),
                "macro_f1": _mean(scores),
                "ece": calibration_error(probabilities("single_label", logits), truth),
                "confusion": [
                    [labels.names[label], labels.names[answer], int(table[label, answer])]
                    for label, answer in np.argwhere(table).tolist()
                ],
            }
        case "multi_label":
            applies, said = wanted > 0, logits > 0
            right = (applies & said).sum(0).astype(np.float64)
            return {
                "count": len(wanted),
                "exact": float((applies == said).all(-1).mean()) if len(wanted) else math.nan,
                "micro_f1": _mean(_f1(right.sum(), said.sum(), applies.sum())),
                "macro_f1": _mean(_f1(right, said.sum(0), applies.sum(0))),
            }
        case "regression":
            errors = np.square(logits - wanted)
            spread = np.square(wanted - wanted.mean(0)).sum(0)
            return {
                "count": len(wanted),
                "mse": float(errors.mean()),
                "r2": _mean(1 - errors.sum(0)[spread > 0] / spread[spread > 0]),
                "spearman": _mean(np.array([_spearman(a, b) for a, b in zip(logits.T, wanted.T, strict=True)])),
            }


def report(metrics: Metrics, step: int, loss: float, selection: Selection, answers: Answers) -> None:
    """Say and record the figures of one evaluation, as entries of kind `heldout_head`."""
    assert selection.policy.labels is not None
    found = figures(selection.policy.labels, answers.logits, targets(selection))
    metrics.say(f"held-out  step {step:,}  loss {loss:.4f} per example")
    for line in lines(found):
        metrics.say(line)
    metrics.record("heldout_head", step, loss=loss, **found)


def lines(found: dict[str, Any]) -> list[str]:
    """`figures` for people."""
    numbers = "  ".join(f"{name} {value:.4f}" for name, value in found.items() if isinstance(value, float))
    said = [f"  head       {numbers}  of {found['count']:,}"]
    wrong = sorted((c for c in found.get("confusion", ()) if c[0] != c[1]), key=lambda c: (-c[2], c[0], c[1]))
    if wrong:
        shown = ", ".join(f"{label} as {answer} ({number:,})" for label, answer, number in wrong[:_NUM_SAID])
        said.append(f"  confused   {shown}")
    return said


def calibration_error(shares: Float64, truth: NDArray[np.int64]) -> float:
    """Expected calibration error: Σ_b |B_b|/n |acc(B_b) − conf(B_b)| over 15 bins of equal width of the confidence.

    Guo et al., "On Calibration of Modern Neural Networks", 2017, section 2, equation 3; bins as in section 4.
    """
    if not len(truth):
        return math.nan
    confidence, is_right = shares.max(-1), shares.argmax(-1) == truth
    bins = np.clip(np.ceil(confidence * _NUM_BINS).astype(np.int64) - 1, 0, _NUM_BINS - 1)  # (m / M, (m + 1) / M]
    gaps = np.bincount(bins, is_right - confidence, minlength=_NUM_BINS)
    return float(np.abs(gaps).sum() / len(truth))


def _f1(right: Any, said: Any, applies: Any) -> Float64:
    """2 TP / (2 TP + FP + FN) of every label that applies or is said at least once."""
    total = np.atleast_1d(said + applies).astype(np.float64)
    return np.atleast_1d(2 * right)[total > 0] / total[total > 0]


def _mean(values: Float64) -> float:
    return float(values.mean()) if len(values) else math.nan


def _spearman(first: Float64, second: Float64) -> float:
    """Pearson's correlation of the ranks, ties at their mean; nan where one of the two is constant."""
    a, b = (_ranks(values) - (len(values) - 1) / 2 for values in (first, second))
    scale = math.sqrt(float((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / scale if scale else math.nan


def _ranks(values: Float64) -> Float64:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts + 1) / 2)[place])
