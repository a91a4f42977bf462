"""Lines of both kinds of data, on one rank without DeepSpeed, against plain transformers in float64."""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_dist.config import DataConfig, SourceConfig
from sft_dist.data import store
from sft_dist.data.renderer import Renderer
from sft_dist.data.sample import Sample, Span
from sft_dist.data.store import PreparedDataset
from sft_dist.distributed.world import World
from sft_dist.errors import DataError
from sft_dist.score import questions
from sft_dist.score.candidates import Candidates
from sft_dist.score.conversations import Conversations
from sft_dist.score.forwards import Layout
from sft_dist.score.questions import is_candidates
from sft_dist.score.summary import Tally
from sft_dist.score.tokens import TokenTexts
from tests.helpers import oracle
from tests.helpers.conversations import write_jsonl
from tests.helpers.models import CHATML, build_model, build_tokenizer
from tests.helpers.plain_engine import PlainEngine, world_of_one
from tests.helpers.samples import with_manifest

MAX_LENGTH = 120
ROLES = ("user", "assistant")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("jobs") / "model", "llama")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with world_of_one() as world:
        yield world


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(build_tokenizer(), CHATML)


def all_lines(job: Any, engine: PlainEngine, world: World, block_items: int = 7) -> tuple[list[dict[str, Any]], Tally]:
    lines, tally = [], Tally()
    for block in job.blocks(0, block_items):
        more, sums = job.score(engine, Layout(world, MAX_LENGTH, 2), block, lambda share: None)
        lines += more
        tally += sums
    return lines, tally


def alone(folder: Path, ids: np.ndarray) -> np.ndarray:
    """float64 [T]: log Pr of every token of one sequence from plain transformers; NaN for the first."""
    model, _ = oracle.load(folder)
    row = torch.from_numpy(ids.astype(np.int64))
    with torch.no_grad():
        rows = model(input_ids=row[None], use_cache=False).logits[0, :-1].log_softmax(-1)
    return np.concatenate([[np.nan], rows.gather(-1, row[1:, None])[:, 0].numpy()])


def written(folder: Path, shards: Sequence[Sequence[Sample]]) -> PreparedDataset:
    folder.mkdir(parents=True)
    described = [store.write_shard(folder / f"{n}.arrow", shard) for n, shard in enumerate(shards)]
    return with_manifest(folder, described, num_refused={"unknown role": 2})


def random_samples(num_conversations: int, seed: int) -> list[Sample]:
    """One to three samples a conversation; the second repeats the messages of the first in other words, unowned."""
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(num_conversations):
        message, turn = 0, 0
        for part in range(int(rng.integers(1, 4))):
            spans, at = [], 0
            history = [(n, "assistant" if n % 2 else "user", False) for n in range(message)]
            own = [(message, "user", True), (message + 1, "assistant", True)]
            for number, role, is_owned in history + own:
                header, output, rest = (int(n) for n in rng.integers(1, 7, 3))
                is_answer = role == "assistant"
                spans.append(
                    Span(
                        number,
                        role,
                        at,
                        at + header,
                        at + header + output,
                        at + header + output + rest,
                        is_owned=is_owned,
                        turn=number // 2 + 1 if is_answer else 0,
                    )
                )
                at += header + output + rest
            if rng.random() < 0.1 and part:
                at += MAX_LENGTH
            message, turn = message + 2, turn + 1
            ids = rng.integers(3, 300, at).astype(np.int32)
            samples.append(Sample(f"c{index % 5}", index, "s", ids, tuple(spans), num_turns=turn))
    return samples


def test_samples_of_one_conversation_become_one_line_with_every_owned_message(
    folder: Path, world: World, renderer: Renderer, tmp_path: Path
) -> None:
    samples = random_samples(30, seed=1)
    dataset = written(tmp_path / "set", [samples[:11], samples[11:12], samples[12:]])
    job = Conversations(dataset, roles=ROLES, max_length=MAX_LENGTH, texts=TokenTexts(renderer))
    lines, tally = all_lines(job, PlainEngine(folder), world)
    assert [line["index"] for line in lines] == list(range(30))
    assert [line["id"] for line in lines] == [f"c{index % 5}" for index in range(30)], "equal ids are kept apart"
    num_long = 0
    nll = 0.0
    for line in lines:
        mine = [sample for sample in samples if sample.index == line["index"]]
        expected = []
        for sample in mine:
            if len(sample.ids) > MAX_LENGTH:
                continue
            values = alone(folder, sample.ids)
            for span in sample.spans:
                if span.is_owned:
                    expected.append((span, sample.ids, values[span.output_start : span.output_end]))
        assert [entry["message"] for entry in line["turns"]] == [span.message + 1 for span, _, _ in expected]
        for entry, (span, ids, values) in zip(line["turns"], expected, strict=True):
            assert entry["role"] == span.role and entry["turn"] == span.message // 2 + 1
            assert entry["num_tokens"] == len(values)
            assert entry["logprob"] == pytest.approx(values.sum(), abs=1e-4)
            assert entry["first_logprob"] == pytest.approx(values[0], abs=1e-4)
            assert ("stop_logprob" in entry) == (span.role == "assistant")
            if span.role == "assistant":
                assert entry["stop_logprob"] == pytest.approx(values[-1], abs=1e-4)
            assert entry["tokens"]["ids"] == ids[span.output_start : span.output_end].tolist()
            assert entry["tokens"]["logprobs"] == pytest.approx(values.tolist(), abs=1e-4)
            nll -= entry["logprob"]
        too_long = any(len(sample.ids) > MAX_LENGTH for sample in mine)
        assert ("left_out" in line) == too_long == ("logprob" not in line)
        num_long += too_long
        if not too_long:
            assert line["logprob"] == pytest.approx(sum(values.sum() for _, _, values in expected), abs=1e-3)
    assert 0 < num_long < 30
    assert job.left_out(tally) == {"unknown role": 2, "too long": num_long}
    assert sum(tally.nll.values()) == pytest.approx(nll)
    assert f"scored {30 - num_long} conversations" in "\n".join(job.summary(["m"], [tally]))


def test_the_size_of_blocks_changes_no_score_and_no_order(folder: Path, world: World, tmp_path: Path) -> None:
    dataset = written(tmp_path / "set", [random_samples(12, seed=2)])
    job = Conversations(dataset, roles=ROLES, max_length=MAX_LENGTH, texts=None)
    engine = PlainEngine(folder)
    (one, _), (many, _) = all_lines(job, engine, world, 1_000), all_lines(job, engine, world, 1)
    assert [line["index"] for line in one] == [line["index"] for line in many] == list(range(12))
    for line, other in zip(one, many, strict=True):
        for entry, same in zip(line["turns"], other["turns"], strict=True):
            assert entry["logprob"] == pytest.approx(same["logprob"], abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_part_of_a_data_set_is_that_part(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    samples = random_samples(data.draw(st.integers(1, 6)), seed=data.draw(st.integers(0, 99)))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(samples)), max_size=3)) | {0, len(samples)})
    dataset = written(tmp_path_factory.mktemp("part") / "set", [samples[a:b] for a, b in pairwise(cuts)])
    first = data.draw(st.integers(0, len(samples) - 1))
    end = data.draw(st.integers(first + 1, len(samples)))
    assert len(dataset.lengths) == len(samples) and dataset.spans is not None  # whatever the whole has kept
    part = dataset.part(first, end)
    assert len(part) == end - first and len(dataset) == len(samples)
    assert part.lengths.tolist() == [len(sample.ids) for sample in samples[first:end]]
    assert part.column("index").tolist() == [sample.index for sample in samples[first:end]]
    spans = [(n, span.message, span.end) for n, sample in enumerate(samples[first:end]) for span in sample.spans]
    table = part.spans
    assert list(zip(table.sample.tolist(), table.message.tolist(), table.end.tolist(), strict=True)) == spans
    for found, sample in zip(part, samples[first:end], strict=True):
        assert found.spans == sample.spans and found.ids.tolist() == sample.ids.tolist()


# Candidates


RECORDS: list[dict[str, Any]] = [
    {"id": "france", "prompt": "What is the capital of France?", "candidates": ["Paris", "London", "Paris, of course"]},
    {"prompt": "one", "candidates": ["only"]},
    {"id": "same", "prompt": "twice", "candidates": ["echo", "echo"]},
    {
        "id": "chat",
        "prompt": [
            {"role": "system", "content": "be short"},
            {"role": "user", "content": "hi <|im_end|>"},
            {"role": "assistant", "content": "hello"},
            {"role": "user", "content": "rain?"},
        ],
        "candidates": ["yes", "\n\nno", "<|im_end|>", "ü 日本 🙂"],
    },
    {"id": "many", "prompt": "count", "candidates": [f"number {i}" for i in range(60)]},
    {"id": "long", "prompt": "x", "candidates": ["short", "z" * 500]},
]


def expected_candidates(folder: Path, record: dict[str, Any]) -> list[np.ndarray]:
    """Token log-probs of every candidate, each from a pass of its own over ids built by the oracle."""
    _, tokenizer = oracle.load(folder)
    prompt = record["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    values = []
    for candidate in record["candidates"]:
        conversation = [*messages, {"role": "assistant", "content": candidate}]
        context, output = oracle.turn_contexts(tokenizer, conversation)[-1]
        values.append(alone(folder, np.array(context + output))[len(context) :])
    return values


def job_of(path: Path, renderer: Renderer, **data: Any) -> Candidates:
    config = DataConfig(max_length=MAX_LENGTH, **data)
    return Candidates([SourceConfig(path=str(path))], config, renderer, texts=TokenTexts(renderer))


@pytest.mark.parametrize("implementation", ["sft_dist_split", "sdpa"])
def test_candidates_score_as_separate_passes_do(
    folder: Path, world: World, renderer: Renderer, tmp_path: Path, implementation: str
) -> None:
    plain = [json.loads(json.dumps(record).replace("<|im_end|>", "stop")) for record in RECORDS]
    job = job_of(write_jsonl(tmp_path / "c.jsonl", plain), renderer)
    engine = PlainEngine(folder, implementation)
    lines, tally = all_lines(job, engine, world, block_items=5)
    assert [line["index"] for line in lines] == list(range(len(plain)))
    assert [line["id"] for line in lines] == [record.get("id", "c:2") for record in plain]
    for record, line in zip(plain, lines, strict=True):
        if record.get("id") == "long":
            assert "data.max_length is 120" in line["left_out"] and line["candidates"] == []
            continue
        expected = expected_candidates(folder, record)
        sums = np.array([values.sum() for values in expected])
        assert [entry["num_tokens"] for entry in line["candidates"]] == [len(values) for values in expected]
        for entry, values in zip(line["candidates"], expected, strict=True):
            assert entry["logprob"] == pytest.approx(values.sum(), abs=1e-4)
            assert entry["tokens"]["logprobs"] == pytest.approx(values.tolist(), abs=1e-4)
        posterior = torch.from_numpy(sums).softmax(0).tolist()
        assert [entry["posterior"] for entry in line["candidates"]] == pytest.approx(posterior, abs=1e-5)
        by_rank = sorted(line["candidates"], key=lambda entry: entry["rank"])
        assert [entry["rank"] for entry in by_rank] == list(range(1, len(expected) + 1))
        assert all(a["logprob"] >= b["logprob"] for a, b in pairwise(by_rank))
    separate = tally.counts["tokens of separate passes"]
    assert engine.tokens_seen == tally.counts["tokens computed"]
    assert engine.tokens_seen == separate if implementation == "sdpa" else engine.tokens_seen < 0.7 * separate
    assert job.left_out(tally) == {"too long": 1}
    assert tally.counts["prompts that differ"] == 0


def test_no_row_is_longer_than_max_length_and_the_prompt_is_once_in_each(
    folder: Path, world: World, renderer: Renderer, tmp_path: Path
) -> None:
    record = {"prompt": "count", "candidates": [f"number {i}" for i in range(300)]}
    job = job_of(write_jsonl(tmp_path / "c.jsonl", [record]), renderer)
    engine, rows = PlainEngine(folder), []
    compute = engine.logprobs
    engine.logprobs = lambda batch: rows.append(batch) or compute(batch)  # type: ignore[method-assign]
    (block,) = job.blocks(0, 10)
    (line,), _ = job.score(engine, Layout(world, MAX_LENGTH, 1), block, lambda share: None)
    assert len(line["candidates"]) == 300
    assert all(batch.input_ids.shape[1] <= MAX_LENGTH for batch in rows) and len(rows) > 10
    assert all(batch.parents is not None and batch.parents.count(-1) == 1 for batch in rows)
    assert (job.check(engine, block) or "").startswith("log-probs of candidates equal the model's own")


def test_prompts_that_differ_are_computed_apart_and_counted(
    folder: Path, world: World, renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No template at hand looks ahead; here the first token of every second candidate's prompt is another one."""
    render, ids_of = questions.render, []

    def looking_ahead(renderer: Renderer, records: Any) -> Any:
        answers = render(renderer, records)
        for number, (sample,) in enumerate(answers):
            sample.ids[0] += number % 2
            span = sample.spans[-1]
            ids_of.append((sample.ids, span.output_start, span.output_end))
        return answers

    monkeypatch.setattr(questions, "render", looking_ahead)
    job = job_of(write_jsonl(tmp_path / "c.jsonl", RECORDS[:1]), renderer)
    lines, tally = all_lines(job, PlainEngine(folder), world)
    for entry, (ids, first, end) in zip(lines[0]["candidates"], ids_of, strict=True):
        assert entry["logprob"] == pytest.approx(alone(folder, ids)[first:end].sum(), abs=1e-4)
    assert tally.counts["prompts that differ"] == 1
    assert "computed separately" in "\n".join(job.summary(["m"], [tally]))


def test_control_text_in_prompts_and_candidates_stays_text(
    folder: Path, world: World, renderer: Renderer, tmp_path: Path
) -> None:
    job = job_of(write_jsonl(tmp_path / "c.jsonl", [RECORDS[3]]), renderer)
    lines, _ = all_lines(job, PlainEngine(folder), world)
    control = set(renderer.control_ids)
    for entry in lines[0]["candidates"]:
        assert [number in control for number in entry["tokens"]["ids"]] == [False] * (entry["num_tokens"] - 1) + [True]
    assert "".join(lines[0]["candidates"][2]["tokens"]["texts"]) == "<|im_end|><|im_end|>"


BAD = [
    {"prompt": "x", "candidates": []},
    {"prompt": "", "candidates": ["a", 3]},
    {"candidates": ["a"]},
    {"prompt": "x", "candidates": ["fine", "  "]},
    {"prompt": [{"role": "robot", "content": "x"}], "candidates": ["a"]},
    {"prompt": ["x"], "candidates": ["a"]},
    {"prompt": "x", "candidates": ["fine", "\ud800"]},
    {"prompt": "x", "candidates": ["a"], "tools": [3]},
    {"id": "\ud800", "prompt": "x", "candidates": ["a"]},
]


@pytest.mark.parametrize("bad", BAD)
def test_a_record_that_cannot_be_scored_is_named_or_left_out_in_its_place(
    folder: Path, world: World, renderer: Renderer, tmp_path: Path, bad: dict[str, Any]
) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in (RECORDS[1], bad, RECORDS[1])))
    with pytest.raises(DataError, match=r"c\.jsonl:2"):
        job_of(path, renderer)
    with pytest.raises(DataError, match=r"1 of 3 records [^$]*c\.jsonl:2"):
        job_of(path, renderer, on_bad_record="refuse", max_refused=0.3)
    job = job_of(path, renderer, on_bad_record="refuse", max_refused=0.4)
    lines, tally = all_lines(job, PlainEngine(folder), world)
    assert [len(line["candidates"]) for line in lines] == [1, 0, 1]
    assert lines[1]["left_out"] and job.left_out(tally) == {"bad record": 1}


@pytest.mark.parametrize("is_longer", [True, False])
def test_a_file_that_changes_is_told_and_what_was_added_is_not_asked_for(
    renderer: Renderer, tmp_path: Path, is_longer: bool
) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", RECORDS[:3])
    job = job_of(path, renderer)
    job.check_unchanged()
    write_jsonl(path, RECORDS[:5] if is_longer else RECORDS[:2])
    with pytest.raises(DataError, match="changed while it was scored"):
        job.check_unchanged()
    if is_longer:
        assert [block.end for block in job.blocks(0, 1)] == [1, 2, 3]
    else:
        with pytest.raises(DataError, match="changed while it was scored"):
            list(job.blocks(0, 1))


def test_two_sources_of_one_name_are_an_error(renderer: Renderer, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    paths = [write_jsonl(folder / "c.jsonl", RECORDS[:1]) for folder in (tmp_path, tmp_path / "other")]
    with pytest.raises(DataError, match="its name 'c'"):
        Candidates([SourceConfig(path=str(p)) for p in paths], DataConfig(max_length=9), renderer, texts=None)


def test_a_block_with_nothing_that_fits_leaves_the_check_to_the_next(
    folder: Path, renderer: Renderer, world: World, tmp_path: Path
) -> None:
    job = job_of(write_jsonl(tmp_path / "c.jsonl", [RECORDS[5], RECORDS[1]]), renderer)
    first, second = job.blocks(0, 1)
    engine = PlainEngine(folder)
    assert job.check(engine, first) is None
    assert "equal the model's own" in (job.check(engine, second) or "")


def test_candidates_are_told_from_conversations_by_their_first_record(tmp_path: Path) -> None:
    yes = SourceConfig(path=str(write_jsonl(tmp_path / "yes.jsonl", RECORDS)))
    no = SourceConfig(path=str(write_jsonl(tmp_path / "no.jsonl", [{"prompt": "x", "completion": "y"}])))
    assert is_candidates([yes]) and not is_candidates([no])
    with pytest.raises(DataError, match="apart"):
        is_candidates([yes, no])


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_candidates_beside_a_completion_score_from_every_kind_of_file(
    folder: Path, renderer: Renderer, world: World, tmp_path: Path, suffix: str
) -> None:
    record = {"prompt": "Hi", "completion": "not asked", "candidates": ["a", "b c"], "text": "nor this"}
    path = tmp_path / f"c.{suffix}"
    match suffix:
        case "jsonl":
            write_jsonl(path, [record])
        case "parquet":
            pyarrow.parquet.write_table(pa.Table.from_pylist([record]), path)
        case "csv":
            with open(path, "w", newline="") as file:
                writer = csv.DictWriter(file, record)
                writer.writeheader()
                writer.writerow(record | {"candidates": json.dumps(record["candidates"])})
    assert is_candidates([SourceConfig(path=str(path))])
    (line,), _ = all_lines(job_of(path, renderer), PlainEngine(folder), world)
    (expected,), _ = all_lines(
        job_of(write_jsonl(tmp_path / "plain.jsonl", [{"prompt": "Hi", "candidates": ["a", "b c"]}]), renderer),
        PlainEngine(folder),
        world,
    )
    assert line["candidates"] == expected["candidates"] and len(line["candidates"]) == 2


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"system": "Be rude."}, "`system`: write it as the first message"),
        ({"system_prompt": "x"}, "`system_prompt`"),
        ({"chat_template": "x"}, "`chat_template`"),
        ({"images": ["x.png"]}, "`images`: only text"),
        ({"weight": -4}, "weight"),
        ({"tools": [5]}, "tool 1"),
        ({"functions": [5]}, "tool 1"),
        ({"id": "\ud800"}, "surrogate"),
    ],
)
def test_fields_beside_candidates_are_followed_or_refused_by_name(
    renderer: Renderer, tmp_path: Path, fields: dict[str, Any], told: str
) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps(RECORDS[1] | fields) + "\n")
    with pytest.raises(DataError, match=re.escape(told)):
        job_of(path, renderer)


def test_the_older_name_of_tools_is_followed_beside_candidates(tmp_path: Path) -> None:
    template = "{{ tools | tojson if tools else '' }}" + CHATML
    offered = {"name": "weather", "description": "Of today.", "parameters": {"type": "object", "properties": {}}}
    paths = [
        write_jsonl(tmp_path / f"{name}.jsonl", [RECORDS[1] | {name: [offered]}]) for name in ("tools", "functions")
    ]
    tools, functions = (
        questions.render_question(Renderer(build_tokenizer(), template), question)
        for path in paths
        for question in questions.read_questions([SourceConfig(path=str(path))])
    )
    assert isinstance(tools, questions.Rendered) and isinstance(functions, questions.Rendered)
    assert np.array_equal(tools.prompts[0], functions.prompts[0])
    (bare,) = questions.read_questions([SourceConfig(path=str(write_jsonl(tmp_path / "bare.jsonl", [RECORDS[1]])))])
    without = questions.render_question(Renderer(build_tokenizer(), template), bare)
    assert isinstance(without, questions.Rendered) and len(tools.prompts[0]) > len(without.prompts[0])


def test_an_unreadable_first_record_is_told_like_any_other(
    folder: Path, renderer: Renderer, world: World, tmp_path: Path
) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text("garbage\n" + json.dumps(RECORDS[1]) + "\n")
    assert is_candidates([SourceConfig(path=str(path))])
    with pytest.raises(DataError, match=r"c\.jsonl:1: not JSON"):
        job_of(path, renderer)
    job = job_of(path, renderer, on_bad_record="refuse", max_refused=0.5)
    lines, tally = all_lines(job, PlainEngine(folder), world)
    assert [len(line["candidates"]) for line in lines] == [0, len(RECORDS[1]["candidates"])]
    assert job.left_out(tally) == {"bad record": 1}
