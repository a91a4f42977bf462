"""Keep secrets out of what a run writes and says. Pure: text, or a tree of JSON, in; the same without secrets out.

A secret is the value of an environment variable whose name says so (HF_TOKEN, WANDB_API_KEY), the user of a URL, a
signature in its query, or a text of a form that only access tokens have.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

MASK = "[redacted]"
_SHORTEST = 8  # shorter values are words such as `true`, which would be masked everywhere
_SECRET_NAME = re.compile(
    r"(?i)(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|APIKEY|(API|ACCESS|SECRET|PRIVATE|AUTH)_?KEY)(_|$)"
)
_URL_USER = re.compile(r"(?<=://)[^\s/@:'\"]*(:[^\s/@'\"]*)?(?=@)")
_URL_QUERY = re.compile(
    r"(?i)([?&](?:token|access_token|api_?key|key|sig|signature|password|x-amz-[a-z-]+)=)[^&\s'\"]+"
)
_FORMS = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16})\b"
    r"|(?i:(?<=bearer )[A-Za-z0-9._~+/-]{16,})"
)


def find_secrets(env: Mapping[str, str]) -> tuple[str, ...]:
    """Values of variables that are named like secrets, longest first; a path to a secret is none."""
    values = {
        value
        for name, value in env.items()
        if _SECRET_NAME.search(name)
        and len(value) >= _SHORTEST
        and not value.startswith(("/", "./", "~"))
        and value not in MASK  # masked twice must be masked once
    }
    return tuple(sorted(values, key=lambda value: (-len(value), value)))


def redact(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, MASK)
    text = _URL_USER.sub(MASK, text)
    text = _URL_QUERY.sub(rf"\1{MASK}", text)
    return _FORMS.sub(MASK, text)


def redact_tree(tree: Any, secrets: Sequence[str]) -> Any:
    """The same tree of dicts, lists and values, all its texts redacted, keys too."""
    match tree:
        case str():
            return redact(tree, secrets)
        case dict():
            return {redact_tree(key, secrets): redact_tree(value, secrets) for key, value in tree.items()}
        case list() | tuple():
            return [redact_tree(item, secrets) for item in tree]
        case _:
            return tree


class RedactedStream:
    """A text stream that hands on everything written to it, redacted."""

    def __init__(self, stream: TextIO, secrets: Sequence[str]) -> None:
        self._stream, self._secrets = stream, secrets

    def write(self, text: str) -> int:
        self._stream.write(redact(text, self._secrets))
        return len(text)

    def writelines(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
