"""What a tokenizer folder and a template may do without harm to what is encoded and refused."""

from pathlib import Path

import pytest

from sft_dist.config import DataConfig, ModelConfig, SourceConfig
from sft_dist.data.conversation import RecordError
from sft_dist.data.prepare import prepare
from sft_dist.data.renderer import Renderer
from sft_dist.data.tokenizer import load_tokenizer
from sft_dist.errors import ConfigError
from tests.helpers.models import build_tokenizer
from tests.helpers.zoo import BENIGN, DATE, FAMILIES, Family


def test_truncation_and_padding_of_a_saved_tokenizer_are_off(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    text = "What is the capital of France? " * 10
    expected = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=1000)
    tokenizer.save_pretrained(tmp_path)
    assert '"max_length": 4' in (tmp_path / "tokenizer.json").read_text()
    renderer = Renderer(load_tokenizer(ModelConfig(path=str(tmp_path))), None)
    for backend in (renderer.tokenizer.backend_tokenizer, renderer.middle_backend, renderer.plain_backend):
        assert backend.encode(text, add_special_tokens=False).ids == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 // (messages | length - 1) }}",
        "{{ 2.0 ** 99999 }}",
        "{% macro again(n) %}{{ again(n + 1) }}{% endmacro %}{{ again(0) }}",
    ],
)
def test_whatever_a_template_stumbles_on_refuses_the_record(template: str) -> None:
    renderer = Renderer(build_tokenizer(), template)
    with pytest.raises(RecordError, match="template error"):
        renderer.apply([{"role": "user", "content": "hi"}], generation_prompt=False)


@pytest.mark.parametrize(
    "template",
    ["{{ 'x' }}\n{% for m in messages %}{{ m.content ", "x\n{{ messages | no_such_filter }}", "\n{% elif %}"],
)
def test_a_template_that_is_no_jinja_is_told_once_before_any_data_are_read(tmp_path: Path, template: str) -> None:
    build_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "x.jsonl").write_text("never read\n" * 3)
    (tmp_path / "x.jinja").write_text(template)
    model = ModelConfig(path=str(tmp_path / "model"))
    data = DataConfig(chat_template=str(tmp_path / "x.jinja"), cache_dir=str(tmp_path / "prepared"))
    with pytest.raises(ConfigError, match=r"chat template .* is not valid Jinja: line 2: "):
        prepare([SourceConfig(path=str(tmp_path / "x.jsonl"))], model, data)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_texts_are_those_of_apply_chat_template(family: Family) -> None:
    renderer = Renderer(family.tokenizer, family.source, date=DATE, template_kwargs=family.kwargs)
    if renderer.asks_for_today:
        return  # tests/data/test_zoo.py compares what such a template writes on a given day
    compared = 0
    for conversation in BENIGN.values():
        messages = [renderer.plain(message) for message in conversation.messages]
        for end in range(1, len(messages) + 1):
            for generation_prompt in (False, True):
                try:
                    text = renderer.apply(messages[:end], conversation.tools, generation_prompt=generation_prompt)
                except RecordError:
                    continue
                compared += 1
                assert text == family.tokenizer.apply_chat_template(
                    messages[:end],
                    tools=list(conversation.tools) or None,
                    chat_template=family.source,
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                    **family.kwargs,
                )
    assert compared
