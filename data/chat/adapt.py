"""Conversations as one template wants them: how contents are given, where calls and reasoning go."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_m1.data.chat.conversation import REASONING, Conversation, texts_of
from megatron_m1.data.chat.template import ChatTemplate
from megatron_m1.data.tokenize.documents import BadDocumentError, SkipReason


def adapted(template: ChatTemplate, conversation: Conversation) -> Conversation:
    """Give a conversation the form that ``template`` prints.

    - Contents that it takes as lists of parts only become such a list, of one text; those that it takes as texts only
      become a text.
    - Reasoning for which it has no field goes before the content, between ``<think>`` and ``</think>``.
    - Calls that it leaves to the content go behind it: ``<tool_calls>``, a JSON object of name and arguments a line,
      ``</tool_calls>``. Results of tools that follow each other are then parts of one message, each with its name.

    Raises:
        BadDocumentError: it has no place for calls, or a result lacks the name that it prints.
    """
    messages: list[dict[str, Any]] = []
    for number, message in enumerate(conversation.messages, start=1):
        fitted = _with_reasoning(template, message)
        if fitted.get("tool_calls"):
            fitted = _with_calls(template, fitted, number)
        if fitted["role"] == "tool" and template.has_calls_in_content:
            parts = _results(fitted, number)
            if messages and messages[-1]["role"] == "tool":
                messages[-1]["content"] = [*messages[-1]["content"], *parts]
                continue
            fitted["content"] = parts
        elif template.takes_parts and not template.takes_text:
            fitted["content"] = [{"type": "text", "text": "".join(texts_of(fitted["content"]))}]
        elif template.takes_text and not template.takes_parts:
            fitted["content"] = "".join(texts_of(fitted["content"]))
        messages.append(fitted)
    return Conversation(messages, conversation.tools)


def _with_reasoning(template: ChatTemplate, message: Mapping[str, Any]) -> dict[str, Any]:
    fitted = dict(message)
    if REASONING not in fitted:
        return fitted
    if REASONING in template.reads:
        return fitted
    reasoning = fitted.pop(REASONING)
    other = next((name for name in ("reasoning", "thinking") if name in template.reads), None)
    if other is not None:
        return fitted | {other: reasoning}
    content = "".join(texts_of(fitted["content"]))
    return fitted | {"content": f"<think>\n{reasoning}\n</think>\n{content}"}


def _with_calls(template: ChatTemplate, message: dict[str, Any], number: int) -> dict[str, Any]:
    if "tool_calls" in template.reads:
        return message
    if not template.has_calls_in_content:
        raise BadDocumentError(SkipReason.NOT_SHOWN, detail=f"the tool_calls of message {number}")
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message["tool_calls"]]
    content = "".join(texts_of(message["content"]))
    between = "" if not content or content.endswith("\n") else "\n"
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return rest | {"content": "\n".join([f"{content}{between}<tool_calls>", *calls, "</tool_calls>"])}


def _results(message: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    named = [{"name": message.get("name")} | part for part in parts]
    if not all(isinstance(part["name"], str) for part in named):
        detail = f"message {number} is a tool's result without its name: give name, or the tool_call_id of its call"
        raise BadDocumentError(SkipReason.NOT_CHAT, detail=detail)
    return named
