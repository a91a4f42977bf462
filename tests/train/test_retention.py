"""Which checkpoints stay: by count and by bytes, and never without the last valid one, the best and the resumed."""

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.train import retention
from sft_dist.train.checkpoint import MANIFEST, step_folders

SIZES = st.dictionaries(st.integers(1, 60), st.integers(1, 100), min_size=1, max_size=12)


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[int, int], int, int, int | None, set[int]]:
    sizes = draw(SIZES)
    published = draw(st.sampled_from(sorted(sizes)))
    protected = draw(st.sets(st.integers(1, 60), max_size=3))
    return sizes, published, draw(st.integers(1, 6)), draw(st.none() | st.integers(1, 400)), protected


@given(cases())
def test_what_stays(case: tuple[dict[int, int], int, int, int | None, set[int]]) -> None:
    sizes, published, keep, keep_bytes, protected = case
    stays = retention.retained(sizes, published=published, keep=keep, keep_bytes=keep_bytes, protected=protected)
    must = {published} | (protected & sizes.keys())
    assert must <= stays <= sizes.keys()
    assert all(step <= published for step in stays - must), "what lies beyond is of a continuation given up"
    by_choice = stays - must
    newest = sorted((step for step in sizes if step <= published), reverse=True)[:keep]
    assert by_choice <= set(newest)
    total = sum(sizes[step] for step in stays)
    if keep_bytes is None:
        assert stays == must | set(newest)
    else:
        assert total <= keep_bytes or not by_choice
        left = [step for step in newest if step not in stays]
        if left:
            assert total + sizes[left[0]] > keep_bytes, "the next one would not have fitted"
            assert all(step > left[0] for step in by_choice), "newer ones stay before older ones"


@given(cases())
def test_keeping_twice_is_keeping_once(case: tuple[dict[int, int], int, int, int | None, set[int]]) -> None:
    sizes, published, keep, keep_bytes, protected = case

    def retained(of: dict[int, int]) -> set[int]:
        return retention.retained(of, published=published, keep=keep, keep_bytes=keep_bytes, protected=protected)

    once = retained(sizes)
    assert retained({step: sizes[step] for step in once}) == once


@given(cases(), st.integers(1, 200))
def test_more_room_removes_nothing_more(case: tuple[dict[int, int], int, int, int | None, set[int]], more: int) -> None:
    sizes, published, keep, keep_bytes, protected = case
    before = retention.retained(sizes, published=published, keep=keep, keep_bytes=keep_bytes, protected=protected)
    larger = None if keep_bytes is None else keep_bytes + more
    assert before <= retention.retained(
        sizes, published=published, keep=keep + 1, keep_bytes=larger, protected=protected
    )


def make(run_dir: Path, step: int, num_bytes: int) -> Path:
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    (folder / "shards").mkdir(parents=True)
    (folder / MANIFEST).write_text("{}")
    (folder / "shards" / "a").write_bytes(bytes(num_bytes - 2))
    return folder


def test_bytes_are_those_on_the_disk(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        make(tmp_path, step, 1_000)
    retention.evict(tmp_path, published=4, keep=10, keep_bytes=3_000)
    assert list(step_folders(tmp_path)) == [2, 3, 4]
    retention.evict(tmp_path, published=4, keep=10, keep_bytes=2_999)
    assert list(step_folders(tmp_path)) == [3, 4]
    retention.evict(tmp_path, published=4, keep=10, keep_bytes=1)
    assert list(step_folders(tmp_path)) == [4]


def test_what_cannot_be_removed_is_told_and_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path, 1, 100)
    make(tmp_path, 2, 100)
    make(tmp_path, 3, 100)
    unlink, held = os.unlink, (folder / "shards" / "a").stat().st_ino

    def busy(path: Any, *, dir_fd: int | None = None) -> None:
        """As a file that another client of a network file system has open; root may remove all others."""
        if os.stat(path, dir_fd=dir_fd).st_ino == held:
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", busy)
    first, second = retention.evict(tmp_path, published=3, keep=1)
    assert first.step == 1 and first.problem is not None and "busy" in first.problem
    assert second == retention.Removal(2, None)
    assert not (folder / MANIFEST).exists(), "what is half removed is no checkpoint any more"


def test_a_link_in_the_place_of_a_checkpoint_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    inside = make(tmp_path, 1, 100)
    (inside / "link").symlink_to(precious)
    (tmp_path / "checkpoints" / "step-00000002").symlink_to(precious)
    make(tmp_path, 3, 100)
    retention.evict(tmp_path, published=3, keep=1)
    assert list(step_folders(tmp_path)) == [3]
    assert (precious / "file").read_text() == "x" and stat.S_ISDIR(precious.lstat().st_mode)
