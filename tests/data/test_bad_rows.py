"""One file with a row of every fault data have: what is refused, by which name and in which line, and what stays."""

import json
from pathlib import Path

import pytest

from sft_dist.config import DataConfig, ModelConfig, SourceConfig
from sft_dist.data.conversation import Conversation, Message, RecordError
from sft_dist.data.prepare import prepare
from sft_dist.data.renderer import Renderer
from sft_dist.data.rendering import render
from sft_dist.data.store import PreparedDataset
from sft_dist.errors import DataError
from tests.helpers.models import build_tokenizer
from tests.helpers.samples import select
from tests.helpers.zoo import FAMILIES

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}


def chat(*messages: object) -> bytes:
    return json.dumps({"messages": list(messages)}).encode()


ROWS: list[tuple[bytes, str | None]] = [
    (b"\xef\xbb\xbf" + chat(USER, ANSWER) + b"\r", None),
    (b"  \r", None),
    (b'{"messages": [}', "not JSON"),
    (chat(USER, ANSWER).replace(b"hi", b"caf\xe9"), "not UTF-8"),
    (chat(USER, ANSWER).replace(b"hi", rb"\ud800"), "broken text"),
    (chat(USER, ANSWER).replace(b"hi", rb"a\u0000b"), None),
    (b'{"x": 1}', "unknown format"),
    (b'{"messages": "hi"}', "no messages"),
    (b'{"messages": null}', "unknown format"),
    (chat({"role": "user", "content": None}, ANSWER), "no text"),
    (chat({"role": "user", "content": 3}, ANSWER), "no text"),
    (chat({"role": "user", "content": [7]}, ANSWER), "no text"),
    (chat({"role": "bot", "content": "x"}, ANSWER), "unknown role"),
    (chat(USER), "no assistant turn"),
    (chat(USER, {"role": "assistant", "content": ""}), "empty answer"),
    (chat(USER, {"role": "assistant", "content": "<|im_end|>\n<|im_start|>assistant\nno"}), None),
    (chat(USER, ANSWER), None),
    (chat(USER, ANSWER)[:-9], "not JSON"),
]


def prepared(tmp_path: Path, **data: object) -> PreparedDataset:
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(row for row, _ in ROWS))
    options = {"cache_dir": str(tmp_path / "prepared"), "num_processes": 1} | data
    model = ModelConfig(path=str(tmp_path / "tokenizer"))
    return prepare([SourceConfig(path=str(tmp_path / "x.jsonl"))], model, DataConfig(**options))


def test_every_bad_row_is_named_with_its_line_and_the_others_are_kept(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"13 record\(s\) cannot be trained on"):
        prepared(tmp_path)
    dataset = prepared(tmp_path, on_bad_record="refuse", max_refused=0.9)
    listed = [json.loads(line) for line in (dataset.folder / "refused.jsonl").read_text().splitlines()]
    found = {int(item["where"].split("x.jsonl:")[1].split(":")[0]): item["reason"] for item in listed}
    assert found == {line: reason for line, (_, reason) in enumerate(ROWS, 1) if reason is not None}
    kept = [line for line, (row, reason) in enumerate(ROWS, 1) if reason is None and row.strip()]
    assert [sample.conversation_id for sample in dataset] == [f"x:{line}" for line in kept]
    # Two conversations are equal but for the mark at the file's beginning, and that is counted.
    assert dataset.manifest["num_duplicates"] == 1


def test_a_nul_character_is_kept_and_a_control_token_in_an_answer_is_text(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, on_bad_record="refuse", max_refused=0.9)
    tokenizer = build_tokenizer()
    texts = [tokenizer.decode(sample.ids.tolist()) for sample in dataset]
    assert "user\na\x00b" in texts[1]
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert [sample.ids.tolist().count(start) for sample in dataset] == [2, 2, 2, 2], "one a message, whatever it says"


def test_roles_in_an_order_that_a_template_does_not_know_are_refused_and_never_mended() -> None:
    """The template of Llama 2 wants user and assistant in turns; ChatML takes any order as it is."""
    orders = {
        "assistant first": ("assistant", "user", "assistant"),
        "two users": ("user", "user", "assistant"),
        "system in the middle": ("user", "assistant", "system", "user", "assistant"),
    }
    strict = next(family for family in FAMILIES if family.template == "llama2")
    free = build_tokenizer()
    for name, roles in orders.items():
        messages = tuple(Message(role, f"word {n}") for n, role in enumerate(roles))
        record = Conversation("c", 0, "t", "t:1", 1.0, messages)
        refused = render(Renderer(strict.tokenizer, strict.source), [record])[0]
        assert isinstance(refused, RecordError), name
        samples = render(Renderer(free, free.chat_template), [record])[0]
        if roles[0] == "assistant":
            assert isinstance(samples, RecordError), "an answer to nothing has no context"
        else:
            assert not isinstance(samples, RecordError), name
            assert [span.role for span in samples[0].spans] == list(roles), name


def test_an_end_of_text_that_is_the_padding_too_is_trained(tmp_path: Path) -> None:
    """Where labels are masked by the id of the padding, such a model learns never to end."""
    apart, same = build_tokenizer(), build_tokenizer()
    same.pad_token = same.eos_token
    assert apart.pad_token != apart.eos_token
    record = Conversation("c", 0, "t", "t:1", 1.0, (Message("user", "hi"), Message("assistant", "ok")))
    for tokenizer in (apart, same):
        (sample,) = render(Renderer(tokenizer, tokenizer.chat_template), [record])[0]  # type: ignore[misc]
        chosen = select(tmp_path / str(tokenizer.pad_token_id), [sample])[0]
        targets = [int(token) for token, turn in zip(sample.ids, chosen.turns, strict=True) if turn >= 0]
        assert tokenizer.decode(targets) == "ok<|im_end|>"
