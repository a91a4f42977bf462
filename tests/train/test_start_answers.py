"""Every target of every forward has its own answer of the start's model, and files are found by all they follow from.

The model is a stub whose likeliest token is the target itself, so that any row in another place is seen.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from sft_dist.config import DataConfig, RunConfig
from sft_dist.data.plan import Plan
from sft_dist.data.sample import Sample, Span
from sft_dist.data.selection import Selection
from sft_dist.distributed.world import find_world
from sft_dist.model.batch import Batch
from sft_dist.model.fused_head import TopReference
from sft_dist.train import start_answers
from sft_dist.train.feeding import micro_batches
from tests.helpers.samples import select

FACTS = {
    "weights": "w",
    "initial": None,
    "dtype": "float32",
    "model": {"hidden_size": 4},
    "config": {"model.control_tokens": [], "model.allow_new_parameters": [], "adapter.quantise": "none", "seed": 1},
}
LENGTH = 24


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Echo:
    """Says the target and the place in its sample; the mass of the others is a quarter."""

    vocab_size = 300

    def __init__(self) -> None:
        self.num_asked = 0

    def train(self, is_training: bool) -> None:
        assert not is_training

    def top_logprobs(self, batch: Batch, k: int) -> TopReference:
        assert k == 2
        self.num_asked += batch.num_targets
        targets, places = (row[0, batch.target_rows] for row in (batch.targets, batch.position_ids))
        logprobs = torch.tensor([0.5, 0.25, 0.25]).log().repeat(batch.num_targets, 1)
        return TopReference(torch.stack([targets, places], 1).int(), logprobs)


def samples() -> list[Sample]:
    """Conversations of two answers, and texts that become windows."""
    rng = np.random.default_rng(3)
    found = []
    for number in range(19):
        length = int(rng.integers(8, 24)) if number % 3 else int(rng.integers(30, 90))
        ids = rng.integers(0, 300, length).astype(np.int32)
        if number % 3:
            cuts = [2, length // 2 - 1, length // 2 + 1, length]
            spans = tuple(
                Span(m, "assistant", cuts[2 * t] - 1, cuts[2 * t], cuts[2 * t + 1], cuts[2 * t + 1], True, turn=t + 1)
                for t, m in ((0, 1), (1, 3))
            )
        else:
            spans = (Span(0, "text", 0, 0, length, length, True),)
        found.append(Sample(f"c{number}", number, "made", ids, spans, num_turns=2))
    return found


def plan_of(selection: Selection, **changes: Any) -> Plan:
    chosen: dict[str, Any] = {"max_length": LENGTH, "global_packs": 3, "seed": 1, "epochs": 2} | changes
    return Plan(selection.lengths, selection.num_targets, mass=selection.mass, **chosen)


def config(folder: Path) -> RunConfig:
    tree = {"run_dir": str(folder / "run"), "model": {"path": "m"}, "anchor": {"kl": 1.0, "kl_top_k": 2}}
    tree["data"] = DataConfig(cache_dir=str(folder / "cache"), max_length=LENGTH)
    return RunConfig.model_validate(tree)


def keep(folder: Path, selection: Selection, plan: Plan, engine: Echo, facts: dict[str, Any]) -> Selection:
    world = find_world({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"})
    model: Any = engine
    return start_answers.kept(selection, plan, model, config(folder), facts, world, lambda line: None)


def test_every_target_has_its_own_answer_in_every_layout_and_epoch(tmp_path: Path, group: None) -> None:
    selection = select(tmp_path, samples(), max_length=LENGTH, overflow="truncate_turns")
    assert len(selection) > 19, "there are windows"
    plan, engine = plan_of(selection), Echo()
    kept = keep(tmp_path, selection, plan, engine, FACTS)
    assert engine.num_asked == selection.num_targets.sum()
    assert selection.top is None and kept.top is not None and kept.top.mean_tail_mass == pytest.approx(0.25)
    seen = empty = 0
    for size, per_forward in ((1, 1), (2, 2), (4, 1)):
        for rank in range(size):
            env = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
            for made in micro_batches(kept, plan, range(plan.num_steps), find_world(env), per_forward):
                batch = made.batch
                if not made.examples:
                    assert batch.top_ids is None
                    empty += 1
                    continue
                assert batch.top_ids is not None and batch.top_logprobs is not None
                assert torch.equal(batch.top_ids[:, 0].long(), batch.targets[0, batch.target_rows])
                assert torch.equal(batch.top_ids[:, 1].long(), batch.position_ids[0, batch.target_rows])
                assert batch.top_logprobs.shape == (batch.num_targets, 3)
                seen += batch.num_targets
    assert seen == 3 * plan.num_target_tokens * 2 and empty > 0


def test_only_what_is_drawn_is_asked_for(tmp_path: Path, group: None) -> None:
    selection = select(tmp_path, samples(), max_length=LENGTH, overflow="truncate_turns")
    plan, engine = plan_of(selection, max_steps=2), Echo()
    kept = keep(tmp_path, selection, plan, engine, FACTS)
    drawn = {index for step in range(2) for pack in plan.packs(step) for index in pack}
    assert engine.num_asked == selection.num_targets[sorted(drawn)].sum() < selection.num_targets.sum()
    for number in drawn:
        example = kept[number]
        assert example.top is not None
        assert np.array_equal(example.top.ids[:, 0], example.sample.ids[example.turns >= 0])


def test_files_are_used_again_exactly_where_all_they_follow_from_is_the_same(tmp_path: Path, group: None) -> None:
    def asked(
        facts: dict[str, Any] = FACTS, plan: Callable[[Selection], Plan] = plan_of, **policy: Any
    ) -> tuple[int, Any]:
        chosen = {"max_length": LENGTH, "overflow": "truncate_turns"} | policy
        selection, engine = select(tmp_path, samples(), **chosen), Echo()
        found = keep(tmp_path, selection, plan(selection), engine, facts)
        assert found.top is not None
        return engine.num_asked, found.top.folder

    def changed(**facts: Any) -> dict[str, Any]:
        return FACTS | facts

    num, folder = asked()
    assert num > 0 and asked() == (0, folder)
    # Neither the order of samples nor their weights; nor a seed that draws no weights.
    assert asked(plan=lambda selection: plan_of(selection, seed=2, global_packs=5, epochs=1)) == (0, folder)
    assert asked(changed(config=FACTS["config"] | {"seed": 2}), normalise="turn") == (0, folder)
    others = [
        asked(changed(weights="v")),
        asked(changed(initial="i")),
        asked(changed(dtype="bfloat16")),
        asked(changed(model={"hidden_size": 8})),
        asked(changed(config=FACTS["config"] | {"model.control_tokens": ["<a>"]})),
        asked(changed(config=FACTS["config"] | {"adapter.quantise": "nf4"})),
        asked(changed(config=FACTS["config"] | {"model.allow_new_parameters": ["*"]})),
        asked(changed(config=FACTS["config"] | {"model.allow_new_parameters": ["*"], "seed": 2})),
        asked(plan=lambda selection: plan_of(selection, max_steps=2)),
        asked(train_on="all"),
        asked(train_on="last_assistant"),
        asked(max_length=LENGTH - 1, plan=lambda selection: plan_of(selection, max_length=LENGTH - 1)),
    ]
    assert all(num > 0 for num, _ in others)
    assert len({folder, *(other for _, other in others)}) == len(others) + 1
