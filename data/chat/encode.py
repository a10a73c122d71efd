"""Batches of conversations to ids and loss masks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_m1.data.chat.conversation import parse_conversation
from megatron_m1.data.chat.options import ChatOptions
from megatron_m1.data.chat.quotes import Quotes
from megatron_m1.data.chat.template import ChatTemplate, load_template
from megatron_m1.data.chat.turns import ChatText, ChatTexts, chat_texts
from megatron_m1.data.tokenize.documents import BadDocumentError, RawBatch, SkipReason, record_with, utf8_size
from megatron_m1.data.tokenize.encode import EncodedBatch, token_dtype
from megatron_m1.data.tokenize.split import text_mark
from megatron_m1.data.tokenizers import Tokenizer
from megatron_m1.data.tokenizers.token_ids import PlacedIds

CUT = "documents cut to --max-length"
CUT_TOKENS = "tokens of them that are left out"
ACROSS = "tokens on both sides of a turn's bounds, which are not learnt"


@dataclass(frozen=True)
class Chat:
    """What encodes conversations."""

    tokenizer: Tokenizer
    template: ChatTemplate
    options: ChatOptions


def open_chat(tokenizer: Tokenizer, tokenizer_path: Path, options: ChatOptions) -> Chat:
    """Load the template of a tokenizer.

    Args:
        tokenizer: that encodes.
        tokenizer_path: where it was loaded from.
        options: of the user.

    Raises:
        OSError: a file can't be read.
        ValueError: the template can't be used, or the tokenizer can't tell where its ids are from; one line.
    """
    template = load_template(tokenizer, tokenizer_path, options.template)
    # A tokenizer that can't do it says so here and not in a worker.
    tokenizer.ids.encode_placed("", with_marks=True)
    return Chat(tokenizer, template, options)


@dataclass(frozen=True)
class ChatDocument:
    """One document."""

    ids: npt.NDArray[np.int64]
    """[n]."""
    loss: npt.NDArray[np.uint8]
    """1 where a token is learnt [n]."""


def encode_conversations(chat: Chat, batch: RawBatch, *, key: str) -> EncodedBatch:
    """Parse, render and tokenise the conversations of a batch; bad ones are counted, not raised.

    Args:
        chat: from ``open_chat``.
        batch: of JSON lines.
        key: of the messages.
    """
    documents: list[ChatDocument] = []
    skipped: Counter[str] = Counter()
    remarks: Counter[str] = Counter()
    details: dict[str, str] = {}
    marks: list[int] = []
    sizes: list[int] = []
    keys: tuple[str, ...] = ()
    for line in batch.payloads:
        try:
            texts = _texts(chat, line, key)
        except BadDocumentError as bad:
            skipped[bad.reason.value] += 1
            keys = keys or bad.keys
            if bad.detail:
                details.setdefault(bad.reason.value, bad.detail)
            continue
        remarks += texts.remarks
        for text in texts.texts:
            whole = encode_text(chat.tokenizer, text, texts.quotes, remarks)
            document = _limited(whole, chat.options, skipped, remarks)
            if document is not None:
                documents.append(document)
                # By the whole conversation, so that all its turns are held out or none.
                marks.append(text_mark(texts.whole))
                sizes.append(utf8_size(texts.quotes.removed(text.text)))
    dtype = token_dtype(chat.tokenizer.vocab_size)
    lengths = np.array([len(document.ids) for document in documents], dtype=np.int32)
    return EncodedBatch(
        np.concatenate([np.empty(0, dtype), *(document.ids.astype(dtype) for document in documents)]),
        lengths,
        sum(sizes),
        +skipped,
        marks=np.array(marks, dtype=np.uint64),
        sizes=np.array(sizes, dtype=np.int64),
        keys=keys,
        loss=np.concatenate([np.empty(0, np.uint8), *(document.loss for document in documents)]),
        details=details,
        remarks=+remarks,
    )


def _texts(chat: Chat, line: bytes | SkipReason, key: str) -> ChatTexts:
    if isinstance(line, SkipReason):
        raise BadDocumentError(line)
    try:
        conversation = parse_conversation(record_with(line, key), key)
    except UnicodeError as error:
        # JSON can spell half a surrogate pair as well, which is no character.
        raise BadDocumentError(SkipReason.BAD_UTF8) from error
    return chat_texts(chat.template, conversation, chat.tokenizer.ids.marks)


def encode_text(tokenizer: Tokenizer, text: ChatText, quotes: Quotes, remarks: Counter[str]) -> ChatDocument:
    """Ids of a rendered text, as the tokenizer gives them to all of it, and which of them are learnt.

    A token is learnt if it has a character of what is learnt and nothing else but white space, as where a line break
    behind an end mark is one token with it. A token that has more, which no template with marks of its own gives, is
    not, and is counted.
    """
    placed = PlacedIds.joined(
        (start, tokenizer.ids.encode_placed(piece, with_marks=not is_quoted))
        for start, piece, is_quoted in quotes.pieces(text.text)
        if piece
    )
    size = len(text.text)
    inside = np.zeros(size, dtype=bool)
    for start, end in text.spans:
        inside[start:end] = True
    blank = np.fromiter(map(str.isspace, text.text), dtype=bool, count=size)
    # [characters + 1]: how many of either kind there are before each
    learnt, others = (np.concatenate(([0], np.cumsum(chosen))) for chosen in (inside, ~inside & ~blank))
    starts, ends = placed.places.T
    # One without a character of its own is a part of the next one.
    ends = np.maximum(ends, np.minimum(starts + 1, size))
    has_learnt, has_others = learnt[ends] > learnt[starts], others[ends] > others[starts]
    remarks[ACROSS] += int((has_learnt & has_others).sum())
    return ChatDocument(placed.ids, (has_learnt & ~has_others).astype(np.uint8))


def _limited(
    document: ChatDocument, options: ChatOptions, skipped: Counter[str], remarks: Counter[str]
) -> ChatDocument | None:
    """The document as it is kept, None if it is left out."""
    limit = options.max_length
    if limit is not None and len(document.ids) > limit:
        if options.too_long == "drop":
            skipped[SkipReason.TOO_LONG.value] += 1
            return None
        remarks[CUT] += 1
        remarks[CUT_TOKENS] += len(document.ids) - limit
        document = ChatDocument(document.ids[:limit], document.loss[:limit])
    # The first token of a document is nobody's label.
    if not document.loss[1:].any():
        skipped[SkipReason.NO_LABEL.value] += 1
        return None
    return document
