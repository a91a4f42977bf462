"""The tokenizer and the template of a model folder or Hub id, with errors that name what is missing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft_dist.config import ModelConfig
from sft_dist.errors import ConfigError

TEMPLATES_DIR = Path(__file__).parent / "templates"


def load_tokenizer(model: ModelConfig) -> Any:
    """The tokenizer of a model folder or Hub id, with model.control_tokens. Raises ConfigError for what is missing."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"model.path: {model.path}: no tokenizer can be loaded from there: {first_line}") from error
    if not tokenizer.vocab_size:
        # Without any tokenizer file transformers makes an empty one in silence.
        raise ConfigError(f"model.path: {model.path}: no tokenizer there (an empty vocabulary); its files are missing")
    if not tokenizer.is_fast:
        raise ConfigError(f"model.path: {model.path}: its tokenizer has no tokenizer.json (a fast tokenizer is needed)")
    # What tokenizer.json says about lengths would cut or fill every text that is encoded here.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    _make_special(tokenizer, model.control_tokens)
    return tokenizer


def _make_special(tokenizer: Any, texts: Sequence[str]) -> None:
    """Add control tokens that a tokenizer lacks, in this order; those it has get special where they are not yet."""
    for text in texts:
        if not text or text != text.strip() or text != text.encode("utf-8", "replace").decode():
            raise ConfigError(
                f"model.control_tokens: {text!r} is empty, has white space around it or is not valid Unicode; write "
                "the token exactly as the chat template does"
            )
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(tokenizer.all_special_tokens)
    if wanted := [text for text in dict.fromkeys(texts) if text not in special]:
        tokenizer.add_special_tokens({"additional_special_tokens": wanted}, False)  # False: beside those it has


def template_text(tokenizer: Any, chat_template: str | None) -> str | None:
    """The template given, else the tokenizer's, if any. Raises ConfigError for a file that cannot be read."""
    if chat_template is not None:
        path = TEMPLATES_DIR / f"{chat_template}.jinja" if chat_template == "chatml" else Path(chat_template)
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"data.chat_template: {chat_template}: cannot be read: {error}") from None
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return str(template) if template else None
