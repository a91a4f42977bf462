"""What the launcher hands to a keeper on its command line: one word that no shell, ssh or other launcher can spoil.

deepspeed's launcher hands environment and arguments to other hosts through a remote shell, with quotes that do not hold
(blanks, dollar signs, quotes), and passes on few variables; this word carries both."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Contact:
    """Where keepers reach the launcher: any of `addresses`, and the word that shows them to be its own."""

    addresses: tuple[str, ...]
    port: int
    word: str


@dataclass(frozen=True)
class Parcel:
    """What to run as a rank: the words after `python -m`, variables to add, and whom to report to, if anybody.

    `log_dir` is where ranks above 0 write on their host; without one they write to the terminal.
    """

    program: tuple[str, ...]
    env: Mapping[str, str]
    contact: Contact | None
    log_dir: str | None = None


def encode(parcel: Parcel) -> str:
    content = json.dumps(asdict(parcel), separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


def decode(word: str) -> Parcel:
    content = json.loads(base64.urlsafe_b64decode(word + "=" * (-len(word) % 4)))
    contact = content["contact"]
    return Parcel(
        program=tuple(content["program"]),
        env=content["env"],
        log_dir=content["log_dir"],
        contact=contact and Contact(**{**contact, "addresses": tuple(contact["addresses"])}),
    )
