"""A run goes on with another number of ranks: the same state tensor by tensor, the same samples, the same losses.

Whole states are gathered by DeepSpeed in both worlds, so what they are compared with knows nothing of how they were
loaded. 5 packs a step: no number of ranks here divides them.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_dist.errors import ConfigError, StorageError
from sft_dist.model.resharding import Shards
from tests.helpers.conversations import make_records, write_jsonl
from tests.helpers.models import build_model
from tests.helpers.worlds import run_world

pytestmark = pytest.mark.slow

SAVED, LAST = 4, 14
# Several sub-groups that cut both parameter groups; norms stay whole on every rank.
SPLIT = {
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "sub_group_size": 2_000,
        "stage3_param_persistence_threshold": 100,
    },
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_force_ds_cpu_optimizer": False,
}
BF16 = {"dtype": "bfloat16"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": BF16,
    "16-bit": BF16 | {"deepspeed": "zero3_16bit"},
    "offload optimizer": BF16 | {"deepspeed": "zero3_offload_optimizer"},
    "offload all": BF16 | {"deepspeed": "zero3_offload_all"},
    "split": {"deepspeed": "split.json"},
    "split bfloat16": BF16 | {"deepspeed": "split.json"},
    "frozen": BF16 | {"freeze": ["*embed_tokens*", "*layers.1.*", "*norm.weight"]},
}
# Which layout reads the checkpoint of which other one, on another number of ranks.
CROSSED = {
    "2->1": {"float32": "split", "bfloat16": "offload all"},
    "2->3": {"split": "float32", "offload all": "split bfloat16"},
}
WAYS = ("2->1", "2->3", "1->2", "3->2")
# Layouts that go back to two ranks.
BACK = {"1->2": ("float32", "16-bit", "frozen"), "3->2": ("float32", "offload all", "split bfloat16", "frozen")}
READ = [(way, layout) for way in WAYS for layout in BACK.get(way, LAYOUTS)]


@dataclass(frozen=True)
class Chain:
    """Answers of resume_cases.train by (way, layout); of "2", which writes, and of "undisturbed" too."""

    folder: Path
    answers: dict[tuple[str, str], Any]

    def saved(self, ranks: int, layout: str) -> Path:
        return self.folder / f"saved-by-{ranks}-{layout.replace(' ', '-')}"


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    """2 ranks write; 1 and 3 read that and write; 2 read both. One world a number of ranks and turn: four starts."""
    folder = tmp_path_factory.mktemp("elastic")
    build_model(folder / "model", "llama")
    write_jsonl(folder / "data.jsonl", make_records(40, max_words=6))
    (folder / "split.json").write_text(json.dumps(SPLIT))
    result = Chain(folder, {})
    layouts = {
        name: change | ({"deepspeed": str(folder / "split.json")} if change.get("deepspeed") == "split.json" else {})
        for name, change in LAYOUTS.items()
    }
    common = {"case": "train", "model": str(folder / "model"), "data": str(folder / "data.jsonl")}

    def ask(ranks: int, cases: dict[tuple[str, str], dict[str, Any]], name: str) -> None:
        found = run_world(
            ranks, [common | case for case in cases.values()], folder / name, module="tests.helpers.resume_cases"
        )
        result.answers.update(zip(cases, found, strict=True))

    def reading(way: str, names: Iterable[str], *, and_save: bool) -> dict[tuple[str, str], dict[str, Any]]:
        ranks = int(way[-1])
        return {
            (way, name): layouts[name]
            | {
                "resume": str(result.saved(int(way[0]), name)),
                "steps": [SAVED, LAST if name == "float32" else SAVED + 1],
            }
            | ({"save_loaded": str(result.saved(ranks, name))} if and_save else {})
            for name in names
        }

    writing: dict[tuple[str, str], dict[str, Any]] = {
        ("2", name): layout | {"steps": [0, SAVED], "save": str(result.saved(2, name))}
        for name, layout in layouts.items()
    }
    undisturbed = {("undisturbed", "float32"): {"steps": [0, LAST]}}
    ask(2, writing | undisturbed, "2")
    for ranks, way in ((1, "2->1"), (3, "2->3")):
        crossed: dict[tuple[str, str], dict[str, Any]] = {
            (way, f"{source} as {target}"): layouts[target]
            | {"resume": str(result.saved(2, source)), "steps": [SAVED, SAVED]}
            for source, target in CROSSED[way].items()
        }
        ask(ranks, reading(way, LAYOUTS, and_save=True) | crossed, str(ranks))
    back = (reading(way, names, and_save=False) for way, names in BACK.items())
    ask(2, dict(pair for cases in back for pair in cases.items()), "back")
    yield result


def assert_same(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for kind, values in expected.items():
        assert found[kind].keys() == values.keys()
        for name, value in values.items():
            assert torch.equal(found[kind][name], value), (kind, name)


@pytest.mark.parametrize(("way", "layout"), READ)
def test_the_whole_state_is_the_same_after_a_change_of_ranks(chain: Chain, way: str, layout: str) -> None:
    written = chain.answers["2", layout]
    read = chain.answers[way, layout]
    assert_same(read["loaded"], written["state"])
    moved = [not torch.equal(read["state"]["weight"][n], v) for n, v in read["loaded"]["weight"].items()]
    assert any(moved), "and it trains on"
    num_trained = len(written["state"]["master"])
    assert len(read["loaded"]["weight"]) == 29
    assert (num_trained < 29) == (layout == "frozen")
    if layout == "16-bit":
        # As DeepSpeed gathers them: float32 tensors of bfloat16 values.
        assert all(torch.equal(v, v.bfloat16().to(v)) for v in written["state"]["exp_avg"].values())


@pytest.mark.parametrize(("way", "source"), [(way, source) for way in CROSSED for source in CROSSED[way]])
def test_a_checkpoint_is_read_under_another_memory_layout(chain: Chain, way: str, source: str) -> None:
    read = chain.answers[way, f"{source} as {CROSSED[way][source]}"]
    assert_same(read["loaded"], chain.answers["2", source]["state"])


@pytest.mark.parametrize(("way", "layout"), READ)
def test_adam_steps_on_with_its_own_count_and_decay_for_every_group(chain: Chain, way: str, layout: str) -> None:
    found = chain.answers[way, layout]["with"]
    assert set(found["steps"]) == {float(SAVED)} and not found["shared"]
    assert (len(found["steps"]) > 4) == layout.startswith("split")
    for name, decay in found["weight_decay"].items():
        assert decay == (0.0 if "norm" in name else 0.1), name
    assert found["counters"] == [SAVED, 0]


@pytest.mark.parametrize("way", WAYS)
def test_the_steps_after_a_change_of_ranks_are_those_of_the_undisturbed_run(chain: Chain, way: str) -> None:
    whole, found = chain.answers["undisturbed", "float32"], chain.answers[way, "float32"]
    assert len(found["losses"]) == 10
    assert found["samples"] == whole["samples"][SAVED:]
    assert found["losses"] == pytest.approx(whole["losses"][SAVED:], abs=1e-6, rel=0)
    for name, value in whole["state"]["master"].items():
        assert torch.allclose(found["state"]["master"][name], value, atol=1e-5), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks", ["1", "2", "3"])
def test_what_a_checkpoint_holds_is_read_whole_whoever_wrote_it(chain: Chain, ranks: str, layout: str) -> None:
    """As export, score and generate read it; frozen parameters too."""
    state = chain.answers["2", layout]["state"]
    stored = chain.answers["2" if ranks == "2" else f"2->{ranks}", layout]["stored"]
    expected = state["weight"] | state["master"]
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name].float(), value.float()) for name, value in expected.items())


def test_frozen_parameters_keep_the_bits_they_had(chain: Chain) -> None:
    for way in WAYS:
        answer = chain.answers[way, "frozen"]
        frozen = answer["loaded"]["weight"].keys() - answer["loaded"]["master"].keys()
        assert len(frozen) > 10
        assert all(torch.equal(answer["state"]["weight"][n], answer["loaded"]["weight"][n]) for n in frozen)


def test_shards_that_do_not_belong_together_are_refused(chain: Chain, tmp_path: Path) -> None:
    """Behind the manifest's checksums, for files without one: a shard of another world or step, and a missing one."""
    two, three = (chain.saved(ranks, "float32") / "shards" for ranks in (2, 3))

    def mixed(name: str, *links: tuple[Path, str]) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for source, called in links:
            (folder / called).symlink_to(source)
        return folder

    def of(folder: Path, ranks: int, but: str = "") -> list[tuple[Path, str]]:
        return [(p, p.name) for p in sorted(folder.glob("*.pt")) if f"rank_{but}_mp" not in p.name][: 2 * ranks]

    gap = mixed("gap", *of(three, 3, but="1"))
    with pytest.raises(StorageError, match=r"shards of the ranks \[0, 2\]"):
        Shards(gap)
    fewer = mixed("fewer", *of(three, 3, but="2"))
    with pytest.raises(StorageError, match="a shard of 3 ranks, in a folder with those of 2"):
        Shards(fewer).whole("model.model.norm.weight")
    half = mixed("half", *of(two, 2), *[(p, p.name) for p in three.glob("*rank_2_mp*model*")])
    with pytest.raises(StorageError, match="3 model shards and 2 optimizer shards"):
        Shards(half)
    other = mixed("other", *[(p, p.name) for p in two.glob("*rank_0_mp*")], *of(two, 2)[:0])
    for path in two.glob("*rank_1_mp*"):
        state = torch.load(path, weights_only=False)
        if "optim" in path.name:
            for of_group in state["optimizer_state_dict"]["optimizer_state_dict"]["state"].values():
                of_group["step"] += 1
        torch.save(state, other / path.name)
    with pytest.raises(StorageError, match=r"of step 5\.0, beside shards of step 4\.0"):
        Shards(other).whole("model.model.norm.weight")
    for path in two.glob("*rank_1_mp*optim*"):
        state = torch.load(path, weights_only=False)
        state["optimizer_state_dict"]["fp32_flat_groups"][0] = torch.zeros(3)
        torch.save(state, other / path.name)
    with pytest.raises(StorageError, match="its sizes are not those"):
        Shards(other).whole("model.model.norm.weight")
    for path in two.glob("*rank_1_mp*optim*"):
        torch.save({"zero": 3, "ds_version": "9.9"}, other / path.name)
    with pytest.raises(ConfigError, match=r"a layout that is not known here \(DeepSpeed 9\.9\)"):
        Shards(other).whole("model.model.norm.weight")


def test_a_checkpoint_of_other_parameters_or_groups_is_refused_by_name(chain: Chain, tmp_path: Path) -> None:
    model = build_model(tmp_path / "gpt2", "gpt2")
    common = {"case": "refused", "model": str(chain.folder / "model"), "data": str(chain.folder / "data.jsonl")}
    common["resume"] = str(chain.saved(2, "float32"))
    cases = [{"model": str(model)}, {"one_group": True}, {"freeze": ["*embed_tokens*"]}]
    answers = run_world(1, [common | case for case in cases], tmp_path / "world", module="tests.helpers.resume_cases")
    other, groups, frozen = (answer[0] for answer in answers)
    assert "ConfigError" in other and "in the checkpoint, not in the model" in other and "more" in other
    assert "layers.0.input_layernorm.weight: in another parameter group than before" in groups
    assert "embed_tokens.weight: trained in the checkpoint, frozen now" in frozen
