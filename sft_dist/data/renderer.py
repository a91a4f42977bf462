"""A tokenizer and a chat template: what a model folder says about how conversations become tokens.

Loads them with errors that name what is missing, and derives what rendering needs: which ids control, which texts
look like control, how text in the middle of a sequence is encoded, what the template does with tools.
"""

import datetime
import hashlib
import json
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sft_dist.config import DataConfig, ModelConfig
from sft_dist.data.conversation import Message, RecordError
from sft_dist.errors import ConfigError

TEMPLATES_DIR = Path(__file__).parent / "templates"

# Templates ask for today with strftime_now("%d %b %Y"): a macro of that name answers with data.date instead.
_TODAY_MACRO = (
    "{% macro strftime_now(format) %}{% set state = namespace(directive='') %}{% for letter in format %}"
    "{% if state.directive %}{% set state.directive = state.directive + letter %}"
    "{% if letter not in '-_0^#' %}{{ sft_dist_today[state.directive] }}{% set state.directive = '' %}{% endif %}"
    "{% elif letter == '%' %}{% set state.directive = '%' %}{% else %}{{ letter }}{% endif %}"
    "{% endfor %}{% endmacro %}{{ '' }}"
)
_DIRECTIVES = [f"%{flag}{letter}" for flag in ("", *"-_0^#") for letter in (*string.ascii_letters, "%")]

_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "d",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string", "description": "d"}}},
    },
}


class Renderer:
    """A tokenizer, a chat template with its variables, and what follows from them."""

    def __init__(
        self,
        tokenizer: Any,
        template: str | None,
        *,
        date: datetime.date | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        added = tokenizer.added_tokens_decoder  # id -> AddedToken
        self.control_ids = frozenset(i for i, token in added.items() if token.special) | frozenset(
            tokenizer.all_special_ids
        )
        self.control_texts = tuple(sorted({added[i].content for i in self.control_ids if i in added}))
        self.markup_texts = tuple(sorted({token.content for i, token in added.items() if i not in self.control_ids}))
        self._date = date or DataConfig().date
        self._kwargs = dict(template_kwargs or {})
        self.asks_for_today = "strftime_now" in (template or "")
        self._source = template
        if self.asks_for_today:
            self._source = f"{_TODAY_MACRO}{template}"
            self._kwargs["sft_dist_today"] = {directive: self._date.strftime(directive) for directive in _DIRECTIVES}

    def __getstate__(self) -> dict[str, Any]:
        """What was derived stays at home: it is quicker made anew than sent to another process."""
        derived = {name for name, value in vars(type(self)).items() if isinstance(value, cached_property)}
        return {name: value for name, value in vars(self).items() if name not in derived}

    @cached_property
    def fingerprint(self) -> str:
        """Identity of tokenizer and template: what the token ids of a conversation depend on."""
        backend = self.tokenizer.backend_tokenizer.to_str()
        # The template sees eos_token and the like, which tokenizer.json does not hold.
        special = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}
        text = json.dumps([backend, self.template, special, sorted(self.control_ids), self._kwargs], sort_keys=True)
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

    @cached_property
    def control_pattern(self) -> re.Pattern[str] | None:
        return _any_of(self.control_texts)

    def matches_of_control(self, text: str, begin: int, end: int | None = None) -> Iterator[re.Match[str]]:
        """Control tokens in a part of a text, in order."""
        if self.control_pattern is None:
            return iter(())
        return self.control_pattern.finditer(text, begin, len(text) if end is None else end)

    @cached_property
    def mark_pattern(self) -> re.Pattern[str] | None:
        """Texts of control and markup tokens."""
        return _any_of((*self.control_texts, *self.markup_texts))

    def may_join(self, text: str) -> bool:
        """Whether a text may be part of a mark: it ends in the beginning of one, begins with an end, or is inside."""
        beginnings, ends, longest = self._parts_of_marks
        if not text or not longest:
            return False
        # The sets are a quick test: most texts hold none of these characters near their edges.
        return (
            (not self._edges_of_marks[0].isdisjoint(text[-longest:]) and text.endswith(beginnings))
            or (not self._edges_of_marks[1].isdisjoint(text[:longest]) and text.startswith(ends))
            or (len(text) < longest and text in "\0".join(self.control_texts + self.markup_texts))
        )

    @cached_property
    def _parts_of_marks(self) -> tuple[tuple[str, ...], tuple[str, ...], int]:
        marks = self.control_texts + self.markup_texts
        beginnings = {mark[:end] for mark in marks for end in range(1, len(mark))}
        ends = {mark[start:] for mark in marks for start in range(1, len(mark))}
        return tuple(beginnings), tuple(ends), max(map(len, marks), default=0)

    @cached_property
    def _edges_of_marks(self) -> tuple[frozenset[str], frozenset[str]]:
        marks = [mark for mark in self.control_texts + self.markup_texts if mark]
        return frozenset(mark[0] for mark in marks), frozenset(mark[-1] for mark in marks)

    def marks_in(self, text: str) -> list[str]:
        """Texts of control and markup tokens that occur in a text."""
        if not any(beginning in text for beginning in self._mark_beginnings):
            return []
        return [mark for mark in self.control_texts + self.markup_texts if mark and mark in text]

    def between_marks(self, text: str) -> list[str]:
        """What a text says between control tokens, markup tokens and tags, without white space around it."""
        pieces = [text] if self._mark_pattern is None else self._mark_pattern.split(text)
        return [piece.strip() for piece in pieces if piece.strip()]

    def without_channels(self, text: str) -> str:
        """Without words that the template itself writes between two control tokens (<|channel|>final<|message|>)."""
        for framed, marks in self._channels:
            text = text.replace(framed, marks)
        return text

    @cached_property
    def _mark_beginnings(self) -> frozenset[str]:
        """A quick test: most texts hold none of them."""
        return frozenset(mark[:2] for mark in self.control_texts + self.markup_texts if mark)

    @cached_property
    def _mark_pattern(self) -> re.Pattern[str] | None:
        # A tag that the template writes is a mark as well, also where the tokenizer has no token for it.
        tags = re.findall(r"</?[\w|]+>", self.template or "")
        return _any_of((*self.control_texts, *self.markup_texts, *tags))

    @cached_property
    def _channels(self) -> list[tuple[str, str]]:
        if self.control_pattern is None or self.template is None:
            return []
        control = self.control_pattern.pattern
        found = re.findall(f"(?=(({control})\\w+({control})))", self.template)
        # Neighbours share a control token, so the longest chain of frames is what is replaced first.
        return sorted({(framed, first + last) for framed, first, last in found}, key=lambda pair: -len(pair[0]))

    @cached_property
    def byte_lengths(self) -> NDArray[np.int32] | None:
        """int32 [vocabulary]: bytes of text behind each id; None where the tokenizer is not byte-level."""
        if self._middle_spec["decoder"] is None or self._middle_spec["decoder"]["type"] != "ByteLevel":
            return None
        added = self.tokenizer.added_tokens_decoder
        lengths = np.zeros(len(self.tokenizer), np.int32)
        for token, i in self.tokenizer.get_vocab().items():
            # Every character of a byte-level piece stands for one byte.
            lengths[i] = len(added[i].content.encode()) if i in added else len(token)
        return lengths

    @cached_property
    def text_edges(self) -> tuple[list[int], list[int]]:
        """Ids that come before and after a plain text: what the tokenizer puts there, and eos at the end."""
        backend = self.tokenizer.backend_tokenizer
        bare = backend.encode("x", add_special_tokens=False).ids
        whole = backend.encode("x", add_special_tokens=True).ids
        at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        before, after = whole[:at], whole[at + len(bare) :]
        return before, after if self.tokenizer.eos_token_id in after else [*after, self.tokenizer.eos_token_id]

    @cached_property
    def section_start(self) -> re.Pattern[str] | None:
        """The added token before every section that gets a space at its start (Llama 2, T5); None: none does."""
        mark, backend = self.tokenizer.eos_token, self.tokenizer.backend_tokenizer
        if mark is None or self.mark_pattern is None:
            return None
        shown = [
            backend.decode(backend.encode(mark + text, add_special_tokens=False).ids, skip_special_tokens=False)
            for text in ("x", " x")
        ]
        if shown[0] != f"{mark} x":
            return None
        unless_space = "" if shown[1] == f"{mark}  x" else "(?! )"
        added = self.mark_pattern.pattern
        return re.compile(f"(?:{added})(?!{added}|\\Z){unless_space}")

    @cached_property
    def swallowed(self) -> re.Pattern[str] | None:
        """White space that control tokens swallow (Phi-3's <|end|> takes the newline after it)."""
        added = self.tokenizer.added_tokens_decoder.values()
        parts = [f"(?<={re.escape(token.content)})\\s+" for token in added if token.rstrip]
        parts += [f"\\s+(?={re.escape(token.content)})" for token in added if token.lstrip]
        return re.compile("|".join(parts)) if parts else None

    def apply(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = (), *, generation_prompt: bool
    ) -> str:
        """The template's text. Raises RecordError where the template refuses the conversation."""
        from jinja2 import TemplateError

        if self._source is None:
            raise ConfigError(
                "model.path: its tokenizer has no chat template; set data.chat_template to a Jinja file, or to "
                "`chatml` for the one that ships"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                chat_template=self._source,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **self._kwargs,
            )
        except (
            *(TemplateError, TypeError, KeyError, IndexError, ValueError),
            *(AttributeError, ArithmeticError, RecursionError),
        ) as error:
            raise RecordError("template error", f"the chat template refuses it: {error}") from None
        return str(text)

    def plain(self, message: Message) -> dict[str, Any]:
        """A message as the template gets it; an absent part is an absent key, as transformers has it."""
        tree: dict[str, Any] = {"role": message.role}
        if message.content is not None:
            tree["content"] = message.content
        elif self._tool_syntax[1]:
            tree["content"] = ""
        if message.reasoning is not None:
            tree |= {"reasoning_content": message.reasoning, "reasoning": message.reasoning}
            tree["thinking"] = message.reasoning
        if message.tool_calls:
            tree["tool_calls"] = [self._plain_call(call.name, call.arguments, call.id) for call in message.tool_calls]
        if message.name is not None:
            tree["name"] = message.name
        if message.tool_call_id is not None:
            tree["tool_call_id"] = message.tool_call_id
        return tree

    @cached_property
    def answer_header(self) -> str:
        """What the template writes before an answer, if it is what a prompt adds to a conversation."""
        messages = [{"role": "user", "content": "a"}]
        try:
            before = self.apply(messages, generation_prompt=False)
            prompt = self.apply(messages, generation_prompt=True)
        except RecordError:
            return ""
        return prompt.removeprefix(before) if prompt.startswith(before) else ""

    @property
    def shows_tools(self) -> bool:
        """Whether the template writes the schemas of the tools on offer."""
        return self._tools_shown

    @property
    def shows_tool_calls(self) -> bool:
        return self._tool_syntax[0] != "none"

    def _plain_call(self, name: str, arguments: dict[str, Any], identity: str | None) -> dict[str, Any]:
        written = arguments if self._tool_syntax[0] != "string" else json.dumps(arguments, ensure_ascii=False)
        call = {"type": "function", "function": {"name": name, "arguments": written}}
        return call if identity is None else {"id": identity} | call

    @cached_property
    def _tools_shown(self) -> bool:
        try:
            text = self.apply([{"role": "user", "content": "a"}], [_PROBE_TOOL], generation_prompt=True)
        except RecordError:
            return False
        return "probe_tool" in text

    @cached_property
    def _tool_syntax(self) -> tuple[Literal["mapping", "string", "none"], bool]:
        """How the template wants the arguments of a call, and whether it needs "" for content that is null.

        Some write `arguments | tojson`, some `'...' + arguments`: the form that comes out as JSON is the right one.
        """
        arguments = {"probe_key": "probe_value"}
        for empty_content in (False, True):
            for form in ("mapping", "string"):
                written = arguments if form == "mapping" else json.dumps(arguments)
                call = {"type": "function", "id": "probe0001", "function": {"name": "probe_tool", "arguments": written}}
                answer = {"role": "assistant", "tool_calls": [call]} | ({"content": ""} if empty_content else {})
                try:
                    text = self.apply(
                        [{"role": "user", "content": "a"}, answer], [_PROBE_TOOL], generation_prompt=False
                    )
                except RecordError:
                    continue
                shown = "probe_value" in text and "'probe_key'" not in text and '\\"probe_key' not in text
                if shown and "probe_tool" in text:
                    return form, empty_content
        return "none", True

    @lru_cache(maxsize=4096)  # noqa: B019 - one renderer lives as long as its process
    def hidden_messages(self, roles: tuple[str, ...]) -> frozenset[int]:
        """Numbers of the messages whose content the template leaves out of a conversation of these roles."""
        words = [f"word{number}x" for number in range(len(roles))]
        messages = [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]
        try:
            text = self.apply(messages, generation_prompt=False)
        except RecordError:
            return frozenset()  # it needs calls before results, say; the real text is checked all the same
        return frozenset(number for number, word in enumerate(words) if word not in text)

    @lru_cache(maxsize=1024)  # noqa: B019
    def encode_written(self, text: str) -> tuple[int, ...]:
        """Ids of text that looks like a control token, none of which is one. Raises RecordError."""
        ids = self.plain_backend.encode(text, add_special_tokens=False).ids
        if not self.control_ids.isdisjoint(ids):
            # Unigram vocabularies hold control tokens as ordinary pieces: letter by letter none can match.
            ids = [i for letter in text for i in self.plain_backend.encode(letter, add_special_tokens=False).ids]
        if not self.control_ids.isdisjoint(ids):
            raise RecordError("control text", f"{text!r} cannot be written in this tokenizer without a control token")
        return tuple(ids)


def load_renderer(model: ModelConfig, data: DataConfig) -> Renderer:
    """The tokenizer of a model folder or Hub id with its template, or the one given. Raises ConfigError."""
    tokenizer = load_tokenizer(model)
    template = template_text(tokenizer, data.chat_template)
    return Renderer(tokenizer, template, date=data.date, template_kwargs=data.template_kwargs)


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
    if tokenizer.eos_token is None:
        raise ConfigError(f"model.path: {model.path}: its tokenizer names no eos_token, so no answer could end")
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


def _any_of(texts: Sequence[str]) -> re.Pattern[str] | None:
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


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
