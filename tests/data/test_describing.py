"""What people are told of a data set is what a run takes; held-out sources have no repeats and weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft_dist.config import RunConfig
from sft_dist.data import store
from sft_dist.data.sample import Sample, Span
from sft_dist.data.selection import Selection
from sft_dist.data.store import PreparedDataset, Refused
from sft_dist.errors import ConfigError
from sft_dist.preparation import describe, heldout_set, policy, write_left_out
from tests.helpers.samples import prepared


def sample(index: int, source: str, length: int, content: str = "", **facts: Any) -> Sample:
    span = Span(0, "assistant", 0, 1, length, length, is_owned=True, turn=1, **facts)
    content = content or str(index)
    ids = np.arange(length, dtype=np.int32)
    return Sample(f"c{index}", index, source, ids, (span,), num_turns=1, digest=content.encode().ljust(16))


def dataset(folder: Path, samples: list[Sample]) -> PreparedDataset:
    return prepared(folder, samples)


def run_config(sources: list[dict[str, Any]], **data: Any) -> RunConfig:
    train = [{"path": "x.jsonl"} | source for source in sources]
    return RunConfig.model_validate({"run_dir": "r", "model": {"path": "m"}, "data": {"train": train} | data})


SAMPLES = [
    sample(0, "twice", 10),
    sample(1, "twice", 10, train=False),
    sample(2, "twice", 40),
    sample(3, "never", 10),
    sample(4, "once", 10, content="0"),
    sample(5, "once", 20),
]
SOURCES = [{"name": "twice", "repeat": 2}, {"name": "never", "repeat": 0}, {"name": "once"}]


def test_described_is_what_an_epoch_holds(tmp_path: Path) -> None:
    config = run_config(SOURCES, max_length=20, deduplicate=True)
    text = describe(Selection(dataset(tmp_path, SAMPLES), policy(config, config.data.train)), config)
    # Of 10 tokens twice, of 20 once.
    assert "2 of 20 tokens, fill 100.0%: an epoch of 3 samples, 40 tokens" in text
    # 10 + 20 tokens take part, the first of each is no target; all of 100 are prepared.
    assert "tokens         30, of which 28 targets (93.3%); 100 are prepared" in text
    for part in (
        "1 too long (40 tokens, 39",
        "1 no target (10 tokens, 0",
        "1 duplicate (10",
        "1 repeat 0 (10 tokens, 9",
    ):
        assert part in text
    assert "c1: no target" in text and "c3" not in text


def test_described_is_a_data_set_without_any_target(tmp_path: Path) -> None:
    config = run_config(SOURCES)
    text = describe(Selection(dataset(tmp_path, [SAMPLES[1], SAMPLES[3]]), policy(config, config.data.train)), config)
    assert "packs          none" in text and "tokens         0, of which 0 targets (0.0%); 20 are prepared" in text


def test_nothing_is_said_beside_where_all_takes_part(tmp_path: Path) -> None:
    config = run_config([{"name": "once"}])
    text = describe(Selection(dataset(tmp_path, [SAMPLES[5]]), policy(config, config.data.train)), config)
    assert "tokens         20, of which 19 targets (95.0%)\n" in text


def test_every_reason_has_a_line_with_a_detail_of_its_own(tmp_path: Path) -> None:
    cut = sample(6, "once", 30)
    cut = replace(cut, spans=(replace(cut.spans[0], output_end=9, end=9),))
    config = run_config(SOURCES, max_length=20, deduplicate=True, overflow="truncate_turns")
    selection = Selection(dataset(tmp_path, [*SAMPLES, cut]), policy(config, config.data.train))
    write_left_out({"train": selection}, tmp_path / "left_out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "left_out.jsonl").read_text().splitlines()]
    details = {line["id"]: (line["reason"], line["detail"]) for line in lines}
    assert {key: reason for key, (reason, _) in details.items()} == {
        "c1": "no target", "c2": "too long", "c4": "duplicate", "c6": "end cut off",
    }  # fmt: skip
    assert {key for key, (_, detail) in details.items() if "max_length" in detail} == {"c2", "c6"}
    assert "train_on" in details["c1"][1] and "deduplicate" in details["c4"][1]
    assert "9 of 30 tokens" in details["c6"][1]


def test_only_the_refused_records_that_are_shown_are_read(tmp_path: Path) -> None:
    config = run_config([{}])
    found = dataset(tmp_path, SAMPLES[:1])
    found.manifest["num_refused"] = {"no text": 12}
    path = tmp_path / store.REFUSED
    store.write_refused(path, [Refused(f"file:{line}", "", "no text", "null") for line in range(10)])
    path.write_text(path.read_text() + "never read\n")
    assert "file:9: null" in describe(Selection(found, policy(config, config.data.train)), config)


@pytest.mark.parametrize("setting", [{"repeat": 0.5}, {"repeat": 0}, {"weight": 2.0}])
def test_held_out_sources_have_no_repeat_and_no_weight(setting: dict[str, float]) -> None:
    config = run_config([{}], heldout=[{"path": "y.jsonl"}, {"path": "z.jsonl"} | setting])
    with pytest.raises(ConfigError, match=r"heldout: z: .*counts once"):
        heldout_set(config)
