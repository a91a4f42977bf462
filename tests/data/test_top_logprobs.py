"""Files of what θ̂ says: every example gets its own rows, and nothing is read that is cut short or of something else."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_dist.data.top_logprobs import PartWriter, TopTable, bytes_per_target, seal
from sft_dist.errors import StorageError

IDENTITY = {"weights": "abc", "k": 2}


def write(folder: Path, counts: list[int], owners: list[int], num_parts: int, k: int) -> np.ndarray:
    """Examples of these numbers of targets in the parts of their owners; the first row of each."""
    folder.mkdir()
    first = np.full(len(counts), -1, np.int64)
    parts, row = [], 0
    for number in range(num_parts):
        with PartWriter(folder, number) as writer:
            for example, (count, owner) in enumerate(zip(counts, owners, strict=True)):
                if owner == number:
                    writer.add(*rows_of(example, count, k))
                    first[example], row = row, row + count
            parts.append(writer.finish())
    seal(folder, IDENTITY, k, parts, first)
    return first


def rows_of(example: int, count: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(example)
    return generator.integers(0, 9, (count, k), np.int32), np.log(generator.random((count, k + 1), np.float32))


@settings(deadline=None, max_examples=25)
@given(data=st.data(), num_parts=st.integers(1, 4), k=st.integers(1, 3))
def test_every_example_gets_the_rows_that_were_written_for_it(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, num_parts: int, k: int
) -> None:
    counts = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=8))
    owners = [data.draw(st.integers(0, num_parts - 1)) for _ in counts]
    folder = tmp_path_factory.mktemp("top") / "made"
    write(folder, counts, owners, num_parts, k)
    table = TopTable(folder, IDENTITY)
    masses = []
    for example, count in enumerate(counts):
        ids, logprobs = rows_of(example, count, k)
        found = table.rows(example, count)
        assert np.array_equal(found.ids, ids) and np.array_equal(found.logprobs, logprobs)
        masses += np.exp(logprobs[:, -1].astype(np.float64)).tolist()
    assert table.num_rows == sum(counts) and table.mean_tail_mass == pytest.approx(sum(masses) / len(masses))
    taken = sum(file.stat().st_size for file in folder.glob("part-*"))
    assert taken == table.num_rows * bytes_per_target(k) == table.num_rows * (8 * k + 4)


def test_what_is_cut_short_missing_or_of_something_else_is_refused_by_name(tmp_path: Path) -> None:
    def refused(change: str) -> str:
        folder = tmp_path / change
        write(folder, [2, 3], [0, 1], 2, 2)
        match change:
            case "short":
                with open(folder / "part-00001.logprobs", "r+b") as file:
                    file.truncate(8)
            case "lost":
                (folder / "part-00000.ids").unlink()
            case "unsealed":
                (folder / "manifest.json").unlink()
            case "newer":
                tree = json.loads((folder / "manifest.json").read_text())
                (folder / "manifest.json").write_text(json.dumps(tree | {"format": 9}))
        with pytest.raises(StorageError) as caught:
            TopTable(folder, IDENTITY | ({"weights": "other"} if change == "other" else {}))
        assert "made anew" in str(caught.value) and str(folder) in str(caught.value)
        return str(caught.value)

    assert "part-00001.logprobs has 8 bytes, 36 are expected" in refused("short")
    assert "part-00000.ids" in refused("lost")
    assert "manifest.json" in refused("unsealed")
    assert "format 9" in refused("newer")
    assert "other data than its name says (weights)" in refused("other")


def test_an_example_that_was_not_asked_for_is_not_there(tmp_path: Path) -> None:
    first = write(tmp_path / "top", [2, 3], [0, 7], 1, 2)
    assert first.tolist() == [0, -1]
    with pytest.raises(StorageError, match="nothing of example 1"):
        TopTable(tmp_path / "top", IDENTITY).rows(1, 3)


@pytest.mark.parametrize("counts", [[3, 0], [0, 0]])
def test_an_example_with_a_label_alone_has_no_rows_wherever_it_lies(tmp_path: Path, counts: list[int]) -> None:
    write(tmp_path / "made", counts, [0, 1], 2, k=2)
    table = TopTable(tmp_path / "made", IDENTITY)
    found = table.rows(1, 0)
    assert found.ids.shape == (0, 2) and found.logprobs.shape == (0, 3)
    assert 0 <= table.mean_tail_mass <= 1


@pytest.mark.parametrize(
    "change", [{"identity": None}, {"identity": ...}, {"parts": []}, {"parts": [{}]}, {"first": b""}]
)
def test_damage_of_any_part_is_refused_with_what_to_do(tmp_path: Path, change: dict[str, object]) -> None:
    folder = tmp_path / "made"
    write(folder, [3], [0], 1, k=2)
    if "first" in change:
        (folder / "first.npy").write_bytes(b"")
    else:
        tree = json.loads((folder / "manifest.json").read_text()) | change
        (folder / "manifest.json").write_text(json.dumps({k: v for k, v in tree.items() if v is not ...}))
    with pytest.raises(StorageError, match="delete it, and it is made anew"):
        TopTable(folder, IDENTITY)
