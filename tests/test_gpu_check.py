"""`make gpu-check`, rehearsed on the CPU: the same way through with tiny models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_check_goes_through_without_a_gpu_and_says_what_it_skips(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    command = [sys.executable, "benchmarks/gpu_check.py", "--cpu-rehearsal", "--minutes", "8", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(output.read_text())
    rows = result["rows"]
    assert [(row["way"], row["size"], row["data"]) for row in rows] == [
        ("sft-dist", "8B", "conversations"),
        ("plain", "8B", "conversations"),
        ("sft-dist", "1B", "documents"),
    ]
    assert len(result["skipped"]) == 1
    assert "needs about 1000000 s" in result["skipped"][0]
    # In float32 both forwards of the same conversations differ by rounding alone.
    assert rows[1]["loss_difference"] < 1e-4
    assert rows[1]["loss_difference"] > 0
    for row in rows:
        assert 0 < row["share_of_floor"] < 1
        assert row["floor_tokens_per_s"] > row["tokens_per_s"] > row["target_tokens_per_s"] > 0
    assert "public: 7B" in done.stdout
    assert f"not done: {result['skipped'][0]}" in done.stdout
