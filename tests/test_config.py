"""One YAML, all mistakes at once, nothing written to after load."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from sft_dist.config import TRANSLATIONS, RunConfig, explain, load_config, to_json
from sft_dist.errors import ConfigError

MINIMAL = "run_dir: runs/x\nmodel: {path: some/model}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_all_mistakes_are_named_at_once_with_the_nearest_key(tmp_path: Path) -> None:
    text = (
        "model: {path: m}\nbatch: {global_packs: 0}\noptimizer: {learning_rat: 1e-5}\n"
        "num_train_epochs: 3\ndata: {overflow: cut}\nmax_length: 7\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    message = str(caught.value)
    assert "6 mistake(s)" in message
    assert "run_dir: required, but missing" in message
    assert "batch.global_packs" in message and "(got 0)" in message
    assert "optimizer.learning_rat: unknown key; did you mean optimizer.learning_rate?" in message
    assert "num_train_epochs: unknown key; here that is schedule.epochs" in message
    assert "data.overflow" in message and "'cut'" in message
    assert "max_length: unknown key; did you mean data.max_length?" in message


@pytest.mark.parametrize("key", ["train", "heldout", "retention"])
@pytest.mark.parametrize("form", ["labelled", "labelled_chat"])
def test_labelled_records_need_a_head(tmp_path: Path, key: str, form: str) -> None:
    """A language model would learn their texts and pass over the labels."""
    data = f"data: {{{key}: [{{path: a.jsonl, format: {form}}}]}}\n"
    with pytest.raises(ConfigError, match=rf"data\.{key}: format: labelled: a language model \(head\.kind: none\)"):
        load_config(write(tmp_path, MINIMAL + data))
    if key != "retention":
        load_config(write(tmp_path, MINIMAL + data + "head: {kind: single_label}\n"))


def test_overrides_win_and_are_yaml(tmp_path: Path) -> None:
    overrides = ["optimizer.learning_rate=1e-4", "data.train=[a.jsonl, b.jsonl]", "checkpoint.stop_at_step=3"]
    config = load_config(write(tmp_path, MINIMAL + "optimizer: {learning_rate: 1e-5}\n"), overrides)
    assert config.optimizer.learning_rate == 1e-4
    assert [source.path for source in config.data.train] == ["a.jsonl", "b.jsonl"]
    assert config.checkpoint.stop_at_step == 3


@pytest.mark.parametrize("override", ["no_separator", "=3", "run_dir.x=1", "seed=[", "batch.global_packs=-1"])
def test_bad_overrides_are_config_errors(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError):
        load_config(write(tmp_path, MINIMAL), [override])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- a\n- b\n",
        "run_dir: [\n",
        MINIMAL + "optimizer: {learning_rate: .nan}\n",
        MINIMAL + "optimizer: {betas: [0.9, 1.0]}\n",
        MINIMAL + "seed: -1\n",
        MINIMAL + "checkpoint: {every: 0}\nnumbers: {spike: rollback}\n",
        MINIMAL + "data: {max_length: 8}\ndata: {overflow: error}\n",
        MINIMAL + "data: {<<: {overflow: drop}, max_length: 8, max_length: 9}\n",
    ],
)
def test_impossible_run_files_are_config_errors(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        load_config(write(tmp_path, text))


def test_merge_keys_put_in_what_is_not_written(tmp_path: Path) -> None:
    text = """\
data:
  train:
    - &a {path: a.jsonl, weight: 2}
    - &b {<<: *a, path: b.jsonl}
    - {<<: [*b, *a], repeat: 3, path: c.jsonl}
"""
    sources = load_config(write(tmp_path, MINIMAL + text)).data.train
    assert [(source.path, source.weight, source.repeat) for source in sources] == [
        ("a.jsonl", 2.0, 1.0),
        ("b.jsonl", 2.0, 1.0),
        ("c.jsonl", 2.0, 3.0),
    ]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{date_string: 2024-07-26}", "date_string: 2024-07-26 is date, which JSON does not have; quote it"),
        ("{a: [{b: 2024-07-26 10:00:00}]}", r"a\[0\]\.b: .* is datetime, .*; quote it"),
        ("{a: {1: x}}", "a: the key 1 is int, not text; quote it"),
        ("{a: .inf}", "a: inf is float"),
        ("{tools: [], return_dict: true, x: 1}", "tools, return_dict: not a variable of the template"),
        ("{sft_dist_today: x}", "sft_dist_today: not a variable"),
    ],
)
def test_variables_of_the_template_are_json_and_not_reserved(tmp_path: Path, written: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"1 mistake.*\n.*data.template_kwargs: {expected}"):
        load_config(write(tmp_path, MINIMAL + f"data: {{template_kwargs: {written}}}\n"))


def test_variables_of_the_template_may_be_any_json(tmp_path: Path) -> None:
    text = MINIMAL + 'data: {template_kwargs: {a: [1, 2.5, null, {b: "2024-07-26"}], enable_thinking: false}}\n'
    expected = {"a": [1, 2.5, None, {"b": "2024-07-26"}], "enable_thinking": False}
    assert load_config(write(tmp_path, text)).data.template_kwargs == expected


def test_config_is_frozen(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    with pytest.raises(ValidationError):
        config.batch.global_packs = 3  # type: ignore[misc]


def test_paths_are_taken_as_given_and_else_beside_the_run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = tmp_path / "here"
    beside.mkdir()
    (beside / "a" / "b" / "c").mkdir(parents=True)
    for name in ("train.jsonl", "a/b/c/x.jsonl"):
        (beside / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    config = load_config(write(beside, MINIMAL + "data: {train: [train.jsonl, 'a/**/x.jsonl'], heldout: owner/name}\n"))
    assert [source.path for source in config.data.train] == ["here/train.jsonl", "here/a/**/x.jsonl"]
    assert [source.path for source in config.data.heldout] == ["owner/name"]


def test_every_key_is_explained_and_every_translation_leads_to_a_key() -> None:
    keys = {key for key, _, _ in explain()}
    assert all(meaning for _, _, meaning in explain())
    homes = {text.split(" ")[0].rstrip(":") for text in TRANSLATIONS.values()} - {"nothing"}
    assert homes <= keys


def test_an_override_leaves_what_an_alias_put_elsewhere(tmp_path: Path) -> None:
    text = MINIMAL + "checkpoint: &c {every: 5}\nevaluate: *c\ndata: {template_kwargs: {a: &k {x: 1}, b: *k}}\n"
    config = load_config(write(tmp_path, text), ["checkpoint.every=3", "data.template_kwargs.a.x=2"])
    assert (config.checkpoint.every, config.evaluate.every) == (3, 5)
    assert config.data.template_kwargs == {"a": {"x": 2}, "b": {"x": 1}}
    config = load_config(write(tmp_path, text), ["data.template_kwargs={a: &l {x: 1}, b: *l}"] * 2)
    assert config.data.template_kwargs == {"a": {"x": 1}, "b": {"x": 1}}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("data: {template_kwargs: &k {x: *k}}", "an alias stands inside the value that it names"),
        ("data: {template_kwargs: &k {x: [1, *k]}}", "an alias stands inside"),
        ("data: &d {train: *d}", "an alias stands inside"),
        ("data: {date: 2024-02-30}", "'2024-02-30' is no timestamp: day is out of range.*\n.*line 3"),
        ("seed: !!int x", "'x' is no int"),
        ("seed: !!bool x", "'x' is no bool"),
        ("seed: !!timestamp x", "'x' is no timestamp"),
        ("data:\n  <<: {max_length: 64}\n  <<: {max_length: 99}", "'<<' is there twice"),
        ("data: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    ],
)
def test_yaml_that_cannot_be_followed_is_told(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=f"run.yaml: not valid YAML: {told}"):
        load_config(write(tmp_path, MINIMAL + text + "\n"))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("data.date=2024-02-30", "'2024-02-30' is no timestamp"),
        ("data.train=[{path: a, path: b}]", "'path' is there twice"),
        ("data={<<: {max_length: 6}, <<: {max_length: 7}}", "'<<' is there twice"),
        ("data.template_kwargs=&k {x: *k}", "an alias stands inside"),
    ],
)
def test_overrides_are_read_as_the_file_is(tmp_path: Path, override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=f"not a YAML value: {told}"):
        load_config(write(tmp_path, MINIMAL), [override])


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_an_empty_run_file_is_called_empty(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml: is empty"):
        load_config(write(tmp_path, text))


def test_adapters_have_a_learning_rate_of_their_own(tmp_path: Path) -> None:
    rates = [
        load_config(write(tmp_path, MINIMAL + text)).optimizer.learning_rate
        for text in ("", "adapter: {kind: lora}\n", "adapter: {kind: dora}\noptimizer: {learning_rate: 3e-6}\n")
    ]
    assert rates == [1e-5, 1e-4, 3e-6]
    resolved = to_json(load_config(write(tmp_path, MINIMAL + "adapter: {kind: lora}\noptimizer: {eps: 1.0}\n")))
    assert RunConfig.model_validate_json(resolved).optimizer.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("adapter: {rank: 8}\n", "kind is missing; lora or dora"),
        ("adapter: {kind: lora, lora_alpha: 8}\n", "here that is adapter.alpha"),
        ("adapter: {kind: lora, rank: 0}\n", "adapter.rank"),
        ("adapter: {kind: lora, dropout: 1.0}\n", "adapter.dropout"),
    ],
)
def test_mistakes_in_the_adapter_section_are_named(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config(write(tmp_path, MINIMAL + text))


def test_new_parameters_and_adapters_exclude_each_other(tmp_path: Path) -> None:
    text = "run_dir: x\nmodel: {path: m, allow_new_parameters: ['*']}\nadapter: {kind: lora}\n"
    with pytest.raises(ConfigError, match="allow_new_parameters: parameters that start at random would stay so"):
        load_config(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("anchor: {kl_top_k: 8}", "anchor.kl_top_k: nothing is compared while anchor.kl is 0"),
        ("anchor: {kl: 1, kl_top_k: 0}", "anchor.kl_top_k"),
        ("anchor: {kl: 1, kl_top_k: 8}\nhead: {kind: regression}", "anchor.kl_top_k: not known with a head"),
    ],
)
def test_what_is_kept_of_the_start_needs_something_to_be_compared(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, MINIMAL + text))
    assert told in str(caught.value)
    assert load_config(write(tmp_path, MINIMAL + "anchor: {kl: 1, kl_top_k: 8}")).anchor.kl_top_k == 8
