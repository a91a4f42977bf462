"""The growing output: whatever is cut off, the same command goes on to the same bytes, and no other command does."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_dist.data.conversation import ROLES
from sft_dist.errors import ClusterError, ConfigError, StorageError, UsageError
from sft_dist.score.conversations import check_roles
from sft_dist.score.output import GrowingOutput, check_writable
from sft_dist.score.summary import Tally, nll_lines

SETTINGS = {"data": "d", "tokens": False}


def line(number: int) -> dict[str, Any]:
    return {"id": f"é{number}", "index": number, "source": "s", "logprob": -number / 3, "turns": []}


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
        growing.close()
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
    growing.close()
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
    growing.close()
    before = (tmp_path / "o.partial-1").read_bytes()
    with pytest.raises(ConfigError, match="tokens: False there, True now"):
        GrowingOutput(tmp_path / "o", SETTINGS | {"tokens": True}, 1)
    assert (tmp_path / "o.partial-1").read_bytes() == before


def test_two_processes_cannot_write_one_output(tmp_path: Path) -> None:
    growing = GrowingOutput(tmp_path / "o", SETTINGS, 1)
    with pytest.raises(ClusterError, match="another process"):
        GrowingOutput(tmp_path / "o", SETTINGS, 1)
    growing.close()
    GrowingOutput(tmp_path / "o", SETTINGS, 1).close()


def test_lines_that_the_journal_promises_and_the_disk_lacks_are_an_error(tmp_path: Path) -> None:
    growing = GrowingOutput(tmp_path / "o", SETTINGS, 1)
    growing.append(0, [line(0)], Tally(), num_done=1)
    growing.close()
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
    growing.close()
    assert json.loads(output.read_text()) == line(0)


KILLED_BEFORE = ["rename", "unlink 1", "unlink 2"]


def finished(output: Path, num_models: int) -> GrowingOutput:
    growing = GrowingOutput(output, SETTINGS, num_models)
    for number in range(num_models):
        growing.append(number, [line(0)], Tally({"lines": 1}), num_done=1)
        growing.finish(number)
    return growing


def publish_until_killed(growing: GrowingOutput, killed_before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kill comes before the last rename (the journal's is the one before), or before some file is removed."""
    names = [str(number) for number in range(len(growing.parts))]
    kind, _, number = killed_before.partition(" ")
    real = os.replace if kind == "rename" else Path.unlink
    num_calls = 0

    def until_killed(*args: Any, **options: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == int(number or 2):
            raise KeyboardInterrupt
        return real(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if kind == "rename":
            patch.setattr(os, "replace", until_killed)
        else:
            patch.setattr(Path, "unlink", until_killed)
        growing.publish(names)
    growing.close()


@pytest.mark.parametrize("num_models", [1, 2])
@pytest.mark.parametrize("killed_before", KILLED_BEFORE)
def test_after_a_kill_while_publishing_nothing_is_scored_again(
    tmp_path: Path, num_models: int, killed_before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "o"
    publish_until_killed(finished(output, num_models), killed_before, monkeypatch)
    assert output.exists() == (killed_before != "rename")
    published = output.read_bytes() if output.exists() else None
    again = GrowingOutput(output, SETTINGS, num_models)
    assert again.is_published == (published is not None)
    assert all(part.is_whole and part.tally.counts == {"lines": 1} for part in again.parts)
    again.publish([str(number) for number in range(num_models)])
    again.close()
    assert len(output.read_text().splitlines()) == 1
    assert published in (None, output.read_bytes())
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


@pytest.mark.parametrize("change", ["settings", "output"])
def test_an_output_in_place_is_taken_for_done_only_by_the_same_command_and_unchanged(
    tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "o"
    publish_until_killed(finished(output, 1), "unlink 2", monkeypatch)
    if change == "output":
        output.write_text("edited")
    again = GrowingOutput(output, SETTINGS | {"tokens": change == "settings"}, 1)
    assert not again.is_published and not again.parts[0].num_done
    again.close()


def test_neither_a_file_of_the_user_nor_a_run_that_holds_the_lock_is_touched(tmp_path: Path) -> None:
    (tmp_path / "o.tmp").write_text("mine")
    running = finished(tmp_path / "o", 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "o.partial-1").rename(tmp_path / "aside")  # as in the moment after its rename
    check_writable(tmp_path / "o")
    with pytest.raises(ClusterError, match="another process"):
        GrowingOutput(tmp_path / "o", SETTINGS, 2)
    (tmp_path / "aside").rename(tmp_path / "o.partial-1")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    running.publish(["a", "b"])
    running.close()
    assert {path.name for path in tmp_path.iterdir()} == {"o", "o.tmp"}
    assert (tmp_path / "o.tmp").read_text() == "mine"


@pytest.mark.parametrize("num_models", [1, 2])
def test_a_name_that_is_no_unicode_is_written_as_its_escape(tmp_path: Path, num_models: int) -> None:
    growing = GrowingOutput(tmp_path / "o", SETTINGS, num_models)
    for number in range(num_models):
        growing.append(number, [line(0) | {"source": "caf\udce9"}], Tally(), num_done=1)
    growing.publish([str(number) for number in range(num_models)])
    growing.close()
    assert json.loads((tmp_path / "o").read_bytes())["source"] == "caf\udce9"


PART = {"num_done": 1, "num_bytes": 2, "is_whole": False, "tally": {"counts": {}, "nll": {}, "tokens": {}}}


@pytest.mark.parametrize(
    "change",
    [
        {"settings": None},
        {"settings": [1]},
        {"published_bytes": "x"},
        {"parts": None},
        {"parts": []},
        {"parts": [PART, PART]},
        {"parts": [5]},
        {"parts": [PART | {"num_done": "x"}]},
        {"parts": [PART | {"num_done": -1}]},
        {"parts": [PART | {"num_bytes": None}]},
        {"parts": [PART | {"is_whole": 1}]},
        {"parts": [PART | {"tally": None}]},
        {"parts": [PART | {"tally": {"counts": {"lines": "x"}}}]},
        {"parts": [PART | {"tally": {"counts": 5}}]},
        {"parts": [PART | {"tally": {"nll": {"user 1": None}, "tokens": {"user 1": 1}}}]},
        {"parts": [PART | {"tally": {"tokens": {"user 1": 1}}}]},
    ],
)
def test_a_journal_of_another_shape_is_refused_by_name_and_nothing_is_touched(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    output = tmp_path / "o"
    growing = GrowingOutput(output, SETTINGS, 1)
    growing.append(0, [line(0)], Tally({"lines": 1}), num_done=1)
    growing.close()
    journal, partial = tmp_path / "o.journal", tmp_path / "o.partial-1"
    before = partial.read_bytes()
    journal.write_text(json.dumps(json.loads(journal.read_text()) | change))
    with pytest.raises(StorageError, match=r"o\.journal: not readable \(.*\); remove it to start anew"):
        GrowingOutput(output, SETTINGS, 1)
    assert partial.read_bytes() == before


def test_the_summary_of_nothing_shows_no_number() -> None:
    nothing = Tally({"conversations": 3})
    for names in (["a"], ["a", "b"]):
        assert list(nll_lines(names, [nothing] * len(names))) == ["scored 3 conversations, 0 tokens: NLL - per token"]
    two = Tally({"conversations": 1}, {"user 1": 3.0}, {"user 1": 2})
    assert next(nll_lines(["a"], [two])).endswith("2 tokens: NLL 1.5000 per token")


@pytest.mark.parametrize("roles", [[""], ["bot"], ["user", ""]])
def test_a_role_that_no_message_has_is_a_usage_error(roles: list[str]) -> None:
    with pytest.raises(UsageError, match="is no role; expected some of system, "):
        check_roles(roles, ROLES)
