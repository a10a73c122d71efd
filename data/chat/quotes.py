"""Marks that a message spells: a user who writes ``<|im_end|>`` ends nothing.

They are put between two characters that the conversation does not have, so that after rendering they are told from the
marks of the template.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_m1.data.chat.conversation import Conversation

_PRIVATE = range(0xF0000, 0xFFFFC, 2)
"""Characters without a meaning."""
_LITERAL = ("role", "type", "id", "tool_call_id")
"""Fields that templates compare and don't print."""


@dataclass(frozen=True)
class Quotes:
    """How marks are quoted in one conversation. Make them with ``of``."""

    pair: str
    """The character before a quoted mark and the one behind it; nothing if no message spells a mark."""
    marks: tuple[str, ...]
    """Special tokens."""
    named: frozenset[str]
    """Those with a name, such as the end of a text: in what the assistant says only they are quoted."""

    @classmethod
    def of(cls, conversation: Conversation, marks: tuple[str, ...], *, named: frozenset[str]) -> Quotes:
        """Choose two characters that a conversation does not have."""
        strings = list(_strings([conversation.messages, conversation.tools]))
        marks = tuple(sorted(filter(None, marks), key=len, reverse=True))
        if not any(mark in text for text in strings for mark in marks):
            return cls("", marks, named)
        used = set().union(*strings)
        first = next(code for code in _PRIVATE if chr(code) not in used and chr(code + 1) not in used)
        return cls(chr(first) + chr(first + 1), marks, named)

    def quoted(self, conversation: Conversation) -> Conversation:
        """The conversation with its marks between quotes."""
        if not self.pair:
            return conversation
        everywhere = re.compile("|".join(map(re.escape, self.marks)))
        named = [mark for mark in self.marks if mark in self.named]
        of_assistant = re.compile("|".join(map(re.escape, named)) or "(?!)")
        messages = [
            self._quoted(message, of_assistant if message["role"] == "assistant" else everywhere)
            for message in conversation.messages
        ]
        tools = None if conversation.tools is None else self._quoted(conversation.tools, everywhere)
        return Conversation(messages, tools)

    def _quoted(self, value: Any, pattern: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda found: f"{self.pair[0]}{found[0]}{self.pair[1]}", value)
        if isinstance(value, dict):
            return {key: item if key in _LITERAL else self._quoted(item, pattern) for key, item in value.items()}
        return [self._quoted(item, pattern) for item in value] if isinstance(value, list) else value

    def removed(self, text: str) -> str:
        """A text without quotes."""
        return text.translate(dict.fromkeys(map(ord, self.pair)))

    def pieces(self, text: str) -> Iterator[tuple[int, str, bool]]:
        """The parts of a text between quotes and outside of them: where each begins, itself, whether it is quoted."""
        if not self.pair:
            yield 0, text, False
            return
        end = 0
        # A template may have cut a text between its quotes: what is left of a pair is dropped.
        for found in re.finditer(f"{self.pair[0]}([^{self.pair}]*){self.pair[1]}|[{self.pair}]", text):
            yield end, text[end : found.start()], False
            if found[1]:
                yield found.start(1), found[1], True
            end = found.end()
        yield end, text[end:], False


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
