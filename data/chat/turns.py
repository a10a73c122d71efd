"""From a conversation to the texts that are trained on, and what of them is learnt.

A template that only ever adds to what it has rendered gives one text, in which every turn of the assistant is learnt.
Others change the past: those of MiniMax-M2 and Qwen3 keep thinking between the tool calls of a turn, and drop it once a
user asks again. Then a conversation gives a text for each turn, as the model sees it when it answers; the turns before
are context.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_m1.data.chat.adapt import adapted
from megatron_m1.data.chat.conversation import REASONING, Conversation, texts_of
from megatron_m1.data.chat.quotes import Quotes
from megatron_m1.data.chat.template import ChatTemplate, Rendered
from megatron_m1.data.tokenize.documents import BadDocumentError, SkipReason

EMPTY_TURNS = "empty turns of the assistant, which are not learnt"
TURN_BY_TURN = "conversations in a document for each turn, for the template changes earlier turns"
_THINKING = re.compile(r"</?think>")


@dataclass(frozen=True)
class ChatText:
    """One text to train on."""

    text: str
    """Rendered, with quoted marks."""
    spans: list[tuple[int, int]]
    """What of it is learnt: first character and the one after the last."""


@dataclass(frozen=True)
class ChatTexts:
    """All of a conversation."""

    texts: list[ChatText]
    whole: str
    """The whole conversation, which tells it from others."""
    quotes: Quotes
    remarks: Counter[str] = field(default_factory=Counter)


def chat_texts(template: ChatTemplate, conversation: Conversation, marks: tuple[str, ...]) -> ChatTexts:
    """Render a conversation.

    Args:
        template: of the model.
        conversation: from ``parse_conversation``.
        marks: special tokens of the tokenizer: where a message spells one it stays text. What the assistant says may
            have those that have no name of their own, such as marks of thinking.

    Raises:
        BadDocumentError: nothing of it is learnt, the template refuses it or leaves something of it out.
    """
    fitted = adapted(template, conversation)
    quotes = Quotes.of(fitted, marks, named=frozenset(template.variables.values()))
    fitted = quotes.quoted(fitted)
    ends = fitted.turn_ends
    if not ends:
        raise BadDocumentError(SkipReason.NO_LABEL)
    remarks: Counter[str] = Counter()
    whole = template.render(fitted)
    if all(whole.text.startswith(template.render(fitted.until(end)).text) for end in ends[:-1]):
        texts = [_learnt(whole, fitted, 0, quotes, remarks)]
    else:
        remarks[TURN_BY_TURN] = 1
        texts = [_of_turn(template, fitted.until(end), quotes, remarks) for end in ends]
    texts = [text for text in texts if text.spans]
    if not texts:
        raise BadDocumentError(SkipReason.NO_LABEL)
    return ChatTexts(texts, quotes.removed(whole.text), quotes, remarks)


def _of_turn(template: ChatTemplate, conversation: Conversation, quotes: Quotes, remarks: Counter[str]) -> ChatText:
    """The last turn, after what came before it."""
    roles = [message["role"] for message in conversation.messages]
    first = len(roles)
    while first and roles[first - 1] in ("assistant", "tool"):
        first -= 1
    rendered, question = template.render(conversation), template.render(conversation.until(first))
    if not rendered.text.startswith(question.text):
        detail = f"message {first + 1}, an answer, changes how the template renders what was asked"
        raise BadDocumentError(SkipReason.REFUSED, detail=detail)
    spans = [span for span in rendered.spans if span[0] >= len(question.text)]
    return _learnt(Rendered(rendered.text, spans), conversation, first, quotes, remarks)


def _learnt(
    rendered: Rendered, conversation: Conversation, first: int, quotes: Quotes, remarks: Counter[str]
) -> ChatText:
    """Take out the empty turns from message ``first`` on, and check that the others are there."""
    messages = list(enumerate(conversation.messages, start=1))
    speaks = [(number, message) for number, message in messages[first:] if message["role"] == "assistant"]
    learnt = " ".join(rendered.text[start:end] for start, end in rendered.spans)
    for number, message in messages:
        if message["role"] != "assistant":
            _check_shown(message, number, rendered.text, quotes)
    for number, message in speaks:
        _check_shown(message, number, learnt, quotes)
    for tool in conversation.tools or ():
        name = tool.get("function", tool).get("name") if isinstance(tool.get("function", tool), dict) else None
        if isinstance(name, str) and name not in rendered.text:
            raise BadDocumentError(SkipReason.NOT_SHOWN, detail=f"its tools ({quotes.removed(name)} among them)")
    empty = [index for index, (_, message) in enumerate(speaks) if not any(_said(message))]
    spans = rendered.spans
    if empty and len(spans) != len(speaks):
        detail = f"message {speaks[empty[0]][0]} is empty, and the template's marks don't tell where it is"
        raise BadDocumentError(SkipReason.REFUSED, detail=detail)
    if empty:
        remarks[EMPTY_TURNS] += len(empty)
        spans = [span for index, span in enumerate(spans) if index not in empty]
    return ChatText(rendered.text, spans)


def _check_shown(message: Mapping[str, Any], number: int, text: str, quotes: Quotes) -> None:
    for said in _said(message):
        # Some templates print what tools say as JSON.
        if said not in text and json.dumps(said, ensure_ascii=False)[1:-1] not in text:
            begin = quotes.removed(said)[:40]
            what = f"message {number}, of the {message['role']}: {begin!r}"
            raise BadDocumentError(SkipReason.NOT_SHOWN, detail=what)


def _said(message: Mapping[str, Any]) -> Iterator[str]:
    """Whatever a message says that no template may leave out."""
    for text in (message.get(REASONING, ""), *texts_of(message["content"])):
        yield from filter(None, map(str.strip, _THINKING.split(text)))
    for call in message.get("tool_calls", ()):
        yield call["function"]["name"]
