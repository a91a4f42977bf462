"""Ranges of tensors from safetensors files, against the library that writes them."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from sft_dist.config import AnchorConfig
from sft_dist.errors import StorageError
from sft_dist.model.anchor import Part, Pretrained, file_readers, read_again, squares
from sft_dist.model.places import Place
from sft_dist.model.stored import StoredTensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a file beside it that no library reads: a pointer of git lfs."""
    found, names = tmp_path_factory.mktemp("stored"), {}
    for number, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        save_file(tensors(dtype), found / f"model-{number}.safetensors", metadata={"format": "pt"})
        names |= dict.fromkeys(tensors(dtype), f"model-{number}.safetensors")
    (found / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (found / "consolidated.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    return found


def tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    name = str(dtype).removeprefix("torch.")
    return {
        f"{name}.matrix": torch.randn(7, 5, generator=generator).to(dtype),
        f"{name}.vector": torch.randn(3, generator=generator).to(dtype),
        f"{name}.count": torch.tensor([1, 2]),
    }


@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    into=st.sampled_from([torch.float32, torch.bfloat16]),
    start=st.integers(0, 35),
    num=st.integers(0, 35),
)
def test_any_range_is_what_the_file_holds(
    folder: Path, dtype: torch.dtype, into: torch.dtype, start: int, num: int
) -> None:
    files = StoredTensors(folder)
    whole = tensors(dtype)
    (name,) = (name for name in whole if name.endswith("matrix"))
    expected = whole[name].reshape(-1)[start : start + num].to(into)
    found = torch.empty(len(expected), dtype=into)
    files.read(name, found, start=start)
    assert torch.equal(found, expected)
    files.close()


def test_only_numbers_with_a_fraction_are_there_and_broken_files_are_named(folder: Path, tmp_path: Path) -> None:
    files = StoredTensors(folder)
    assert files.shapes == {name: tuple(value.shape) for dtype in (torch.float32, torch.bfloat16, torch.float16)
                            for name, value in tensors(dtype).items() if not name.endswith("count")}  # fmt: skip
    files.close()
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(StorageError, match=r"model\.safetensors: not a readable safetensors file"):
        StoredTensors(tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(StorageError, match=r"model\.safetensors: not a readable safetensors file: a header of"):
        StoredTensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(StorageError, match=r"index\.json: not a readable index of weights"):
        StoredTensors(tmp_path)
    assert not StoredTensors(tmp_path / "absent").shapes


def test_a_file_that_ends_early_is_named_and_one_that_is_replaced_still_answers(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.arange(1_000.0)}, path)
    files = StoredTensors(tmp_path)
    save_file({"w": torch.zeros(1_000)}, tmp_path / "other")
    (tmp_path / "other").replace(path)
    found = torch.empty(10)
    files.read("w", found, start=500)
    assert torch.equal(found, torch.arange(500.0, 510.0))
    files.close()
    files = StoredTensors(tmp_path)
    with open(path, "r+b") as file:
        file.truncate(2_000)
    with pytest.raises(StorageError, match=r"model\.safetensors: ends within w"):
        files.read("w", found, start=900)
    files.close()


def test_what_the_files_hold_otherwise_is_kept_and_the_rest_is_read_again(tmp_path: Path) -> None:
    """By values, not by names: a file whose tensor is another one of the same shape is not believed."""
    right, wrong = torch.randn(400), torch.randn(20, 20)
    save_file({"right": right, "model.wrong": wrong + 1, "elsewhere": wrong}, tmp_path / "model.safetensors")
    files = StoredTensors(tmp_path)
    readers = file_readers(files, {"model.right": (400,), "wrong": (20, 20), "absent": (3,)}, "model")
    assert set(readers) == {"model.right", "wrong"}
    masters = {"model.right": right + 1, "wrong": wrong.reshape(-1) * 2, "absent": torch.ones(3)}
    starts = {"model.right": right, "wrong": wrong.reshape(-1), "absent": torch.ones(3)}
    parts = [Part(name, 100, start[100:300], masters[name][100:300]) for name, start in starts.items()]
    found = read_again(parts, readers, AnchorConfig())
    assert set(found.kept) == {"wrong", "absent"}
    place = Place(None, "other")
    moved, norm = squares(parts, found, dict.fromkeys(starts, place))[place]
    flat = wrong.reshape(-1)[100:300].double()
    # right + 1 is rounded in float32.
    assert moved == pytest.approx(float(200 + flat.square().sum()), rel=1e-6)
    assert norm == pytest.approx(float(right[100:300].double().square().sum() + flat.square().sum()), rel=1e-12)
    files.close()


def test_a_frozen_part_has_not_moved_and_is_not_read() -> None:
    part = Part("w", 0, torch.full((5,), 2.0), None)
    place = Place(3, "mlp")
    assert squares([part], Pretrained({}, {}), {"w": place}) == {place: (0.0, 20.0)}
