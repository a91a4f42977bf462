"""What looks like a secret is masked wherever text leaves, and nothing else is touched."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.redaction import MASK, RedactedStream, find_secrets, redact, redact_tree

SECRET_NAMES = [
    "HF_TOKEN",
    "WANDB_API_KEY",
    "DB_PASSWORD",
    "AWS_SECRET_ACCESS_KEY",
    "HUGGING_FACE_HUB_TOKEN",
    "my_secret",
]
WORDS = st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=8, max_size=30)


@given(st.sampled_from(SECRET_NAMES), WORDS, st.text(), st.text())
def test_the_value_of_a_secret_variable_never_comes_through(name: str, value: str, before: str, after: str) -> None:
    secrets = find_secrets({name: value, "HOME": "/root"})
    if value in MASK:
        assert not secrets, "what is masked twice would not be what is masked once"
        return
    assert secrets == (value,)
    assert value not in redact(f"{before}{value}{after}", secrets).replace(MASK, "\0")
    tree = {"a": [before + value, {value: (value, 3, None)}]}
    assert value not in json.dumps(redact_tree(tree, secrets), ensure_ascii=False).replace(MASK, "\0")


def test_a_secret_inside_another_one_leaves_no_rest() -> None:
    secrets = find_secrets({"A_TOKEN": "12345678", "B_TOKEN": "12345678-and-more"})
    assert redact("12345678-and-more 12345678", secrets) == f"{MASK} {MASK}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "falsefalse"),
        ("MAX_TOKENS", "100000000"),
        ("HF_TOKEN_PATH", "/secrets/token"),
        ("HF_TOKEN", "true"),
        ("KEYBOARD", "qwertyuiop"),
        ("SSH_AUTH_SOCK", "agent-socket-1"),
    ],
)
def test_what_is_no_secret_is_not_taken_for_one(name: str, value: str) -> None:
    assert find_secrets({name: value}) == ()


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("https://user:pa55@host/a", f"https://{MASK}@host/a"),
        ("s3://AKIAABCDEFGHIJKLMNOP@bucket", f"s3://{MASK}@bucket"),
        ("get https://h/f?token=abc123&x=1", f"get https://h/f?token={MASK}&x=1"),
        ("Authorization: Bearer abcdefghijklmnop1234", f"Authorization: Bearer {MASK}"),
        ("my hf_abcdefghijklmnopqrstuvwx here", f"my {MASK} here"),
    ],
)
def test_credentials_are_known_by_their_form(text: str, masked: str) -> None:
    assert redact(text, ()) == masked


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/Qwen/Qwen2.5-0.5B",
        "hf://datasets/owner/name@main",
        "name@example.org",
        "step 120/2,340 loss 1.1843",
        "data/train.jsonl:417: message 3 has role 'bot'",
        "da39a3ee5e6b4b0d3255bfef95601890afd80709",
        "a sketch of sk-learn",
    ],
)
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert redact(text, ()) == text


def test_a_stream_masks_what_is_printed_and_is_otherwise_the_stream() -> None:
    inner = io.StringIO()
    stream = RedactedStream(inner, ("hunter2-hunter2",))
    print("a hunter2-hunter2 b", file=stream)
    stream.writelines(["hunter2-hunter2"])
    stream.flush()
    assert inner.getvalue() == f"a {MASK} b\n{MASK}" and stream.isatty() is False
