"""A tokenizer and a chat template: what a model folder says about how conversations become tokens.

Loads them with errors that name what is missing, and derives what rendering needs: which ids control, which texts
look like control, how text in the middle of a sequence is encoded.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from sft_dist.config import DataConfig, ModelConfig
from sft_dist.errors import ConfigError

TEMPLATES_DIR = Path(__file__).parent / "templates"


class Renderer:
    """A tokenizer, a chat template, and what follows from them: which ids control, which texts look like control."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.tokenizer = tokenizer
        self.template = template
        added = tokenizer.added_tokens_decoder  # id -> AddedToken
        self.control_ids = frozenset(i for i, token in added.items() if token.special) | frozenset(
            tokenizer.all_special_ids
        )
        self.control_texts = tuple(sorted({added[i].content for i in self.control_ids if i in added}))
        self.markup_texts = tuple(sorted({token.content for i, token in added.items() if i not in self.control_ids}))

    @cached_property
    def fingerprint(self) -> str:
        """Identity of tokenizer and template: what the token ids of a conversation depend on."""
        backend = self.tokenizer.backend_tokenizer.to_str()
        # The template sees eos_token and the like, which tokenizer.json does not hold.
        special = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}
        text = json.dumps([backend, self.template, special, sorted(self.control_ids)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def middle_backend(self) -> Any:
        """The same tokenizer for text in the middle of a sequence: it puts no space before it."""
        from tokenizers import Tokenizer

        return Tokenizer.from_str(json.dumps(self._middle_spec))

    @cached_property
    def plain_backend(self) -> Any:
        """The middle tokenizer without added tokens, for text that only looks like a control token."""
        from tokenizers import Tokenizer

        return Tokenizer.from_str(json.dumps(self._middle_spec | {"added_tokens": [], "post_processor": None}))

    @cached_property
    def _middle_spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for stage in ("normalizer", "pre_tokenizer"):
            spec[stage] = _without_prefix_space(spec[stage])
        return spec

    def apply(self, messages: Sequence[dict[str, str]], *, generation_prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.template, tokenize=False, add_generation_prompt=generation_prompt
            )
        )


def load_renderer(model: ModelConfig, data: DataConfig) -> Renderer:
    """The tokenizer of a model folder or Hub id with its template, or the one given. Raises ConfigError."""
    tokenizer = load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
    return Renderer(tokenizer, template_text(tokenizer, model.path, data.chat_template))


def load_tokenizer(model_path: str, *, trust_remote_code: bool) -> Any:
    """Raises ConfigError that names what is missing."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"model.path: {model_path}: no tokenizer can be loaded from there: {first_line}") from error
    if not tokenizer.vocab_size:
        # Without any tokenizer file transformers makes an empty one in silence.
        raise ConfigError(f"model.path: {model_path}: no tokenizer there (an empty vocabulary); its files are missing")
    if not tokenizer.is_fast:
        raise ConfigError(f"model.path: {model_path}: its tokenizer has no tokenizer.json (a fast tokenizer is needed)")
    if tokenizer.eos_token is None:
        raise ConfigError(f"model.path: {model_path}: its tokenizer names no eos_token, so no answer could end")
    return tokenizer


def template_text(tokenizer: Any, model_path: str, chat_template: str | None) -> str:
    """The template given, else the tokenizer's. Raises ConfigError when there is none."""
    if chat_template is not None:
        path = TEMPLATES_DIR / f"{chat_template}.jinja" if chat_template == "chatml" else Path(chat_template)
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"data.chat_template: {chat_template}: cannot be read: {error}") from None
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise ConfigError(
            f"model.path: {model_path}: its tokenizer has no chat template; "
            "set data.chat_template to a Jinja file, or to `chatml` for the one that ships"
        )
    return str(template)


def _without_prefix_space(stage: Any) -> Any:
    """A tokenizer stage (as in tokenizer.json) that does not prepend a space to its text."""
    if stage is None or stage["type"] == "Prepend":
        return None
    if stage["type"] == "Sequence":
        key = "normalizers" if "normalizers" in stage else "pretokenizers"
        parts = [part for part in map(_without_prefix_space, stage[key]) if part is not None]
        return stage | {key: parts}
    if stage["type"] == "Metaspace":
        return stage | {"prepend_scheme": "never"}
    if stage["type"] == "ByteLevel":
        return stage | {"add_prefix_space": False}
    return stage
