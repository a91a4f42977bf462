"""A snapshot is what the state was, whatever training does next; a written file is what was handed over."""

import hashlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_dist.model.snapshot import HostMemory, Snapshot, write_file


def state(value: float) -> dict[str, Any]:
    weights = torch.full((1_000, 7), value)
    module = OrderedDict(a=weights, again=weights, empty=torch.empty(0, dtype=torch.bfloat16))
    module._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]  # as nn.Module.state_dict leaves it
    step = torch.tensor(3)
    groups = [{"lr": value, "betas": (0.9, 0.95), "params": [0]}]
    return {"f": {"module": module, "shapes": [torch.Size([1_000, 7])], "optimizer": {"step": step, "groups": groups}}}


def test_a_copy_holds_what_was_there_and_is_written_alike(tmp_path: Path) -> None:
    files = state(1.5)
    expected = write_file(tmp_path / "now", state(1.5)["f"])
    copied = HostMemory().copy(Snapshot(files))
    files["f"]["module"]["a"].mul_(2)
    files["f"]["optimizer"]["step"].add_(1)
    files["f"]["optimizer"]["groups"][0]["lr"] = 0.0
    assert write_file(tmp_path / "later", copied.files["f"]) == expected
    assert (tmp_path / "later").read_bytes() == (tmp_path / "now").read_bytes()
    found = torch.load(tmp_path / "later", weights_only=True)
    assert bool((found["module"]["a"] == 1.5).all()) and found["optimizer"]["groups"][0]["lr"] == 1.5
    assert copied.files["f"]["module"]["a"] is copied.files["f"]["module"]["again"]


def test_the_same_memory_serves_the_next_snapshot() -> None:
    memory = HostMemory()
    first = memory.copy(Snapshot(state(1.0))).files["f"]["module"]["a"]
    second = memory.copy(Snapshot(state(2.0))).files["f"]["module"]["a"]
    assert first.data_ptr() == second.data_ptr() and float(second[0, 0]) == 2.0
    larger = memory.copy(Snapshot({"f": {"module": {"a": torch.zeros(3)}}})).files["f"]["module"]["a"]
    assert larger.shape == (3,)


def test_a_file_is_what_its_digest_says_and_its_size_is_known_before(tmp_path: Path) -> None:
    snapshot = Snapshot(state(1.0))
    facts = write_file(tmp_path / "x", snapshot.files["f"])
    content = (tmp_path / "x").read_bytes()
    assert facts == {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert snapshot.num_bytes == 1_000 * 7 * 4 + 8, "shared tensors count once"
    assert snapshot.num_bytes < len(content) < snapshot.num_bytes + 4_000


def test_a_full_disk_is_an_error_of_the_operating_system() -> None:
    """And not one of torch's writer, which would say no more than that a stream failed."""
    with pytest.raises(OSError, match="No space left on device"):
        write_file(Path("/dev/full"), state(1.0)["f"])
