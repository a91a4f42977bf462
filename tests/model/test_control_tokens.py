"""Named control tokens: what the tokenizer learns, and which rows the embeddings get, in worlds of 1, 2 and 3 ranks.

The oracle is plain transformers: the weights as the files hold them, and their mean in float64.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_dist.config import ModelConfig
from sft_dist.data.tokenizer import load_tokenizer
from sft_dist.errors import ConfigError
from sft_dist.model import loading
from tests.helpers.bare import CHATML_TOKENS, build_bare_model
from tests.helpers.conversations import make_records, write_jsonl
from tests.helpers.models import CHATML
from tests.helpers.worlds import run_world

# Families with tied and untied embeddings and a bias on the head; rows to spare: none, one of the two, more than both.
BASES = {"llama": 0, "qwen2": 1, "phi": 0, "gpt2": 5}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: build_bare_model(folder / family, family, spare_rows=spare) for family, spare in BASES.items()}


def model_config(folder: Path, *tokens: str) -> ModelConfig:
    return ModelConfig(path=str(folder), control_tokens=tokens)


def load(config: ModelConfig) -> Any:
    base = loading.load_config(config, max_length=2)
    added = loading.new_tokens(config)
    return loading.load_causal_lm(config, base, added=added, dtype=torch.float32, max_length=2, seed=0)


def expected_parameters(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Plain transformers: old rows as they are, the rows of the two new tokens the mean of the tokenizer's old ids."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    num_old = len(AutoTokenizer.from_pretrained(folder))
    vocabulary = model.config.vocab_size
    parameters = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if value.shape[0] == vocabulary:
            wider = torch.zeros(max(vocabulary, num_old + 2), *value.shape[1:], dtype=dtype)
            wider[:vocabulary] = value
            wider[num_old : num_old + 2] = value[:num_old].double().mean(0).to(dtype)
            value = wider
        parameters[name] = value
    return parameters


@pytest.mark.parametrize("family", BASES)
def test_new_rows_are_the_mean_of_the_old_and_all_else_keeps_its_bits(bases: dict[str, Path], family: str) -> None:
    model = load(model_config(bases[family], *CHATML_TOKENS))
    expected = expected_parameters(bases[family])
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    rows = len(model.get_input_embeddings().weight)
    assert rows == model.config.vocab_size == model.get_input_embeddings().num_embeddings
    assert rows == model.get_output_embeddings().out_features
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert is_tied == bool(model.config.tie_word_embeddings) == (family in ("llama", "gpt2"))


@pytest.mark.slow
def test_every_rank_count_gives_the_same_parameters(bases: dict[str, Path], tmp_path: Path) -> None:
    template = tmp_path / "chatml.jinja"
    template.write_text(CHATML)
    common = {
        "case": "parameters",
        "data": str(write_jsonl(tmp_path / "train.jsonl", make_records(2))),
        "chat_template": str(template),
        "control_tokens": CHATML_TOKENS,
        "global_packs": 1,
    }
    kinds = [(family, "float32") for family in bases] + [("phi", "bfloat16")]
    cases = [common | {"model": str(bases[family]), "dtype": dtype} for family, dtype in kinds]
    for size in (1, 2, 3):
        for (family, dtype), answer in zip(kinds, run_world(size, cases, tmp_path / str(size)), strict=True):
            expected = expected_parameters(bases[family], getattr(torch, dtype))
            assert answer["sharded"] == sorted(expected), "every parameter is a shard, the new ones too"
            for name, value in expected.items():
                assert torch.equal(answer["parameters"][name], value), (family, dtype, size, name)
                assert torch.equal(answer["saved"][name], value.float()), (family, dtype, size, name)


def test_it_is_said_in_one_line(bases: dict[str, Path]) -> None:
    grown = model_config(bases["llama"], *CHATML_TOKENS)
    num = len(AutoTokenizer.from_pretrained(bases["llama"]))
    added = loading.new_tokens(grown)
    assert added is not None
    assert added.describe(loading.load_config(grown, 2)) == (
        f"added 2 control tokens (<|im_start|>, <|im_end|>): embeddings {num} -> {num + 2} rows, "
        f"new rows are the mean of the {num} old ones"
    )
    spare = model_config(bases["gpt2"], *CHATML_TOKENS)
    added = loading.new_tokens(spare)
    assert added is not None
    assert f"embeddings keep {num + 5} rows, the new tokens' are the mean of the {num} old" in added.describe(
        loading.load_config(spare, 2)
    )


def test_without_new_tokens_nothing_changes(bases: dict[str, Path]) -> None:
    assert loading.new_tokens(model_config(bases["llama"])) is None
    known = model_config(bases["llama"], "<|endoftext|>")
    assert loading.new_tokens(known) is None
    original = AutoModelForCausalLM.from_pretrained(bases["llama"])
    for name, value in load(known).named_parameters():
        assert torch.equal(value, dict(original.named_parameters())[name])


def test_the_users_folder_stays_as_it_is(bases: dict[str, Path]) -> None:
    before = {path: path.read_bytes() for path in bases["llama"].iterdir()}
    load(model_config(bases["llama"], *CHATML_TOKENS))
    assert {path: path.read_bytes() for path in bases["llama"].iterdir()} == before


def test_a_model_without_plain_embeddings_is_refused(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "get_output_embeddings", lambda self: None)
    with pytest.raises(ConfigError, match=r"model\.control_tokens: llama has no plain embeddings and head"):
        load(model_config(bases["llama"], *CHATML_TOKENS))


def test_control_tokens_are_special_and_one_id_each(bases: dict[str, Path]) -> None:
    base = AutoTokenizer.from_pretrained(bases["llama"])
    tokenizer = load_tokenizer(model_config(bases["llama"], *CHATML_TOKENS, "<|endoftext|>", CHATML_TOKENS[0]))
    assert len(tokenizer) == len(base) + 2
    assert tokenizer.convert_tokens_to_ids(list(CHATML_TOKENS)) == [len(base), len(base) + 1]
    assert {text for text in CHATML_TOKENS if len(base.encode(text)) > 1} == set(CHATML_TOKENS)
    ids = tokenizer("<|im_start|>user\nx<|im_end|>").input_ids
    assert (ids[0], ids[-1]) == (len(base), len(base) + 1)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nx"
    assert tokenizer.eos_token == base.eos_token
    assert tokenizer.get_vocab().items() >= base.get_vocab().items()


def test_a_token_that_is_there_but_not_special_becomes_special(bases: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bases["llama"])
    tokenizer.add_tokens(["<think>"])
    tokenizer.add_tokens([AddedToken("<own>", lstrip=True, special=True)], special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    before = AutoTokenizer.from_pretrained(tmp_path)
    after = load_tokenizer(model_config(tmp_path, "<think>", "<own>"))
    assert after.get_vocab() == before.get_vocab()
    added = {token.content: token for token in after.added_tokens_decoder.values()}
    assert not next(t for t in before.added_tokens_decoder.values() if t.content == "<think>").special
    assert added["<think>"].special
    assert added["<own>"].special and added["<own>"].lstrip, "what is special already stays as it is"
    assert loading.new_tokens(model_config(tmp_path, "<think>", "<own>")) is None


@pytest.mark.parametrize("text", ["", " ", " <a>", "<a>\n", "\t<a>", "<\ud800>"])
def test_a_token_that_no_template_could_write_is_refused(bases: dict[str, Path], text: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.control_tokens: .* white space"):
        load_tokenizer(model_config(bases["llama"], "<good>", text))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=8).filter(lambda text: text == text.strip()), min_size=1, max_size=4))
def test_any_text_can_be_a_control_token(bases: dict[str, Path], texts: list[str]) -> None:
    base = AutoTokenizer.from_pretrained(bases["llama"]).get_vocab()
    config = model_config(bases["llama"], *texts)
    tokenizer, added = load_tokenizer(config), loading.new_tokens(config)
    expected = [text for text in dict.fromkeys(texts) if text not in base]
    assert (list(added.texts) if added else []) == expected
    for text in texts:
        (only,) = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.added_tokens_decoder[only].special
    if added is not None:
        assert added.old_ids == tuple(sorted(base.values()))
