"""What a step costs in collectives, counted: decoder layers, kept weights and one reduction keep what they promise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.worlds import ROOT

pytestmark = pytest.mark.slow

LAYERS = 8  # of the benchmark's model
MODULES = "modules, constants, recomputed"
UNPREFETCHED = "layers, derived, nothing prefetched"
DERIVED = "layers, derived, recomputed"
KEPT = "layers, derived, all weights kept"
ONCE = "accumulation 4, all weights kept, reduced once"


def test_collectives_of_a_step(tmp_path: Path) -> None:
    result = tmp_path / "collectives.json"
    names = [MODULES, UNPREFETCHED, DERIVED, KEPT, ONCE]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "collectives.py", "--output", result, "--cases", *names],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = {row["name"]: row for row in json.loads(result.read_text())["rows"]}
    gathers = {name: row["calls"]["all_gather_into_tensor"] for name, row in rows.items()}
    gathered = {name: row["in_model_bytes"]["all_gather_into_tensor"] for name, row in rows.items()}
    reduces = {name: row["calls"]["reduce_scatter_tensor"] for name, row in rows.items()}
    reduced = {name: row["in_model_bytes"]["reduce_scatter_tensor"] for name, row in rows.items()}
    # Embeddings, layers, last norm and head, once forward and once backward.
    assert gathers[UNPREFETCHED] == 2 * (LAYERS + 3) and gathered[UNPREFETCHED] == 2.0
    assert gathers[KEPT] <= LAYERS + 3 and gathered[KEPT] == 1.0
    assert gathers[DERIVED] <= 2 * (LAYERS + 3) and gathered[DERIVED] <= 2.0
    assert gathers[MODULES] > 4 * gathers[DERIVED]
    assert (gathers[ONCE], gathered[ONCE]) == (4 * gathers[KEPT], 4.0)
    # Embeddings, layers with the last norm, and head.
    assert (reduces[KEPT], reduced[KEPT]) == (LAYERS + 2, 1.0)
    assert (reduces[ONCE], reduced[ONCE]) == (LAYERS + 2, 1.0)
