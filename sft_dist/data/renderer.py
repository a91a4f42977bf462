"""A tokenizer and a chat template together: how conversations become text, and text becomes tokens.

Runs the template, and derives what rendering needs: which ids control, how text in the middle of a sequence is
encoded, what the template does with tools and with today.
"""

import datetime
import hashlib
import json
import re
import string
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sft_dist.config import DataConfig, ModelConfig
from sft_dist.data.conversation import Message, RecordError
from sft_dist.data.marks import Marks
from sft_dist.data.tokenizer import load_tokenizer, template_text
from sft_dist.data.words import WordEncoder, bytes_of_piece, word_encoder
from sft_dist.errors import ConfigError

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


_GENERATION = re.compile(r"{%([-+]?)\s*generation\s*([-+]?)%}")
_END_GENERATION = re.compile(r"{%([-+]?)\s*endgeneration\s*([-+]?)%}")

# Where templates look for the reasoning of an answer.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


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
        control = [token.content for i, token in added.items() if i in self.control_ids]
        markup = [token.content for i, token in added.items() if i not in self.control_ids]
        self.marks = Marks(control, markup, template or "")
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
    def labelled_backend(self) -> Any:
        """The same tokenizer, with the tokens it puts around texts, for text that holds no control token."""
        from tokenizers import Tokenizer

        backend = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def _spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = json.loads(self.tokenizer.backend_tokenizer.to_str())
        return spec

    @cached_property
    def _middle_spec(self) -> dict[str, Any]:
        spec = dict(self._spec)
        for stage in ("normalizer", "pre_tokenizer"):
            spec[stage] = _without_prefix_space(spec[stage])
        return spec

    @cached_property
    def words(self) -> WordEncoder | None:
        """Encodes pieces of text faster than the backends, wherever they lie; None where it could not do the same."""
        if self.token_bytes is None:
            return None
        return word_encoder(self.tokenizer.backend_tokenizer, self._spec)

    @cached_property
    def token_bytes(self) -> list[bytes] | None:
        """[vocabulary] the bytes that each id decodes to; None where the tokenizer is not byte-level."""
        if self._spec["decoder"] is None or self._spec["decoder"]["type"] != "ByteLevel":
            return None
        decoded = [b""] * len(self.tokenizer)
        for token, i in self.tokenizer.get_vocab().items():
            decoded[i] = bytes_of_piece(token)
        return decoded

    @cached_property
    def byte_lengths(self) -> NDArray[np.int32] | None:
        """int32 [vocabulary]: bytes of text behind each id; None where the tokenizer is not byte-level."""
        if self.token_bytes is None:
            return None
        lengths = np.array(list(map(len, self.token_bytes)), np.int32)
        for i, token in self.tokenizer.added_tokens_decoder.items():
            lengths[i] = len(token.content.encode())
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
        if mark is None or self.marks.pattern is None:
            return None
        shown = [
            backend.decode(backend.encode(mark + text, add_special_tokens=False).ids, skip_special_tokens=False)
            for text in ("x", " x")
        ]
        if shown[0] != f"{mark} x":
            return None
        unless_space = "" if shown[1] == f"{mark}  x" else "(?! )"
        added = self.marks.pattern.pattern
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
        """The template's text.

        Raises RecordError where the template refuses the conversation, ConfigError where there is none, or no Jinja.
        """
        from jinja2 import TemplateError, TemplateSyntaxError

        if self._source is None:
            raise ConfigError(
                "model.path: its tokenizer has no chat template; set data.chat_template to a Jinja file, or to "
                "`chatml` for the one that ships"
            )
        variables = {"tools": list(tools) or None, "add_generation_prompt": generation_prompt}
        try:
            # The same at half the cost; transformers has names and an order of its own for reasoning.
            if self._compiled is not None and messages and not any("reasoning" in message for message in messages):
                return str(self._compiled.render(messages=messages, documents=None, **self._variables, **variables))
            text = self.tokenizer.apply_chat_template(
                list(messages), chat_template=self._source, tokenize=False, **self._kwargs, **variables
            )
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"the chat template (data.chat_template, else the tokenizer's) is not valid Jinja: line "
                f"{error.lineno}: {error.message}; mend it, or set data.chat_template to another"
            ) from None
        except (
            *(TemplateError, TypeError, KeyError, IndexError, ValueError),
            *(AttributeError, ArithmeticError, RecursionError),
        ) as error:
            raise RecordError("template error", f"the chat template refuses it: {error}") from None
        return str(text)

    @cached_property
    def _variables(self) -> dict[str, Any]:
        """What a template gets beside messages and tools."""
        return {**self.tokenizer.special_tokens_map, **self._kwargs}

    @cached_property
    def _compiled(self) -> Any:
        """The template as transformers compiles it; None where it would have to change what the template gets."""
        from transformers.utils import chat_template_utils

        compiled = getattr(chat_template_utils, "_compile_jinja_template", None)
        if compiled is None or self._source is None or not _is_plain(self._variables):
            return None
        # Marks around answers change no text, but cost a call each: as conditions they cost nothing.
        source = _GENERATION.sub(r"{%\1 if true \2%}", self._source)
        return compiled(_END_GENERATION.sub(r"{%\1 endif \2%}", source))

    def plain(self, message: Message) -> dict[str, Any]:
        """A message as the template gets it; an absent part is an absent key, as transformers has it."""
        tree: dict[str, Any] = {"role": message.role}
        if message.content is not None:
            tree["content"] = message.content
        elif self._tool_syntax[1]:
            tree["content"] = ""
        if message.reasoning is not None:
            tree |= dict.fromkeys(REASONING_KEYS, message.reasoning)
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

    @cached_property
    def plain_stop(self) -> str | None:
        """The control token that ends an answer without tool calls; None where there is none."""
        word = "answerx"
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": word}]
        try:
            text = self.apply(messages, generation_prompt=False)
        except RecordError:
            return None
        stop = next(self.marks.control_in(text, text.rfind(word) + len(word)), None) if word in text else None
        return stop.group() if stop else None

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


def load_renderer(model: ModelConfig, data: DataConfig, *, is_labelled: bool = False) -> Renderer:
    """The tokenizer of a model folder or Hub id with its template, or the one given. Raises ConfigError.

    Without labels, answers have to end: the tokenizer needs an eos_token then.
    """
    tokenizer = load_tokenizer(model)
    if tokenizer.eos_token is None and not is_labelled:
        raise ConfigError(f"model.path: {model.path}: its tokenizer names no eos_token, so no answer could end")
    template = template_text(tokenizer, data.chat_template)
    renderer = Renderer(tokenizer, template, date=data.date, template_kwargs=data.template_kwargs)
    if template is not None:
        _ = renderer.answer_header  # a template that is no Jinja is told once, before any data are read
    return renderer


def _is_plain(value: Any) -> bool:
    """Whether a tree is of JSON's own types."""
    if type(value) is dict:
        return all(type(key) is str and _is_plain(item) for key, item in value.items())
    if type(value) is list:
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, int, float, bool)


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
