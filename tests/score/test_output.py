"""The growing output: whatever is cut off, the same command goes on to the same bytes, and no other command does."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_dist.errors import ClusterError, ConfigError, StorageError
from sft_dist.score.output import GrowingOutput, check_writable
from sft_dist.score.summary import Tally

SETTINGS = {"data": "d", "tokens": False}


def line(number: int) -> dict[str, Any]:
    return {"id": f"é{number}", "index": number, "source": "s", "logprob": -number / 3, "turns": []}


def release(growing: GrowingOutput) -> None:
    for file in growing._files:
        file.close()


@settings(max_examples=60, deadline=None)
@given(
    kills=st.lists(st.tuples(st.integers(0, 3), st.binary(max_size=30), st.booleans()), max_size=6),
    num_models=st.integers(1, 2),
)
def test_any_kill_costs_nothing_but_the_block_at_hand(
    tmp_path_factory: pytest.TempPathFactory, kills: list[tuple[int, bytes, bool]], num_models: int
) -> None:
    """A kill comes after some blocks, with any bytes of the next one written, perhaps between journal and rename."""
    output = tmp_path_factory.mktemp("growing") / "out.jsonl"
    written = 0

    def step(growing: GrowingOutput) -> bool:
        nonlocal written
        for number, part in enumerate(growing.parts):
            if part.num_done < 8:
                lines = [line(i) for i in range(part.num_done, part.num_done + 2)]
                growing.append(number, lines, Tally({"lines": 2}), num_done=part.num_done + 2)
                written += 2
                return True
            if not part.is_whole:
                growing.finish(number)
        return False

    for num_blocks, torn, has_temporary in kills:
        growing = GrowingOutput(output, SETTINGS, num_models)
        for _ in range(num_blocks):
            step(growing)
        release(growing)
        unfinished = next((n for n, part in enumerate(growing.parts) if part.num_done < 8), 0)
        with open(f"{output}.partial-{unfinished + 1}", "ab") as file:
            file.write(torn)
        if has_temporary:
            Path(f"{output}.journal.tmp").write_bytes(torn)
        assert not output.exists()
    growing = GrowingOutput(output, SETTINGS, num_models)
    while step(growing):
        pass
    assert written == 8 * num_models, "nothing is scored twice"
    assert [part.tally.counts for part in growing.parts] == [{"lines": 8}] * num_models
    growing.publish(["a", "b"][:num_models])
    release(growing)
    found = [json.loads(text) for text in output.read_text().splitlines()]
    if num_models == 1:
        assert found == [line(i) for i in range(8)]
    else:
        for i, merged in enumerate(found):
            score = {"logprob": -i / 3, "turns": []}
            assert merged == {"id": f"é{i}", "index": i, "source": "s", "models": {"a": score, "b": score}}
    left = {path.name for path in output.parent.iterdir()} - {"out.jsonl.journal.tmp"}
    assert left == {"out.jsonl"}


def test_another_command_is_told_what_differs(tmp_path: Path) -> None:
    growing = GrowingOutput(tmp_path / "o", SETTINGS, 1)
    growing.append(0, [line(0)], Tally(), num_done=1)
    release(growing)
    before = (tmp_path / "o.partial-1").read_bytes()
    with pytest.raises(ConfigError, match="tokens: False there, True now"):
        GrowingOutput(tmp_path / "o", SETTINGS | {"tokens": True}, 1)
    assert (tmp_path / "o.partial-1").read_bytes() == before


def test_two_processes_cannot_write_one_output(tmp_path: Path) -> None:
    growing = GrowingOutput(tmp_path / "o", SETTINGS, 1)
    with pytest.raises(ClusterError, match="another process"):
        GrowingOutput(tmp_path / "o", SETTINGS, 1)
    release(growing)
    release(GrowingOutput(tmp_path / "o", SETTINGS, 1))


def test_lines_that_the_journal_promises_and_the_disk_lacks_are_an_error(tmp_path: Path) -> None:
    growing = GrowingOutput(tmp_path / "o", SETTINGS, 1)
    growing.append(0, [line(0)], Tally(), num_done=1)
    release(growing)
    os.truncate(tmp_path / "o.partial-1", 3)
    with pytest.raises(StorageError, match="shorter"):
        GrowingOutput(tmp_path / "o", SETTINGS, 1)
    (tmp_path / "o.journal").write_text("{")
    with pytest.raises(StorageError, match="not readable"):
        GrowingOutput(tmp_path / "o", SETTINGS, 1)


def test_a_finished_output_stays_until_the_next_one_is_whole(tmp_path: Path) -> None:
    output = tmp_path / "o"
    output.write_text("old")
    check_writable(output)
    growing = GrowingOutput(output, SETTINGS, 1)
    growing.append(0, [line(0)], Tally(), num_done=1)
    assert output.read_text() == "old"
    growing.publish(["a"])
    release(growing)
    assert json.loads(output.read_text()) == line(0)


@pytest.mark.parametrize("num_models", [1, 2])
def test_a_kill_while_publishing_leaves_a_whole_output_and_a_command_that_works(
    tmp_path: Path, num_models: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kill comes right after the rename."""
    output = tmp_path / "o"
    names = ["a", "b"][:num_models]
    growing = GrowingOutput(output, SETTINGS, num_models)
    for number in range(num_models):
        growing.append(number, [line(0)], Tally(), num_done=1)
        growing.finish(number)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        growing.publish(names)
    release(growing)
    published = output.read_bytes()
    again = GrowingOutput(output, SETTINGS, num_models)
    for number, part in enumerate(again.parts):
        if not part.is_whole:
            again.append(number, [line(0)], Tally(), num_done=1)
    again.publish(names)
    release(again)
    assert output.read_bytes() == published
    assert [path.name for path in tmp_path.iterdir()] == ["o"]
