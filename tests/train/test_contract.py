"""What a resumed run must share with the checkpoint it continues: every difference has a name and a key."""

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch

from sft_dist.config import RunConfig, explain, flatten, load_config, may_change
from sft_dist.errors import ConfigError
from sft_dist.model import loading
from sft_dist.preparation import training_set
from sft_dist.train import contract
from sft_dist.train.checkpoint import Checkpoint
from tests.helpers.conversations import make_records, write_jsonl
from tests.helpers.models import CHATML, build_model

BESIDE = {"kind": "single_label", "labels": ["a", "b"], "language_model_weight": 1.0}


@dataclass(frozen=True)
class Place:
    folder: Path
    before: dict[str, Any]  # facts of the unchanged run

    def config(self, **overrides: Any) -> RunConfig:
        given = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
        return load_config(self.folder / "run.yaml", given)

    def facts(self, config: RunConfig) -> dict[str, Any]:
        return facts_of(config)

    def written(self) -> Checkpoint:
        return Checkpoint(Path("step-00000004"), deepcopy(self.before) | {"world_size": 2})


def facts_of(config: RunConfig) -> dict[str, Any]:
    selection, plan = training_set(config)
    model_config = loading.load_config(config.model, config.data.max_length)
    return contract.facts(config, selection.dataset, None, model_config, plan)


def make(folder: Path) -> Place:
    build_model(folder / "model", "llama")
    write_jsonl(folder / "train.jsonl", make_records(20, max_words=6))
    write_jsonl(folder / "more.jsonl", make_records(5, seed=7, max_words=6))
    tree = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(folder / "model")},
        "data": {
            "train": [str(folder / "train.jsonl"), str(folder / "more.jsonl")],
            "max_length": 384,
            "cache_dir": str(folder / "prepared"),
            "num_processes": 1,
        },
    }
    (folder / "run.yaml").write_text(json.dumps(tree))
    return Place(folder, facts_of(load_config(folder / "run.yaml")))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make(tmp_path_factory.mktemp("contract"))


@pytest.fixture
def place(original: Place, tmp_path: Path) -> Place:
    """A copy elsewhere, to be changed: paths are no part of the contract, so the facts are the same."""
    shutil.copytree(original.folder, tmp_path / "moved")
    text = (tmp_path / "moved" / "run.yaml").read_text()
    (tmp_path / "moved" / "run.yaml").write_text(text.replace(str(original.folder), str(tmp_path / "moved")))
    return Place(tmp_path / "moved", original.before)


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def test_the_same_run_elsewhere_is_the_same(place: Place) -> None:
    assert contract.differences(place.before, place.facts(place.config())) == []


@pytest.mark.parametrize(
    ("change", "key", "named"),
    [
        ({"batch.global_packs": 9}, "batch.global_packs", "batch.global_packs: 8 in the checkpoint, 9 now"),
        ({"seed": 4}, "seed", "seed: 0 in the checkpoint, 4 now"),
        ({"batch.balance_steps": 2}, "batch.balance_steps", "batch.balance_steps: 1 in the checkpoint, 2 now"),
        ({"schedule.name": "linear"}, "schedule.name", "schedule.name: 'cosine' in the checkpoint, 'linear' now"),
        ({"schedule.epochs": 3}, "schedule.epochs", "schedule.epochs: 1 in the checkpoint, 3 now"),
        ({"schedule.max_steps": 1}, "schedule.max_steps", "schedule.max_steps: nothing in the checkpoint, 1 now"),
        ({"optimizer.weight_decay": 0.5}, "optimizer.weight_decay", "weight_decay: 0.0 in the checkpoint, 0.5 now"),
        ({"objective.normalise": "turn"}, "objective.normalise", "'token' in the checkpoint, 'turn' now"),
        ({"data.max_length": 380}, "data.max_length", "data.max_length: 384 in the checkpoint, 380 now"),
        ({"data.date": "1999-12-31"}, "data.date", "'1999-12-31' now"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value and ":" not in value else "",
)
def test_another_value_of_a_fixed_key_is_named(original: Place, change: dict[str, Any], key: str, named: str) -> None:
    """Global batch (58), order (60), schedule and steps (65), and what else changes numbers."""
    refuses(original, original.facts(original.config(**change)), key, named)


def refuses(place: Place, now: dict[str, Any], key: str, *named: str) -> None:
    """The one difference has this key and these words; allowing the key, and no other one, lets it pass."""
    others = [other for other, _, _ in explain() if other != key]
    with pytest.raises(ConfigError) as refusal:
        contract.check(place.written(), now, world_size=2, allow_changed=others)
    told = str(refusal.value)
    assert all(words in told for words in named), told
    assert {found for found, _ in contract.differences(place.before, now)} == {key}, told
    contract.check(place.written(), now, world_size=2, allow_changed=(key,))


def test_an_edited_file_is_named(place: Place) -> None:  # 59
    write_jsonl(place.folder / "more.jsonl", make_records(5, seed=8, max_words=6))
    now = place.facts(place.config())
    refuses(place, now, "data.train", "data.train[1] (", "more.jsonl): content, sha256")
    assert len(contract.differences(place.before, now)) == 1


def test_an_edit_that_changes_no_length_is_named(place: Place) -> None:  # 59
    def facts(digit: int) -> dict[str, Any]:
        write_jsonl(place.folder / "more.jsonl", [{"prompt": f"Q{digit}", "completion": f"Z{digit}"}])
        return place.facts(place.config())

    before, now = facts(7), facts(8)
    assert before["first_step"] == now["first_step"], "the same lengths in the same order"
    refuses(Place(place.folder, before), now, "data.train", "more.jsonl): content, sha256")


def test_files_in_another_order_are_another_order_of_samples(place: Place) -> None:  # 59, 60
    swapped = [str(place.folder / "more.jsonl"), str(place.folder / "train.jsonl")]
    refuses(place, place.facts(place.config(**{"data.train": swapped})), "data.train", "data.train[0]", "data.train[1]")


def test_a_source_more_or_otherwise_mixed_is_named(place: Place) -> None:
    one = [str(place.folder / "train.jsonl")]
    refuses(place, place.facts(place.config(**{"data.train": one})), "data.train", "data.train[1]:", "nothing now")
    mixed = [{"path": one[0], "repeat": 2}, {"path": str(place.folder / "more.jsonl"), "weight": 3}]
    now = place.facts(place.config(**{"data.train": mixed}))
    refuses(place, now, "data.train", "data.train[0].repeat", "1.0 in the checkpoint, 2.0 now", "data.train[1].weight")


def test_the_same_records_written_otherwise_are_the_same(place: Place) -> None:
    path = place.folder / "train.jsonl"
    path.write_text(
        "".join(json.dumps(json.loads(line), indent=None) + " \n" for line in path.read_text().splitlines())
    )
    now = place.facts(place.config())
    assert now["data"]["sources"] != place.before["data"]["sources"], "other bytes"
    assert contract.differences(place.before, now) == []


def test_another_tokenizer_is_named_by_its_part(place: Place) -> None:  # 61
    tokenizer = place.folder / "model" / "tokenizer.json"
    edit_json(tokenizer, lambda tree: tree.update(normalizer={"type": "NFC"}))
    refuses(place, place.facts(place.config()), "model.path", "model.path (tokenizer: normalizer)")


def test_another_special_token_is_named(place: Place) -> None:  # 61
    config = place.folder / "model" / "tokenizer_config.json"
    edit_json(config, lambda tree: tree.update(pad_token="<|im_end|>"))
    named = "model.path (tokenizer: pad_token): '<|endoftext|>' in the checkpoint, '<|im_end|>' now"
    refuses(place, place.facts(place.config()), "model.path", named)


def test_another_template_is_named_by_its_first_other_line(place: Place, tmp_path: Path) -> None:  # 62
    template = tmp_path / "template.jinja"
    template.write_text("{# one #}\n" + CHATML)
    now = place.facts(place.config(**{"data.chat_template": str(template)}))
    refuses(place, now, "data.chat_template", "data.chat_template (line 1 of the template)", "'{# one #}' now")


def test_another_model_is_named_by_the_entry_of_its_config(place: Place) -> None:  # 63
    edit_json(place.folder / "model" / "config.json", lambda tree: tree.update(rms_norm_eps=1e-4, use_cache=False))
    now = place.facts(place.config())
    refuses(place, now, "model.path", "model.path (config.json rms_norm_eps): 1e-06 in the checkpoint, 0.0001 now")


def test_entries_that_another_version_of_transformers_adds_are_no_difference(original: Place) -> None:
    now = deepcopy(original.before)
    now["model"]["new_in_this_version"] = 1
    assert "new_in_this_version" in str(contract.differences(original.before, now))
    now["versions"]["transformers"] = "6.0.0"
    assert contract.differences(original.before, now) == []


def test_another_precision_is_named(original: Place) -> None:  # 66
    now = original.facts(original.config(**{"model.dtype": "bfloat16"}))
    named = "model.dtype (resolved): 'float32' in the checkpoint, 'bfloat16' now"
    refuses(original, now, "model.dtype", named)
    same = original.facts(original.config(**{"model.dtype": "float32"}))
    assert contract.differences(original.before, same) == [], "what auto was here"
    short = {"model.dtype": "bfloat16", "deepspeed": "zero3_16bit"}
    written = Place(original.folder, now)
    named = "deepspeed (master weights and moments): 'float32' in the checkpoint, 'bfloat16' now"
    refuses(written, original.facts(original.config(**short)), "deepspeed", named)
    layout = original.facts(original.config(deepspeed="zero3_offload_all"))
    assert contract.differences(original.before, layout) == [], "where states lie changes no number"


def test_other_versions_are_said_and_those_that_only_mend_are_not(original: Place) -> None:  # 67
    now = deepcopy(original.before)
    now["versions"]["torch"] += ".post1"
    assert contract.check(original.written(), now, world_size=2, allow_changed=()) == []
    torch, now["versions"]["torch"] = original.before["versions"]["torch"], "9.9.0"
    (note,) = contract.check(original.written(), now, world_size=2, allow_changed=())
    assert f"torch {torch} -> 9.9.0" in note and "rounding" in note


def test_a_manifest_of_another_version_is_refused_by_what_it_lacks(original: Place) -> None:  # 67
    written = original.written()
    del written.manifest["tokenizer"], written.manifest["states"]
    with pytest.raises(ConfigError, match=r"says nothing of states, tokenizer: written by another version of sft-dist"):
        contract.check(written, original.before, world_size=2, allow_changed=())


def test_other_base_weights_are_said_since_they_are_not_read_again(place: Place) -> None:  # 68
    file = place.folder / "model" / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    assert contract.check(place.written(), place.facts(place.config()), world_size=2, allow_changed=()) == []
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.001
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    now = place.facts(place.config())
    used, drift = contract.check(place.written(), now, world_size=2, allow_changed=())
    assert "other weights than this run started from" in used and "drift" in drift
    now = place.facts(place.config(**{"anchor.decay": 1.0}))
    before = place.written()
    before.manifest["config"]["anchor.decay"] = 1.0
    with pytest.raises(ConfigError, match=r"model\.path \(weights, sampled sha256\): .*, and anchor\.decay needs"):
        contract.check(before, now, world_size=2, allow_changed=())
    assert contract.check(before, now, world_size=2, allow_changed=("model.path",)) == [used, drift]


def test_other_base_weights_are_refused_where_the_checkpoint_holds_adapters_alone(place: Place) -> None:
    config = place.config(**{"adapter.kind": "lora"})
    before = place.facts(config)
    weights = safetensors.torch.load_file(place.folder / "model" / "model.safetensors")
    changed = {name: value + 1 for name, value in weights.items()}
    safetensors.torch.save_file(changed, place.folder / "model" / "model.safetensors", metadata={"format": "pt"})
    written = Checkpoint(Path("step-00000004"), before | {"world_size": 2})
    now = place.facts(config)
    with pytest.raises(ConfigError, match=r"model.path: other weights than the adapters were trained beside"):
        contract.check(written, now, world_size=2, allow_changed=())
    with pytest.raises(ConfigError, match=r"model.path: other weights than the adapters were trained beside"):
        contract.check_base(config, written)
    notes = contract.check(written, now, world_size=2, allow_changed=("model.path",))
    assert not any("come from the checkpoint" in note for note in notes)
    contract.check_base(place.config(), place.written())


@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        ({}, {}, None),
        ({"kind": "single_label", "labels": ["a", "b"]}, {"kind": "single_label", "labels": ["a", "b"]}, None),
        ({"kind": "single_label", "labels": ["a", "b"]}, {"kind": "single_label", "labels": ["b", "a"]}, "head.labels"),
        ({"kind": "single_label", "labels": ["a", "b"]}, {"kind": "multi_label", "labels": ["a", "b"]}, "head.kind"),
        ({"kind": "single_label", "labels": ["a", "b"]}, {}, "head.kind"),
        ({}, {"kind": "single_label", "labels": ["a", "b"]}, "head.kind"),
        ({}, BESIDE, None),
        (BESIDE, BESIDE | {"language_model_weight": 2.0}, None),
        (BESIDE, BESIDE | {"labels": ["b", "a"]}, "head.labels"),
        ({"kind": "single_label", "labels": ["a", "b"]}, BESIDE, "head.language_model_weight"),
        (BESIDE, {"kind": "single_label", "labels": ["a", "b"]}, "head.language_model_weight"),
    ],
)
def test_a_run_starts_from_another_with_the_same_head_only(
    original: Place, before: dict[str, Any], now: dict[str, Any], named: str | None
) -> None:
    old, new = (original.config(**{f"head.{key}": value for key, value in head.items()}) for head in (before, now))
    written = Checkpoint(Path("step-00000004"), {"config": flatten(old.model_dump(mode="json"))})
    new = new.model_copy(update={"model": new.model.model_copy(update={"init_from": "runs/first"})})
    if named is None:
        contract.check_initial(new, written)
        return
    with pytest.raises(
        ConfigError, match=rf"model\.init_from: runs/first was trained with {named}.*: .*, this run has"
    ):
        contract.check_initial(new, written)


def test_a_start_from_another_checkpoint_is_lost_whatever_the_base_is(original: Place) -> None:
    """With model.init_from the weights at step 0 are those of that run's checkpoint."""
    first, second = original.before | {"initial": "1" * 16}, original.before | {"initial": "2" * 16}
    assert contract.start_lost(first, first) is None
    assert contract.start_lost(first, first | {"weights": "other"}) is None, "of which nothing is used"
    for before, now in ((first, second), (first, original.before), (original.before, first)):
        found = contract.start_lost(before, now)
        assert found is not None and found[0] == "model.init_from" and "its newest checkpoint, sha256" in found[1]


def test_another_number_of_ranks_is_said(original: Place) -> None:  # 57
    (note,) = contract.check(original.written(), original.before, world_size=3, allow_changed=())
    assert "written by 2 ranks, going on with 3" in note


def test_random_numbers_that_changed_are_told_before_another_order_is_trained(
    original: Place, monkeypatch: pytest.MonkeyPatch
) -> None:  # 60, 67
    monkeypatch.setattr(np.random, "PCG64", np.random.MT19937)
    now = original.facts(original.config())
    now["versions"]["numpy"] = "9.0.0"
    refuses(original, now, "seed", "the order of samples: other ones in step 1", "-> 9.0.0")


def test_the_same_files_prepared_otherwise_are_told(original: Place) -> None:
    now = deepcopy(original.before)
    now["data"]["samples"] = "0" * 16
    refuses(original, now, "data.train", "the same files become other samples", "other code of the same versions")


def test_every_difference_is_named_at_once(place: Place) -> None:
    write_jsonl(place.folder / "train.jsonl", make_records(21, max_words=6))
    now = place.facts(place.config(**{"seed": 1, "optimizer.eps": 1e-6}))
    with pytest.raises(ConfigError) as refusal:
        contract.check(place.written(), now, world_size=2, allow_changed=("seed",))
    told = str(refusal.value)
    assert "optimizer.eps" in told and "data.train[0]" in told and "seed:" not in told


def test_what_may_change_is_listed_and_everything_else_is_fixed() -> None:
    """A new key is fixed until someone says that it changes no number."""
    free = {key for key, _, _ in explain() if may_change(key.partition("[]")[0])}
    for key in ("logging.tensorboard", "checkpoint.every", "model.attention", "batch.reduce_once", "data.heldout"):
        assert key in free
    fixed = {key.partition(".")[0] for key, _, _ in explain() if key not in free}
    assert fixed == {
        "seed",
        "model",
        "data",
        "objective",
        "batch",
        "optimizer",
        "anchor",
        "schedule",
        "adapter",
        "head",
    }
    assert not any(key.startswith(("objective.", "optimizer.", "schedule.")) for key in free)


def test_a_key_to_be_allowed_must_exist(original: Place) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint.allow_changed: optimizer.lr: no key .* optimizer.learning_rate"):
        original.config(**{"checkpoint.allow_changed": ["optimizer.lr"]})
    original.config(**{"checkpoint.allow_changed": ["optimizer.learning_rate", "data.train", "seed"]})
