"""A row of conversation data, checked: what a chat template may rely on, whoever wrote the row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_m1.data.tokenize.documents import BadDocumentError, SkipReason
from megatron_m1.printing import shown

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING = "reasoning_content"
_REASONING_NAMES = (REASONING, "reasoning", "thinking")
"""Names under which data has it; the first that is there counts."""


@dataclass(frozen=True)
class Conversation:
    """Messages, each with ``role`` and ``content``; see ``parse_conversation``."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    """Definitions of tools as the template gets them; None if there are none."""

    def until(self, end: int) -> Conversation:
        """The first ``end`` messages."""
        return Conversation(self.messages[:end], self.tools)

    @property
    def turn_ends(self) -> list[int]:
        """How many messages there are up to the end of each turn: from a user's message to what answers it, tools
        included. Only turns in which the assistant speaks count."""
        ends = []
        for number, message in enumerate(self.messages):
            following = self.messages[number + 1]["role"] if number + 1 < len(self.messages) else "user"
            # What an application says between a question and its answer is not an end.
            if message["role"] in ("assistant", "tool") and following not in ("assistant", "tool"):
                ends.append(number + 1)
        return ends


def texts_of(content: str | list[dict[str, Any]]) -> list[str]:
    """The texts of a message's content."""
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def parse_conversation(record: Mapping[str, Any], key: str) -> Conversation:
    """Check a row.

    Args:
        record: a JSON object.
        key: of its messages; ``tools`` is read beside it, as a list or as the JSON text of one.

    Returns:
        The conversation, every message with a content that is a string or a list of parts with ``type`` and ``text``;
        arguments of tool calls are objects, calls have the form ``{"type": "function", "function": {"name": ...,
        "arguments": ...}}``, reasoning is in ``reasoning_content``, and a tool's result knows the ``name`` of its tool
        where the call that it answers is known.

    Raises:
        BadDocumentError: it is no conversation; says what is wrong in a line.
        UnicodeEncodeError: it spells half a surrogate pair.
    """
    messages = record[key]
    if not isinstance(messages, list) or not messages:
        raise _bad(f"{key} is {shown(messages)}, not a list of messages")
    # Deep nesting can't be spelled either, and no template wants it.
    try:
        json.dumps([messages, record.get("tools")], ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise _bad(f"{key} is nested too deeply") from error
    parsed = [_message(message, number) for number, message in enumerate(messages)]
    names = {call["id"]: call["function"]["name"] for message in parsed for call in _calls(message) if "id" in call}
    for message in parsed:
        answered = message.get("tool_call_id")
        if message["role"] == "tool" and "name" not in message and isinstance(answered, str) and answered in names:
            message["name"] = names[answered]
    return Conversation(parsed, _tools(record.get("tools")))


def _calls(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    yield from message.get("tool_calls", ())


def _bad(detail: str) -> BadDocumentError:
    return BadDocumentError(SkipReason.NOT_CHAT, detail=detail)


def _message(message: object, number: int) -> dict[str, Any]:
    where = f"message {number + 1}"
    if not isinstance(message, dict):
        raise _bad(f"{where} is {shown(message)}, not an object")
    role = message.get("role")
    if role not in ROLES:
        raise _bad(f"{where} has the role {shown(role)}, not one of {', '.join(ROLES)}")
    parsed = {name: value for name, value in message.items() if value is not None and name not in _REASONING_NAMES}
    parsed["content"] = _content(message.get("content"), where)
    reasoning = next((message[name] for name in _REASONING_NAMES if message.get(name)), None)
    if role != "assistant":
        for name in ("tool_calls", REASONING):
            if parsed.get(name) or (name == REASONING and reasoning):
                raise _bad(f"{where} has {name}, which is the assistant's, and the role {role}")
        return parsed
    if reasoning is not None:
        if not isinstance(reasoning, str):
            raise _bad(f"{where} has a {REASONING} that is {shown(reasoning)}, not a text")
        parsed[REASONING] = reasoning
    parsed.pop("tool_calls", None)
    calls = message.get("tool_calls")
    if calls:
        if not isinstance(calls, list):
            raise _bad(f"{where} has tool_calls that are {shown(calls)}, not a list")
        parsed["tool_calls"] = [_call(call, where) for call in calls]
    return parsed


def _content(content: object, where: str) -> str | list[dict[str, Any]]:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _bad(f"{where} has a content that is {shown(content)}, neither a text nor a list of parts")
    parts = []
    for part in content:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
        elif isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text"} | part)
        else:
            raise _bad(f"{where} has a part that is no text: {shown(part)}")
    return parts


def _call(call: object, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _bad(f"{where} has a tool call without a name: {shown(call)}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError:
            arguments = None
    elif arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise _bad(f"{where} calls {function['name']} with {shown(function.get('arguments'))}, not an object")
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return identity | {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(tools: object) -> list[dict[str, Any]] | None:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            raise _bad(f"tools are {shown(tools)}, not the JSON text of a list") from None
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _bad(f"tools are {shown(tools)}, not a list of objects")
    return tools
