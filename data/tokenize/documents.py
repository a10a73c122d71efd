"""A batch of raw documents, and how text is made of them: what a tokenising process needs of the readers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from itertools import islice
from pathlib import Path
from typing import Any, Literal

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_KEYS_NAMED, _KEY_LENGTH = 12, 40
_STRING_OR_BRACKET = re.compile(
    r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|(?P<open>[\[{])|(?P<close>[\]}])|(?P<unclosed>")', re.DOTALL
)
# Numbers of thousands of digits, which int() refuses, are read as their length; control characters are let through.
_LENIENT = json.JSONDecoder(parse_int=len, strict=False)


class SkipReason(StrEnum):
    """Why a document is left out."""

    NOT_JSON = "not a JSON object"
    KEY_MISSING = "key missing"
    NOT_STRING = "not a string"
    EMPTY = "empty"
    BAD_UTF8 = "bad UTF-8"
    NOT_CHAT = "not a conversation"
    REFUSED = "refused by the chat template"
    NOT_SHOWN = "left out in part by the chat template"
    NO_LABEL = "without anything to learn"
    TOO_LONG = "longer than --max-length"


class BadDocumentError(Exception):
    """A document that is skipped."""

    def __init__(self, reason: SkipReason, keys: tuple[str, ...] = (), detail: str = "") -> None:
        super().__init__(str(reason))
        self.reason = reason
        self.keys = keys
        """Where the text's key is missing: those that are there, the first few, each as JSON spells it and cut."""
        self.detail = detail
        """What is wrong with this one in particular, in a line, where the reason leaves that open."""


class Part(Enum):
    """Which part of a document a batch holds: large ones come in several batches."""

    WHOLE = auto()
    """The batch holds whole documents, any number of them."""
    FIRST = auto()
    MIDDLE = auto()
    LAST = auto()


@dataclass(frozen=True)
class RawBatch:
    """Consecutive documents, or one part of a document, not yet parsed."""

    file: Path
    """Where they are from; the first of several small files."""
    kind: Literal["json", "text"]
    """json: each payload is one line. text: each payload is the document itself."""
    content: bytes | list[bytes | SkipReason]
    """Of kind json lines, end to end; of kind text the payloads."""
    file_bytes: int
    """Bytes on disk that were read for it, for a progress bar."""
    part: Part = Part.WHOLE
    keys: tuple[str, ...] = ()
    """Of a record that was parsed here and lacks the text's key: ``BadDocumentError.keys``."""

    @property
    def size(self) -> int:
        """Bytes of its documents."""
        return len(self.content) if isinstance(self.content, bytes) else sum(map(len, self.content))

    @property
    def payloads(self) -> Iterator[bytes | SkipReason]:
        """The documents; a reason stands for one that could not even be read as bytes."""
        if isinstance(self.content, list):
            yield from self.content
            return
        for line in self.content.split(b"\n"):
            if line and not line.isspace():
                yield line


def document_text(kind: Literal["json", "text"], payload: bytes | SkipReason, *, text_key: str) -> str:
    """Text of one document, valid Unicode that is not blank.

    Raises:
        BadDocumentError: with the reason to skip it.
    """
    text = decoded(kind, payload, text_key=text_key)
    if not text or text.isspace():
        raise BadDocumentError(SkipReason.EMPTY)
    return text


def decoded(kind: Literal["json", "text"], payload: bytes | SkipReason, *, text_key: str) -> str:
    """:func:`document_text` that may be blank, as a part of a document may.

    Raises:
        BadDocumentError: with the reason to skip it.
    """
    if isinstance(payload, SkipReason):
        raise BadDocumentError(payload)
    try:
        return payload.decode("utf-8") if kind == "text" else _json_text(payload, text_key)
    except UnicodeError as error:
        # JSON can spell half a surrogate pair as well, which is no character.
        raise BadDocumentError(SkipReason.BAD_UTF8) from error


def utf8_size(text: str) -> int:
    """Bytes of ``text`` in UTF-8; raises ``UnicodeEncodeError`` for half a surrogate pair."""
    return len(text) if text.isascii() else len(text.encode("utf-8"))


def _json_text(line: bytes, text_key: str) -> str:
    text = record_with(line, text_key)[text_key]
    if not isinstance(text, str):
        raise BadDocumentError(SkipReason.NOT_STRING)
    utf8_size(text)
    return text


def record_with(line: bytes, key: str) -> dict[str, Any]:
    """The JSON object of a line, which has ``key``.

    Raises:
        BadDocumentError: it is none, or has not.
        UnicodeDecodeError: it is none, for it is no UTF-8.
    """
    record = json_record(line)
    if record is None:
        # Said of the whole line, for bytes that are no UTF-8 usually break its JSON too.
        line.decode("utf-8")
        raise BadDocumentError(SkipReason.NOT_JSON)
    if key not in record:
        keys = tuple(_short(json.dumps(name)) for name in islice(record, _KEYS_NAMED))
        raise BadDocumentError(SkipReason.KEY_MISSING, keys)
    return record


def _short(key: str) -> str:
    return key if len(key) <= _KEY_LENGTH else f"{key[: _KEY_LENGTH - 3]}..."


def json_record(line: bytes) -> dict[str, Any] | None:
    """Parse the JSON object of a line; None if it is none.

    What no other field can do is to cost its neighbour: numbers of any length, nesting of any depth, control characters
    and bytes that are no UTF-8 are let through; such bytes become lone surrogates.
    """
    text = line.removeprefix(BYTE_ORDER_MARK).decode("utf-8", "surrogateescape")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        try:
            record = _LENIENT.decode(_flat(text).strip(" \t\r\n"))
        except ValueError:
            return None
    return record if isinstance(record, dict) else None


def _flat(text: str) -> str:
    """The outermost JSON container of ``text`` with those within it replaced by 0; they are checked on the way.

    Raises:
        ValueError: a container is not closed or is no JSON.
    """
    # Of every container that is open, what was read of it so far.
    opened: list[list[str]] = [[]]
    end = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        if match["open"]:
            opened[-1].append(text[end : match.start()])
            opened.append([])
            end = match.start()
        elif match["close"]:
            container = "".join([*opened.pop(), text[end : match.end()]])
            if not opened:
                raise ValueError("a bracket closes that was not opened")
            end = match.end()
            if len(opened) > 1:
                _LENIENT.decode(container)
                container = "0"
            opened[-1].append(container)
        elif match["unclosed"]:
            raise ValueError("a string is not closed")
    if len(opened) > 1:
        raise ValueError("a bracket is not closed")
    return "".join([*opened[0], text[end:]])
