"""What a run on two ranks says of its drift: at every evaluation, in the summary, and after it was resumed."""

import json
from typing import Any

import pytest

from tests.end_to_end.conftest import Place

pytestmark = pytest.mark.slow


def drifts(place: Place, run: str) -> dict[int, Any]:
    lines = (place.folder / run / "metrics.jsonl").read_text().splitlines()
    return {entry["step"]: entry for line in lines if (entry := json.loads(line))["kind"] == "drift"}


def test_drift_is_recorded_at_evaluations_and_grows(uninterrupted: Place) -> None:
    found = drifts(uninterrupted, "whole")
    assert list(found) == [2, 4, 6]
    assert 0 < found[2]["all"] < found[4]["all"] < found[6]["all"] < 1
    assert set(found[6]["layers"]) == {"outside", "0", "1", "2"}
    assert set(found[6]["kinds"]) == {"embeddings", "attention", "mlp", "norms"}
    summary = json.loads((uninterrupted.folder / "whole" / "summary.json").read_text())
    assert summary["drift"] == found[6]["all"]


def test_a_resumed_run_pulls_and_measures_as_one_that_was_never_stopped(place: Place) -> None:
    """On other ranks in between; weights that are no longer those of the start are refused."""
    pulled = ["anchor.decay=40", "schedule.max_steps=4", "model.freeze=['*wpe*']"]
    (done,) = place.train("pulled", *pulled, "checkpoint.stop_at_step=2", ranks=1)
    assert done.returncode == 75, done.stdout
    assert "frozen by model.freeze: 1 of" in done.stdout
    done, _ = place.train("pulled", *pulled)
    assert done.returncode == 0, done.stdout
    assert "drift: how far the weights are from where they started" in done.stdout
    found = drifts(place, "pulled")
    assert list(found) == [2, 4] and found[4]["all"] > found[2]["all"] > 0
    done, _ = place.train("pulled", *pulled[1:])
    assert done.returncode == 78 and "anchor.decay: 40.0 in the checkpoint, 0.0 now" in done.stdout
