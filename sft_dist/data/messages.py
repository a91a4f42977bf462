"""Messages, tools and tool calls as OpenAI and ShareGPT write them: JSON values to values of data/conversation.py.

A message is read by its own keys (`role` and `content`, or `from` and `value`), wherever it stands.
"""

from collections.abc import Mapping
from typing import Any

from sft_dist.data.conversation import ROLES, Message, RecordError, ToolCall
from sft_dist.data.parsing import kind, parse_json, short

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
REASONING = ("reasoning_content", "reasoning", "thinking")

# What would change the training here or in other tools, and what to write instead.
MEDIA = dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "only text is trained on")
_MARKS = dict.fromkeys(("loss", "loss_mask", "mask", "trainable", "training"), "write `train: true` or `train: false`")
_REFUSED = (
    MEDIA
    | _MARKS
    | {
        "train_detail": "parts of a message cannot be marked",
        "refusal": "write it as `content`",
    }
)


def messages_of(value: Any, field: str) -> tuple[Message, ...]:
    """A list of messages. Raises RecordError."""
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else kind(value)
        raise RecordError("no messages", f"`{field}` must be a list with messages in it, found {found}")
    name = "message" if field in ("messages", "conversations") else f"{field} message"
    return tuple(message_of(item, f"{name} {number}") for number, item in enumerate(value, start=1))


def message_of(item: Any, what: str) -> Message:
    """One message, which errors call `what`. Raises RecordError."""
    if not isinstance(item, dict):
        raise RecordError("not a message", f"{what} must be an object, found {kind(item)}")
    refuse_fields(item, _REFUSED, what)
    role, content, calls = item.get("role"), item.get("content"), item.get("tool_calls")
    if role is None and item.get("from") is not None:
        role, content = _sharegpt_role(item["from"], what), item.get("value")
        if item["from"] == "function_call":
            content, calls = None, content
    if item.get("function_call") is not None:
        if calls:
            raise RecordError("tool call", f"{what} has both `tool_calls` and `function_call`")
        calls = item["function_call"]
    if not isinstance(role, str):
        raise RecordError("unknown role", f"{what} has role {short(role)}; expected one of {', '.join(ROLES[:-1])}")
    role = "tool" if role == "function" else role
    what = f"{what} ({role})"
    return Message(
        role,
        _content(content, what),
        reasoning=_reasoning(item, what),
        tool_calls=_tool_calls(calls, what),
        name=_optional_text(item, "name", what),
        tool_call_id=_optional_text(item, "tool_call_id", what),
        train=_train(item.get("train"), what),
        weight=weight_of(item.get("weight"), what),
    )


def tools_of(fields: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The tools that a record offers, each as {"type": "function", "function": {...}}. Raises RecordError."""
    given = [name for name in ("tools", "functions") if fields.get(name) not in (None, "", [])]
    if len(given) > 1:
        raise RecordError("tools", "the record has both `tools` and `functions`")
    if not given:
        return ()
    tools = _parsed(fields[given[0]], f"`{given[0]}`") or []
    if not isinstance(tools, list):
        raise RecordError("tools", f"`{given[0]}` must be a list of tools, found {kind(tools)}")
    return tuple(_tool(tool, f"tool {number}") for number, tool in enumerate(tools, start=1))


def weight_of(value: Any, what: str) -> float:
    """A weight that survives float32; 0 takes its owner out of training."""
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RecordError("weight", f"{what}: weight must be a number, found {kind(value)}")
    if value != 0 and not 1e-30 <= value <= 1e30:
        raise RecordError("weight", f"{what}: weight must be 0 (not trained) or between 1e-30 and 1e30, found {value}")
    return float(value)


def refuse_fields(fields: Mapping[str, Any], refused: Mapping[str, str], what: str) -> None:
    """Fields that say something about training and cannot be followed must not be dropped in silence."""
    if refused.keys().isdisjoint(fields):
        return
    for name, instead in refused.items():
        if fields.get(name) not in (None, "", [], {}):
            raise RecordError("unsupported field", f"{what} has `{name}`: {instead}")


def _sharegpt_role(name: Any, what: str) -> str:
    if not isinstance(name, str) or name not in SHAREGPT_ROLES:
        raise RecordError("unknown role", f"{what} is from {short(name)}; expected one of {', '.join(SHAREGPT_ROLES)}")
    return SHAREGPT_ROLES[name]


def _content(value: Any, what: str) -> str | None:
    """Text, or null, or text parts joined as they stand."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RecordError("no text", f"{what}: content must be text or a list of text parts, found {kind(value)}")
    texts = []
    for number, part in enumerate(value, start=1):
        if not isinstance(part, dict):
            raise RecordError("no text", f"{what}: part {number} of the content must be an object, found {kind(part)}")
        if part.get("type") != "text":
            raise RecordError(
                "unsupported content", f"{what}: part {number} is of type {short(part.get('type'))}, not 'text'"
            )
        if not isinstance(part.get("text"), str):
            raise RecordError("no text", f"{what}: `text` of part {number} is {kind(part.get('text'))}")
        texts.append(part["text"])
    return "".join(texts)


def _reasoning(item: Mapping[str, Any], what: str) -> str | None:
    """What the author wrote under any of the usual names; an empty text is none."""
    found = {name: item[name] for name in REASONING if item.get(name) not in (None, "")}
    for name, text in found.items():
        if not isinstance(text, str):
            raise RecordError("no text", f"{what}: `{name}` must be text, found {kind(text)}")
    if len(set(found.values())) > 1:
        raise RecordError("unsupported field", f"{what} has different texts in {' and '.join(found)}")
    return next(iter(found.values()), None)


def _tool_calls(value: Any, what: str) -> tuple[ToolCall, ...]:
    if value is None or value == []:
        return ()
    calls = _parsed(value, f"{what}: the tool call")
    return tuple(_tool_call(call, what) for call in (calls if isinstance(calls, list) else [calls]))


def _tool_call(call: Any, what: str) -> ToolCall:
    if not isinstance(call, dict):
        raise RecordError("tool call", f"{what}: a tool call must be an object, found {kind(call)}")
    if call.get("type") not in (None, "function"):
        raise RecordError("tool call", f"{what}: a tool call is of type {short(call['type'])}, not 'function'")
    function = call if call.get("function") is None else call["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RecordError("tool call", f"{what}: a tool call names no function")
    name, written = function["name"], function.get("arguments")
    arguments = {} if written is None else _parsed(written, f"{what}: arguments of {name!r}")
    if not isinstance(arguments, dict):
        raise RecordError(
            "tool call",
            f"{what}: arguments of {name!r} must be an object, found {kind(arguments)}: {short(written)}",
        )
    return ToolCall(name, arguments, _optional_text(call, "id", f"{what}: the call of {name!r}"))


def _tool(tool: Any, what: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise RecordError("tools", f"{what} must be an object, found {kind(tool)}")
    if tool.get("type") not in (None, "function"):
        raise RecordError("tools", f"{what} is of type {short(tool['type'])}, not 'function'")
    function = tool.get("function")
    if function is None:  # the function alone, as ShareGPT data and the older OpenAI format have it
        function = {key: value for key, value in tool.items() if key not in ("type", "function")}
        tool = {"type": "function", "function": function}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RecordError("tools", f"{what} names no function")
    return {"type": "function"} | tool


def _parsed(value: Any, what: str) -> Any:
    return parse_json(value, what) if isinstance(value, str) else value


def _optional_text(item: Mapping[str, Any], name: str, what: str) -> str | None:
    value = item.get(name)
    if value is not None and not isinstance(value, str):
        raise RecordError("no text", f"{what}: `{name}` must be text, found {kind(value)}")
    return value


def _train(value: Any, what: str) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise RecordError("train mark", f"{what}: `train` must be true or false, found {short(value)}")
    return value
