"""What was said: messages of one conversation, validated. No tokens, no templates."""

from dataclasses import dataclass

ROLES = ("system", "user", "assistant", "tool")


class RecordError(Exception):
    """A record that cannot become a trained sample. `reason` is what it is counted by, `detail` what was seen."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """`where` names the record for people (file:line), `index` is its place in the input order."""

    id: str
    index: int
    source: str
    where: str
    messages: tuple[Message, ...]


def check_text(text: str, what: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise RecordError("broken text", f"{what} has a lone surrogate, which is no Unicode text")


def check_messages(messages: tuple[Message, ...]) -> None:
    """Raise RecordError unless the messages can be trained on: known roles, real text, a non-empty answer."""
    for number, message in enumerate(messages, start=1):
        if message.role not in ROLES:
            raise RecordError(
                "unknown role", f"message {number} has role {message.role!r}; expected {', '.join(ROLES[:-1])} or tool"
            )
        check_text(message.content, f"message {number}")
        if message.role == "assistant" and not message.content.strip():
            raise RecordError("empty answer", f"message {number} is an assistant turn without text")
    if not any(message.role == "assistant" for message in messages):
        raise RecordError("no assistant turn", f"{len(messages)} messages, none with role 'assistant'")
