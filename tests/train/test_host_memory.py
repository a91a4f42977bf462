"""Free memory is what the machine and all control groups around the process leave."""

from pathlib import Path

import pytest

from sft_dist.train.host_memory import available_bytes

GIB = 2**30


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 8 * GIB),
        ({"job/step": "max", "job": "max"}, 8 * GIB),
        ({"job/step": "max", "job": str(3 * GIB)}, 2 * GIB),
        ({"job/step": str(2 * GIB), "job": str(3 * GIB)}, 1 * GIB),
        ({"job/step": str(100 * GIB)}, 8 * GIB),
    ],
)
def test_the_tightest_limit_counts(tmp_path: Path, limits: dict[str, str], expected: int) -> None:
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {8 * 2**20} kB\n")
    (tmp_path / "cgroup").write_text("1:cpu:/other\n0::/job/step\n")
    (tmp_path / "groups" / "job" / "step").mkdir(parents=True)
    for group, limit in limits.items():
        (tmp_path / "groups" / group / "memory.max").write_text(limit + "\n")
        (tmp_path / "groups" / group / "memory.current").write_text(f"{GIB}\n")
    assert available_bytes(tmp_path / "meminfo", tmp_path / "cgroup", tmp_path / "groups") == expected


def test_here_it_is_a_number() -> None:
    assert available_bytes() > 0
